package tests

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
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

// A cluster is `pgroup run` with several workers or starts, whose events the
// test reads as they come.
type cluster struct {
	*job
	log    *bufio.Reader
	events []event // read so far
}

// startCluster starts `pgroup run args…`.
func startCluster(t *testing.T, args ...string) *cluster {
	t.Helper()
	return startClusterIn(t, t.TempDir(), args...)
}

// startClusterIn starts `pgroup run args…` in the directory dir.
func startClusterIn(t *testing.T, dir string, args ...string) *cluster {
	t.Helper()
	cmd := pgroupRun(append([]string{"--events=fd:3"}, args...)...)
	cmd.Dir = dir
	r, w := pipe(t)
	r.SetReadDeadline(time.Now().Add(jobLimit))
	cmd.ExtraFiles = []*os.File{w}
	c := &cluster{job: startJob(t, cmd), log: bufio.NewReader(r)}
	w.Close()
	return c
}

// next reads an event; false is the end.
func (c *cluster) next() (event, bool) {
	c.t.Helper()
	line, err := c.log.ReadBytes('\n')
	if err == io.EOF && len(line) == 0 {
		return nil, false
	}
	var e event
	if err == nil {
		err = json.Unmarshal(line, &e)
	}
	if err != nil {
		c.t.Fatalf("%s: %v after the events\n%s", c.cmd, err, c.story())
	}
	c.events = append(c.events, e)
	return e, true
}

// await reads until an event has this name and is of this worker, or of any if
// that is 0.
func (c *cluster) await(name string, worker int) event {
	c.t.Helper()
	for {
		e, ok := c.next()
		if !ok {
			c.t.Fatalf("no event %s of worker %d in\n%s", name, worker, c.story())
		}
		if e["event"] == name && (worker == 0 || e.number("worker") == worker) {
			return e
		}
	}
}

// all reads to the end and returns the events with this name.
func (c *cluster) all(name string) (found []event) {
	c.t.Helper()
	for ok := true; ok; {
		_, ok = c.next()
	}
	for _, e := range c.events {
		if e["event"] == name {
			found = append(found, e)
		}
	}
	return found
}

// story returns the events as text.
func (c *cluster) story() string {
	var b strings.Builder
	for _, e := range c.events {
		fmt.Fprintf(&b, "\t%v %s\n", e["time"], withoutTime(e))
	}
	return b.String()
}

// said returns the lines that pgroup has written to standard error.
func (c *cluster) said() (said string) {
	text, _ := os.ReadFile(c.stderr)
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "pgroup: ") {
			said += line
		}
	}
	return said
}

func (e event) number(name string) int {
	n, _ := e[name].(float64)
	return int(n)
}

func (e event) at(t *testing.T) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(e["time"]))
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// lives reports whether pid is a process that has not ended.
func lives(pid int) bool {
	s, ok := readStat(pid)
	return ok && s.state != "Z"
}

// readPids returns the numbers in a file.
func readPids(t *testing.T, name string) (pids []int) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// workers reads a line from each of n workers: its number, and its pid.
func (c *cluster) workers(n int) map[int]int {
	c.t.Helper()
	pids := map[int]int{}
	for range n {
		var number, pid int
		line := c.line()
		if _, err := fmt.Sscan(line, &number, &pid); err != nil {
			c.t.Fatalf("worker wrote %q: %v", line, err)
		}
		pids[number] = pid
	}
	if len(pids) != n {
		c.t.Fatalf("workers %v, want %d of them", pids, n)
	}
	return pids
}

// numbered is a worker that writes what cluster.workers reads.
const numbered = `echo $PGROUP_WORKER $$; exec sleep 60`

// cgroup makes a cgroup with limits of the controller, as version 1 and version 2
// name them, and returns its directory.
func cgroup(t *testing.T, controller string, v1, v2 map[string]string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can make a cgroup")
	}
	root, limits := "/sys/fs/cgroup", v2
	if _, err := os.Stat(root + "/cgroup.controllers"); err != nil {
		root, limits = root+"/"+controller, v1
	} else if err := os.WriteFile(root+"/cgroup.subtree_control", []byte("+"+controller), 0); err != nil {
		t.Skip("the machine delegates no controller: ", err)
	}
	dir, err := os.MkdirTemp(root, "pgroup-test-")
	if err != nil {
		t.Skip("the machine has no such controller: ", err)
	}
	t.Cleanup(func() {
		eventually(t, "the cgroup is empty", func() bool { return os.Remove(dir) == nil })
	})
	for name, limit := range limits {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(limit), 0); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// inCgroup has cmd run in the cgroup.
func inCgroup(dir string, cmd *exec.Cmd) *exec.Cmd {
	args := append([]string{"-c", `echo $$ >"$0"/cgroup.procs && exec "$@"`, dir}, cmd.Args...)
	return exec.Command("sh", args...)
}

func TestWorkersAuto(t *testing.T) {
	t.Parallel()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	cpu := 0
	for !set.IsSet(cpu) {
		cpu++
	}
	auto := pgroupRun("-n", "auto", "--", "sh", "-c", "echo $PGROUP_WORKERS")
	quota := func(t *testing.T, percent int) *exec.Cmd {
		us := strconv.Itoa(percent * 1000)
		return inCgroup(cgroup(t, "cpu", map[string]string{"cpu.cfs_quota_us": us}, map[string]string{"cpu.max": us + " 100000"}), auto)
	}
	for name, test := range map[string]struct {
		cmd  func(t *testing.T) *exec.Cmd
		want int
	}{
		"all": {func(*testing.T) *exec.Cmd { return auto }, set.Count()},
		"affinity": {func(*testing.T) *exec.Cmd {
			return exec.Command("taskset", append([]string{"-c", strconv.Itoa(cpu)}, auto.Args...)...)
		}, 1},
		"half":    {func(t *testing.T) *exec.Cmd { return quota(t, 50) }, 1},
		"one":     {func(t *testing.T) *exec.Cmd { return quota(t, 100) }, 1},
		"rounded": {func(t *testing.T) *exec.Cmd { return quota(t, 110) }, min(2, set.Count())},
		"plenty":  {func(t *testing.T) *exec.Cmd { return quota(t, 10000) }, set.Count()},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := test.cmd(t).Output()
			if want := strings.Repeat(fmt.Sprintln(test.want), test.want); err != nil || string(out) != want {
				t.Errorf("%v, workers wrote %q, want %q", err, out, want)
			}
		})
	}
}

func TestWorkersEnvironmentAndGroups(t *testing.T) {
	t.Parallel()
	c := startCluster(t, "-n", "3", "--", "sh", "-c",
		`read pid comm state ppid group session rest </proc/$$/stat
		echo $PGROUP_WORKER $PGROUP_WORKERS $PGROUP_START $PGROUP_PID $$ $group $ppid $session; exec sleep 60`)
	pids := map[int]int{}
	for range 3 {
		var n, of, start, launcher, pid, group, parent, session int
		line := c.line()
		if _, err := fmt.Sscan(line, &n, &of, &start, &launcher, &pid, &group, &parent, &session); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if of != 3 || start != n || launcher != c.cmd.Process.Pid || group != pid || session != parent {
			t.Errorf("worker %d is of %d, start %d, of launcher %d (which is %d); pid %d group %d, parent %d session %d",
				n, of, start, launcher, c.cmd.Process.Pid, pid, group, parent, session)
		}
		pids[n] = pid
	}
	for n := 1; n <= 3; n++ {
		if e := c.await("start", n); e.number("pid") != pids[n] {
			t.Errorf("worker %d is process %d, its event says %v", n, pids[n], e)
		}
	}
	c.signal(syscall.SIGTERM)
	c.wantStatus("TERM")
}

// The end of a worker is told, and the others go on.
func TestWorkerDies(t *testing.T) {
	t.Parallel()
	c := startCluster(t, "-n", "3", "--", "sh", "-c",
		`trap 'echo $PGROUP_WORKER heard' USR1; trap 'exit 0' TERM; echo $PGROUP_WORKER $$; while :; do sleep 0.05; done`)
	pids := c.workers(3)
	kill(t, pids[2], unix.SIGKILL)
	if e := c.await("exit", 0); e.number("worker") != 2 || e.number("pid") != pids[2] || e["signal"] != "KILL" || e["restart"] != nil {
		t.Errorf("event %v, want the exit of worker 2, pid %d", e, pids[2])
	}
	c.signal(syscall.SIGUSR1)
	heard := []string{c.line(), c.line()}
	if slices.Sort(heard); !slices.Equal(heard, []string{"1 heard", "3 heard"}) {
		t.Errorf("after the end of worker 2: %q", heard)
	}
	c.signal(syscall.SIGTERM)
	c.wantStatus("KILL") // the first failure's
	if n := len(c.all("exit")); n != 3 {
		t.Errorf("%d events of an exit, want 3", n)
	}
	// Not of those that a stop has ended.
	if want := fmt.Sprintf("pgroup: worker 2, pid %d, died of KILL\n", pids[2]); c.said() != want {
		t.Errorf("pgroup said %q, want %q", c.said(), want)
	}
}

// leaves is a worker that starts a child in its group, a daemon that notes TERM
// and ends, and two that ignore it, one of them with a child in a group of its
// own. It says first which of those of an earlier start at its place live.
const leaves = `
for pid in $(cat pids.$PGROUP_WORKER 2>/dev/null); do
	state=$(cut -d" " -f3 /proc/$pid/stat 2>/dev/null) && [ "$state" != Z ] && echo left $pid
done
sleep 60 & echo $! >pids.$PGROUP_WORKER
setsid sh -c 'trap "echo $0 >>noted; exit" TERM; : >up.$0.$1; while :; do sleep 0.05; done' $PGROUP_WORKER $PGROUP_START &
echo $! >>pids.$PGROUP_WORKER
(trap "" TERM; setsid sleep 60 & echo $!) >>pids.$PGROUP_WORKER
(trap "" TERM; setsid bash -mc 'sleep 60 & echo $!; exec sleep 60 >&-' & echo $!) >>pids.$PGROUP_WORKER
while [ ! -e up.$PGROUP_WORKER.$PGROUP_START ] || [ $(wc -l <pids.$PGROUP_WORKER) -lt 5 ]; do sleep 0.01; done
echo $PGROUP_WORKER $$
exec sleep 60`

// What a worker leaves behind is gone before its place is filled, whether others
// live or not, and theirs is let alone.
func TestRemainsGoFirst(t *testing.T) {
	t.Parallel()
	for name, n := range map[string]int{"alone": 1, "with another": 2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			c := startClusterIn(t, dir, "-n", strconv.Itoa(n), "--restart=on-failure", "--grace=300ms", "--", "sh", "-c", leaves)
			pids := c.workers(n)
			its := readPids(t, dir+"/pids.1")
			var others []int
			if n > 1 {
				others = append(readPids(t, dir+"/pids.2"), pids[2])
			}
			kill(t, pids[1], unix.SIGKILL)
			exit := c.await("exit", 1)
			stop := c.await("stop", 1)
			if stop["reason"] != "leftovers" || stop["signal"] != "TERM" || stop["grace"] != 0.3 {
				t.Errorf("event %v, want a stop of leftovers", stop)
			}
			swept := c.await("sweep", 1)
			if swept.number("killed") != 3 { // who ignores TERM
				t.Errorf("event %v, want 3 killed", swept)
			}
			if grace := swept.at(t).Sub(exit.at(t)); grace < 300*time.Millisecond || grace > 5*time.Second {
				t.Errorf("swept %v after the exit, want 300 ms", grace)
			}
			c.await("start", 1)
			if again := c.workers(1); again[1] == 0 { // nothing is left
				t.Errorf("workers %v, want 1", again)
			}
			for _, pid := range its {
				if lives(pid) {
					t.Errorf("process %d of worker 1 lives: %q", pid, cmdline(pid))
				}
			}
			for _, pid := range others {
				if !lives(pid) {
					t.Errorf("process %d of worker 2 has ended", pid)
				}
			}
			if noted, _ := os.ReadFile(dir + "/noted"); string(noted) != "1\n" {
				t.Errorf("TERM was noted by the daemons of workers %q, want 1", noted)
			}
			its = append(readPids(t, dir+"/pids.1"), others...)
			c.signal(syscall.SIGTERM)
			c.wantStatus("TERM")
			for _, pid := range its {
				if lives(pid) {
					t.Errorf("after the end process %d lives: %q", pid, cmdline(pid))
				}
			}
			if end := c.all("end")[0]; end.number("killed") != 3+3*n {
				t.Errorf("%v, want %d killed", end, 3+3*n)
			}
		})
	}
}

// The number of a worker that has ended may be that of another worker's daemon,
// while something that it left behind lives.
func TestRemainsOfReusedNumber(t *testing.T) {
	if !inPidNamespace(t, 1) {
		return
	}
	const last = "/proc/sys/kernel/ns_last_pid"
	if f, err := os.OpenFile(last, os.O_WRONLY, 0); err != nil {
		t.Skip("the kernel lets nobody choose a pid: ", err)
	} else {
		f.Close()
	}
	dir := t.TempDir()
	for _, name := range []string{"go", "reuse"} {
		if err := unix.Mkfifo(filepath.Join(dir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := startClusterIn(t, dir, "-n", "2", "--restart=always", "--grace=700ms", "--", "sh", "-c",
		`echo $PGROUP_WORKER $$; [ $PGROUP_START -le 2 ] || exec sleep 60
		[ $PGROUP_WORKER = 2 ] || { (trap "" TERM; exec setsid sh -c 'echo armed; exec sleep 60 >&-') & read x <go; exit 0; }
		read want <reuse
		for try in 1 2 3 4 5 6 7 8 9; do
			( # which ends: the leader adopts what it started
				echo $((want - 1)) >`+last+`
				setsid sleep 61 >&- &
				echo $! >daemon
			)
			read daemon <daemon
			[ $daemon != $want ] || break
			kill $daemon
		done
		echo $daemon; exec sleep 60`)
	pids, armed := map[int]int{}, false
	for len(pids) < 2 || !armed {
		var number, pid int
		if line := c.line(); line == "armed" {
			armed = true
		} else if _, err := fmt.Sscan(line, &number, &pid); err != nil {
			t.Fatalf("%q: %v", line, err)
		} else {
			pids[number] = pid
		}
	}
	tell := func(fifo string, what any) {
		if err := os.WriteFile(filepath.Join(dir, fifo), []byte(fmt.Sprintln(what)), 0); err != nil {
			t.Fatal(err)
		}
	}
	tell("go", "")
	c.await("stop", 1)
	tell("reuse", pids[1])
	daemon := c.pid()
	if daemon != pids[1] {
		t.Fatalf("the daemon is process %d, and not %d", daemon, pids[1])
	}
	c.await("sweep", 1)
	if !lives(daemon) {
		t.Errorf("worker 2's daemon %d was killed with what worker 1 left behind", daemon)
	}
}

// With --leftovers wait the place is filled when they have ended.
func TestRemainsWaitedFor(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mkfifo(dir+"/go", 0o600); err != nil {
		t.Fatal(err)
	}
	c := startClusterIn(t, dir, "-n", "2", "--restart=always", "--leftovers=wait", "--", "sh", "-c",
		`[ $PGROUP_WORKER = 2 ] && exit 0
		[ $PGROUP_START -gt 2 ] && echo started again && exec sleep 60
		(trap "" TERM; setsid sh -c 'read x <go; echo ended') & exit 0`)
	// Worker 2 is the clock.
	for range 4 {
		c.await("start", 2)
	}
	for _, e := range c.events {
		if e["event"] == "stop" || e["event"] == "start" && e.number("worker") == 1 && e.number("pid") != c.events[0].number("pid") {
			t.Fatalf("nobody waits for what worker 1 left behind:\n%s", c.story())
		}
	}
	if err := os.WriteFile(dir+"/go", []byte("\n"), 0); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ended", "started again"} {
		if got := c.line(); got != want {
			t.Errorf("%q was written, want %q", got, want)
		}
	}
}

func TestThousandWorkers(t *testing.T) {
	if !inPidNamespace(t, 1) {
		if _, err := buildRecord(); err != nil {
			t.Fatal(err)
		}
		return
	}
	const n = 1000
	began := time.Now()
	r := recordWorkers(t, n, 0, "-n", strconv.Itoa(n), "--restart=always", "--grace=500ms")
	started := time.Since(began)
	if len(r.workers) != n {
		t.Fatalf("%d workers, want %d", len(r.workers), n)
	}
	began = time.Now()
	r.signal(syscall.SIGUSR1)
	r.await(syscall.SIGUSR1, 1, r.workers...)
	relayed := time.Since(began)
	r.want(64, map[syscall.Signal]int{syscall.SIGUSR1: 1}, r.workers...)
	began = time.Now()
	r.signal(syscall.SIGTERM)
	r.await(syscall.SIGTERM, 1, r.workers...)
	r.wantStatus("KILL")
	stopped := time.Since(began)
	noneLeft(t)
	for _, pid := range r.workers {
		if lives(pid) {
			t.Fatalf("worker %d lives", pid)
		}
	}
	t.Logf("%d workers: start %v, a signal %v, stop with a grace of 500 ms and SIGKILL %v", n, started, relayed, stopped)
}

// Many workers that die at once, each with a daemon, are soon there again.
func TestManyWithDaemonsDie(t *testing.T) {
	if !inPidNamespace(t, 1) {
		return
	}
	const n = 200
	c := startCluster(t, "-n", strconv.Itoa(n), "--restart=on-failure", "--grace=200ms", "--", "sh", "-c",
		`[ $PGROUP_START -gt 200 ] || (trap "" TERM; setsid sleep 60 >&- &); `+numbered)
	for _, pid := range c.workers(n) {
		kill(t, pid, unix.SIGKILL)
	}
	began := time.Now()
	c.workers(n)
	took := time.Since(began)
	if took > 6*time.Second {
		t.Errorf("%d workers and their daemons took %v to be replaced", n, took)
	}
	t.Log(took)
	killed := 0
	c.signal(syscall.SIGTERM)
	for _, e := range c.all("sweep") {
		killed += e.number("killed")
	}
	c.wantStatus("TERM")
	if end := c.all("end")[0]; killed != n || end.number("killed") != n {
		t.Errorf("sweeps killed %d, end says %v, want %d", killed, end, n)
	}
}

func TestClusterRelaysOnce(t *testing.T) {
	t.Parallel()
	for _, whom := range []string{"group", "worker"} {
		t.Run(whom, func(t *testing.T) {
			t.Parallel()
			r := recordWorkers(t, 3, 1, "-n", "3", "--grace=1m", "--relay="+whom)
			if len(r.workers) != 3 {
				t.Fatalf("workers %v, want 3", r.workers)
			}
			to := r.members()
			if whom == "worker" {
				to = r.workers
			}
			want := map[syscall.Signal]int{}
			for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGWINCH, 40} {
				r.signal(sig)
				r.await(sig, 1, to...)
				want[sig] = 1
			}
			for range 20 {
				r.signal(50)
			}
			r.await(50, 20, to...)
			want[50] = 20
			r.signal(syscall.SIGTERM)
			r.await(syscall.SIGCONT, 1, to...)
			want[syscall.SIGTERM], want[syscall.SIGCONT] = 1, 1
			r.want(64, want, to...)
			for pid, got := range r.got {
				if !slices.Contains(to, pid) && len(got) > 0 {
					t.Errorf("child %d of a worker got (signal:times) %d, want none", pid, got)
				}
			}
		})
	}
}

// A worker that somebody has stopped holds up nobody, and can be stopped.
func TestSuspendedWorkers(t *testing.T) {
	t.Parallel()
	c := startCluster(t, "-n", "3", "--restart=on-failure", "--", "sh", "-c", `trap 'exit 0' TERM; echo $PGROUP_WORKER $$; while :; do sleep 0.05; done`)
	pids := c.workers(3)
	kill(t, pids[1], unix.SIGSTOP)
	kill(t, pids[3], unix.SIGSTOP)
	eventually(t, "they are stopped", func() bool { return stopped(pids[1]) && stopped(pids[3]) })
	kill(t, pids[2], unix.SIGKILL)
	if again := c.workers(1); again[2] == 0 {
		t.Errorf("after the end of worker 2: %v", again)
	}
	kill(t, pids[3], unix.SIGKILL)
	if again := c.workers(1); again[3] == 0 {
		t.Errorf("after the end of worker 3: %v", again)
	}
	if !stopped(pids[1]) || stopped(c.cmd.Process.Pid) {
		t.Error("worker 1 goes on, or the launcher does not")
	}
	c.signal(syscall.SIGTERM)
	c.wantStatus("0")
}

// All workers stopped: so is the launcher, as a shell's job; those that wait for
// their start come when it goes on.
func TestClusterIsSuspended(t *testing.T) {
	t.Parallel()
	cmd := pgroupRun("-n", "3", "--", "sh", "-c", numbered)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c := &cluster{job: startJob(t, cmd)}
	pids := c.workers(3)
	launcher := cmd.Process.Pid
	kill(t, pids[1], unix.SIGTSTP)
	kill(t, pids[2], unix.SIGTSTP)
	eventually(t, "two are stopped", func() bool { return stopped(pids[1]) && stopped(pids[2]) })
	if stopped(launcher) {
		t.Error("the launcher has stopped while worker 3 runs")
	}
	kill(t, pids[3], unix.SIGTSTP)
	eventually(t, "the launcher stops", func() bool { return stopped(launcher) })
	c.signal(syscall.SIGCONT)
	eventually(t, "all go on", func() bool {
		return !stopped(pids[1]) && !stopped(pids[2]) && !stopped(pids[3]) && !stopped(launcher)
	})
	c.signal(syscall.SIGTSTP)
	eventually(t, "all stop", func() bool {
		return stopped(pids[1]) && stopped(pids[2]) && stopped(pids[3]) && stopped(launcher)
	})
	// One of them is killed: the launcher has to see it.
	kill(t, pids[2], unix.SIGKILL)
	eventually(t, "the launcher goes on", func() bool { return !stopped(launcher) })
	c.signal(syscall.SIGTERM)
	c.wantStatus("KILL")
}

// A worker that can't be started is the end of all, whichever it is.
func TestClusterOutOfProcesses(t *testing.T) {
	t.Parallel()
	const n = 60
	script := []string{"run", "-n", strconv.Itoa(n), "--restart=always", "--", "/bin/sh", "-c", `: >up.$PGROUP_WORKER; (setsid sleep 60 &); exec sleep 60`}
	check := func(t *testing.T, cmd *exec.Cmd) {
		t.Helper()
		status, _, stderr := endSoon(t, cmd)
		if status != 125 || !strings.Contains(stderr, "pgroup: cannot start") || !strings.Contains(stderr, "raise the limit on processes") {
			t.Errorf("status %d, standard error %q; want 125 and that the limit is to be raised", status, stderr)
		}
		up, _ := filepath.Glob(cmd.Dir + "/up.*")
		if len(up) == 0 || len(up) == n {
			t.Errorf("%d of %d workers were up: choose another limit", len(up), n)
		}
	}
	t.Run("pids.max", func(t *testing.T) {
		t.Parallel()
		limit := map[string]string{"pids.max": "60"}
		dir := cgroup(t, "pids", limit, limit)
		check(t, inCgroup(dir, exec.Command(pgroupBin, script...)))
		// The proof that nothing is left.
		if procs, err := os.ReadFile(dir + "/cgroup.procs"); err != nil || len(procs) > 0 {
			t.Errorf("in the cgroup are left %q, %v", procs, err)
		}
	})
	t.Run("RLIMIT_NPROC", func(t *testing.T) {
		t.Parallel()
		if os.Getuid() != 0 {
			t.Skip("only root can start a process as a user who has none yet")
		}
		const somebody = "54321" // who runs nothing else
		cmd := exec.Command(testExe, append([]string{somebody, "nproc", "60", pgroupBin}, script...)...)
		cmd.Env = append(os.Environ(), usedRole(t, "limited"))
		check(t, cmd)
	})
}

func TestTTYCluster(t *testing.T) {
	t.Parallel()
	const n = 3
	tm := openShell(t, "bash")
	tm.enter("pgroup run -n 3 -- " + worker(t, "later"))
	var pids []int
	for range n {
		pids = append(pids, tm.ready())
	}
	// each expects what all of them say, in any order.
	each := func(pattern string) {
		t.Helper()
		for range n {
			tm.expect(pattern)
		}
	}
	launcher := tm.launcherOf(pids[0])
	all := append([]int{launcher}, pids...)
	for round := 1; round <= 2; round++ {
		tm.press(ctrlC)
		each(fmt.Sprintf(`SIGINT %d\r\n`, round))
		tm.press(ctrlZ)
		tm.prompt()
		tm.awaitState("T", all...)
		tm.enter("fg")
		each(fmt.Sprintf(`SIGCONT %d\r\n`, round))
		tm.awaitState("SR", all...)
		tm.resize(24, uint16(300+round))
		each(fmt.Sprintf(`SIGWINCH %d\r\n`, round))
	}
	for _, pid := range pids {
		kill(t, pid, unix.SIGUSR1)
	}
	each(`SIGUSR1 1\r\n`)
	for left := n; left > 0; left-- {
		tm.enter("end")
		tm.expect(`in all INT=2 WINCH=2 CONT=2\.`)
		// Until it has ended it may read the next line.
		tm.await("end of a worker", func() bool {
			pids = slices.DeleteFunc(pids, func(pid int) bool { return !lives(pid) })
			return len(pids) < left
		})
	}
	wantStatus(t, tm.prompt(), 0)
	tm.awaitGone(launcher)
}

// With --tty the terminal is worker 1's, and that of the next one at its place.
func TestTTYClusterForeground(t *testing.T) {
	t.Parallel()
	tm := openShell(t, "bash")
	pids := map[string]int{}
	meet := func() {
		m := tm.expect(`worker (\d) is (\d+)\r\n`)
		pids[m[1]], _ = strconv.Atoi(m[2])
	}
	tm.enter(`pgroup run -n 3 --restart on-failure --tty -- sh -c 'echo worker $PGROUP_WORKER is $$; exec sleep 60'`)
	for range 3 {
		meet()
	}
	first := pids["1"]
	tm.await("worker 1 has the terminal", func() bool { return tm.foreground() == first })
	kill(t, first, unix.SIGKILL)
	meet()
	if pids["1"] == first {
		t.Fatalf("workers %v, want another worker 1", pids)
	}
	tm.await("the new worker 1 has the terminal", func() bool { return tm.foreground() == pids["1"] })
	kill(t, tm.launcherOf(pids["1"]), unix.SIGTERM)
	wantStatus(t, tm.prompt(), 143) // who was started again has not failed the run
	tm.awaitGone(pids["1"], pids["2"], pids["3"])
}

// The window of a cluster is closed.
func TestTTYClusterHangUp(t *testing.T) {
	t.Parallel()
	tm := openShell(t, "bash")
	tm.enter(`pgroup run -n 3 --restart always -- sh -c 'trap "" HUP; echo worker $PGROUP_WORKER is $$; sleep 60 & wait'`)
	var pids []int
	for range 3 {
		pid, _ := strconv.Atoi(tm.expect(`worker \d is (\d+)\r\n`)[1])
		pids = append(pids, pid)
	}
	tm.hangUp()
	tm.awaitGone(pids...)
}

// Nobody reads the workers' output any more, or has closed what they read from.
func TestClusterInPipeline(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ line, want string }{
		"reader ends":                 {`pgroup run -n 2 -- sh -c 'while echo line; do :; done' | head -n 1`, "line\n141 0\n"},
		"workers are over":            {`yes | pgroup run -n 2 -- true`, "141 0\n"},
		"workers read":                {`printf 'a\nb\n' | pgroup run -n 2 -- sh -c 'read x; echo got' | sort`, "got\ngot\n0 0 0\n"},
		"workers closed their output": {`pgroup run -n 2 -- sh -c 'exec >&-; until [ -e over ]; do sleep 0.01; done' | { cat; : >over; }`, "0 0\n"},
		"workers closed it":           {`{ yes; echo $? >over; } | pgroup run -n 2 -- sh -c 'exec <&-; until [ -s over ]; do sleep 0.01; done'`, "0 0\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("bash", "-c", test.line+`; echo ${PIPESTATUS[*]}`)
			cmd.Dir = t.TempDir()
			cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(pgroupBin)+":"+os.Getenv("PATH"))
			var out strings.Builder
			cmd.Stdout = &out
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			late := time.AfterFunc(jobLimit, func() { unix.Kill(-cmd.Process.Pid, unix.SIGKILL) })
			defer late.Stop()
			if err := cmd.Wait(); err != nil || out.String() != test.want {
				t.Errorf("%v, %q; want %q", err, &out, test.want)
			}
		})
	}
}
