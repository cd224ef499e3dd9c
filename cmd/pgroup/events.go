package main

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"time"

	"pgroup/pgroup"
)

type eventsCmd struct {
	pidfileFlag
}

// Help is what pgroup events --help says below the first line.
func (c *eventsCmd) Help() string {
	return `Writes what happens from now on, until the run ends or you end it: one JSON object
a line, as --events of pgroup run does. Who reads too slowly is told how many
events were lost.

The exit status is 7 if nothing runs, 4 without permission, 1 if the run did not
come to its end.`
}

func (c *eventsCmd) Run() error {
	h, err := c.find()
	if err != nil {
		return err
	}
	defer h.Close()
	s, err := dial(c.Pidfile, h.PID)
	if err != nil {
		return err
	}
	defer s.close()
	if _, err := s.ask(request{Do: "events"}, time.Now().Add(answerTime)); err != nil {
		return err
	}
	for ended := false; ; {
		line, err := s.lines.ReadBytes('\n')
		switch {
		case err == io.EOF && ended:
			return nil
		case err == io.EOF:
			return errors.New("pgroup was killed, or had no more room for us")
		case err != nil:
			return err
		}
		var e struct{ Event pgroup.EventType }
		json.Unmarshal(line, &e)
		ended = e.Event == pgroup.EventEnd
		if _, err := os.Stdout.Write(line); err != nil {
			return err
		}
	}
}
