package pgroup

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The launcher and the leader talk over a Unix stream socket pair, in records
// of one size. A worker is named by the number of its start, from 1 in a run.
// End of file is the news that the peer has gone: the socket is the lifeline of
// both.
//
//	launcher                                 leader
//	   │ ── config flags, sig, grace ───────▶ │  once, before all else
//	   │ ── command first ──────────────────▶ │  which of its arguments begins it
//	   │ ── file worker, number ────────────▶ │  a descriptor (SCM_RIGHTS) for that start;
//	   │                                      │  for worker 0: to be held to the end
//	   │ ── env worker, length, text ───────▶ │  variables for that start, NUL after each;
//	   │                                      │  a name alone is one to be unset
//	   │ ── start worker, place, of all ────▶ │
//	   │ ◀──────── started worker, pid ────── │  or failed worker, errno
//	   │ ── last ───────────────────────────▶ │  no worker will be started again
//	   │ ── signal worker, sig, whom, cont ─▶ │  any number of times; worker 0: all
//	   │ ── foreground on ──────────────────▶ │  --tty: give worker 1 the terminal
//	   │ ── clear worker ───────────────────▶ │  KILL to what it left behind, until cleared
//	   │ ── sweep ──────────────────────────▶ │
//	   │ ◀───────── suspended worker, sig ─── │
//	   │ ◀───────── resumed worker ────────── │
//	   │ ◀───────── received sig, sender ──── │  a signal sent to the leader
//	   │ ◀───────── refused errno, count ──── │  a signal could not be sent
//	   │ ◀───────── hungup ────────────────── │  --tty: the terminal is gone
//	   │ ◀───────── adopted pid ───────────── │
//	   │ ◀───────── exited worker, status ─── │  as wait(2) gives it
//	   │ ◀───────── cleared worker, killed ── │  after exited: nothing of it is left
//	   │ ◀───────── swept killed ──────────── │
//	   │ ◀───────── empty adopted, killed ─── │  wait4(-1) said ECHILD: all are cleared
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
	msgFile
	msgEnv
	msgStart
	msgLast
	msgSignal
	msgForeground
	msgClear
	msgSweep

	msgStarted
	msgFailed
	msgSuspended
	msgResumed
	msgReceived
	msgRefused
	msgHungUp
	msgAdopted
	msgExited
	msgCleared
	msgSwept
	msgEmpty
	msgBroken
)

// whom a signal message means.
const (
	toGroups  = iota // the workers' groups, and what is left of them
	toWorkers        // the workers alone
	toRemains        // what an ended worker left behind
	toStrays         // every descendant that is in no such group
	toAll            // every descendant
)

// signalMessage sends sig to whom of one worker, or of all if that is 0, and
// then CONT if cont is set.
func signalMessage(worker, whom int, sig syscall.Signal, cont bool) message {
	m := message{kind: msgSignal, worker: int32(worker), a: int64(sig), b: int64(whom) << 1}
	if cont {
		m.b |= 1
	}
	return m
}

func parseWhom(b int64) (whom int, cont bool) { return int(b >> 1), b&1 != 0 }

// A message is one record. What a and b are depends on its kind.
type message struct {
	kind   kind
	worker int32
	a, b   int64
	text   string // env
	fd     int    // file: -1 if it was lost, since the leader has too many open
}

const (
	messageSize = 24
	maxText     = 1 << 20
)

func (m message) append(buf []byte) []byte {
	buf = binary.NativeEndian.AppendUint32(buf, uint32(m.kind))
	buf = binary.NativeEndian.AppendUint32(buf, uint32(m.worker))
	buf = binary.NativeEndian.AppendUint64(buf, uint64(m.a))
	buf = binary.NativeEndian.AppendUint64(buf, uint64(m.b))
	return append(buf, m.text...)
}

// parseMessage parses the record that buf begins with, and returns what follows
// it; ok is false if the record isn't whole.
func parseMessage(buf []byte) (m message, rest []byte, ok bool) {
	if len(buf) < messageSize {
		return m, buf, false
	}
	m = message{
		kind:   kind(binary.NativeEndian.Uint32(buf)),
		worker: int32(binary.NativeEndian.Uint32(buf[4:])),
		a:      int64(binary.NativeEndian.Uint64(buf[8:])),
		b:      int64(binary.NativeEndian.Uint64(buf[16:])),
	}
	size := messageSize
	if m.kind == msgEnv {
		size += int(min(max(m.a, 0), maxText))
	}
	if len(buf) < size {
		return m, buf, false
	}
	m.text = string(buf[messageSize:size])
	return m, buf[size:], true
}

// envMessage carries variables for a start of worker.
func envMessage(worker int, env []string) message {
	text := ""
	for _, e := range env {
		text += e + "\x00"
	}
	return message{kind: msgEnv, worker: int32(worker), a: int64(len(text)), text: text}
}

// A conn is one end of the socket pair.
type conn struct {
	file *os.File
	raw  syscall.RawConn
	buf  []byte
	rest []byte // of a record cut by the last read
	fds  []int  // received, whose records have not been
}

// newConn returns the end that fd is. The launcher polls it: a goroutine that
// waits for it takes no thread.
func newConn(fd int, polled bool) *conn {
	unix.SetNonblock(fd, polled)
	c := &conn{file: os.NewFile(uintptr(fd), "leader")}
	c.raw, _ = c.file.SyscallConn()
	return c
}

// maxFDs is how many descriptors one message can carry (SCM_MAX_FD in unix(7)).
const maxFDs = 253

// receive waits for news and returns all whole records that were there. Any
// error means that the peer has gone.
func (c *conn) receive() ([]message, error) {
	if c.buf == nil {
		// As much as the descriptors of one message can come with: if some are
		// lost, the records that they were for are in the same read.
		c.buf = make([]byte, 1<<15)
	}
	var oob [4*maxFDs + 16]byte // CmsgSpace
	var n, oobn, flags int
	var err error
	rerr := c.raw.Read(func(fd uintptr) bool {
		err = retry(func() (err error) {
			n, oobn, flags, _, err = unix.Recvmsg(int(fd), c.buf, oob[:], unix.MSG_CMSG_CLOEXEC)
			return err
		})
		return err != unix.EAGAIN
	})
	if rerr != nil || err != nil {
		return nil, errors.Join(rerr, err)
	}
	if n == 0 {
		return nil, io.EOF
	}
	c.fds = append(c.fds, parseRights(oob[:oobn])...)
	if flags&unix.MSG_CTRUNC != 0 { // which ones are missing is not known
		closeAll(c.fds)
		c.fds = nil
	}
	data := append(c.rest, c.buf[:n]...)
	var msgs []message
	for {
		m, rest, ok := parseMessage(data)
		if !ok {
			c.rest = append([]byte(nil), rest...)
			return msgs, nil
		}
		if m.kind == msgFile {
			m.fd = -1
			if len(c.fds) > 0 {
				m.fd, c.fds = c.fds[0], c.fds[1:]
			}
		}
		msgs, data = append(msgs, m), rest
	}
}

// pending reports whether more has come already.
func (c *conn) pending() (more bool) {
	c.raw.Control(func(fd uintptr) {
		n, _ := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
		more = n > 0
	})
	return more
}

// parseRights returns the descriptors in the control data of a message.
func parseRights(oob []byte) (fds []int) {
	msgs, _ := unix.ParseSocketControlMessage(oob)
	for _, m := range msgs {
		more, _ := unix.ParseUnixRights(&m)
		fds = append(fds, more...)
	}
	return fds
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// send writes the messages, in one system call if the socket takes them, and the
// descriptors of their files with them, which stay ours. A peer that has gone is
// no error here: receive tells.
func (c *conn) send(msgs ...message) {
	var buf []byte
	var fds []int
	for i, m := range msgs {
		buf = m.append(buf)
		if m.kind == msgFile {
			fds = append(fds, m.fd)
		}
		if len(fds) == maxFDs || i == len(msgs)-1 {
			c.write(buf, fds)
			buf, fds = nil, nil
		}
	}
}

func (c *conn) write(buf []byte, fds []int) {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for len(buf) > 0 {
		var n int
		var err error
		werr := c.raw.Write(func(fd uintptr) bool {
			err = retry(func() (err error) {
				n, err = unix.SendmsgN(int(fd), buf, oob, nil, unix.MSG_NOSIGNAL)
				return err
			})
			return err != unix.EAGAIN
		})
		switch {
		case err == unix.ETOOMANYREFS: // too many under way (unix(7)): it will take some
			time.Sleep(time.Millisecond)
			continue
		case werr != nil || err != nil:
			return
		}
		buf, oob = buf[n:], nil
	}
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
