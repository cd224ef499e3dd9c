package pidfile

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCreateFindRemove(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o027))
	path := filepath.Join(private(t), "pid")
	for range 2 {
		if _, err := Find(path); !errors.Is(err, ErrNotRunning) {
			t.Errorf("Find without a file: %v", err)
		}
		f := create(t, path)
		if got := read(t, path); got != pidText(os.Getpid()) {
			t.Errorf("the file holds %q", got)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
			t.Errorf("the file is %v, %v", info.Mode(), err)
		}
		h := find(t, path)
		if h.PID != os.Getpid() || h.Gone() {
			t.Errorf("Find: pid %d, gone %v", h.PID, h.Gone())
		}
		if err := h.Signal(syscall.SIGCONT); err != nil {
			t.Error(err)
		}
		remove(t, f)
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Remove: %v", err)
		}
		if err := h.Wait(t.Context()); err != nil {
			t.Error(err)
		}
		if err := h.Signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("Signal after Remove: %v", err)
		}
		if err := f.Remove(); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("Remove again: %v", err)
		}
	}
}

func TestHeld(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	holder := hold(t, path)
	_, err := Create(path)
	var held *HeldError
	var pathErr *fs.PathError
	if !errors.As(err, &held) || held.PID != holder.Process.Pid || held.Gone {
		t.Errorf("Create of a held file: %v", err)
	}
	if !errors.As(err, &pathErr) || pathErr.Path != path {
		t.Errorf("Create of a held file: %#v", err)
	}
	want := "create pid file " + path + ": held by process " + strconv.Itoa(holder.Process.Pid) + ": stop it first, or choose another file"
	if err.Error() != want {
		t.Errorf("Create of a held file: %q, want %q", err, want)
	}
	if got := read(t, path); got != pidText(holder.Process.Pid) {
		t.Errorf("the file of another holds %q now", got)
	}
	h := find(t, path)
	if h.PID != holder.Process.Pid {
		t.Errorf("Find: pid %d", h.PID)
	}
	if err := h.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := h.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if err := holder.wait(); err != nil {
		t.Errorf("the holder: %v", err)
	}
	remove(t, create(t, path))
}

// Whatever a stale file says, its number is nobody's.
func TestStale(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	killed := hold(t, path)
	killed.kill()
	for _, text := range []string{
		read(t, path), "", "\n", "1\n", pidText(os.Getppid()), " 12", "999999\n", "4194303",
	} {
		write(t, path, text)
		if _, err := Find(path); !errors.Is(err, ErrStale) && strings.TrimSpace(text) != "" {
			t.Errorf("Find of stale %q: %v", text, err)
		}
		if text == "\n" {
			continue // nobody writes that
		}
		f := create(t, path)
		if got := read(t, path); got != pidText(os.Getpid()) {
			t.Errorf("taken over from %q: %q", text, got)
		}
		remove(t, f)
	}
}

// The pid file of another program that lives is neither free nor stale.
func TestAnothers(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	other := start(t, nil, r, "idle")
	r.Close()
	other.expect("idle")
	text := pidText(other.Process.Pid)
	refused := func() bool {
		t.Helper()
		f, err := Create(path)
		_, findErr := Find(path)
		if err == nil {
			f.Remove()
			return false
		}
		for _, err := range []error{err, findErr} {
			if err == nil || !strings.Contains(err.Error(), "names the living process "+strings.TrimSpace(text)) || errors.Is(err, ErrStale) {
				t.Errorf("another's file: %v", err)
			}
		}
		if got := read(t, path); got != text {
			t.Errorf("another's file was made %q", got)
		}
		return true
	}
	for _, test := range []struct {
		name    string
		written time.Time
		refused bool
	}{
		{"as it started", time.Now(), true},
		{"before it started", time.Now().Add(-time.Hour), false},
		{"by a clock that was set back", time.Now().Add(time.Hour), false},
	} {
		write(t, path, text)
		if err := os.Chtimes(path, time.Time{}, test.written); err != nil {
			t.Fatal(err)
		}
		if got := refused(); got != test.refused {
			t.Errorf("written %s: refused %v", test.name, got)
		}
	}
	// It has ended, and is a zombie until it is waited for.
	write(t, path, text)
	if err := os.Chtimes(path, time.Time{}, time.Now()); err != nil {
		t.Fatal(err)
	}
	other.Process.Kill()
	if _, err := other.out.ReadByte(); err != io.EOF {
		t.Fatal(err)
	}
	if refused() {
		t.Error("refused for a zombie")
	}
}

// What is no pid file isn't written to, and survives.
func TestSomethingElse(t *testing.T) {
	path := filepath.Join(private(t), "notes")
	for _, text := range []string{"\n", "hello\n", "12 34\n", "-1\n", "0\n", "4194304\n", "+7", "1_000", strings.Repeat("1", 1000)} {
		write(t, path, text)
		if f, err := Create(path); err == nil || !strings.Contains(err.Error(), "it is no pid file") {
			t.Errorf("Create over %q: %v", text, err)
			if err == nil {
				f.Remove()
			}
		}
		if got := read(t, path); got != text {
			t.Errorf("%q was made %q", text, got)
		}
	}
}

func FuzzIsPID(f *testing.F) {
	for _, text := range []string{"1\n", " 12 ", "4194303", "4194304", "", "-1", "1\x00"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if !isPID(text) {
			return
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil || pid <= 0 || pid >= 1<<22 || !isPID([]byte(pidText(pid))) {
			t.Errorf("isPID(%q), which is %d, %v", text, pid, err)
		}
	})
}

func FuzzIdentity(f *testing.F) {
	f.Add(int64(1), 1)
	f.Add(int64(1<<40-1), 1<<22-1)
	f.Add(int64(0), 1)
	f.Fuzz(func(t *testing.T, start int64, pid int) {
		id := identity{pid & (1<<pidBits - 1), start & (1<<40 - 1)}
		if id.length() <= 0 || holder(id.length()) != id {
			t.Errorf("%+v is %#x is %+v", id, id.length(), holder(id.length()))
		}
		if start >= 0 && start < mark && holder(start) != (identity{}) {
			t.Errorf("a lock of another's, %d bytes, is taken for %+v's", start, holder(start))
		}
	})
}

// The launcher is killed, the leader lives on with the lock.
func TestHandedOver(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	giver, lock := give(t, path)
	h := find(t, path)
	if h.Gone() || h.PID != giver.Process.Pid {
		t.Errorf("pid %d, gone %v", h.PID, h.Gone())
	}
	giver.Process.Kill()
	// A zombie is gone too.
	if err := unix.Waitid(unix.P_PID, giver.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	for _, state := range []string{"zombie", "reaped"} {
		again := find(t, path)
		for _, h := range []*Holder{h, again} {
			if !h.Gone() || h.PID != giver.Process.Pid {
				t.Errorf("%s: pid %d, gone %v", state, h.PID, h.Gone())
			}
			if err := h.Signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
				t.Errorf("%s: Signal: %v", state, err)
			}
		}
		var held *HeldError
		if _, err := Create(path); !errors.As(err, &held) || !held.Gone || held.PID != giver.Process.Pid {
			t.Errorf("%s: Create: %v", state, err)
		}
		giver.wait()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := h.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait for a lock that is held: %v", err)
	}
	done := make(chan error)
	go func() { done <- h.Wait(t.Context()) }()
	unix.Close(lock)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := Find(path); !errors.Is(err, ErrStale) {
		t.Errorf("Find: %v", err)
	}
	remove(t, create(t, path))
}

// Another process has got the pid of the launcher, which was killed, while the
// leader still holds the lock.
func TestReusedPID(t *testing.T) {
	if !inside(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}) {
		return
	}
	mount(t, "proc", "/proc", 0, "")
	path := filepath.Join(private(t), "pid")
	giver, lock := give(t, path)
	defer unix.Close(lock)
	before := find(t, path)
	giver.kill()
	// The next clock tick: no real system gives all pids away within one.
	time.Sleep(20 * time.Millisecond)
	var bystander *helper
	for range 100 {
		// The threads that Go starts have numbers too.
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(giver.Process.Pid-1)), 0); err != nil {
			t.Fatal(err)
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		bystander = start(t, nil, r, "idle")
		r.Close()
		if bystander.Process.Pid == giver.Process.Pid {
			break
		}
		bystander.kill()
	}
	if bystander.Process.Pid != giver.Process.Pid {
		t.Fatalf("cannot get pid %d again", giver.Process.Pid)
	}
	bystander.expect("idle")
	for _, h := range []*Holder{before, find(t, path)} {
		if h.PID != giver.Process.Pid || !h.Gone() {
			t.Errorf("pid %d, gone %v", h.PID, h.Gone())
		}
		if err := h.Signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("Signal: %v", err)
		}
	}
	var held *HeldError
	if _, err := Create(path); !errors.As(err, &held) || !held.Gone {
		t.Errorf("Create: %v", err)
	}
	if hasEnded(pidfd(t, bystander.Process.Pid)) {
		t.Error("the bystander was signalled")
	}
}

func pidfd(t *testing.T, pid int) int {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// Somebody writes another pid into the file of a live holder.
func TestForgedText(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	holder := hold(t, path)
	bystander := hold(t, filepath.Join(private(t), "pid"))
	write(t, path, pidText(bystander.Process.Pid))
	h := find(t, path)
	if h.PID != holder.Process.Pid {
		t.Errorf("Find: pid %d, want the holder %d", h.PID, holder.Process.Pid)
	}
	if err := h.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := h.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if err := holder.wait(); err != nil {
		t.Error(err)
	}
	if hasEnded(pidfd(t, bystander.Process.Pid)) {
		t.Error("the bystander was signalled")
	}
}

// A Holder is not taken for the one that took the file over after it.
func TestTakenOverMeanwhile(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	first := hold(t, path)
	h := find(t, path)
	first.kill()
	second := hold(t, path)
	if err := h.Signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Signal: %v", err)
	}
	if err := h.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if now := find(t, path); now.PID != second.Process.Pid || now.Gone() {
		t.Errorf("pid %d, gone %v", now.PID, now.Gone())
	}
}

// Remove leaves alone what is somebody else's.
func TestReplaced(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	f := create(t, path)
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	other := hold(t, path)
	remove(t, f)
	if h := find(t, path); h.PID != other.Process.Pid {
		t.Errorf("Find: pid %d", h.PID)
	}
	if got := read(t, path+".old"); got != pidText(os.Getpid()) {
		t.Errorf("the renamed file holds %q", got)
	}
}

// The file is replaced between Create's open and its lock.
func TestReplacedUnderneath(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	n := 0
	step = func(name string) {
		if n++; name == "opened" && n < 5 {
			os.Remove(path)
			if n%2 == 0 {
				write(t, path, "77\n")
			}
		}
	}
	defer func() { step = func(string) {} }()
	f := create(t, path)
	if h := find(t, path); h.PID != os.Getpid() {
		t.Errorf("Find: pid %d", h.PID)
	}
	remove(t, f)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Remove: %v", err)
	}
}

// A Create that has the lock isn't a holder yet, and never is one with an old
// or half a number.
func TestHalfMade(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	write(t, path, pidText(os.Getppid()))
	at, next := make(chan string), make(chan bool)
	step = func(name string) {
		at <- name
		<-next
	}
	defer func() { step = func(string) {} }()
	var f *File
	created := make(chan error)
	go func() (err error) {
		defer func() { created <- err }()
		f, err = Create(path)
		return err
	}()
	var found []chan int
	for _, want := range []string{"opened", "claimed", "emptied", "written"} {
		if got := <-at; got != want {
			t.Fatalf("step %q, want %q", got, want)
		}
		if want != "opened" {
			c := make(chan int, 1)
			found = append(found, c)
			go func() {
				h, err := Find(path)
				if err != nil {
					t.Errorf("Find after %q: %v", want, err)
					c <- -1
					return
				}
				defer h.Close()
				c <- h.PID
			}()
		}
		if want == "written" { // it takes its time
			if h := find(t, path); h.PID != 0 || !h.Gone() {
				t.Errorf("Find during a Create: pid %d, gone %v", h.PID, h.Gone())
			}
			second := start(t, nil, nil, "hold", path)
			second.expect("ready")
			if line := second.line(); !strings.Contains(line, "has not said its pid") {
				t.Errorf("Create during a Create: %q", line)
			}
		}
		next <- true
	}
	if got := <-at; got != "held" {
		t.Fatalf("step %q, want held", got)
	}
	if h := find(t, path); h.PID != os.Getpid() {
		t.Errorf("Find: pid %d", h.PID)
	}
	next <- true
	if err := <-created; err != nil {
		t.Fatal(err)
	}
	for _, c := range found {
		if pid := <-c; pid != 0 && pid != os.Getpid() {
			t.Errorf("Find during a Create: pid %d", pid)
		}
	}
	step = func(string) {}
	remove(t, f)
}

// Any user who may read the file may lock it for reading.
func TestReadersLock(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	write(t, path, "77\n")
	reader, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := setLock(int(reader.Fd()), unix.Flock_t{Type: unix.F_RDLCK}); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(path); !errors.Is(err, ErrStale) {
		t.Errorf("Find: %v", err)
	}
	var held *HeldError
	if _, err := Create(path); !errors.As(err, &held) || held.PID != 0 {
		t.Errorf("Create: %v", err)
	}
	// One that lets go in time is no obstacle.
	step = func(name string) {
		if name == "opened" {
			reader.Close()
		}
	}
	defer func() { step = func(string) {} }()
	remove(t, create(t, path))
}

// What the holder starts doesn't hold the file.
func TestChildDoesNotHold(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	holder := start(t, nil, r, "hold", path, "idle")
	r.Close()
	holder.expect("ready")
	lines := map[string]bool{holder.line(): true, holder.line(): true}
	if !lines["held"] || !lines["idle"] {
		t.Fatalf("the helpers say %v", lines)
	}
	h := find(t, path)
	holder.Process.Kill()
	if err := h.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := Find(path); !errors.Is(err, ErrStale) {
		t.Errorf("Find: %v", err)
	}
	// The child lives: it still can be told to end, and then closes its output.
	w.Close()
	if line := holder.line(); line != "" {
		t.Errorf("the child says %q", line)
	}
}

// A process may leave its directory, and the directory may be renamed.
func TestRelative(t *testing.T) {
	dir := private(t)
	t.Chdir(dir)
	f := create(t, "pid")
	if h := find(t, "./pid"); h.PID != os.Getpid() {
		t.Errorf("Find: pid %d", h.PID)
	}
	t.Chdir("/")
	if err := os.Rename(dir, dir+".new"); err != nil {
		t.Fatal(err)
	}
	remove(t, f)
	if left, err := os.ReadDir(dir + ".new"); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// Nothing stays open.
func TestDescriptors(t *testing.T) {
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	dir := private(t)
	path := filepath.Join(dir, "pid")
	write(t, filepath.Join(dir, "else"), "else\n")
	use := func() {
		f := create(t, path)
		h, err := Find(path)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := h.Wait(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Wait: %v", err)
		}
		for _, path := range []string{path, filepath.Join(dir, "else"), filepath.Join(dir, "no/pid"), dir} {
			if _, err := Create(path); err == nil {
				t.Errorf("Create of %s succeeds", path)
			}
		}
		remove(t, f)
		if err := h.Wait(t.Context()); err != nil {
			t.Error(err)
		}
		h.Close()
		for _, path := range []string{path, filepath.Join(dir, "else"), filepath.Join(dir, "no/pid"), dir} {
			if _, err := Find(path); err == nil {
				t.Errorf("Find of %s succeeds", path)
			}
		}
	}
	use() // the runtime opens some of its own
	before := count()
	for range 10 {
		use()
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// The event that Wait waits for comes with the last of the holders.
func TestWatchCloses(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	giver, lock := give(t, path)
	h := find(t, path)
	watch, closed := watchCloses(h.fd)
	if watch == nil {
		t.Fatal("the file can't be watched")
	}
	defer watch.Close()
	giver.kill()
	select {
	case <-closed:
		t.Error("an event while the lock is held")
	default:
	}
	unix.Close(lock)
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Error("no event when the lock was freed")
	}
}
