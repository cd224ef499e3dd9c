package tests

import (
	"bufio"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestStartNeedsAll: one worker that ends before it was ready is a failed start,
// whatever the other one does, and when.
func TestStartNeedsAll(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"first": `[ $PGROUP_WORKER = 1 ] && { echo worker 1 fails >&2; exit 7; }; exec sleep 1000`,
		"last":  `[ $PGROUP_WORKER = 2 ] && { ` + becomesReady + `: >ready; exec sleep 1000; }; until [ -e ready ]; do :; done; echo worker 1 fails >&2; exit 7`,
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t)
			_, stderr := s.want(7, "start", shell(script, "--ready", "fd", "-n2", "--grace=5")...)
			if !strings.Contains(stderr, "worker 1 fails\n") || !strings.Contains(stderr, "before all workers were ready") {
				t.Errorf("start says %q", stderr)
			}
			s.nothingLeft()
			s.want(3, "status")
		})
	}
}

// TestEndedPlaceIsFilled: a worker that has ended for good makes the service
// degraded, and scale and reload bring it back.
func TestEndedPlaceIsFilled(t *testing.T) {
	t.Parallel()
	for _, verb := range [][]string{{"scale", "2"}, {"reload"}} {
		t.Run(verb[0], func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.want(0, "start", shell(becomesReady+`[ $PGROUP_START = 1 ] && exit 0; exec sleep 1000`, "--ready", "fd", "-n2", "--restart=on-failure")...)
			eventually(t, "worker 1 has ended", func() bool { return s.status(0).Workers[0].State == "ended" })
			if st := s.status(0); st.State != "degraded" {
				t.Errorf("with one worker ended: %+v", st)
			}
			s.want(0, verb[0], verb[1:]...)
			if st := s.status(0); st.State != "ready" || st.Workers[0].State != "ready" || st.Workers[1].State != "ready" {
				t.Errorf("after %s: %+v", verb[0], st)
			}
			s.want(0, "scale", "1")
			if st := s.status(0); st.State != "ready" || len(st.Workers) != 1 {
				t.Errorf("after scale 1: %+v", st)
			}
			s.want(0, "stop")
			s.nothingLeft()
		})
	}
}

// TestHiddenDaemon: a daemon whose environment can't be seen is nobody's, and holds
// up no restart.
func TestHiddenDaemon(t *testing.T) {
	t.Parallel()
	script, err := filepath.Abs("testdata/hidden.py")
	if err != nil {
		t.Fatal(err)
	}
	dir := cellDir(t)
	cmd := pgroupRun("-n2", "--restart=always", "--grace=5", "--", "python3", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), cellVar+"="+dir)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	j := startJob(t, cmd)
	out := bufio.NewReader(j.stdout)
	for range 2 {
		if line, err := out.ReadString('\n'); line != "up\n" && line != "hidden\n" {
			t.Fatalf("%q, %v", line, err)
		}
	}
	io.WriteString(stdin, "end\n")
	if line, err := out.ReadString('\n'); line != "up\n" {
		t.Errorf("worker 1 is not started again: %q, %v", line, err)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	j.wantStatus("TERM")
}
