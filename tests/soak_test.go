package tests

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

var soakRestarts = flag.Int("restarts", 600, "the restarts of each run of TestSoak; 10000 take some 70 s")

// TestSoak restarts the workers of a cluster thousands of times, and measures
// launcher and leader before, on the way and at the end. Each worker that ends is
// unhealthy, and so waits twice as long each time: they are many, so that few
// restarts of each are enough.
func TestSoak(t *testing.T) {
	if !inPidNamespace(t, 1) {
		return
	}
	for _, flags := range []string{"", "--channel --listen=127.0.0.1:0 --ready=fd"} {
		t.Run(flags, func(t *testing.T) { soak(t, *soakRestarts, strings.Fields(flags)) })
	}
}

func soak(t *testing.T, restarts int, flags []string) {
	rounds := 4
	if restarts > 5000 {
		rounds = 9 // 51 s of waiting
	}
	n := (restarts + rounds - 1) / rounds
	// The first and the last worker at each place wait, so that what is measured
	// before and after is the same.
	last := n + (rounds-1)*n
	events, w := pipe(t)
	cmd := pgroupRun(append(append([]string{"-n", strconv.Itoa(n), "--restart=always", "--grace=2s", "--events=fd:3"}, flags...),
		"--", "sh", "-c", fmt.Sprintf(`[ $PGROUP_START -gt %d ] || [ $PGROUP_START -le %d ] || exit 0; exec sleep 600`, last, n))...)
	cmd.ExtraFiles = []*os.File{w}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	cmd.Stderr = null
	j := startJob(t, cmd)
	w.Close()
	var pids []int
	starts, rest := 0, []byte(nil)
	buf := make([]byte, 1<<16)
	await := func(want int) {
		t.Helper()
		for starts < want {
			events.SetReadDeadline(time.Now().Add(60 * time.Second))
			n, err := events.Read(buf)
			if err != nil {
				t.Fatalf("after %d starts: %v", starts, err)
			}
			rest = append(rest, buf[:n]...)
			for {
				line, more, ok := bytes.Cut(rest, []byte("\n"))
				if !ok {
					break
				}
				rest = more
				if !bytes.Contains(line, []byte(`"event":"start"`)) {
					continue
				}
				if starts++; starts <= len(pids) || len(pids) < cap(pids) {
					_, after, _ := bytes.Cut(line, []byte(`"pid":`))
					pid, _ := strconv.Atoi(strings.TrimRight(string(after), "}"))
					pids = append(pids, pid)
				}
			}
		}
	}
	pids = make([]int, 0, n)
	await(n)
	leader, _ := readStat(pids[0])
	both := map[string]int{"launcher": cmd.Process.Pid, "leader": leader.ppid}
	measure := func() map[string]usage {
		of := map[string]usage{}
		for name, pid := range both {
			of[name] = usageOf(t, pid)
		}
		return of
	}
	before := measure()
	began := time.Now()
	for _, pid := range pids {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	await(n + n*2) // all have been started twice again: warm
	warm := measure()
	await(n + restarts)
	after := measure()
	for name := range both {
		b, w, a := before[name], warm[name], after[name]
		t.Logf("%s, %d workers, %d restarts in %.0f s: before %v; warm %v; after %v", name, n, restarts, time.Since(began).Seconds(), b, w, a)
		// The Go runtime opens two when it first polls.
		if a.files > b.files+2 {
			t.Errorf("%s: %d open files, %d before: %v", name, a.files, b.files, openFiles(t, both[name]))
		}
		// The Go runtime starts threads as it needs them, and keeps them.
		if a.threads > b.threads+6 {
			t.Errorf("%s: %d threads, %d before", name, a.threads, b.threads)
		}
		// A Go heap is not collected below 4 MB, and grows to twice what lives.
		if limit := max(w.memory, 8000) * 5 / 4; a.memory > limit {
			t.Errorf("%s: %d kB, %d kB when it was warm", name, a.memory, w.memory)
		}
	}
	j.signal(syscall.SIGTERM)
	for {
		events.SetReadDeadline(time.Now().Add(jobLimit))
		if n, err := events.Read(buf); n == 0 || err != nil {
			break
		}
	}
	j.wantStatus("TERM")
	noneLeft(t)
}

// A usage is what a process has.
type usage struct {
	memory  int // kB, its own (RssAnon in proc_pid_status(5))
	files   int
	threads int
}

func (u usage) String() string {
	return fmt.Sprintf("%d kB, %d files, %d threads", u.memory, u.files, u.threads)
}

func usageOf(t *testing.T, pid int) usage {
	t.Helper()
	status := procStatus(t, pid)
	var u usage
	fmt.Sscan(status["RssAnon"], &u.memory)
	fmt.Sscan(status["Threads"], &u.threads)
	u.files = len(openFiles(t, pid))
	return u
}
