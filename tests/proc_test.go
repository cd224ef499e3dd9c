package tests

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

const (
	// cellVar marks a launcher and what it starts of its own, and holds the
	// cell's directory. A member of a tree may have an empty environment and
	// is known by its working directory instead.
	cellVar = "PGROUP_TEST_CELL"

	// insideVar is set in a test run inside a pid namespace, to pgroupBin.
	insideVar = "PGROUP_TEST_BIN"
)

func init() {
	roles["init"] = initRole
	roles["session"] = sessionRole
}

// inPidNamespace reports whether the test runs as it should, in a pid namespace
// of its own, where the orphans that it makes neither fill the machine's pid
// table nor wait for the machine's init. If not it runs the test so, and
// the caller has nothing left to do.
func inPidNamespace(t *testing.T, parallel int) bool {
	t.Helper()
	if os.Getenv(insideVar) != "" {
		return true
	}
	pattern := "^" + t.Name() + "$"
	if _, sub, ok := strings.Cut(flag.Lookup("test.run").Value.String(), "/"); ok {
		pattern += "/" + sub
	}
	args := []string{testExe, "-test.run=" + pattern, fmt.Sprintf("-test.parallel=%d", parallel)}
	if deadline, ok := t.Deadline(); ok {
		// Earlier than ours, so that the inner run can say where it hangs.
		args = append(args, fmt.Sprintf("-test.timeout=%s", time.Until(deadline)*9/10))
	}
	flag.Visit(func(f *flag.Flag) {
		switch f.Name {
		case "launchers", "chaos", "seed", "restarts", "whole", "test.short":
			args = append(args, "-"+f.Name+"="+f.Value.String())
		}
	})
	cmd := exec.Command(testExe, args...)
	cmd.Env = append(os.Environ(), usedRole(t, "init"), insideVar+"="+pgroupBin)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	// Pdeathsig is tied to the thread that forks.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in a pid namespace: %v\n%s", err, out)
	} else {
		t.Logf("in a pid namespace:\n%s", out)
	}
	return false
}

// initRole is PID 1 of a pid namespace: it runs args and reaps whatever is
// adopted meanwhile. All that is left ends with it.
func initRole(args []string) int {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "init: make mounts private:", err)
		return 125
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		fmt.Fprintln(os.Stderr, "init: mount /proc:", err)
		return 125
	}
	child, err := syscall.ForkExec(args[0], args, &syscall.ProcAttr{
		Env:   withoutRole(),
		Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "init: %s: %v\n", args[0], err)
		return 125
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "init: wait:", err)
			return 125
		}
		if pid == child && status.Signaled() {
			return 128 + int(status.Signal())
		}
		if pid == child {
			return status.ExitStatus()
		}
	}
}

// sessionRole does what a shell does in a terminal's window: it leads the
// session, runs args as a job in the foreground, and dies of a hang-up.
func sessionRole(args []string) int {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = withoutRole()
	cmd.SysProcAttr = &syscall.SysProcAttr{Foreground: true}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "session:", err)
		return 1
	}
	return 0
}

// withoutRole returns the environment for a process that has no role.
func withoutRole() []string {
	var env []string
	for _, entry := range os.Environ() {
		if !strings.HasPrefix(entry, roleVar+"=") {
			env = append(env, entry)
		}
	}
	return env
}

// A window is how a launcher is started in a terminal.
type window int

const (
	noWindow   window = iota // in none
	windowJob                // as a job of the session's leader: $ launcher …
	windowRoot               // as the session's leader: xterm -e launcher …
)

// A cell is one launcher with one tree in a directory of its own.
type cell struct {
	t      *testing.T
	dir    string
	cmd    *exec.Cmd     // the launcher, or with windowJob the session's leader
	stdin  *os.File      // of the tree, if in no window
	window *os.File      // the terminal's other end
	up     chan struct{} // closed when the members are in place
	eof    chan struct{} // closed when nobody holds the tree's standard output
	ended  chan struct{} // closed when cmd has ended
}

// cellDir returns a new directory that any user may enter.
func cellDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgroup-cell-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

// startCell starts cmd, a launcher that is to start a tree which writes ready
// bytes when it is in place. Whatever is left of it when the test ends is
// killed.
func startCell(t *testing.T, cmd *exec.Cmd, w window, ready int) *cell {
	t.Helper()
	c := &cell{
		t: t, dir: cellDir(t), cmd: cmd,
		up: make(chan struct{}), eof: make(chan struct{}), ended: make(chan struct{}),
	}
	stderr, err := os.Create(filepath.Join(c.dir, "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	out, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdout.Close()

	if w == noWindow {
		var stdin *os.File
		if stdin, c.stdin, err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		defer stdin.Close()
		cmd.Stdin = stdin
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.Setpgid = true // as a shell does for a job
	} else {
		var tty *os.File
		if c.window, tty, err = pty.Open(); err != nil {
			t.Fatal(err)
		}
		defer tty.Close()
		cmd.Stdin = tty
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	}
	if w == windowJob {
		cmd.Args = append([]string{testExe}, cmd.Args...)
		cmd.Path = testExe
		cmd.Env = append(cmd.Environ(), usedRole(t, "session"))
	}
	cmd.Stdout, cmd.Stderr, cmd.Dir = stdout, stderr, c.dir
	cmd.Env = append(cmd.Environ(), cellVar+"="+c.dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(c.ended)
	}()
	go c.read(out, ready)
	t.Cleanup(c.destroy)
	return c
}

// read closes c.up after ready bytes, and c.eof at the end of the file.
func (c *cell) read(out *os.File, ready int) {
	defer out.Close()
	defer close(c.eof)
	buf := make([]byte, 512)
	for seen := 0; ; {
		n, err := out.Read(buf)
		if seen < ready && seen+n >= ready {
			close(c.up)
		}
		seen += n
		if err != nil {
			return
		}
	}
}

// awaitUp waits until the members are in place.
func (c *cell) awaitUp() {
	c.t.Helper()
	select {
	case <-c.up:
		return
	case <-c.eof:
	case <-time.After(10 * time.Second):
	}
	select {
	case <-c.up: // and ended at once
	default:
		c.t.Fatalf("the tree did not come up\n%s", c.report())
	}
}

// signal sends sig to the launcher, which must be c.cmd.
func (c *cell) signal(sig syscall.Signal) {
	c.t.Helper()
	if err := c.cmd.Process.Signal(sig); err != nil && err != os.ErrProcessDone {
		c.t.Fatal(err)
	}
}

// tell lets the tree's root end with status 0.
func (c *cell) tell() {
	c.stdin.Write([]byte{'x'}) // in vain if the root has ended
}

// leader returns the leader's pid, 0 if there is none.
func (c *cell) leader() int {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", c.cmd.Process.Pid))
	for _, list := range lists {
		b, _ := os.ReadFile(list)
		for _, field := range bytes.Fields(b) {
			var pid int
			fmt.Sscan(string(field), &pid)
			if cmdline(pid)[0] == "pgroup-leader" {
				return pid
			}
		}
	}
	return 0
}

// members returns the tree's living processes, as far as one look at /proc
// shows them.
func (c *cell) members() []int {
	return pidsWith(func(pid int) bool {
		return isTree(pid) && samePath(pid, "cwd", c.dir)
	})
}

// launchers returns the living processes that the launcher consists of, and
// those between the two.
func (c *cell) launchers() []int {
	return pidsWith(func(pid int) bool {
		return marked(pid, c.dir) && !isTree(pid)
	})
}

func isTree(pid int) bool {
	bin, err := buildTree()
	return err == nil && samePath(pid, "exe", bin)
}

// samePath reports whether /proc/PID/link leads to path. It compares the files
// and not their names, which differ in another mount namespace. A zombie
// has no such links.
func samePath(pid int, link, path string) bool {
	have, err := os.Stat(fmt.Sprintf("/proc/%d/%s", pid, link))
	if err != nil {
		return false
	}
	want, err := os.Stat(path)
	return err == nil && os.SameFile(have, want)
}

// marked reports whether pid's environment has the mark of the cell in dir.
func marked(pid int, dir string) bool {
	env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	return bytes.Contains(append([]byte{0}, env...), []byte("\x00"+cellVar+"="+dir+"\x00"))
}

// await waits until nothing of the cell lives. It gives the launchers limit to
// end, and then the members a moment to be gone. It returns how many
// survive, and whether a launcher still lives.
func (c *cell) await(limit time.Duration) (survivors int, hangs bool) {
	poll := func(limit time.Duration, done func() bool) bool {
		for end := time.Now().Add(limit); !done(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				return false
			}
		}
		return true
	}
	hangs = !poll(limit, func() bool {
		return isClosed(c.ended) && len(c.launchers()) == 0
	})
	// End of file proves it for a member that is never there when one looks.
	gone := poll(time.Second, func() bool {
		survivors = len(c.members())
		return survivors == 0 && isClosed(c.eof)
	})
	if !gone && !hangs {
		survivors = max(survivors, 1)
	}
	return survivors, hangs
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// report tells what a failure needs to be understood: who lives, and what was
// written to standard error.
func (c *cell) report() string {
	var b strings.Builder
	for _, pid := range append(c.launchers(), c.members()...) {
		s, _ := readStat(pid)
		fmt.Fprintf(&b, "pid %d ppid %d pgid %d %s %q\n", pid, s.ppid, s.pgid, s.state, cmdline(pid))
	}
	text, _ := os.ReadFile(filepath.Join(c.dir, "stderr"))
	return b.String() + string(text)
}

// destroy kills whatever is left of the cell.
func (c *cell) destroy() {
	if c.stdin != nil {
		defer c.stdin.Close()
	}
	if c.window != nil {
		defer c.window.Close()
	}
	os.WriteFile(filepath.Join(c.dir, "stop"), nil, 0o666)
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		left := append(c.launchers(), c.members()...)
		if len(left) == 0 && isClosed(c.eof) && isClosed(c.ended) {
			return
		}
		for _, pid := range left {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	c.t.Errorf("can't end all of the cell: %d of the launcher and %d of the tree live", len(c.launchers()), len(c.members()))
}

// noneLeft fails the test if a process of the built pgroup lives.
func noneLeft(t *testing.T) {
	t.Helper()
	for _, pid := range pidsWith(func(pid int) bool { return samePath(pid, "exe", pgroupBin) }) {
		t.Errorf("process %d of pgroup lives on: %q", pid, cmdline(pid))
	}
}
