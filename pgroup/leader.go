package pgroup

import (
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	leaderName = "pgroup-leader" // its argv[0]: what tells Init that we are one
	leaderConn = 3               // its end of the socket pair
)

// The config that the launcher sends first.
type config struct {
	flags      int32
	stopSignal syscall.Signal
	grace      time.Duration
}

const (
	flagTTY        = 1 << iota // workers may have the terminal: no new session
	flagForeground             // the launcher is in the terminal's foreground
	flagPIDNS                  // the leader is PID 1 of a new pid namespace
	flagToWorkers              // signals are for the workers, not for their groups
)

func (c config) message() message {
	return message{kind: msgConfig, worker: c.flags, a: int64(c.stopSignal), b: int64(c.grace)}
}

// The steps that a broken leader names.
const (
	stepSubreaper = iota + 1
	stepProc
	stepEventFD
	stepSweep
)

var stepNames = map[int64]string{
	stepSubreaper: "prctl PR_SET_CHILD_SUBREAPER",
	stepProc:      "mount /proc",
	stepEventFD:   "eventfd",
	stepSweep:     "read /proc and open a pidfd",
}

// A leader is the parent of the workers. It alone starts, signals and reaps
// them, in one thread: a child that it has not reaped pins its pid. What to do
// is the launcher's to decide, until the launcher is gone.
//
// It is a process of its own, or a goroutine of the launcher: where that is
// PID 1, and where the leader process was killed.
type leader struct {
	config
	command
	conn    *conn
	fd      int         // of conn
	process bool        // of its own: the standard streams and signals are ours
	workers map[int]int // the living: start → pid
	first   int         // worker 1 of the living, which may have the terminal
	next    map[int]*provision
	gone    map[int]*remains // ended workers, until they are cleared
	unsure  bool             // whether what executes a program just now is theirs
	watch   *watcher
	signals int // self-pipe, -1 if none
	failed  int // what stubs could not do, -1 if there were none
	stubs   int // the end that they write
	last    bool
	empty   bool // and the launcher was told

	stubErrors map[int]syscall.Errno // by pid

	hungUp    bool
	suspended map[int]bool      // workers
	doubt     map[int]time.Time // since when a process may be executing
	asked     int               // when the groups had the stop signal, in ticks; 0 if never

	adopted int
	killed  int
	known   map[int]bool // adopted children that the launcher was told of
	out     []message

	term     *terminal
	launcher int // its pid
	job      int // its group
	session  int // its session's leader

	// Once the launcher has gone:
	alone     bool
	leftovers bool          // what the workers left behind was sent the stop signal
	killing   bool          // the workers' groups were sent KILL
	deadline  time.Time     // of the grace period, or of killTime
	left      *unix.Termios // the terminal's settings then, if they are the workers'
}

// leaderMain is the leader process. It does not return.
func leaderMain() {
	runtime.LockOSThread() // prctl names and drops capabilities of a thread
	quietQuit()
	setName(leaderName)
	// A stopped leader could not act on the launcher's death.
	unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGCONT), 0, 0, 0)
	CloseInherited(leaderConn) // Prepare left that to us
	unix.CloseOnExec(leaderConn)
	l := &leader{
		command:  command{env: setEnv(os.Environ(), leaderVar, strconv.Itoa(unix.Getpid()))},
		conn:     newConn(leaderConn, false),
		fd:       leaderConn,
		process:  true,
		launcher: unix.Getppid(),
		workers:  make(map[int]int),
	}
	l.job, _ = unix.Getpgid(l.launcher)
	l.session, _ = unix.Getsid(l.launcher)
	if _, err := unix.GetsockoptInt(leaderConn, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
		os.Stderr.WriteString("pgroup: this is the name of its leader, which it starts itself: use pgroup run\n")
		os.Exit(125)
	}
	l.run()
	os.Exit(0)
}

// localLeader starts a leader in this process, with the workers that there are.
func localLeader(cfg config, cmd command, workers map[int]int, last bool) (*conn, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	l := &leader{
		config:  cfg,
		command: cmd,
		conn:    newConn(theirs, false),
		fd:      theirs,
		workers: workers,
		last:    last,
	}
	go func() {
		if l.begin() {
			l.reap()
			l.run()
		}
		l.conn.close()
	}()
	return newConn(ours, true), nil
}

// begin makes the process ready to be a parent.
func (l *leader) begin() bool {
	broken := func(step int, err error) bool {
		errno, _ := err.(syscall.Errno)
		l.conn.send(message{kind: msgBroken, a: int64(step), b: int64(errno)})
		return false
	}
	if err := setSubreaper(); err != nil {
		return broken(stepSubreaper, err)
	}
	if l.flags&flagPIDNS != 0 {
		err := mountProc()
		if os.Geteuid() != 0 {
			dropInheritable() // the workers must not have what that took
		}
		if err != nil {
			return broken(stepProc, err)
		}
	}
	if err := canSweep(); err != nil {
		return broken(stepSweep, err)
	}
	var err error
	if l.watch, err = newWatcher(); err != nil {
		return broken(stepEventFD, err)
	}
	l.known, l.suspended = make(map[int]bool), make(map[int]bool)
	l.next, l.gone = make(map[int]*provision), make(map[int]*remains)
	l.groups = make(map[int]bool)
	for _, pid := range l.workers {
		l.groups[pid] = true
	}
	l.signals, l.failed, l.stubErrors = -1, -1, make(map[int]syscall.Errno)
	if l.process || l.flags&flagTTY != 0 {
		l.term = openTerminal(l.flags&flagTTY != 0)
	}
	return true
}

// run serves the launcher until nothing is left and nothing will come.
func (l *leader) run() {
	for {
		l.flush()
		if l.empty && (l.last || l.alone) {
			return
		}
		// Before the config has come there is nothing but the socket.
		fds := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}, {Fd: -1}, {Fd: -1}, {Fd: -1}}
		if l.alone {
			fds[0].Fd = -1
		}
		if l.watch != nil {
			fds[1] = unix.PollFd{Fd: int32(l.watch.fd), Events: unix.POLLIN}
			fds[2] = unix.PollFd{Fd: int32(l.signals), Events: unix.POLLIN}
		}
		if l.flags&flagTTY != 0 && l.term != nil && !l.hungUp {
			fds[3].Fd = int32(l.term.fd) // for POLLHUP
		}
		if err := poll(fds, l.wakeUp()); err != nil {
			return // cannot be: the launcher sees end of file and takes over
		}
		if fds[1].Revents != 0 {
			l.watch.take()
			l.reap()
		}
		if fds[2].Revents != 0 {
			l.forward()
		}
		if fds[3].Revents != 0 {
			// The kernel sends HUP to the foreground group and to the session's
			// leader. A shell need not pass it on.
			l.hungUp = true
			l.report(msgHungUp, 0, 0, 0)
		}
		if fds[0].Revents != 0 && !l.receive() {
			return
		}
		l.clear()
		if l.alone {
			l.guardOn()
		}
	}
}

func (l *leader) report(k kind, worker int, a, b int64) {
	l.out = append(l.out, message{kind: k, worker: int32(worker), a: a, b: b})
}

// flush sends all that one turn of the loop has to report at once.
func (l *leader) flush() {
	if len(l.out) > 0 && !l.alone {
		l.conn.send(l.out...)
	}
	l.out = l.out[:0]
}

// receive does what the launcher says; false is the end.
func (l *leader) receive() bool {
	msgs, err := l.conn.receive()
	started := false
	remains := make(map[int]syscall.Signal) // one walk is for all of them
	for _, m := range msgs {
		switch m.kind {
		case msgConfig:
			l.config = config{m.worker, syscall.Signal(m.a), time.Duration(m.b)}
			if !l.begin() {
				return false
			}
		case msgCommand:
			l.args = os.Args[m.a:]
		case msgFile:
			l.provision(int(m.worker)).add(int(m.a), m.fd)
		case msgEnv:
			p := l.provision(int(m.worker))
			p.env = strings.Split(strings.TrimSuffix(m.text, "\x00"), "\x00")
		case msgStart:
			l.start(int(m.worker), int(m.a), int(m.b))
			started = true
		case msgLast:
			l.last = true
			if l.process {
				for fd := range 3 {
					toNull(fd)
				}
			}
		case msgSignal:
			whom, cont := parseWhom(m.b)
			if whom == toRemains {
				remains[int(m.worker)] = syscall.Signal(m.a)
				continue
			}
			l.signal(int(m.worker), whom, syscall.Signal(m.a))
			if cont { // a stopped process can't act on what it was sent
				l.signal(int(m.worker), whom, unix.SIGCONT)
			}
		case msgForeground:
			l.foreground(m.a != 0)
		case msgClear:
			if r, ok := l.gone[int(m.worker)]; ok {
				r.kill = true
			}
		case msgSweep:
			l.sweep()
		}
	}
	l.signalRemains(remains)
	if started {
		l.catchSignals()
		if !l.conn.pending() { // more starts
			l.leaveDir()
		}
	}
	if err != nil {
		if l.watch == nil {
			return false
		}
		l.flush()
		l.guard()
	}
	return true
}

// signal sends sig to whom the launcher means: of the one worker, or of all if
// that is 0.
func (l *leader) signal(worker, whom int, sig syscall.Signal) {
	send, refused := l.sender()
	defer refused()
	if whom == toGroups && worker == 0 && sig == l.stopSignal {
		l.asked = bootTicks()
	}
	live := make(map[int]bool)
	for id, pid := range l.workers {
		live[pid] = true
		if worker != 0 && worker != id {
			continue
		}
		switch whom {
		case toGroups:
			// One kill for the whole group: nothing forks past it.
			send(unix.Kill(-pid, sig))
			if pgid, err := unix.Getpgid(pid); err == nil && pgid != pid {
				send(unix.Kill(pid, sig)) // it has joined another
			}
		case toWorkers:
			send(unix.Kill(pid, sig))
		}
	}
	// The number of an ended worker may be another group's by now, unless a
	// descendant is in it.
	if whom == toStrays || whom == toAll || whom == toGroups && worker == 0 && len(l.groups) > len(live) {
		walkAll(nil, func(p process, late bool) {
			ours := l.groups[p.pgid]
			if whom == toStrays && l.asked > 0 && p.started >= l.asked {
				ours = false // it was forked after its group had the signal
			}
			if late {
				return // started by one that has the signal, to act on it
			}
			if whom == toAll || whom == toStrays && !ours || whom == toGroups && ours && !live[p.pgid] {
				send(p.signal(sig))
			}
		})
	}
}

// sender returns what takes the error of each signal that is sent, and what
// reports in the end how many were refused.
func (l *leader) sender() (send func(error), report func()) {
	refused, why := 0, error(nil)
	send = func(err error) {
		// ESRCH: it has ended, and the news is on its way.
		if err != nil && err != unix.ESRCH {
			refused, why = refused+1, err
		}
	}
	report = func() {
		if refused > 0 {
			errno, _ := why.(syscall.Errno)
			l.report(msgRefused, 0, int64(errno), int64(refused))
		}
	}
	return send, report
}

// reap takes all news of the children.
func (l *leader) reap() {
	ended := false
	for {
		pid, status, err := waitAny(unix.WNOHANG | unix.WUNTRACED | unix.WCONTINUED)
		if err != nil {
			l.setEmpty()
			return
		}
		if pid == 0 {
			break
		}
		ended = l.news(pid, status) || ended
	}
	if ended {
		l.noticeAdopted()
	}
	l.watch.look()
}

// news reports what wait4 said of pid, and whether it was a worker's end.
func (l *leader) news(pid int, status syscall.WaitStatus) bool {
	worker := l.worker(pid)
	switch {
	case worker == 0 && (status.Exited() || status.Signaled()):
		l.adopt(pid)
		delete(l.known, pid)
	case worker == 0:
	case status.Stopped():
		l.suspended[worker] = true
		l.report(msgSuspended, worker, int64(status.StopSignal()), 0)
	case status.Continued():
		l.wakeLauncher(worker)
		l.report(msgResumed, worker, 0, 0)
	default:
		l.wakeLauncher(worker)
		delete(l.workers, worker)
		l.gone[worker] = &remains{pgid: pid, killed: make(map[int]bool)}
		if errno := l.stubFailed(pid); errno != 0 {
			l.report(msgFailed, worker, int64(errno), 0)
		} else {
			l.report(msgExited, worker, int64(status), 0)
		}
		return true
	}
	return false
}

// worker returns the start whose process pid is, 0 if none's.
func (l *leader) worker(pid int) int {
	for id, p := range l.workers {
		if p == pid {
			return id
		}
	}
	return 0
}

// wakeLauncher continues a launcher that has stopped because its workers have,
// when that is over for one of them and nobody told the launcher.
func (l *leader) wakeLauncher(worker int) {
	if l.suspended[worker] && l.process && !l.alone {
		// Only if it has stopped: CONT takes a pending TSTP with it.
		if p, err := stat(l.launcher); err == nil && p.state == 'T' {
			unix.Kill(l.launcher, unix.SIGCONT)
		}
	}
	delete(l.suspended, worker)
}

// adopt counts the child pid, that we did not start, once.
func (l *leader) adopt(pid int) {
	if !l.known[pid] {
		l.known[pid] = true
		l.adopted++
		l.report(msgAdopted, 0, int64(pid), 0)
	}
}

// noticeAdopted tells of the orphans that a worker's end may have brought. The
// kernel has no news of an adoption: others are noticed when they end.
func (l *leader) noticeAdopted() {
	started := l.living()
	for _, pid := range children(unix.Getpid(), 0) {
		if !started[pid] {
			l.adopt(pid)
		}
	}
}

func (l *leader) setEmpty() {
	if !l.empty {
		l.empty = true
		for worker, r := range l.gone {
			l.report(msgCleared, worker, int64(len(r.killed)), 0)
			l.takeTerminalBack(r.pgid)
		}
		l.report(msgEmpty, 0, int64(l.adopted), int64(l.killed))
		if l.alone {
			l.restoreTerminal()
		}
		clear(l.gone)
		clear(l.groups)
	}
}

// sweep ends every descendant.
func (l *leader) sweep() {
	l.deadline = time.Time{}
	n := sweep(func(pid int, status syscall.WaitStatus) { l.news(pid, status) }, func(n int) {
		l.report(msgRefused, 0, int64(unix.EPERM), int64(n))
		l.flush()
	})
	l.killed += n
	l.report(msgSwept, 0, int64(n), 0)
	l.setEmpty()
}

// guard begins what the leader does when the launcher has gone: the stop that
// the launcher would have asked for, its grace periods, and the sweep.
func (l *leader) guard() {
	l.alone = true
	l.noteTerminal()
	l.reap()
	if l.flags&flagToWorkers != 0 {
		l.stop(toWorkers)
	} else {
		l.stop(toGroups)
	}
}

// wakeUp is when the leader has to look by itself.
func (l *leader) wakeUp() time.Time {
	for _, r := range l.gone {
		if soon := time.Now().Add(sweepPause); (r.kill || l.unsure) && (l.deadline.IsZero() || soon.Before(l.deadline)) {
			return soon
		}
	}
	return l.deadline
}

// stop sends the stop signal and starts the grace period.
func (l *leader) stop(whom int) {
	if l.empty {
		return
	}
	if l.grace <= 0 {
		l.sweep()
		return
	}
	l.signal(0, whom, l.stopSignal)
	l.signal(0, whom, unix.SIGCONT)
	l.deadline = time.Now().Add(l.grace)
}

// guardOn goes on when the workers have ended, as Run.advance does, or when the
// grace period is over, as Run.escalate does.
func (l *leader) guardOn() {
	over := !l.deadline.IsZero() && !time.Now().Before(l.deadline)
	switch {
	case l.empty:
	case len(l.workers) == 0 && !l.leftovers:
		l.leftovers = true
		if l.flags&flagToWorkers != 0 {
			l.stop(toAll)
		} else {
			l.stop(toStrays)
		}
	case over && l.leftovers:
		l.sweep()
	case over && l.killing:
		l.sweep()
	case over:
		l.killing = true
		l.deadline = time.Now().Add(killTime)
		l.signal(0, toGroups, unix.SIGKILL)
	}
}

// foreground notes whether the launcher is in the foreground now, and gives the
// terminal to the worker's group if it may have it.
func (l *leader) foreground(on bool) {
	l.flags &^= flagForeground
	if on {
		l.flags |= flagForeground
		if pid, ok := l.workers[l.first]; ok && l.flags&flagTTY != 0 && l.term != nil {
			l.term.setForeground(pid)
		}
	}
}

// takeTerminalBack gives the launcher the terminal that a group had of which
// nothing is left: the keyboard would reach nobody.
func (l *leader) takeTerminalBack(pgid int) {
	if l.flags&flagTTY != 0 && l.flags&flagForeground != 0 && l.job != 0 && l.term != nil && l.term.foreground() == pgid {
		l.term.setForeground(l.job)
	}
}

// noteTerminal notes the settings of the terminal as the launcher's death has
// left it, unless a shell has taken the terminal already and made its own.
func (l *leader) noteTerminal() {
	if l.term == nil || l.flags&flagForeground == 0 {
		return
	}
	left := l.term.settings()
	foreground := l.term.foreground()
	if foreground == 0 { // in another session: its leader knows
		p, _ := stat(l.session)
		foreground = p.tpgid
	}
	if foreground == l.job || l.groups[foreground] || l.flags&flagPIDNS != 0 {
		l.left = &left
	}
}

// restoreTerminal leaves the terminal as the launcher found it. Whoever has set
// it since the launcher's death, a shell at its prompt, has seen to it already.
func (l *leader) restoreTerminal() {
	if l.left == nil {
		return
	}
	if l.groups[l.term.foreground()] {
		l.term.setForeground(l.job)
	}
	if l.term.settings() == *l.left {
		l.term.restore()
	}
}

// catchSignals begins to forward what is sent to a leader process: once it has
// started the workers, who wait for nothing else. Before that, or where there is
// no descriptor left for it, a signal ends the leader, which is a stop.
func (l *leader) catchSignals() {
	if l.process && l.signals < 0 {
		if fd, err := newSelfPipe(relayable); err == nil {
			l.signals = fd
		}
	}
}

// forward tells the launcher of the signals sent to the leader. Those that the
// launcher itself sent (CONT, if somebody stopped us) are for us.
func (l *leader) forward() {
	var buf [512 * 24]byte
	n, _ := unix.Read(l.signals, buf[:])
	for _, s := range readSelfPipe(buf[:max(n, 0)]) {
		// In a pid namespace, the launcher is as unknown as all outside.
		if s.From != l.launcher || s.From == 0 && s.Signal != unix.SIGCONT {
			l.report(msgReceived, 0, int64(s.Signal), int64(s.From))
		}
	}
}

// A watcher tells by an eventfd that wait4 has news. SIGCHLD can't: Go has it
// unblocked in all threads, so that no signalfd and no ppoll sees it, and its
// way through os/signal is longer.
type watcher struct {
	fd    int
	again chan struct{}
}

func newWatcher() (*watcher, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	w := &watcher{fd: fd, again: make(chan struct{}, 1)}
	go w.run()
	return w, nil
}

// look makes the watcher look again, once all news was taken or a child was
// started.
func (w *watcher) look() {
	select {
	case w.again <- struct{}{}:
	default:
	}
}

func (w *watcher) run() {
	one := uint64(1)
	for range w.again {
		if waitNews() == nil { // else ECHILD: wait for the next start
			unix.Write(w.fd, (*[8]byte)(unsafe.Pointer(&one))[:])
		}
	}
}

func (w *watcher) take() {
	var buf [8]byte
	unix.Read(w.fd, buf[:])
}

// ignoreQuit ignores QUIT if INT is: the shell's & starts a command with both
// ignored (POSIX, Asynchronous Lists), but Go catches QUIT before main can see
// that it was.
func ignoreQuit() bool {
	if signal.Ignored(unix.SIGINT) {
		signal.Ignore(unix.SIGQUIT)
		return true
	}
	return false
}

// quietQuit is for a program that does not catch signals yet: QUIT and ABRT end
// it, as any other, without the Go runtime's goroutine dump.
func quietQuit() {
	if !ignoreQuit() {
		setDefault(unix.SIGQUIT)
	}
	setDefault(unix.SIGABRT)
}
