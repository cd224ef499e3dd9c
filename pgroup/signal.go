package pgroup

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The real-time signals as programs see them (signal(7)): the C library keeps
// 32 and 33 for itself.
const (
	rtMin  = 34
	rtMax  = 64
	maxSig = rtMax
)

// SignalName returns the name of sig without SIG ("TERM", "RTMIN+3").
func SignalName(sig syscall.Signal) string {
	switch {
	case sig == rtMin:
		return "RTMIN"
	case sig > rtMin && sig <= rtMax:
		return fmt.Sprintf("RTMIN+%d", sig-rtMin)
	}
	if name := unix.SignalName(sig); name != "" {
		return strings.TrimPrefix(name, "SIG")
	}
	return strconv.Itoa(int(sig))
}

// ParseSignal returns the signal that s names: as kill(1) does, with or without
// SIG, in any case, or by number; the real-time signals as RTMIN, RTMIN+n,
// RTMAX-n and RTMAX (signal(7)).
func ParseSignal(s string) (syscall.Signal, error) {
	unknown := fmt.Errorf("unknown signal %q: give a name as in kill -l, or a number from 1 to %d", s, maxSig)
	if n, err := strconv.ParseUint(s, 10, 8); err == nil {
		if n < 1 || n > maxSig {
			return 0, unknown
		}
		return syscall.Signal(n), nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if rest, ok := strings.CutPrefix(name, "RTM"); ok {
		return parseRealTime(rest, unknown)
	}
	switch name {
	case "CLD": // unix.SignalNum knows the names of unix.SignalName alone
		return unix.SIGCHLD, nil
	case "POLL":
		return unix.SIGIO, nil
	case "IOT":
		return unix.SIGABRT, nil
	}
	if sig := unix.SignalNum("SIG" + name); sig != 0 {
		return sig, nil
	}
	return 0, unknown
}

// parseRealTime parses what follows "RTM": IN, IN+n, AX, AX-n.
func parseRealTime(s string, unknown error) (syscall.Signal, error) {
	base, sign := rtMin, "+"
	rest, ok := strings.CutPrefix(s, "IN")
	if !ok {
		base, sign = rtMax, "-"
		if rest, ok = strings.CutPrefix(s, "AX"); !ok {
			return 0, unknown
		}
	}
	if rest == "" {
		return syscall.Signal(base), nil
	}
	offset, ok := strings.CutPrefix(rest, sign)
	n, err := strconv.ParseUint(offset, 10, 8)
	if !ok || err != nil || n > rtMax-rtMin {
		return 0, unknown
	}
	if base == rtMax {
		return syscall.Signal(rtMax - n), nil
	}
	return syscall.Signal(rtMin + n), nil
}
