package pgroup

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A state is what a worker is doing, as far as the launcher was told.
type state string

const (
	starting  state = "starting"
	running   state = "running"
	suspended state = "suspended"
	ended     state = "ended" // what it left behind may live
)

// A worker is one running instance of the command.
type worker struct {
	id     int // of its start
	place  *place
	state  state
	pid    int
	since  time.Time          // of the start
	status syscall.WaitStatus // ended, if it was started
	err    error              // ended, if it was not
	by     syscall.Signal     // suspended

	ready   bool
	early   bool      // it said that it is ready before the leader said that it was started
	readyAt time.Time // after this time, if that is what makes it ready
	asked   time.Time // when a signal that may end it was last relayed
	given   given
	known   chan struct{} // closed once its start, or that it failed, was told
	lastTry bool          // it has ended, and was restarted often enough

	step     step      // of its own stop, which is no stop of the run
	deadline time.Time // of that step
}

// The steps in which a single worker and what it leaves behind are stopped.
type step int

const (
	untouched    step = iota
	disconnected      // from Node's primary
	signalled         // its group
	killed            // its group
	remainsAsked      // what it left behind was signalled
	remainsKilled
)

func (w *worker) lives() bool { return w.state != ended }

// A place is one of the numbers from 1 to the count of workers. It is filled
// again when its worker has ended and is to be restarted.
type place struct {
	n        int
	worker   *worker // the last one
	next     *worker // that is to replace it, in a reload
	restarts int
	short    int       // restarts in a row of a worker that was not healthy
	again    time.Time // of the next start
	over     bool      // there will be none
}

// Health is how long a worker has to run before its end is no reason to wait
// longer for the next start, and to be taken for what a signal meant.
const (
	health     = 10 * time.Second
	minBackoff = 100 * time.Millisecond
	maxBackoff = 30 * time.Second
)

// backoff is the time from a worker's end to its next start.
func backoff(short int) time.Duration {
	if short > 8 { // 100 ms · 2⁹ is more than the most
		return maxBackoff
	}
	return min(minBackoff<<short, maxBackoff)
}

// failed reports whether w did not end well.
func (w *worker) failed() bool {
	return w.err != nil || w.status != 0
}

// wants reports whether the policy is to start w again, now that it has ended.
func (r *Run) wants(w *worker, now time.Time) bool {
	switch r.spec.Restart {
	case RestartAlways:
	case RestartFailure:
		if !w.failed() {
			return false
		}
	default:
		return false
	}
	first := w.err != nil && w.place.restarts == 0 // a command that was never there
	return !first && !r.ending() && (w.asked.IsZero() || now.Sub(w.asked) >= health)
}

// ending reports whether nothing is to be started any more.
func (r *Run) ending() bool { return r.stopped || r.phase != working }

// exited decides what the end of w means for its place and for the run. It
// returns how long the place will wait for the next worker, -1 for ever.
func (r *Run) exited(w *worker) time.Duration {
	now := time.Now()
	w.state = ended
	w.step, w.deadline = untouched, time.Time{}
	w.given.close()
	if sig := w.status.Signal(); r.spec.TTY && w.status.Signaled() && (sig == unix.SIGINT || sig == unix.SIGQUIT) {
		w.asked = now // the terminal's keys reach the worker, and not us
	}
	w.tell()
	p := w.place
	switch {
	case p.next == w: // the reload sees it
		return -1
	case p.worker != w: // it was replaced
		return -1
	case p.next != nil && p.next.lives(): // else both have ended, the new one first
		p.worker, p.next = p.next, nil
		return -1
	case p.over: // scaled down
		return -1
	case !r.wants(w, now):
		r.fillNot(p)
		return -1
	}
	if w.err == nil && now.Sub(w.since) >= health {
		p.short = 0
	}
	if limit := r.spec.MaxRestarts; limit > 0 && p.short >= limit {
		w.lastTry = true
		r.fillNot(p)
		return -1
	}
	delay := backoff(p.short)
	p.short++
	p.again = now.Add(delay)
	return delay
}

// fillNot leaves the place of an ended worker empty.
func (r *Run) fillNot(p *place) {
	p.over, p.again = true, time.Time{}
	r.settle(p.worker)
}

// reopen has a place whose worker has ended filled as soon as nothing of that is
// left.
func (p *place) reopen() {
	p.over, p.short, p.again = false, 0, time.Now()
}

// cancelRestarts is for a stop, and for a signal that means that there shall be
// no other worker.
func (r *Run) cancelRestarts() {
	for _, p := range r.places {
		if !p.again.IsZero() {
			r.fillNot(p)
		}
	}
}

// fill starts a worker at p.
func (r *Run) fill(p *place) {
	p.again = time.Time{}
	p.restarts++
	p.worker = r.start(p)
}

// start starts a worker for p, and returns it.
func (r *Run) start(p *place) *worker {
	r.starts++
	w := &worker{id: r.starts, place: p, state: starting, known: make(chan struct{})}
	r.workers[w.id] = w
	msgs, err := r.give(w)
	if err != nil {
		w.err = err
		// Not from here: who called has not yet seen the worker.
		go r.post(func() { r.notStarted(w, err) })
		return w
	}
	r.conn.send(append(msgs, message{kind: msgStart, worker: int32(w.id), a: int64(p.n), b: int64(len(r.places))})...)
	w.given.handedOver()
	return w
}

func (r *Run) notStarted(w *worker, err error) {
	w.err = err
	delay := r.exited(w)
	r.event(Event{Type: EventFail, Worker: w.place.n, Err: err, Restart: delay})
	delete(r.workers, w.id)
	if w.id <= max(1, r.spec.Workers) && !r.ending() { // later ones are Scale's and Reload's errors
		// The command can't be executed, or the machine has no room for it.
		r.decided = true
		r.stop("fail")
	}
	r.judge(w)
}
