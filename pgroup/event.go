package pgroup

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"time"
)

// An EventType is the name of what happened, as it is in the event's JSON.
type EventType string

const (
	EventStart    EventType = "start"    // a worker was started
	EventFail     EventType = "fail"     // a worker could not be started
	EventExit     EventType = "exit"     // a worker ended
	EventReady    EventType = "ready"    // a worker became ready
	EventMessage  EventType = "message"  // a worker sent one
	EventChannel  EventType = "channel"  // a worker's channel was closed for what it did
	EventListen   EventType = "listen"   // a socket was opened
	EventScale    EventType = "scale"    // the number of workers is to be another
	EventReload   EventType = "reload"   // the workers are to be replaced
	EventRelay    EventType = "relay"    // a signal was received and passed on
	EventSuspend  EventType = "suspend"  // job control stopped the run
	EventResume   EventType = "resume"   // and continued it
	EventStop     EventType = "stop"     // the run, or what a worker left behind, was asked to end
	EventEscalate EventType = "escalate" // the grace period is over: SIGKILL to the workers' groups
	EventAdopt    EventType = "adopt"    // an orphan was re-parented to us
	EventSweep    EventType = "sweep"    // SIGKILL to every descendant, until none was left
	EventRefuse   EventType = "refuse"   // a signal could not be sent
	EventEnd      EventType = "end"      // nothing is left
)

// An Event is one thing that happened. Which fields have a meaning depends on
// the type. All that a worker did comes between its start and the end of the run;
// messages that it sent before it ended may come after its exit.
type Event struct {
	Time    time.Time
	Type    EventType
	Worker  int                // start, fail, exit, ready, message, channel: from 1; stop, escalate, sweep: 0 if of the run
	PID     int                // start, exit, ready, adopt
	Restart time.Duration      // fail, exit: until the next start, negative if there is none
	Data    json.RawMessage    // message: one JSON value
	Address string             // listen
	Status  syscall.WaitStatus // exit
	Signal  syscall.Signal     // relay, stop, suspend
	As      syscall.Signal     // relay: what was sent on, 0 if nothing
	From    int                // relay: pid of the sender, 0 if unknown
	Reason  string             // stop: signal, timeout, hangup, leader, leftovers, request, until, max-restarts, fail, scale, reload
	Grace   time.Duration      // stop
	Err     error              // fail, refuse, channel
	Count   int                // refuse: processes; scale: workers
	Killed  int                // sweep, end: processes that a sweep sent SIGKILL
	Adopted int                // end
	Code    int                // end: the exit status as a shell shows it
}

// MarshalJSON returns the event as the object of the table in the manual.
func (e Event) MarshalJSON() ([]byte, error) {
	b := fmt.Appendf(nil, `{"time":%q,"event":%q`, e.Time.Format(time.RFC3339Nano), e.Type)
	number := func(name string, n int) { b = fmt.Appendf(b, `,%q:%d`, name, n) }
	text := func(name, s string) {
		quoted, _ := json.Marshal(s)
		b = fmt.Appendf(b, `,%q:%s`, name, quoted)
	}
	restart := func() {
		if e.Restart >= 0 {
			b = fmt.Appendf(b, `,"restart":%g`, e.Restart.Seconds())
		}
	}
	worker := func() {
		if e.Worker != 0 {
			number("worker", e.Worker)
		}
	}
	switch e.Type {
	case EventStart:
		number("worker", e.Worker)
		number("pid", e.PID)
	case EventFail:
		number("worker", e.Worker)
		text("error", e.Err.Error())
		restart()
	case EventReady:
		number("worker", e.Worker)
		number("pid", e.PID)
	case EventMessage:
		number("worker", e.Worker)
		b = fmt.Appendf(b, `,"data":%s`, e.Data)
	case EventChannel:
		number("worker", e.Worker)
		text("error", e.Err.Error())
	case EventListen:
		text("address", e.Address)
	case EventScale:
		number("workers", e.Count)
	case EventExit:
		number("worker", e.Worker)
		number("pid", e.PID)
		if e.Status.Signaled() {
			text("signal", SignalName(e.Status.Signal()))
		} else {
			number("status", e.Status.ExitStatus())
		}
		restart()
	case EventRelay:
		text("signal", SignalName(e.Signal))
		if e.As != 0 {
			text("as", SignalName(e.As))
		}
		if e.From != 0 {
			number("from", e.From)
		}
	case EventSuspend:
		text("signal", SignalName(e.Signal))
	case EventEscalate:
		worker()
	case EventStop:
		worker()
		text("reason", e.Reason)
		text("signal", SignalName(e.Signal))
		b = fmt.Appendf(b, `,"grace":%g`, e.Grace.Seconds())
	case EventAdopt:
		number("pid", e.PID)
	case EventSweep:
		worker()
		number("killed", e.Killed)
	case EventRefuse:
		number("count", e.Count)
		text("error", e.Err.Error())
	case EventEnd:
		number("status", e.Code)
		number("adopted", e.Adopted)
		number("killed", e.Killed)
	}
	return append(b, '}'), nil
}

// String returns the event as a line for people.
func (e Event) String() string {
	switch e.Type {
	case EventStart:
		return fmt.Sprintf("worker %d started, pid %d", e.Worker, e.PID)
	case EventFail:
		return fmt.Sprintf("worker %d could not be started: %v", e.Worker, e.Err) + e.restart()
	case EventExit:
		if e.Status.Signaled() {
			return fmt.Sprintf("worker %d, pid %d, died of %s", e.Worker, e.PID, SignalName(e.Status.Signal())) + e.restart()
		}
		return fmt.Sprintf("worker %d, pid %d, ended with status %d", e.Worker, e.PID, e.Status.ExitStatus()) + e.restart()
	case EventReady:
		return fmt.Sprintf("worker %d is ready", e.Worker)
	case EventMessage:
		return fmt.Sprintf("worker %d sent %s", e.Worker, e.Data)
	case EventChannel:
		return fmt.Sprintf("closed the channel of worker %d: %v", e.Worker, e.Err)
	case EventListen:
		return "listening on " + e.Address
	case EventScale:
		return fmt.Sprintf("scaling to %d workers", e.Count)
	case EventReload:
		return "reloading"
	case EventRelay:
		s := "relayed " + SignalName(e.Signal)
		if e.As == 0 {
			s = "did not relay " + SignalName(e.Signal)
		} else if e.As != e.Signal {
			s += " as " + SignalName(e.As)
		}
		if e.From != 0 {
			s += fmt.Sprintf(" from pid %d", e.From)
		}
		return s
	case EventSuspend:
		return "suspended by " + SignalName(e.Signal)
	case EventResume:
		return "resumed"
	case EventStop:
		return fmt.Sprintf("stopping%s (%s) with %s, grace %v", e.worker(), e.Reason, SignalName(e.Signal), e.Grace)
	case EventEscalate:
		if e.Worker != 0 {
			return fmt.Sprintf("grace period over: killing the group of worker %d", e.Worker)
		}
		return "grace period over: killing the workers' groups"
	case EventAdopt:
		return fmt.Sprintf("adopted pid %d", e.PID)
	case EventSweep:
		return fmt.Sprintf("swept%s: killed %s", e.worker(), processes(e.Killed))
	case EventRefuse:
		return fmt.Sprintf("cannot signal %s: %v: waiting for their end", processes(e.Count), e.Err)
	case EventEnd:
		return fmt.Sprintf("ended with status %d, adopted %s, killed %d", e.Code, processes(e.Adopted), e.Killed)
	}
	return strings.ToLower(string(e.Type))
}

func processes(n int) string {
	if n == 1 {
		return "1 process"
	}
	return fmt.Sprintf("%d processes", n)
}

// worker names the worker whose event it is, if it isn't the run's.
func (e Event) worker() string {
	if e.Worker == 0 {
		return ""
	}
	return fmt.Sprintf(" worker %d", e.Worker)
}

// restart says when the worker is started again, if it is.
func (e Event) restart() string {
	if e.Restart < 0 {
		return ""
	}
	return fmt.Sprintf("; starting it again in %v", e.Restart)
}
