package tests

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	roles["tty-worker"] = ttyWorker
	roles["tty-session"] = ttySession
}

// ttyWorker reports each signal that it receives with its count, and each
// line that it reads, until the line is "end". Its arguments: no-tstp: ignore
// Ctrl-Z; later: read nothing before a SIGUSR1.
func ttyWorker(args []string) int {
	if slices.Contains(args, "no-tstp") {
		signal.Ignore(unix.SIGTSTP)
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, unix.SIGINT, unix.SIGWINCH, unix.SIGCONT, unix.SIGUSR1)
	lines := make(chan string)
	read := func() {
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			lines <- in.Text()
		}
		lines <- "end"
	}
	if !slices.Contains(args, "later") {
		go read()
	}
	fmt.Println("ready", os.Getpid())
	var count [65]int
	for {
		select {
		case s := <-signals:
			n := s.(unix.Signal)
			count[n]++
			fmt.Println(unix.SignalName(n), count[n])
			if n == unix.SIGUSR1 {
				go read()
			}
		case line := <-lines:
			if line == "end" {
				fmt.Printf("in all INT=%d WINCH=%d CONT=%d.\n",
					count[unix.SIGINT], count[unix.SIGWINCH], count[unix.SIGCONT])
				return 0
			}
			fmt.Println("line", line)
		}
	}
}

// ttySession leads a session and has no job control: it runs one job in the
// terminal's foreground, in its own group or in a new one (args[0] is shared or
// own), and after a SIGUSR1 reads a line itself. It never reaps the job, so that
// the job's group exists until the end.
func ttySession(args []string) int {
	// A write to the terminal must never stop it, whoever is in the foreground.
	signal.Ignore(unix.SIGTTOU)
	proceed := make(chan os.Signal, 1)
	signal.Notify(proceed, unix.SIGUSR1)
	job := exec.Command(args[1], args[2:]...)
	job.Stdin, job.Stdout, job.Stderr = os.Stdin, os.Stdout, os.Stderr
	job.Env = slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, roleVar+"=")
	})
	if args[0] == "own" {
		job.SysProcAttr = &syscall.SysProcAttr{Foreground: true, Ctty: 0}
	}
	if err := job.Start(); err != nil {
		fmt.Println(err)
		return 1
	}
	for unix.Waitid(unix.P_PID, job.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	fmt.Printf("job %d has ended\n", job.Process.Pid)
	<-proceed
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	fmt.Println("session reads", line, err)
	return 0
}

// The ways to run a command. Bare is the measure: what holds for it holds for
// pgroup.
var (
	ttyBare    = ttyMode{"bare", nil}
	ttyDefault = ttyMode{"default", []string{"run", "--"}}
	ttyTTY     = ttyMode{"tty", []string{"run", "--tty", "--"}}
)

type ttyMode struct {
	name string
	args []string // pgroup's
}

// line returns the command line for a shell.
func (m ttyMode) line(command ...string) string {
	if m.args == nil {
		return strings.Join(command, " ")
	}
	return strings.Join(slices.Concat([]string{"pgroup"}, m.args, command), " ")
}

// argv returns the command line for execve(2).
func (m ttyMode) argv(command ...string) []string {
	if m.args == nil {
		return command
	}
	return slices.Concat([]string{pgroupBin}, m.args, command)
}

// worker returns the words that start the role tty-worker in any shell.
func worker(t *testing.T, args ...string) string {
	return strings.Join(slices.Concat([]string{"env", usedRole(t, "tty-worker"), testExe}, args), " ")
}

// eachMode runs f in parallel for each of the modes.
func eachMode(t *testing.T, modes []ttyMode, f func(t *testing.T, mode ttyMode)) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			f(t, mode)
		})
	}
}

var (
	allModes = []ttyMode{ttyBare, ttyDefault, ttyTTY}
	runModes = []ttyMode{ttyDefault, ttyTTY}
)

func wantStatus(t *testing.T, got, want int) {
	t.Helper()
	if got != want {
		t.Errorf("status %d, want %d", got, want)
	}
}

func kill(t *testing.T, pid int, sig unix.Signal) {
	t.Helper()
	if err := unix.Kill(pid, sig); err != nil {
		t.Fatalf("kill(%d, %v): %v", pid, sig, err)
	}
}

// A signal that arrives twice may show only after the first: so several
// rounds, and the sum at the end.
const ttyRounds = 5

func TestTTYInterruptOnce(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter(mode.line(worker(t)))
		tm.ready()
		for i := range ttyRounds {
			tm.press(ctrlC)
			tm.expect(fmt.Sprintf(`SIGINT %d\r\n`, i+1))
		}
		tm.enter("end")
		tm.expect(fmt.Sprintf(`in all INT=%d WINCH=0 CONT=0\.`, ttyRounds))
		wantStatus(t, tm.prompt(), 0)
		tm.awaitGone()
	})
}

func TestTTYInterruptDeath(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		for _, sh := range []string{"bash", "dash"} {
			tm := openShell(t, sh)
			tm.enter(mode.line("sh $D/tty-sleep.sh"))
			w := tm.ready()
			tm.press(ctrlC)
			wantStatus(t, tm.prompt(), 128+2)
			tm.awaitGone(w)
		}
	})
}

func TestTTYQuit(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		// Whoever dumps a core, it is not the command.
		tm.run("ulimit -S -c $(ulimit -H -c)")
		tm.enter(mode.line("sh -c 'ulimit -c 0; exec sh $D/tty-sleep.sh'"))
		w := tm.ready()
		tm.press(ctrlBackslash)
		shown := tm.expect(`(?s)^(.*)\[pg (\d+)\] `)
		if shown[2] != "131" {
			t.Errorf("status %s, want 131", shown[2])
		}
		if strings.Contains(shown[1], "core dumped") || strings.Contains(shown[1], "goroutine") {
			t.Errorf("on the screen: %q", shown[1])
		}
		tm.awaitGone(w)
		if files, err := os.ReadDir(tm.dir); err != nil || len(files) > 0 {
			t.Errorf("left behind: %v, %v", files, err)
		}
	})
}

// stopAndContinue stops the job of worker w and continues it, three times, and
// then has it end.
func stopAndContinue(t *testing.T, tm *terminal, w int) {
	t.Helper()
	for i := range 3 {
		tm.press(ctrlZ)
		tm.expect(`Stopped`)
		wantStatus(t, tm.prompt(), 128+20)
		tm.awaitState("T", w, tm.launcherOf(w))
		tm.enter("fg")
		tm.expect(fmt.Sprintf(`SIGCONT %d\r\n`, i+1))
		tm.enter("hello")
		tm.expect(`line hello\r\n`)
	}
	tm.enter("end")
	tm.expect(`in all INT=0 WINCH=0 CONT=3\.`)
	wantStatus(t, tm.prompt(), 0)
	tm.awaitGone()
}

func TestTTYStopAndContinue(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		for _, sh := range []string{"bash", "dash"} {
			tm := openShell(t, sh)
			tm.enter(mode.line(worker(t)))
			w := tm.ready()
			stopAndContinue(t, tm, w)
		}
	})
}

func TestTTYBackgroundAfterStop(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter(mode.line(worker(t, "later")))
		w := tm.ready()
		tm.press(ctrlZ)
		wantStatus(t, tm.prompt(), 128+20)
		tm.awaitState("T", w)
		family := tm.family()
		tm.enter("bg")
		// The prompt and the worker's line come in any order.
		tm.expect(`SIGCONT 1\r\n`)
		tm.awaitState("RS", w, tm.launcherOf(w))
		tm.jobs(`Running`)
		tm.enter("kill %1")
		tm.awaitGone(family...)
		tm.jobs(`Terminated`)
		if out := tm.run("jobs"); strings.Contains(out, "[1]") {
			t.Errorf("jobs shows %q", out)
		}
	})
}

// A job that is killed while it is stopped is killed.
func TestTTYKillStopped(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter(mode.line("sh $D/tty-sleep.sh"))
		tm.ready()
		tm.press(ctrlZ)
		wantStatus(t, tm.prompt(), 128+20)
		family := tm.family()
		// Not what jobs shows: bash misses, one time in a hundred, that a stopped
		// job which it kills has ended.
		tm.enter("kill %1")
		tm.awaitGone(family...)
	})
}

func TestTTYStopIgnored(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter(mode.line(worker(t, "no-tstp")))
		w := tm.ready()
		for range ttyRounds {
			tm.press(ctrlZ)
			tm.enter("hello")
			tm.expect(`line hello\r\n`)
			tm.awaitState("RS", w, tm.launcherOf(w))
		}
		tm.enter("end")
		// No CONT either: nothing had been stopped.
		if out := tm.expect(`(?s)^(.*)in all INT=0 WINCH=0 CONT=0\.`); strings.Contains(out[1], "Stopped") {
			t.Errorf("the job was stopped: %q", out[1])
		}
		wantStatus(t, tm.prompt(), 0)
	})
}

// A worker that stops itself stops its job, and the shell is told by which
// signal.
func TestTTYStopsItself(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		for sig, want := range map[string]int{"TSTP": 128 + 20, "STOP": 128 + 19} {
			tm := openShell(t, "bash")
			tm.enter(mode.line("sh $D/tty-stop.sh", sig))
			w := tm.ready()
			tm.expect(`Stopped`)
			wantStatus(t, tm.prompt(), want)
			tm.awaitState("T", w, tm.launcherOf(w))
			tm.enter("fg")
			tm.awaitState("RS", w)
			tm.enter("hello")
			tm.expect(`line hello\r\n`)
			wantStatus(t, tm.prompt(), 0)
			tm.awaitGone(w)
		}
	})
}

func TestTTYWindowSize(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter(mode.line(worker(t)))
		tm.ready()
		for i := range ttyRounds {
			tm.resize(uint16(30+i), 500)
			tm.expect(fmt.Sprintf(`SIGWINCH %d\r\n`, i+1))
		}
		tm.enter("end")
		tm.expect(fmt.Sprintf(`in all INT=0 WINCH=%d CONT=0\.`, ttyRounds))
		tm.prompt()
		tm.enter(mode.line("stty size"))
		tm.expect(fmt.Sprintf(`\n%d 500\r\n`, 30+ttyRounds-1))
		wantStatus(t, tm.prompt(), 0)
	})
}

// Closing the window is a stop: the worker that lets the hang-up pass has its
// TERM, and at last its KILL.
func TestTTYHangUp(t *testing.T) {
	workers := []struct{ name, command string }{
		{"plain", "sh $D/tty-sleep.sh"},
		{"ignores HUP", "sh $D/tty-hangup.sh TERM $PWD/noted"},
		{"ignores HUP and TERM", "sh $D/tty-hangup.sh"},
	}
	states := []struct {
		name string
		to   func(tm *terminal, line string) (worker int)
	}{
		{"foreground", func(tm *terminal, line string) int {
			tm.enter(line)
			return tm.ready()
		}},
		{"background", func(tm *terminal, line string) int {
			tm.enter(line + " &")
			return tm.ready()
		}},
		{"stopped", func(tm *terminal, line string) int {
			tm.enter(line)
			w := tm.ready()
			tm.press(ctrlZ)
			tm.prompt()
			tm.awaitState("T", w)
			return w
		}},
	}
	hangUpModes := []ttyMode{
		{"default", []string{"run", "--grace", "300ms", "--"}},
		{"tty", []string{"run", "--tty", "--grace", "300ms", "--"}},
	}
	eachMode(t, hangUpModes, func(t *testing.T, mode ttyMode) {
		for _, w := range workers {
			for _, state := range states {
				t.Run(w.name+"/"+state.name, func(t *testing.T) {
					t.Parallel()
					tm := openShell(t, "bash")
					pid := state.to(tm, mode.line(w.command))
					family := tm.family()
					tm.hangUp()
					tm.awaitGone(append(family, pid)...)
					wantNoted(t, tm, w.name)
				})
			}
			t.Run(w.name+"/session leader", func(t *testing.T) {
				t.Parallel()
				tm := openTerminal(t, nil, "sh", "-c", "exec "+mode.line(w.command))
				tm.ready()
				family := tm.family()
				tm.hangUp()
				tm.awaitGone(append(family, tm.leader)...)
				<-tm.done
				wantNoted(t, tm, w.name)
			})
		}
	})
}

func wantNoted(t *testing.T, tm *terminal, worker string) {
	t.Helper()
	if worker != "ignores HUP" {
		return
	}
	if b, err := os.ReadFile(filepath.Join(tm.dir, "noted")); string(b) != "TERM\n" {
		t.Errorf("the worker noted %q (%v), want TERM", b, err)
	}
}

// As the session leader nobody could continue it, so the kernel lets no
// Ctrl-Z stop it; nor must the worker be left stopped.
func TestTTYSessionLeader(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openTerminal(t, []string{usedRole(t, "tty-worker")}, mode.argv(testExe)...)
		tm.ready()
		tm.press(ctrlC)
		tm.expect(`SIGINT 1\r\n`)
		for range ttyRounds {
			tm.press(ctrlZ)
			tm.enter("hello")
			tm.expect(`line hello\r\n`)
		}
		tm.press(ctrlD)
		tm.expect(`in all INT=1 `)
		<-tm.done
		tm.awaitGone()
	})
}

// A run in the background writes, and fg brings it to the foreground.
func TestTTYBackground(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		for _, sh := range []string{"bash", "dash"} {
			tm := openShell(t, sh)
			tm.enter(mode.line(worker(t, "later"), "&"))
			w := tm.ready()
			if g := tm.foreground(); g != tm.leader {
				t.Errorf("the foreground group is %d, want the shell's, %d", g, tm.leader)
			}
			tm.enter("fg")
			tm.await("foreground", func() bool { return tm.foreground() != tm.leader })
			tm.press(ctrlC)
			tm.expect(`SIGINT 1\r\n`)
			kill(t, w, unix.SIGUSR1)
			tm.expect(`SIGUSR1 1\r\n`)
			tm.enter("hello")
			tm.expect(`line hello\r\n`)
			tm.press(ctrlZ)
			wantStatus(t, tm.prompt(), 128+20)
			tm.enter("fg")
			tm.expect(`SIGCONT`)
			tm.enter("end")
			tm.expect(`in all INT=1 `)
			wantStatus(t, tm.prompt(), 0)
			tm.awaitGone(w)
		}
	})
}

// A run in the background that reads the terminal is stopped. (Without --tty
// it can't be: the terminal isn't its session's.)
func TestTTYBackgroundRead(t *testing.T) {
	eachMode(t, []ttyMode{ttyBare, ttyTTY}, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter(mode.line("sh $D/tty-open.sh &"))
		w := tm.ready()
		tm.awaitState("T", w, tm.launcherOf(w))
		tm.jobs(`Stopped \(tty input\)`)
		tm.enter("fg")
		tm.awaitState("RS", w, tm.launcherOf(w))
		tm.enter("hello")
		tm.expect(`line hello\r\n`)
		wantStatus(t, tm.prompt(), 0)
		tm.awaitGone(w)
	})
}

// A run in the background that changes the terminal's settings is stopped.
func TestTTYBackgroundSettings(t *testing.T) {
	eachMode(t, []ttyMode{ttyBare, ttyTTY}, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		atPrompt := tm.settings()
		tm.enter(mode.line("sh $D/tty-set.sh -echo &"))
		tm.prompt()
		tm.jobs(`Stopped \(tty output\)`)
		tm.awaitSettings(atPrompt)
		tm.enter("fg")
		w := tm.ready()
		tm.press(ctrlC)
		wantStatus(t, tm.prompt(), 128+2)
		tm.awaitGone(w)
	})
}

// jobs repeats the shell's command jobs -l until it shows pattern: the shell may
// not yet have waited for what /proc shows.
func (tm *terminal) jobs(pattern string) {
	tm.t.Helper()
	re := regexp.MustCompile(pattern)
	tm.await("jobs: "+pattern, func() bool { return re.MatchString(tm.run("jobs -l")) })
}

// awaitSettings waits until the terminal's settings are as wanted: a shell
// that is about to prompt changes them itself.
func (tm *terminal) awaitSettings(want unix.Termios) {
	tm.t.Helper()
	tm.await(fmt.Sprintf("settings %+v", want), func() bool { return tm.settings() == want })
}

// stty returns the settings as a command of the shell finds them.
func (tm *terminal) stty() string {
	tm.t.Helper()
	tm.enter("stty -g")
	settings := tm.expect(`\n([0-9a-f]+(:[0-9a-f]+)+)\r\n`)[1]
	wantStatus(tm.t, tm.prompt(), 0)
	return settings
}

func TestTTYOpen(t *testing.T) {
	eachMode(t, []ttyMode{ttyBare, ttyTTY}, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter(mode.line("sh $D/tty-open.sh </dev/null >/dev/null"))
		w := tm.ready()
		if s, _ := readStat(w); tm.foreground() != s.pgid {
			t.Errorf("the foreground group is %d, want the worker's, %d", tm.foreground(), s.pgid)
		}
		tm.enter("hello")
		tm.expect(`line hello\r\n`)
		wantStatus(t, tm.prompt(), 0)
	})
}

// Without --tty the worker has no terminal to open, only its streams.
func TestTTYOpenInNewSession(t *testing.T) {
	t.Parallel()
	tm := openShell(t, "bash")
	tm.enter(ttyDefault.line("sh $D/tty-open.sh"))
	tm.expect(`no terminal\r\n`)
	wantStatus(t, tm.prompt(), 3)
}

func TestTTYEditor(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		before := tm.stty()
		atPrompt := tm.settings()
		file := filepath.Join(tm.dir, "file")
		if err := os.WriteFile(file, []byte("old text\n"), 0o666); err != nil {
			t.Fatal(err)
		}
		tm.enter("TERM=vt100 " + mode.line("vi -u NONE -i NONE -n file"))
		tm.expect(`old text`)
		tm.press("inew words, \x1b")
		tm.expect(`new words`)
		if mode.name != "default" {
			vi := tm.foreground()
			if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", vi)); !strings.HasPrefix(string(name), "vi") {
				t.Errorf("the foreground group %d is %q's, want the editor's", vi, name)
			}
		}
		tm.press(ctrlZ)
		tm.expect(`Stopped`)
		wantStatus(t, tm.prompt(), 128+20)
		tm.awaitSettings(atPrompt)
		tm.enter("fg")
		tm.expect(`new words, old text`)
		tm.press(":wq\r")
		wantStatus(t, tm.prompt(), 0)
		tm.awaitGone()
		if b, err := os.ReadFile(file); string(b) != "new words, old text\n" {
			t.Errorf("the file is %q (%v)", b, err)
		}
		if after := tm.stty(); after != before {
			t.Errorf("settings are %s, were %s", after, before)
		}
	})
}

// ttyVictims are the processes that may be killed, each by the function that
// finds it.
var ttyVictims = []struct {
	name string
	find func(tm *terminal, worker int) int
}{
	{"worker", func(_ *terminal, worker int) int { return worker }},
	{"launcher", (*terminal).launcherOf},
	{"leader", (*terminal).leaderOf},
}

// Who is killed while the worker is in raw mode, the shell has the terminal
// again as it was.
func TestTTYRestored(t *testing.T) {
	test := func(t *testing.T, sh string, mode ttyMode, victim func(*terminal, int) int) {
		tm := openShell(t, sh)
		before := tm.stty()
		atPrompt := tm.settings()
		tm.enter(mode.line("sh $D/tty-set.sh raw -echo"))
		w := tm.ready()
		family := tm.family()
		kill(t, victim(tm, w), unix.SIGKILL)
		tm.prompt()
		tm.awaitGone(family...)
		tm.awaitSettings(atPrompt)
		if after := tm.stty(); after != before {
			t.Errorf("settings are %s, were %s", after, before)
		}
	}
	t.Run("bash/bare/worker", func(t *testing.T) {
		t.Parallel()
		test(t, "bash", ttyBare, ttyVictims[0].find)
	})
	eachMode(t, runModes, func(t *testing.T, mode ttyMode) {
		for _, sh := range []string{"bash", "dash"} {
			for _, victim := range ttyVictims {
				if sh == "dash" && victim.name == "launcher" {
					// dash takes the terminal and leaves its settings be.
					// If it is faster than the leader, that does too.
					continue
				}
				t.Run(sh+"/"+victim.name, func(t *testing.T) {
					t.Parallel()
					test(t, sh, mode, victim.find)
				})
			}
		}
	})
}

// The same without a shell that would take back the terminal: the job is in
// the session leader's group or in one of its own.
func TestTTYRestoredWithoutShell(t *testing.T) {
	start := func(t *testing.T, group string, mode ttyMode, command ...string) *terminal {
		argv := append([]string{testExe, group}, mode.argv(command...)...)
		return openTerminal(t, []string{usedRole(t, "tty-session")}, argv...)
	}
	wantEnded := func(t *testing.T, tm *terminal, group string) {
		t.Helper()
		job := tm.expect(`job (\d+) has ended\s`)[1]
		if group == "shared" {
			job = fmt.Sprint(tm.leader)
		}
		tm.awaitGone()
		tm.await("foreground group "+job, func() bool { return fmt.Sprint(tm.foreground()) == job })
		tm.awaitSettings(tm.initial)
		if group == "shared" {
			kill(t, tm.leader, unix.SIGUSR1)
			tm.enter("hello")
			tm.expect(`session reads hello`)
			<-tm.done
		}
	}
	eachMode(t, runModes, func(t *testing.T, mode ttyMode) {
		for _, group := range []string{"own", "shared"} {
			t.Run(group+"/none", func(t *testing.T) {
				t.Parallel()
				tm := start(t, group, mode, "true")
				wantEnded(t, tm, group)
			})
			for _, victim := range ttyVictims {
				t.Run(group+"/"+victim.name, func(t *testing.T) {
					t.Parallel()
					tm := start(t, group, mode, "sh", "-c", "exec sh $D/tty-set.sh raw -echo")
					w := tm.ready()
					kill(t, victim.find(tm, w), unix.SIGKILL)
					wantEnded(t, tm, group)
				})
			}
		}
	})
}

// A worker that ends by itself has meant what it set.
func TestTTYSettingsStay(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		for _, sh := range []string{"bash", "dash"} {
			tm := openShell(t, sh)
			tm.run(mode.line("stty -echo -iexten"))
			tm.enter("stty -a")
			tm.expect(` -iexten -echo `)
			wantStatus(t, tm.prompt(), 0)
		}
	})
}

// Who is killed in the background, the shell at its prompt isn't disturbed.
func TestTTYBackgroundKilled(t *testing.T) {
	test := func(t *testing.T, mode ttyMode, stopped bool, victim string, find func(*terminal, int) int) {
		tm := openShell(t, "bash")
		before := tm.stty()
		atPrompt := tm.settings()
		if stopped {
			tm.enter(mode.line("sh $D/tty-set.sh -icanon -echo"))
		} else {
			tm.enter(mode.line("sh $D/tty-sleep.sh &"))
		}
		w := tm.ready()
		if stopped {
			tm.press(ctrlZ)
			wantStatus(t, tm.prompt(), 128+20)
			tm.awaitState("T", w, tm.launcherOf(w))
		}
		tm.awaitSettings(atPrompt)
		family := tm.family()
		kill(t, find(tm, w), unix.SIGKILL)
		if stopped && victim == "leader" {
			// A stopped launcher can do nothing before it is continued.
			tm.enter("fg")
			tm.prompt()
		}
		tm.awaitGone(family...)
		tm.run("")
		tm.awaitSettings(atPrompt)
		if g := tm.foreground(); g != tm.leader {
			t.Errorf("the foreground group is %d, want the shell's, %d", g, tm.leader)
		}
		if after := tm.stty(); after != before {
			t.Errorf("settings are %s, were %s", after, before)
		}
		// What is a zombie in /proc may have a thread yet, and bash no news of it.
		tm.await("no jobs", func() bool { return !strings.Contains(tm.run("jobs"), "[1]") })
	}
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		for state, stopped := range map[string]bool{"running": false, "stopped": true} {
			for _, victim := range ttyVictims {
				if mode.name == "bare" && victim.name != "worker" {
					continue
				}
				t.Run(state+"/"+victim.name, func(t *testing.T) {
					t.Parallel()
					test(t, mode, stopped, victim.name, victim.find)
				})
			}
		}
	})
}

func TestTTYPipeline(t *testing.T) {
	eachMode(t, []ttyMode{ttyBare, ttyDefault}, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter("cat | " + mode.line("sh $D/tty-cat.sh | cat"))
		tm.ready()
		// Twice: the terminal's echo and the last cat.
		tm.enter("one")
		tm.expect(`one\r\none\r\n`)
		tm.press(ctrlZ)
		tm.expect(`Stopped`)
		wantStatus(t, tm.prompt(), 128+20)
		tm.enter("fg")
		tm.expect(`cat\r\n`)
		tm.enter("two")
		tm.expect(`two\r\ntwo\r\n`)
		family := tm.family()
		tm.press(ctrlC)
		wantStatus(t, tm.prompt(), 128+2)
		tm.awaitGone(family...)

		tm.enter("cat | " + mode.line("sh $D/tty-cat.sh | cat"))
		tm.ready()
		tm.enter("three")
		tm.expect(`three\r\nthree\r\n`)
		tm.press(ctrlD)
		wantStatus(t, tm.prompt(), 0)
		tm.awaitGone()
	})
}

// The shell counts a job as stopped when all of it is: the rest of the pipeline
// must stop even where the worker's group alone has the terminal.
func TestTTYPipelineHead(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter(mode.line(worker(t)) + " | cat")
		w := tm.ready()
		stopAndContinue(t, tm, w)
	})
}

func TestTTYScript(t *testing.T) {
	eachMode(t, []ttyMode{ttyBare, ttyDefault}, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter("sh $D/tty-script.sh trap " + mode.line(worker(t)))
		tm.ready()
		for i := range ttyRounds {
			tm.press(ctrlC)
			tm.expect(fmt.Sprintf(`SIGINT %d\r\n`, i+1))
		}
		tm.enter("end")
		tm.expect(fmt.Sprintf(`in all INT=%d `, ttyRounds))
		tm.expect(`script INT\r\nscript goes on with 0\r\n`)
		tm.enter("hello")
		tm.expect(`script reads hello\r\n`)
		wantStatus(t, tm.prompt(), 0)

		tm.enter("sh $D/tty-script.sh " + mode.line("sh $D/tty-sleep.sh"))
		tm.ready()
		tm.press(ctrlC)
		if out := tm.expect(`(?s)^(.*)\[pg 130\] `); strings.Contains(out[1], "goes on") {
			t.Errorf("the script survived: %q", out[1])
		}
		tm.awaitGone()
	})
}

// Ctrl-Z stops the script as well, and it has the terminal again when the
// command has ended.
func TestTTYScriptStopAndContinue(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter("sh $D/tty-script.sh " + mode.line(worker(t)))
		w := tm.ready()
		tm.press(ctrlZ)
		wantStatus(t, tm.prompt(), 128+20)
		path := tm.path(w)
		tm.awaitState("T", path[0], path[1], w)
		tm.enter("fg")
		tm.expect(`SIGCONT 1\r\n`)
		tm.enter("end")
		tm.expect(`script goes on with 0\r\n`)
		tm.enter("hello")
		tm.expect(`script reads hello\r\n`)
		wantStatus(t, tm.prompt(), 0)
	})
}

// With --tty too the script has the terminal again.
func TestTTYScriptReads(t *testing.T) {
	eachMode(t, allModes, func(t *testing.T, mode ttyMode) {
		tm := openShell(t, "bash")
		tm.enter("sh $D/tty-script.sh " + mode.line("true"))
		tm.expect(`script goes on with 0\r\n`)
		tm.enter("hello")
		tm.expect(`script reads hello\r\n`)
		wantStatus(t, tm.prompt(), 0)
	})
}

// The keys reach pgroup when the worker that had the terminal has ended: between
// two starts, and while another worker goes on.
func TestTTYKeysWithoutWorker(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		command string
		status  int
		when    string
	}{
		// The next start is 400 ms ahead.
		"backoff": {`pgroup run --tty --restart=always -- sh -c 'exit 3'`, 3, "again in 400ms\r\n"},
		"other":   {`pgroup run --tty -n 2 -- sh -c 'test $PGROUP_WORKER = 1 || exec sleep 100'`, 128 + 2, "status 0\r\n"},
		"worker":  {`pgroup run --tty --restart=always -- sh -c 'echo up; read x'`, 128 + 2, "\nup\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tm := openShell(t, "bash")
			tm.enter(test.command)
			tm.expect(test.when)
			tm.press(ctrlC)
			wantStatus(t, tm.prompt(), test.status)
			tm.awaitGone()
		})
	}
}

// dash tells its jobs nothing of a hang-up, and the kernel tells the foreground
// group alone.
func TestTTYHangUpUntold(t *testing.T) {
	t.Parallel()
	for name, command := range map[string]string{
		"ignored": "pgroup run --tty --grace 300ms -- sh $D/tty-hangup.sh TERM $PWD/noted",
		"restart": "pgroup run --tty --grace 300ms --restart=always -- sh $D/tty-sleep.sh",
		"second":  "pgroup run --tty --grace 300ms -n 2 -- sh $D/tty-sleep.sh",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tm := openShell(t, "dash")
			tm.enter(command)
			pid := tm.ready()
			family := tm.family()
			tm.hangUp()
			tm.awaitGone(append(family, pid)...)
		})
	}
}
