package pgroup

import (
	"cmp"
	"fmt"
	"os"
	"strconv"
	"time"
)

// What a worker is given besides the command: descriptors, and the variables
// that name them.
type given struct {
	theirs  []*os.File // to be closed once they were handed over
	channel *channel
	notify  *notifySocket
	ready   func() // closes our end of the pipe
}

// firstListenFD is SD_LISTEN_FDS_START of sd_listen_fds(3).
const firstListenFD = 3

// give makes what w is to be given, and the messages that hand it over.
func (r *Run) give(w *worker) (msgs []message, err error) {
	g := &w.given
	defer func() {
		if err != nil {
			g.handedOver()
			g.close()
		}
	}()
	closed := error(nil)
	file := func(number int, f *os.File) {
		fd := int(f.Fd())
		if fd < 0 { // the user's: he thought that no worker would need it again
			closed = fmt.Errorf("cannot give the worker its descriptor %d: %w", number, os.ErrClosed)
		}
		msgs = append(msgs, message{kind: msgFile, worker: int32(w.id), a: int64(number), fd: fd})
	}
	if r.spec.Stdin != nil {
		file(0, r.spec.Stdin)
	}
	for number, out := range map[int]any{1: r.spec.Stdout, 2: r.spec.Stderr} {
		if f, ok := out.(*os.File); ok && !r.spec.Label {
			file(number, f)
		}
	}
	if r.outputs != nil {
		stdout, stderr, err := r.outputs.pipes(w.place.n)
		if err != nil {
			return nil, err
		}
		for number, f := range map[int]*os.File{1: stdout, 2: stderr} {
			if f != nil {
				g.theirs = append(g.theirs, f)
				file(number, f)
			}
		}
	}
	env, next := []string(nil), firstListenFD
	if r.sockets != nil {
		fds, err := r.sockets.files(w.place.n)
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			msgs = append(msgs, message{kind: msgFile, worker: int32(w.id), a: int64(next), fd: fd})
			next++
		}
		env = append(env, r.sockets.env()...)
	}
	if r.spec.Channel || r.primary != nil {
		theirs, err := r.openChannel(w)
		if err != nil {
			return nil, err
		}
		g.theirs = append(g.theirs, theirs)
		file(next, theirs)
		env = append(env, channelVar+"="+strconv.Itoa(next), formatVar+"=json")
		next++
		if r.primary != nil {
			env = append(env, uniqueIDVar+"="+strconv.Itoa(w.id))
		}
	}
	ready := func() { r.post(func() { r.becomeReady(w) }) }
	switch r.spec.Ready.Mode {
	case ReadyNotify:
		if g.notify, err = newNotifySocket(ready, nil); err != nil {
			return nil, err
		}
		// Whatever the worker's pid is in a pid namespace, it is below these.
		g.notify.setPID(cmp.Or(r.leader, os.Getpid()))
		env = append(env, g.notify.env())
	case ReadyFD:
		var theirs *os.File
		if theirs, g.ready, err = newReadyPipe(ready); err != nil {
			return nil, err
		}
		g.theirs = append(g.theirs, theirs)
		file(next, theirs)
		env = append(env, readyFDVar+"="+strconv.Itoa(next))
	}
	if r.spec.speaks() && g.notify == nil {
		env = append(env, notifyVar) // whoever waits there is told of the run
	}
	if len(env) > 0 {
		msgs = append(msgs, envMessage(w.id, env))
	}
	return msgs, closed
}

// handedOver closes what the leader has now.
func (g *given) handedOver() {
	for _, f := range g.theirs {
		f.Close()
	}
	g.theirs = nil
}

// close closes our ends, when the worker has ended.
func (g *given) close() {
	if g.channel != nil {
		g.channel.close()
	}
	if g.notify != nil {
		g.notify.close()
	}
	if g.ready != nil {
		g.ready()
	}
}

// tell lets the worker's own word through, now that its start, or that it failed,
// was told.
func (w *worker) tell() {
	select {
	case <-w.known:
	default:
		close(w.known)
	}
}

// begun notes that w runs now.
func (r *Run) begun(w *worker) {
	switch {
	case w.early:
		r.becomeReady(w)
	case w.given.notify != nil, w.given.ready != nil, r.primary != nil:
	case r.spec.Ready.After > 0:
		w.readyAt = w.since.Add(r.spec.Ready.After)
	default:
		r.becomeReady(w)
	}
}

func (r *Run) becomeReady(w *worker) {
	if w.ready || !w.lives() {
		return
	}
	if w.state == starting {
		w.early = true
		return
	}
	w.ready, w.readyAt = true, time.Time{}
	if r.spec.speaks() { // else it is what start means
		r.event(Event{Type: EventReady, Worker: w.place.n, PID: w.pid})
	}
	for _, p := range r.places {
		if p.worker == nil || !p.worker.ready {
			return
		}
	}
	r.allReady.Do(func() { close(r.ready) })
}

// openChannel opens the channel of w and serves it.
func (r *Run) openChannel(w *worker) (theirs *os.File, err error) {
	c, theirs, err := newChannel()
	if err != nil {
		return nil, err
	}
	w.given.channel = c
	if r.primary != nil {
		r.primary.join(w.id, c, func() { r.post(func() { r.becomeReady(w) }) })
	}
	r.serving++
	go func() {
		<-w.known
		err := c.serve(func(line []byte, internal bool) {
			switch {
			case !internal:
				r.post(func() { r.event(Event{Type: EventMessage, Worker: w.place.n, Data: line}) })
			case r.primary != nil:
				r.primary.message(w.id, line)
			}
		})
		if r.primary != nil {
			r.primary.leave(w.id) // not sooner: its last word may be an answer
		}
		r.post(func() {
			r.serving--
			if err != nil {
				r.event(Event{Type: EventChannel, Worker: w.place.n, Err: err})
			}
		})
	}()
	return theirs, nil
}
