package pgroup

import (
	"bytes"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The remains of a worker that has ended are what it started and left behind. Its
// place is not filled, nor the worker forgotten, before they are gone.
type remains struct {
	pgid   int  // of the group that it led
	kill   bool // KILL to all of them, until they are gone
	killed map[int]bool
}

// living returns the pids of the workers.
func (l *leader) living() map[int]bool {
	live := make(map[int]bool, len(l.workers))
	for _, pid := range l.workers {
		live[pid] = true
	}
	return live
}

// walkRemains calls visit, as walkAll does, for each process that an ended worker
// left behind: those in its group, those that have its environment, and their
// descendants. What has neither is known to be its only if there was no other
// worker; else it lives until the end of the run. One walk is for all of them:
// as many walks as workers would take the square of the time.
//
// It is unsure if there are others that will have an environment soon.
func (l *leader) walkRemains(visit func(worker int, p process, late bool)) (unsure bool) {
	only := 0 // what all that has been adopted is of
	groups := make(map[int]int)
	for worker, r := range l.gone {
		groups[r.pgid] = worker
		if len(l.workers) == 0 && len(l.gone) == 1 {
			only = worker
		}
	}
	its, doubt := make(map[int]int), make(map[int]time.Time)
	// All of it has been re-parented to us, or is below what was.
	walkAll(l.living(), func(p process, late bool) {
		worker := only
		if worker == 0 {
			worker = its[p.ppid]
		}
		if worker == 0 {
			// The number of a group may be another worker's daemon's by now.
			start, executing := l.startOf(p.pid)
			if worker = start; worker == 0 {
				worker = groups[p.pgid]
			}
			if worker == 0 && executing {
				since, known := l.doubt[p.pid]
				if !known {
					since = time.Now()
				}
				doubt[p.pid] = since
				unsure = unsure || time.Since(since) < maxDoubt
			}
		}
		if l.gone[worker] != nil {
			its[p.pid] = worker
			visit(worker, p, late)
		}
	})
	l.doubt = doubt
	return unsure
}

// maxDoubt is how long a process may be in the middle of execve(2), as far as we
// can see: it may also have hidden its environment for good.
const maxDoubt = time.Second

// signalRemains sends each of the workers' remains its signal, and then CONT.
func (l *leader) signalRemains(signals map[int]syscall.Signal) {
	if len(signals) == 0 {
		return
	}
	send, refused := l.sender()
	defer refused()
	l.walkRemains(func(worker int, p process, late bool) {
		if sig, ok := signals[worker]; ok && !late {
			send(p.signal(sig))
		}
	})
	l.walkRemains(func(worker int, p process, _ bool) {
		if _, ok := signals[worker]; ok {
			send(p.signal(unix.SIGCONT))
		}
	})
}

// startOf returns the start of ours in whose environment pid began, 0 if it isn't
// known. In the middle of an execve(2) a process has no environment, and no
// arguments: executing tells.
func (l *leader) startOf(pid int) (start int, executing bool) {
	dir := strconv.Itoa(pid)
	env, err := readFile(dir+"/environ", nil)
	if err != nil {
		return 0, false // it has become somebody else's (set-uid), or has ended
	}
	if len(env) == 0 {
		args, err := readFile(dir+"/cmdline", nil)
		return 0, err == nil && len(args) == 0
	}
	for _, e := range l.env {
		if v, ok := strings.CutPrefix(e, pidVar+"="); ok && v != value(env, pidVar) {
			return 0, false // of a launcher among our descendants
		}
	}
	start, _ = strconv.Atoi(value(env, startVar))
	return start, false
}

// value returns that of the variable name in the text of /proc/PID/environ.
func value(environ []byte, name string) string {
	for e := range bytes.SplitSeq(environ, []byte{0}) {
		if v, ok := bytes.CutPrefix(e, []byte(name+"=")); ok {
			return string(v)
		}
	}
	return ""
}

// clear kills what has to be, and reports the workers of which nothing is left.
// All of it is stopped first, as in a sweep.
func (l *leader) clear() {
	if len(l.gone) == 0 || l.empty || l.alone {
		return
	}
	found := make(map[int][]process)
	l.unsure = false
	if adopted, _ := l.adoptees(); adopted {
		l.unsure = l.walkRemains(func(worker int, p process, _ bool) {
			found[worker] = append(found[worker], p)
			if l.gone[worker].kill {
				p.signal(unix.SIGSTOP)
			}
		})
	}
	// What has ended since we read its parent's list may have forked before: it is
	// looked for again when that was reaped.
	_, zombies := l.adoptees()
	for worker, r := range l.gone {
		for _, p := range found[worker] {
			if r.kill && p.signal(unix.SIGKILL) == nil {
				r.killed[p.pid] = true
			}
		}
		if len(found[worker]) == 0 && !zombies && !l.unsure {
			delete(l.gone, worker)
			delete(l.groups, r.pgid)
			l.takeTerminalBack(r.pgid)
			l.report(msgCleared, worker, int64(len(r.killed)), 0)
		}
	}
}

// adoptees reports whether there are children that are no workers, and whether
// some of them have ended and are still to be reaped.
func (l *leader) adoptees() (any, zombies bool) {
	live := l.living()
	for _, pid := range children(unix.Getpid(), 0) {
		if live[pid] {
			continue
		}
		any = true
		if p, err := stat(pid); err == nil && p.state == 'Z' && p.threads <= 1 {
			zombies = true
		}
	}
	return any, zombies
}
