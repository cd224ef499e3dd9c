package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"pgroup/pgroup"
)

type runCmd struct {
	Timeout    duration  `short:"t" placeholder:"D" help:"Stop after this time."`
	Grace      duration  `short:"g" placeholder:"D" default:"10s" help:"From a stop to SIGKILL (${default}); 0: at once."`
	StopSignal sig       `short:"s" placeholder:"SIG" default:"TERM" help:"What a stop sends first (${default})."`
	Map        []mapping `sep:"none" placeholder:"SIG=SIG" help:"Relay one signal as another, or SIG= not at all. Repeatable."`
	Relay      string    `enum:"group,worker" default:"group" placeholder:"WHOM" help:"Relay to the command's whole group, or to the worker alone: group (default) or worker."`
	Leftovers  string    `enum:"stop,wait" default:"stop" placeholder:"WHAT" help:"What the ended command left behind: stop it (default) or wait for it."`
	Contain    string    `enum:"tree,pidns" default:"tree" placeholder:"HOW" help:"tree (default), or pidns: in a pid namespace, which the kernel ends however pgroup dies."`
	TTY        bool      `name:"tty" help:"No new session: give the command's group the terminal (sudo, ssh, editors, REPLs)."`
	Events     *string   `placeholder:"PATH|fd:N" help:"Write one JSON object a line for all that happens."`
	Verbose    bool      `short:"v" help:"Say what happens, on standard error."`
	Command    []string  `arg:"" optional:"" help:"The command and its arguments. No shell in between."`
}

// Help is what pgroup run --help says below the first line.
func (c *runCmd) Help() string {
	return `pgroup run [FLAGS] [--] COMMAND [ARG...]

Flags come before COMMAND: what follows it is COMMAND's. The exit status is
COMMAND's, or 124 after a timeout, 125 if pgroup failed, 126 if COMMAND can't be
executed, 127 if it isn't found. If COMMAND died of a signal, so does pgroup.

A duration is 1m30s, 300ms, or seconds (1.5), which may end in s, m, h or d.`
}

func (c *runCmd) Run() error {
	if len(c.Command) == 0 {
		return errors.New("no command given: pgroup run [FLAGS] [--] COMMAND [ARG...]")
	}
	spec, err := c.spec()
	if err != nil {
		return err
	}
	events := -1
	if c.Events != nil {
		if events, err = openEvents(*c.Events); err != nil {
			return err
		}
	}
	if err := pgroup.CloseInherited(events); err != nil {
		return withAdvice(err)
	}
	if spec.Signals, err = pgroup.Signals(); err != nil {
		return withAdvice(err)
	}
	log := newEventLog(events, c.Verbose)
	spec.Events = log.event
	run, err := pgroup.Start(context.Background(), spec)
	if err != nil {
		return withAdvice(err)
	}
	result, err := run.Wait()
	log.close(withAdvice(err))
	result.Exit()
	return nil
}

func (c *runCmd) spec() (*pgroup.Spec, error) {
	spec := &pgroup.Spec{
		Args:           c.Command,
		Timeout:        c.Timeout.value,
		Grace:          c.Grace.value,
		StopSignal:     c.StopSignal.value,
		Map:            make(map[syscall.Signal]syscall.Signal),
		RelayToWorkers: c.Relay == "worker",
		WaitLeftovers:  c.Leftovers == "wait",
		PIDNamespace:   c.Contain == "pidns",
		TTY:            c.TTY,
		Dedicated:      true,
		KeepStderr:     c.Verbose,
	}
	for _, m := range c.Map {
		if as, twice := spec.Map[m.from]; twice && as != m.to {
			return nil, fmt.Errorf("--map %s is given twice: keep one", pgroup.SignalName(m.from))
		}
		spec.Map[m.from] = m.to
	}
	return spec, nil
}

// withAdvice says what to do about a command that could not be started.
func withAdvice(err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err
	}
	advice := map[syscall.Errno]string{
		syscall.ENOENT:  "check its name and PATH",
		syscall.EACCES:  "it must be a file with execute permission",
		syscall.ENOEXEC: "it is no program for this machine",
		syscall.EAGAIN:  "raise the limit on processes (ulimit -u, pids.max)",
		syscall.EMFILE:  "raise the limit on open files (ulimit -n)",
		syscall.E2BIG:   "give it fewer arguments or a smaller environment",
	}[errno]
	if advice == "" {
		return err
	}
	return fmt.Errorf("%w; %s", err, advice)
}
