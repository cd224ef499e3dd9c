package tests

import (
	"os"
	"syscall"
	"testing"
)

// A leader that somebody has stopped acts on the launcher's death all the same.
func TestStoppedLeader(t *testing.T) {
	t.Parallel()
	cmd := pgroupRun(append([]string{"--"}, sleeper...)...)
	j := startJob(t, cmd)
	worker := j.pid()
	s, _ := readStat(worker)
	if err := syscall.Kill(s.ppid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(cmd.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "end of the worker", func() bool {
		s, ok := readStat(worker)
		return !ok || s.state == "Z"
	})
}

// Who does not read what pgroup says holds up no timeout.
func TestUnreadStandardError(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cmd := pgroupRun("-v", "--timeout=500ms", "--grace=5s", "--", "sh", "-c", "exec yes >&2")
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 124 {
		t.Errorf("%v, want status 124", err)
	}
}
