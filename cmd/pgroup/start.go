package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pgroup/pgroup"
	"pgroup/pidfile"
)

// startFlags are those of the verbs that start a service.
type startFlags struct {
	runFlags
	Wait duration `default:"60s" placeholder:"D" group:"service" help:"How long it may take until all workers are ready (${default}); 0: any time."`
	Log  *string  `placeholder:"PATH" group:"service" help:"Append standard output and standard error to this file."`
}

type startCmd struct {
	startFlags
}

// Help is what pgroup start --help says below the first line.
func (c *startCmd) Help() string {
	return `pgroup start [FLAGS] -p PATH [--] COMMAND [ARG...]

Starts pgroup run with these flags in a session of its own, away from terminal and
caller, and returns when all workers are ready (see --ready). Without --log, what
they write goes nowhere. If a run holds the pid file already, that is no error.

If the start fails, it shows the last lines that went to standard error, and
nothing is left running. The exit status is then COMMAND's, 128+N for signal N (or 1 if
it was 0), 124 if --wait was over, 125, 126 or 127 as pgroup run has them; 2 for
wrong flags.`
}

func (c *startCmd) Run(line commandLine) error {
	if err := c.check(line); err != nil {
		return err
	}
	return c.start(line)
}

// check finds what is wrong with the flags before anything is started or stopped.
func (c *startFlags) check(line commandLine) error {
	c.Command = line.command
	_, err := c.spec()
	switch {
	case err != nil:
	case c.Pidfile == nil:
		err = errors.New("no pid file: give one with -p PATH")
	case c.TTY:
		err = errors.New("--tty has no meaning for a service: it has no terminal")
	case c.Events != nil && strings.HasPrefix(*c.Events, "fd:"):
		err = errors.New("--events fd:N has no meaning for a service: it inherits no open file; give a path")
	}
	if err != nil {
		return failure{badUsage, err}
	}
	return nil
}

// start returns nil when the service runs and is ready, whoever started it.
func (c *startFlags) start(line commandLine) error {
	limit := time.Time{}
	if c.Wait.value > 0 {
		limit = time.Now().Add(c.Wait.value)
	}
	for {
		h, err := findHolder(*c.Pidfile)
		switch {
		case err == nil:
			pid, err := c.awaitOther(h, limit)
			h.Close()
			if pid != 0 || err != nil {
				if pid != 0 {
					fmt.Printf("already running (pid %d)\n", pid)
				}
				return err
			}
		case isNotRunning(err):
			if done, err := c.launch(line, limit); done || err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// awaitOther waits until the run of another start is ready, and returns its pid;
// or until it has ended, and returns 0.
func (c *startFlags) awaitOther(h *pidfile.Holder, limit time.Time) (pid int, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	if !limit.IsZero() {
		ctx, cancel = context.WithDeadline(ctx, limit)
	}
	defer cancel()
	if !h.Gone() {
		s, err := awaitSocket(ctx, *c.Pidfile, h)
		switch {
		case err != nil && !h.Gone():
			return h.PID, nil // it holds the file, and is no pgroup run, or not our user's
		case err == nil:
			_, err = s.ask(request{Do: "ready"}, limit)
			s.close()
			if err == nil {
				return h.PID, nil
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, failure{pgroup.StatusTimeout, fmt.Errorf("process %d runs, but was not ready within %v", h.PID, c.Wait.value)}
		}
	}
	// It is being stopped.
	if err := h.Wait(ctx); err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			err = failure{pgroup.StatusTimeout, fmt.Errorf("what process %d started still lives after %v: not started", h.PID, c.Wait.value)}
		}
		return 0, err
	}
	return 0, nil
}

// awaitSocket connects to the control socket of a launcher that may be about to
// make it.
func awaitSocket(ctx context.Context, path string, h *pidfile.Holder) (s *session, err error) {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		s, err = dial(path, h.PID)
		if !isChanging(err) || h.Gone() || time.Now().After(end) || ctx.Err() != nil {
			return s, err
		}
	}
}

// launch starts a detached launcher and waits until it is ready. done is false
// if another one was faster.
//
//	start                                  launcher
//	   │ ── fork, setsid, exec ──────────────▶ │
//	   │ ◀───────── "ready" ────────────────── │  or "held": another holds the pid file
//	   │ ── "heard" ─────────────────────────▶ │  from here on it is on its own
//	   │ ── end of file ─────────────────────▶ │  before "heard": stop
//	   │ ◀───────── end of file ────────────── │  before "ready": its status says why
func (c *startFlags) launch(line commandLine, limit time.Time) (done bool, err error) {
	signals := make(chan os.Signal, 1)
	for _, sig := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT} {
		if !signal.Ignored(sig) {
			signal.Notify(signals, sig)
		}
	}
	defer signal.Stop(signals)
	l, err := c.fork(line)
	if err != nil {
		return false, fmt.Errorf("cannot start pgroup: %w", err)
	}
	defer l.close()
	late := (<-chan time.Time)(nil)
	if !limit.IsZero() {
		late = time.After(time.Until(limit))
	}
	timedOut, interrupted := false, syscall.Signal(0)
	for {
		select {
		case word := <-l.words:
			switch {
			case word == "ready" && !timedOut && interrupted == 0:
				if _, err := l.report.Write([]byte("heard\n")); err == nil {
					pgroup.Notify(fmt.Sprintf("MAINPID=%d\nREADY=1", l.process.Pid))
					return true, nil
				}
			case word == "ready":
			case word == "held":
				l.process.Wait()
				return false, nil
			default: // end of file
				return true, c.failed(l, timedOut, interrupted)
			}
		case <-late:
			timedOut = true
			l.giveUp(c.Grace.value)
		case sig := <-signals:
			if interrupted != 0 {
				pgroup.Result{Signal: sig.(syscall.Signal)}.Exit()
			}
			interrupted = sig.(syscall.Signal)
			l.giveUp(c.Grace.value)
		}
	}
}

// failed waits until nothing of the run is left, and returns why it failed.
func (c *startFlags) failed(l *launched, timedOut bool, interrupted syscall.Signal) error {
	state, err := l.process.Wait()
	if err != nil {
		return err
	}
	// If it was killed, its leader may have work to do.
	if h, err := findHolder(*c.Pidfile); err == nil {
		if h.PID == l.process.Pid {
			h.Wait(context.Background())
		}
		h.Close()
	}
	pgroup.Write(2, l.lastWords())
	if interrupted != 0 {
		pgroup.Result{Signal: interrupted}.Exit()
	}
	if timedOut {
		return failure{pgroup.StatusTimeout, fmt.Errorf("not started: not all workers were ready within %v", c.Wait.value)}
	}
	how, status := "", 0
	switch ws := state.Sys().(syscall.WaitStatus); {
	case ws.Signaled():
		how, status = "died of "+pgroup.SignalName(ws.Signal()), 128+int(ws.Signal())
	case ws.ExitStatus() == 0:
		how, status = "ended by itself, with status 0", failed
	default:
		how, status = fmt.Sprintf("ended with status %d", ws.ExitStatus()), ws.ExitStatus()
	}
	return failure{status, fmt.Errorf("not started: %s before all workers were ready", how)}
}

// A launched is a detached launcher that has not reported yet.
type launched struct {
	process *os.Process
	report  *os.File
	words   chan string // that it reports; "" is end of file

	stderr *os.File // its other end; nil if there is a log
	tail   tail
	read   sync.WaitGroup

	log    *os.File // nil if there is none
	logged int64    // its size before
}

// fork starts the launcher. It inherits none of our descriptors: who waits for
// their end must not wait for it.
func (c *startFlags) fork(line commandLine) (_ *launched, err error) {
	l := &launched{words: make(chan string)}
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
		if err != nil {
			l.close()
		}
	}()
	open := func(f *os.File, err error) (*os.File, error) {
		if err == nil {
			theirs = append(theirs, f)
		}
		return f, err
	}
	null, err := open(os.OpenFile(os.DevNull, os.O_RDWR, 0))
	if err != nil {
		return nil, err
	}
	out, errs, drain := null, (*os.File)(nil), (*os.File)(nil)
	if c.Log != nil {
		if l.log, err = openLog(*c.Log); err != nil {
			return nil, err
		}
		if info, err := l.log.Stat(); err == nil && info.Mode().IsRegular() {
			l.logged = info.Size()
		}
		out, errs, drain = l.log, l.log, null
	} else {
		var r *os.File
		if r, errs, err = os.Pipe(); err != nil {
			return nil, err
		}
		l.stderr, drain = r, r
		theirs = append(theirs, errs)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	l.report = os.NewFile(uintptr(fds[0]), "report")
	report, _ := open(os.NewFile(uintptr(fds[1]), "report"), nil)
	const starter = 3 // and the next
	l.process, err = os.StartProcess("/proc/self/exe", c.args(line, starter), &os.ProcAttr{
		Files: []*os.File{null, out, errs, report, drain},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, err
	}
	go func() {
		lines := bufio.NewScanner(l.report)
		for lines.Scan() {
			l.words <- lines.Text()
		}
		close(l.words)
	}()
	if l.stderr != nil {
		l.read.Go(func() { io.Copy(&l.tail, l.stderr) })
	}
	return l, nil
}

func openLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOCTTY, 0o640)
	if err != nil {
		return nil, fmt.Errorf("cannot open the log: %w; give --log a path that can be written", err)
	}
	return f, nil
}

// args returns those of pgroup run: ours, without what is ours alone.
func (c *startFlags) args(line commandLine, starter int) []string {
	args := []string{os.Args[0], "run", "--starter=" + strconv.Itoa(starter)}
	flags := line.flags[1:]
	for i := 0; i < len(flags); i++ {
		name, _, hasValue := strings.Cut(flags[i], "=")
		switch {
		case name != "--wait" && name != "--log":
			args = append(args, flags[i])
		case !hasValue:
			i++
		}
	}
	return slices.Concat(args, []string{"--"}, line.command)
}

// giveUp has the launcher stop. One that has been stopped is continued, and one
// that hangs is killed.
func (l *launched) giveUp(grace time.Duration) {
	if raw, err := l.report.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_WR) })
	}
	l.process.Signal(unix.SIGCONT)
	time.AfterFunc(2*grace+10*time.Second, func() { l.process.Kill() })
}

// lastWords returns the last lines of standard error, once all have been
// written.
func (l *launched) lastWords() []byte {
	if l.log == nil {
		// All that could write has ended, unless launcher and leader were killed.
		l.stderr.SetReadDeadline(time.Now().Add(time.Second))
		l.read.Wait()
		return lastLines(l.tail.text)
	}
	log, err := os.Open(l.log.Name())
	if err != nil {
		return nil
	}
	defer log.Close()
	info, err := log.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil
	}
	start := max(l.logged, info.Size()-tailSize)
	text, _ := io.ReadAll(io.NewSectionReader(log, start, tailSize))
	return lastLines(text)
}

func (l *launched) close() {
	for _, f := range []*os.File{l.report, l.stderr, l.log} {
		if f != nil {
			f.Close()
		}
	}
}

const (
	tailSize  = 8 << 10
	tailLines = 10
)

// A tail keeps the end of what is written to it.
type tail struct{ text []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.text = append(t.text, p...)
	if n := len(t.text) - tailSize; n > 0 {
		t.text = append(t.text[:0], t.text[n:]...)
	}
	return len(p), nil
}

func lastLines(text []byte) []byte {
	if len(text) == 0 {
		return nil
	}
	lines := bytes.SplitAfter(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	lines = lines[max(0, len(lines)-tailLines):]
	return append(bytes.Join(lines, nil), '\n')
}

// A starter is the pgroup start that a launcher was started by.
type starter struct {
	conn   *os.File
	stderr *os.File // the other end of our standard error
}

// takeStarter takes what the flag --starter names; nil if that is 0.
func takeStarter(fd int) *starter {
	if fd < 3 {
		return nil
	}
	unix.CloseOnExec(fd)
	unix.CloseOnExec(fd + 1)
	// We were executed as /proc/self/exe, and would be called "exe" by ps(1),
	// killproc and pkill(1).
	os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
	return &starter{os.NewFile(uintptr(fd), "starter"), os.NewFile(uintptr(fd+1), "stderr")}
}

// refuse tells that another holds the pid file, if that is what err says.
func (s *starter) refuse(err error) {
	var held *pidfile.HeldError
	if s != nil && errors.As(err, &held) {
		s.conn.Write([]byte("held\n"))
	}
}

// serve tells that all workers are ready, and stops the run if nobody hears it.
func (s *starter) serve(run *pgroup.Run) {
	go func() {
		if n, _ := s.conn.Read(make([]byte, 8)); n == 0 {
			run.Stop()
		}
		s.conn.Close()
		io.Copy(io.Discard, s.stderr)
	}()
	select {
	case <-run.Ready():
		s.conn.Write([]byte("ready\n"))
	case <-run.Done():
	}
}
