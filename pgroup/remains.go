package pgroup

import (
	"bytes"
	"strconv"
	"strings"

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

// walkRemains calls visit, as walkAll does, for each process that the ended
// worker left behind: those in its group, those that have its environment, and
// their descendants. What has neither is known to be its only if there was no
// other worker; else it lives until the end of the run.
func (l *leader) walkRemains(worker int, visit func(p process, late bool)) {
	of := l.gone[worker]
	if of == nil {
		return
	}
	only := len(l.workers) == 0 && len(l.gone) == 1
	its := make(map[int]bool)
	// All of it has been re-parented to us, or is below what was.
	walkAll(l.living(), func(p process, late bool) {
		// The number of its group may be another worker's daemon's by now.
		start := l.startOf(p.pid)
		if only || its[p.ppid] || start == worker || start == 0 && p.pgid == of.pgid {
			its[p.pid] = true
			visit(p, late)
		}
	})
}

// startOf returns the start of ours in whose environment pid began, 0 if it isn't
// known.
func (l *leader) startOf(pid int) int {
	env, err := readFile(strconv.Itoa(pid)+"/environ", nil)
	if err != nil {
		return 0 // it has become somebody else's (set-uid), or has ended
	}
	for _, e := range l.env {
		if v, ok := strings.CutPrefix(e, pidVar+"="); ok && v != value(env, pidVar) {
			return 0 // of a launcher among our descendants
		}
	}
	start, _ := strconv.Atoi(value(env, startVar))
	return start
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
func (l *leader) clear() {
	if len(l.gone) == 0 || l.empty || l.alone {
		return
	}
	live := l.living()
	adopted := 0
	for _, pid := range children(unix.Getpid(), 0) {
		if !live[pid] {
			adopted++
		}
	}
	for worker, r := range l.gone {
		left := 0
		if adopted > 0 {
			left = l.clearOf(worker, r.kill)
		}
		if left == 0 {
			delete(l.gone, worker)
			delete(l.groups, r.pgid)
			l.report(msgCleared, worker, int64(len(r.killed)), 0)
		}
	}
}

// clearOf returns how many processes the worker has left behind, and kills them
// if it should: all are stopped first, as in a sweep.
func (l *leader) clearOf(worker int, kill bool) int {
	var found []process
	l.walkRemains(worker, func(p process, _ bool) {
		found = append(found, p)
		if kill {
			p.signal(unix.SIGSTOP)
		}
	})
	if kill {
		for _, p := range found {
			if p.signal(unix.SIGKILL) == nil {
				l.gone[worker].killed[p.pid] = true
			}
		}
	}
	return len(found)
}
