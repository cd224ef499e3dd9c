package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pgroup/pidfile"
)

type stopCmd struct {
	pidfileFlag
	Wait duration `default:"60s" placeholder:"D" help:"Kill pgroup itself if this was not enough (${default}), and what it started ends without it; 0: wait on."`
}

// Help is what pgroup stop --help says below the first line.
func (c *stopCmd) Help() string {
	return `Sends pgroup TERM and waits until nothing of the run lives: the run's own --grace
says when it escalates. A run that was suspended is continued.

The exit status is 0 if nothing runs any more, or did before; 1 if something
still does; 4 without permission.`
}

func (c *stopCmd) Run() error {
	was, err := stop(c.Pidfile, c.Wait.value)
	if err == nil && !was {
		fmt.Println("not running")
	}
	return err
}

// stop stops what holds the pid file, and returns when nothing of it lives. was
// tells whether anything did.
func stop(path string, wait time.Duration) (was bool, err error) {
	h, err := findHolder(path)
	switch {
	case errors.Is(err, pidfile.ErrNotRunning):
		return false, nil
	case errors.Is(err, pidfile.ErrStale):
		return false, removeStale(path)
	case err != nil:
		return false, err
	}
	defer h.Close()
	// CONT comes last: a stopped launcher can't act on TERM.
	err = waitAfter(h, wait, unix.SIGTERM, unix.SIGCONT)
	if errors.Is(err, context.DeadlineExceeded) && !h.Gone() {
		// Its leader holds on to the lock, and stops the rest.
		err = waitAfter(h, wait, unix.SIGKILL)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return true, fmt.Errorf("what process %d started still lives after %v: see pgroup status", h.PID, wait)
	}
	if err != nil {
		return true, err
	}
	// A launcher that was killed has left its files.
	next, err := findHolder(path)
	switch {
	case errors.Is(err, pidfile.ErrStale):
		return true, removeStale(path)
	case err == nil:
		next.Close()
	}
	return true, nil
}

// waitAfter sends the signals and waits, not longer than limit, until nothing
// of the run lives. A launcher that has ended has its leader do the same.
func waitAfter(h *pidfile.Holder, limit time.Duration, signals ...syscall.Signal) error {
	for _, sig := range signals {
		if err := h.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
	}
	ctx := context.Background()
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	return h.Wait(ctx)
}
