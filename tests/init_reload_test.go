package tests

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// pids returns the workers' pids.
func (st *serviceStatus) pids() (pids []int) {
	for _, w := range st.Workers {
		pids = append(pids, w.PID)
	}
	return pids
}

// TestReload replaces all workers, and never has fewer ready ones than before.
func TestReload(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const n = 3
	s.want(0, "start", shell(serves, "--ready", "fd", "-n", strconv.Itoa(n))...)
	before := s.status(0)
	events := s.follow()
	s.want(0, "reload")
	after := s.status(0)
	for i, w := range after.Workers {
		if w.PID == before.Workers[i].PID || w.State != "ready" || w.Worker != i+1 || w.Restarts != 0 {
			t.Errorf("worker %d is %+v, and was %+v", i+1, w, before.Workers[i])
		}
	}
	if len(after.Workers) != n || after.PID != before.PID {
		t.Errorf("%+v, before %+v", after, before)
	}
	s.want(0, "stop")

	ready := map[any]bool{}
	for _, pid := range before.pids() {
		ready[float64(pid)] = true
	}
	stopping := 0
	for e := events.next(); e != nil; e = events.next() {
		switch e["event"] {
		case "ready":
			ready[e["pid"]] = true
		case "stop":
			if e["worker"] != nil {
				if e["reason"] != "reload" {
					t.Errorf("event %v", e)
				}
				stopping++
				if len(ready)-stopping < n {
					t.Errorf("%d workers are ready when one is stopped, %d of them being stopped", len(ready), stopping)
				}
			} else {
				return
			}
		case "exit":
			if len(ready) > n {
				stopping--
			}
			delete(ready, e["pid"])
			if len(ready) < n {
				t.Errorf("only %d workers are ready", len(ready))
			}
		}
	}
	t.Error("no event of the stop")
}

// TestReloadFails reloads to workers that end, or are never ready: the old ones go on.
func TestReloadFails(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(`[ -e bad ] && { . ./bad; }; `+serves, "--ready", "fd", "-n2")...)
	before := s.status(0)
	for _, test := range []struct{ bad, want string }{
		{"exit 3", "status 3"},
		{"kill -KILL $$", "KILL"},
		{"exec sleep 1000", "not ready in time"},
	} {
		if err := os.WriteFile(filepath.Join(s.dir, "bad"), []byte(test.bad), 0o600); err != nil {
			t.Fatal(err)
		}
		_, stderr := s.want(1, "reload", "--wait", "0.5")
		if !strings.Contains(stderr, test.want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: it says %q", test.bad, stderr)
		}
		eventually(t, "the new worker is gone", func() bool { return len(s.living()) == 4 })
		after := s.status(0)
		for i, w := range after.Workers {
			if w.PID != before.Workers[i].PID || w.State != "ready" {
				t.Errorf("%s: worker %d is %+v, and was %+v", test.bad, i+1, w, before.Workers[i])
			}
		}
	}
	os.Remove(filepath.Join(s.dir, "bad"))
	s.want(0, "reload")
	s.want(0, "stop")
	s.nothingLeft()
}

func TestScale(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(serves, "--ready", "fd", "-n2")...)
	first := s.status(0)
	for _, n := range []int{5, 1, 2} {
		s.want(0, "scale", strconv.Itoa(n))
		st := s.status(0)
		if len(st.Workers) != n || st.State != "ready" || st.Workers[0].PID != first.Workers[0].PID {
			t.Errorf("scaled to %d: %+v", n, st)
		}
		eventually(t, strconv.Itoa(n)+" workers and the master are all that lives", func() bool { return len(s.living()) == n+2 })
	}
	s.want(0, "scale", "auto")
	s.want(0, "stop")
	s.nothingLeft()
}

// TestScaleTooLong scales to workers that are never ready: the verb says so, and
// the service goes on.
func TestScaleTooLong(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(`[ $PGROUP_WORKER = 1 ] || exec sleep 1000; `+serves, "--ready", "fd")...)
	if _, stderr := s.want(1, "scale", "--wait", "0.3", "2"); !strings.Contains(stderr, "not ready in time") {
		t.Errorf("it says %q", stderr)
	}
	st := s.status(0)
	if len(st.Workers) != 2 || st.State != "starting" || st.Workers[1].State != "running" {
		t.Errorf("then: %+v", st)
	}
	text, _ := s.want(0, "status")
	if !strings.Contains(text, "starting") || !strings.Contains(text, "running") {
		t.Errorf("status says\n%s", text)
	}
	s.want(0, "scale", "1")
	s.want(0, "stop")
}

// TestStatusOfTrees wants memory and processes to be those of the whole tree of
// each worker.
func TestStatusOfTrees(t *testing.T) {
	t.Parallel()
	for _, contain := range []string{"tree", "pidns"} {
		t.Run(contain, func(t *testing.T) {
			s := newService(t)
			text := `if [ $PGROUP_WORKER = 2 ]; then sleep 1000 & setsid sh -c 'sleep 1000; :' & fi; ` + becomesReady + `sleep 1000; :`
			s.want(0, "start", shell(text, "--ready", "fd", "-n2", "--contain", contain)...)
			eventually(t, "the trees have grown", func() bool {
				st := s.status(0)
				one, two := st.Workers[0].Usage, st.Workers[1].Usage
				return one.Processes == 2 && two.Processes == 5 && st.Usage.Processes == 7 &&
					two.Memory > one.Memory && one.Memory > 0 && st.Usage.Memory == one.Memory+two.Memory
			})
			s.want(0, "stop")
		})
	}
}

// TestStatusOfWaiting shows a worker that is to be started again.
func TestStatusOfWaiting(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(`echo x >>ups; exit 3`, "--restart", "always")...)
	var st serviceStatus
	eventually(t, "a worker waits", func() bool {
		st = s.status(0)
		return st.Workers[0].State == "waiting" && st.Workers[0].Restarts > 0
	})
	if w := st.Workers[0]; w.Result != "status 3" || w.PID != 0 || st.State != "starting" {
		t.Errorf("%+v", st)
	}
	s.want(0, "stop")
}

// TestStatusColours shows a terminal what it can show.
func TestStatusColours(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(serves, "--ready", "fd")...)
	for _, test := range []struct {
		env    string
		colour bool
	}{{"TERM=xterm", true}, {"TERM=dumb", false}, {"NO_COLOR=1", false}} {
		cmd := s.command("status")
		tm := openTerminal(t, []string{"TERM=xterm", test.env}, cmd.Args...)
		<-tm.done
		tm.await("the table", func() bool { return strings.Contains(tm.text(), "RESTARTS") })
		if got := strings.Contains(tm.text(), `\x1b[32mready\x1b[0m`); got != test.colour {
			t.Errorf("%s: colours %v, want %v: %s", test.env, got, test.colour, tm.text())
		}
	}
	s.want(0, "stop")
}
