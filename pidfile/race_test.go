package pidfile

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Of 100 processes that create the file at once, one gets it, and the others
// name that one. First there is no file, then a stale one.
func TestSimultaneousCreates(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	for _, before := range []string{"none", "stale"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var helpers []*helper
		for range 100 {
			h := start(t, r, nil, "hold", path)
			helpers = append(helpers, h)
		}
		r.Close()
		for _, h := range helpers {
			h.expect("ready")
		}
		w.Close() // now all at once
		var winner *helper
		lines := make(map[*helper]string)
		for _, h := range helpers {
			lines[h] = h.line()
			if lines[h] == "held" {
				if winner != nil {
					t.Fatalf("%s: %d and %d both hold the file", before, winner.Process.Pid, h.Process.Pid)
				}
				winner = h
			}
		}
		if winner == nil {
			t.Fatalf("%s: nobody holds the file: %q", before, lines)
		}
		for h, line := range lines {
			if h != winner && !strings.Contains(line, ": held by process "+strconv.Itoa(winner.Process.Pid)+":") {
				t.Errorf("%s: %q", before, line)
			}
		}
		if got := read(t, path); got != pidText(winner.Process.Pid) {
			t.Errorf("%s: the file holds %q", before, got)
		}
		if h := find(t, path); h.PID != winner.Process.Pid {
			t.Errorf("%s: Find: pid %d", before, h.PID)
		}
		winner.kill()
		for _, h := range helpers {
			h.wait()
		}
		if _, err := Find(path); !errors.Is(err, ErrStale) {
			t.Errorf("%s: Find: %v", before, err)
		}
	}
}

// A process dies between any two steps.
func TestKilledAtEachStep(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	for _, before := range []string{"no file", "stale"} {
		for _, at := range []string{"opened", "claimed", "emptied", "written", "held", "unlinked"} {
			os.Remove(path)
			if before == "stale" {
				write(t, path, pidText(os.Getpid()))
			}
			victim := start(t, nil, nil, "die", path, at)
			victim.wait()
			if status := victim.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() {
				t.Fatalf("%s, %q: there is no such step: %v", before, at, victim.ProcessState)
			}
			want := ErrStale
			if at == "unlinked" {
				want = ErrNotRunning
			}
			if _, err := Find(path); !errors.Is(err, want) {
				t.Errorf("%s, %q: Find: %v, want %v", before, at, err, want)
			}
			f, err := Create(path)
			if err != nil {
				t.Errorf("%s, %q: Create: %v", before, at, err)
				continue
			}
			if got := read(t, path); got != pidText(os.Getpid()) {
				t.Errorf("%s, %q: the file holds %q", before, at, got)
			}
			remove(t, f)
			if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 0 {
				t.Errorf("%s, %q: left: %v", before, at, left)
			}
		}
	}
}

// Stop against start, and SIGKILL at any moment of both. Each round starts a
// process while another goroutine stops what it finds, kindly or not. At the end
// of a round the file tells the truth about the process.
func TestStopAgainstStart(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	saw := make(map[string]int)
	for range 60 {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		helper := start(t, r, nil, "hold", path)
		r.Close()
		helper.expect("ready")
		sig := []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL}[rand.IntN(2)]
		delay := time.Duration(rand.IntN(200)) * time.Microsecond
		var stop error
		var wg sync.WaitGroup
		wg.Go(func() {
			time.Sleep(delay) // any moment will do
			if sig == syscall.SIGKILL {
				helper.Process.Kill()
				stop = errors.New("killed")
				return
			}
			h, err := Find(path)
			if err != nil {
				stop = err
				return
			}
			defer h.Close()
			if h.PID != helper.Process.Pid {
				t.Errorf("Find: pid %d, started %d", h.PID, helper.Process.Pid)
			}
			if stop = h.Signal(sig); stop == nil {
				stop = h.Wait(t.Context())
			}
		})
		w.Close() // it creates the file now
		wg.Wait()
		switch {
		case stop == nil:
			saw["stopped"]++
			if err := helper.wait(); err != nil {
				t.Errorf("stopped: %v", err)
			}
			if _, err := Find(path); !errors.Is(err, ErrNotRunning) {
				t.Errorf("stopped: %v", err)
			}
		case sig == syscall.SIGKILL:
			saw["killed"]++
			helper.wait()
			if _, err := Find(path); !errors.Is(err, ErrStale) && !errors.Is(err, ErrNotRunning) {
				t.Errorf("killed: %v", err)
			}
		case errors.Is(stop, ErrNotRunning), errors.Is(stop, ErrStale):
			saw["too early"]++
			helper.expect("held")
			h := find(t, path)
			if h.PID != helper.Process.Pid {
				t.Errorf("too early: pid %d, started %d", h.PID, helper.Process.Pid)
			}
			if err := errors.Join(h.Signal(syscall.SIGTERM), h.Wait(t.Context()), helper.wait()); err != nil {
				t.Errorf("too early: %v", err)
			}
		default:
			t.Errorf("stop: %v", stop)
		}
	}
	t.Log(saw)
}

// Looks never make a start fail, and see nobody but the holder.
func TestLooksDoNotDisturb(t *testing.T) {
	path := filepath.Join(private(t), "pid")
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				h, err := Find(path)
				switch {
				case err == nil:
					if h.PID != os.Getpid() {
						t.Errorf("Find: pid %d", h.PID)
					}
					if err := h.Wait(t.Context()); err != nil {
						t.Error(err)
					}
					h.Close()
				case !errors.Is(err, ErrNotRunning) && !errors.Is(err, ErrStale):
					t.Error(err)
				}
			}
		})
	}
	for range 300 {
		remove(t, create(t, path))
	}
	close(done)
	wg.Wait()
}
