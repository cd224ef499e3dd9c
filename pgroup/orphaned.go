package pgroup

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// leaderGone makes the launcher what the leader was: the kernel has made it the
// parent of all that lives.
func (r *Run) leaderGone() {
	status := r.awaitOrphans()
	if r.failure == nil && r.phase == working {
		how := fmt.Sprintf("ended with status %d", status.ExitStatus())
		if status.Signaled() {
			how = "was killed by " + SignalName(status.Signal())
		}
		r.failure = fmt.Errorf("the leader (pid %d) %s: stopped the command", r.leader, how)
	}
	leader := r.leader
	r.sweeping = false
	r.leader = 0
	r.conn.close()
	r.cancelRestarts()
	if !r.spec.Dedicated {
		r.hunt(leader)
		return
	}
	pids := make(map[int]int)
	for _, w := range r.workers {
		switch {
		case w.state == ended:
			delete(r.workers, w.id) // what it left behind is stopped with the rest
		case r.spec.PIDNamespace:
			w.status = syscall.WaitStatus(unix.SIGKILL) // with its PID 1
			r.lost(w)
		case w.state != starting && isChild(w.pid):
			pids[w.id] = w.pid
		default:
			// It was started or reaped, and the news was lost with the leader.
			w.err = r.failure
			r.lost(w)
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
		if allZombies(r.leader) {
			return syscall.WaitStatus(unix.SIGKILL)
		}
		time.Sleep(time.Millisecond)
	}
}

// allZombies reports whether all threads of pid have ended. A tracer may keep them
// from being reaped.
func allZombies(pid int) bool {
	dir := strconv.Itoa(pid) + "/task"
	fd, err := openProc(dir)
	if err != nil {
		return false
	}
	file := os.NewFile(uintptr(fd), dir)
	defer file.Close()
	tasks, err := file.Readdirnames(-1)
	if err != nil {
		return false
	}
	for _, task := range tasks {
		text, err := readFile(dir+"/"+task+"/stat", nil)
		if p, perr := parseStat(text); err == nil && (perr != nil || p.state != 'Z' && p.state != 'X') {
			return false
		}
	}
	return true
}

// lastResort sweeps with what a launcher out of descriptors can do.
func (r *Run) lastResort() {
	sweep(func(int, syscall.WaitStatus) {}, func(int) {})
	for _, w := range r.workers {
		r.lost(w)
	}
	r.empty = true
}

// lost is for a worker that has ended, nobody knows how.
func (r *Run) lost(w *worker) {
	w.state = ended
	w.given.close()
	w.tell()
	delete(r.workers, w.id)
	switch p := w.place; {
	case p.next == w: // its old one may live, and its end is that of the place
		p.next = nil
	case p.worker == w && !p.over:
		r.fillNot(p)
	}
}

// hunt ends what lives when the leader was killed and its children are init's,
// because this process is no subreaper: other children of its own would become
// orphans of ours too. It finds them by their session and their environment.
func (r *Run) hunt(leader int) {
	sig, told := r.spec.stopSignal(), make(map[int]bool)
	found := orphansOf(leader)
	if len(found) > 0 && !r.stopped {
		r.event(Event{Type: EventStop, Reason: "leader", Signal: sig, Grace: r.spec.Grace})
	}
	r.stopped = true
	for asked := time.Now(); len(found) > 0; found = orphansOf(leader) {
		if sig != unix.SIGKILL && time.Since(asked) >= r.spec.Grace {
			sig = unix.SIGKILL
			clear(told)
			r.result.Escalated = true
			r.event(Event{Type: EventEscalate})
		}
		for _, p := range found {
			if !told[p.pid] {
				told[p.pid] = true
				p.signalOrphan(sig, leader)
			}
		}
		time.Sleep(sweepPause)
	}
	for _, w := range r.workers {
		w.err = r.failure
		r.lost(w)
	}
	r.empty = true
}

// orphansOf returns the processes, of all that there are, that the leader has
// started or that descend from such.
func orphansOf(leader int) (found []process) {
	fd, err := openProc(".")
	if err != nil {
		return nil
	}
	dir := os.NewFile(uintptr(fd), "/proc")
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == unix.Getpid() || !isOrphanOf(pid, leader) {
			continue
		}
		if p, err := stat(pid); err == nil && p.state != 'Z' {
			found = append(found, p)
		}
	}
	return found
}

// isOrphanOf reports whether pid is in the leader's session, or began in an
// environment that the leader made. The launcher's pid is not enough: it may have
// other leaders.
func isOrphanOf(pid, leader int) bool {
	if sid, err := unix.Getsid(pid); err == nil && sid == leader {
		return true
	}
	env, err := readFile(strconv.Itoa(pid)+"/environ", nil)
	return err == nil && value(env, pidVar) == strconv.Itoa(unix.Getpid()) && value(env, leaderVar) == strconv.Itoa(leader)
}

// signalOrphan signals p if its number is still that of such a process.
func (p process) signalOrphan(sig syscall.Signal, leader int) {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if isOrphanOf(p.pid, leader) {
		unix.PidfdSendSignal(fd, sig, nil, 0)
		unix.PidfdSendSignal(fd, unix.SIGCONT, nil, 0)
	}
}
