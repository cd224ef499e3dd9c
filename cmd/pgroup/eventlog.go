package main

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"pgroup/pgroup"
)

// openEvents opens what --events names.
func openEvents(name string) (fd int, err error) {
	if number, ok := strings.CutPrefix(name, "fd:"); ok {
		fd, err = strconv.Atoi(number)
		if err != nil || fd < 0 {
			return -1, fmt.Errorf("--events %s: give a path, or fd: and the number of an open file", name)
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil || flags&unix.O_ACCMODE == unix.O_RDONLY {
			return -1, fmt.Errorf("--events %s: that file is not open for writing: redirect it (%d>FILE)", name, fd)
		}
		// Not the number itself: the standard streams are given up later.
		return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
	}
	fd, err = unix.Open(name, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC, 0o666)
	if err != nil {
		return -1, fmt.Errorf("cannot write events: %w; give --events a path that can be written, or fd:N", &fs.PathError{Op: "open", Path: name, Err: err})
	}
	return fd, nil
}

const (
	sinkQueue    = 4096        // lines that wait for a slow reader; more are lost
	sinkMessages = 3072        // of them at most when another message comes
	sinkDrain    = time.Second // how long the end waits for it
)

// A sink writes lines. A reader that is slow, or has stopped reading, costs
// lines and never holds up a signal.
type sink struct {
	fd    int
	queue chan []byte
	lost  int // there was no room for them in the queue

	done     chan struct{} // closed when what follows is final
	unsaid   int           // lines that could not be written
	writeErr error         // why the last of them could not
}

func newSink(fd int) *sink {
	s := &sink{fd: fd, queue: make(chan []byte, sinkQueue), done: make(chan struct{})}
	go s.drain()
	return s
}

// drain writes the queue. A disk that is full may have room for the next line; a
// reader that has gone does not come back.
func (s *sink) drain() {
	defer close(s.done)
	torn := false // the file ends in a part of a line
	for line := range s.queue {
		if s.writeErr != nil && !mayPass(s.writeErr) {
			s.unsaid++
			continue
		}
		if torn {
			line = append([]byte("\n"), line...)
		}
		before := offset(s.fd)
		if err := pgroup.Write(s.fd, line); err != nil {
			s.unsaid++
			s.writeErr = err
			torn = torn || offset(s.fd) != before
		} else {
			torn = false
		}
	}
}

// mayPass reports whether a later write may succeed.
func mayPass(err error) bool {
	return err == unix.ENOSPC || err == unix.EDQUOT || err == unix.EIO
}

// offset is where fd stands in its file; -1 if that is none of the kind. A write
// that failed has not moved it, one of a part has.
func offset(fd int) int64 {
	at, err := unix.Seek(fd, 0, unix.SEEK_CUR)
	if err != nil {
		return -1
	}
	return at
}

// write takes one line. It does not block. What workers send, as much as they
// like, leaves room for what happens to them.
func (s *sink) write(line []byte, sent bool) {
	if sent && len(s.queue) >= sinkMessages {
		s.lost++
		return
	}
	select {
	case s.queue <- line:
	default:
		s.lost++
	}
}

// close waits until what was taken has been written, and reports what was not.
func (s *sink) close() error {
	close(s.queue)
	select {
	case <-s.done:
	case <-time.After(sinkDrain):
		if !s.hasReader() {
			return errors.New("the last events are lost: the file of --events could not be written in time")
		}
		return errors.New("the reader of --events does not read: the last events are lost")
	}
	lost := s.lost + s.unsaid
	were := "events were"
	if lost == 1 {
		were = "event was"
	}
	switch {
	case lost == 0:
		return nil
	case s.unsaid > 0:
		return fmt.Errorf("%d %s lost: cannot write: %w", lost, were, s.writeErr)
	case !s.hasReader():
		return fmt.Errorf("%d %s lost: the file of --events could not be written in time", lost, were)
	}
	return fmt.Errorf("%d %s lost: the reader of --events was too slow", lost, were)
}

// hasReader reports whether somebody has to read what is written: that is no file.
func (s *sink) hasReader() bool {
	var st unix.Stat_t
	if unix.Fstat(s.fd, &st) != nil {
		return false
	}
	kind := st.Mode & unix.S_IFMT
	return kind == unix.S_IFIFO || kind == unix.S_IFSOCK || kind == unix.S_IFCHR
}

// An eventLog writes events for people and for machines.
type eventLog struct {
	verbose bool
	deaths  bool // of workers are told, until the run is being stopped
	retired map[int]bool
	stderr  *sink
	events  *sink    // nil without --events
	control *control // nil without --pidfile
	manager bool     // a service manager wants to know (sd_notify(3))

	notifying sync.WaitGroup
}

func newEventLog(fd int, verbose, deaths bool) *eventLog {
	l := &eventLog{verbose: verbose, deaths: deaths, retired: make(map[int]bool), stderr: newSink(2)}
	if fd >= 0 {
		l.events = newSink(fd)
	}
	return l
}

// event takes one event. It does not block.
func (l *eventLog) event(e pgroup.Event) {
	if l.verbose || l.tell(e) {
		l.stderr.write(message(e), e.Type == pgroup.EventMessage)
	}
	if l.events != nil {
		line, _ := e.MarshalJSON()
		l.events.write(append(line, '\n'), e.Type == pgroup.EventMessage)
	}
	if l.control != nil {
		l.control.event(e)
	}
	if l.manager && e.Type == pgroup.EventStop && e.Worker == 0 {
		l.notifying.Go(func() { pgroup.Notify("STOPPING=1") })
	}
}

// tell reports whether people have to know of e, though they did not ask.
func (l *eventLog) tell(e pgroup.Event) bool {
	switch e.Type {
	case pgroup.EventRefuse, pgroup.EventChannel:
		return true
	case pgroup.EventStop:
		if e.Worker == 0 {
			l.deaths = false
		} else if e.Reason != "leftovers" {
			l.retired[e.Worker] = true // as somebody wanted
		}
	case pgroup.EventExit:
		retired := l.retired[e.Worker]
		delete(l.retired, e.Worker)
		return l.deaths && !retired
	case pgroup.EventFail:
		return l.deaths && e.Restart >= 0 // else it is why the run fails
	}
	return false
}

// close ends the log, after one more line about what failed, if anything did.
func (l *eventLog) close(failure error) {
	if l.events != nil {
		if err := l.events.close(); err != nil {
			l.stderr.write(message(err), false)
		}
	}
	if failure != nil {
		l.stderr.write(message(failure), false)
	}
	l.stderr.close()   // who does not read it can't be told
	l.notifying.Wait() // a worker may end before the manager was told of the stop
}
