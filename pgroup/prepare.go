package pgroup

import (
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// prepared is the leader that Prepare started.
var prepared struct {
	pid, fd int
}

// Prepare starts a leader ahead of Start, while a program that runs what its own
// arguments end in still reads them: two thirds of what a leader costs is the
// start of a Go process. It does nothing until Start has found that it fits, and
// ends if it doesn't, or if the program does. An error is left to Start.
func Prepare() {
	quietQuit()
	if unix.Getpid() == 1 {
		return // there will be none
	}
	s := &Spec{Args: os.Args[1:], Dedicated: true}
	prepared.pid, prepared.fd, _ = s.startLeader()
}

// Discard ends a leader that Prepare started and Start has no use for.
func Discard() {
	if prepared.pid > 0 {
		unix.Close(prepared.fd)
		waitPid(prepared.pid)
		prepared.pid = 0
	}
}

// takePrepared returns the leader that Prepare started, if it fits the spec, and
// the place of the command in its arguments.
func (s *Spec) takePrepared() (pid, fd, first int, ok bool) {
	first = len(os.Args) - len(s.Args)
	if prepared.pid <= 0 || !s.Dedicated || s.TTY || s.PIDNamespace || s.Env != nil || s.Dir != "" ||
		first < 1 || !slices.Equal(os.Args[first:], s.Args) {
		Discard()
		return 0, 0, 0, false
	}
	pid, prepared.pid = prepared.pid, 0
	return pid, prepared.fd, first, true
}
