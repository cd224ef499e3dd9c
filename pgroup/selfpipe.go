package pgroup

import (
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The self-pipe trick, below os/signal. A Go program that takes its signals from
// os/signal can't know who sent one, nor how often, nor tell a SIGURG that
// somebody sent from those that its runtime sends itself; it is never given
// PROF, nor 34; and each signal that it enables costs it two hand-overs
// between threads before it may start anything.
//
// So the kernel calls our own handler, which does one thing: it writes the
// siginfo_t to a pipe, in one write(2) (selfpipe_*.s). That is async-signal-safe
// (signal-safety(7)), takes no stack to speak of, and clobbers nothing:
// rt_sigreturn restores every register. The runtime's handler is still called
// for what is its own: a fault of this program, and its SIGURG.

// A siginfo is the head of siginfo_t (sigaction(2)): what the handlers write.
type siginfo struct {
	signo int32
	errno int32
	code  int32
	_     int32
	pid   int32 // of the sender, where code is 0 or less
	uid   uint32
}

// A sigaction is the kernel's, not the C library's.
type sigaction struct {
	handler  uintptr
	flags    uint64
	restorer uintptr
	mask     sigset
}

const (
	sigDefault = 0
	sigIgnore  = 1
)

func rtSigaction(sig syscall.Signal, set, old *sigaction) {
	// The errors of rt_sigaction(2) are all the caller's.
	syscall.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(set)),
		uintptr(unsafe.Pointer(old)), unsafe.Sizeof(sigset(0)), 0, 0)
}

var (
	//lint:ignore U1000 the handlers read it
	selfPipeFD int32   // what they write to
	goHandler  uintptr // the runtime's
	goAction   sigaction
)

// The addresses of the two handlers. The first writes whatever it is called for,
// the second what somebody sent, and passes the rest on.
func selfPipeHandler() uintptr
func selfPipeSentHandler() uintptr

// runtimes are the signals that the runtime needs: the faults that it turns into
// panics, and its own SIGURG.
const runtimes = 1<<(unix.SIGILL-1) | 1<<(unix.SIGTRAP-1) | 1<<(unix.SIGBUS-1) | 1<<(unix.SIGFPE-1) |
	1<<(unix.SIGSEGV-1) | 1<<(unix.SIGSTKFLT-1) | 1<<(unix.SIGSYS-1) | 1<<(unix.SIGURG-1)

// catch has the handlers called for the signals of set, but for those that are
// ignored.
func catch(set sigset) {
	if goHandler == 0 {
		rtSigaction(unix.SIGSEGV, nil, &goAction) // always the runtime's
		goHandler = goAction.handler
	}
	for sig := syscall.Signal(1); sig <= maxSig; sig++ {
		var old sigaction
		rtSigaction(sig, nil, &old)
		if !set.has(sig) || old.handler == sigIgnore {
			continue
		}
		ours := goAction // its flags: on the signal stack, restarting system calls
		ours.handler = selfPipeHandler()
		if sigset(runtimes).has(sig) {
			ours.handler = selfPipeSentHandler()
		}
		rtSigaction(sig, &ours, nil)
	}
}

// newSelfPipe starts catching the signals of set and returns the end of the pipe
// to read them from, which doesn't block. There can be one in a process.
func newSelfPipe(set sigset) (fd int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return -1, err
	}
	// Room for 40,000 signals, where the limits allow it (pipe(7)).
	unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, 1<<20)
	selfPipeFD = int32(p[1])
	catch(set)
	if mask() != 0 {
		// The caller had some blocked, and all our threads have: but for one.
		go func() {
			runtime.LockOSThread()
			setMask(0)
			select {}
		}()
	}
	return p[0], nil
}

// readSelfPipe returns the signals in what was read from the pipe.
func readSelfPipe(buf []byte) []Signal {
	var signals []Signal
	for ; len(buf) >= int(unsafe.Sizeof(siginfo{})); buf = buf[unsafe.Sizeof(siginfo{}):] {
		info := (*siginfo)(unsafe.Pointer(&buf[0]))
		s := Signal{Signal: syscall.Signal(info.signo)}
		if info.code <= 0 {
			s.From = int(info.pid)
		}
		// The kernel says that we sent ourselves the PIPE of our own writes.
		if s.Signal == unix.SIGPIPE && s.From == unix.Getpid() {
			continue
		}
		signals = append(signals, s)
	}
	return signals
}
