package pgroup

import (
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// target is whom a relayed signal goes to.
func (r *Run) target() int {
	switch {
	case r.phase == leftovers:
		return toAll
	case r.spec.RelayToWorkers:
		return toWorkers
	}
	return toGroups
}

// signal sends sig to all that whom means.
func (r *Run) signal(whom int, sig syscall.Signal, cont bool) {
	r.conn.send(signalMessage(0, whom, sig, cont))
}

// received relays a signal, and does what it means to the launcher.
func (r *Run) received(s Signal) {
	if s.Signal == unix.SIGCONT && s.From == r.leader && r.leader != 0 {
		return // it has woken us for its news
	}
	sig, as := s.Signal, r.spec.relayed(s.Signal)
	r.event(Event{Type: EventRelay, Signal: sig, As: as, From: s.From})
	if as == 0 {
		return
	}
	switch sig {
	case unix.SIGCONT:
		r.resume()
	case unix.SIGTERM:
		if r.disconnect() || r.spec.Grace <= 0 {
			r.startGrace("signal", as)
			return
		}
		fallthrough
	case unix.SIGINT, unix.SIGQUIT, unix.SIGHUP:
		now := time.Now()
		for _, w := range r.workers {
			w.asked = now
		}
		r.cancelRestarts()
	}
	r.signal(r.target(), as, sig == unix.SIGTERM)
	switch {
	case sig == unix.SIGTERM:
		r.startGrace("signal", as)
	case sig == unix.SIGHUP && r.hadTTY && !hasTerminal():
		r.stop("hangup")
	}
}

// stop asks the run to end: the stop signal, then the grace period.
func (r *Run) stop(reason string) {
	if r.spec.Grace > 0 && !r.stopped && !r.disconnect() {
		r.signal(r.target(), r.spec.stopSignal(), true)
	}
	r.startGrace(reason, r.spec.stopSignal())
}

// disconnect begins a stop the way that Node's primary does it, if we are one
// and it has not begun: the stop signal would end a worker with its requests
// unanswered, so it comes at half-time.
func (r *Run) disconnect() bool {
	if r.primary == nil || r.stopped || r.phase != working || r.spec.Grace <= 0 {
		return false
	}
	for _, w := range r.workers {
		if w.lives() {
			r.primary.disconnect(w.id)
		}
	}
	r.primary.last()
	r.signal(r.target(), unix.SIGCONT, false) // who is stopped hears of nothing
	r.halfTime = time.Now().Add(r.spec.Grace / 2)
	return true
}

// startGrace starts the grace period of a stop whose signal was sent, once.
func (r *Run) startGrace(reason string, sig syscall.Signal) {
	if r.stopped {
		return
	}
	r.stopped = true
	r.timeout.Stop()
	r.cancelRestarts()
	r.event(Event{Type: EventStop, Reason: reason, Signal: sig, Grace: r.spec.Grace})
	r.grace()
}

// judge stops the run if the end of w is a reason to. It is how the run ended
// then.
func (r *Run) judge(w *worker) {
	p := w.place
	if !p.over || p.worker != w || r.stopped || !slices.Contains(r.places, p) { // scaled down
		return
	}
	reason := ""
	switch {
	case w.lastTry:
		reason = "max-restarts"
		if r.failure == nil { // else it could not be started
			r.failure = &GaveUpError{Worker: w.place.n, Restarts: w.place.short}
		}
	case len(r.places) == 1:
		return
	case r.spec.AllReady && !w.ready && !r.wasReady():
		reason = "fail"
	case r.spec.Until == UntilFirst || r.spec.Until == UntilFailure && w.failed():
		reason = "until"
	default:
		return
	}
	r.decided = true
	r.stop(reason)
}

// stopLeftovers stops what the workers left behind, with a grace period of its
// own. What is left of their groups has had its signal if the workers had.
func (r *Run) stopLeftovers() {
	whom := toAll
	if r.stopped && !r.spec.RelayToWorkers && r.halfTime.IsZero() {
		whom = toStrays
	}
	r.stopped = true
	if r.spec.Grace > 0 {
		r.signal(whom, r.spec.stopSignal(), true)
	}
	r.event(Event{Type: EventStop, Reason: "leftovers", Signal: r.spec.stopSignal(), Grace: r.spec.Grace})
	r.grace()
}

func (r *Run) grace() {
	r.expired = false
	if r.spec.Grace > 0 {
		r.deadline.Reset(r.spec.Grace)
		return
	}
	r.deadline.Stop()
	r.escalate()
}

// escalate ends the grace period. The workers' groups are killed first, and
// what they leave behind has its own time, unless there is none.
func (r *Run) escalate() {
	r.expired = true
	if r.phase == leftovers {
		r.sweep()
		return
	}
	again := r.result.Escalated
	if !again {
		r.result.Escalated = true
		r.event(Event{Type: EventEscalate})
	}
	if r.spec.Grace <= 0 || again {
		r.sweep()
		return
	}
	r.signal(toGroups, unix.SIGKILL, false)
	r.deadline.Reset(killTime)
}

// sweep has the leader sweep. One that a descendant holds by ptrace(2) can't:
// then it is killed, and the rest is ours.
func (r *Run) sweep() {
	if !r.sweeping {
		r.sweeping = true
		r.conn.send(message{kind: msgSweep})
	} else if p, err := stat(r.leader); err == nil && p.state == 't' {
		unix.Kill(r.leader, unix.SIGKILL)
	}
	if r.leader != 0 {
		r.deadline.Reset(killTime)
	}
}

// killTime is how long a worker's group may take to die of KILL before all is
// swept: a worker may have left its group, or a descendant trace it.
const killTime = time.Second

// retire stops one worker, whose place another has or nobody is to have.
func (r *Run) retire(w *worker, reason string) {
	if w == nil || !w.lives() || w.step != untouched {
		return
	}
	r.event(Event{Type: EventStop, Worker: w.place.n, Reason: reason, Signal: r.spec.stopSignal(), Grace: r.spec.Grace})
	now := time.Now()
	switch {
	case r.spec.Grace <= 0:
		w.step = signalled
		r.stepOn(w, now)
	case r.primary != nil:
		r.primary.disconnect(w.id)
		r.conn.send(signalMessage(w.id, toGroups, unix.SIGCONT, false)) // who is stopped hears of nothing
		w.step, w.deadline = disconnected, now.Add(r.spec.Grace/2)
	default:
		r.askWorker(w)
		w.deadline = now.Add(r.spec.Grace)
	}
}

// askWorker sends one worker the stop signal.
func (r *Run) askWorker(w *worker) {
	whom := toGroups
	if r.spec.RelayToWorkers {
		whom = toWorkers
	}
	w.step = signalled
	r.conn.send(signalMessage(w.id, whom, r.spec.stopSignal(), true))
}

// stopRemains stops what an ended worker left behind, while others live or its
// place is to be filled again.
func (r *Run) stopRemains(w *worker) {
	if w.step != untouched || w.state != ended || r.spec.WaitLeftovers {
		return
	}
	w.step = remainsAsked
	if r.spec.Grace <= 0 {
		r.stepOn(w, time.Now())
		return
	}
	r.event(Event{Type: EventStop, Worker: w.place.n, Reason: "leftovers", Signal: r.spec.stopSignal(), Grace: r.spec.Grace})
	r.conn.send(signalMessage(w.id, toRemains, r.spec.stopSignal(), true))
	w.deadline = time.Now().Add(r.spec.Grace)
}

// stepOn takes the next step of a worker's own stop: its time is over.
func (r *Run) stepOn(w *worker, now time.Time) {
	w.deadline = time.Time{}
	switch w.step {
	case disconnected:
		r.askWorker(w)
		w.deadline = now.Add(r.spec.Grace / 2)
	case signalled:
		w.step = killed
		r.event(Event{Type: EventEscalate, Worker: w.place.n})
		r.conn.send(signalMessage(w.id, toGroups, unix.SIGKILL, false))
	case remainsAsked:
		w.step = remainsKilled
		r.conn.send(message{kind: msgClear, worker: int32(w.id)})
	}
}
