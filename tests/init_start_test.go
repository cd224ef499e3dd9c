package tests

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestServiceStatuses goes through the life of a service and wants each verb's
// statuses to be LSB's.
func TestServiceStatuses(t *testing.T) {
	t.Parallel()
	s := newService(t)
	asking := [][]string{{"signal", "USR1"}, {"reload"}, {"scale", "2"}, {"events"}}

	// Not running.
	s.want(3, "status")
	if st := s.status(3); st.State != "stopped" {
		t.Errorf("not running: %+v", st)
	}
	if stdout, _ := s.want(0, "stop"); stdout != "not running\n" {
		t.Errorf("stop of what does not run says %q", stdout)
	}
	for _, verb := range asking {
		_, stderr := s.want(7, verb[0], verb[1:]...)
		if strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, "not running; start it first") {
			t.Errorf("%s says %q", verb, stderr)
		}
	}

	// Running.
	s.want(0, "start", shell(serves, "--ready", "fd")...)
	stdout, _ := s.want(0, "start", shell(serves, "--ready", "fd")...)
	if want := fmt.Sprintf("already running (pid %d)\n", s.launcher()); stdout != want {
		t.Errorf("a second start says %q, want %q", stdout, want)
	}
	st := s.status(0)
	if st.State != "ready" || st.PID != s.launcher() || len(st.Workers) != 1 || st.Workers[0].State != "ready" || st.Workers[0].Usage.Memory < 4096 || st.Usage.Processes != 1 {
		t.Errorf("running: %+v", st)
	}
	text, _ := s.want(0, "status")
	for _, want := range []string{strconv.Itoa(st.PID), strconv.Itoa(st.Workers[0].PID), "ready", "WORKER", "MEMORY"} {
		if !strings.Contains(text, want) {
			t.Errorf("status has no %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "\x1b") {
		t.Errorf("colours for what is no terminal: %q", text)
	}
	s.want(0, "reload")
	s.want(0, "scale", "2")
	s.want(0, "signal", "WINCH")
	s.want(0, "restart", shell(serves, "--ready", "fd")...)
	if again := s.status(0); again.PID == st.PID || len(again.Workers) != 1 {
		t.Errorf("after a restart: %+v", again)
	}
	if stdout, stderr := s.want(0, "stop"); stdout != "" || stderr != "" {
		t.Errorf("stop says %q, %q", stdout, stderr)
	}
	s.nothingLeft()
	s.noFiles()
	s.want(0, "stop")
	s.want(0, "restart", shell(serves, "--ready", "fd")...) // of what does not run
	s.want(0, "stop")

	// Dead.
	s.want(0, "start", shell(serves, "--ready", "fd", "-g", "0")...)
	syscall.Kill(s.launcher(), syscall.SIGKILL)
	eventually(t, "all dead", func() bool { return len(s.living()) == 0 })
	if st := s.status(1); st.State != "dead" {
		t.Errorf("dead: %+v", st)
	}
	for _, verb := range asking {
		s.want(7, verb[0], verb[1:]...)
	}
	s.want(0, "stop")
	s.noFiles()

	// Wrong usage.
	for _, verb := range append(asking, []string{"start", "true"}, []string{"restart", "true"}, []string{"stop"}, []string{"status"}) {
		for _, args := range [][]string{{"--bogus"}, {"-p"}, {}} {
			cmd := exec.Command(pgroupBin, append([]string{verb[0]}, args...)...)
			if status, stdout, stderr := s.finish(cmd); status != 2 || stdout != "" || strings.Count(stderr, "\n") != 1 {
				t.Errorf("%s %q: status %d, %q, %q", verb[0], args, status, stdout, stderr)
			}
		}
	}
	for _, args := range [][]string{{"start"}, {"start", "--tty", "true"}, {"start", "--events", "fd:3", "true"}, {"start", "--wait", "x", "true"}, {"scale", "0"}, {"scale"}, {"signal", "NONE"}} {
		s.want(2, args[0], args[1:]...)
	}
	s.want(125, "run", "--bogus", "true")
	s.noFiles()
}

// TestServiceOfAnother has an ordinary user use the verbs on root's service.
func TestServiceOfAnother(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user too")
	}
	s := newService(t)
	s.want(0, "start", shell(serves, "--ready", "fd")...)
	as := func(want int, verb string, args ...string) string {
		t.Helper()
		cmd := s.command(verb, args...)
		asUser(cmd, nobody)
		status, stdout, stderr := s.finish(cmd)
		if status != want {
			t.Errorf("%s as another user: status %d, want %d\n%s%s", verb, status, want, stdout, stderr)
		}
		return stdout
	}
	if stdout := as(0, "status"); !strings.Contains(stdout, "running") || !strings.Contains(stdout, "permission denied") {
		t.Errorf("status says %q", stdout)
	}
	as(4, "stop")
	as(4, "signal", "TERM")
	as(4, "reload")
	as(4, "scale", "2")
	as(4, "events")
	as(0, "start", "true") // it runs
	// The mode is not all that keeps others out.
	if err := os.Chmod(s.pidfile+".sock", 0o666); err != nil {
		t.Fatal(err)
	}
	as(1, "reload")
	if st := s.status(0); st.State != "ready" {
		t.Errorf("then: %+v", st)
	}
	s.want(0, "stop")
}

// TestStartReturns starts from callers that wait for the end of all that they
// gave to it.
func TestStartReturns(t *testing.T) {
	t.Parallel()
	s := newService(t)
	r, w := pipe(t)
	cmd := s.command("start", shell(`echo a >&2; echo b; `+serves, "--ready", "fd", "-v")...)
	cmd.ExtraFiles = []*os.File{w}
	status, stdout, stderr := s.finish(cmd) // it reads both streams until their end
	w.Close()
	if status != 0 || stdout != "" || stderr != "" {
		t.Errorf("status %d, %q, %q", status, stdout, stderr)
	}
	r.SetReadDeadline(time.Now().Add(jobLimit))
	if n, err := r.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
		t.Errorf("a pipe of the caller's is held: %v", err)
	}
	st := s.status(0)
	for _, pid := range []int{st.PID, st.Leader, st.Workers[0].PID} {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if f := strings.Fields(string(text)); len(f) < 7 || f[6] != "0" {
			t.Errorf("process %d has a terminal: %q", pid, text)
		}
		for fd, file := range openFiles(t, pid) {
			if number, _ := strconv.Atoi(fd); pid == st.Workers[0].PID && number > 2 && !strings.HasPrefix(file, "pipe:") {
				t.Errorf("the worker has %s open as %s", file, fd)
			}
		}
	}
	s.want(0, "stop")

	// The same by a shell.
	sh := exec.Command("sh", "-c", `out=$("$0" start -p x.pid -- sleep 1000 2>&1) && echo "<$out>"`, pgroupBin)
	sh.Dir, sh.Env = s.dir, cmd.Env
	if status, stdout, _ := s.finish(sh); status != 0 || stdout != "<>\n" {
		t.Errorf("status %d, %q", status, stdout)
	}
	s.want(0, "stop")
	s.nothingLeft()
}

// TestStartInTerminal closes the terminal that a service was started in.
func TestStartInTerminal(t *testing.T) {
	t.Parallel()
	s := newService(t)
	tm := openShell(t, "bash")
	tm.run("export " + cellVar + "=" + s.dir + "; cd " + s.dir)
	tm.run("pgroup start -p x.pid --ready fd -- sh -c '" + serves + "'")
	st := s.status(0)
	tm.hangUp()
	<-tm.done
	if now := s.status(0); now.PID != st.PID || now.State != "ready" || now.Workers[0].PID != st.Workers[0].PID {
		t.Errorf("before the hang-up %+v, after it %+v", st, now)
	}
	s.want(0, "stop")
	s.nothingLeft()
}

// TestStartFails wants the status and the last lines of what fails before it is
// ready, and nothing left of it.
func TestStartFails(t *testing.T) {
	t.Parallel()
	leaves := `(trap '' TERM HUP; setsid sh -c 'trap "" TERM; sleep 1000' & sleep 1000) & `
	for _, test := range []struct {
		name   string
		args   []string
		status int
		stderr string // pgroup's last line
	}{
		{"status", shell(leaves+`seq 30 >&2; exit 3`, "--ready", "fd", "-g", "0.1"), 3, "status 3"},
		{"success", shell(leaves+`seq 30 >&2; exit 0`, "--ready", "fd", "-g", "0.1"), 1, "status 0"},
		{"signal", shell(leaves+`seq 30 >&2; kill -KILL $$`, "--ready", "fd", "-g", "0.1"), 137, "KILL"},
		{"second", shell(`[ $PGROUP_WORKER = 1 ] && exec sleep 1000; seq 30 >&2; exit 4`, "-n2", "--ready", "fd", "--until", "failure"), 4, "status 4"},
		{"duration", shell(`seq 30 >&2; exit 5`, "--ready", "10s"), 5, "status 5"},
		{"missing", []string{"/no/such/command"}, 127, "status 127"},
		{"directory", []string{"/"}, 126, "status 126"},
		{"socket", []string{"--listen", "unix:/no/such/directory/socket", "true"}, 125, "status 125"},
	} {
		for _, log := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/log=%v", test.name, log), func(t *testing.T) {
				s := newService(t)
				args := test.args
				if log {
					args = append([]string{"--log", "log"}, args...)
					if err := os.WriteFile(filepath.Join(s.dir, "log"), []byte("old\n"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				stdout, stderr := s.want(test.status, "start", args...)
				s.nothingLeft()
				s.noFiles()
				lines := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n")
				last := lines[len(lines)-1]
				if stdout != "" || !strings.HasPrefix(last, "pgroup: not started: ") || !strings.Contains(last, test.stderr) {
					t.Errorf("it says %q, %q", stdout, stderr)
				}
				if strings.Contains(stderr, "old") || len(lines) > 11 || len(lines) < 2 {
					t.Errorf("standard error is\n%s", stderr)
				}
				if strings.Contains(strings.Join(args, " "), "seq 30") && !slices.Contains(lines, "30") {
					t.Errorf("the last line of the command is missing:\n%s", stderr)
				}
				if text, _ := os.ReadFile(filepath.Join(s.dir, "log")); log && !strings.HasPrefix(string(text), "old\n") {
					t.Errorf("the log is %q", text)
				}
				s.want(3, "status")
			})
		}
	}
}

// TestStartWithoutLog gives a log that can't be opened.
func TestStartWithoutLog(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, log := range []string{"/no/such/log", "/tmp"} {
		_, stderr := s.want(1, "start", shell("touch ran", "--log", log)...)
		if strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, "cannot open the log: open "+log) {
			t.Errorf("--log %s: it says %q", log, stderr)
		}
	}
	s.noFiles()
	if _, err := os.Stat(filepath.Join(s.dir, "ran")); err == nil {
		t.Error("it ran")
	}
}

// TestAnothersFiles has another program own the pid file, then the socket.
func TestAnothersFiles(t *testing.T) {
	t.Parallel()
	s := newService(t)
	text := fmt.Sprintln(os.Getpid())
	if err := os.WriteFile(s.pidfile, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	names := "names the living process " + strings.TrimSpace(text)
	for _, test := range []struct {
		status int
		verb   string
		args   []string
	}{
		{1, "start", shell("touch ran")},
		{125, "run", shell("touch ran")},
		{1, "stop", nil},
		{1, "restart", shell("touch ran")},
		{1, "reload", nil},
		{4, "status", nil},
	} {
		stdout, stderr := s.want(test.status, test.verb, test.args...)
		if !strings.Contains(stdout+stderr, names) {
			t.Errorf("%s says %q, %q", test.verb, stdout, stderr)
		}
	}
	if got, _ := os.ReadFile(s.pidfile); string(got) != text {
		t.Errorf("the pid file is %q now", got)
	}
	os.Remove(s.pidfile)

	listener, err := net.Listen("unix", s.pidfile+".sock")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, stderr := s.want(125, "run", shell("touch ran")...)
	if !strings.Contains(stderr, "another program listens there") {
		t.Errorf("it says %q", stderr)
	}
	conn, err := net.Dial("unix", s.pidfile+".sock")
	if err != nil {
		t.Fatalf("the listener has lost its name: %v", err)
	}
	conn.Close()
	if _, err := os.Stat(filepath.Join(s.dir, "ran")); err == nil {
		t.Error("it ran")
	}
}

func TestStartLimit(t *testing.T) {
	t.Parallel()
	s := newService(t)
	_, stderr := s.want(124, "start", shell(`echo words >&2; `+neverReady, "--ready", "fd", "--wait", "0.3")...)
	s.nothingLeft()
	s.noFiles()
	if want := "words\npgroup: not started: not all workers were ready within 300ms\n"; stderr != want {
		t.Errorf("it says %q, want %q", stderr, want)
	}
}

// TestStartEnds ends the start itself while it waits.
func TestStartEnds(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{unix.SIGKILL, unix.SIGTERM, unix.SIGINT, unix.SIGHUP} {
		t.Run(signalName(sig), func(t *testing.T) {
			s := newService(t)
			j := startJob(t, s.command("start", shell(neverReady, "--ready", "fd")...))
			s.lines("ups", 1)
			j.signal(sig)
			j.wantStatus(signalName(sig))
			if sig != unix.SIGKILL {
				s.nothingLeft()
			}
			eventually(t, "all gone", func() bool { return len(s.living()) == 0 })
			s.noFiles()
			s.want(3, "status")
		})
	}
}

// TestStartTogether starts the same service from many processes at once.
func TestStartTogether(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const n = 30
	var status [n]int
	var out, errs [n]string
	together(n, func(i int) {
		status[i], out[i], errs[i] = s.do("start", shell(serves, "--ready", "fd")...)
	})
	first := 0
	already := fmt.Sprintf("already running (pid %d)\n", s.launcher())
	for i := range n {
		switch {
		case status[i] != 0 || errs[i] != "" || out[i] != "" && out[i] != already:
			t.Errorf("start %d: status %d, %q, %q", i, status[i], out[i], errs[i])
		case out[i] == "":
			first++
		}
	}
	if first != 1 {
		t.Errorf("%d starts have started it", first)
	}
	if ups := s.lines("ups", 1); len(ups) != 1 {
		t.Errorf("workers: %q", ups)
	}
	s.want(0, "stop")
	s.nothingLeft()
	s.noFiles()
}

// TestStartMeetsAnother starts while another start is not ready yet: both fail,
// or both succeed, together.
func TestStartMeetsAnother(t *testing.T) {
	t.Parallel()
	for _, ends := range []string{"well", "badly"} {
		t.Run(ends, func(t *testing.T) {
			s := newService(t)
			if err := unix.Mkfifo(filepath.Join(s.dir, "go"), 0o600); err != nil {
				t.Fatal(err)
			}
			// The second one finds no "go" to wait for, and is ready.
			text := `echo $$ >>ups; if [ -p go ]; then read how <go; rm go; [ $how = well ] || exit 9; fi; ` + serves
			first := startJob(t, s.command("start", shell(text, "--ready", "fd")...))
			s.lines("ups", 1)
			launcher := s.launcher()
			files := len(openFiles(t, launcher))
			second := startJob(t, s.command("start", shell(text, "--ready", "fd")...))
			// It has come to ask, and waits for an answer.
			eventually(t, "the second asks", func() bool { return len(openFiles(t, launcher)) > files })
			if err := os.WriteFile(filepath.Join(s.dir, "go"), []byte(ends+"\n"), 0); err != nil {
				t.Fatal(err)
			}
			second.wantStatus("0")
			if ends == "well" {
				first.wantStatus("0")
				if line := second.line(); line != fmt.Sprintf("already running (pid %d)", launcher) {
					t.Errorf("the second says %q", line)
				}
			} else {
				first.wantStatus("9")
				if s.launcher() == launcher {
					t.Error("the second did not start it again")
				}
			}
			s.want(0, "stop")
		})
	}
}

func TestStopWhileStarting(t *testing.T) {
	t.Parallel()
	s := newService(t)
	j := startJob(t, s.command("start", shell(neverReady, "--ready", "fd")...))
	s.lines("ups", 1)
	s.want(0, "stop")
	s.noFiles()
	j.wantStatus("143")
	s.nothingLeft()
}

// TestStartWhileStopping starts what is being stopped: it waits for the end, and
// starts it again.
func TestStartWhileStopping(t *testing.T) {
	t.Parallel()
	s := newService(t)
	unix.Mkfifo(filepath.Join(s.dir, "wake"), 0o600)
	s.want(0, "start", shell(outlivesTerm, "--ready", "fd", "-g", "1h")...)
	launcher := s.launcher()
	stop := startJob(t, s.command("stop"))
	eventually(t, "stopping", func() bool { return s.status(0).State == "stopping" })
	start := startJob(t, s.command("start", shell(serves, "--ready", "fd")...))
	s.want(124, "start", shell(serves, "--ready", "fd", "--wait", "0.2")...)
	s.end()
	stop.wantStatus("0")
	start.wantStatus("0")
	if s.launcher() == launcher {
		t.Error("not started again")
	}
	s.want(0, "stop")
	s.nothingLeft()
}

// end ends what runs outlivesTerm.
func (s *service) end() {
	s.t.Helper()
	os.WriteFile(filepath.Join(s.dir, "end"), nil, 0o600)
	eventually(s.t, "the worker waits", func() bool {
		f, err := os.OpenFile(filepath.Join(s.dir, "wake"), os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return false // ENXIO: it has not come to that yet
		}
		defer f.Close()
		_, err = fmt.Fprintln(f)
		return err == nil
	})
}

// TestRunPidfile runs in the foreground what the verbs then act on.
func TestRunPidfile(t *testing.T) {
	t.Parallel()
	s := newService(t)
	j := startJob(t, s.command("run", shell(`echo $PGROUP_PID; exec sleep 1000`)...))
	pid := j.pid()
	if pid != j.cmd.Process.Pid || s.launcher() != pid {
		t.Errorf("pid %d, pid file %d", pid, s.launcher())
	}
	if info, err := os.Stat(s.pidfile + ".sock"); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	_, stderr := s.want(125, "run", "true")
	if !strings.Contains(stderr, strconv.Itoa(pid)) {
		t.Errorf("a second run does not name the holder: %q", stderr)
	}
	if st := s.status(0); st.PID != pid || st.State != "ready" {
		t.Errorf("status %+v", st)
	}
	s.want(0, "stop")
	j.wantStatus("TERM")
	s.nothingLeft()
	s.noFiles()

	// It ends by itself, and can't be started.
	s.want(3, "run", shell("exit 3")...)
	s.noFiles()
	s.want(127, "run", "/no/such/command")
	s.noFiles()
	if _, stderr := s.want(125, "run", "-l", "unix:/no/such/socket", "true"); !strings.HasSuffix(stderr, "create the directory /no/such first\n") {
		t.Errorf("it says %q", stderr)
	}
	s.noFiles()

	// Another file is in the socket's place.
	if err := os.WriteFile(s.pidfile+".sock", []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.want(125, "run", shell("touch ran")...)
	if text, _ := os.ReadFile(s.pidfile + ".sock"); string(text) != "mine" {
		t.Errorf("the other file is %q now", text)
	}
	os.Remove(s.pidfile + ".sock")
	s.noFiles()
	if _, err := os.Stat(filepath.Join(s.dir, "ran")); err == nil {
		t.Error("it ran")
	}
}

// TestLongPidfile has a path that is longer than the address of a socket may be.
func TestLongPidfile(t *testing.T) {
	t.Parallel()
	s := newService(t)
	dir := filepath.Join(s.dir, strings.Repeat("long", 40))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.pidfile = filepath.Join(dir, "x.pid")
	s.want(0, "start", shell(serves, "--ready", "fd")...)
	s.want(0, "scale", "2")
	s.want(0, "stop")
	s.pidfile = filepath.Join(s.dir, strings.Repeat("x", 200))
	if _, stderr := s.want(125, "start", "true"); !strings.Contains(stderr, "shorter") {
		t.Errorf("it says %q", stderr)
	}
	s.noFiles()
}

// TestLog truncates the log that a service writes to.
func TestLog(t *testing.T) {
	t.Parallel()
	s := newService(t)
	unix.Mkfifo(filepath.Join(s.dir, "in"), 0o600)
	log := filepath.Join(s.dir, "log")
	s.want(0, "start", shell(becomesReady+`echo one; while read line <in; do echo $line; done`, "--ready", "fd", "--log", "log")...)
	s.lines("log", 1)
	if info, err := os.Stat(log); err != nil || info.Mode().Perm()&0o027 != 0 {
		t.Errorf("the log: %v, %v", info, err)
	}
	if err := os.Truncate(log, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "in"), []byte("two\n"), 0); err != nil {
		t.Fatal(err)
	}
	if lines := s.lines("log", 1); lines[0] != "two" {
		t.Errorf("after the truncation: %q", lines)
	}
	s.want(0, "stop")
}

// TestServiceManager receives what systemd would of a unit with Type=notify.
func TestServiceManager(t *testing.T) {
	t.Parallel()
	for _, verb := range []string{"run", "start"} {
		t.Run(verb, func(t *testing.T) {
			s := newService(t)
			name := filepath.Join(s.dir, "notify")
			conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetReadDeadline(time.Now().Add(jobLimit))
			next := func() string {
				buf := make([]byte, 1024)
				n, err := conn.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				return string(buf[:n])
			}
			unix.Mkfifo(filepath.Join(s.dir, "go"), 0o600)
			cmd := s.command(verb, shell(`read x <go; echo ready >>order; `+serves, "--ready", "fd")...)
			cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+name)
			j := startJob(t, cmd)
			if err := os.WriteFile(filepath.Join(s.dir, "go"), []byte("\n"), 0); err != nil {
				t.Fatal(err)
			}
			want := "READY=1"
			got := next()
			if verb == "start" {
				want = fmt.Sprintf("MAINPID=%d\nREADY=1", s.launcher())
				j.wantStatus("0")
			}
			if got != want {
				t.Errorf("it said %q, want %q", got, want)
			}
			s.lines("order", 1)
			s.want(0, "stop")
			if verb == "run" {
				if got := next(); got != "STOPPING=1" {
					t.Errorf("then %q", got)
				}
			}
		})
	}
}
