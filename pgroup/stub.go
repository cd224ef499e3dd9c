package pgroup

import (
	"encoding/binary"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// The stub is this program, started in the worker's place to set LISTEN_PID to
// its own pid and then to become the worker: Go runs no code between fork and
// exec. The leader has found the file by then; what can still go wrong goes to
// the leader by a pipe, and not as a status of the command.

// stubName is its argv[0]. What follows is the number of the pipe, the file and
// the command's arguments.
const stubName = "pgroup-stub"

// stubMain does not return.
func stubMain(args []string) {
	quietQuit()
	failed, _ := strconv.Atoi(args[0])
	unix.CloseOnExec(failed)
	os.Setenv(listenPIDVar, strconv.Itoa(unix.Getpid()))
	c := command{args: args[2:]}
	err := syscall.Exec(args[1], c.args, os.Environ())
	if err == unix.ENOEXEC {
		err = syscall.Exec("/bin/sh", c.script(args[1]), os.Environ())
	}
	errno, _ := err.(syscall.Errno)
	buf := binary.NativeEndian.AppendUint32(nil, uint32(unix.Getpid()))
	unix.Write(failed, binary.NativeEndian.AppendUint32(buf, uint32(errno)))
	os.Exit(StatusNotStarted)
}

// spawnStub starts the stub that will become the worker.
func (l *leader) spawnStub(path string, attr *syscall.ProcAttr) (pid int, err error) {
	if l.failed < 0 {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			return 0, err
		}
		l.failed, l.stubs = p[0], p[1]
	}
	number := len(attr.Files)
	attr.Files = append(attr.Files, uintptr(l.stubs))
	args := append([]string{stubName, strconv.Itoa(number), path}, l.args...)
	return syscall.ForkExec("/proc/self/exe", args, attr)
}

// stubFailed returns why the stub pid could not become a worker, 0 if it did.
// What it wrote was written before it ended.
func (l *leader) stubFailed(pid int) syscall.Errno {
	for l.failed >= 0 {
		var buf [8]byte
		if n, _ := unix.Read(l.failed, buf[:]); n < len(buf) {
			break
		}
		l.stubErrors[int(binary.NativeEndian.Uint32(buf[:]))] = syscall.Errno(binary.NativeEndian.Uint32(buf[4:]))
	}
	errno := l.stubErrors[pid]
	delete(l.stubErrors, pid)
	return errno
}
