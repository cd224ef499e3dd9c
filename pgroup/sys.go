package pgroup

import (
	"errors"
	"io/fs"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file holds every system call that Go's own packages have no name for.
// Policy is elsewhere.
//
//	pidfd_open(2)                5.3
//	pidfd_send_signal(2)         5.1
//	/proc/PID/task/TID/children  3.5, CONFIG_PROC_CHILDREN
//	PR_SET_CHILD_SUBREAPER       3.4

// retry calls f until it fails with something other than EINTR.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// setSubreaper makes the calling process the one that adopts the orphans among
// its descendants. execve(2) keeps this; a child does not inherit it. See
// PR_SET_CHILD_SUBREAPER(2const).
func setSubreaper() error {
	return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
}

// setName sets what ps(1) and pgrep(1) call the process. Started as
// /proc/self/exe it would be "exe". It must be called on the main thread.
func setName(name string) {
	b := append([]byte(name), 0)
	unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&b[0])), 0, 0, 0)
}

// dropInheritable empties the calling thread's inheritable and ambient
// capabilities, so that what it starts has none of them (capabilities(7)).
func dropInheritable() {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&head, &data[0]) == nil {
		data[0].Inheritable, data[1].Inheritable = 0, 0
		unix.Capset(&head, &data[0]) // takes the ambient ones too
	}
}

// A sigset is a set of signals as the kernel has it: signal n is bit n-1.
type sigset uint64

const allSignals = ^sigset(0)

func (s sigset) has(sig syscall.Signal) bool { return s>>(sig-1)&1 != 0 }

// setMask sets the signal mask of the calling thread, which must be locked to
// its goroutine, and returns the one it had.
func setMask(set sigset) sigset { return sigprocmask(unix.SIG_SETMASK, &set) }

// mask returns the signal mask of the calling thread.
func mask() sigset { return sigprocmask(unix.SIG_BLOCK, nil) }

func sigprocmask(how uintptr, set *sigset) (old sigset) {
	// The errors of rt_sigprocmask(2) are all the caller's.
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, how, uintptr(unsafe.Pointer(set)),
		uintptr(unsafe.Pointer(&old)), unsafe.Sizeof(old), 0, 0)
	return old
}

// setDefault gives sig back its default action, behind the back of the Go
// runtime: signal.Reset would leave the runtime's handler for QUIT, which
// prints a goroutine dump.
func setDefault(sig syscall.Signal) {
	rtSigaction(sig, &sigaction{handler: sigDefault}, nil)
}

// raise has sig do what it does by default, to the whole process.
func raise(sig syscall.Signal) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	setDefault(sig)
	defer setMask(setMask(mask() &^ (1 << (sig - 1))))
	unix.Tgkill(unix.Getpid(), unix.Gettid(), sig)
}

// stopGroup has sig, STOP, TSTP, TTIN or TTOU, stop the process's whole group.
func stopGroup(sig syscall.Signal) {
	if sig == unix.SIGSTOP {
		unix.Kill(0, sig)
		return
	}
	rtSigaction(sig, &sigaction{handler: sigIgnore}, nil) // the others first
	unix.Kill(0, sig)
	raise(sig)
}

// uninterrupted calls f with all signals blocked. A process in the background of
// its terminal may then use it: the kernel sends no TTOU to a thread that has it
// blocked.
func uninterrupted(f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer setMask(setMask(allSignals))
	f()
}

// Write writes all of p to fd. It is for descriptors that the program shares
// with others: nothing that they do, a closed pipe or stty tostop, makes it a
// signal that ends, stops or is relayed.
func Write(fd int, p []byte) (err error) {
	uninterrupted(func() {
		for len(p) > 0 && err == nil {
			err = retry(func() error {
				n, err := unix.Write(fd, p)
				p = p[max(n, 0):]
				if err == unix.EAGAIN { // somebody else made it so
					err = poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, time.Time{})
				}
				return err
			})
		}
	})
	return err
}

// waitAny reaps one child, or takes the news that one was stopped or
// continued. It returns pid 0 when there is no news, ECHILD when there is no
// child.
func waitAny(options int) (pid int, status syscall.WaitStatus, err error) {
	err = retry(func() (err error) {
		pid, err = syscall.Wait4(-1, &status, options|unix.WALL, nil)
		return err
	})
	return pid, status, err
}

// waitNews blocks until waitAny has news, and leaves it for waitAny.
func waitNews() error {
	const news = unix.WEXITED | unix.WSTOPPED | unix.WCONTINUED
	return retry(func() error {
		return unix.Waitid(unix.P_ALL, 0, nil, news|unix.WNOWAIT|unix.WALL, nil)
	})
}

// isChild reports whether pid is a child that has not been reaped.
func isChild(pid int) bool {
	return retry(func() error {
		return unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	}) == nil
}

// waitPid reaps the child pid.
func waitPid(pid int) (status syscall.WaitStatus, err error) {
	err = retry(func() error {
		_, err := syscall.Wait4(pid, &status, 0, nil)
		return err
	})
	return status, err
}

// poll waits until one of the descriptors is readable or its peer has gone, or
// until the deadline (none if zero).
func poll(fds []unix.PollFd, deadline time.Time) error {
	return retry(func() error {
		timeout := -1
		if !deadline.IsZero() {
			// Rounded up: a deadline is never seen early.
			timeout = int((time.Until(deadline) + time.Millisecond - 1) / time.Millisecond)
			timeout = min(max(timeout, 0), math.MaxInt32)
		}
		_, err := unix.Poll(fds, timeout)
		return err
	})
}

// bootTicks returns the time since the boot in the unit that /proc/PID/stat has
// it: hundredths of a second on every architecture that Go knows.
func bootTicks() int {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return int(ts.Nano() / 1e7)
}

// socketPair returns the two ends of a Unix stream socket pair, both closed on
// exec.
func socketPair() (a, b int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	return fds[0], fds[1], err
}

// toNull makes fd a descriptor of /dev/null.
func toNull(fd int) error {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(null)
	return unix.Dup3(null, fd, 0)
}

// isPipe reports whether fd is an end of a pipe or of a socket: something whose
// other end waits for all holders to close it.
func isPipe(fd int) bool {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return false
	}
	format := st.Mode & unix.S_IFMT
	return format == unix.S_IFIFO || format == unix.S_IFSOCK
}

// CloseInherited closes every descriptor from 3 on that the program was started
// with, but for those of keep. What the Go runtime has opened is marked
// close-on-exec and stays.
func CloseInherited(keep ...int) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return errors.New("cannot read /proc/self/fd: mount /proc, which pgroup needs to find what it has to end")
		}
		return err
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd < 3 || slices.Contains(keep, fd) {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == nil && flags&unix.FD_CLOEXEC == 0 {
			unix.Close(fd)
		}
	}
	return nil
}
