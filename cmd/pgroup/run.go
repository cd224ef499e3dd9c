package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"pgroup/pgroup"
)

// runFlags are those of the verbs that run a command.
type runFlags struct {
	Workers     count     `short:"n" placeholder:"N|auto" default:"1" group:"cluster" help:"Copies of the command (${default}); auto: as many as there are CPUs for this process."`
	Restart     string    `enum:"no,on-failure,always" default:"no" placeholder:"WHEN" group:"cluster" help:"Start an ended worker again: no (default), on-failure or always; after 100 ms, doubling to 30 s, reset by 10 s of health."`
	MaxRestarts positive  `placeholder:"N" group:"cluster" help:"Give up when one worker has ended in ill health this often in a row."`
	Until       string    `enum:"all,first,failure" default:"all" placeholder:"WHEN" group:"cluster" help:"The run ends when all workers have ended (default), the first has, or one has failed: all, first or failure."`
	Listen      []listen  `short:"l" sep:"none" placeholder:"[NAME=]ADDR" group:"cluster" help:"Open a socket and hand it to every worker (sd_listen_fds): :8000, tcp://HOST:PORT, udp://HOST:PORT, unix:PATH. Repeatable."`
	Reuseport   bool      `group:"cluster" help:"A socket for each worker (SO_REUSEPORT), kept while it is started again."`
	Channel     bool      `group:"cluster" help:"A message channel to each worker, Node's: NODE_CHANNEL_FD, one JSON value a line."`
	NodeCluster bool      `group:"cluster" help:"Be the primary of Node's cluster module: an unmodified Node server scales over the workers."`
	Ready       ready     `placeholder:"HOW" group:"cluster" help:"When a worker counts as ready: notify (NOTIFY_SOCKET), fd (a newline to PGROUP_READY_FD) or a duration; else when it was started."`
	Label       bool      `group:"cluster" help:"Begin each output line with the worker's number."`
	Pidfile     *string   `short:"p" placeholder:"PATH" group:"service" help:"Hold a locked pid file, and be there for the other verbs."`
	Timeout     duration  `short:"t" placeholder:"D" help:"Stop after this time."`
	Grace       duration  `short:"g" placeholder:"D" default:"10s" help:"From a stop to SIGKILL (${default}); 0: at once."`
	StopSignal  sig       `short:"s" placeholder:"SIG" default:"TERM" help:"What a stop sends first (${default})."`
	Map         []mapping `sep:"none" placeholder:"SIG=SIG" help:"Relay one signal as another, or SIG= not at all. Repeatable."`
	Relay       string    `enum:"group,worker" default:"group" placeholder:"WHOM" help:"Relay to the command's whole group, or to the worker alone: group (default) or worker."`
	Leftovers   string    `enum:"stop,wait" default:"stop" placeholder:"WHAT" help:"What the ended command left behind: stop it (default) or wait for it."`
	Contain     string    `enum:"tree,pidns" default:"tree" placeholder:"HOW" help:"tree (default), or pidns: in a pid namespace, which the kernel ends however pgroup dies."`
	TTY         bool      `name:"tty" help:"No new session: give the command's group the terminal (sudo, ssh, editors, REPLs)."`
	Events      *string   `placeholder:"PATH|fd:N" help:"Write one JSON object a line for all that happens."`
	Verbose     bool      `short:"v" help:"Say what happens, on standard error."`
	Command     []string  `arg:"" optional:"" help:"The command and its arguments. No shell in between."`
}

type runCmd struct {
	runFlags
	Starter int `hidden:"" help:"The descriptor of a pgroup start that waits for us, and of standard error's other end."`
}

// Help is what pgroup run --help says below the first line.
func (c *runCmd) Help() string {
	return `pgroup run [FLAGS] [--] COMMAND [ARG...]

Flags come before COMMAND: what follows it is COMMAND's. The exit status is
COMMAND's, or 124 after a timeout, 125 if pgroup failed, 126 if COMMAND can't be
executed, 127 if it isn't found. If COMMAND died of a signal, so does pgroup.

A duration is 1m30s, 300ms, or seconds (1.5), which may end in s, m, h or d.`
}

func (c *runCmd) Run(line commandLine) error {
	c.Command = line.command
	spec, err := c.spec()
	if err != nil {
		return err
	}
	from := takeStarter(c.Starter)
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
	var service *service
	if c.Pidfile != nil {
		if service, err = openService(*c.Pidfile); err != nil {
			from.refuse(err)
			return err
		}
		spec.Hold = []*os.File{service.lock}
		spec.Elastic = true
	}
	if from != nil {
		// Standard error is a pipe of ours. Who writes to it while it stops, when
		// we were killed, must not die of that.
		spec.Hold = append(spec.Hold, from.stderr)
		spec.KeepStderr = true
		spec.AllReady = true
	}
	log := newEventLog(events, c.Verbose, c.cluster())
	if service != nil {
		log.control = service.control
	}
	// Without these, a worker speaks to the service manager itself.
	says := spec.Ready != (pgroup.Ready{}) || spec.NodeCluster
	log.manager = from == nil && says && os.Getenv("NOTIFY_SOCKET") != ""
	spec.Events = log.event
	run, err := pgroup.Start(context.Background(), spec)
	if err != nil {
		if service != nil {
			service.close()
		}
		return withAdvice(err)
	}
	if service != nil {
		service.control.serve(run)
	}
	if from != nil {
		go from.serve(run)
	}
	if log.manager {
		go tellManager(run)
	}
	result, err := run.Wait()
	log.close(commandAdvice(err))
	if service != nil {
		if err := service.close(); err != nil {
			pgroup.Write(2, message(err))
		}
	}
	result.Exit()
	return nil
}

func (c *runFlags) spec() (*pgroup.Spec, error) {
	if len(c.Command) == 0 {
		return nil, errors.New("no command given: what follows the flags is the command to run")
	}
	spec := &pgroup.Spec{
		Args:           c.Command,
		Workers:        c.Workers.value,
		Restart:        pgroup.Restart(c.Restart),
		MaxRestarts:    c.MaxRestarts.value,
		Until:          pgroup.Until(c.Until),
		ReusePort:      c.Reuseport,
		Channel:        c.Channel,
		NodeCluster:    c.NodeCluster,
		Ready:          c.Ready.value,
		Label:          c.Label,
		Timeout:        c.Timeout.value,
		Grace:          c.Grace.value,
		StopSignal:     c.StopSignal.value,
		Map:            make(map[syscall.Signal]syscall.Signal),
		RelayToWorkers: c.Relay == "worker",
		WaitLeftovers:  c.Leftovers == "wait",
		PIDNamespace:   c.Contain == "pidns",
		TTY:            c.TTY,
		Dedicated:      true,
		KeepStderr:     c.Verbose || c.cluster(),
	}
	for _, l := range c.Listen {
		spec.Listen = append(spec.Listen, l.value)
	}
	if err := c.conflicts(); err != nil {
		return nil, err
	}
	for _, m := range c.Map {
		if as, twice := spec.Map[m.from]; twice && as != m.to {
			return nil, fmt.Errorf("--map %s is given twice: keep one", pgroup.SignalName(m.from))
		}
		spec.Map[m.from] = m.to
	}
	return spec, nil
}

// cluster reports whether the run goes on when a worker has ended.
func (c *runFlags) cluster() bool { return c.Workers.value > 1 || c.Restart != "no" }

// conflicts are flags that have no meaning together.
func (c *runFlags) conflicts() error {
	switch {
	case c.MaxRestarts.value > 0 && c.Restart == "no":
		return errors.New("--max-restarts has no meaning without --restart: add --restart on-failure or always")
	case c.Reuseport && len(c.Listen) == 0:
		return errors.New("--reuseport has no meaning without --listen: name a socket")
	case c.Until != "all" && c.Workers.value == 1:
		return errors.New("--until " + c.Until + " has no meaning for one worker: give more with -n")
	}
	return nil
}

// commandAdvice says what to do about a command that could not be started.
func commandAdvice(err error) error {
	return advise(err, map[syscall.Errno]string{
		syscall.ENOENT:  "check its name and PATH",
		syscall.EACCES:  "it must be a file with execute permission",
		syscall.ENOEXEC: "it is no program for this machine",
		syscall.E2BIG:   "give it fewer arguments or a smaller environment",
	})
}

// withAdvice says what to do about a limit.
func withAdvice(err error) error { return advise(err, nil) }

func advise(err error, more map[syscall.Errno]string) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err
	}
	advice := more[errno]
	switch errno {
	case syscall.EAGAIN:
		advice = "raise the limit on processes (ulimit -u, pids.max)"
	case syscall.EMFILE:
		advice = "raise the limit on open files (ulimit -n)"
	}
	if advice == "" {
		return err
	}
	return fmt.Errorf("%w; %s", err, advice)
}
