package pgroup_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"pgroup/pgroup"
)

// What this test binary does when it is started with that for an argument.
var roles = map[string]func(){
	"serve":  serve,
	"double": double,
	"me":     ExampleMe,
	"host":   host,
	"stuck":  func() { select {} },
}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "no-init" {
		noInit()
		return
	}
	pgroup.Init()
	if len(os.Args) > 1 {
		if role, ok := roles[os.Args[1]]; ok {
			role()
			return
		}
	}
	// Where the tests run in a worker themselves.
	for _, name := range []string{"PGROUP_WORKER", "PGROUP_WORKERS", "PGROUP_PID", "PGROUP_START"} {
		os.Unsetenv(name)
	}
	// A leader that is built with -race would sleep for a second at its end.
	os.Setenv("GORACE", os.Getenv("GORACE")+" atexit_sleep_ms=0")
	os.Exit(m.Run())
}

// patience is how long anything may take before a test fails.
const patience = 30 * time.Second

// A testRun is a run with all that happened so far. It is stopped at the end of
// the test.
type testRun struct {
	*pgroup.Run
	t      *testing.T
	dir    string // of its processes, unless they have left it, and their MARK
	mu     sync.Mutex
	events []pgroup.Event
	news   chan struct{} // closed and replaced at each event
}

// start starts a run whose workers begin in a directory of their own: they and
// what they start are found by it, or by their MARK.
func start(t *testing.T, spec pgroup.Spec) *testRun {
	t.Helper()
	return startContext(context.Background(), t, spec)
}

func startContext(ctx context.Context, t *testing.T, spec pgroup.Spec) *testRun {
	t.Helper()
	r := &testRun{t: t, dir: t.TempDir(), news: make(chan struct{})}
	if spec.Env == nil {
		spec.Env = append(os.Environ(), "MARK="+r.dir)
	}
	spec.Events = func(e pgroup.Event) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.events = append(r.events, e)
		close(r.news)
		r.news = make(chan struct{})
	}
	var err error
	if r.Run, err = pgroup.Start(ctx, &spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Stop()
		r.end()
		awaitNone(t, r.dir)
	})
	return r
}

// shell is a spec that has sh run the script.
func shell(script string) pgroup.Spec {
	return pgroup.Spec{Args: []string{"sh", "-c", script}, Grace: patience}
}

// await waits for the nth event that is like that, from 1.
func (r *testRun) await(n int, what string, like func(e pgroup.Event) bool) pgroup.Event {
	r.t.Helper()
	late := time.After(patience)
	for {
		r.mu.Lock()
		found := 0
		for _, e := range r.events {
			if like(e) {
				if found++; found == n {
					r.mu.Unlock()
					return e
				}
			}
		}
		news := r.news
		r.mu.Unlock()
		select {
		case <-news:
		case <-late:
			r.t.Fatalf("no %s; there were %q", what, r.list())
		}
	}
}

func (r *testRun) awaitType(n int, typ pgroup.EventType) pgroup.Event {
	r.t.Helper()
	return r.await(n, fmt.Sprintf("event %s no. %d", typ, n), func(e pgroup.Event) bool { return e.Type == typ })
}

// list is all events in short.
func (r *testRun) list() (all []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		s := string(e.Type)
		if e.Worker != 0 {
			s += " " + strconv.Itoa(e.Worker)
		}
		if e.Reason != "" {
			s += " " + e.Reason
		}
		if (e.Type == pgroup.EventExit || e.Type == pgroup.EventFail) && e.Restart >= 0 {
			s += " again"
		}
		all = append(all, s)
	}
	return all
}

func (r *testRun) end() (pgroup.Result, error) {
	r.t.Helper()
	select {
	case <-r.Done():
	case <-time.After(patience):
		r.t.Fatalf("the run does not end; there were %q", r.list())
	}
	return r.Wait()
}

// awaitStatus waits until the status is like that.
func (r *testRun) awaitStatus(what string, like func(s pgroup.Status) bool) pgroup.Status {
	r.t.Helper()
	for late := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s, err := r.Status()
		if err == nil && like(s) {
			return s
		}
		if err != nil || time.Now().After(late) {
			r.t.Fatalf("never %s: %+v, %v", what, s, err)
		}
	}
}

func workerIs(state string) func(pgroup.Status) bool {
	return func(s pgroup.Status) bool { return s.Workers[0].State == state }
}

// marked returns the processes whose MARK is dir, or that are in it.
func marked(dir string) (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		// Both are of no zombie.
		env, _ := os.ReadFile("/proc/" + entry.Name() + "/environ")
		cwd, _ := os.Readlink("/proc/" + entry.Name() + "/cwd")
		if slices.Contains(strings.Split(string(env), "\x00"), "MARK="+dir) || cwd == dir {
			pids = append(pids, pid)
		}
	}
	return pids
}

func awaitNone(t *testing.T, dir string) {
	t.Helper()
	for late := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		pids := marked(dir)
		if len(pids) == 0 {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("these live on: %v", pids)
		}
	}
}

func alive(pid int) bool { return unix.Kill(pid, 0) == nil }

// A host may use os/exec beside a cluster: nobody takes its children away, nor
// are orphans of theirs made its own.
func TestHostHasChildren(t *testing.T) {
	spec := shell("exit 1")
	spec.Workers, spec.Restart = 2, pgroup.RestartAlways
	r := start(t, spec)
	failed := make(chan error, 100)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 25 {
				err := exec.Command("sh", "-c", "exit 7").Run()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.ExitCode() != 7 {
					failed <- err
				}
			}
		})
	}
	r.awaitType(6, pgroup.EventStart) // 4 restarts
	all.Wait()
	close(failed)
	for err := range failed {
		t.Errorf("a child of the host: %v", err)
	}
	var subreaper int32
	if err := unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&subreaper)), 0, 0, 0); err != nil || subreaper != 0 {
		t.Errorf("the host has become a subreaper: %d, %v", subreaper, err)
	}
}

func TestEvents(t *testing.T) {
	for _, test := range []struct {
		name string
		spec pgroup.Spec
		want []string
		code int
	}{
		{"end", shell("exit 3"), []string{"start 1", "exit 1", "end"}, 3},
		{"not found", pgroup.Spec{Args: []string{"/nonexistent"}, Restart: pgroup.RestartAlways, Grace: patience},
			[]string{"fail 1", "stop fail", "end"}, pgroup.StatusNotFound},
		{"gives up", pgroup.Spec{Args: []string{"false"}, Restart: pgroup.RestartFailure, MaxRestarts: 1, Grace: patience},
			[]string{"start 1", "exit 1 again", "start 1", "exit 1", "stop max-restarts", "end"}, 1},
		{"message", pgroup.Spec{Args: []string{"sh", "-c", "echo '{}' >&3; read x <&3"}, Channel: true, Grace: patience},
			[]string{"start 1", "message 1", "stop request", "exit 1", "end"}, 128 + 15},
		{"bad message", pgroup.Spec{Args: []string{"sh", "-c", "echo no >&3; cat <&3"}, Channel: true},
			[]string{"start 1", "channel 1", "exit 1", "end"}, 0},
		{"ready", pgroup.Spec{Args: []string{"sh", "-c", "read x <&3"}, Channel: true, Ready: pgroup.Ready{After: time.Millisecond}, Grace: patience},
			[]string{"start 1", "ready 1", "stop request", "exit 1", "end"}, 128 + 15},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := start(t, test.spec)
			if typ := pgroup.EventType(test.name); slices.Contains(test.want, "stop request") {
				r.awaitType(1, typ)
				<-r.Ready()
				r.Stop()
			}
			result, _ := r.end()
			if got := r.list(); !slices.Equal(got, test.want) {
				t.Errorf("events %q, want %q", got, test.want)
			}
			if !slices.IsSortedFunc(r.events, func(a, b pgroup.Event) int { return a.Time.Compare(b.Time) }) {
				t.Error("the times of the events are not in order")
			}
			if result.Code() != test.code || r.events[len(r.events)-1].Code != test.code {
				t.Errorf("status %d, in the event %d, want %d", result.Code(), r.events[len(r.events)-1].Code, test.code)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	ctx := context.Background()
	if _, err := pgroup.Start(ctx, &pgroup.Spec{}); err == nil {
		t.Error("no error without a command")
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := pgroup.Start(canceled, &pgroup.Spec{Args: []string{"true"}}); err != context.Canceled {
		t.Errorf("context is done: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	spec := pgroup.Spec{Args: []string{"true"}, Listen: []pgroup.Listen{{Network: "tcp", Address: l.Addr().String()}}}
	if _, err := pgroup.Start(ctx, &spec); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("address in use: %v", err)
	}

	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		command string
		err     error
		code    int
	}{
		{"pgroup-no-such-command", fs.ErrNotExist, pgroup.StatusNotFound},
		{plain, fs.ErrPermission, pgroup.StatusNotStarted},
	} {
		result, err := start(t, pgroup.Spec{Args: []string{test.command}, Workers: 2}).end()
		if !errors.Is(err, test.err) || result.Code() != test.code {
			t.Errorf("%s: %v, %v; want %v, %d", test.command, result, err, test.err, test.code)
		}
	}
	_, err = start(t, pgroup.Spec{Args: []string{"false"}, Restart: pgroup.RestartAlways, MaxRestarts: 1}).end()
	var gaveUp *pgroup.GaveUpError
	if !errors.As(err, &gaveUp) || *gaveUp != (pgroup.GaveUpError{Worker: 1, Restarts: 1}) {
		t.Errorf("gave up: %v", err)
	}
}

// A file that was closed too soon is an error of the start that needs it.
func TestFileIsClosed(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	spec := shell("read x <&3")
	spec.Stdout, spec.Channel, spec.Restart, spec.MaxRestarts = w, true, pgroup.RestartAlways, 1
	run := start(t, spec)
	w.Close()
	if err := run.Send(1, 1); err != nil {
		t.Fatal(err)
	}
	result, err := run.end()
	if !errors.Is(err, os.ErrClosed) || result.Code() == 0 {
		t.Errorf("got %+v, %v", result, err)
	}
	if e := run.awaitType(1, pgroup.EventFail); !errors.Is(e.Err, os.ErrClosed) {
		t.Errorf("the event is %v", e)
	}
}

// noInit is a program that forgot Init.
func noInit() {
	_, err := pgroup.Start(context.Background(), &pgroup.Spec{Args: []string{"echo", "started"}, Stdout: os.Stdout})
	fmt.Println(err)
}

func TestNoInit(t *testing.T) {
	out, err := exec.Command("/proc/self/exe", "no-init").CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "pgroup.Init was not called: ") || strings.Count(string(out), "\n") != 1 {
		t.Errorf("a program without Init: %v, %q", err, out)
	}
}

func TestContextIsDone(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	r := startContext(ctx, t, shell("sleep 1000 & wait"))
	<-r.Ready()
	cancel()
	result, err := r.end()
	if result != (pgroup.Result{Signal: unix.SIGTERM}) || err != nil {
		t.Errorf("got %+v, %v", result, err)
	}
	if e := r.awaitType(1, pgroup.EventStop); e.Reason != "request" {
		t.Errorf("the reason is %s", e.Reason)
	}
}

// A worker that does not end by the stop signal has the grace period.
func TestGrace(t *testing.T) {
	for _, grace := range []time.Duration{0, 50 * time.Millisecond} {
		spec := shell(`trap '' TERM; echo '"up"' >&3; while :; do sleep 1000; done`)
		spec.Channel, spec.Grace = true, grace
		r := start(t, spec)
		r.awaitType(1, pgroup.EventMessage)
		r.Stop()
		result, err := r.end()
		if result != (pgroup.Result{Signal: unix.SIGKILL, Escalated: true}) || err != nil {
			t.Errorf("grace %v: got %+v, %v", grace, result, err)
		}
	}
}

func TestSend(t *testing.T) {
	r := start(t, pgroup.Spec{Args: []string{"/proc/self/exe", "stuck"}, Channel: true})
	for _, worker := range []int{-1, 0, 2} {
		if err := r.Send(worker, 1); err == nil || errors.Is(err, pgroup.ErrOver) {
			t.Errorf("Send to worker %d: %v", worker, err)
		}
	}
	if err := r.Send(1, make(chan int)); err == nil {
		t.Error("Send of what is no JSON: no error")
	}
	if err := r.Send(1, strings.Repeat("x", 16<<20)); !errors.Is(err, pgroup.ErrLineTooLong) {
		t.Errorf("Send of too much: %v", err)
	}
	sent, err := 0, error(nil)
	for ; err == nil && sent < 100; sent++ {
		err = r.Send(1, strings.Repeat("x", 1<<20))
	}
	if !errors.Is(err, pgroup.ErrChannelFull) {
		t.Errorf("Send to a worker that does not read: %v after %d MB", err, sent)
	}
	if _, err := r.Status(); err != nil {
		t.Errorf("Status beside it: %v", err)
	}

	without := start(t, shell("sleep 1000"))
	if err := without.Send(1, 1); err == nil {
		t.Error("Send without a channel: no error")
	}
}

func TestOver(t *testing.T) {
	r := start(t, shell("exit 5"))
	want, _ := r.end()
	for name, call := range map[string]func() error{
		"Status": func() error { _, err := r.Status(); return err },
		"Signal": func() error { return r.Signal(unix.SIGUSR1) },
		"Send":   func() error { return r.Send(1, 1) },
		"Scale":  func() error { return r.Scale(context.Background(), 2) },
		"Reload": func() error { return r.Reload(context.Background()) },
	} {
		if err := call(); !errors.Is(err, pgroup.ErrOver) || err.Error() != pgroup.ErrOver.Error() {
			t.Errorf("%s of a run that is over: %v", name, err)
		}
	}
	r.Stop()
	if got, err := r.Wait(); got != want || err != nil {
		t.Errorf("the second Wait: %+v, %v; the first: %+v", got, err, want)
	}
}

func TestStatus(t *testing.T) {
	spec := shell("echo $$ >&3; exec cat <&3")
	spec.Channel, spec.Ready = true, pgroup.Ready{After: time.Hour}
	r := start(t, spec)
	r.awaitType(1, pgroup.EventStart)
	s, err := r.Status()
	if err != nil || s.PID != os.Getpid() || !alive(s.Leader) || s.State != "starting" || s.Since.IsZero() || len(s.Workers) != 1 {
		t.Fatalf("starting: %+v, %v", s, err)
	}
	if w := s.Workers[0]; w.Worker != 1 || w.State != "running" || w.Since.Before(s.Since) || !alive(w.PID) || w.Restarts != 0 {
		t.Errorf("not ready: %+v", w)
	}

	spec.Ready = pgroup.Ready{}
	spec.Restart = pgroup.RestartAlways
	r = start(t, spec)
	s = r.awaitStatus("ready", workerIs("ready"))
	if s.State != "ready" {
		t.Errorf("all are ready: %+v", s)
	}
	pid := s.Workers[0].PID
	unix.Kill(pid, unix.SIGSTOP)
	r.awaitStatus("suspended", workerIs("suspended"))
	unix.Kill(pid, unix.SIGCONT)
	r.awaitStatus("resumed", workerIs("ready"))
	unix.Kill(pid, unix.SIGKILL)
	s = r.awaitStatus("waiting", workerIs("waiting"))
	if w := s.Workers[0]; w.PID != 0 || w.Result != "KILL" || w.Again.Before(s.Since) || s.State != "starting" {
		t.Errorf("waiting: %+v", s)
	}
	s = r.awaitStatus("started again", workerIs("ready"))
	if w := s.Workers[0]; w.PID == pid || w.Restarts != 1 {
		t.Errorf("started again: %+v", s)
	}

	// One of two has ended for good.
	spec = shell(`[ $PGROUP_WORKER = 2 ] || exit 4; trap 'read x <&3; exit' TERM; echo '"up"' >&3; while :; do sleep 0.01; done`)
	spec.Channel, spec.Workers = true, 2
	r = start(t, spec)
	r.awaitType(1, pgroup.EventMessage)
	s = r.awaitStatus("ended", workerIs("ended"))
	if w := s.Workers[0]; w.Result != "status 4" || s.State != "degraded" {
		t.Errorf("one ended: %+v", s)
	}
	r.Stop()
	r.awaitStatus("stopping", func(s pgroup.Status) bool { return s.State == "stopping" })
	if err := r.Scale(context.Background(), 3); err != pgroup.ErrStopped && !errors.Is(err, pgroup.ErrStopped) {
		t.Errorf("Scale of a run that is being stopped: %v", err)
	}
	if err := r.Send(2, 1); err != nil { // the end that it waits for
		t.Error(err)
	}
}

func TestSignal(t *testing.T) {
	spec := shell(`trap 'echo 1 >&3' USR1; echo 0 >&3; while :; do sleep 0.01; done`)
	spec.Channel = true
	r := start(t, spec)
	r.awaitType(1, pgroup.EventMessage)
	if err := r.Signal(unix.SIGUSR1); err != nil {
		t.Error(err)
	}
	if e := r.awaitType(2, pgroup.EventMessage); string(e.Data) != "1" {
		t.Errorf("the worker said %s", e.Data)
	}
}

func pids(s pgroup.Status) (all []int) {
	for _, w := range s.Workers {
		all = append(all, w.PID)
	}
	return all
}

func TestScale(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	// A worker's end leaves a daemon behind, which is found by the directory.
	// Until is not for those that are no longer wanted.
	spec := shell(`
		cd "$MARK"
		trap 'exit 1' TERM
		setsid sh -c 'trap "" TERM; echo 1 >&3; while :; do sleep 0.01; done' &
		while :; do sleep 0.01; done`)
	spec.Workers, spec.Channel, spec.Until, spec.Grace = 3, true, pgroup.UntilFirst, 200*time.Millisecond
	r := start(t, spec)
	r.awaitType(3, pgroup.EventMessage)
	before := pids(r.awaitStatus("ready", func(s pgroup.Status) bool { return s.State == "ready" }))
	if err := r.Scale(ctx, 0); err == nil {
		t.Error("scaled to 0")
	}
	if err := r.Scale(ctx, 2); err != nil {
		t.Fatal(err)
	}
	// A leader, and two of: a worker, its sleep, a daemon, its sleep.
	if left := marked(r.dir); len(left) > 9 {
		t.Errorf("Scale has left %v", left)
	}
	if after := pids(r.awaitStatus("two", func(pgroup.Status) bool { return true })); !slices.Equal(after, before[:2]) {
		t.Errorf("the pids are %v, were %v", after, before)
	}
	if err := r.Scale(ctx, 4); err != nil {
		t.Fatal(err)
	}
	s := r.awaitStatus("four", func(pgroup.Status) bool { return true })
	if len(s.Workers) != 4 || s.State != "ready" || s.Workers[0].PID != before[0] {
		t.Errorf("scaled to 4: %+v; the first was %d", s, before[0])
	}
}

// What can't be started any more is the error of who wanted more of it.
func TestScaleFails(t *testing.T) {
	dir := t.TempDir()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "command")
	if err := os.Symlink(sleep, link); err != nil {
		t.Fatal(err)
	}
	if target, err := filepath.EvalSymlinks(sleep); err != nil || filepath.Base(target) != "sleep" {
		t.Skip("sleep is a program of many names here")
	}
	r := start(t, pgroup.Spec{Args: []string{link, "1000"}, Workers: 2})
	r.awaitType(2, pgroup.EventStart)
	os.Remove(link)
	if err := r.Scale(context.Background(), 3); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("Scale: %v", err)
	}
	s, err := r.Status()
	if err != nil || s.State == "stopping" || !alive(s.Workers[0].PID) {
		t.Errorf("then: %+v, %v", s, err)
	}
}

func TestReload(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	spec := shell(`[ ! -e "$MARK"/bad ] || exit 9; exec sleep 1000`)
	spec.Workers, spec.Restart, spec.Ready = 2, pgroup.RestartAlways, pgroup.Ready{After: 20 * time.Millisecond}
	r := start(t, spec)
	isReady := func(s pgroup.Status) bool { return s.State == "ready" }
	before := pids(r.awaitStatus("ready", isReady))
	if err := r.Reload(ctx); err != nil {
		t.Fatal(err)
	}
	after := pids(r.awaitStatus("ready", isReady))
	if slices.Contains(after, before[0]) || slices.Contains(after, before[1]) || alive(before[0]) || alive(before[1]) {
		t.Errorf("the pids were %v, are %v", before, after)
	}

	if err := os.WriteFile(r.dir+"/bad", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := r.Reload(ctx); err == nil || !strings.Contains(err.Error(), "status 9") {
		t.Errorf("with a worker that fails: %v", err)
	}
	s := r.awaitStatus("ready again", isReady)
	if now := pids(s); !slices.Equal(now, after) || s.Workers[0].Restarts != 0 {
		t.Errorf("the pids were %v, the status is %+v", after, s)
	}
}

// A caller that no longer waits for a reload ends it, and has what he had.
func TestReloadIsGivenUp(t *testing.T) {
	spec := shell("exec sleep 1000")
	spec.Ready = pgroup.Ready{After: time.Hour}
	r := start(t, spec)
	pid := r.awaitType(1, pgroup.EventStart).PID
	ctx, cancel := context.WithCancel(context.Background())
	failed := make(chan error)
	go func() { failed <- r.Reload(ctx) }()
	fresh := r.awaitType(2, pgroup.EventStart).PID
	if s, err := r.Status(); err != nil || s.State != "reloading" {
		t.Errorf("meanwhile: %+v, %v", s, err)
	}
	if err := r.Scale(context.Background(), 2); !errors.Is(err, pgroup.ErrBusy) {
		t.Errorf("Scale meanwhile: %v", err)
	}
	cancel()
	if err := <-failed; err != context.Canceled {
		t.Errorf("Reload: %v", err)
	}
	r.await(1, "end of the new worker", func(e pgroup.Event) bool { return e.Type == pgroup.EventExit && e.PID == fresh })
	if s, err := r.Status(); err != nil || s.State != "starting" || !slices.Equal(pids(s), []int{pid}) {
		t.Errorf("then: %+v, %v; the pid was %d", s, err, pid)
	}
}

// Nothing is left in the host of 50 runs.
func TestHostLeaks(t *testing.T) {
	count := func() (fds, goroutines int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries), runtime.NumGoroutine()
	}
	fds, goroutines := count()
	for range 50 {
		run, err := pgroup.Start(context.Background(), &pgroup.Spec{
			Args:    []string{"sh", "-c", "read x <&3"},
			Workers: 2,
			Channel: true,
			Listen:  []pgroup.Listen{{Network: "tcp", Address: "127.0.0.1:0"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		run.Stop()
		run.Wait()
	}
	const once = 10 // what is opened or started for all runs
	for late := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		f, g := count()
		if f <= fds+once && g <= goroutines+once {
			break
		}
		if time.Now().After(late) {
			buf := make([]byte, 1<<16)
			t.Fatalf("%d descriptors and %d goroutines, before %d and %d\n%s",
				f, g, fds, goroutines, buf[:runtime.Stack(buf, true)])
		}
	}
}

// What a worker says before its end is heard, however late we listen.
func TestLastMessages(t *testing.T) {
	const many = 100
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var got []string
	run, err := pgroup.Start(context.Background(), &pgroup.Spec{
		Args:    []string{"sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo $i >&3; i=$((i+1)); done", many)},
		Stdout:  w,
		Channel: true,
		Events: func(e pgroup.Event) {
			if e.Type == pgroup.EventMessage {
				got = append(got, string(e.Data))
				io.Copy(io.Discard, r) // until the worker has ended
			}
		},
	})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	run.Wait()
	for n := range many {
		if n >= len(got) || got[n] != strconv.Itoa(n) {
			t.Fatalf("message %d of %d is wrong: %q", n, len(got), got)
		}
	}
}

// The workers begin in Dir, which has to be there.
func TestDir(t *testing.T) {
	dir := t.TempDir()
	var out strings.Builder
	run, err := pgroup.Start(t.Context(), &pgroup.Spec{Args: []string{"pwd"}, Dir: dir, Stdout: &out, Grace: patience})
	if err != nil {
		t.Fatal(err)
	}
	if result, err := run.Wait(); err != nil || result.Code() != 0 || out.String() != dir+"\n" {
		t.Errorf("pwd wrote %q, %+v, %v; want %s", out.String(), result, err, dir)
	}
	_, err = pgroup.Start(t.Context(), &pgroup.Spec{Args: []string{"pwd"}, Dir: dir + "/none"})
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that is not there: %v", err)
	}
}
