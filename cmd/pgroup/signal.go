package main

import (
	"errors"
	"os"
)

type signalCmd struct {
	pidfileFlag
	Signal sig `arg:"" placeholder:"SIG" help:"A signal's name, with or without SIG, or its number."`
}

// Help is what pgroup signal --help says below the first line.
func (c *signalCmd) Help() string {
	return `Sends pgroup the signal, which it relays to the workers as if you had sent it to
it by kill. It does not wait for what they do.

The exit status is 7 if nothing runs, 4 without permission.`
}

func (c *signalCmd) Run() error {
	h, err := c.find()
	if err != nil {
		return err
	}
	defer h.Close()
	err = h.Signal(c.Signal.value)
	if errors.Is(err, os.ErrProcessDone) {
		return failure{notRunning, err}
	}
	return err
}
