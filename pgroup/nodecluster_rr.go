package pgroup

import (
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Round robin: the primary accepts, and gives each connection to the worker that
// has been free for the longest time. A worker is free when it has answered for
// the last connection. While none is free nothing is accepted: connections wait
// in the kernel's queue, which is bounded by the server's own backlog.

// An offer is a connection that a worker was sent. We keep it until the worker
// has accepted it.
type offer struct {
	socket *nodeSocket
	fd     int
}

// refusedPause is how long a worker gets no connection after one that it refused
// or that did not arrive. It is at its maxConnections, or its limit of open
// files: without a pause the same connection would go to and fro.
const refusedPause = 20 * time.Millisecond

// startAccepting has connections to s accepted.
func (p *primary) startAccepting(s *nodeSocket) (err error) {
	s.file, s.wake = os.NewFile(uintptr(s.fd), s.key), make(chan struct{}, 1)
	if s.raw, err = s.file.SyscallConn(); err != nil {
		return err
	}
	go p.accept(s)
	return nil
}

// accept owns the accepting end of s until that is closed.
func (p *primary) accept(s *nodeSocket) {
	for range s.wake {
		for p.wants(s) {
			var fd int
			var err error
			closed := s.raw.Read(func(l uintptr) bool {
				fd, _, err = unix.Accept4(int(l), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
				return err != unix.EAGAIN // wait
			})
			switch {
			case closed != nil:
				return
			case err == nil:
				p.accepted(s, fd)
			case err == unix.EMFILE || err == unix.ENFILE || err == unix.ENOBUFS || err == unix.ENOMEM:
				time.Sleep(refusedPause) // the connection waits in its queue
			}
			// Any other error is the connection's own (accept(2)).
		}
	}
}

// wants reports whether a worker is free for a connection that is not here yet.
func (p *primary) wants(s *nodeSocket) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(s.free) > 0 && len(s.connections) == 0
}

func (p *primary) accepted(s *nodeSocket, fd int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.closed {
		unix.Close(fd)
		return
	}
	s.connections = append(s.connections, fd)
	p.distribute(s)
}

// isFree makes the worker one that gets connections, if it still wants them.
func (p *primary) isFree(s *nodeSocket, w *nodeWorker) {
	if s.users[w] && !s.closed && !slices.Contains(s.free, w) {
		s.free = append(s.free, w)
		p.distribute(s)
	}
}

// isFreeLater does the same after a pause.
func (p *primary) isFreeLater(s *nodeSocket, w *nodeWorker) {
	time.AfterFunc(refusedPause, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.isFree(s, w)
	})
}

// distribute gives the connections that wait to the workers that are free.
func (p *primary) distribute(s *nodeSocket) {
	for len(s.connections) > 0 && len(s.free) > 0 {
		fd, w := s.connections[0], s.free[0]
		s.connections, s.free = s.connections[1:], s.free[1:]
		p.offer(s, w, fd)
	}
	if len(s.free) > 0 {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// offer sends the worker a connection.
func (p *primary) offer(s *nodeSocket, w *nodeWorker, fd int) {
	seq := p.next()
	w.offers[seq] = offer{s, fd}
	line := nodeHandle(s.kind, fmt.Sprintf(`{"cmd":"NODE_CLUSTER","act":"newconn","key":%s,"seq":%d}`, s.quoted, seq))
	err := w.channel.sendCopy(line, fd, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.answered(w, seq, false)
	})
	if err != nil { // it has gone, does not read, or we have no descriptor free
		p.answered(w, seq, false)
	}
}

// answered takes the worker's answer to an offer.
func (p *primary) answered(w *nodeWorker, seq int64, accepted bool) {
	o, ok := w.offers[seq]
	switch {
	case !ok:
	case accepted:
		delete(w.offers, seq)
		unix.Close(o.fd)
		p.isFree(o.socket, w)
	default:
		p.takeBack(w, seq)
		p.isFreeLater(o.socket, w)
	}
}

// takeBack takes a connection back from a worker, for another one.
func (p *primary) takeBack(w *nodeWorker, seq int64) {
	o := w.offers[seq]
	delete(w.offers, seq)
	if o.socket.closed {
		unix.Close(o.fd)
		return
	}
	o.socket.connections = slices.Insert(o.socket.connections, 0, o.fd)
	p.distribute(o.socket)
}
