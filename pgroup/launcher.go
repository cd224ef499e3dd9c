package pgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
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
	ended     state = "ended"
)

type worker struct {
	n      int
	state  state
	pid    int
	status syscall.WaitStatus // ended, if it was started
	err    error              // ended, if it was not
	by     syscall.Signal     // suspended
}

// The phases of a run: the workers live, then what they left behind does, then
// nothing. In both of the first a stop is pending or not.
type phase int

const (
	working phase = iota
	leftovers
	over
)

// A Run is a started command or cluster. One goroutine owns its state.
type Run struct {
	spec     *Spec
	conn     *conn
	inbox    *inbox
	leader   int // pid; 0 if it is in this process
	config   config
	workers  []*worker
	phase    phase
	stopped  bool        // a stop was sent
	expired  bool        // its grace period is over
	deadline *time.Timer // of the grace period that runs
	timeout  *time.Timer
	empty    bool // the leader has no child left
	adopted  int
	killed   int
	term     *terminal
	hadTTY   bool
	result   Result
	failure  error
	ctx      context.Context
	done     chan struct{}
}

// Start starts the run. When ctx is done, the run is stopped.
//
// The run is over, and Wait returns, when nothing that it started lives any
// more.
func Start(ctx context.Context, spec *Spec) (*Run, error) {
	if len(spec.Args) == 0 {
		return nil, errors.New("pgroup: no command")
	}
	r := &Run{
		spec:     spec,
		ctx:      ctx,
		deadline: stoppedTimer(),
		timeout:  stoppedTimer(),
		done:     make(chan struct{}),
	}
	for n := range spec.workers() {
		r.workers = append(r.workers, &worker{n: n + 1, state: starting})
	}
	if err := r.launch(); err != nil {
		return nil, err
	}
	// No worker is started a second time: there is no flag for it yet.
	r.conn.send(message{kind: msgLast})
	r.inbox = newInbox(r.conn)
	if leader := r.leader; leader != 0 {
		time.AfterFunc(leaderStopped, func() { continueLeader(leader) })
	}
	go r.loop()
	return r, nil
}

// launch starts the leader, and has it start the workers.
func (r *Run) launch() (err error) {
	// As they are before any worker can change them.
	r.hadTTY, r.term = hasTerminal(), foregroundTerminal(r.spec.TTY)
	r.config = r.spec.config(r.term)
	if r.spec.Dedicated {
		if err := canSweep(); err != nil {
			return fmt.Errorf("cannot look for what has to end: %w", err)
		}
		if err := setSubreaper(); err != nil {
			return os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", err)
		}
	}
	if r.spec.Dedicated && unix.Getpid() == 1 {
		if r.term != nil {
			r.config.flags |= flagTTY // there is one session, and the terminal is its
		}
		r.config.flags &^= flagPIDNS // we are in one
		r.conn, err = localLeader(r.config, r.spec.command(), make(map[int]int), false)
	} else {
		pid, fd, first, ok := r.spec.takePrepared()
		if !ok {
			first = 1
			if pid, fd, err = r.spec.startLeader(); err != nil {
				return err
			}
		}
		r.leader, r.conn = pid, newConn(fd, true)
		r.conn.send(r.config.message(), message{kind: msgCommand, a: int64(first)})
	}
	if err != nil {
		return err
	}
	if r.spec.Dedicated && r.leader != 0 {
		os.Chdir("/") // in PID 1 the leader does, after the start
	}
	r.conn.send(message{kind: msgStart, worker: 1, a: int64(len(r.workers)), b: int64(len(r.workers))})
	return nil
}

// Wait waits until the run is over.
func (r *Run) Wait() (Result, error) {
	<-r.done
	return r.result, r.failure
}

// loop owns the run.
func (r *Run) loop() {
	defer close(r.done)
	for r.phase != over {
		// Signals wait until every worker that was started is known: who sends
		// one to a worker that says it is ready does not outrun that news.
		signals := r.spec.Signals
		if r.count(starting) > 0 {
			signals = nil
		}
		select {
		case <-r.inbox.news:
			msgs, closed := r.inbox.take()
			for _, m := range msgs {
				r.handle(m)
			}
			r.advance()
			if closed && r.phase != over {
				r.leaderGone()
			}
		case s := <-signals:
			r.received(s)
		case <-r.deadline.C:
			r.escalate()
		case <-r.timeout.C:
			r.result.TimedOut = true
			r.stop("timeout")
		case <-r.ctx.Done():
			r.ctx = context.Background()
			r.stop("request")
		}
	}
}

// handle takes what the leader reports.
func (r *Run) handle(m message) {
	var w *worker
	if n := int(m.worker); n >= 1 && n <= len(r.workers) {
		w = r.workers[n-1]
	}
	switch m.kind {
	case msgStarted:
		w.state, w.pid, r.empty = running, int(m.a), false
		if r.spec.Dedicated && r.count(starting) == 0 {
			releaseStreams(r.spec.KeepStderr)
		}
		r.event(Event{Type: EventStart, Worker: w.n, PID: w.pid})
		if r.spec.Timeout > 0 && w.n == 1 {
			r.timeout.Reset(r.spec.Timeout)
		}
	case msgFailed:
		w.state, w.err = ended, syscall.Errno(m.a)
		r.event(Event{Type: EventFail, Worker: w.n, Err: w.err})
	case msgSuspended:
		w.state, w.by = suspended, syscall.Signal(m.a)
		r.suspend()
	case msgResumed:
		w.state = running
	case msgExited:
		w.state, w.status = ended, syscall.WaitStatus(m.a)
		r.event(Event{Type: EventExit, Worker: w.n, PID: w.pid, Status: w.status})
	case msgReceived:
		r.received(Signal{syscall.Signal(m.a), int(m.b)})
	case msgRefused:
		r.event(Event{Type: EventRefuse, Err: syscall.Errno(m.a), Count: int(m.b)})
	case msgAdopted:
		r.adopted++
		r.event(Event{Type: EventAdopt, PID: int(m.a)})
	case msgSwept:
		r.killed += int(m.a)
		r.event(Event{Type: EventSweep, Killed: int(m.a)})
	case msgEmpty:
		r.empty = true
	case msgBroken:
		r.failure = fmt.Errorf("cannot start the leader: %s: %w", stepNames[m.a], syscall.Errno(m.b))
		if m.a == stepProc {
			r.failure = fmt.Errorf("%w: this needs a /proc without other mounts in it; use --contain tree", r.failure)
		}
	}
}

// count returns how many workers are in the state s.
func (r *Run) count(s state) int {
	n := 0
	for _, w := range r.workers {
		if w.state == s {
			n++
		}
	}
	return n
}

// releaseStreams gives up the standard streams, which are the workers' now: who
// waits for the end of a pipe must not wait for us. Standard error is kept for
// the run's own messages, unless it is such a pipe.
func releaseStreams(keepStderr bool) {
	toNull(0)
	toNull(1)
	if !keepStderr && isPipe(2) {
		toNull(2)
	}
}

// advance goes on to the next phase when its time has come.
func (r *Run) advance() {
	if r.phase == over || r.count(ended) < len(r.workers) {
		return
	}
	if r.empty {
		r.finish()
		return
	}
	if r.phase == working {
		r.phase = leftovers
		if !r.spec.WaitLeftovers || r.stopped {
			r.timeout.Stop()
			r.stopLeftovers()
		}
	}
}

// target is whom a relayed signal goes to.
func (r *Run) target() int32 {
	switch {
	case r.phase == leftovers:
		return toAll
	case r.spec.RelayToWorkers:
		return toWorkers
	}
	return toGroups
}

func (r *Run) signal(whom int32, sig syscall.Signal, cont bool) {
	m := message{kind: msgSignal, worker: whom, a: int64(sig)}
	if cont {
		m.b = 1
	}
	r.conn.send(m)
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
	if sig == unix.SIGCONT {
		r.resume()
	}
	if sig == unix.SIGTERM && r.spec.Grace <= 0 {
		r.startGrace("signal", as)
		return
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
	if r.spec.Grace > 0 && !r.stopped {
		r.signal(r.target(), r.spec.stopSignal(), true)
	}
	r.startGrace(reason, r.spec.stopSignal())
}

// startGrace starts the grace period of a stop whose signal was sent, once.
func (r *Run) startGrace(reason string, sig syscall.Signal) {
	if r.stopped {
		return
	}
	r.stopped = true
	r.timeout.Stop()
	r.event(Event{Type: EventStop, Reason: reason, Signal: sig, Grace: r.spec.Grace})
	r.grace()
}

// stopLeftovers stops what the workers left behind, with a grace period of its
// own. What is left of their groups has had its signal if the workers had.
func (r *Run) stopLeftovers() {
	whom := int32(toAll)
	if r.stopped && !r.spec.RelayToWorkers {
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
		r.conn.send(message{kind: msgSweep})
		return
	}
	again := r.result.Escalated
	if !again {
		r.result.Escalated = true
		r.event(Event{Type: EventEscalate})
	}
	if r.spec.Grace <= 0 || again {
		r.conn.send(message{kind: msgSweep})
		return
	}
	r.signal(toGroups, unix.SIGKILL, false)
	r.deadline.Reset(killTime)
}

// killTime is how long a worker's group may take to die of KILL before all is
// swept: a worker may have left its group, or a descendant trace it.
const killTime = time.Second

// suspend stops this process when all workers are stopped, as job control
// expects of the process that the shell knows.
func (r *Run) suspend() {
	var by syscall.Signal
	for _, w := range r.workers {
		switch w.state {
		case starting, running:
			return
		case suspended:
			by = w.by
		}
	}
	if by == 0 || r.spec.Signals == nil {
		return
	}
	// A worker may be sent STOP by anybody, and TERM has to reach it through us:
	// we stop as well only where a shell waits for that.
	if by == unix.SIGSTOP && r.term == nil {
		return
	}
	tty := r.config.flags&flagTTY != 0
	switch {
	case !jobControlled():
		// Nobody would continue us, and the kernel would not have stopped a
		// command in our place: its group were orphaned (setpgid(2)).
		if by != unix.SIGSTOP {
			r.signal(toGroups, unix.SIGCONT, false)
		}
	case tty && (by == unix.SIGTTIN || by == unix.SIGTTOU) && r.haveTerminal():
		// The shell's fg gives the terminal to a job that runs without a word.
		r.sendForeground(true)
		r.signal(toGroups, unix.SIGCONT, false)
	default:
		r.event(Event{Type: EventSuspend, Signal: by})
		r.sendForeground(false)
		if tty {
			stopGroup(by) // the terminal would have: we are not in its foreground
		} else {
			raise(by)
		}
		catch(1 << (by - 1)) // again
	}
}

// haveTerminal reports whether the terminal is ours to give.
func (r *Run) haveTerminal() bool {
	if t := foregroundTerminal(r.config.flags&flagTTY != 0); t != nil {
		if r.term == nil {
			r.term = t
		} else {
			t.close()
		}
		return true
	}
	return false
}

// resume is what CONT means: the shell may have given us the terminal, or taken
// it.
func (r *Run) resume() {
	r.event(Event{Type: EventResume})
	if r.haveTerminal() {
		r.sendForeground(true)
	}
}

func (r *Run) sendForeground(on bool) {
	m := message{kind: msgForeground}
	if on {
		m.a = 1
	} else if r.term != nil {
		r.term.close()
		r.term = nil
	}
	r.conn.send(m)
}

// leaderGone makes the launcher what the leader was: the kernel has made it the
// parent of all that lives.
func (r *Run) leaderGone() {
	status := r.awaitOrphans()
	if r.failure == nil && r.count(ended) < len(r.workers) {
		how := fmt.Sprintf("ended with status %d", status.ExitStatus())
		if status.Signaled() {
			how = "was killed by " + SignalName(status.Signal())
		}
		r.failure = fmt.Errorf("the leader (pid %d) %s: stopped the command", r.leader, how)
	}
	r.leader = 0
	r.conn.close()
	pids := make(map[int]int)
	for _, w := range r.workers {
		switch {
		case w.state == ended:
		case r.spec.PIDNamespace:
			w.state, w.status = ended, syscall.WaitStatus(unix.SIGKILL) // with its PID 1
		case w.state != starting && isChild(w.pid):
			pids[w.n] = w.pid
		default:
			// It was started or reaped, and the news was lost with the leader.
			w.state, w.err = ended, r.failure
		}
	}
	cfg := r.config
	cfg.flags &= flagToWorkers
	c, err := localLeader(cfg, r.spec.command(), pids, true)
	if err != nil {
		r.lastResort()
		return
	}
	r.conn, r.inbox, r.empty = c, newInbox(c), false
	if r.expired {
		r.escalate() // again: it may not have come to that
	} else {
		r.stop("leader")
	}
	r.advance()
}

// awaitOrphans waits until the killed leader's children are ours, which they are
// when it is a zombie. It is reaped then, unless something traces it.
func (r *Run) awaitOrphans() (status syscall.WaitStatus) {
	for {
		pid, err := syscall.Wait4(r.leader, &status, unix.WNOHANG, nil)
		if pid > 0 || err != nil && err != unix.EINTR {
			return status
		}
		if p, err := stat(r.leader); err == nil && p.state == 'Z' && p.threads <= 1 {
			return syscall.WaitStatus(unix.SIGKILL)
		}
		time.Sleep(time.Millisecond)
	}
}

// lastResort sweeps with what a launcher out of descriptors can do.
func (r *Run) lastResort() {
	sweep(func(int, syscall.WaitStatus) {}, func(int) {})
	for _, w := range r.workers {
		w.state = ended
	}
	r.finish()
}

// finish ends the run: the leader has nothing left, and is gone itself.
func (r *Run) finish() {
	r.phase = over
	if r.leader != 0 {
		waitPid(r.leader)
	}
	r.conn.close()
	r.result.settle(r.workers, r.failure)
	for _, w := range r.workers {
		if w.err != nil && r.failure == nil {
			r.failure = fmt.Errorf("cannot start %q: %w", r.spec.Args[0], w.err)
		}
	}
	r.leaveTerminal()
	r.event(Event{Type: EventEnd, Code: r.result.Code(), Adopted: r.adopted, Killed: r.killed})
}

// leaveTerminal leaves the terminal as we found it. The settings that a command
// made and then ended by itself, stty(1) say, are meant to stay.
func (r *Run) leaveTerminal() {
	if r.term == nil {
		return
	}
	if r.config.flags&flagTTY != 0 {
		r.term.setForeground(unix.Getpgrp())
	}
	if r.term.inForeground() && (r.result.Signal != 0 || r.result.Escalated || r.failure != nil) {
		r.term.restore()
	}
	r.term.close()
}

func (r *Run) event(e Event) {
	if r.spec.Events != nil {
		e.Time = time.Now()
		r.spec.Events(e)
	}
}

// leaderStopped is after how long a run begins to look for a leader that was
// stopped: the thread that waits for that costs a short run more than it is worth.
const leaderStopped = 50 * time.Millisecond

// continueLeader continues the leader whenever somebody has stopped it: nobody
// else would. It ends when the leader has been reaped.
func continueLeader(pid int) {
	for retry(func() error { return unix.Waitid(unix.P_PID, pid, nil, unix.WSTOPPED, nil) }) == nil {
		unix.Kill(pid, unix.SIGCONT)
	}
}

func stoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}
