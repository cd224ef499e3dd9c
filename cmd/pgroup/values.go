package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pgroup/pgroup"
)

// A duration is a flag's: as Go writes it (1m30s), or as timeout(1) does: a
// number of seconds, which may have a fraction and end in s, m, h or d.
type duration struct{ value time.Duration }

func (d *duration) UnmarshalText(text []byte) error {
	value, err := parseDuration(string(text))
	d.value = value
	return err
}

func parseDuration(s string) (time.Duration, error) {
	wrong := fmt.Errorf("%q is no duration: give seconds, or a number with ms, s, m, h or d (1.5, 300ms, 2m)", s)
	number, unit := s, time.Second
	if n := len(s); n > 0 {
		if u, ok := map[byte]time.Duration{'s': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour}[s[n-1]]; ok {
			number, unit = s[:n-1], u
		}
	}
	d, err := time.ParseDuration(s)
	// Go knows no bare number and no day. ParseFloat would take Inf and 0x1p3.
	if f, ferr := strconv.ParseFloat(number, 64); ferr == nil && strings.Trim(number, "0123456789.") == "" {
		if f*float64(unit) >= math.MaxInt64 {
			return 0, fmt.Errorf("%q is too long: the longest duration is 292 years", s)
		}
		d, err = time.Duration(f*float64(unit)), nil
	}
	if err != nil {
		return 0, wrong
	}
	if d < 0 {
		return 0, fmt.Errorf("%q is negative: give 0 or more", s)
	}
	return d, nil
}

// A count is the value of --workers.
type count struct{ value int }

func (c *count) UnmarshalText(text []byte) (err error) {
	if string(text) == "auto" {
		c.value = pgroup.CPUs()
		return nil
	}
	if c.value, err = strconv.Atoi(string(text)); err != nil || c.value < 1 || c.value > maxWorkers {
		return fmt.Errorf("%q is no number of workers: give 1 to %d, or auto", text, maxWorkers)
	}
	return nil
}

// maxWorkers is more than a machine has pids for by default.
const maxWorkers = 100_000

// A positive is a number from 1.
type positive struct{ value int }

func (p *positive) UnmarshalText(text []byte) (err error) {
	if p.value, err = strconv.Atoi(string(text)); err != nil || p.value < 1 {
		return fmt.Errorf("%q is no number from 1", text)
	}
	return nil
}

// A listen is the value of --listen.
type listen struct{ value pgroup.Listen }

func (l *listen) UnmarshalText(text []byte) (err error) {
	l.value, err = pgroup.ParseListen(string(text))
	return err
}

// A ready is the value of --ready.
type ready struct{ value pgroup.Ready }

func (r *ready) UnmarshalText(text []byte) (err error) {
	switch mode := string(text); mode {
	case pgroup.ReadyNotify, pgroup.ReadyFD:
		r.value.Mode = mode
	default:
		if r.value.After, err = parseDuration(mode); err != nil {
			return fmt.Errorf("%q is none of notify, fd and a duration", text)
		}
	}
	return nil
}

// A sig is a flag's signal.
type sig struct{ value syscall.Signal }

func (s *sig) UnmarshalText(text []byte) (err error) {
	s.value, err = pgroup.ParseSignal(string(text))
	return err
}

// A mapping is the value of --map.
type mapping struct{ from, to syscall.Signal }

func (m *mapping) UnmarshalText(text []byte) (err error) {
	from, to, ok := strings.Cut(string(text), "=")
	if !ok {
		return fmt.Errorf("%q: give SIG=SIG, or SIG= to relay it not at all", text)
	}
	if m.from, err = pgroup.ParseSignal(from); err != nil {
		return err
	}
	if !pgroup.Relayable(m.from) {
		return fmt.Errorf("%q: %s is never relayed: map another signal", text, pgroup.SignalName(m.from))
	}
	if to != "" {
		m.to, err = pgroup.ParseSignal(to)
	}
	return err
}
