package pgroup

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A channel is the launcher's end of a worker's message channel: a Unix stream
// socket pair with one JSON value a line, both ways, as Node's child_process has
// it. An object whose "cmd" begins with NODE_ is Node's own business and reaches
// no user:
//
//	launcher                                  worker
//	   │ ── {"any":"value"} ──────────────────▶ │  'message'
//	   │ ◀────────────────── {"any":"value"} ── │  process.send()
//	   │ ── NODE_HANDLE, and a descriptor ────▶ │  what follows waits …
//	   │ ◀────────────────── NODE_HANDLE_ACK ── │  … until it has it
//	   │ ◀───────────────── NODE_HANDLE_NACK ── │  or has not: no descriptor free
//	   │ ◀────── NODE_HANDLE, and one of its ── │  we take none:
//	   │ ── NODE_HANDLE_NACK ─────────────────▶ │  it warns, and goes on
//	   │ ◀──────────────────── NODE_CLUSTER ──▶ │  nodecluster.go
//	   │ ◀──────────────────── end of file ───▶ │  'disconnect'
//
// A worker may send anything, or nothing, or never read. What that costs is
// bounded, and nobody waits for it: a line that is no JSON, or is longer than
// maxLine, ends the channel (and not the worker), and a message to a worker that
// has maxQueue of them to read is refused.
type channel struct {
	file *os.File // polled: a goroutine that waits for it takes no thread
	raw  syscall.RawConn

	mu      sync.Mutex
	closed  bool
	queue   []outgoing
	cost    int  // of the queue
	waiting bool // something will call pump again
	// A handle was sent, and there is no answer yet.
	unanswered bool
	refused    func()
	fault      error // why we ended it
}

// maxLine is the longest message in bytes, with its newline.
const maxLine = 16 << 20

// maxQueue is how many bytes may wait for a worker to read them, where each
// message counts lineCost more than it has. An empty queue takes any message.
// What Node's primary has to say comes on top: it is said in answer, so a
// worker can ask for no more than nodeQueue of it unread.
const (
	maxQueue  = 16 << 20
	nodeQueue = 1 << 20
	lineCost  = 256
)

// What a channel's errors are, in the sense of errors.Is.
var (
	ErrNotJSON       = errors.New("not JSON")
	ErrLineTooLong   = fmt.Errorf("longer than %d bytes", maxLine)
	ErrChannelFull   = errors.New("the other end does not read its messages")
	ErrChannelClosed = errors.New("the channel is closed")
)

// An outgoing is a line that was not written yet, or not all of it.
type outgoing struct {
	line    []byte
	cost    int
	fd      int    // -1 if none comes with it
	refused func() // fd did not arrive
}

// newChannel returns the channel and the worker's end of it, which blocks: Node
// changes that itself, and a shell or Python wants it. What is ours is closed when
// serve returns.
func newChannel() (c *channel, worker *os.File, err error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	unix.SetNonblock(ours, true)
	c = &channel{file: os.NewFile(uintptr(ours), "channel")}
	c.raw, err = c.file.SyscallConn()
	return c, os.NewFile(uintptr(theirs), "channel"), err
}

// serve calls message for each line that the worker sends, internal or the
// user's, until it ends the channel, or close is called and what had been sent
// by then is read. An error is what the worker did wrong. The line is message's
// to keep.
//
// A descriptor that the worker sends is never received: the kernel closes what a
// plain read(2) leaves behind (unix(7)).
func (c *channel) serve(message func(line []byte, internal bool)) error {
	defer c.file.Close()
	defer c.close()
	in := lineReader{r: c.file}
	for {
		line, err := in.next()
		if err != nil {
			return c.violation(err)
		}
		switch cmd := internalCommand(line); cmd {
		case "":
			message(bytes.Clone(line), false)
		case "NODE_HANDLE":
			c.sendInternal([]byte(`{"cmd":"NODE_HANDLE_NACK"}`))
		case "NODE_HANDLE_ACK", "NODE_HANDLE_NACK":
			c.answered(cmd == "NODE_HANDLE_ACK")
		default:
			message(bytes.Clone(line), true)
		}
	}
}

// violation returns err if it is more than the end of the channel, or why we
// ended that. A peer that leaves what we sent unread gives us ECONNRESET.
func (c *channel) violation(err error) error {
	if errors.Is(err, ErrNotJSON) || errors.Is(err, ErrLineTooLong) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fault
}

// send sends a message, or queues it: it does not block. ErrChannelFull leaves
// the channel as it is: the worker may have a lot to do.
func (c *channel) send(line []byte) error {
	switch {
	case len(line) >= maxLine:
		return ErrLineTooLong
	case bytes.IndexByte(line, '\n') >= 0 || !json.Valid(line):
		return ErrNotJSON // a Node worker would die of it
	}
	return c.push(outgoing{line: line, fd: -1}, maxQueue)
}

// sendInternal sends what is Node's. Where there is no room, the worker won't
// read the answer to what it asked for: the channel ends.
func (c *channel) sendInternal(line []byte) error {
	err := c.push(outgoing{line: line, fd: -1}, maxQueue+nodeQueue)
	if err != nil {
		c.fail(err)
	}
	return err
}

// sendHandle sends line, a NODE_HANDLE, and the descriptor in one sendmsg(2), and
// closes fd, in any case. refused is called if the worker says that it did not
// get it, which is what happens when it has no number free for it.
func (c *channel) sendHandle(line []byte, fd int, refused func()) error {
	err := c.push(outgoing{line: line, fd: fd, refused: refused}, maxQueue+nodeQueue)
	if err != nil {
		unix.Close(fd)
	}
	return err
}

// sendCopy sends a descriptor that stays the caller's.
func (c *channel) sendCopy(line []byte, fd int, refused func()) error {
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return err
	}
	return c.sendHandle(line, fd, refused)
}

func (c *channel) push(o outgoing, limit int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	o.cost = len(o.line) + lineCost
	switch {
	case c.closed:
		return ErrChannelClosed
	case len(c.queue) > 0 && c.cost+o.cost > limit:
		return ErrChannelFull
	}
	o.line = append(o.line[:len(o.line):len(o.line)], '\n')
	c.queue = append(c.queue, o)
	c.cost += o.cost
	c.pumpSoon()
	return nil
}

// pumpSoon writes what can be written, and has the rest written later. c.mu is
// held.
func (c *channel) pumpSoon() {
	if c.waiting || c.closed {
		return
	}
	var err error
	c.raw.Control(func(fd uintptr) { err = c.pump(int(fd)) })
	switch err {
	case nil:
	case unix.EAGAIN:
		c.waiting = true
		go c.pumpWhenWritable()
	case unix.ETOOMANYREFS, unix.ENOBUFS, unix.ENOMEM:
		// Too many descriptors of this user are on their way (unix(7)), or no
		// memory: nothing tells when that is over.
		c.waiting = true
		time.AfterFunc(10*time.Millisecond, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.waiting = false
			c.pumpSoon()
		})
	default:
		c.discard() // the worker has gone: serve reads the end of file
	}
}

func (c *channel) pumpWhenWritable() {
	c.raw.Write(func(fd uintptr) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.pump(int(fd)) == unix.EAGAIN {
			return false // wait
		}
		c.waiting = false
		c.pumpSoon() // for any other error
		return true
	})
}

// pump writes the queue until it is empty, a handle waits for its answer, or
// there is an error. c.mu is held.
func (c *channel) pump(fd int) error {
	for len(c.queue) > 0 && !c.unanswered {
		o := &c.queue[0]
		var rights []byte
		if o.fd >= 0 {
			rights = unix.UnixRights(o.fd)
		}
		n := 0
		err := retry(func() (err error) {
			n, err = unix.SendmsgN(fd, o.line, rights, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			return err
		})
		if err != nil {
			return err
		}
		o.line = o.line[n:]
		if o.fd >= 0 { // it went with the first byte
			unix.Close(o.fd)
			o.fd = -1
		}
		if len(o.line) == 0 {
			c.unanswered, c.refused = o.refused != nil, o.refused
			c.cost -= o.cost
			c.queue[0] = outgoing{}
			c.queue = c.queue[1:]
		}
	}
	return nil
}

// answered takes the answer to a handle.
func (c *channel) answered(arrived bool) {
	c.mu.Lock()
	refused := c.refused
	c.unanswered, c.refused = false, nil
	c.pumpSoon()
	c.mu.Unlock()
	if !arrived && refused != nil {
		refused()
	}
}

// discard drops what was not sent. c.mu is held.
func (c *channel) discard() {
	for _, o := range c.queue {
		if o.fd >= 0 {
			unix.Close(o.fd)
		}
	}
	c.closed, c.queue, c.cost = true, nil, 0
}

// fail ends the channel for what the worker did wrong, if nobody has ended it.
func (c *channel) fail(err error) {
	c.mu.Lock()
	if !c.closed {
		c.fault = err
	}
	c.mu.Unlock()
	c.close()
}

// close ends the channel both ways: serve returns when it has read what the
// worker had sent. What the worker was not sent yet is lost. It is for a worker
// that has ended too: something that it left behind may hold its end.
func (c *channel) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.discard()
	c.raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
}

// internalCommand returns the "cmd" of a message that is Node's own, "" for any
// other.
func internalCommand(line []byte) string {
	const prefix = "NODE_"
	if !bytes.Contains(line, []byte(prefix)) && !bytes.Contains(line, []byte(`\u`)) {
		return "" // the usual case
	}
	var fields map[string]json.RawMessage // a struct would take "CMD" as well
	var cmd string
	json.Unmarshal(line, &fields)
	json.Unmarshal(fields["cmd"], &cmd)
	if !strings.HasPrefix(cmd, prefix) || cmd == prefix {
		return ""
	}
	return cmd
}

// A lineReader cuts a stream into lines. Its buffer grows with the longest one.
type lineReader struct {
	r       io.Reader
	buf     []byte
	start   int // of the next line
	scanned int // there is no newline between start and here
}

// next returns the next line without its newline, valid until the next call. It
// is JSON, and at most maxLine long. What comes before an end of file with no
// newline is lost: it was cut short.
func (l *lineReader) next() ([]byte, error) {
	for {
		n := bytes.IndexByte(l.buf[l.scanned:], '\n')
		if n >= 0 {
			line := l.buf[l.start : l.scanned+n]
			l.start = l.scanned + n + 1
			l.scanned = l.start
			if len(line) >= maxLine {
				return nil, ErrLineTooLong
			}
			if !json.Valid(line) {
				return nil, fmt.Errorf("%w: %q", ErrNotJSON, line[:min(len(line), 80)])
			}
			return line, nil
		}
		l.scanned = len(l.buf)
		if len(l.buf)-l.start >= maxLine {
			return nil, ErrLineTooLong
		}
		if err := l.fill(); err != nil {
			return nil, err
		}
	}
}

func (l *lineReader) fill() error {
	const usual = 4096
	if l.start > 0 {
		l.buf = l.buf[:copy(l.buf, l.buf[l.start:])]
		l.scanned -= l.start
		l.start = 0
	}
	switch {
	case len(l.buf) == 0 && cap(l.buf) > 16*usual:
		l.buf = nil // a long line came once
		fallthrough
	case len(l.buf) == cap(l.buf):
		bigger := make([]byte, len(l.buf), max(usual, 2*len(l.buf)))
		copy(bigger, l.buf)
		l.buf = bigger
	}
	n, err := l.r.Read(l.buf[len(l.buf):cap(l.buf)])
	l.buf = l.buf[:len(l.buf)+n]
	if n > 0 {
		return nil // the error comes again
	}
	return err
}
