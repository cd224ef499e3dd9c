package pgroup

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A primary is what the process that calls cluster.fork() is to Node's cluster
// module: it opens the sockets that the workers want to listen on, each once.
//
//	primary                                   worker
//	   │ ◀───────────────────────── online ─── │
//	   │ ◀──────────────────── queryServer ─── │  listen(): what on?
//	   │ ── errno, or the socket itself ─────▶ │  shared: the worker accepts
//	   │ ── errno, or the socket's name ─────▶ │  round robin: we accept
//	   │ ◀────────────────────── listening ─── │  it is ready
//	   │ ── newconn, a connection ───────────▶ │  round robin
//	   │ ◀─── accepted: true, or another's ─── │  one unanswered a worker and socket
//	   │ ── disconnect ──────────────────────▶ │  finish, and go
//	   │ ◀────────────────────────── close ─── │  it doesn't listen there any more
//	   │ ◀────────── exitedAfterDisconnect ─── │  it goes by itself
//	   │ ── ack ─────────────────────────────▶ │
//
// The workers are not to be trusted with more than their own connections: what a
// worker asks for is bounded, what it says wrong is ignored.
type primary struct {
	mu         sync.Mutex
	roundRobin bool
	over       bool // no worker will be started again
	closed     bool
	seq        int64
	workers    map[int]*nodeWorker
	sockets    map[string]*nodeSocket
	// What listen({fd: n}) means in a worker. In Node it is the primary's n; ours
	// are nobody else's business, but for those that the workers were given.
	given map[int]int
}

// A nodeWorker is one running instance.
type nodeWorker struct {
	channel   *channel
	ready     func()
	listening bool
	leaving   bool            // it gets no more connections
	offers    map[int64]offer // connections that it has not answered for, by seq
}

// maxNodeSockets bounds what a worker that asks for sockets without end costs
// the others.
const (
	maxNodeSockets = 256
	maxNodeKey     = 8192 // PATH_MAX, and more
)

// maxNodeData bounds what a server may have us tell the other workers' servers:
// for TLS, the keys of its session tickets.
const maxNodeData = 64 << 10

// newPrimary returns a primary. With roundRobin it accepts the connections and
// gives them to the workers in turn; without, the workers share the sockets.
func newPrimary(roundRobin bool) *primary {
	return &primary{
		roundRobin: roundRobin,
		workers:    make(map[int]*nodeWorker),
		sockets:    make(map[string]*nodeSocket),
		given:      make(map[int]int),
	}
}

// give has listen({fd: n}) in a worker mean our fd, which stays the caller's.
func (p *primary) give(n, fd int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.given[n] = fd
}

// join adds a worker, whose environment has NODE_UNIQUE_ID=id: no two instances
// have the same. ready is called once, when it listens.
func (p *primary) join(id int, c *channel, ready func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.workers[id] = &nodeWorker{channel: c, ready: ready, offers: make(map[int64]offer)}
}

// A nodeMessage is what a worker says.
type nodeMessage struct {
	Cmd      string
	Act      string
	Seq      int64
	Ack      *int64
	Accepted bool
	Key      string
	Data     json.RawMessage
	nodeQuery
}

// message takes an internal message from the worker's channel.
func (p *primary) message(id int, line []byte) {
	var m nodeMessage
	if json.Unmarshal(line, &m) != nil || m.Cmd != "NODE_CLUSTER" {
		return
	}
	if ready := p.handle(id, m); ready != nil {
		ready()
	}
}

func (p *primary) handle(id int, m nodeMessage) (ready func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.workers[id]
	switch {
	case w == nil:
	case m.Ack != nil:
		p.answered(w, *m.Ack, m.Accepted)
	case m.Act == "queryServer" && !w.leaving:
		p.query(w, m)
	case m.Act == "listening":
		w.listening = true
		ready, w.ready = w.ready, nil
	case m.Act == "close":
		if s := p.sockets[m.Key]; s != nil && s.users[w] {
			p.leaveSocket(s, w, true)
		}
	case m.Act == "exitedAfterDisconnect":
		p.goes(w)
		w.channel.sendInternal(fmt.Appendf(nil, `{"cmd":"NODE_CLUSTER","ack":%d,"seq":%d}`, m.Seq, p.next()))
	}
	return ready
}

func (p *primary) next() int64 {
	p.seq++
	return p.seq
}

// query answers a worker that wants to listen.
func (p *primary) query(w *nodeWorker, m nodeMessage) {
	key := m.key()
	s := p.sockets[key]
	if s == nil {
		var err error
		if s, err = p.open(key, m.nodeQuery); err != nil {
			errno, ok := err.(syscall.Errno)
			if !ok {
				errno = unix.EINVAL
			}
			p.answer(w, m, key, fmt.Sprintf(`"errno":%d`, -int(errno)), nil)
			return
		}
		p.sockets[key] = s
	}
	if isNull(s.data) && len(m.Data) <= maxNodeData {
		s.data = m.Data
	}
	s.users[w] = true
	if !s.accepting() {
		p.answer(w, m, key, `"errno":0`, s)
		return
	}
	result := `"errno":null`
	if s.name != "" {
		result += `,"sockname":` + s.name
	}
	p.answer(w, m, key, result, s)
	p.isFree(s, w)
}

// answer answers m, and sends a socket that the workers share with it.
func (p *primary) answer(w *nodeWorker, m nodeMessage, key, result string, s *nodeSocket) {
	data := json.RawMessage("null")
	if s != nil && !isNull(s.data) {
		data = s.data
	}
	msg := fmt.Sprintf(`{"cmd":"NODE_CLUSTER",%s,"key":%s,"ack":%d,"data":%s,"seq":%d}`,
		result, quote(key), m.Seq, data, p.next())
	if s == nil || s.accepting() {
		w.channel.sendInternal([]byte(msg))
		return
	}
	p.share(w, s, nodeHandle(s.kind, msg))
}

// share sends a socket, again if it doesn't arrive: the worker waits for it.
func (p *primary) share(w *nodeWorker, s *nodeSocket, line []byte) {
	again := func() {
		time.AfterFunc(refusedPause, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if s.users[w] && !s.closed {
				p.share(w, s, line)
			}
		})
	}
	switch err := w.channel.sendCopy(line, s.fd, again); err {
	case nil, ErrChannelClosed:
	case ErrChannelFull:
		w.channel.fail(err) // as for any answer that is not read
	default:
		again()
	}
}

// nodeHandle is the message around one that a descriptor comes with.
func nodeHandle(kind, msg string) []byte {
	return fmt.Appendf(nil, `{"cmd":"NODE_HANDLE","type":%q,"msg":%s}`, kind, msg)
}

// disconnect asks the worker to go: it gets no more connections, finishes what it
// has, and exits with 0 unless something else keeps it.
func (p *primary) disconnect(id int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.workers[id]; w != nil && !w.leaving {
		p.goes(w)
		w.channel.sendInternal(fmt.Appendf(nil, `{"cmd":"NODE_CLUSTER","act":"disconnect","seq":%d}`, p.next()))
	}
}

// goes takes the worker off all sockets.
func (p *primary) goes(w *nodeWorker) {
	w.leaving = true
	for _, s := range p.sockets {
		if s.users[w] {
			p.leaveSocket(s, w, true)
		}
	}
}

// leave takes the worker away: it has ended, or its channel has. Connections that
// it was sent and did not answer for go to others. What it sent before its end
// has to be read first, or one that it did accept would be among them: leave
// comes after the return of serve. It may be called twice.
func (p *primary) leave(id int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.workers[id]
	if w == nil {
		return
	}
	delete(p.workers, id)
	w.leaving = true
	for _, s := range p.sockets {
		if s.users[w] {
			p.leaveSocket(s, w, false)
		}
	}
	for _, seq := range slices.Sorted(maps.Keys(w.offers)) {
		p.takeBack(w, seq)
	}
}

// leaveSocket takes the worker off the socket, and closes it if nobody is left
// who listens on it: but not when the last one ended, or was asked to, and there
// is no other worker that is ready. Then it is to be started again, and those who
// connect wait in the kernel's queue meanwhile.
func (p *primary) leaveSocket(s *nodeSocket, w *nodeWorker, onPurpose bool) {
	delete(s.users, w)
	s.free = slices.DeleteFunc(s.free, func(f *nodeWorker) bool { return f == w })
	if len(s.users) == 0 && (p.over || onPurpose && (!w.leaving || p.anyReady())) {
		s.close()
		delete(p.sockets, s.key)
	}
}

// last says that no worker will be started again: sockets that nobody listens on
// are closed from now on, so that clients know.
func (p *primary) last() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	for key, s := range p.sockets {
		if len(s.users) == 0 {
			s.close()
			delete(p.sockets, key)
		}
	}
}

func (p *primary) anyReady() bool {
	for _, w := range p.workers {
		if w.listening && !w.leaving {
			return true
		}
	}
	return false
}

// close closes all sockets, and the connections that nobody has accepted.
func (p *primary) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, s := range p.sockets {
		s.close()
	}
	for _, w := range p.workers {
		for _, o := range w.offers {
			unix.Close(o.fd)
		}
	}
	clear(p.sockets)
	clear(p.workers)
}

func isNull(data json.RawMessage) bool {
	return len(data) == 0 || string(data) == "null"
}

func quote(s string) string {
	b, _ := json.Marshal(strings.ToValidUTF8(s, "\uFFFD"))
	return string(b)
}
