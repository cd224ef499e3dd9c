package pgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// How a worker says that it is ready, as --ready has it.
const (
	ReadyNotify = "notify" // READY=1 to NOTIFY_SOCKET: sd_notify(3)
	ReadyFD     = "fd"     // a newline on the descriptor that PGROUP_READY_FD names
)

// A Ready says when a worker counts as ready. The zero Ready is: when it was
// started. A Go program that is a worker calls [ReportReady].
type Ready struct {
	Mode  string        // ReadyNotify, ReadyFD or neither
	After time.Duration // without Mode: when it has run for so long
}

// notifyVar is what a worker finds in its environment: sd_notify(3).
const notifyVar = "NOTIFY_SOCKET"

// notifySize is what systemd takes, and any notification needs. A longer one is
// ignored, as systemd does.
const notifySize = 4096

// A notifySocket receives the sd_notify(3) of one start of a worker. Its name is
// abstract (unix(7)): nothing is left in the file system however we end, and it
// can be reached from another root or mount namespace, but not from another
// network namespace.
type notifySocket struct {
	file  *os.File
	name  string
	once  sync.Once
	known chan struct{} // closed when pid is set
	pid   int
}

// newNotifySocket opens a socket. A goroutine calls ready for the first READY=1
// and status for every STATUS=, which is text of the worker's making. It ends
// with close, but may be in one of the two then.
func newNotifySocket(ready func(), status func(text string)) (*notifySocket, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open a %s: %w", notifyVar, err)
	}
	// Who the sender is: /proc/net/unix tells every user the name.
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	var random [16]byte // so that nobody else has bound it
	if err == nil {
		err = retry(func() error {
			_, err := unix.Getrandom(random[:], 0)
			return err
		})
	}
	name := fmt.Sprintf("@pgroup-%x", random)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: name})
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot open a %s: %w", notifyVar, err)
	}
	n := &notifySocket{file: os.NewFile(uintptr(fd), name), name: name, known: make(chan struct{})}
	go n.serve(sync.OnceFunc(ready), status)
	return n, nil
}

// env is what the worker finds in its environment.
func (n *notifySocket) env() string { return notifyVar + "=" + n.name }

// setPID says which process may notify us with its descendants, whatever user
// they are. It is the worker, or, as in a pid namespace where we know its pid as
// another, the leader. Until it is known, other users' notifications wait.
func (n *notifySocket) setPID(pid int) {
	n.once.Do(func() {
		n.pid = pid
		close(n.known)
	})
}

func (n *notifySocket) close() {
	n.setPID(0)
	n.file.Close()
}

func (n *notifySocket) serve(ready func(), status func(string)) {
	for {
		text, from, err := n.receive()
		if err != nil {
			return // closed
		}
		if text == "" || !n.mayNotify(from) {
			continue
		}
		isReady, says, hasStatus := parseNotification(text)
		if hasStatus && status != nil {
			status(says)
		}
		if isReady {
			ready()
		}
	}
}

// receive returns the next notification, empty if it is one to ignore.
func (n *notifySocket) receive() (text string, from *unix.Ucred, err error) {
	conn, err := n.file.SyscallConn()
	if err != nil {
		return "", nil, err
	}
	buf := make([]byte, notifySize)
	// There is room for the credentials alone. So the kernel closes the
	// descriptors that come with FDSTORE=1, and with BARRIER=1, whose sender
	// waits for just that: it is told that all before has been taken in.
	control := make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	var size, controlSize, flags int
	var rerr error
	err = conn.Read(func(fd uintptr) bool {
		rerr = retry(func() (err error) {
			size, controlSize, flags, _, err = unix.Recvmsg(int(fd), buf, control, 0)
			return err
		})
		return rerr != unix.EAGAIN
	})
	if err = errors.Join(err, rerr); err != nil {
		return "", nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:controlSize])
	if err != nil || len(messages) != 1 || flags&unix.MSG_TRUNC != 0 {
		return "", nil, nil
	}
	from, err = unix.ParseUnixCredentials(&messages[0])
	if err != nil {
		return "", nil, nil
	}
	return string(buf[:size]), from, nil
}

// mayNotify reports whether the sender is of us, root, or of the worker.
func (n *notifySocket) mayNotify(from *unix.Ucred) bool {
	if from.Uid == 0 || from.Uid == uint32(unix.Geteuid()) {
		return true
	}
	<-n.known
	// systemd-notify(1) in a worker's shell script is its child.
	for pid := int(from.Pid); pid > 0; {
		if pid == n.pid {
			return true
		}
		p, err := stat(pid)
		if err != nil {
			return false // it has ended
		}
		pid = p.ppid
	}
	return false
}

// parseNotification reads what sd_notify(3) sends: assignments, one a line. Those
// that mean nothing to us are left out: MAINPID, STOPPING, WATCHDOG and more.
func parseNotification(text string) (ready bool, status string, hasStatus bool) {
	text = strings.TrimSuffix(text, "\x00")
	if strings.Contains(text, "\x00") {
		return false, "", false // as systemd does
	}
	for line := range strings.SplitSeq(text, "\n") {
		if line == "READY=1" {
			ready = true
		} else if s, ok := strings.CutPrefix(line, "STATUS="); ok {
			status, hasStatus = s, true
		}
	}
	return ready, status, hasStatus
}

// newReadyPipe returns what PGROUP_READY_FD names for one start of a worker. The
// caller closes it once the worker has it. A goroutine calls ready for the first
// newline. The end of the pipe without one is no news: the worker may have ended,
// or have closed what it was not told about.
//
// It reads on after that, so that a second newline is no SIGPIPE, until all have
// closed the pipe, or close is called.
func newReadyPipe(ready func()) (worker *os.File, close func(), err error) {
	r, w, err := newPipe(readyFDVar)
	if err != nil {
		return nil, nil, err
	}
	go func() {
		defer r.Close()
		isReady := false
		var buf [128]byte
		for {
			n, err := r.Read(buf[:])
			if !isReady && bytes.IndexByte(buf[:n], '\n') >= 0 {
				isReady = true
				ready()
			}
			if err != nil {
				return
			}
		}
	}()
	return w, func() { r.Close() }, nil
}

// notifyTime is how long Notify waits for a receiver that doesn't read.
const notifyTime = 5 * time.Second

// Notify sends state, such as "READY=1\nSTATUS=serving", to the service manager
// that NOTIFY_SOCKET names, as sd_notify(3) does. Without NOTIFY_SOCKET it does
// nothing. To a pgroup, a worker says that it is ready with [ReportReady].
func Notify(state string) error {
	name := os.Getenv(notifyVar)
	if name == "" {
		return nil
	}
	wrap := func(err error) error {
		return fmt.Errorf("cannot notify the service manager at %s=%s: %w", notifyVar, name, err)
	}
	if name[0] != '@' && name[0] != '/' {
		return wrap(unix.EAFNOSUPPORT)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return wrap(err)
	}
	defer unix.Close(fd)
	limit := unix.NsecToTimeval(int64(notifyTime))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
		return wrap(err)
	}
	err = retry(func() error {
		return unix.Sendto(fd, []byte(state), unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: name})
	})
	if err != nil {
		return wrap(err)
	}
	return nil
}

var reporting sync.Mutex

// ReportReady says that the calling process, a worker, is ready, in the way that
// its launcher asks for: see [Ready]. Where none asks it does nothing, so that a
// worker may always call it.
func ReportReady() error {
	reporting.Lock()
	defer reporting.Unlock()
	if value, ok := os.LookupEnv(readyFDVar); ok {
		os.Unsetenv(readyFDVar) // closed below, the number may soon be another file's
		fd, err := strconv.Atoi(value)
		if err != nil || fd < 3 || !isPipe(fd) {
			return fmt.Errorf("cannot report readiness: %s=%s names no open pipe", readyFDVar, value)
		}
		defer unix.Close(fd)
		if err := Write(fd, []byte("\n")); err != nil {
			return fmt.Errorf("cannot report readiness to %s=%s: %w", readyFDVar, value, err)
		}
	}
	return Notify("READY=1")
}
