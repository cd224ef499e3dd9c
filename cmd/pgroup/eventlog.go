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
	queue chan []byte
	lost  int
	done  chan struct{}
}

func newSink(fd int) *sink {
	s := &sink{queue: make(chan []byte, sinkQueue), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		for line := range s.queue {
			if pgroup.Write(fd, line) != nil {
				return // the reader has gone, or the disk is full
			}
		}
	}()
	return s
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
		return errors.New("the reader of --events does not read: the last events are lost")
	}
	if s.lost > 0 {
		return fmt.Errorf("%d events were lost: the reader of --events was too slow", s.lost)
	}
	return nil
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
