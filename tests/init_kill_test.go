package tests

import (
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var serviceKills = flag.Int("kills", 100, "how many random moments TestServiceKilledAtRandom has; -seed is their seed")

// struckService is the shell text of a service of which a worker itself strikes, where
// a file says so: before it is ready, or when it has got the stop signal. The run
// waits for it then, so that is an exact moment. It is the first one that does: for
// one that starts later, the killed leader's place as its parent has the launcher.
const struckService = `at() {
	mkdir at-$1 2>/dev/null || return
	if [ -e at-$1-launcher ]; then kill -KILL $PGROUP_PID
	elif [ -e at-$1-leader ]; then kill -KILL $PPID
	elif [ -e at-$1-client ]; then read -r pid comm state parent rest </proc/$PGROUP_PID/stat; kill -KILL $parent
	fi
}
trap 'at term; exit' TERM
at up; ` + becomesReady + `echo up >>ups; sleep 1000; exit 1`

// A blow is SIGKILL for one process, while a verb is at work.
type blow struct {
	verb   string // start, stop, reload, restart, up or down
	victim string // launcher, leader or client

	// When: at the nth change in the service's directory, by a worker, or
	// after a time.
	step   int
	worker string // "up" or "term"
	after  time.Duration

	hurry bool // start at once what starts later, not when all has settled
}

func (b blow) String() string {
	when := fmt.Sprintf("change %d", b.step)
	switch {
	case b.worker != "":
		when = b.worker
	case b.after != 0:
		when = b.after.String()
	}
	return fmt.Sprintf("%s, %s at %s", b.verb, b.victim, when)
}

// outcomes are what status may say after a blow that has hit: the truth.
func (b blow) outcomes(hit bool) []int {
	if !hit {
		return map[string][]int{"stop": {3}}[b.verb]
	}
	switch b.victim + " " + b.verb {
	case "launcher start":
		if b.after != 0 {
			return []int{1, 3} // before it had the pid file
		}
		return []int{1}
	case "launcher reload", "launcher up", "launcher down":
		return []int{1}
	case "launcher stop", "leader start", "leader stop", "leader reload", "leader up", "leader down":
		return []int{3}
	case "launcher restart":
		return []int{0, 1, 3} // the old one; the new one, with or without a pid file
	case "leader restart":
		return []int{0, 3}
	case "client start", "client stop", "client restart":
		if b.worker == "up" {
			return []int{3} // nobody has heard that it is ready
		}
		// What it had asked for, or not.
		if b.verb == "start" {
			return []int{0, 3}
		}
		return []int{0, 1, 3} // 1: it was about to remove what it takes for stale
	}
	return []int{0}
}

// A struck is a service that gets a blow.
type struck struct {
	*service
	blow
	launcher int // the first; 0 if it is the verb that starts it
	leader   int
	old      []int // all of the first run
	client   *job

	mu     sync.Mutex
	over   bool   // the verb has ended first
	hit    int    // whom
	moment string // which change it was
}

func (s *struck) startArgs() []string {
	return shell(struckService, "-n2", "--ready", "fd", "-g", "0.3", "--events", "events")
}

// child returns a child of pid that f is true of; 0 if there is none.
func child(pid int, f func(pid int) bool) int {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		for rest := text; len(rest) > 0; {
			var n int
			if _, err := fmt.Sscan(string(rest), &n); err != nil {
				break
			}
			if f(n) {
				return n
			}
			rest = rest[min(len(rest), len(strconv.Itoa(n))+1):]
		}
	}
	return 0
}

// find returns the victim as it is now; 0 if there is none.
func (s *struck) find() int {
	if s.victim == "client" {
		return s.client.cmd.Process.Pid
	}
	launcher, leader := s.launcher, s.leader
	if launcher == 0 || !lives(launcher) && s.verb == "restart" {
		launcher = child(s.client.cmd.Process.Pid, func(pid int) bool {
			line := cmdline(pid)
			return len(line) > 1 && line[1] == "run"
		})
		leader = child(launcher, func(pid int) bool { return cmdline(pid)[0] == "pgroup-leader" })
	}
	if s.victim == "leader" {
		return leader
	}
	return launcher
}

// strike kills the victim if there is one.
func (s *struck) strike(moment string) {
	pid := s.find()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return
	}
	s.moment = moment
	if pid != 0 && lives(pid) && syscall.Kill(pid, unix.SIGKILL) == nil {
		s.hit = pid
	}
}

// watch has each change in the directory counted from now on, and calls f at the
// nth, in a thread that waits for nothing else.
func watch(t *testing.T, dir string, n int, f func(moment string)) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	wd, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MODIFY|unix.IN_DELETE)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		unix.InotifyRmWatch(fd, uint32(wd)) // the reader sees it
		<-done
		unix.Close(fd)
	})
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			got, err := unix.Read(fd, buf)
			if err == unix.EINTR {
				continue
			}
			for b := buf[:max(got, 0)]; len(b) > 0; {
				mask, size := binary.NativeEndian.Uint32(b[4:]), unix.SizeofInotifyEvent+int(binary.NativeEndian.Uint32(b[12:]))
				if n--; mask&unix.IN_IGNORED != 0 {
					return
				}
				if n == 0 {
					what := map[uint32]string{unix.IN_CREATE: "created", unix.IN_MODIFY: "written", unix.IN_DELETE: "removed"}[mask]
					f(unix.ByteSliceToString(b[unix.SizeofInotifyEvent:size]) + " " + what)
				}
				b = b[size:]
			}
			if err != nil {
				return
			}
		}
	}()
}

// deal has the verb run and the victim killed, and looks at what is left. moment is
// what the moment was, "" if the verb has ended before it came.
func deal(t *testing.T, b blow) (moment string) {
	t.Helper()
	s := &struck{service: newService(t), blow: b}
	if b.verb != "start" {
		s.want(0, "start", s.startArgs()...)
		st := s.status(0)
		s.launcher, s.leader, s.old = st.PID, st.Leader, s.living()
	}
	verb, args := b.verb, []string(nil)
	switch b.verb {
	case "start", "restart":
		args = s.startArgs()
	case "up":
		verb, args = "scale", []string{"3"}
	case "down":
		verb, args = "scale", []string{"1"}
	}
	at := filepath.Join(s.dir, "at-"+b.worker+"-"+b.victim)
	if b.worker != "" {
		os.Remove(filepath.Join(s.dir, "at-"+b.worker)) // of the first start
		if err := os.WriteFile(at, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	struckAt := make(chan struct{})
	begun := make(chan struct{})
	if b.step > 0 {
		watch(t, s.dir, b.step, func(moment string) {
			<-begun
			s.strike(moment)
			close(struckAt)
		})
	}
	s.client = startJob(t, s.command(verb, args...))
	close(begun)
	if b.after > 0 {
		time.Sleep(b.after)
		s.strike(b.after.String())
		close(struckAt)
	}
	select {
	case <-struckAt:
	case <-s.client.ended:
	case <-time.After(jobLimit):
		t.Fatalf("%v: the verb hangs", b)
	}
	s.mu.Lock()
	s.over = true
	hit, moment := s.hit, s.moment
	s.mu.Unlock()
	if b.worker != "" {
		// Who was struck is not the worker's to tell.
		os.Remove(at)
		hit, moment = -1, b.worker
	}
	if hit > 0 {
		eventually(t, "the victim is dead", func() bool { return !lives(hit) })
	}
	if hit > 0 && b.victim == "launcher" && b.hurry {
		// It waits for what is left, and takes over. What the verb's client and the
		// old leader do meanwhile must not touch what is the new one's.
		s.want(0, "start", s.startArgs()...)
		if i := slices.IndexFunc(s.old, lives); i >= 0 {
			t.Errorf("%v (%s): when it has started again, %d lives: %q", b, moment, s.old[i], cmdline(s.old[i]))
		}
	} else if hit > 0 && b.victim == "launcher" && b.verb != "restart" {
		// Its leader stops what lives, and says so.
		got, text, _ := s.do("status")
		left := slices.DeleteFunc(s.living(), func(pid int) bool {
			// A leader alone has been given nothing yet, the lock neither, or is at its end.
			return pid == s.client.cmd.Process.Pid || cmdline(pid)[0] == "pgroup-leader"
		})
		if got == 0 || got != 4 && len(left) > 0 {
			t.Errorf("%v (%s): the launcher is dead, %v live, and status is %d:\n%s", b, moment, left, got, text)
		}
	}
	select {
	case <-s.client.ended:
	case <-time.After(jobLimit):
		t.Fatalf("%v (%s): the verb hangs", b, moment)
	}
	want := b.outcomes(hit != 0)
	if hit == 0 && b.verb != "stop" || hit > 0 && b.victim == "launcher" && b.hurry {
		want = []int{0}
	}
	status := s.settled()
	if !slices.Contains(want, status) {
		text, _ := os.ReadFile(filepath.Join(s.dir, "events"))
		t.Errorf("%v (%s, hit %d): status %d, want one of %d\n%s", b, moment, hit, status, want, text)
	}
	if status == 0 && hit > 0 && b.victim == "launcher" && s.pidInFile() == hit {
		t.Errorf("%v (%s): the pid file has the dead one's pid", b, moment)
	}
	s.want(0, "start", s.startArgs()...)
	if status = s.settled(); status != 0 {
		t.Errorf("%v (%s): started again, status is %d", b, moment, status)
	}
	s.want(0, "stop")
	s.nothingLeft()
	s.noFiles()
	s.wantFree()
	return moment
}

func (s *struck) pidInFile() int { return s.service.launcher() }

// settled waits until what status says is what there is, to the last process, and
// returns it.
func (s *struck) settled() (status int) {
	s.t.Helper()
	var text string
	truth := func() bool {
		status, text, _ = s.do("status", "--json")
		living := s.living()
		_, err := os.Lstat(s.pidfile)
		switch status {
		case 0:
			var st serviceStatus
			if err := json.Unmarshal([]byte(text), &st); err != nil {
				s.t.Fatalf("%q: %v", text, err)
			}
			known := []int{st.PID, st.Leader}
			for _, w := range st.Workers {
				if w.State != "ready" {
					return false
				}
				known = append(known, w.PID, child(w.PID, func(int) bool { return true })) // its sleep
			}
			slices.Sort(known)
			slices.Sort(living)
			return st.State == "ready" && slices.Equal(known, living)
		case 1:
			return len(living) == 0 && err == nil
		case 3:
			return len(living) == 0 && os.IsNotExist(err)
		}
		return false // what was killed is being stopped
	}
	for end := time.Now().Add(5 * time.Second); !truth(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			events, _ := os.ReadFile(filepath.Join(s.dir, "events"))
			s.t.Fatalf("%v: status is %d, which is not so:\n%s\n%v live, after\n%s", s.blow, status, text, s.living(), events)
		}
	}
	return status
}

var (
	struckVerbs   = []string{"start", "stop", "reload", "restart", "up", "down"}
	struckVictims = []string{"launcher", "leader", "client"}
)

// TestServiceKilledAtEachStep kills the launcher, the leader or the verb's own process
// at each step of each verb. The steps are the changes in the service's directory: of
// pid file, socket, the file of events, and what the workers write; and those in
// which the run waits for a worker. Then status tells the truth, nothing of the old
// run lives, and the service starts.
func TestServiceKilledAtEachStep(t *testing.T) {
	if !inPidNamespace(t, 4) {
		return
	}
	var mu sync.Mutex
	steps := 0
	t.Run("verbs", func(t *testing.T) {
		for _, verb := range struckVerbs {
			for _, victim := range struckVictims {
				t.Run(verb+"/"+victim, func(t *testing.T) {
					t.Parallel()
					n, moments := 0, []string(nil)
					for missed := 0; missed < 2; { // once may be the machine's fault
						n++
						moment := deal(t, blow{verb: verb, victim: victim, step: n, hurry: n%2 == 1})
						if moment == "" {
							missed++
							continue
						}
						moments = append(moments, moment)
					}
					mu.Lock()
					steps += len(moments)
					mu.Unlock()
					t.Logf("%d steps: %s", len(moments), strings.Join(moments, ", "))
				})
				for _, when := range map[string][]string{
					"start": {"up"}, "stop": {"term"}, "reload": {"up", "term"}, "restart": {"up", "term"}, "up": {"up"}, "down": {"term"},
				}[verb] {
					if victim == "client" && (when != "up" || !strings.HasSuffix(verb, "start")) {
						continue // the worker doesn't know it
					}
					t.Run(verb+"/"+victim+"/"+when, func(t *testing.T) {
						t.Parallel()
						deal(t, blow{verb: verb, victim: victim, worker: when})
					})
				}
			}
		}
	})
	noneLeft(t)
	fmt.Printf("%d steps\n", steps)
}

// TestServiceKilledAtRandom does the same at random moments.
func TestServiceKilledAtRandom(t *testing.T) {
	if !inPidNamespace(t, 4) {
		return
	}
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	fmt.Printf("%d moments with seed %d\n", *serviceKills, seed)
	t.Run("moment", func(t *testing.T) {
		for n := range *serviceKills {
			t.Run(strconv.Itoa(n), func(t *testing.T) {
				t.Parallel()
				r := rand.New(rand.NewPCG(seed, uint64(n)))
				deal(t, blow{
					verb:   struckVerbs[r.IntN(len(struckVerbs))],
					victim: struckVictims[r.IntN(len(struckVictims))],
					after:  time.Duration(1 + r.Int64N(int64(30*time.Millisecond))),
				})
			})
		}
	})
	noneLeft(t)
}
