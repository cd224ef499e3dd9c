package pgroup

import (
	"encoding/binary"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// The launcher and the leader talk over a Unix stream socket pair, in records
// of one size. End of file is the news that the peer has gone: the socket is
// the lifeline of both.
//
//	launcher                                 leader
//	   │ ── config ─────────────────────────▶ │  once, before all else
//	   │ ── command first ──────────────────▶ │  which of its arguments begins it
//	   │ ── start worker, count, of all ────▶ │
//	   │ ◀──────── started worker, pid ────── │  or failed worker, errno
//	   │ ── last ───────────────────────────▶ │  no worker will be started again
//	   │ ── signal whom, sig, cont ─────────▶ │  any number of times
//	   │ ── foreground worker ──────────────▶ │  --tty: give it the terminal
//	   │ ── sweep ──────────────────────────▶ │
//	   │ ◀───────── suspended worker, sig ─── │
//	   │ ◀───────── resumed worker ────────── │
//	   │ ◀───────── received sig, sender ──── │  a signal sent to the leader
//	   │ ◀───────── refused errno, count ──── │  a signal could not be sent
//	   │ ◀───────── adopted pid ───────────── │
//	   │ ◀───────── exited worker, status ─── │  as wait(2) gives it
//	   │ ◀───────── swept killed ──────────── │
//	   │ ◀───────── empty adopted, killed ─── │  wait4(-1) said ECHILD
//	   │ ◀───────── broken step, errno ────── │  the leader can't begin
//	   │ ◀───────── end of file ───────────── │  after last and empty
//
// A leader that reads end of file before it is empty stops and sweeps by
// itself. A launcher that reads it before empty has become the parent of all
// that the leader held, and does the same.
type kind uint32

const (
	msgConfig kind = iota + 1
	msgCommand
	msgStart
	msgLast
	msgSignal
	msgForeground
	msgSweep

	msgStarted
	msgFailed
	msgSuspended
	msgResumed
	msgReceived
	msgRefused
	msgAdopted
	msgExited
	msgSwept
	msgEmpty
	msgBroken
)

// whom a signal message means.
const (
	toGroups  = iota // the workers' groups, and what is left of them
	toWorkers        // the workers alone
	toStrays         // every descendant that is in no such group
	toAll            // every descendant
)

// A message is one record. What a and b are depends on its kind.
type message struct {
	kind   kind
	worker int32 // from 1; for signal: whom
	a, b   int64
}

const messageSize = 24

func (m message) append(buf []byte) []byte {
	buf = binary.NativeEndian.AppendUint32(buf, uint32(m.kind))
	buf = binary.NativeEndian.AppendUint32(buf, uint32(m.worker))
	buf = binary.NativeEndian.AppendUint64(buf, uint64(m.a))
	return binary.NativeEndian.AppendUint64(buf, uint64(m.b))
}

func parseMessage(buf []byte) message {
	return message{
		kind:   kind(binary.NativeEndian.Uint32(buf)),
		worker: int32(binary.NativeEndian.Uint32(buf[4:])),
		a:      int64(binary.NativeEndian.Uint64(buf[8:])),
		b:      int64(binary.NativeEndian.Uint64(buf[16:])),
	}
}

// A conn is one end of the socket pair.
type conn struct {
	file *os.File
	rest []byte // of a record cut by the last read
}

// newConn returns the end that fd is. The launcher polls it: a goroutine that
// waits for it takes no thread.
func newConn(fd int, polled bool) *conn {
	unix.SetNonblock(fd, polled)
	return &conn{file: os.NewFile(uintptr(fd), "leader")}
}

// receive waits for news and returns all whole records that were there. Any
// error means that the peer has gone.
func (c *conn) receive() ([]message, error) {
	var buf [64 * messageSize]byte
	n, err := c.file.Read(buf[:])
	if err != nil {
		return nil, err
	}
	data := append(c.rest, buf[:n]...)
	var msgs []message
	for len(data) >= messageSize {
		msgs = append(msgs, parseMessage(data))
		data = data[messageSize:]
	}
	c.rest = data
	return msgs, nil
}

// send writes the messages in one system call. A peer that has gone is no
// error here: receive tells.
func (c *conn) send(msgs ...message) {
	var buf []byte
	for _, m := range msgs {
		buf = m.append(buf)
	}
	c.file.Write(buf)
}

func (c *conn) close() { c.file.Close() }

// An inbox holds what was received until its owner takes it. It has no bound:
// a launcher that stopped reading while it writes would block a leader that
// writes too.
type inbox struct {
	mu     sync.Mutex
	msgs   []message
	closed bool
	news   chan struct{} // has a token when take has something
}

func newInbox(c *conn) *inbox {
	in := &inbox{news: make(chan struct{}, 1)}
	go func() {
		for {
			msgs, err := c.receive()
			in.mu.Lock()
			in.msgs = append(in.msgs, msgs...)
			in.closed = err != nil
			in.mu.Unlock()
			select {
			case in.news <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	return in
}

// take returns what has come, and whether the peer has gone after it.
func (in *inbox) take() (msgs []message, closed bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	msgs, in.msgs = in.msgs, nil
	return msgs, in.closed
}
