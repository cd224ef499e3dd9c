package pgroup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"
)

// What the methods of a Run return, in the sense of errors.Is.
var (
	ErrOver    = errors.New("the run is over")
	ErrStopped = errors.New("the run is being stopped")
	ErrBusy    = errors.New("a scale, restart or reload is at work: try again when it is done")
)

// A GaveUpError is why a run was stopped that had MaxRestarts: that number of
// restarts of one worker, in a row, was not enough.
type GaveUpError struct {
	Worker   int
	Restarts int
}

func (e *GaveUpError) Error() string {
	return fmt.Sprintf("worker %d ended within %v of its start after %d restarts in a row: gave up",
		e.Worker, health, e.Restarts)
}

// A Status is a run at one moment.
type Status struct {
	PID     int            `json:"pid"`    // the launcher's
	Leader  int            `json:"leader"` // 0 if the launcher is PID 1
	State   string         `json:"state"`  // starting, ready, degraded (some have ended for good), scaling, reloading, stopping
	Since   time.Time      `json:"since"`
	Workers []WorkerStatus `json:"workers"`
}

// A WorkerStatus is what is at one place of a run.
type WorkerStatus struct {
	Worker   int       `json:"worker"`
	PID      int       `json:"pid,omitempty"`   // 0 if none runs
	State    string    `json:"state"`           // starting, running (not ready), ready, suspended, waiting (for its next start), ended
	Since    time.Time `json:"since,omitzero"`  // of its start
	Restarts int       `json:"restarts"`        // not those of a reload
	Again    time.Time `json:"again,omitzero"`  // waiting: of the next start
	Result   string    `json:"result,omitzero"` // waiting, ended: how it ended
}

// do has the loop do f, and waits for it.
func (r *Run) do(f func()) error {
	done := make(chan struct{})
	select {
	case r.calls <- func() { f(); close(done) }:
		<-done
		return nil
	case <-r.done:
		return ErrOver
	}
}

// Ready is closed when all workers have become ready for the first time; never, if
// one of them ends before that for good. See Done.
func (r *Run) Ready() <-chan struct{} { return r.ready }

// Done is closed when the run is over.
func (r *Run) Done() <-chan struct{} { return r.done }

// Status returns what the run is doing, or ErrOver.
func (r *Run) Status() (s Status, err error) {
	err = r.do(func() { s = r.status() })
	return s, err
}

func (r *Run) status() Status {
	s := Status{PID: os.Getpid(), Leader: r.leader, State: "ready", Since: r.began}
	for _, p := range r.places {
		ws := WorkerStatus{Worker: p.n, Restarts: p.restarts}
		switch w := p.worker; {
		case !p.again.IsZero():
			ws.State, ws.Again, ws.Result = "waiting", p.again, w.end()
		case !w.lives():
			ws.State, ws.Result = string(ended), w.end()
		default:
			ws.PID, ws.Since, ws.State = w.pid, w.since, string(w.state)
			if w.ready && w.state == running {
				ws.State = "ready"
			}
		}
		if w := p.worker; !p.over && !(w.lives() && w.ready) {
			s.State = "starting"
		}
		s.Workers = append(s.Workers, ws)
	}
	if s.State == "ready" && slices.ContainsFunc(r.places, func(p *place) bool { return p.over }) {
		s.State = "degraded"
	}
	switch {
	case r.ending():
		s.State = "stopping"
	case r.change != nil:
		s.State = r.change.name
	}
	return s
}

// end says how w ended.
func (w *worker) end() string {
	switch {
	case w.err != nil:
		return w.err.Error()
	case w.status.Signaled():
		return SignalName(w.status.Signal())
	}
	return fmt.Sprintf("status %d", w.status.ExitStatus())
}

// Stop stops the run, as the end of its context does: StopSignal, then Grace, then
// SIGKILL. It does not wait: Wait tells when the run is over.
func (r *Run) Stop() {
	r.do(func() { r.stop("request") })
}

// Signal relays sig as if this process had received it.
func (r *Run) Signal(sig syscall.Signal) error {
	return r.do(func() { r.received(Signal{Signal: sig, From: os.Getpid()}) })
}

// Send sends v, as JSON, to the worker of that number, which needs Channel. It does
// not wait for the worker to read it: the error is ErrChannelFull if the worker
// has 16 MiB unread already, ErrLineTooLong if v alone is more. What a worker has
// not read when it ends is lost.
func (r *Run) Send(worker int, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	failed := fmt.Errorf("no worker %d has a channel now", worker)
	if err := r.do(func() {
		if worker < 1 || worker > len(r.places) {
			return
		}
		if w := r.places[worker-1].worker; w.lives() && w.given.channel != nil {
			failed = w.given.channel.send(line)
		}
	}); err != nil {
		return err
	}
	return failed
}

// A change is what Scale or Reload does over many turns of the loop.
type change struct {
	name string
	step func() (done bool, err error) // called each turn until it is done
	undo func()                        // if the caller no longer wants it
	done chan error
}

// makeChange starts the change that begin returns, and waits for its end.
func (r *Run) makeChange(ctx context.Context, begin func() (*change, error)) error {
	var c *change
	var err error
	if e := r.do(func() {
		switch {
		case r.ending():
			err = ErrStopped
		case r.change != nil:
			err = ErrBusy
		default:
			if c, err = begin(); err == nil {
				c.done = make(chan error, 1)
				r.change = c
			}
		}
	}); e != nil {
		return e
	}
	if err != nil {
		return err
	}
	select {
	case err := <-c.done:
		return err
	case <-r.done:
		select {
		case err := <-c.done: // it was ended first
			return err
		default:
			return ErrOver
		}
	case <-ctx.Done():
	}
	r.do(func() {
		if r.change == c {
			c.undo()
			r.change = nil
		}
	})
	return ctx.Err()
}

// goOn takes the next step of the change at work.
func (r *Run) goOn() {
	c := r.change
	if c == nil {
		return
	}
	done, err := false, error(nil)
	if r.ending() {
		done, err = true, ErrStopped
	} else {
		done, err = c.step()
	}
	if done {
		r.change = nil
		c.done <- err
	}
}

// Scale makes the number of workers n, 1 or more: those that have ended for good are
// started again, as long as one of the others keeps the run alive. It returns when new workers are
// ready, or what the workers with the highest numbers left has gone. When ctx is
// done it no longer waits, and the workers become n all the same.
func (r *Run) Scale(ctx context.Context, n int) error {
	if n < 1 {
		return fmt.Errorf("cannot scale to %d workers: give 1 or more", n)
	}
	return r.makeChange(ctx, func() (*change, error) {
		r.event(Event{Type: EventScale, Count: n})
		were := len(r.places)
		for _, p := range r.places[min(n, were):] {
			p.over, p.again = true, time.Time{}
			if r.sockets != nil {
				r.sockets.retire(p.n)
			}
			r.retire(p.worker, "scale")
		}
		r.places = r.places[:min(n, were)]
		var fresh []*place
		for _, p := range r.places {
			if p.over {
				p.reopen()
				fresh = append(fresh, p)
			}
		}
		for len(r.places) < n {
			p := &place{n: len(r.places) + 1}
			r.places = append(r.places, p)
			fresh = append(fresh, p)
			p.worker = r.start(p)
		}
		return &change{name: "scaling", undo: func() {}, step: func() (bool, error) {
			for _, p := range fresh {
				if p.over {
					return true, fmt.Errorf("new worker %d ended: %s", p.n, p.worker.end())
				}
				if !p.again.IsZero() || !p.worker.ready {
					return false, nil
				}
			}
			for _, w := range r.workers {
				if w.place.n > n {
					return false, nil
				}
			}
			for n := n + 1; n <= were && r.sockets != nil; n++ {
				r.sockets.drop(n)
			}
			return true, nil
		}}, nil
	})
}

// Reload replaces the workers one after the other: each by a new one, started at
// its place, which is ready before the old one is stopped. An end of a new worker
// before that is the error, and its old one goes on; so it does when ctx is done.
func (r *Run) Reload(ctx context.Context) error {
	return r.makeChange(ctx, func() (*change, error) {
		r.event(Event{Type: EventReload})
		todo := slices.Clone(r.places)
		var fresh *worker // of todo[0]
		var old *worker
		step := func() (bool, error) {
			for len(todo) > 0 {
				p := todo[0]
				switch {
				case fresh == nil:
					old = p.worker
					if old.lives() {
						p.next = r.start(p)
						fresh = p.next
					} else { // it has ended for good, or waits for its start
						p.reopen()
						if r.workers[old.id] != nil {
							return false, nil
						}
						r.fill(p)
						fresh = p.worker
					}
					return false, nil
				case !fresh.lives() && (p.next == fresh || !fresh.ready):
					if p.next == fresh {
						p.next = nil
					}
					return true, fmt.Errorf("new worker %d ended before it was ready (%s): the old one goes on", p.n, fresh.end())
				case !fresh.ready:
					return false, nil
				case p.next == fresh:
					p.worker, p.next = fresh, nil
					r.retire(old, "reload")
					return false, nil
				case r.workers[old.id] != nil:
					return false, nil
				}
				todo, fresh = todo[1:], nil
			}
			return true, nil
		}
		undo := func() {
			if len(todo) > 0 && fresh != nil && todo[0].next == fresh {
				todo[0].next = nil
				r.retire(fresh, "reload")
			}
		}
		return &change{name: "reloading", step: step, undo: undo}, nil
	})
}
