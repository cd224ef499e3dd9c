package pgroup

import (
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The statuses of a run that are not a command's own, as timeout(1) has them.
const (
	StatusTimeout    = 124
	StatusFailed     = 125 // the launcher
	StatusNotStarted = 126 // the command is there but can't be executed
	StatusNotFound   = 127
)

// A Result is how a run ended.
type Result struct {
	// Status is the exit status: the command's; of several workers the first
	// failure's, else 0. Without a meaning if Signal is set.
	Status int

	// Signal is what the command died of, 0 if it ended by itself.
	Signal syscall.Signal

	// TimedOut is whether Timeout was reached. Status is then StatusTimeout, or
	// Signal is SIGKILL.
	TimedOut bool

	// Escalated is whether the grace period of a stop was over before all workers
	// had ended, so that they were sent SIGKILL. With no grace period it always is.
	Escalated bool
}

// Code returns the result as a shell shows it: 128 + n for signal n.
func (r Result) Code() int {
	if r.Signal != 0 {
		return 128 + int(r.Signal)
	}
	return r.Status
}

// take takes the end of w for that of the run.
func (r *Result) take(w *worker) {
	switch {
	case w.err != nil:
		r.Status = startStatus(w.err)
	case w.status.Signaled():
		r.Signal = w.status.Signal()
	default:
		r.Status = w.status.ExitStatus()
	}
}

// settle finds the result when nothing lives. A run that the launcher's own
// failure has cut short did not succeed, whatever its command says.
func (r *Result) settle(failure error) {
	if failure != nil && r.Code() == 0 {
		r.Status = StatusFailed
	}
	if r.TimedOut {
		r.Status, r.Signal = StatusTimeout, 0
		if r.Escalated {
			r.Signal = unix.SIGKILL
		}
	}
}

// startStatus is the status of a command that could not be started. What the
// system had too little of is no fault of the command.
func startStatus(err error) int {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return StatusFailed
	}
	switch errno {
	case unix.ENOENT:
		return StatusNotFound
	case unix.EAGAIN, unix.ENOMEM, unix.EMFILE, unix.ENFILE:
		return StatusFailed
	}
	return StatusNotStarted
}

// Exit ends the process the way the command ended, so that its parent sees the
// same: by the signal that the command died of, but with no core dump of ours
// beside the command's. PID 1 can't die of a signal: there it is 128 + n.
func (r Result) Exit() {
	if r.Signal == 0 || unix.Getpid() == 1 {
		os.Exit(r.Code())
	}
	unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) // a core_pattern with a pipe has no limit
	setDefault(r.Signal)
	raise(r.Signal)
	time.Sleep(time.Second) // another thread may be the one that dies
	os.Exit(r.Code())
}
