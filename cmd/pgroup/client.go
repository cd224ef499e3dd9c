package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"pgroup/pidfile"
)

// The statuses of the verbs that act on a running launcher, as the Linux
// Standard Base has them for init scripts ("Init Script Actions").
const (
	failed       = 1
	badUsage     = 2
	notPermitted = 4
	notRunning   = 7
)

// A failure is an error with an exit status of its own.
type failure struct {
	status int
	error
}

func (f failure) Unwrap() error { return f.error }

// pidfileFlag is the flag of the verbs that act on a running launcher.
type pidfileFlag struct {
	Pidfile string `short:"p" required:"" placeholder:"PATH" help:"The pid file of the run."`
}

// find returns the launcher that holds the pid file. Without one, the error has
// its status.
func (f *pidfileFlag) find() (*pidfile.Holder, error) {
	h, err := findHolder(f.Pidfile)
	switch {
	case isNotRunning(err):
		return nil, failure{notRunning, fmt.Errorf("%w; start it first", err)}
	case err != nil:
		return nil, err
	case h.Gone():
		h.Close()
		return nil, failure{notRunning, fmt.Errorf("pgroup (pid %d) was killed; what it started is being stopped", h.PID)}
	}
	return h, nil
}

// findHolder finds who holds the pid file, if it says who it is.
func findHolder(path string) (*pidfile.Holder, error) {
	h, err := pidfile.Find(path)
	if err == nil && h.PID == 0 {
		h.Close()
		return nil, fmt.Errorf("%s is locked by a program that is no pgroup: see lslocks(8)", path)
	}
	return h, err
}

func isNotRunning(err error) bool {
	return errors.Is(err, pidfile.ErrNotRunning) || errors.Is(err, pidfile.ErrStale)
}

// ask sends the launcher of the pid file one request, and waits for what it says:
// as long as the request allows, and a little longer.
func (f *pidfileFlag) ask(q request) error {
	h, err := f.find()
	if err != nil {
		return err
	}
	defer h.Close()
	limit := time.Time{}
	if q.Wait != nil && *q.Wait > 0 {
		limit = time.Now().Add(seconds(*q.Wait) + answerTime)
	}
	s, err := dial(f.Pidfile, h.PID)
	if err != nil {
		return err
	}
	defer s.close()
	_, err = s.ask(q, limit)
	return err
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// answerTime is how long a launcher may take that need not wait for anything.
const answerTime = 5 * time.Second

// A session is the client's end of a control socket.
type session struct {
	conn  *net.UnixConn
	lines *bufio.Reader
}

// dial connects to the control socket of the launcher pid, and of no other: in
// /tmp, anybody could have made a socket.
func dial(path string, pid int) (*session, error) {
	path = socketPath(path)
	dir, err := openDir(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	conn, err := net.DialTimeout("unix", socketName(dir, filepath.Base(path)), answerTime)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err // it names the path in its own way
		}
		return nil, &fs.PathError{Op: "connect to", Path: path, Err: err}
	}
	s := &session{conn: conn.(*net.UnixConn)}
	s.lines = bufio.NewReader(s.conn)
	cred, err := peer(s.conn)
	if err == nil && int(cred.Pid) != pid {
		err = fmt.Errorf("it belongs to process %d, and not to the holder of the pid file, %d", cred.Pid, pid)
	}
	if err != nil {
		s.close()
		return nil, &fs.PathError{Op: "connect to", Path: path, Err: err}
	}
	return s, nil
}

func (s *session) close() { s.conn.Close() }

var errEnded = errors.New("pgroup ended before it answered")

// isChanging reports whether err is that of asking a launcher which may be about to
// open its socket, or to end: who looks again will know.
func isChanging(err error) bool {
	return errors.Is(err, errEnded) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)
}

// A refusal is the launcher's error.
type refusal struct{ reason string }

func (r refusal) Error() string { return r.reason }

// ask sends q and returns the reply, until limit (none if zero).
func (s *session) ask(q request, limit time.Time) (r reply, err error) {
	line, err := json.Marshal(q)
	if err != nil {
		return r, err
	}
	s.conn.SetDeadline(limit)
	if _, err = s.conn.Write(append(line, '\n')); err == nil {
		line, err = s.lines.ReadBytes('\n')
	}
	s.conn.SetDeadline(time.Time{})
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE):
		return r, errEnded
	case err != nil:
		return r, fmt.Errorf("pgroup doesn't answer: %w", err)
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return r, fmt.Errorf("pgroup answers %q: %w", line, err)
	}
	if r.Error != "" {
		return r, refusal{r.Error}
	}
	return r, nil
}
