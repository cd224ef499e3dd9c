package pgroup

import (
	"syscall"
	"testing"
)

func TestParseSignal(t *testing.T) {
	for text, want := range map[string]syscall.Signal{
		"TERM": 15, "term": 15, "SIGTERM": 15, "sigterm": 15, "15": 15, "1": 1, "64": 64,
		"CLD": 17, "CHLD": 17, "IO": 29, "POLL": 29, "IOT": 6, "ABRT": 6, "SYS": 31,
		"RTMIN": 34, "RTMIN+0": 34, "SIGRTMIN+3": 37, "RTMIN+30": 64, "RTMAX": 64, "rtmax-1": 63, "RTMAX-30": 34,
	} {
		if got, err := ParseSignal(text); err != nil || got != want {
			t.Errorf("ParseSignal(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "0", "65", "-1", "300", "FOO", "SIG", "SIGSIGTERM", "RTMIN-1", "RTMIN+31", "RTMAX+1", "RTM", "RTMIN+", "TERM ", "1.0"} {
		if got, err := ParseSignal(text); err == nil {
			t.Errorf("ParseSignal(%q) = %d, want an error", text, got)
		}
	}
}

func TestSignalNameRoundTrip(t *testing.T) {
	for sig := syscall.Signal(1); sig <= maxSig; sig++ {
		if got, err := ParseSignal(SignalName(sig)); err != nil || got != sig {
			t.Errorf("ParseSignal(%q) = %d, %v; want %d", SignalName(sig), got, err, sig)
		}
	}
}

func FuzzParseSignal(f *testing.F) {
	for _, s := range []string{"TERM", "RTMIN+3", "RTMAX-3", "64", "SIG"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if sig, err := ParseSignal(s); err == nil && (sig < 1 || sig > maxSig) {
			t.Errorf("ParseSignal(%q) = %d, which is no signal", s, sig)
		}
	})
}
