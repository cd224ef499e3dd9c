package pgroup

import (
	"os"
	"strconv"
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
	// there are) and PGROUP_PID (the launcher's pid).
	Env []string

	// Workers is how many copies of the command run; 0 means 1.
	Workers int

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
	Dedicated bool

	// KeepStderr keeps a dedicated program's standard error open even if it is a
	// pipe or a socket, whose reader then sees its end no sooner than ours.
	KeepStderr bool

	// Signals are relayed as they come: see the function of the same name. With
	// them the run takes part in job control: when all workers are stopped, this
	// process stops too (TSTP), unless nobody would continue it.
	Signals <-chan Signal

	// Events is called for each event, by one goroutine. It must not block.
	Events func(Event)
}

func (s *Spec) workers() int { return max(1, s.Workers) }

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
	return command{args: s.Args, env: setEnv(env, pidVar, strconv.Itoa(os.Getpid()))}
}
