package tests

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestRestartPolicies(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		policy, first string // what the first start does; the second one ends with status 0
		starts        int
		status        string
	}{
		{"no", "exit 0", 1, "0"},
		{"no", "exit 3", 1, "3"},
		{"on-failure", "exit 0", 1, "0"},
		{"on-failure", "exit 3", 2, "0"},
		{"on-failure", "kill -USR1 $$", 2, "0"},
		{"on-failure", "kill -TERM $$", 2, "0"}, // nobody relayed it
		{"always", "exit 0", 2, "TERM"},
		{"always", "exit 3", 2, "TERM"},
		{"always", "kill -KILL $$", 2, "TERM"},
	} {
		t.Run(test.policy+"/"+test.first, func(t *testing.T) {
			t.Parallel()
			second := "exit 0"
			if test.policy == "always" {
				second = "exec sleep 60"
			}
			c := startCluster(t, "--restart="+test.policy, "--", "sh", "-c",
				fmt.Sprintf(`echo $PGROUP_WORKER $PGROUP_WORKERS $PGROUP_START; if [ $PGROUP_START = 1 ]; then %s; fi; %s`, test.first, second))
			for n := range test.starts {
				if want, got := fmt.Sprintf("1 1 %d", n+1), c.line(); got != want {
					t.Errorf("worker, workers, start: %s, want %s", got, want)
				}
			}
			if test.policy == "always" {
				c.signal(syscall.SIGTERM)
			}
			c.wantStatus(test.status)
			if n := len(c.all("start")); n != test.starts {
				t.Errorf("%d starts, want %d:\n%s", n, test.starts, c.story())
			}
		})
	}
}

// The wait for a start doubles from 100 ms, and --max-restarts ends it.
func TestBackoff(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		args    []string
		command string
		last    string // event before the run gives up
		status  string
		says    string
	}{
		"exits": {
			[]string{"--restart=always"}, `exit 0`, "exit", "125",
			"worker 1 ended within 10s of its start after 4 restarts in a row: gave up",
		},
		"fails": {
			[]string{"--restart=on-failure"}, `exit 7`, "exit", "7",
			"worker 1 ended within 10s of its start after 4 restarts in a row: gave up",
		},
		"dies with others": {
			[]string{"--restart=always", "-n2"}, `[ $PGROUP_WORKER = 1 ] || exec sleep 60; kill -USR2 $$`, "exit", "USR2",
			"worker 1 ended within 10s of its start after 4 restarts in a row: gave up",
		},
		"cannot start": {
			[]string{"--restart=always", "-n2"}, `[ $PGROUP_WORKER = 1 ] || exec sleep 60; rm -f "$0"`, "fail", "127",
			"no such file or directory",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			script := "#!/bin/sh\n" + test.command + "\n"
			if err := os.WriteFile(dir+"/server", []byte(script), 0o700); err != nil {
				t.Fatal(err)
			}
			c := startClusterIn(t, dir, append(test.args, "--max-restarts=4", "--", "./server")...)
			var ended event
			want := 0.1
			for n := range 5 {
				for {
					e, ok := c.next()
					if !ok {
						t.Fatalf("it is over:\n%s", c.story())
					}
					if e.number("worker") != 1 || e["event"] == "stop" {
						continue
					}
					if e["event"] == "start" && ended != nil {
						took := e.at(t).Sub(ended.at(t)).Seconds()
						if took < want/2 || took > want/2*1.5+0.5 {
							t.Errorf("start after %.3f s, want %.1f s", took, want/2)
						}
					}
					if e["event"] == "exit" || e["event"] == "fail" {
						ended = e
						break
					}
				}
				if n < 4 && ended["restart"] != want || n == 4 && ended["restart"] != nil {
					t.Errorf("end %d says %v, want a restart after %.1f s if it isn't the last", n+1, ended, want)
				}
				want *= 2
			}
			if ended["event"] != test.last {
				t.Errorf("the last end is %v, want %s", ended, test.last)
			}
			if stop := c.await("stop", 0); stop["reason"] != "max-restarts" {
				t.Errorf("%v, want a stop for max-restarts", stop)
			}
			c.wantStatus(test.status)
			if !strings.Contains(c.said(), test.says) {
				t.Errorf("it said %q, want %q", c.said(), test.says)
			}
			for _, e := range c.all("start") {
				if lives(e.number("pid")) {
					t.Errorf("worker %d lives", e.number("pid"))
				}
			}
		})
	}
}

// After 10 s of health the wait begins at 100 ms again, and what was relayed
// longer ago is no reason for a worker's end.
func TestHealth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mkfifo(dir+"/over", 0o600); err != nil {
		t.Fatal(err)
	}
	c := startClusterIn(t, dir, "--restart=always", "--max-restarts=2", "--", "sh", "-c",
		`trap 'echo heard' HUP
		case $PGROUP_START in
		1|2) exit 0;;
		3) echo up; sleep 0.01; read x <over; exit 0;;
		*) echo again; exec sleep 60;;
		esac`)
	for _, want := range []float64{0.1, 0.2} {
		if e := c.await("exit", 1); e["restart"] != want {
			t.Errorf("%v, want a restart in %v s", e, want)
		}
	}
	if got := c.line(); got != "up" {
		t.Fatalf("%q, want up", got)
	}
	c.signal(syscall.SIGHUP)
	if got := c.line(); got != "heard" {
		t.Fatalf("%q, want heard", got)
	}
	// What is to be seen is that 10 s have passed.
	heard := time.Now()
	time.Sleep(10100 * time.Millisecond)
	if err := os.WriteFile(dir+"/over", nil, 0); err != nil {
		t.Fatal(err)
	}
	if e := c.await("exit", 1); e["restart"] != 0.1 {
		t.Errorf("%v after %v, want a restart in 0.1 s", e, time.Since(heard))
	}
	if got := c.line(); got != "again" {
		t.Errorf("%q, want again", got)
	}
}

// A worker that ends after a relayed signal of these was meant to; so was one
// that waits for its start.
func TestNoRestartAfterSignal(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP} {
		name := signalName(sig)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startCluster(t, "-n2", "--restart=always", "--", "sh", "-c",
				`[ $PGROUP_WORKER = 1 ] || exit 0; trap 'exit 4' `+name+`; while :; do echo up; sleep 0.05; done`)
			c.line()
			// In a backoff that is long enough to see that it is cut short.
			for e := c.await("exit", 2); e["restart"] != 0.8; e = c.await("exit", 2) {
			}
			began := time.Now()
			starts := len(c.events)
			c.signal(sig)
			c.wantStatus("4")
			if took := time.Since(began); took > 700*time.Millisecond {
				t.Errorf("it took %v to end", took)
			}
			c.all("end")
			for _, e := range c.events[starts:] {
				if e["event"] == "start" {
					t.Errorf("%v after %s", e, name)
				}
			}
		})
	}
	t.Run("USR1 is none of them", func(t *testing.T) {
		t.Parallel()
		c := startCluster(t, "--restart=always", "--", "sh", "-c", `[ $PGROUP_START = 1 ] || { echo again; exec sleep 60; }; echo up; exec sleep 60`)
		c.line()
		c.signal(syscall.SIGUSR1)
		if e := c.await("exit", 1); e["signal"] != "USR1" || e["restart"] != 0.1 {
			t.Errorf("%v, want a restart in 0.1 s", e)
		}
		c.line()
	})
}

// Alone in its backoff a run ends at once, and its status is that of the worker
// that it waits to start again.
func TestStopInBackoff(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		flag   string
		sig    syscall.Signal
		status string
	}{
		{"--grace=1m", syscall.SIGTERM, "5"},
		{"--grace=0", syscall.SIGTERM, "5"},
		{"--grace=1m", syscall.SIGINT, "5"},
		{"--timeout=1s", 0, "124"},
	} {
		t.Run(test.flag+" "+test.status, func(t *testing.T) {
			t.Parallel()
			c := startCluster(t, test.flag, "--restart=on-failure", "--", "sh", "-c", `exit 5`)
			var e event
			for e = c.await("exit", 1); e["restart"] != 0.8; e = c.await("exit", 1) {
			}
			if test.sig != 0 {
				c.signal(test.sig)
			}
			c.wantStatus(test.status)
			if took := c.all("end")[0].at(t).Sub(e.at(t)); took > 700*time.Millisecond {
				t.Errorf("it took %v to end", took)
			}
			if last := c.events[len(c.events)-2]; last["event"] == "start" {
				t.Errorf("a worker was started:\n%s", c.story())
			}
		})
	}
}

// A command that is not there for a while comes back.
func TestRestartWithoutFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server := dir + "/server"
	if err := os.WriteFile(server, []byte("#!/bin/sh\necho up; [ -e ready ] && exec sleep 60; mv \"$0\" \"$0\".new; exit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	c := startClusterIn(t, dir, "--restart=on-failure", "--", server)
	c.line()
	for range 3 {
		if e := c.await("fail", 1); e["restart"] == nil || !strings.Contains(fmt.Sprint(e["error"]), "no such file") {
			t.Errorf("%v, want that the file isn't there, and a restart", e)
		}
	}
	for old, name := range map[string]string{server + ".new": server} {
		if err := os.WriteFile(dir+"/ready", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(old, name); err != nil {
			t.Fatal(err)
		}
	}
	c.await("start", 1)
	c.line()
	if n := strings.Count(c.said(), "could not be started: no such file or directory; starting it again in"); n < 3 {
		t.Errorf("it said %q, want why each start failed", c.said())
	}
	c.signal(syscall.SIGTERM)
	c.wantStatus("TERM")
}

// A worker that is started again has what the first one had.
func TestRestartInherits(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/bin", 0o700); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\npwd; umask; ulimit -n; for n in 0 1 2; do readlink /proc/$$/fd/$n; done; [ -e /proc/$$/fd/3 ] && echo 3; read line; echo $line; exit 1\n"
	if err := os.WriteFile(dir+"/bin/server", []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, before string }{
		{"leader", ""},
		{"PID 1", "unshare --pid --fork --kill-child --mount-proc"},
		{"pidns", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			flags := ""
			if test.name == "pidns" {
				flags = "--contain=pidns"
			}
			// A relative directory in PATH is relative to where it was started.
			cmd := exec.Command("sh", "-c", `umask 027; ulimit -Sn 1234; PATH=bin:$PATH; export PATH
				printf 'a\nb\nc\n' >"$1"; exec `+test.before+` "$0" run `+flags+` --restart=on-failure --max-restarts=2 server <"$1"`, pgroupBin, filepath.Join(t.TempDir(), "in"))
			cmd.Dir = dir
			out, _ := cmd.Output()
			starts := strings.SplitAfter(string(out), "\n")
			starts = starts[:len(starts)-1]
			if len(starts)%3 != 0 || len(starts) == 0 || !strings.HasPrefix(starts[0], dir) {
				t.Fatalf("the three starts wrote\n%s", out)
			}
			each := len(starts) / 3
			for n := range 3 {
				first, this := starts[:each-1], starts[n*each:(n+1)*each-1]
				if line := starts[(n+1)*each-1]; line != []string{"a\n", "b\n", "c\n"}[n] || !slices.Equal(first, this) {
					t.Errorf("start %d has read %q and has %q; the first has %q", n+1, line, this, first)
				}
			}
		})
	}
}

// restartMoments are moments in the life of a cluster with restarts.
var restartMoments = []struct {
	name string
	come func(c *cell)
}{
	{"run", func(*cell) {}},
	{"backoff", func(c *cell) { c.tell(); c.awaitEvent(`"event":"exit"`) }},
	{"clearing", func(c *cell) { c.tell(); c.awaitEvent(`"reason":"leftovers"`) }},
	{"killing", func(c *cell) { c.tell(); c.awaitEvent(`"event":"sweep"`) }},
	{"second start", func(c *cell) { c.tell(); c.awaitEvent(`"event":"sweep".*\n(.*\n)*.*"event":"start"`) }},
}

// Whenever launcher or leader are killed, nothing lives.
func TestRestartKilled(t *testing.T) {
	if !inPidNamespace(t, 3) {
		return
	}
	for _, moment := range restartMoments {
		for _, whom := range []string{"launcher", "leader", "both"} {
			for _, grace := range []string{"100ms", "0"} {
				t.Run(moment.name+"/"+whom+"/"+grace, func(t *testing.T) {
					t.Parallel()
					if grace == "0" && moment.name == "clearing" {
						return // there is no such moment
					}
					const n = 3
					small := kind{name: "small", ready: 4}
					args := []string{"-n", strconv.Itoa(n), "--restart=always", "--events=events", "--grace=" + grace}
					if whom == "both" {
						args = append(args, "--contain=pidns")
					}
					c := startCell(t, pgroupRun(append(append(args, "--"), small.argv(t)...)...), noWindow, n*small.ready)
					c.awaitUp()
					moment.come(c)
					switch whom {
					case "launcher":
						c.signal(syscall.SIGKILL)
					case "leader":
						c.killLeader()
					case "both":
						c.killBoth()
					}
					if survivors, hangs := c.await(5 * time.Second); survivors > 0 || hangs {
						t.Errorf("%d survive, pgroup hangs: %t\n%s", survivors, hangs, c.report())
					}
				})
			}
		}
	}
}

// awaitEvent waits until pattern matches in the cell's file of events.
func (c *cell) awaitEvent(pattern string) {
	c.t.Helper()
	re := regexp.MustCompile(pattern)
	eventually(c.t, pattern, func() bool {
		text, _ := os.ReadFile(filepath.Join(c.dir, "events"))
		return re.Match(text)
	})
}

// A stop at any moment of many restarts ends all, and no worker comes after it.
func TestStopAmongRestarts(t *testing.T) {
	t.Parallel()
	for n := range 5 {
		c := startCluster(t, "-n20", "--restart=always", "--grace=1s", "--", "sh", "-c", `(setsid sleep 60 >&- &); exit 0`)
		for range 20 + 11*n { // starts
			c.await("start", 0)
		}
		c.signal(syscall.SIGTERM)
		c.all("end")
		stop := slices.IndexFunc(c.events, func(e event) bool { return e["event"] == "stop" && e["worker"] == nil })
		for _, e := range c.events[stop+1:] {
			if e["event"] == "start" {
				t.Errorf("after the stop: %v", e)
			}
		}
		if n := len(c.all("end")); n != 1 {
			t.Errorf("%d ends", n)
		}
	}
}

// What a worker leaves behind is never the same process for long: it is gone all
// the same when the worker's place is filled.
func TestRemainsThatHop(t *testing.T) {
	if !inPidNamespace(t, 2) {
		return
	}
	for _, name := range []string{"hop", "sprint"} {
		for _, n := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s/%d", name, n), func(t *testing.T) {
				t.Parallel()
				k := kinds[slices.IndexFunc(kinds, func(k kind) bool { return k.name == name })]
				script := `[ $PGROUP_START = 1 ] && exec "$@"; echo up $PGROUP_WORKER >>up; exec sleep 60`
				args := []string{"-n", strconv.Itoa(n), "--restart=always", "--grace=100ms", "--events=events", "--", "sh", "-c", script, "sh"}
				c := startCell(t, pgroupRun(append(args, k.argv(t)...)...), noWindow, k.ready)
				c.awaitUp()
				c.tell()
				c.awaitEvent(`"event":"exit"(.*\n)+.*"event":"start"`)
				for end := time.Now().Add(100 * time.Millisecond); time.Now().Before(end); {
					if left := c.members(); len(left) > 0 {
						t.Fatalf("worker 1 was started again while its tree lives: %v\n%s", left, c.report())
					}
				}
				c.signal(syscall.SIGTERM)
				if survivors, hangs := c.await(5 * time.Second); survivors > 0 || hangs {
					t.Errorf("%d survive, pgroup hangs: %t\n%s", survivors, hangs, c.report())
				}
			})
		}
	}
}
