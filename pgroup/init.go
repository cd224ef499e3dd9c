// Package pgroup runs a command, or copies of it, so that nothing which they start
// outlives the program that runs them, however that ends.
//
// The program is the launcher, which decides. The leader is its own binary started
// again, which needs a call of [Init], and the parent of the workers. When one of
// the two is killed, the other one ends all that was started. The program may use
// os/exec beside it: no process is waited for that the package did not start, and
// no signal is caught unless [Signals] is called.
//
// [Start] starts a run, which is over when nothing of it lives: a [Spec] says what
// to run and how, an [Event] what happened, a [Status] what there is, a [Result]
// how it ended. A worker learns who it is from [Me], and takes what it was given
// with [OpenChannel], [Listeners], [PacketConns] or [ListenFiles]; it says that it
// is ready with [ReportReady].
package pgroup

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// initialised is whether this program's main calls Init.
var initialised bool

// errNoInit is Start's error where the leader would be a second copy of main.
var errNoInit = errors.New("pgroup.Init was not called: call it first thing in main, in tests in TestMain")

// Init has to be called first thing in main, and in tests first thing in
// TestMain. In the leader, which is the program's own binary started again, it
// does not return, nor in what starts a worker that gets sockets. In any other
// process it does nothing.
func Init() {
	initialised = true
	if len(os.Args) == 0 {
		return
	}
	switch os.Args[0] {
	case leaderName:
		leaderMain()
	case stubName:
		stubMain(os.Args[1:])
	}
}

// startLeader starts the leader process and returns our end of its socket.
func (s *Spec) startLeader() (pid, fd int, err error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return 0, -1, os.NewSyscallError("socketpair", err)
	}
	defer unix.Close(theirs)
	attr := &syscall.ProcAttr{
		Dir:   s.Dir,
		Env:   s.command().env,
		Files: []uintptr{0, 1, 2, uintptr(theirs)},
		Sys:   &syscall.SysProcAttr{Setsid: !s.TTY, Setpgid: s.TTY},
	}
	if !s.Dedicated {
		null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			unix.Close(ours)
			return 0, -1, &os.PathError{Op: "open", Path: os.DevNull, Err: err}
		}
		defer unix.Close(null)
		attr.Files[0], attr.Files[1], attr.Files[2] = uintptr(null), uintptr(null), uintptr(null)
	}
	if s.PIDNamespace {
		ownPIDNamespace(attr.Sys)
	}
	pid, err = syscall.ForkExec("/proc/self/exe", append([]string{leaderName}, s.Args...), attr)
	if err != nil {
		unix.Close(ours)
		return 0, -1, s.leaderError(err)
	}
	return pid, ours, nil
}

func (s *Spec) leaderError(err error) error {
	if s.PIDNamespace && err != unix.EAGAIN && err != unix.ENOMEM {
		return fmt.Errorf("cannot make a pid namespace: %w: this needs root, or user namespaces allowed (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone); without one, use --contain tree", err)
	}
	return fmt.Errorf("cannot start the leader: %w", err)
}

// ownPIDNamespace makes the process the first of a new pid namespace, and of a
// mount namespace for the /proc that fits it. An ordinary user needs a user
// namespace for that, in which he is himself.
func ownPIDNamespace(attr *syscall.SysProcAttr) {
	attr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWNS
	if uid := os.Geteuid(); uid != 0 {
		gid := os.Getegid()
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		// To mount /proc: execve(2) takes what else an ordinary user has there.
		attr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN}
	}
}
