package tests

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// ptyDeadline bounds each wait on a terminal: generous, because it is only
// used up by a failing test.
const ptyDeadline = 10 * time.Second

// A terminal is a pty whose session leader is a shell, or another program,
// that the test talks to as a user does: it types and it reads the screen.
type terminal struct {
	t      *testing.T
	leader int    // pid of the session leader
	dir    string // its working directory
	mark   string // an entry in the environment of all that it starts

	initial unix.Termios // the settings before anything ran

	master *os.File
	done   chan struct{} // closed when the session leader has been reaped

	mu     sync.Mutex
	screen []byte        // all that was output
	more   chan struct{} // has room for one: there is more on the screen
	seen   int           // how much of screen expect has consumed
}

// openTerminal starts argv as the session leader on a new pty.
func openTerminal(t *testing.T, env []string, argv ...string) *terminal {
	t.Helper()
	ptmx, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	// pty.Open leaves the file in blocking mode, where Close would only take
	// effect when the Read under way returns: no way to hang up.
	fd, err := unix.FcntlInt(ptmx.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ptmx.Close()
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	tm := &terminal{
		t:      t,
		dir:    t.TempDir(),
		master: os.NewFile(uintptr(fd), "ptmx"),
		done:   make(chan struct{}),
		more:   make(chan struct{}, 1),
	}
	tm.mark = "PGROUP_TEST_TERMINAL=" + tm.dir
	// Wide, so that no shell wraps or scrolls a line that is typed.
	tm.resize(24, 500)
	tm.initial = tm.settings()

	testdata, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = tm.dir
	cmd.Env = append([]string{
		tm.mark,
		"D=" + testdata,
		"HOME=" + tm.dir,
		"INPUTRC=/dev/null",
		"LC_ALL=C",
		"PATH=" + filepath.Dir(pgroupBin) + ":" + os.Getenv("PATH"),
		"TERM=dumb",
	}, env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	tm.leader = cmd.Process.Pid
	go tm.read()
	go func() {
		cmd.Wait()
		close(tm.done)
	}()
	t.Cleanup(tm.end)
	return tm
}

// openShell starts the interactive shell sh on a new pty, and waits for its
// prompt, which shows the status of the last command.
func openShell(t *testing.T, sh string) *terminal {
	t.Helper()
	argv := []string{sh, "-i"}
	if sh == "bash" {
		argv = []string{sh, "--norc", "--noprofile", "-i"}
	}
	tm := openTerminal(t, nil, argv...)
	tm.expect(`[$#] $`)
	tm.enter(`PS1='[pg $?] '`)
	tm.prompt()
	return tm
}

func (tm *terminal) read() {
	buf := make([]byte, 4096)
	for {
		n, err := tm.master.Read(buf)
		tm.mu.Lock()
		tm.screen = append(tm.screen, buf[:n]...)
		tm.mu.Unlock()
		select {
		case tm.more <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// end ends all that was started on the terminal, each process by its pid.
func (tm *terminal) end() {
	victims := append(tm.family(), tm.leader)
	for range 1000 {
		for _, pid := range victims {
			unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(time.Millisecond)
		if victims = tm.marked(); len(victims) == 0 {
			break
		}
	}
	<-tm.done
	tm.master.Close()
}

// hangUp closes the window.
func (tm *terminal) hangUp() {
	tm.t.Helper()
	if err := tm.master.Close(); err != nil {
		tm.t.Fatal(err)
	}
}

// press types keys, control characters included.
func (tm *terminal) press(keys string) {
	tm.t.Helper()
	if _, err := tm.master.WriteString(keys); err != nil {
		tm.t.Fatal(err)
	}
}

// enter types a line.
func (tm *terminal) enter(line string) {
	tm.t.Helper()
	tm.press(line + "\r")
}

const (
	ctrlC         = "\x03"
	ctrlD         = "\x04"
	ctrlZ         = "\x1a"
	ctrlBackslash = "\x1c"
)

// expect waits until pattern is on the screen, behind what the last call
// found, and returns the match and its groups. Mind that typed text is on the
// screen too.
func (tm *terminal) expect(pattern string) []string {
	tm.t.Helper()
	re := regexp.MustCompile(pattern)
	deadline := time.After(ptyDeadline)
	for {
		tm.mu.Lock()
		rest := tm.screen[tm.seen:]
		loc := re.FindSubmatchIndex(rest)
		var found []string
		for i := 0; i < len(loc); i += 2 {
			found = append(found, string(rest[loc[i]:loc[i+1]]))
		}
		if loc != nil {
			tm.seen += loc[1]
		}
		tm.mu.Unlock()
		if loc != nil {
			return found
		}
		select {
		case <-tm.more:
		case <-deadline:
			tm.t.Fatalf("no %q on the screen, but\n%s\n%s", pattern, tm.text(), tm.table())
		}
	}
}

// text returns the screen's last lines, with a sign where expect has got to.
func (tm *terminal) text() string {
	tm.mu.Lock()
	defer tm.mu.Unlock()
	lines := func(b []byte) string {
		return strings.ReplaceAll(strconv.Quote(string(b)), `\n`, "\n")
	}
	from := max(0, tm.seen-2000)
	return lines(tm.screen[from:tm.seen]) + "\n--- seen until here ---\n" + lines(tm.screen[tm.seen:])
}

// prompt waits for the shell's prompt and returns the status it shows. The
// terminal must be the shell's then.
func (tm *terminal) prompt() int {
	tm.t.Helper()
	status, err := strconv.Atoi(tm.expect(`\[pg (\d+)\] `)[1])
	if err != nil {
		tm.t.Fatal(err)
	}
	if g := tm.foreground(); g != tm.leader {
		tm.t.Errorf("at the prompt of shell %d the foreground group is %d", tm.leader, g)
	}
	return status
}

// run enters a line and returns what the screen shows until the prompt.
func (tm *terminal) run(line string) string {
	tm.t.Helper()
	tm.mu.Lock()
	from := tm.seen
	tm.mu.Unlock()
	tm.enter(line)
	tm.prompt()
	tm.mu.Lock()
	defer tm.mu.Unlock()
	return string(tm.screen[from:tm.seen])
}

// control calls f with the master's descriptor, and leaves it non-blocking.
func (tm *terminal) control(f func(fd int) error) {
	tm.t.Helper()
	conn, err := tm.master.SyscallConn()
	if err != nil {
		tm.t.Fatal(err)
	}
	var ferr error
	if err := conn.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		tm.t.Fatal(err)
	}
	if ferr != nil {
		tm.t.Fatal(ferr)
	}
}

func (tm *terminal) resize(rows, cols uint16) {
	tm.t.Helper()
	tm.control(func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
}

// foreground returns the terminal's foreground group. The kernel answers on
// the master for the slave, even to a process of another session.
func (tm *terminal) foreground() (pgid int) {
	tm.t.Helper()
	tm.control(func(fd int) (err error) {
		pgid, err = unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		return err
	})
	return pgid
}

// settings returns the slave's settings, which the kernel answers on the
// master as well.
func (tm *terminal) settings() (settings unix.Termios) {
	tm.t.Helper()
	tm.control(func(fd int) error {
		s, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err == nil {
			settings = *s
		}
		return err
	})
	return settings
}

// await waits until done reports true.
func (tm *terminal) await(what string, done func() bool) {
	tm.t.Helper()
	for deadline := time.Now().Add(ptyDeadline); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			tm.t.Fatalf("waited in vain: %s\n%s%s", what, tm.table(), tm.text())
		}
	}
}

// awaitState waits until all pids, with all their threads, are in one of the
// states (see proc(5)). One thread stops after the other, and until then may
// take from the terminal what the test types.
func (tm *terminal) awaitState(states string, pids ...int) {
	tm.t.Helper()
	for _, pid := range pids {
		tm.await(fmt.Sprintf("%d in state %s", pid, states), func() bool {
			tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
			for _, task := range tasks {
				if p, ok := readStatFile(task); !ok || !strings.Contains(states, p.state) {
					return false
				}
			}
			return len(tasks) > 0
		})
	}
}

// awaitGone waits until none of the pids lives, nor any other process that
// the session started, but for the session leader.
func (tm *terminal) awaitGone(pids ...int) {
	tm.t.Helper()
	lives := func(pid int) bool {
		p, ok := readStat(pid)
		return ok && p.state != "Z"
	}
	tm.await(fmt.Sprint("end of ", pids), func() bool { return !slices.ContainsFunc(pids, lives) })
	tm.await("end of all", func() bool {
		return !slices.ContainsFunc(tm.marked(), func(pid int) bool { return pid != tm.leader && lives(pid) })
	})
}

// stat is a part of proc_pid_stat(5).
type stat struct {
	state      string
	ppid, pgid int
}

// readStat reports false when there is no such process.
func readStat(pid int) (s stat, ok bool) {
	return readStatFile(fmt.Sprintf("/proc/%d/stat", pid))
}

func readStatFile(name string) (s stat, ok bool) {
	b, err := os.ReadFile(name)
	if err != nil {
		return stat{}, false
	}
	// The command's name, in parentheses, may contain anything.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	s.state = fields[0]
	s.ppid, _ = strconv.Atoi(fields[1])
	s.pgid, _ = strconv.Atoi(fields[2])
	return s, true
}

// pidsWith returns all processes for which f reports true.
func pidsWith(f func(pid int) bool) []int {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var pids []int
	for _, dir := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil && f(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// marked returns the processes that have the terminal's mark in their
// environment; a zombie has none.
func (tm *terminal) marked() []int {
	return pidsWith(func(pid int) bool {
		env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		return bytes.Contains(append(env, 0), []byte(tm.mark+"\x00"))
	})
}

// family returns the living descendants of the session leader.
func (tm *terminal) family() []int {
	pids := []int{tm.leader}
	for i := 0; i < len(pids); i++ {
		lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[i]))
		for _, list := range lists {
			b, _ := os.ReadFile(list)
			for _, f := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids[1:]
}

// path returns the pids from the session leader's child down to pid; nil when
// pid is no descendant.
func (tm *terminal) path(pid int) []int {
	var path []int
	for p := pid; p != tm.leader; {
		s, ok := readStat(p)
		if !ok || s.ppid == 0 {
			return nil
		}
		path = append([]int{p}, path...)
		p = s.ppid
	}
	return path
}

// table shows the session's processes, for a failure's message.
func (tm *terminal) table() string {
	var b strings.Builder
	for _, pid := range tm.marked() {
		s, _ := readStat(pid)
		fmt.Fprintf(&b, "pid %d ppid %d pgid %d %s %q\n", pid, s.ppid, s.pgid, s.state, cmdline(pid))
	}
	return b.String()
}

func cmdline(pid int) []string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

// ready waits until a worker says so, and returns its pid.
func (tm *terminal) ready() (worker int) {
	tm.t.Helper()
	worker, err := strconv.Atoi(tm.expect(`ready (\d+)\s`)[1])
	if err != nil {
		tm.t.Fatal(err)
	}
	return worker
}

// launcherOf returns the launcher above worker, which is the process that the
// shell started: without pgroup the worker itself.
func (tm *terminal) launcherOf(worker int) int {
	tm.t.Helper()
	path := tm.path(worker)
	if path == nil {
		tm.t.Fatalf("worker %d is no descendant of %d", worker, tm.leader)
	}
	return path[0]
}

// leaderOf returns the leader above worker.
func (tm *terminal) leaderOf(worker int) int {
	tm.t.Helper()
	for _, pid := range tm.path(worker) {
		if cmdline(pid)[0] == "pgroup-leader" {
			return pid
		}
	}
	tm.t.Fatalf("no leader above worker %d\n%s", worker, tm.table())
	return 0
}
