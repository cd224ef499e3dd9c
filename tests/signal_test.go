package tests

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// jobLimit bounds each job: none is expected to live for as long.
const jobLimit = 20 * time.Second

// A job is a command that runs beside a test, which reads its standard output
// line by line. When the test ends, the job gets SIGKILL.
type job struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout *bufio.Reader
	stderr string // a file
	ended  chan struct{}
}

// startJob starts cmd as a job.
func startJob(t *testing.T, cmd *exec.Cmd) *job {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	t.Cleanup(func() { r.Close() })
	r.SetReadDeadline(time.Now().Add(jobLimit))
	j := &job{t, cmd, bufio.NewReader(r), filepath.Join(t.TempDir(), "stderr"), make(chan struct{})}
	cmd.Stdout = w
	if cmd.Stderr == nil {
		// A file: a pipe would keep Wait waiting for whatever lives on.
		f, err := os.Create(j.stderr)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.Stderr = f
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(j.ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-j.ended
		if text, _ := os.ReadFile(j.stderr); len(text) > 0 && t.Failed() {
			t.Logf("standard error of %s:\n%s", cmd, text)
		}
	})
	return j
}

// pgroupRun returns the command `pgroup run args…`.
func pgroupRun(args ...string) *exec.Cmd {
	return exec.Command(pgroupBin, append([]string{"run"}, args...)...)
}

// line returns the job's next line.
func (j *job) line() string {
	j.t.Helper()
	line, err := j.stdout.ReadString('\n')
	if err != nil {
		j.t.Fatalf("%s: after %q: %v", j.cmd, line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

// pid returns the pid that the job's next line is.
func (j *job) pid() int {
	j.t.Helper()
	pid, err := strconv.Atoi(j.line())
	if err != nil {
		j.t.Fatal(err)
	}
	return pid
}

func (j *job) signal(sig syscall.Signal) {
	j.t.Helper()
	if err := j.cmd.Process.Signal(sig); err != nil {
		j.t.Fatalf("signal %v: %v", sig, err)
	}
}

// wantStatus waits for the job's end. See statusOf.
func (j *job) wantStatus(want string) {
	j.t.Helper()
	select {
	case <-j.ended:
	case <-time.After(jobLimit):
		j.t.Fatalf("%s: still running", j.cmd)
	}
	if got := statusOf(j.cmd.ProcessState); got != want {
		j.t.Errorf("%s: status %s, want %s", j.cmd, got, want)
	}
}

// statusOf says how a process ended, as its parent sees it: its exit status,
// or the name of the signal that killed it.
func statusOf(state *os.ProcessState) string {
	ws := state.Sys().(syscall.WaitStatus)
	switch {
	case ws.CoreDump():
		return signalName(ws.Signal()) + " (core dumped)"
	case ws.Signaled():
		return signalName(ws.Signal())
	}
	return strconv.Itoa(ws.ExitStatus())
}

// signalName returns TERM for SIGTERM, and 35 for a signal without a name.
func signalName(sig syscall.Signal) string {
	if name := unix.SignalName(sig); name != "" {
		return strings.TrimPrefix(name, "SIG")
	}
	return strconv.Itoa(int(sig))
}

// eventually polls for what has no file descriptor to wait on.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(jobLimit); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func stopped(pid int) bool {
	s, _ := readStat(pid)
	return s.state == "T"
}

// relayed returns the signals that are to be relayed. What is missing can't
// be caught (KILL, STOP), or not by a Go program (PROF, and 32 to 34, which
// are the C library's), or is no message (CHLD).
func relayed() []syscall.Signal {
	var sigs []syscall.Signal
	for sig := syscall.Signal(1); sig <= 64; sig++ {
		switch sig {
		case syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGCHLD, syscall.SIGPROF, 32, 33, 34:
		default:
			sigs = append(sigs, sig)
		}
	}
	return sigs
}

// buildRecord compiles testdata/record.c once a run.
var buildRecord = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(filepath.Dir(pgroupBin), "record")
	out, err := exec.Command("gcc", "-Wall", "-O", "-o", bin, "testdata/record.c").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("gcc: %v\n%s", err, out)
	}
	return bin, nil
})

// A recording is pgroup with a worker and children of its own that record
// each signal: see testdata/record.c.
type recording struct {
	*job
	worker  int // one of workers
	workers []int
	got     map[int]map[syscall.Signal]int // pid → signal → how often
}

// record starts `pgroup run flags… record children` and waits for every
// member to listen.
func record(t *testing.T, children int, flags ...string) *recording {
	t.Helper()
	return recordWorkers(t, 1, children, flags...)
}

// recordWorkers does the same where flags make it so many workers.
func recordWorkers(t *testing.T, workers, children int, flags ...string) *recording {
	t.Helper()
	bin, err := buildRecord()
	if err != nil {
		t.Fatal(err)
	}
	args := append(slices.Clone(flags), "--", bin, strconv.Itoa(children))
	cmd := pgroupRun(args...)
	cmd.Env = append(os.Environ(), "GOGC=1") // so that the runtime interrupts itself often
	r := &recording{job: startJob(t, cmd), got: map[int]map[syscall.Signal]int{}}
	parent := map[int]int{}
	for len(r.got) < workers*(children+1) {
		pid, _, from := r.next()
		r.got[pid] = map[syscall.Signal]int{}
		parent[pid] = from
		t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
	}
	for pid := range r.got {
		if r.got[parent[pid]] == nil {
			r.worker = pid
			r.workers = append(r.workers, pid)
		}
	}
	return r
}

func (r *recording) next() (pid int, sig syscall.Signal, from int) {
	r.t.Helper()
	line := r.line()
	if _, err := fmt.Sscan(line, &pid, &sig, &from); err != nil {
		r.t.Fatalf("recorder wrote %q: %v", line, err)
	}
	return pid, sig, from
}

// await reads on until each of pids has had sig n times.
func (r *recording) await(sig syscall.Signal, n int, pids ...int) {
	r.t.Helper()
	for slices.ContainsFunc(pids, func(pid int) bool { return r.got[pid][sig] < n }) {
		pid, sig, _ := r.next()
		if r.got[pid] == nil {
			r.t.Fatalf("signal %v at process %d, which is not of the group", sig, pid)
		}
		r.got[pid][sig]++
	}
}

func (r *recording) members() []int {
	var pids []int
	for pid := range r.got {
		pids = append(pids, pid)
	}
	return pids
}

// want sends a last signal, which each of pids is to get, and compares what
// they got before it.
func (r *recording) want(fence syscall.Signal, want map[syscall.Signal]int, pids ...int) {
	r.t.Helper()
	r.signal(fence)
	r.await(fence, want[fence]+1, pids...)
	for _, pid := range pids {
		r.got[pid][fence]--
		if r.got[pid][fence] == 0 {
			delete(r.got[pid], fence)
		}
		if !reflect.DeepEqual(r.got[pid], want) {
			r.t.Errorf("process %d of the group got (signal:times) %d, want %d", pid, r.got[pid], want)
		}
	}
}

func TestRelayEverySignalOnceToEveryMember(t *testing.T) {
	t.Parallel()
	r := record(t, 2, "--grace=1m")
	want := map[syscall.Signal]int{}
	for _, sig := range relayed() {
		if sig == syscall.SIGTERM {
			continue // a stop
		}
		r.signal(sig)
		r.await(sig, 1, r.members()...)
		want[sig] = 1
	}
	r.want(64, want, r.members()...)
}

func TestRelayToWorkerAlone(t *testing.T) {
	t.Parallel()
	r := record(t, 2, "--relay=worker")
	want := map[syscall.Signal]int{}
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGUSR1, syscall.SIGWINCH, 40} {
		r.signal(sig)
		r.await(sig, 1, r.worker)
		want[sig] = 1
	}
	r.want(64, want, r.worker)
	delete(r.got, r.worker)
	for pid, got := range r.got {
		if len(got) > 0 {
			t.Errorf("child %d of the worker got (signal:times) %d, want none", pid, got)
		}
	}
}

func TestRelayBursts(t *testing.T) {
	t.Parallel()
	r := record(t, 2)
	want := map[syscall.Signal]int{}
	for sig := syscall.Signal(35); sig <= 64; sig++ {
		for range 50 {
			r.signal(sig)
		}
		r.await(sig, 50, r.members()...)
		want[sig] = 50
	}
	r.want(syscall.SIGUSR1, want, r.members()...)
}

// The Go runtime interrupts goroutines that run for long with SIGURG, which
// is none of the group's business.
func TestRelayNoSignalOfTheRuntime(t *testing.T) {
	t.Parallel()
	r := record(t, 1)
	want := map[syscall.Signal]int{}
	for start := time.Now(); time.Since(start) < 2*time.Second; {
		for range 50 {
			r.signal(50)
		}
		want[50] += 50
		r.await(50, want[50], r.members()...)
	}
	r.want(syscall.SIGUSR1, want, r.members()...)
}

func TestStopSignalsEachMemberOnce(t *testing.T) {
	t.Parallel()
	tests := []struct {
		flags string
		want  map[syscall.Signal]int
	}{
		{"", map[syscall.Signal]int{syscall.SIGTERM: 1, syscall.SIGCONT: 1}},
		{"--stop-signal=INT", map[syscall.Signal]int{syscall.SIGINT: 1, syscall.SIGCONT: 1}},
		{"--map=TERM=USR2", map[syscall.Signal]int{syscall.SIGUSR2: 1, syscall.SIGCONT: 1}},
		{"--map=TERM=USR2 --stop-signal=INT", map[syscall.Signal]int{syscall.SIGUSR2: 1, syscall.SIGCONT: 1}},
		{"--map=TERM=", map[syscall.Signal]int{}},
	}
	for _, test := range tests {
		t.Run(test.flags, func(t *testing.T) {
			t.Parallel()
			r := record(t, 1, append(strings.Fields(test.flags), "--grace=1m")...)
			r.signal(syscall.SIGTERM)
			if len(test.want) > 0 {
				r.await(syscall.SIGCONT, 1, r.members()...)
			}
			r.want(64, test.want, r.members()...)
		})
	}
}

func TestSecondTermIsRelayed(t *testing.T) {
	t.Parallel()
	r := record(t, 1, "--grace=1m")
	for n := 1; n <= 3; n++ {
		r.signal(syscall.SIGTERM)
		r.await(syscall.SIGTERM, n, r.members()...)
	}
}

func TestGraceIsNotRestartedByTerm(t *testing.T) {
	t.Parallel()
	r := record(t, 0, "--grace=500ms")
	for n := 1; ; n++ {
		select {
		case <-r.ended:
			r.wantStatus("KILL")
			return
		case <-time.After(20 * time.Millisecond):
			r.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		}
		if n > 500 {
			t.Fatal("still running")
		}
	}
}

// A signal in the moment in which the worker ends is for what it leaves behind.
func TestSignalAsWorkerEnds(t *testing.T) {
	t.Parallel()
	for name, flag := range map[string]string{"TERM": "--grace=1s", "USR1": "--leftovers=wait"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for range 15 {
				// It is the worker's end or the signal that comes first.
				// Not before the trap is set: left-overs are stopped too.
				cmd := pgroupRun(flag, "--", "sh", "-c", `(trap 'echo got; exit' `+name+`; : >armed; kill -`+name+` $PGROUP_PID
					for i in $(seq 100); do sleep 0.02; done) & while [ ! -e armed ]; do :; done; exit 5`)
				cmd.Dir = t.TempDir()
				j := startJob(t, cmd)
				if got, err := j.stdout.ReadString('\n'); got != "got\n" {
					t.Fatalf("what the worker left behind wrote %q, %v; want that it got the signal", got, err)
				}
			}
		})
	}
}

func TestTermReachesStoppedWorker(t *testing.T) {
	t.Parallel()
	j := startJob(t, pgroupRun("--", "sh", "-c", `trap "echo handled; exit 3" TERM; echo $$; while :; do sleep 0.05; done`))
	worker := j.pid()
	if err := syscall.Kill(worker, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "worker stopped", func() bool { return stopped(worker) })
	j.signal(syscall.SIGTERM)
	if got := j.line(); got != "handled" {
		t.Errorf("worker wrote %q, want %q", got, "handled")
	}
	j.wantStatus("3")
}

func TestDeathBySignal(t *testing.T) {
	t.Parallel()
	for sig := syscall.Signal(1); sig <= 64; sig++ {
		switch sig {
		case syscall.SIGCHLD, syscall.SIGCONT, syscall.SIGURG, syscall.SIGWINCH: // ignored by default
			continue
		case syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU:
			continue
		}
		t.Run(fmt.Sprint(int(sig)), func(t *testing.T) {
			t.Parallel()
			// Only the command itself may not dump its core.
			cmd := exec.Command("sh", "-c", `ulimit -Sc $(ulimit -Hc); exec "$0" run -- sh -c "ulimit -Sc 0; kill -$1 \$\$"`, pgroupBin, strconv.Itoa(int(sig)))
			cmd.Dir = t.TempDir()
			j := startJob(t, cmd)
			j.wantStatus(signalName(sig))
			if text, _ := os.ReadFile(j.stderr); len(text) > 0 {
				t.Errorf("standard error is %q, want none", text)
			}
			if cores, _ := os.ReadDir(cmd.Dir); len(cores) > 0 {
				t.Errorf("it left %v behind", cores)
			}
		})
	}
}
