package main

import (
	"strings"
	"testing"
	"time"
)

func TestParseDuration(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"0": 0, "5": 5 * time.Second, "1.5": 1500 * time.Millisecond, ".5": time.Second / 2, "5.": 5 * time.Second,
		"2s": 2 * time.Second, "1.5m": 90 * time.Second, "1h": time.Hour, "2d": 48 * time.Hour,
		"300ms": 300 * time.Millisecond, "1m30s": 90 * time.Second, "10us": 10 * time.Microsecond,
	} {
		if got, err := parseDuration(text); err != nil || got != want {
			t.Errorf("parseDuration(%q) = %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "-1", "-1s", "x", "1x", "s", ".", "1e3", "inf", "NaN", "0x10", "1 s", "999999999999d", "1..5"} {
		if got, err := parseDuration(text); err == nil {
			t.Errorf("parseDuration(%q) = %v, want an error", text, got)
		}
	}
}

func FuzzParseDuration(f *testing.F) {
	for _, s := range []string{"1.5", "1d", "1m30s", "-1", "9223372036s"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := parseDuration(s); err == nil && d < 0 {
			t.Errorf("parseDuration(%q) = %v", s, d)
		}
	})
}

func FuzzMapping(f *testing.F) {
	for _, s := range []string{"TERM=INT", "HUP=", "=", "KILL=TERM", "RTMIN+1=RTMAX-1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var m mapping
		if m.UnmarshalText([]byte(s)) == nil && (m.from == 9 || m.from == 19 || m.from == 0) {
			t.Errorf("mapping %q is from %d", s, m.from)
		}
	})
}

func TestSplitCommand(t *testing.T) {
	parser := newParser(new(cli))
	for _, test := range []struct{ args, ours, command string }{
		{"run cmd -t 9", "run", "cmd -t 9"},
		{"run -- cmd -- x", "run", "cmd -- x"},
		{"run -- -- x", "run", "-- x"},
		{"run cmd -- x", "run", "cmd -- x"},
		{"run -t 5 cmd", "run -t 5", "cmd"},
		{"run -t5 cmd", "run -t5", "cmd"},
		{"run -vt 5 cmd", "run -vt 5", "cmd"},
		{"run -vt5 -v cmd -v", "run -vt5 -v", "cmd -v"},
		{"run --timeout 5 --tty cmd", "run --timeout 5 --tty", "cmd"},
		{"run --timeout=5 cmd", "run --timeout=5", "cmd"},
		{"run --map TERM=INT --map=HUP= cmd", "run --map TERM=INT --map=HUP=", "cmd"},
		{"run --foo cmd", "run --foo", "cmd"},
		{"run - x", "run", "- x"},
		{"run -t", "run -t", ""},
		{"run --", "run", ""},
		{"start -p x --wait 5 cmd --log y", "start -p x --wait 5", "cmd --log y"},
		{"restart --log y -- cmd", "restart --log y", "cmd"},
		{"signal -p x TERM", "signal -p x TERM", ""},
		{"--help", "--help", ""},
		{"", "", ""},
	} {
		ours, command := splitCommand(parser.Model, strings.Fields(test.args))
		if got := strings.Join(ours, " "); got != test.ours {
			t.Errorf("of %q ours is %q, want %q", test.args, got, test.ours)
		}
		if got := strings.Join(command, " "); got != test.command {
			t.Errorf("of %q the command is %q, want %q", test.args, got, test.command)
		}
	}
}

func TestUsageErrorOfNegativeValue(t *testing.T) {
	for _, flag := range []string{"-n", "--workers", "-g"} {
		_, err := newParser(new(runOnly)).Parse([]string{"run", flag, "-3"})
		if err == nil || !strings.Contains(usageError(err).Error(), `needs a value, but what follows is "-3"`) {
			t.Errorf("%s -3: %v", flag, usageError(err))
		}
	}
}
