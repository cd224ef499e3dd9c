package pgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The phases of a run: the workers live, or are to be started again; then what
// they left behind does; then nothing. In both of the first a stop is pending or
// not.
type phase int

const (
	working phase = iota
	leftovers
	over
)

// A Run is a started command or cluster. One goroutine owns its state; its methods
// may be called by any but that of Events.
type Run struct {
	spec     *Spec
	began    time.Time
	conn     *conn
	inbox    *inbox
	leader   int // pid; 0 if it is in this process
	config   config
	places   []*place
	workers  map[int]*worker // by start, until nothing of them is left
	starts   int             // so far
	phase    phase
	stopped  bool        // a stop was sent
	halfTime time.Time   // of the grace period, when Node's workers get the stop signal
	expired  bool        // its grace period is over
	sweeping bool        // the leader was asked to
	deadline *time.Timer // of the grace period that runs
	timeout  *time.Timer
	alarm    *time.Timer // for the next of the times in places and workers
	last     bool        // the leader was told that no worker will be started
	empty    bool        // the leader has no child left
	adopted  int
	killed   int
	term     *terminal
	hadTTY   bool
	sockets  *sockets
	outputs  *outputs
	primary  *primary
	serving  int     // channels from which something may still come
	change   *change // Scale, Restart or Reload at work
	result   Result
	decided  bool // the result is known, though workers live
	failure  error
	ctx      context.Context
	calls    chan func() // from other goroutines, for the loop to do
	ready    chan struct{}
	allReady sync.Once
	done     chan struct{}
}

// Start starts the run. When ctx is done, the run is stopped; if it is done
// already, nothing is started.
//
// An error means that nothing was started: there is no command, or no call of
// Init, a socket can't be opened, or the leader not be started. That the command
// can't be is an error of Wait.
func Start(ctx context.Context, spec *Spec) (*Run, error) {
	if len(spec.Args) == 0 {
		return nil, errors.New("pgroup: no command")
	}
	if !initialised {
		return nil, errNoInit
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if spec.Dir != "" {
		if _, err := os.Stat(spec.Dir); err != nil {
			return nil, fmt.Errorf("cannot start workers in their directory: %w", err)
		}
	}
	r := &Run{
		spec:     spec,
		began:    time.Now(),
		workers:  make(map[int]*worker),
		ctx:      ctx,
		deadline: stoppedTimer(),
		timeout:  stoppedTimer(),
		alarm:    stoppedTimer(),
		calls:    make(chan func()),
		ready:    make(chan struct{}),
		done:     make(chan struct{}),
	}
	err := r.open()
	if err == nil {
		err = r.launch()
	}
	if err != nil {
		r.close()
		return nil, err
	}
	if leader := r.leader; leader != 0 {
		time.AfterFunc(leaderStopped, func() { continueLeader(leader) })
	}
	go r.loop()
	return r, nil
}

// open opens what the launcher keeps for the workers.
func (r *Run) open() (err error) {
	s := r.spec
	if len(s.Listen) > 0 {
		// The runtime opens its poller with the first file that it polls, and dies
		// if the sockets have left no descriptor for it.
		if reader, writer, err := os.Pipe(); err == nil {
			reader.Close()
			writer.Close()
		}
		if r.sockets, err = openSockets(s.Listen, max(1, s.Workers), s.ReusePort); err != nil {
			return err
		}
	}
	if s.Label || isWriter(s.Stdout) || isWriter(s.Stderr) {
		stdout, stderr := s.Stdout, s.Stderr
		if s.Label && s.Dedicated && stdout == nil {
			stdout = os.Stdout
		}
		if s.Label && s.Dedicated && stderr == nil {
			stderr = os.Stderr
		}
		if !s.Label && !isWriter(stdout) {
			stdout = nil
		}
		if !s.Label && !isWriter(stderr) {
			stderr = nil
		}
		r.outputs = newOutputs(stdout, stderr, s.Label, max(1, s.Workers))
	}
	if s.NodeCluster {
		r.primary = newPrimary(os.Getenv("NODE_CLUSTER_SCHED_POLICY") != "none")
		if r.sockets != nil {
			fds, err := r.sockets.files(1)
			if err != nil {
				return err
			}
			for i, fd := range fds {
				r.primary.give(firstListenFD+i, fd)
			}
		}
	}
	return nil
}

// isWriter reports whether a pipe and a goroutine have to serve w.
func isWriter(w any) bool {
	_, file := w.(*os.File)
	return w != nil && !file
}

func (r *Run) close() {
	if r.sockets != nil {
		r.sockets.close()
	}
	if r.primary != nil {
		r.primary.close()
	}
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
		if r.spec.Dir != "" {
			if err := os.Chdir(r.spec.Dir); err != nil {
				return err
			}
		}
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
	for i, f := range r.spec.Hold {
		r.conn.send(message{kind: msgFile, a: int64(i), fd: int(f.Fd())})
	}
	r.inbox = newInbox(r.conn)
	if r.sockets != nil {
		for _, address := range r.sockets.addrs() {
			r.event(Event{Type: EventListen, Address: address})
		}
	}
	for n := range max(1, r.spec.Workers) {
		r.places = append(r.places, &place{n: n + 1})
	}
	for _, p := range r.places {
		p.worker = r.start(p)
	}
	if r.spec.startsOnce() {
		r.sendLast()
	}
	return nil
}

// sendLast tells the leader that no worker will be started any more.
func (r *Run) sendLast() {
	if !r.last {
		r.last = true
		r.conn.send(message{kind: msgLast})
		if r.leader == 0 && r.starts > 0 && r.spec.Dedicated && r.count(starting) == 0 {
			releaseStreams(r.spec) // they were the leader's too
		}
	}
}

// wasReady reports whether all workers have been ready.
func (r *Run) wasReady() bool {
	select {
	case <-r.ready:
		return true
	default:
		return false
	}
}

// Wait waits until the run is over, which is when nothing that it started lives
// any more, and returns how it ended. It may be called any number of times.
//
// The error is not about how the command ended, nor that the run was stopped. It
// is why the run could not go on: a worker could not be started (errors.Is knows
// fs.ErrNotExist and fs.ErrPermission), was started again too often
// (*GaveUpError), the leader was killed, or Stdout or Stderr did not take what
// the workers wrote.
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
			if closed && r.phase != over && !(r.last && r.empty) {
				r.leaderGone()
			}
		case s := <-signals:
			r.received(s)
		case call := <-r.calls:
			call()
		case <-r.deadline.C:
			r.escalate()
		case <-r.timeout.C:
			r.result.TimedOut = true
			r.stop("timeout")
		case <-r.alarm.C:
			r.wake(time.Now())
		case <-r.ctx.Done():
			r.ctx = context.Background()
			r.stop("request")
		}
		r.advance()
		r.setAlarm()
	}
}

// post has the loop do f, unless the run is over.
func (r *Run) post(f func()) {
	select {
	case r.calls <- f:
	case <-r.done:
	}
}

// handle takes what the leader reports.
func (r *Run) handle(m message) {
	w := r.workers[int(m.worker)]
	if w == nil && m.worker != 0 {
		return
	}
	switch m.kind {
	case msgStarted:
		w.state, w.pid, w.since, r.empty = running, int(m.a), time.Now(), false
		// As PID 1 they are the leader's too, for the workers to come.
		if r.spec.Dedicated && r.count(starting) == 0 && (r.leader != 0 || r.spec.startsOnce()) {
			releaseStreams(r.spec)
		}
		r.event(Event{Type: EventStart, Worker: w.place.n, PID: w.pid})
		w.tell()
		if r.spec.Timeout > 0 && w.id == 1 {
			r.timeout.Reset(r.spec.Timeout)
		}
		r.begun(w)
	case msgFailed:
		r.notStarted(w, syscall.Errno(m.a))
	case msgSuspended:
		w.state, w.by = suspended, syscall.Signal(m.a)
		r.suspend()
	case msgResumed:
		w.state = running
	case msgExited:
		w.status = syscall.WaitStatus(m.a)
		delay := r.exited(w)
		r.event(Event{Type: EventExit, Worker: w.place.n, PID: w.pid, Status: w.status, Restart: delay})
		r.judge(w)
	case msgCleared:
		r.cleared(w, int(m.a))
	case msgReceived:
		r.received(Signal{syscall.Signal(m.a), int(m.b)})
	case msgHungUp:
		if r.hadTTY && !hasTerminal() && !signal.Ignored(unix.SIGHUP) { // nohup(1)
			r.stop("hangup")
		}
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
		for _, w := range r.workers {
			if w.state == ended {
				r.cleared(w, 0)
			}
		}
	case msgBroken:
		r.failure = fmt.Errorf("cannot start the leader: %s: %w", stepNames[m.a], syscall.Errno(m.b))
		if m.a == stepProc {
			r.failure = fmt.Errorf("%w: this needs a /proc without other mounts in it; use --contain tree", r.failure)
		}
	}
}

// cleared forgets a worker of which nothing is left.
func (r *Run) cleared(w *worker, n int) {
	if n > 0 {
		r.killed += n
		r.event(Event{Type: EventSweep, Worker: w.place.n, Killed: n})
	}
	delete(r.workers, w.id)
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
func releaseStreams(s *Spec) {
	toNull(0)
	if s.Label {
		return // what the workers say goes through us
	}
	toNull(1)
	if !s.KeepStderr && isPipe(2) {
		toNull(2)
	}
}

// advance does what the news of one turn allows: it stops what ended workers
// left behind, fills places, and goes on to the next phase when its time has
// come.
func (r *Run) advance() {
	if r.phase == over {
		return
	}
	r.goOn()
	idle := r.count(ended) == len(r.workers)
	for _, p := range r.places {
		idle = idle && p.over
	}
	if !idle {
		if r.phase == working && !r.stopped {
			for _, w := range r.workers {
				r.stopRemains(w)
			}
		}
		return
	}
	r.sendLast()
	if r.empty || r.starts == 0 {
		if r.serving == 0 { // all that the workers said was heard
			r.finish()
		}
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

// times calls visit for each time that the run waits for, with what is due then.
func (r *Run) times(visit func(at time.Time, due func())) {
	if !r.halfTime.IsZero() && r.phase == working {
		visit(r.halfTime, func() {
			r.halfTime = time.Time{}
			r.signal(r.target(), r.spec.stopSignal(), true)
		})
	}
	for _, p := range r.places {
		if !p.again.IsZero() && (p.worker == nil || r.workers[p.worker.id] == nil) {
			visit(p.again, func() { r.fill(p) })
		}
	}
	for _, w := range r.workers {
		if !w.deadline.IsZero() {
			visit(w.deadline, func() { r.stepOn(w, time.Now()) })
		}
		if !w.readyAt.IsZero() && w.lives() {
			visit(w.readyAt, func() { r.becomeReady(w) })
		}
	}
}

// wake does what is due.
func (r *Run) wake(now time.Time) {
	var due []func()
	r.times(func(at time.Time, do func()) {
		if !at.After(now) {
			due = append(due, do)
		}
	})
	for _, do := range due {
		do()
	}
}

func (r *Run) setAlarm() {
	var next time.Time
	r.times(func(at time.Time, _ func()) {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	})
	r.alarm.Stop()
	if !next.IsZero() {
		r.alarm.Reset(max(0, time.Until(next)))
	}
}

// settle notes how a worker ended that is not started again.
func (r *Run) settle(w *worker) {
	if r.decided || r.result.Code() != 0 {
		return
	}
	r.result.take(w)
	if w.err != nil && r.failure == nil {
		r.failure = fmt.Errorf("cannot start %q: %w", r.spec.Args[0], w.err)
	}
}

// finish ends the run: the leader has nothing left, and is gone itself.
func (r *Run) finish() {
	r.phase = over
	if r.leader != 0 {
		waitPid(r.leader)
	}
	r.conn.close()
	r.close()
	r.drain()
	r.result.settle(r.failure)
	r.leaveTerminal()
	r.event(Event{Type: EventEnd, Code: r.result.Code(), Adopted: r.adopted, Killed: r.killed})
}

// drain waits until what the workers have written has found its readers: as long
// as it takes, as another program in the pipeline would, but no longer than
// somebody wants us to.
func (r *Run) drain() {
	if r.outputs == nil {
		return
	}
	limit, drained := make(chan struct{}), make(chan struct{})
	go func() {
		err := r.outputs.wait(limit)
		if err != nil && !errors.Is(err, unix.EPIPE) && r.failure == nil {
			r.failure = fmt.Errorf("cannot write what the workers said: %w", err)
		}
		close(drained)
	}()
	late := (<-chan time.Time)(nil)
	if r.stopped {
		late = time.After(r.spec.Grace)
	}
	for {
		select {
		case <-drained:
			return
		case <-late:
		case <-r.ctx.Done():
		case s := <-r.spec.Signals:
			switch s.Signal {
			case unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGPIPE:
			default:
				continue
			}
		}
		close(limit)
		<-drained
		return
	}
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
