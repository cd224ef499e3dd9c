package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"pgroup/pgroup"
	"pgroup/pidfile"
)

type statusCmd struct {
	pidfileFlag
	JSON bool `help:"As one JSON object."`
}

// Help is what pgroup status --help says below the first line.
func (c *statusCmd) Help() string {
	return `Memory is what is resident, of the worker's group and descendants; CPU their share
of one CPU since the worker's start.

The exit status is 0 if the run lives, in whatever state; 1 if it is dead and its
pid file is there; 3 if it isn't running; 4 if pgroup was killed and what it
started still lives, or if it can't be known.`
}

// The statuses of status, as the Linux Standard Base has them for init scripts.
const (
	isRunning = 0
	isDead    = 1
	isStopped = 3
	isUnknown = 4
)

// A report is what status --json writes.
type report struct {
	State   string         `json:"state"` // of pgroup.Status; or running (no more is known), dead, stopped, killed, unknown
	PID     int            `json:"pid,omitempty"`
	Leader  int            `json:"leader,omitempty"`
	Since   time.Time      `json:"since,omitzero"`
	Usage   *usage         `json:"usage,omitempty"` // of all workers, and what they left behind
	Workers []workerReport `json:"workers,omitempty"`
	Error   string         `json:"error,omitempty"`
}

type workerReport struct {
	pgroup.WorkerStatus
	Usage   *usage  `json:"usage,omitempty"`
	Percent float64 `json:"cpu_percent,omitempty"`
}

func (c *statusCmd) Run() error {
	r, status, err := c.look()
	for end := time.Now().Add(patience); isChanging(err) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		r, status, err = c.look()
	}
	if c.JSON {
		text, err := json.Marshal(r)
		if err != nil {
			return failure{isUnknown, err}
		}
		fmt.Println(string(text))
	} else {
		r.print(os.Stdout, onTerminal())
	}
	exit(status)
	return nil
}

// patience is how long a launcher may take to open its socket, or to end.
const patience = time.Second

// look finds out what is to be known. err is why it isn't all.
func (c *statusCmd) look() (r report, status int, err error) {
	h, err := findHolder(c.Pidfile)
	switch {
	case errors.Is(err, pidfile.ErrNotRunning):
		return report{State: "stopped"}, isStopped, nil
	case errors.Is(err, pidfile.ErrStale):
		return report{State: "dead", Error: err.Error()}, isDead, nil
	case err != nil:
		return report{State: "unknown", Error: err.Error()}, isUnknown, nil
	}
	defer h.Close()
	if h.Gone() {
		return report{State: "killed", PID: h.PID, Error: "pgroup was killed; what it started is being stopped"}, isUnknown, nil
	}
	s, err := c.ask(h.PID)
	if err != nil {
		return report{State: "running", PID: h.PID, Error: err.Error()}, isRunning, err
	}
	r = report{State: s.State, PID: s.PID, Leader: s.Leader, Since: s.Since}
	workers, all := measure(s)
	r.Usage = &all
	for _, w := range s.Workers {
		wr := workerReport{WorkerStatus: w}
		if u, ok := workers[w.Worker]; ok {
			wr.Usage, wr.Percent = &u, u.percent(w.Since)
		}
		r.Workers = append(r.Workers, wr)
	}
	return r, isRunning, nil
}

func (c *statusCmd) ask(pid int) (*pgroup.Status, error) {
	s, err := dial(c.Pidfile, pid)
	if err != nil {
		return nil, err
	}
	defer s.close()
	r, err := s.ask(request{Do: "status"}, time.Now().Add(answerTime))
	if err == nil && r.Status == nil {
		err = errors.New("pgroup answers without a status")
	}
	return r.Status, err
}

// onTerminal reports whether standard output is a terminal that shows colours.
func onTerminal() bool {
	_, err := unix.IoctlGetTermios(1, unix.TCGETS)
	return err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// print writes the report for people.
func (r *report) print(w io.Writer, colour bool) {
	paint := func(state string) string {
		if !colour {
			return state
		}
		code := "33" // yellow: on its way
		switch state {
		case "ready", "running":
			code = "32"
		case "ended", "waiting", "dead", "killed", "unknown", "stopped":
			code = "31"
		}
		return "\x1b[" + code + "m" + state + "\x1b[0m"
	}
	head := paint(r.State)
	if r.PID != 0 {
		head = fmt.Sprintf("pid %d  %s", r.PID, head)
	}
	if !r.Since.IsZero() {
		head += "  " + since(r.Since)
	}
	if r.Usage != nil {
		what := "processes"
		if r.Usage.Processes == 1 {
			what = "process"
		}
		head += fmt.Sprintf("  %d %s  %s", r.Usage.Processes, what, bytesText(r.Usage.Memory))
	}
	if r.Error != "" {
		head += ": " + r.Error
	}
	fmt.Fprintln(w, head)
	if len(r.Workers) == 0 {
		return
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	header := "STATE"
	if colour {
		header = "\x1b[39m" + header + "\x1b[0m" // as wide as the others are for tabwriter
	}
	fmt.Fprintf(table, "WORKER\tPID\t%s\tSINCE\tRESTARTS\tMEMORY\tCPU\n", header)
	for _, ws := range r.Workers {
		pid, when, memory, cpu := "-", "-", "-", "-"
		if ws.PID != 0 {
			pid, when = strconv.Itoa(ws.PID), since(ws.Since)
		}
		if ws.Usage != nil {
			memory, cpu = bytesText(ws.Usage.Memory), fmt.Sprintf("%.1f%%", ws.Percent)
		}
		note := ws.Result
		if !ws.Again.IsZero() {
			note += fmt.Sprintf("; starts again in %v", max(0, time.Until(ws.Again)).Round(100*time.Millisecond))
		}
		line := fmt.Sprintf("%d\t%s\t%s\t%s\t%d\t%s\t%s\t%s", ws.Worker, pid, paint(ws.State), when, ws.Restarts, memory, cpu, note)
		fmt.Fprintln(table, strings.TrimRight(line, "\t"))
	}
	table.Flush()
}

// since returns a time, and how long ago it was.
func since(t time.Time) string {
	age := time.Since(t)
	if age < time.Minute {
		age = age.Round(100 * time.Millisecond)
	} else {
		age = age.Round(time.Second)
	}
	return fmt.Sprintf("%s (%v)", t.Local().Format("2006-01-02 15:04:05"), age)
}

func bytesText(n int64) string {
	switch {
	case n < 1<<20:
		return fmt.Sprintf("%dK", n>>10)
	case n < 10<<20:
		return fmt.Sprintf("%.1fM", float64(n)/(1<<20))
	case n < 10<<30:
		return fmt.Sprintf("%dM", n>>20)
	}
	return fmt.Sprintf("%.1fG", float64(n)/(1<<30))
}
