package pgroup

import (
	"syscall"

	"golang.org/x/sys/unix"
)

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
