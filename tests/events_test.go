package tests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// An event is one line of --events.
type event map[string]any

// readEvents returns the events in a file, whose form it checks: one object a
// line, with a time and a name, and end the last.
func readEvents(t *testing.T, file string) []event {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasSuffix(text, []byte("\n")) {
		t.Fatalf("events end in the middle of a line:\n%s", text)
	}
	var events []event
	var last time.Time
	for line := range strings.Lines(string(text)) {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(e["time"]))
		if err != nil {
			t.Errorf("%q: %v", line, err)
		}
		if at.Before(last) || time.Since(at).Abs() > time.Minute {
			t.Errorf("%q comes after an event of %v", line, last)
		}
		last = at
		events = append(events, e)
	}
	for i, e := range events {
		if final := i == len(events)-1; (e["event"] == "end") != final {
			t.Errorf("end is not the last event, once:\n%s", text)
		}
	}
	return events
}

// withoutTime returns e as JSON, which sorts the keys, without its time.
func withoutTime(e event) string {
	e = maps.Clone(e)
	delete(e, "time")
	text, _ := json.Marshal(e)
	return string(text)
}

// wantEvents checks that the events of a finished run are want, in which a
// pid that is not known beforehand is -1, and whichever of kinds are missing
// there do not matter.
func wantEvents(t *testing.T, file string, want ...event) {
	t.Helper()
	kinds := map[any]bool{}
	for i := range want {
		kinds[want[i]["event"]] = true
	}
	var got, wanted []string
	for _, e := range readEvents(t, file) {
		if !kinds[e["event"]] {
			continue
		}
		if i := len(got); i < len(want) && want[i]["pid"] == -1 {
			if pid, ok := e["pid"].(float64); ok && pid > 1 {
				e["pid"] = -1
			}
		}
		got = append(got, withoutTime(e))
	}
	for _, e := range want {
		wanted = append(wanted, withoutTime(e))
	}
	if !slices.Equal(got, wanted) {
		t.Errorf("events:\n\t%s\nwant:\n\t%s", strings.Join(got, "\n\t"), strings.Join(wanted, "\n\t"))
	}
}

// What runs a while: each shell text writes a line when it is ready.
const (
	handlesTerm = `trap 'exit 3' TERM; echo $$; while :; do sleep 0.05; done`
	ignoresTerm = `trap '' TERM; echo $$; exec sleep 60`
)

func TestEvents(t *testing.T) {
	t.Parallel()
	exit := func(status int) event { return event{"event": "exit", "worker": 1, "pid": -1, "status": status} }
	died := func(signal string) event { return event{"event": "exit", "worker": 1, "pid": -1, "signal": signal} }
	end := func(status, adopted, killed int) event {
		return event{"event": "end", "status": status, "adopted": adopted, "killed": killed}
	}
	stop := func(reason, signal string, grace float64) event {
		return event{"event": "stop", "reason": reason, "signal": signal, "grace": grace}
	}
	start := event{"event": "start", "worker": 1, "pid": -1}
	escalate := event{"event": "escalate"}
	sweep := func(killed int) event { return event{"event": "sweep", "killed": killed} }
	adopt := event{"event": "adopt", "pid": -1}

	tests := []struct {
		name   string
		flags  string
		shell  string // without a signal to wait for, its end is the run's
		signal syscall.Signal
		status string
		want   []event
	}{
		{"success", "", `exit 0`, 0, "0", []event{start, exit(0), end(0, 0, 0)}},
		{"failure", "", `exit 3`, 0, "3", []event{start, exit(3), end(3, 0, 0)}},
		{"death", "", `kill -USR1 $$`, 0, "USR1", []event{start, died("USR1"), end(138, 0, 0)}},
		{"death by a signal without a name", "", `kill -64 $$`, 0, "64", []event{start, end(192, 0, 0)}},
		{
			"stop", "", handlesTerm, syscall.SIGTERM, "3",
			[]event{start, stop("signal", "TERM", 10), exit(3), end(3, 0, 0)},
		},
		{
			"stop with its own signal", "--stop-signal=USR1 --grace=1500ms", `echo; exec sleep 60`, syscall.SIGTERM, "USR1",
			[]event{start, stop("signal", "USR1", 1.5), died("USR1"), end(138, 0, 0)},
		},
		{
			"escalate", "--grace=100ms", ignoresTerm, syscall.SIGTERM, "KILL",
			[]event{start, stop("signal", "TERM", 0.1), escalate, died("KILL")},
		},
		{"timeout", "--timeout=1s", handlesTerm, 0, "124", []event{start, stop("timeout", "TERM", 10), exit(3), end(124, 0, 0)}},
		{
			"timeout and escalate", "--timeout=1s --grace=100ms", ignoresTerm, 0, "KILL",
			[]event{start, stop("timeout", "TERM", 0.1), escalate, died("KILL")},
		},
		{
			"left-overs", "--grace=1m", `sleep 60 & exit 5`, 0, "5",
			[]event{start, exit(5), adopt, stop("leftovers", "TERM", 60), end(5, 1, 0)},
		},
		{
			"left-overs that stay", "--grace=100ms", `trap '' TERM; sleep 60 & exit 5`, 0, "5",
			[]event{start, exit(5), adopt, stop("leftovers", "TERM", 0.1), sweep(1), end(5, 1, 1)},
		},
		{
			"left-overs waited for", "--leftovers=wait", `sleep 0.1 & exit 5`, 0, "5",
			[]event{start, exit(5), adopt, end(5, 1, 0)},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "events")
			args := append(strings.Fields(test.flags), "--events="+file, "--", "sh", "-c", test.shell)
			j := startJob(t, pgroupRun(args...))
			if test.signal != 0 {
				j.line()
				j.signal(test.signal)
			}
			j.wantStatus(test.status)
			wantEvents(t, file, test.want...)
		})
	}
}

func TestEventsNameTheProcesses(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "events")
	j := startJob(t, pgroupRun("--events", file, "--", "sh", "-c", `sleep 60 & echo $$; echo $!; exit 0`))
	worker, orphan := j.pid(), j.pid()
	j.wantStatus("0")
	wantEvents(t, file,
		event{"event": "start", "worker": 1, "pid": worker},
		event{"event": "exit", "worker": 1, "pid": worker, "status": 0},
		event{"event": "adopt", "pid": orphan})
}

func TestEventsOfRelay(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "events")
	j := startJob(t, pgroupRun("--map=USR2=HUP", "--map=RTMIN+6=RTMIN+7", "--events", file, "--",
		"sh", "-c", `trap 'echo usr1' USR1; trap 'echo hup' HUP; trap 'echo rt' 41; trap 'exit 4' INT; echo; while :; do sleep 0.05 & wait; done`))
	j.line()
	from := os.Getpid()
	var want []event
	for _, relay := range []struct {
		sig              syscall.Signal
		name, as, answer string
	}{
		{syscall.SIGUSR1, "USR1", "USR1", "usr1"},
		{syscall.SIGUSR2, "USR2", "HUP", "hup"},
		{40, "RTMIN+6", "RTMIN+7", "rt"},
		{syscall.SIGINT, "INT", "INT", ""},
	} {
		j.signal(relay.sig)
		if relay.answer != "" {
			if got := j.line(); got != relay.answer {
				t.Fatalf("worker wrote %q, want %q", got, relay.answer)
			}
		}
		want = append(want, event{"event": "relay", "signal": relay.name, "as": relay.as, "from": from})
	}
	j.wantStatus("4")
	// The sender is said where it is known.
	for _, e := range readEvents(t, file) {
		if e["event"] != "relay" {
			continue
		}
		if e["from"] == nil {
			e["from"] = from
		}
		if len(want) == 0 || withoutTime(e) != withoutTime(want[0]) {
			t.Fatalf("relay event %s, want %v", withoutTime(e), want)
		}
		want = want[1:]
	}
	if len(want) > 0 {
		t.Errorf("no relay events %v", want)
	}
}

func TestEventsOfSuspension(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "events")
	// The worker is one process: a shell that waits in vfork(2) for a child
	// which has stopped can't stop itself.
	cmd := pgroupRun(append([]string{"--events", file, "--"}, sleeper...)...)
	// As a shell's job: a group that is not orphaned, else TSTP stops nothing.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	j := startJob(t, cmd)
	worker := j.pid()
	j.signal(syscall.SIGTSTP)
	eventually(t, "worker and launcher stop", func() bool { return stopped(worker) && stopped(cmd.Process.Pid) })
	j.signal(syscall.SIGCONT)
	eventually(t, "worker and launcher go on", func() bool { return !stopped(worker) && !stopped(cmd.Process.Pid) })
	j.signal(syscall.SIGTERM)
	j.wantStatus("TERM")
	wantEvents(t, file, event{"event": "suspend", "signal": "TSTP"}, event{"event": "resume"})
}

func TestEventsOfLeadersDeath(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "events")
	j := startJob(t, pgroupRun(append([]string{"--events", file, "--"}, sleeper...)...))
	worker, _ := readStat(j.pid())
	// The worker may run before the launcher knows that it does.
	eventually(t, "start event", func() bool {
		text, _ := os.ReadFile(file)
		return strings.HasSuffix(string(text), "\n")
	})
	if err := syscall.Kill(worker.ppid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-j.ended:
	case <-time.After(jobLimit):
		t.Fatal("still running")
	}
	wantEvents(t, file, event{"event": "stop", "reason": "leader", "signal": "TERM", "grace": 10})
}

// The file is appended to, made if need be, and not the worker's.
func TestEventsFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "old"), []byte("first line\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"old", "new", "new"} {
		cmd := exec.Command("sh", "-c", `umask 027; exec "$0" run --events "$1" -- sh -c 'ls /proc/$$/fd; exit'`, pgroupBin, name)
		cmd.Dir = dir
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Fields(string(out)); !slices.Equal(got, []string{"0", "1", "2"}) {
			t.Errorf("the worker has the open files %v, want 0, 1 and 2", got)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "old"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(text), "first line\n{") {
		t.Errorf("a file with a first line has become %q", text)
	}
	text, err = os.ReadFile(filepath.Join(dir, "new"))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), `"end"`); n != 2 {
		t.Errorf("after two runs the file has %d ends:\n%s", n, text)
	}
	info, err := os.Stat(filepath.Join(dir, "new"))
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode(); got != 0o640 {
		t.Errorf("with umask 027 the file has the mode %v, want %v", got, os.FileMode(0o640))
	}
}

func TestEventsToOpenFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "events")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := pgroupRun("--events=fd:3", "--", "sh", "-c", `ls /proc/$$/fd; exit 6`)
	cmd.ExtraFiles = []*os.File{f}
	j := startJob(t, cmd)
	for _, want := range []string{"0", "1", "2"} {
		if got := j.line(); got != want {
			t.Errorf("the worker has the open file %s, want %s", got, want)
		}
	}
	j.wantStatus("6")
	wantEvents(t, file, event{"event": "end", "status": 6, "adopted": 0, "killed": 0})
}
