// Package pidfile makes, finds and removes pid files that cannot lie about who
// lives.
//
// A pid file holds the pid of the process that called [Create] and a newline.
// That is for people and for other programs. This package trusts the lock on the
// file alone:
//
//   - The lock is held: what made the file lives, or something that it handed
//     the lock to does ([File.Fd]).
//   - The lock is free: nothing of it lives. The file is stale, and Create takes
//     it over.
//
// The number counts in one case: where the lock is free, and the process of that
// number lives and is no younger than the file, the file is another program's. It
// is left alone.
//
// The lock is an open file description lock (F_OFD_SETLK in fcntl(2), Linux
// 3.15). Like one of flock(2) it belongs to the open file, is shared by every
// duplicate of the descriptor, and ends with the last of them, however its
// holders end. Unlike one of flock(2) it can be looked at without being taken,
// so that no look makes a Create fail; and its range says who made it: the pid
// and the start time. A pid that was given to another process meanwhile is
// therefore never taken for the holder, nor is a number that somebody wrote into
// the file, nor one from another pid namespace. flock(1) does not see this lock.
//
// The file's directory must belong to root or to the caller, and nobody else may
// be able to write to it, unless it is sticky as /tmp is. The file must be a
// regular file of the caller with one name, and only the caller may be able to
// write to it: symbolic links are refused. Find takes root's files too.
//
// Errors are [*fs.PathError].
package pidfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotRunning is what Find finds where there is no file.
	ErrNotRunning = errors.New("not running")

	// ErrStale is what Find finds where there is a file that nobody holds:
	// what made it has ended without removing it.
	ErrStale = errors.New("not running, but the file is there: its maker was killed")
)

// A HeldError is Create's when another process holds the file.
type HeldError struct {
	PID  int  // of the process that called Create; 0 if unknown
	Gone bool // it has ended, and others still hold the lock that it gave them
}

func (e *HeldError) Error() string {
	switch {
	case e.PID == 0:
		return "locked by a process that has not said its pid: see lslocks(8), or choose another file"
	case e.Gone:
		return fmt.Sprintf("process %d has ended, but what it started still lives and holds the file: wait for it, or choose another file", e.PID)
	}
	return fmt.Sprintf("held by process %d: stop it first, or choose another file", e.PID)
}

// A File is a pid file that this process holds. It holds it until Remove, or
// until it ends: a File that is no longer used isn't closed by the garbage
// collector. Its methods must not be called at the same time.
type File struct {
	place
	fd int
}

// step is called after each step of Create and Remove. Tests die there.
var step = func(name string) {}

// Create makes the pid file of this process, or takes over a stale one, and
// holds it. It does not wait for a holder: the error is then a [*HeldError]. Of
// those who call it at the same time, one gets the file.
//
// When it fails, it leaves no file that wasn't there before; a stale one may be
// gone. A file that holds something else than a pid is left alone.
//
// A relative path is looked up once: the process may then change its directory.
// The mode is 0644 less the umask.
func Create(path string) (*File, error) {
	p, err := openPlace(path)
	if err == nil {
		f := &File{place: p}
		if err = f.claim(); err == nil {
			if err = f.write(); err == nil {
				return f, nil
			}
			f.unlink()
			unix.Close(f.fd)
		}
		p.close()
	}
	return nil, pathError("create pid file", path, err)
}

// claim opens the file and takes its whole lock: who has that may write and
// remove the file. To others it is not a holder yet.
func (f *File) claim() error {
	return patiently(func(last bool) error {
		fd, err := f.open(unix.O_RDWR)
		if err == unix.ENOENT {
			fd, err = f.create()
		}
		if err != nil {
			return err
		}
		step("opened")
		if err = lockAll(fd); err == nil {
			step("claimed")
			if err = f.canTake(fd, last); err == nil {
				f.fd = fd
				return nil
			}
		} else if err == errLocked {
			err = heldBy(fd, last)
		}
		unix.Close(fd)
		return err
	})
}

// canTake tells whether fd, which we have locked, is the file to write to. Its
// last holder may have removed it between our open and our lock.
func (f *File) canTake(fd int, last bool) error {
	if !f.has(fd) {
		return errChanging
	}
	text, err := readText(fd)
	if err != nil {
		return err
	}
	if len(text) > 0 && !isPID(text) { // empty: its maker was killed here
		return errors.New("holds something else than a pid: it is no pid file; choose another, or remove it")
	}
	return notAnothers(fd, text, last)
}

// notAnothers fails if fd, which nobody holds, names a process that lives and may
// have written it. One of ours that was killed may be about to end: it has closed
// its files and is no zombie yet.
func notAnothers(fd int, text []byte, last bool) error {
	if !isPID(text) {
		return nil
	}
	pid, _ := strconv.Atoi(string(bytes.TrimSpace(text)))
	switch {
	case !mayHaveWritten(pid, fd):
		return nil
	case !last:
		return errChanging
	}
	return fmt.Errorf("it names the living process %d, which does not hold it: it is another program's; choose another file, or remove it", pid)
}

// heldBy returns the HeldError that names the holder of fd.
func heldBy(fd int, last bool) error {
	id, held, err := lookAt(fd)
	if err != nil {
		return err
	}
	// Its holder left, or is about to become one, or it was a reader's lock.
	if !last && (!held || id.pid == 0) {
		return errChanging
	}
	pidfd, err := id.open()
	if err != nil {
		return err
	}
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	return &HeldError{PID: id.pid, Gone: hasEnded(pidfd)}
}

// write writes the file, and only then makes this process the holder: who
// sees one sees all of its pid.
func (f *File) write() error {
	self, err := ourselves()
	if err != nil {
		return err
	}
	// An old number must not be seen, not even with ours written over its
	// first digits.
	if err := truncate(f.fd); err != nil {
		return err
	}
	step("emptied")
	if err := writeText(f.fd, strconv.Itoa(self.pid)+"\n"); err != nil {
		return err
	}
	step("written")
	if err := lockAs(f.fd, self); err != nil {
		return err
	}
	step("held")
	return nil
}

// Fd returns the descriptor that holds the lock. A process that is given a
// duplicate, by SCM_RIGHTS (unix(7)) or [os/exec.Cmd.ExtraFiles], holds the file
// too, and need do nothing but keep it. Others do not get it: it is closed on
// exec. It must not be closed, and is invalid after Remove.
func (f *File) Fd() uintptr { return uintptr(f.fd) }

// Remove removes the file, if it is still ours, and then lets go of it; a process
// that was given the lock holds on to what was the file. It is the last thing to
// do: from here on another Create succeeds.
//
// When it fails it has let go all the same. A file that has been removed
// already, or replaced by another, is no error and is left alone.
func (f *File) Remove() error {
	if f.fd < 0 {
		return pathError("remove pid file", f.path, fs.ErrClosed)
	}
	err := f.unlink()
	step("unlinked")
	unix.Close(f.fd)
	f.place.close()
	f.fd = -1
	if err != nil {
		return pathError("remove pid file", f.path, err)
	}
	return nil
}

// unlink removes the file if it is still ours. Nobody who locks as we do replaces
// it between the look and the removal: we have the lock.
func (f *File) unlink() error {
	if !f.has(f.fd) {
		return nil
	}
	return unix.Unlinkat(f.dir, f.name, 0)
}

// A Holder is who held a pid file when Find looked. It must be closed.
type Holder struct {
	// PID is the process that called Create. It is 0 if the lock is not one of
	// Create's, or if its Create does not come to an end.
	PID int

	id    identity
	path  string
	fd    int
	pidfd int // -1 if the process had ended
}

// Find finds the holder of a pid file, by its lock. If there is none, the error
// is [ErrNotRunning] or [ErrStale], and neither for the file of another program
// that lives. Any user who may read the file may look.
func Find(path string) (*Holder, error) {
	h := &Holder{path: path}
	p, err := openPlace(path)
	if err == nil {
		err = patiently(func(last bool) error { return h.find(p, last) })
		p.close()
	}
	if err == unix.ENOENT {
		err = ErrNotRunning
	}
	if err != nil {
		return nil, pathError("find pid file", path, err)
	}
	return h, nil
}

func (h *Holder) find(p place, last bool) error {
	fd, err := p.open(unix.O_RDONLY)
	if err != nil {
		return err
	}
	id, held, err := lookAt(fd)
	switch {
	case err != nil:
	case held && id.pid == 0 && !last: // about to become a holder
		err = errChanging
	case held:
		h.PID, h.id, h.fd = id.pid, id, fd
		if h.pidfd, err = id.open(); err == nil {
			return nil
		}
	case p.has(fd):
		var text []byte
		if text, err = readText(fd); err == nil {
			if err = notAnothers(fd, text, last); err == nil {
				err = ErrStale
			}
		}
	default:
		err = errChanging
	}
	unix.Close(fd)
	return err
}

// Gone reports whether the process PID has ended, or cannot be seen from here.
// As long as Wait waits, others hold the lock that it gave them; they will end by
// themselves, or have to be found by other means.
func (h *Holder) Gone() bool { return hasEnded(h.pidfd) }

// Signal sends sig to the process PID if it still lives and holds the file. Else
// the error is [os.ErrProcessDone]: no other process is ever signalled.
func (h *Holder) Signal(sig syscall.Signal) error {
	// The pidfd is of the process that Find saw and of no other. It may have
	// let go of the file since, and do something else.
	held, err := h.holds()
	switch {
	case err != nil:
	case !held || h.Gone():
		err = unix.ESRCH
	default:
		err = unix.PidfdSendSignal(h.pidfd, sig, nil, 0)
	}
	switch err {
	case nil:
		return nil
	case unix.ESRCH:
		err = os.ErrProcessDone
	case unix.EPERM:
		err = fmt.Errorf("process %d: %w: do it as its user, or as root", h.PID, err)
	}
	return pathError("signal the holder of", h.path, err)
}

// holds reports whether the lock is still this holder's. Another may have taken
// over the file.
func (h *Holder) holds() (bool, error) {
	id, held, err := lookAt(h.fd)
	return held && id == h.id, err
}

// Wait waits until nothing that held the file for the process PID lives any
// more, or until ctx is done. It doesn't wait for another that has taken over
// the file since. It takes no lock: a Create that runs meanwhile succeeds as
// soon as it can.
func (h *Holder) Wait(ctx context.Context) error {
	// The last close of a file that was open for writing is an event. The
	// kernel reports it just before it frees the lock: hence the short pause
	// after it. The long one is for what has no events, as network file
	// systems, or when the user has too many watches.
	const shortest, longest = time.Millisecond, 100 * time.Millisecond
	watch, closed := watchCloses(h.fd)
	if watch != nil {
		defer watch.Close()
	}
	for pause := shortest; ; pause = min(2*pause, longest) {
		held, err := h.holds()
		if err == nil && !held {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return pathError("wait for the holder of", h.path, err)
		}
		select {
		case <-ctx.Done():
		case <-closed:
			pause = shortest / 2
		case <-time.After(pause):
		}
	}
}

// Close frees what the Holder has open. It must not be used after that.
func (h *Holder) Close() error {
	unix.Close(h.fd)
	if h.pidfd >= 0 {
		unix.Close(h.pidfd)
	}
	h.fd, h.pidfd = -1, -1
	return nil
}

// patience is how long what takes others a moment may take. They may have been
// stopped in it.
const patience = time.Second

// patiently calls f until it returns something other than errChanging. last
// tells that it won't be called again.
func patiently(f func(last bool) error) error {
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		last := time.Now().After(end)
		if err := f(last); err != errChanging || last {
			return err
		}
	}
}

// isPID reports whether text is that of a pid file. Other programs write spaces
// around the number, or no newline.
func isPID(text []byte) bool {
	pid, err := strconv.ParseUint(string(bytes.TrimSpace(text)), 10, pidBits)
	return err == nil && pid > 0
}
