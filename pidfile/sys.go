package pidfile

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// This file holds the system calls. Policy is elsewhere.
//
//	F_OFD_SETLK, F_OFD_GETLK  3.15
//	pidfd_send_signal(2)      5.1
//	pidfd_open(2)             5.3, and poll(2) of a pidfd

// retry calls f until it fails with something other than EINTR.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// An identity is a process for good: no two have the same.
type identity struct {
	pid   int
	start int64 // clock ticks from boot to its start, as proc_pid_stat(5) has it
}

// The lock starts at byte 0. Its length is that of the whole file until Create
// has written the file, and then says who the holder is: a bit that marks it as
// ours, the start time, the pid. Bytes need not be there to be locked, and
// fcntl(2) shows the range of a lock to whoever asks.
const (
	pidBits = 22 // PID_MAX_LIMIT is 1<<22
	mark    = 1 << 62
)

func (id identity) length() int64 { return mark | id.start<<pidBits | int64(id.pid) }

// holder returns the identity that the length of a lock stands for: none for a
// Create that isn't done, or for a lock of another program.
func holder(length int64) (id identity) {
	if length&mark != 0 {
		id.pid = int(length & (1<<pidBits - 1))
		id.start = length &^ mark >> pidBits
	}
	return id
}

// errLocked is lockAll's when another has a lock on any part of the file.
var errLocked = errors.New("locked")

// lockAll locks the whole file, also beyond its end.
func lockAll(fd int) error {
	err := setLock(fd, unix.Flock_t{Type: unix.F_WRLCK})
	switch err {
	case unix.EAGAIN, unix.EACCES:
		return errLocked
	case unix.EINVAL:
		return fmt.Errorf("F_OFD_SETLK: %w: needs Linux 3.15 or newer", err)
	}
	return err
}

// lockAs makes id the holder: it cuts the end off the lock. That cannot fail for
// another's lock, and there is no moment without one.
func lockAs(fd int, id identity) error {
	return setLock(fd, unix.Flock_t{Type: unix.F_UNLCK, Start: id.length()})
}

func setLock(fd int, lock unix.Flock_t) error {
	return retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock) })
}

// lookAt returns whether somebody has the file locked for writing, and who. A lock
// for reading doesn't count: any user who may read the file can have one.
func lookAt(fd int) (id identity, held bool, err error) {
	lock := unix.Flock_t{Type: unix.F_RDLCK}
	err = retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lock) })
	if err != nil || lock.Type == unix.F_UNLCK {
		return id, false, err
	}
	if lock.Start == 0 {
		id = holder(lock.Len)
	}
	return id, true, nil
}

// ourselves returns the identity of this process.
func ourselves() (identity, error) {
	start, err := startTime("self")
	if err != nil {
		return identity{}, fmt.Errorf("%w: is /proc mounted?", err)
	}
	return identity{unix.Getpid(), start}, nil
}

// open returns a pidfd of the process, or -1 if it has been reaped or cannot be
// seen from here.
func (id identity) open() (pidfd int, err error) {
	if id.pid == 0 {
		return -1, nil
	}
	pidfd, err = unix.PidfdOpen(id.pid, 0)
	switch err {
	case nil:
	case unix.ESRCH, unix.EINVAL, unix.ENOENT: // the latter two: a thread has the number
		return -1, nil
	default:
		return -1, os.NewSyscallError("pidfd_open", err)
	}
	// The pidfd holds what had the number. A process that got it afterwards
	// started later than id did, and one that has it now and started then is
	// id: so was the one that the pidfd holds.
	if start, err := startTime(strconv.Itoa(id.pid)); err != nil || start != id.start {
		unix.Close(pidfd)
		return -1, nil
	}
	return pidfd, nil
}

// hasEnded reports whether the process of pidfd has: a zombie has too.
func hasEnded(pidfd int) bool {
	if pidfd < 0 {
		return true
	}
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	err := retry(func() error {
		_, err := unix.Poll(fds, 0)
		return err
	})
	return err == nil && fds[0].Revents != 0
}

func startTime(pid string) (int64, error) {
	text, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, err
	}
	_, start, err := parseStat(text)
	return start, err
}

// parseStat reads fields 3 and 22 of /proc/PID/stat. The name in field 2 may hold
// anything: the last ")" ends it.
func parseStat(text []byte) (state byte, start int64, err error) {
	f := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(f) < 20 {
		return 0, 0, errors.New("malformed /proc/PID/stat")
	}
	start, err = strconv.ParseInt(string(f[19]), 10, 62-pidBits)
	return f[0][0], start, err
}

// mayHaveWritten reports whether the process pid lives, is not this one, and had
// started when the file was last written. Where the clock was set back since, or
// a machine started without one, that can't be known: then it is false.
func mayHaveWritten(pid, fd int) bool {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil || pid == os.Getpid() {
		return false
	}
	state, start, err := parseStat(text)
	if err != nil || state == 'Z' || state == 'X' {
		return false
	}
	var st unix.Stat_t
	var boot unix.Timespec
	if unix.Fstat(fd, &st) != nil || unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot) != nil {
		return false
	}
	const userHZ = 100             // on all that Go runs on
	const coarse = 1 * time.Second // how far the clocks may be apart
	now, written := time.Now(), time.Unix(st.Mtim.Unix())
	age := time.Duration(boot.Nano()) - time.Duration(start)*(time.Second/userHZ)
	return !written.After(now.Add(coarse)) && !now.Add(-age).After(written.Add(coarse))
}

func truncate(fd int) error {
	return retry(func() error { return unix.Ftruncate(fd, 0) })
}

// writeText writes the whole file, which is empty.
func writeText(fd int, text string) error {
	var n int
	err := retry(func() (err error) {
		n, err = unix.Pwrite(fd, []byte(text), 0)
		return err
	})
	if err == nil && n < len(text) {
		err = unix.ENOSPC // what write(2) would say of the rest
	}
	return err
}

// readText reads as much of the file as any pid file has.
func readText(fd int) ([]byte, error) {
	text := make([]byte, 64)
	var n int
	err := retry(func() (err error) {
		n, err = unix.Pread(fd, text, 0)
		return err
	})
	return text[:max(n, 0)], err
}

// watchCloses returns a channel that receives after something that had the file
// open for writing has closed it. Closing the file that it returns ends that. Both
// are nil if it can't be watched.
func watchCloses(fd int) (*os.File, <-chan struct{}) {
	in, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil, nil
	}
	watch := os.NewFile(uintptr(in), "inotify")
	if _, err := unix.InotifyAddWatch(in, "/proc/self/fd/"+strconv.Itoa(fd), unix.IN_CLOSE_WRITE); err != nil {
		watch.Close()
		return nil, nil
	}
	closed := make(chan struct{}, 1)
	go func() {
		buf := make([]byte, 4096)
		for {
			if _, err := watch.Read(buf); err != nil {
				return
			}
			select {
			case closed <- struct{}{}:
			default: // it has yet to look
			}
		}
	}()
	return watch, closed
}
