package tests

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The shell texts of services. Each is ready when it has written to the
// descriptor that --ready fd names.
const (
	becomesReady = `echo >&$PGROUP_READY_FD; `
	serves       = becomesReady + `echo $PGROUP_WORKER up >>ups; exec sleep 1000`
	neverReady   = `echo $$ >>ups; exec sleep 1000`
	outlivesTerm = `trap '' TERM; ` + becomesReady + `echo $$ >>ups; while [ ! -e end ]; do read line <wake; done`
)

// A service is a pid file in a directory of its own, where the verbs are run.
type service struct {
	t       *testing.T
	dir     string
	pidfile string
}

// newService returns one of which nothing runs. Whatever is left of it when the
// test ends is killed.
func newService(t *testing.T) *service {
	t.Helper()
	s := &service{t: t, dir: cellDir(t)}
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.pidfile = filepath.Join(s.dir, "x.pid")
	t.Cleanup(func() {
		for end := time.Now().Add(10 * time.Second); len(s.living()) > 0; time.Sleep(5 * time.Millisecond) {
			for _, pid := range s.living() {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			if time.Now().After(end) {
				t.Errorf("can't end %v", s.living())
				return
			}
		}
	})
	return s
}

// command returns a pgroup command, in which the flag -p stands after the verb.
// It has the mark of the service in its environment, as all that it starts.
func (s *service) command(verb string, args ...string) *exec.Cmd {
	cmd := exec.Command(pgroupBin, append([]string{verb, "-p", s.pidfile}, args...)...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), cellVar+"="+s.dir)
	return cmd
}

// shell returns the arguments that run a shell text.
func shell(text string, flags ...string) []string {
	return append(flags, "--", "sh", "-c", text)
}

// do runs a verb to its end.
func (s *service) do(verb string, args ...string) (status int, stdout, stderr string) {
	s.t.Helper()
	return s.finish(s.command(verb, args...))
}

func (s *service) finish(cmd *exec.Cmd) (status int, stdout, stderr string) {
	s.t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs // pipes: it waits for their end
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	kill := time.AfterFunc(jobLimit, func() {
		s.t.Errorf("%s hangs", cmd)
		for _, pid := range s.living() {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	cmd.Wait()
	kill.Stop()
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// want runs a verb, which has to end with that status.
func (s *service) want(status int, verb string, args ...string) (stdout, stderr string) {
	s.t.Helper()
	got, stdout, stderr := s.do(verb, args...)
	if got != status {
		s.t.Errorf("%s %q: status %d, want %d\n%s%s", verb, args, got, status, stdout, stderr)
	}
	return stdout, stderr
}

// living returns the living processes of the service. A zombie has no
// environment.
func (s *service) living() []int {
	return pidsWith(func(pid int) bool { return marked(pid, s.dir) })
}

// nothingLeft is for a moment in which nothing may live.
func (s *service) nothingLeft() {
	s.t.Helper()
	for _, pid := range s.living() {
		if line := cmdline(pid); line[0] != "" {
			s.t.Errorf("process %d lives: %q", pid, line)
		}
	}
}

// noFiles is for a moment in which pid file and socket have to be gone.
func (s *service) noFiles() {
	s.t.Helper()
	for _, name := range []string{s.pidfile, s.pidfile + ".sock"} {
		if _, err := os.Lstat(name); !os.IsNotExist(err) {
			s.t.Errorf("%s is there (%v)", name, err)
		}
	}
}

// lines waits until the file has n lines, and returns them.
func (s *service) lines(name string, n int) (lines []string) {
	s.t.Helper()
	eventually(s.t, fmt.Sprintf("%d lines in %s", n, name), func() bool {
		text, _ := os.ReadFile(filepath.Join(s.dir, name))
		lines = strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
		return bytes.Count(text, []byte("\n")) >= n
	})
	return lines
}

// launcher returns the pid in the pid file.
func (s *service) launcher() int {
	s.t.Helper()
	text, err := os.ReadFile(s.pidfile)
	if err != nil {
		s.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSuffix(string(text), "\n"))
	if err != nil {
		s.t.Fatal(err)
	}
	return pid
}

// A serviceStatus is what status --json says.
type serviceStatus struct {
	State   string
	PID     int
	Leader  int
	Error   string
	Usage   struct{ Memory, Processes int }
	Workers []struct {
		Worker, PID, Restarts int
		State, Result         string
		Usage                 struct{ Memory, Processes int }
	}
}

// status returns what status --json says, which ends with the status want.
func (s *service) status(want int) (st serviceStatus) {
	s.t.Helper()
	stdout, _ := s.want(want, "status", "--json")
	if err := json.Unmarshal([]byte(stdout), &st); err != nil {
		s.t.Fatalf("%q: %v", stdout, err)
	}
	return st
}

// A asker is a client of the control socket.
type asker struct {
	t     *testing.T
	conn  net.Conn
	lines *bufio.Reader
}

// dial connects to the control socket.
func (s *service) dial() *asker {
	s.t.Helper()
	conn, err := net.Dial("unix", s.pidfile+".sock")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(jobLimit))
	return &asker{s.t, conn, bufio.NewReader(conn)}
}

// ask sends a line and returns the answer.
func (a *asker) ask(line string) map[string]any {
	a.t.Helper()
	if _, err := fmt.Fprintln(a.conn, line); err != nil {
		a.t.Fatal(err)
	}
	return a.next()
}

// next returns the next line; nil is the end.
func (a *asker) next() (value map[string]any) {
	a.t.Helper()
	line, err := a.lines.ReadBytes('\n')
	if err != nil {
		return nil
	}
	if err := json.Unmarshal(line, &value); err != nil {
		a.t.Fatalf("%q: %v", line, err)
	}
	return value
}

// wantOK sends a line whose answer has to be that it was done.
func (a *asker) wantOK(line string) map[string]any {
	a.t.Helper()
	r := a.ask(line)
	if r["ok"] != true {
		a.t.Fatalf("%s: %v", line, r)
	}
	return r
}

// follow returns a client that is sent the events from now on.
func (s *service) follow() *asker {
	s.t.Helper()
	a := s.dial()
	a.wantOK(`{"do":"events"}`)
	return a
}

// together runs f n times at once.
func together(n int, f func(i int)) {
	ctx, start := context.WithCancel(context.Background())
	done := make(chan struct{})
	for i := range n {
		go func() {
			<-ctx.Done()
			f(i)
			done <- struct{}{}
		}()
	}
	start()
	for range n {
		<-done
	}
}
