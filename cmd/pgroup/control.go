package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pgroup/pgroup"
)

// The control socket is how other processes ask a launcher that holds a pid
// file: a Unix stream socket at the pid file's path and ".sock", of mode 0600.
// It serves processes of the launcher's user and of root. Both sides write one
// JSON object a line. A client may ask again on the same connection.
//
//	client                                      launcher
//	   │ ── {"do":"status"} ─────────────────────▶ │
//	   │ ◀───────── {"ok":true,"status":{…}} ───── │  pgroup.Status
//	   │ ── {"do":"ready"} ──────────────────────▶ │
//	   │ ◀───────── {"ok":true} ────────────────── │  when all workers have been ready
//	   │ ── {"do":"scale","workers":N,"wait":S} ─▶ │
//	   │ ◀───────── {"ok":true} ────────────────── │  when done, within S seconds (60)
//	   │ ── {"do":"reload","wait":S} ────────────▶ │
//	   │ ◀───────── {"ok":true} ────────────────── │  when done, within S seconds (60)
//	   │ ── {"do":"events"} ─────────────────────▶ │  the last request of a connection
//	   │ ◀───────── {"ok":true} ────────────────── │
//	   │ ◀───────── {"time":…,"event":…} ───────── │  each event from here on, as --events has it;
//	   │ ◀───────── {"time":…,"event":"lost",…} ── │  "count" of them were lost: read faster
//	   │ ◀───────── end of file ────────────────── │  after the event "end"
//	   │                                           │
//	   │ ◀───────── {"error":"…"} ──────────────── │  instead of {"ok":true}
//
// A line that is no object, or longer than 64 KiB, ends the connection. A client that leaves does not undo what it asked
// for. End of file in place of an answer: the launcher has ended, or had more
// clients than it serves at once, and this one had asked nothing for longest.
type request struct {
	Do      string   `json:"do"`
	Workers int      `json:"workers,omitempty"`
	Wait    *float64 `json:"wait,omitempty"` // seconds; 0: no limit
}

type reply struct {
	OK     bool           `json:"ok,omitempty"`
	Error  string         `json:"error,omitempty"`
	Status *pgroup.Status `json:"status,omitempty"`
}

const (
	maxClients   = 64
	maxFollowers = 32 // of the events, so that there is room for others
	maxRequest   = 64 << 10
	followQueue  = 4096 // events that wait for a slow reader; more are lost
	replyTime    = 10 * time.Second
	followDrain  = time.Second // how long the end waits for slow readers
)

// socketPath is that of the control socket beside a pid file.
func socketPath(pidfile string) string { return pidfile + ".sock" }

// A control is the launcher's end.
type control struct {
	listener *net.UnixListener
	path     string   // as given
	dir      *os.File // of the socket, wherever this process moves
	name     string
	file     os.FileInfo // the socket as we made it

	run  *pgroup.Run
	stop context.CancelFunc
	ctx  context.Context
	busy sync.WaitGroup // connections

	mu        sync.Mutex
	clients   []*client // those that asked nothing for longest first
	followers int
	limit     int
	closed    bool
}

// A client is one connection.
type client struct {
	conn   *net.UnixConn
	asking bool        // it waits for our answer
	events chan []byte // nil if it doesn't follow
	lost   int
}

// listenControl opens the socket of a launcher that has the lock of the pid file:
// a socket that is there is a killed one's.
func listenControl(pidfile string) (c *control, err error) {
	path := socketPath(pidfile)
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot open control socket: %w", &os.PathError{Op: "listen on", Path: path, Err: err})
		}
	}()
	c = &control{path: path, name: filepath.Base(path), limit: clientLimit()}
	c.ctx, c.stop = context.WithCancel(context.Background())
	if c.dir, err = openDir(path); err != nil {
		return nil, err
	}
	if err = c.removeStale(); err == nil {
		err = c.listen()
	}
	if err != nil {
		c.dir.Close()
		return nil, err
	}
	return c, nil
}

// clientLimit leaves most of the descriptors to the run.
func clientLimit() int {
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) != nil {
		return 1
	}
	return int(min(maxClients, max(1, r.Cur/8)))
}

func openDir(path string) (*os.File, error) {
	return os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
}

// maxSocketName is how many bytes the address of a socket has room for, but for a
// NUL (unix(7)).
const maxSocketName = 107

// socketName is a short name for what is called name in dir.
func socketName(dir *os.File, name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name)
}

func (c *control) stat() (os.FileInfo, error) { return os.Lstat(socketName(c.dir, c.name)) }

func (c *control) removeStale() error {
	info, err := c.stat()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	owner := int(info.Sys().(*syscall.Stat_t).Uid)
	if info.Mode().Type() != os.ModeSocket || owner != os.Geteuid() {
		return errors.New("another file has that name: remove it, or choose another pid file")
	}
	// A launcher that was killed may still be about to close its descriptors, of
	// which the lock was one.
	for end := time.Now().Add(patience); c.answers(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			return errors.New("another program listens there: end it, or choose another pid file")
		}
	}
	return unix.Unlinkat(int(c.dir.Fd()), c.name, 0)
}

// answers reports whether somebody listens at the socket. Nobody does where
// connect(2) is refused: an error of any other kind comes from a socket that lives.
func (c *control) answers() bool {
	conn, err := net.DialTimeout("unix", socketName(c.dir, c.name), answerTime)
	if err == nil {
		conn.Close()
	}
	return !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT)
}

func (c *control) listen() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), "control")
	defer file.Close()
	// bind(2) gives the file the mode of the socket (unix(7)), less the umask:
	// so there is no moment in which others may connect.
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return err
	}
	name := socketName(c.dir, c.name)
	if abs, err := filepath.Abs(c.path); err == nil && len(abs) <= maxSocketName {
		name = abs // what ss(8) shows
	}
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: name})
	if err == unix.EINVAL || err == unix.ENAMETOOLONG {
		err = fmt.Errorf("%w: give the pid file a shorter name", err)
	}
	if err != nil {
		return err
	}
	if c.file, err = c.stat(); err == nil {
		if err = unix.Listen(fd, unix.SOMAXCONN); err == nil {
			var l net.Listener
			if l, err = net.FileListener(file); err == nil {
				c.listener = l.(*net.UnixListener)
				c.listener.SetUnlinkOnClose(false)
				return nil
			}
		}
		c.unlink()
	}
	return err
}

// unlink removes the socket if it is still ours.
func (c *control) unlink() {
	if info, err := c.stat(); err == nil && os.SameFile(info, c.file) {
		unix.Unlinkat(int(c.dir.Fd()), c.name, 0)
	}
}

// serve begins to answer, for the run.
func (c *control) serve(run *pgroup.Run) {
	c.run = run
	go func() {
		for {
			conn, err := c.listener.AcceptUnix()
			switch {
			case errors.Is(err, net.ErrClosed):
				return
			case err != nil: // no descriptor
				time.Sleep(100 * time.Millisecond)
			case !mayAsk(conn):
				conn.Close()
			default:
				c.admit(conn)
			}
		}
	}()
}

// mayAsk reports whether the peer is of our user, or root.
func mayAsk(conn *net.UnixConn) bool {
	cred, err := peer(conn)
	return err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
}

// peer returns who connected or, to who has, who listens (SO_PEERCRED in
// unix(7)).
func peer(conn *net.UnixConn) (cred *unix.Ucred, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return cred, errors.Join(cerr, err)
}

// admit takes in a new client. If there are too many, the one that has asked
// nothing for longest has to go.
func (c *control) admit(conn *net.UnixConn) {
	cl := &client{conn: conn}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		conn.Close()
		return
	}
	if len(c.clients) >= c.limit {
		i := slices.IndexFunc(c.clients, func(cl *client) bool { return !cl.asking && (cl.events == nil || hasLeft(cl.conn)) })
		if i < 0 {
			conn.Close()
			return
		}
		c.clients[i].conn.Close() // its goroutine sees it
		c.unfollow(c.clients[i])
		c.clients = slices.Delete(c.clients, i, i+1)
	}
	c.clients = append(c.clients, cl)
	c.busy.Go(func() {
		c.talk(cl)
		conn.Close()
		c.forget(cl)
	})
}

func (c *control) forget(cl *client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.Index(c.clients, cl); i >= 0 {
		c.clients = slices.Delete(c.clients, i, i+1)
	}
}

// setAsking notes whether the client waits for an answer, and that it has asked.
func (c *control) setAsking(cl *client, asking bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cl.asking = asking
	if i := slices.Index(c.clients, cl); i >= 0 {
		c.clients = append(slices.Delete(c.clients, i, i+1), cl)
	}
}

// hasLeft reports whether the peer has closed its end: a follower of events is
// not read from.
func hasLeft(conn *net.UnixConn) (left bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		unix.Poll(fds, 0)
		left = fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return left || err != nil
}

// talk serves one client until it leaves.
func (c *control) talk(cl *client) {
	lines := bufio.NewReaderSize(cl.conn, 4096)
	for {
		line, err := readLine(lines)
		if err == errTooLong {
			c.answer(cl, reply{Error: err.Error()})
		}
		if err != nil {
			return
		}
		c.setAsking(cl, true)
		var q request
		if err := json.Unmarshal(line, &q); err != nil {
			c.answer(cl, reply{Error: "no request: " + err.Error()})
			return
		}
		if q.Do == "events" {
			c.follow(cl)
			return
		}
		r := reply{OK: true}
		if err := c.do(q, &r); err != nil {
			r = reply{Error: err.Error()}
		}
		if c.answer(cl, r) != nil {
			return
		}
		c.setAsking(cl, false)
	}
}

var errTooLong = fmt.Errorf("no request: a line has at most %d bytes", maxRequest)

// readLine reads one request.
func readLine(r *bufio.Reader) (line []byte, err error) {
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > maxRequest {
			return nil, errTooLong
		}
		line = append(line, part...)
		if err != bufio.ErrBufferFull {
			return line, err
		}
	}
}

func (c *control) answer(cl *client, r reply) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	cl.conn.SetWriteDeadline(time.Now().Add(replyTime))
	_, err = cl.conn.Write(append(line, '\n'))
	cl.conn.SetWriteDeadline(time.Time{})
	return err
}

// do does what is asked.
func (c *control) do(q request, r *reply) error {
	ctx, cancel := limited(c.ctx, q.Wait)
	defer cancel()
	switch q.Do {
	case "status":
		s, err := c.run.Status()
		r.Status = &s
		return err
	case "ready":
		s, err := c.run.Status()
		if err == nil && s.State == "stopping" {
			err = pgroup.ErrStopped
		}
		if err != nil {
			return err
		}
		select {
		case <-c.run.Ready():
			return nil
		case <-c.run.Done():
			return pgroup.ErrOver
		}
	case "scale":
		if q.Workers > maxWorkers {
			return fmt.Errorf("cannot scale to %d workers: the most are %d", q.Workers, maxWorkers)
		}
		return inTime(c.run.Scale(ctx, q.Workers))
	case "reload":
		return inTime(c.run.Reload(ctx))
	}
	return fmt.Errorf("no request: %q is none of status, ready, scale, reload and events", q.Do)
}

// changeTime is how long a scale or reload may take, if the request doesn't say.
const changeTime = 60 * time.Second

func limited(ctx context.Context, seconds *float64) (context.Context, context.CancelFunc) {
	limit := changeTime
	if seconds != nil {
		limit = time.Duration(min(*seconds, math.MaxInt32) * float64(time.Second))
	}
	if limit <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, limit)
}

func inTime(err error) error {
	switch err {
	case context.DeadlineExceeded:
		return errors.New("the new workers were not ready in time")
	case context.Canceled:
		return pgroup.ErrOver
	}
	return err
}

// follow sends events until the client leaves or the run ends.
func (c *control) follow(cl *client) {
	events := make(chan []byte, followQueue)
	c.mu.Lock()
	if c.followers >= min(maxFollowers, (c.limit+1)/2) {
		// Those that have left are not noticed before there is an event.
		for _, other := range c.clients {
			if other.events != nil && hasLeft(other.conn) {
				other.conn.Close()
				c.unfollow(other)
			}
		}
	}
	if c.followers >= min(maxFollowers, (c.limit+1)/2) {
		c.mu.Unlock()
		c.answer(cl, reply{Error: "too many follow the events already"})
		return
	}
	c.followers++
	cl.events, cl.asking = events, false
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.unfollow(cl)
		c.mu.Unlock()
	}()
	if c.answer(cl, reply{OK: true}) != nil {
		return
	}
	for {
		lost := 0
		c.mu.Lock()
		if len(events) == 0 { // what was lost comes after what waits
			lost, cl.lost = cl.lost, 0
		}
		c.mu.Unlock()
		if lost > 0 {
			if _, err := fmt.Fprintf(cl.conn, `{"time":%q,"event":"lost","count":%d}`+"\n", time.Now().Format(time.RFC3339Nano), lost); err != nil {
				return
			}
		}
		line, more := <-events
		if !more {
			return
		}
		if _, err := cl.conn.Write(line); err != nil {
			return
		}
	}
}

// unfollow ends the events of a client. The caller has c.mu.
func (c *control) unfollow(cl *client) {
	if cl.events != nil {
		close(cl.events)
		cl.events = nil
		c.followers--
	}
}

// event takes one event for all that follow. It does not block.
func (c *control) event(e pgroup.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.followers == 0 {
		return
	}
	line, _ := e.MarshalJSON()
	line = append(line, '\n')
	for _, cl := range c.clients {
		switch {
		case cl.events == nil:
		case cl.lost > 0 || len(cl.events) == cap(cl.events):
			cl.lost++ // until it has caught up, so that it knows where
		default:
			cl.events <- line
		}
	}
}

// close lets the followers have their last events, if they are not too slow for
// it. What is still connected then ends with this process.
func (c *control) close() {
	c.unlink()
	c.stop()
	c.listener.Close()
	c.mu.Lock()
	c.closed = true
	for _, cl := range c.clients {
		cl.conn.SetReadDeadline(time.Unix(1, 0))
		c.unfollow(cl)
	}
	c.mu.Unlock()
	done := make(chan struct{})
	go func() {
		c.busy.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(followDrain):
	}
}
