package pgroup

import (
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Spec says what to run and how. It must not be changed once it is in use.
type Spec struct {
	// Args is the command and its arguments. The command is searched for as
	// execvp(3) does, in the PATH of Env. There is no shell in between.
	Args []string

	// Env is the workers' environment, that of this process if nil. To it come
	// PGROUP_WORKER (the worker's number, from 1), PGROUP_WORKERS (how many
	// there are), PGROUP_PID (the launcher's pid), PGROUP_LEADER (the leader's) and
	// PGROUP_START (how many times the run has started a worker, this one included).
	Env []string

	// Dir is the directory that the workers begin in, this process's if empty.
	Dir string

	// Stdin, Stdout and Stderr are the workers' standard streams; nil is
	// /dev/null or, if Dedicated, this process's own. Anything but an *os.File
	// is written to by one goroutine at a time, and the run is not over before
	// it has taken all. An *os.File is the worker's own, and has to stay open while
	// workers may be started.
	Stdin          *os.File
	Stdout, Stderr io.Writer

	// Label begins each line of the workers' output with the worker's number.
	Label bool

	// Workers is how many copies of the command run; less than 1 means 1.
	Workers int

	// Restart is when an ended worker is started again: after 100 ms, and after
	// twice the time for each time that it ended again within 10 s of its
	// start, up to 30 s. A worker that ends within 10 s of a relayed TERM, INT,
	// QUIT or HUP is not, nor is any once the run is being stopped.
	Restart Restart

	// MaxRestarts is how often in a row a worker that ended within 10 s of its
	// start is started again. Then the run is stopped, and has failed; 0 means
	// that there is no limit.
	MaxRestarts int

	// Until is when the run is over: when all workers have ended and are not to
	// be started again, or when one has; the others are stopped then.
	Until Until

	// Ready is when a worker counts as ready; the zero value means when it was
	// started.
	Ready Ready

	// Listen are sockets that are opened once and given to each worker by the
	// convention of sd_listen_fds(3). ReusePort gives each its own, by
	// SO_REUSEPORT in socket(7), which stays open while the worker is started
	// again.
	Listen    []Listen
	ReusePort bool

	// Channel gives each worker a message channel, Node's: see Run.Send.
	Channel bool

	// NodeCluster is to be the primary of Node's cluster module. A stop asks the
	// workers to disconnect first, and is what StopSignal says after half of
	// Grace.
	NodeCluster bool

	// Timeout is the time from the start of the first worker to a stop; 0 means
	// that there is none.
	Timeout time.Duration

	// Grace is the time from a stop to SIGKILL; 0 means at once.
	Grace time.Duration

	// StopSignal is what a stop sends first, a received TERM included; 0 means
	// SIGTERM.
	StopSignal syscall.Signal

	// Map relays one signal as another, or not at all if that is 0. A signal
	// that is not in Map is relayed as itself.
	Map map[syscall.Signal]syscall.Signal

	// RelayToWorkers relays to the workers alone, and not to their groups.
	RelayToWorkers bool

	// WaitLeftovers waits for what workers leave behind, and does not stop it.
	WaitLeftovers bool

	// PIDNamespace makes the leader PID 1 of a new pid namespace: see
	// pid_namespaces(7).
	PIDNamespace bool

	// TTY keeps the workers in this process's session, and makes the first one's
	// group the foreground group of the terminal where this process has it.
	TTY bool

	// Dedicated is for a program that is nothing but the launcher of this run. It
	// becomes a subreaper, so that it can take over what a killed leader held,
	// moves to /, and gives up its standard streams once the workers have them.
	// As PID 1 it is the leader too.
	//
	// In any other program, when the leader is killed, what it held is found by its
	// session, and what has left that by its environment alone.
	Dedicated bool

	// KeepStderr keeps a dedicated program's standard error open even if it is a
	// pipe or a socket, whose reader then sees its end no sooner than ours.
	KeepStderr bool

	// Elastic is for a dedicated program that may call Scale, Restart or Reload:
	// the leader keeps the standard streams for the workers to come.
	Elastic bool

	// AllReady stops the run if a worker ends for good before it was ready, unless
	// all have been ready before.
	AllReady bool

	// Hold are files that the leader keeps open too: they are closed everywhere
	// exactly when nothing of the run lives. A lock is such a file's purpose.
	Hold []*os.File

	// Signals are relayed as they come: see the function of the same name. With
	// them the run takes part in job control: when all workers are stopped, this
	// process stops too (TSTP), unless nobody would continue it.
	Signals <-chan Signal

	// Events is called for each event, one at a time, the first perhaps before Start
	// has returned. It must not block: the run does nothing meanwhile. So it must
	// not call a method of the Run either, but leave that to another goroutine.
	Events func(Event)
}

// A Restart is when an ended worker is started again.
type Restart string

const (
	RestartNo      Restart = "no" // the default
	RestartFailure Restart = "on-failure"
	RestartAlways  Restart = "always"
)

// An Until is when a run is over.
type Until string

const (
	UntilAll     Until = "all" // workers have ended; the default
	UntilFirst   Until = "first"
	UntilFailure Until = "failure" // of a worker, or when all have ended
)

func (s *Spec) stopSignal() syscall.Signal {
	if s.StopSignal == 0 {
		return unix.SIGTERM
	}
	return s.StopSignal
}

// relayed returns what a received sig is sent on as, 0 for not at all.
func (s *Spec) relayed(sig syscall.Signal) syscall.Signal {
	as, mapped := s.Map[sig]
	switch {
	case mapped:
		return as
	case sig == unix.SIGTERM:
		return s.stopSignal()
	}
	return sig
}

// speaks reports whether workers say themselves when they are ready, or time does,
// so that ready is more than started.
func (s *Spec) speaks() bool { return s.Ready != (Ready{}) || s.NodeCluster }

// startsOnce reports whether no worker will be started but the first ones.
func (s *Spec) startsOnce() bool {
	return s.Dedicated && !s.Elastic && (s.Restart == "" || s.Restart == RestartNo)
}

func (s *Spec) config(term *terminal) config {
	cfg := config{stopSignal: s.stopSignal(), grace: s.Grace}
	if s.TTY {
		cfg.flags |= flagTTY
	}
	if s.RelayToWorkers {
		cfg.flags |= flagToWorkers
	}
	if s.PIDNamespace {
		cfg.flags |= flagPIDNS
	}
	if term != nil {
		cfg.flags |= flagForeground
	}
	return cfg
}

func (s *Spec) command() command {
	env := s.Env
	if env == nil {
		env = os.Environ()
	}
	return command{args: s.Args, env: workerEnv(env)}
}
