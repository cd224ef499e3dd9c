package tests

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStop wants stop to return when nothing lives, and not before.
func TestStop(t *testing.T) {
	t.Parallel()
	stubborn := `trap '' TERM; (setsid sh -c 'trap "" TERM HUP; sleep 1000; :' & sleep 1000 & ); ` + becomesReady + `sleep 1000; :`
	for _, test := range []struct {
		name  string
		start []string
		stop  []string
	}{
		{"at once", shell(serves, "--ready", "fd", "-n3"), nil},
		{"grace", shell(stubborn, "--ready", "fd", "-g", "0.3"), nil},
		{"no grace", shell(stubborn, "--ready", "fd", "-g", "0"), nil},
		{"pidns", shell(stubborn, "--ready", "fd", "-g", "0.3", "--contain", "pidns"), nil},
		{"hung", shell(stubborn, "--ready", "fd", "-g", "0.3", "--map", "TERM="), []string{"--wait", "3"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newService(t)
			s.want(0, "start", test.start...)
			s.want(0, "stop", test.stop...)
			s.nothingLeft()
			s.noFiles()
			s.want(3, "status")
		})
	}
}

// TestStopSuspended stops a launcher that can't act on TERM, since it was stopped.
func TestStopSuspended(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(serves, "--ready", "fd")...)
	pid := s.launcher()
	kill(t, pid, unix.SIGSTOP)
	eventually(t, "stopped", func() bool { return stopped(pid) })
	if st := s.status(0); st.State != "running" || st.PID != pid || st.Error == "" {
		t.Errorf("status of a stopped launcher: %+v", st)
	}
	s.want(0, "stop")
	s.nothingLeft()
	s.noFiles()
}

// TestStopTooLong stops what has not ended when the time for that is over.
func TestStopTooLong(t *testing.T) {
	t.Parallel()
	s := newService(t)
	unix.Mkfifo(filepath.Join(s.dir, "wake"), 0o600)
	s.want(0, "start", shell(outlivesTerm, "--ready", "fd", "-g", "1h")...)
	// The launcher is killed for that. Its leader goes by the run's own grace.
	_, stderr := s.want(1, "stop", "--wait", "0.2")
	if !strings.Contains(stderr, "still lives") {
		t.Errorf("it says %q", stderr)
	}
	if st := s.status(4); st.State != "killed" {
		t.Errorf("status: %+v", st)
	}
	s.end()
	s.want(0, "stop")
	s.nothingLeft()
	s.noFiles()
}

// TestLauncherKilled kills the launcher: its leader holds the lock until nothing
// lives, the other verbs say so, and the next start takes over what is left.
func TestLauncherKilled(t *testing.T) {
	t.Parallel()
	s := newService(t)
	unix.Mkfifo(filepath.Join(s.dir, "wake"), 0o600)
	s.want(0, "start", shell(outlivesTerm, "--ready", "fd", "-g", "1h")...)
	pid := s.launcher()
	worker := s.lines("ups", 1)[0]
	kill(t, pid, unix.SIGKILL)
	if st := s.status(4); st.State != "killed" || st.PID != pid {
		t.Errorf("status: %+v", st)
	}
	for _, verb := range []string{"reload", "events"} {
		if _, stderr := s.want(7, verb); !strings.Contains(stderr, "was killed") {
			t.Errorf("%s says %q", verb, stderr)
		}
	}
	s.want(124, "start", shell(serves, "--ready", "fd", "--wait", "0.2")...)
	s.want(125, "run", "true")
	start := startJob(t, s.command("start", shell(serves, "--ready", "fd")...))
	if n, err := strconv.Atoi(worker); err != nil || syscall.Kill(n, 0) != nil {
		t.Errorf("worker %q is gone", worker)
	}
	s.end()
	start.wantStatus("0")
	if st := s.status(0); st.State != "ready" || st.PID == pid {
		t.Errorf("then: %+v", st)
	}
	s.want(0, "stop")
	s.nothingLeft()
	s.noFiles()
}

// TestLeaderKilled kills the leader: the launcher stops the run, and removes what
// it has to.
func TestLeaderKilled(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(serves, "--ready", "fd", "-n2")...)
	kill(t, s.status(0).Leader, unix.SIGKILL)
	eventually(t, "all gone", func() bool { return len(s.living()) == 0 })
	s.noFiles()
	s.want(0, "start", shell(serves, "--ready", "fd")...)
	s.want(0, "stop")
}

// TestKilledAtAnyMoment kills the launcher or the leader of a start, stop or
// reload at some moment: then nothing of it lives on, and the service starts again.
func TestKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for i := range 24 {
		os.Remove(filepath.Join(s.dir, "ups"))
		verb := []string{"start", "stop", "reload"}[i%3]
		whom := []string{"run", "pgroup-leader"}[i/3%2]
		cmd := s.command(verb)
		if verb == "start" {
			cmd = s.command(verb, shell(serves, "--ready", "fd", "-g", "0.2", "-n2")...)
		} else {
			s.want(0, "start", shell(serves, "--ready", "fd", "-g", "0.2", "-n2")...)
		}
		j := startJob(t, cmd)
		var target int
		find := func() bool {
			for _, pid := range s.living() {
				if line := cmdline(pid); line[0] == whom || len(line) > 1 && line[1] == whom {
					target = pid
					return true
				}
			}
			return isClosed(j.ended)
		}
		eventually(t, "there is a "+whom, find)
		// Moments differ by what the machine does; the loop adds to that.
		time.Sleep(time.Duration(i/6) * 2 * time.Millisecond)
		if target != 0 {
			syscall.Kill(target, unix.SIGKILL)
		}
		select {
		case <-j.ended:
		case <-time.After(jobLimit):
			t.Fatalf("%s hangs after a kill of %s", verb, whom)
		}
		status := j.cmd.ProcessState.ExitCode()
		eventually(t, "status knows", func() bool {
			got, _, _ := s.do("status")
			return got == 3 || got == 1 || got == 0 && (target == 0 || whom == "run" && verb == "stop")
		})
		s.want(0, "stop")
		s.nothingLeft()
		s.noFiles()
		t.Logf("%s, %s killed: status %d", verb, whom, status)
	}
}
