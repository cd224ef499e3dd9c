package tests

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pgroup/pgroup"
)

func init() {
	roles["host"] = hostRole
}

// hostRole is a program that uses the package: it runs two workers, sends each a
// message when it has started, writes what they send as lines, and stops when
// both have answered.
func hostRole(args []string) int {
	pgroup.Init()
	events := make(chan pgroup.Event, 100)
	run, err := pgroup.Start(context.Background(), &pgroup.Spec{
		Args: args, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Workers: 2, Channel: true, Grace: 5 * time.Second,
		Events: func(e pgroup.Event) { events <- e },
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 125
	}
	for answers := 0; answers < 2; {
		switch e := <-events; e.Type {
		case pgroup.EventStart:
			if err := run.Send(e.Worker, map[string]any{"to": e.Worker, "text": "zwölf\n"}); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 125
			}
		case pgroup.EventMessage:
			fmt.Println(e.Worker, string(e.Data))
			if strings.Contains(string(e.Data), `"to"`) {
				answers++
			}
		case pgroup.EventEnd:
			return 1
		}
	}
	run.Stop()
	result, _ := run.Wait()
	return result.Code()
}

// Workers in any language send and receive. From the command line there is only
// what they send, as events: who wants to send them something uses the package.
func TestChannelLanguages(t *testing.T) {
	t.Parallel()
	dir, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		command []string
		first   string // that it sends by itself
		answer  string
	}{
		"node":   {[]string{"node", dir + "/node/child.js"}, `{"foo":"bar","baz":null,"text":"zwölf\n"}`, "got"},
		"python": {[]string{"python3", dir + "/channel/worker.py"}, "", "you said"},
		"shell":  {[]string{"sh", dir + "/channel/worker.sh"}, "", "you said"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(testExe, test.command...)
			cmd.Dir = t.TempDir()
			cmd.Env = append(os.Environ(), usedRole(t, "host"))
			j := startJob(t, cmd)
			want := map[string]int{}
			for worker := 1; worker <= 2; worker++ {
				want[fmt.Sprintf(`%d {%q:{"to":%d,"text":"zwölf\n"}}`, worker, test.answer, worker)] = 1
				if test.first != "" {
					want[fmt.Sprintf(`%d %s`, worker, test.first)] = 1
				}
			}
			for n := len(want); n > 0; n-- {
				// Languages differ in spaces, and in what they escape.
				line := j.line()
				worker, data, _ := strings.Cut(line, " ")
				found := false
				for w := range want {
					n, expected, _ := strings.Cut(w, " ")
					if n == worker && sameJSON(t, data, expected) {
						found = want[w] == 1
						want[w] = 0
					}
				}
				if !found {
					t.Errorf("a worker sent %s", line)
				}
			}
			for line, missing := range want {
				if missing == 1 {
					t.Errorf("no worker sent %s", line)
				}
			}
			j.wantStatus("143")
		})
	}
}

func sameJSON(t *testing.T, a, b string) bool {
	t.Helper()
	var x, y any
	if err := json.Unmarshal([]byte(a), &x); err != nil {
		t.Fatalf("%s: %v", a, err)
	}
	if err := json.Unmarshal([]byte(b), &y); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	return fmt.Sprint(x) == fmt.Sprint(y)
}

// A script for Node's fork() runs as it is: what it sends are events, and it is
// disconnected when the launcher is killed.
func TestChannelFork(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	// WINCH says nothing to it.
	c := startClusterIn(t, dir, "--channel", "--stop-signal=WINCH", "--", "node", nodeScript(t, "child.js"))
	e := c.await("message", 1)
	data, _ := json.Marshal(e["data"])
	if want := `{"baz":null,"foo":"bar","text":"zwölf\n"}`; string(data) != want {
		t.Errorf("the message is %s, want %s", data, want)
	}
	pid := c.events[0].number("pid")
	c.signal(syscall.SIGKILL)
	eventually(t, "the worker ends", func() bool { return !lives(pid) })
	if _, err := os.Stat(dir + "/disconnected"); err != nil {
		t.Error(err)
	}
}

// memoryLimit is what no worker may have the launcher use more of.
const memoryLimit = 100 << 20

// peak returns the most memory that a process has had.
func peak(t *testing.T, pid int) int {
	t.Helper()
	kB, err := strconv.Atoi(strings.TrimSuffix(procStatus(t, pid)["VmHWM"], " kB"))
	if err != nil {
		t.Fatal(err)
	}
	return kB << 10
}

// Whatever worker 1 does on its channel, worker 2 goes on, and so do 1 itself
// and the launcher, whose memory stays bounded.
func TestChannelHostile(t *testing.T) {
	t.Parallel()
	const asks = `{"cmd":"NODE_CLUSTER","act":"queryServer","address":"127.0.0.1","port":0,"addressType":4,"index":0,"seq":1}`
	for _, test := range []struct {
		name, flag string
		shell      string
		err        string // of the event channel, if there is one
	}{
		{"no JSON", "--channel", `echo hello >&3`, `not JSON: "hello"`},
		{"no JSON of Node's", "--node-cluster", `echo '{"cmd":"NODE_' >&3`, `not JSON: "{\"cmd\":\"NODE_"`},
		{"100 MB", "--channel", `head -c 100000000 /dev/zero | tr '\0' 1 >&3`, "longer than 16777216 bytes"},
		{"100 MB of values", "--channel", `yes '"0123456789"' | head -c 100000000 | tr '\n' ' ' >&3`, "longer than 16777216 bytes"},
		{"floods", "--channel", `yes '{"n":0}' | head -n 50000 >&3`, ""},
		{"never reads", "--channel", `yes '{"cmd":"NODE_HANDLE"}' >&3`, pgroup.ErrChannelFull.Error()},
		{"asks and never reads", "--node-cluster", `yes '` + asks + `' >&3`, pgroup.ErrChannelFull.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cmd := []string{test.flag, "-n", "2", "--grace=1s", "--", "sh", "-c", `
				exec 2>/dev/null # it is pgroup's
				trap 'exit 0' TERM
				if [ $PGROUP_WORKER = 1 ]; then
					read go <go
					` + test.shell + `
					echo done
					while :; do sleep 0.01; done
				fi
				while :; do echo "{\"n\":$((n += 1))}" >&3; sleep 0.01; done`}
			dir := t.TempDir()
			if err := unix.Mkfifo(dir+"/go", 0o600); err != nil {
				t.Fatal(err)
			}
			c := startClusterIn(t, dir, cmd...)
			c.await("message", 2)
			if err := os.WriteFile(dir+"/go", []byte("\n"), 0); err != nil {
				t.Fatal(err)
			}
			if test.err != "" {
				if e := c.await("channel", 0); e.number("worker") != 1 || e["error"] != test.err {
					t.Errorf("event %v, want the error %q of worker 1", e, test.err)
				}
			}
			if got := c.line(); got != "done" {
				t.Errorf("worker 1 says %q", got)
			}
			number := func() int { return event(c.await("message", 2)["data"].(map[string]any)).number("n") }
			for from := number(); number() < from+20; {
			}
			if p := peak(t, c.cmd.Process.Pid); p > memoryLimit {
				t.Errorf("the launcher has used %d MB", p>>20)
			}
			c.signal(syscall.SIGTERM)
			if exits := c.all("exit"); len(exits) != 2 {
				t.Errorf("events %v, want 2", exits)
			}
			c.wantStatus("0")
			want := ""
			if test.err != "" {
				want = "pgroup: closed the channel of worker 1: " + test.err + "\n"
			}
			// A flood may be more events than the test reads in time.
			said := regexp.MustCompile(`pgroup: \d+ events were lost: .*\n`).ReplaceAllString(c.said(), "")
			if said != want {
				t.Errorf("standard error is %q, want %q", said, want)
			}
		})
	}
}

// A worker says in its language, and in the way that it is asked to, that it is
// ready.
func TestReadyLanguages(t *testing.T) {
	t.Parallel()
	dir, err := filepath.Abs("testdata/ready")
	if err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"notify", "fd"} {
		for _, command := range []string{"python3 " + dir + "/worker.py", "sh " + dir + "/worker.sh", "node " + dir + "/worker.js"} {
			t.Run(how+"/"+filepath.Base(command), func(t *testing.T) {
				t.Parallel()
				cwd := t.TempDir()
				// TERM is not for systemd-notify, which may not have ended yet.
				c := startClusterIn(t, cwd, "-n", "2", "--ready="+how, "--relay=worker", "--", "sh", "-c", "exec "+command+" up.$PGROUP_WORKER")
				pids := map[int]int{}
				for range 2 {
					e := c.await("ready", 0)
					// It makes the file before.
					if _, err := os.Stat(fmt.Sprintf("%s/up.%d", cwd, e.number("worker"))); err != nil {
						t.Errorf("too soon: %v, %v", e, err)
					}
					pids[e.number("worker")] = e.number("pid")
				}
				if len(pids) != 2 {
					t.Errorf("ready are %v, want 2 workers", pids)
				}
				c.signal(syscall.SIGTERM)
				c.wantStatus("0")
				if ready := c.all("ready"); len(ready) != 2 {
					t.Errorf("events %v, want 2", ready)
				}
				for _, e := range c.all("start") {
					if pids[e.number("worker")] != e.number("pid") {
						t.Errorf("event %v, and ready were %v", e, pids)
					}
				}
			})
		}
	}
}

// A worker is ready when it says so, and not sooner.
func TestReadyWhenSaid(t *testing.T) {
	t.Parallel()
	for how, say := range map[string]string{
		"fd":     `echo >&$PGROUP_READY_FD; echo >&$PGROUP_READY_FD`,
		"notify": `systemd-notify --status=soon; systemd-notify --ready; systemd-notify --ready`,
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := unix.Mkfifo(dir+"/go", 0o600); err != nil {
				t.Fatal(err)
			}
			c := startClusterIn(t, dir, "-n", "2", "--ready="+how, "--", "sh", "-c",
				`[ $PGROUP_WORKER = 2 ] || read x <go; `+say+`; echo said; exec sleep 60`)
			c.await("ready", 2)
			c.signal(syscall.SIGWINCH)
			c.await("relay", 0)
			for _, e := range c.events {
				if e["event"] == "ready" && e.number("worker") == 1 {
					t.Errorf("worker 1 is ready before it says so:\n%s", c.story())
				}
			}
			if err := os.WriteFile(dir+"/go", []byte("\n"), 0); err != nil {
				t.Fatal(err)
			}
			c.await("ready", 1)
			c.line()
			c.line() // they have said it twice
			c.signal(syscall.SIGTERM)
			c.wantStatus("TERM")
			if ready := c.all("ready"); len(ready) != 2 {
				t.Errorf("events %v, want 2", ready)
			}
		})
	}
}

func TestReadyAfter(t *testing.T) {
	t.Parallel()
	const after = 300 * time.Millisecond
	c := startCluster(t, "-n", "2", "--ready="+after.String(), "--", "sleep", "60")
	started := map[int]time.Time{}
	for ready := 0; ready < 2; {
		e, ok := c.next()
		if !ok {
			t.Fatalf("the end after\n%s", c.story())
		}
		switch e["event"] {
		case "start":
			started[e.number("worker")] = e.at(t)
		case "ready":
			ready++
			// The event's time is that of its making, a little later.
			if took := e.at(t).Sub(started[e.number("worker")]); took < after-10*time.Millisecond || took > after+5*time.Second {
				t.Errorf("ready after %v, want %v", took, after)
			}
		}
	}
}

// Who has ended before was never ready; his successor may be.
func TestReadyDiesBefore(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"notify", "fd", "1m"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			c := startCluster(t, "--ready="+how, "--", "sh", "-c", "exit 3")
			c.wantStatus("3")
			if ready := c.all("ready"); len(ready) > 0 {
				t.Errorf("events %v", ready)
			}
		})
	}
	t.Run("again", func(t *testing.T) {
		t.Parallel()
		c := startCluster(t, "--ready=fd", "--restart=on-failure", "--", "sh", "-c",
			`[ $PGROUP_START = 1 ] && exit 1; echo >&$PGROUP_READY_FD; exec sleep 60`)
		pid := c.await("ready", 1).number("pid")
		var story []string
		for _, e := range c.events {
			story = append(story, fmt.Sprint(e["event"]))
		}
		if got := strings.Join(story, " "); got != "start exit start ready" || c.events[2].number("pid") != pid {
			t.Errorf("events %s, want start exit start ready:\n%s", got, c.story())
		}
	})
}
