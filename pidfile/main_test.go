package pidfile

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary is also every helper process: started again with the name of a
// role, it becomes that role.
const roleVar, insideVar = "PIDFILE_TEST_ROLE", "PIDFILE_TEST_INSIDE"

var roles = map[string]func(args []string) int{
	"hold": holdRole,
	"give": giveRole,
	"die":  dieRole,
	"idle": idleRole,
}

func TestMain(m *testing.M) {
	if name := os.Getenv(roleVar); name != "" {
		os.Exit(roles[name](os.Args[1:]))
	}
	os.Exit(m.Run())
}

// holdRole says that it is ready, waits for the end of standard input and creates
// args[0]. It says "held", or what Create says, and removes the file when it gets
// a TERM. args[1], if any, is a role to start meanwhile.
func holdRole(args []string) int {
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	f, err := Create(args[0])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if len(args) > 1 {
		child := exec.Command("/proc/self/exe")
		child.Env = append(os.Environ(), roleVar+"="+args[1])
		child.ExtraFiles = []*os.File{os.NewFile(3, "3")}
		child.Stdout = os.Stdout
		if err := child.Start(); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	fmt.Println("held")
	<-term
	if err := f.Remove(); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// idleRole says that it lives, until fd 3 is at its end.
func idleRole([]string) int {
	fmt.Println("idle")
	io.Copy(io.Discard, os.NewFile(3, "3"))
	return 0
}

// giveRole creates args[0], sends the lock through the socket at fd 3, and waits
// to be killed.
func giveRole(args []string) int {
	f, err := Create(args[0])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("held")
	for {
		unix.Pause()
	}
}

// dieRole creates and removes args[0] and kills itself after the step args[1].
func dieRole(args []string) int {
	step = func(name string) {
		if name == args[1] {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			unix.Pause()
		}
	}
	f, err := Create(args[0])
	if err == nil {
		err = f.Remove()
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// A helper is a process in a role.
type helper struct {
	*exec.Cmd
	t    testing.TB
	out  *bufio.Reader
	wait func() error // may be called again
}

// start starts a helper. Its fd 0 is stdin, its fd 3 extra.
func start(t testing.TB, stdin, extra *os.File, role string, args ...string) *helper {
	t.Helper()
	h := &helper{Cmd: exec.Command("/proc/self/exe", args...), t: t}
	// The race detector sleeps for a second before it exits.
	h.Env = append(os.Environ(), roleVar+"="+role, "GORACE=atexit_sleep_ms=0")
	h.Stderr = os.Stderr
	if stdin != nil {
		h.Stdin = stdin
	}
	if extra != nil {
		h.ExtraFiles = []*os.File{extra}
	}
	out, err := h.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	h.out = bufio.NewReader(out)
	if err := h.Start(); err != nil {
		t.Fatal(err)
	}
	h.wait = sync.OnceValue(h.Wait)
	t.Cleanup(h.kill)
	return h
}

func (h *helper) kill() {
	h.Process.Kill()
	h.wait()
}

func (h *helper) line() string {
	line, _ := h.out.ReadString('\n')
	return strings.TrimSuffix(line, "\n")
}

func (h *helper) expect(want string) {
	h.t.Helper()
	if got := h.line(); got != want {
		h.t.Fatalf("the helper says %q, want %q", got, want)
	}
}

// hold starts a process that holds path.
func hold(t testing.TB, path string) *helper {
	t.Helper()
	h := start(t, nil, nil, "hold", path)
	h.expect("ready")
	h.expect("held")
	return h
}

// give starts a process that holds path and has given its lock to us.
func give(t testing.TB, path string) (h *helper, lock int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	h = start(t, nil, theirs, "give", path)
	theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	oob := make([]byte, 64)
	// Go receives with MSG_CMSG_CLOEXEC.
	_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		t.Fatalf("control messages: %v, %v; helper: %s", messages, err, h.line())
	}
	got, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(got) != 1 {
		t.Fatalf("descriptors: %v, %v", got, err)
	}
	h.expect("held")
	return h, got[0]
}

// inside runs the calling test again in a process of its own, changed by attr. It
// returns true in that process.
func inside(t *testing.T, attr *syscall.SysProcAttr, env ...string) bool {
	t.Helper()
	if os.Getenv(insideVar) == t.Name() {
		return true
	}
	if os.Getuid() != 0 {
		// The same with what an ordinary user may do.
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(append(os.Environ(), insideVar+"="+t.Name(), "GORACE=atexit_sleep_ms=0"), env...)
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("inside: %v\n%s", err, out)
	}
	return false
}

// mount mounts a file system in the private mount namespace of this process.
func mount(t *testing.T, kind, on string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatalf("make / private: %v", err)
	}
	if err := unix.Mount(kind, on, kind, flags, data); err != nil {
		t.Fatalf("mount %s on %s: %v", kind, on, err)
	}
	t.Cleanup(func() { unix.Unmount(on, unix.MNT_DETACH) })
}

// private returns a directory that Create takes, whatever the umask is.
func private(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// write writes a file that is older than any process: whoever has the number in
// it now is not who wrote it.
func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, time.Time{}, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func create(t testing.TB, path string) *File {
	t.Helper()
	f, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func remove(t testing.TB, f *File) {
	t.Helper()
	if err := f.Remove(); err != nil {
		t.Error(err)
	}
}

func find(t testing.TB, path string) *Holder {
	t.Helper()
	h, err := Find(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func pidText(pid int) string { return strconv.Itoa(pid) + "\n" }
