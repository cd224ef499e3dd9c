package pgroup_test

import (
	"bufio"
	"context"
	"fmt"
	"log"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pgroup/pgroup"
)

// tree is a worker with descendants of many kinds, each of which says on its
// standard output that it is there; what has no MARK is in the directory.
const tree = `
	cd "$MARK"
	say() { echo up; exec sleep 1000; }
	say &
	setsid sh -c 'echo up; exec sleep 1000' &
	setsid sh -c 'trap "" TERM; echo up; while :; do sleep 0.01; done' &
	(setsid sh -c 'cd /; echo up; exec sleep 1000' &)
	env -i sh -c 'echo up; sleep 1000; :' &
	echo up
	wait`

const inTree = 6

// host is a program with a cluster. It says when all workers are ready.
func host() {
	run, err := pgroup.Start(context.Background(), &pgroup.Spec{
		Args:    []string{"sh", "-c", tree + `; env -i setsid sleep 1000`},
		Workers: 2,
		Stdout:  os.Stdout,
		Restart: pgroup.RestartAlways,
		Grace:   300 * time.Millisecond,
	})
	if err != nil {
		log.Fatal(err)
	}
	run.Wait()
}

// awaitLines reads n lines, each of which has to be want.
func awaitLines(t *testing.T, r *bufio.Scanner, n int, want string) {
	t.Helper()
	for i := range n {
		if !r.Scan() || r.Text() != want {
			t.Fatalf("line %d of %d is %q, want %q: %v", i+1, n, r.Text(), want, r.Err())
		}
	}
}

// pipe returns a pipe whose reader has a deadline.
func pipe(t *testing.T) (lines *bufio.Scanner, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.SetReadDeadline(time.Now().Add(patience))
	t.Cleanup(func() { r.Close(); w.Close() })
	return bufio.NewScanner(r), w
}

// Nothing outlives a host that is killed.
func TestHostIsKilled(t *testing.T) {
	lines, w := pipe(t)
	dir := t.TempDir()
	cmd := exec.Command("/proc/self/exe", "host")
	cmd.Env = append(os.Environ(), "MARK="+dir)
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	w.Close()
	awaitLines(t, lines, 2*inTree, "up")
	if n := len(marked(dir)); n < 2*inTree {
		t.Fatalf("%d processes are found, want at least %d", n, 2*inTree)
	}
	cmd.Process.Kill()
	awaitNone(t, dir)
	for lines.Scan() {
	}
	if err := lines.Err(); err != nil {
		t.Errorf("somebody has the workers' output still open: %v", err)
	}
}

// When the leader is killed and this process is no subreaper, the orphans are
// ended as any run's: with grace. Another run and other children go on.
func TestLeaderIsKilled(t *testing.T) {
	other := start(t, shell("sleep 1000 & wait"))
	otherPID := other.awaitType(1, pgroup.EventStart).PID
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	defer child.Process.Kill()

	lines, w := pipe(t)
	spec := shell(`trap 'echo asked; exit' TERM` + tree)
	spec.Stdout, spec.Workers, spec.Restart, spec.Grace = w, 2, pgroup.RestartAlways, 500*time.Millisecond
	r := start(t, spec)
	w.Close()
	awaitLines(t, lines, 2*inTree, "up")
	s, err := r.Status()
	if err != nil {
		t.Fatal(err)
	}
	unix.Kill(s.Leader, unix.SIGKILL)
	result, err := r.end()
	if err == nil || !strings.Contains(err.Error(), "was killed by KILL") || result.Code() != pgroup.StatusFailed || !result.Escalated {
		t.Errorf("got %+v, %v", result, err)
	}
	if left := marked(r.dir); len(left) > 0 {
		t.Errorf("these live on: %v", left)
	}
	awaitLines(t, lines, 2, "asked")
	for lines.Scan() {
	}
	if err := lines.Err(); err != nil {
		t.Errorf("somebody has the workers' output still open: %v", err)
	}
	if want := []string{"start 1", "start 2", "stop leader", "escalate", "end"}; !slices.Equal(r.list(), want) {
		t.Errorf("events %q, want %q", r.list(), want)
	}

	if s, err := other.Status(); err != nil || s.State != "ready" || !alive(otherPID) {
		t.Errorf("the other run: %+v, %v", s, err)
	}
	if !alive(child.Process.Pid) {
		t.Error("a child of the host was ended")
	}
	if result, err := start(t, shell("exit 3")).end(); result.Code() != 3 || err != nil {
		t.Errorf("a new run: %+v, %v", result, err)
	}
}

// Runs of one host have nothing to do with each other.
func TestTwoRuns(t *testing.T) {
	spec := shell("echo $$ >&3; read x <&3; exit $x")
	spec.Channel = true
	a, b := start(t, spec), start(t, spec)
	for n, r := range []*testRun{a, b} {
		e := r.awaitType(1, pgroup.EventMessage)
		if pid := r.awaitType(1, pgroup.EventStart).PID; string(e.Data) != fmt.Sprint(pid) {
			t.Errorf("run %d: worker %d says it is %s", n, pid, e.Data)
		}
	}
	a.Stop()
	if result, err := a.end(); result.Signal != unix.SIGTERM || err != nil {
		t.Errorf("the first: %+v, %v", result, err)
	}
	if err := b.Send(1, 6); err != nil {
		t.Error(err)
	}
	if result, err := b.end(); result.Code() != 6 || err != nil {
		t.Errorf("the second: %+v, %v", result, err)
	}
}
