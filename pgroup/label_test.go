package pgroup

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"testing"
)

// labelled returns what a labeller makes of the chunks.
func labelled(t *testing.T, colour bool, chunks ...[]byte) (out string, writes []string) {
	t.Helper()
	var w recorder
	d := newDestination("output", &w, make(chan error, 1))
	d.colour = colour
	l := newLabeller(d, 3, 2)
	for i, c := range chunks {
		if err := l.write(c, i == len(chunks)-1); err != nil {
			t.Fatal(err)
		}
	}
	return strings.Join(w.writes, ""), w.writes
}

type recorder struct {
	mu     sync.Mutex
	writes []string
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.writes = append(r.writes, string(p))
	return len(p), nil
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.writes, "")
}

func TestLabeller(t *testing.T) {
	full := strings.Repeat("x", longestLine)
	for _, test := range []struct {
		name   string
		chunks []string
		want   string
	}{
		{"nothing", []string{""}, ""},
		{"lines", []string{"a\nb\n"}, " 3 | a\n 3 | b\n"},
		{"empty lines", []string{"\n\n"}, " 3 | \n 3 | \n"},
		{"no newline at the end", []string{"a\nb"}, " 3 | a\n 3 | b\n"},
		{"one line in pieces", []string{"a", "b", "c\nd", "\n", ""}, " 3 | abc\n 3 | d\n"},
		{"any bytes", []string{"\x00\xff\r1%\r2%\r\n"}, " 3 | \x00\xff\r1%\r2%\r\n"},
		{"the longest line", []string{full, "\n"}, " 3 | " + full + "\n"},
		{"the longest line, at the end", []string{full}, " 3 | " + full + "\n"},
		{"one byte longer", []string{full + "y\nz\n"}, " 3 | " + full + "\n 3 + y\n 3 | z\n"},
		{"one byte longer, later", []string{full, "y\n", "z"}, " 3 | " + full + "\n 3 + y\n 3 | z\n"},
		{"three pieces", []string{full + full, "y"}, " 3 | " + full + "\n 3 + " + full + "\n 3 + y\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var chunks [][]byte
			for _, c := range test.chunks {
				chunks = append(chunks, []byte(c))
			}
			if got, _ := labelled(t, false, chunks...); got != test.want {
				t.Errorf("got %.200q, want %.200q", got, test.want)
			}
		})
	}
}

func TestLabellerColour(t *testing.T) {
	got, _ := labelled(t, true, []byte("a\n"))
	if want := "\x1b[0;32m 3 |\x1b[0m a\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Lines are written together, but in no more than what a pipe takes at once.
func TestLabellerWrites(t *testing.T) {
	line := strings.Repeat("x", 99) + "\n"
	_, writes := labelled(t, false, []byte(strings.Repeat(line, 100)), nil)
	if len(writes) != 3 {
		t.Errorf("100 lines of 105 bytes took %d writes, want 3", len(writes))
	}
	for _, w := range writes {
		if len(w) > pipeBuf || !strings.HasSuffix(w, "\n") {
			t.Errorf("a write has %d bytes and ends in %q", len(w), w[len(w)-1:])
		}
	}
}

// unlabel is what a reader does who wants the text back.
func unlabel(out, label, more string) (string, error) {
	var text strings.Builder
	for line := range strings.SplitAfterSeq(out, "\n") {
		if line == "" {
			break // after the last newline
		}
		if after, ok := strings.CutPrefix(line, more); ok {
			rest := strings.TrimSuffix(text.String(), "\n")
			text.Reset()
			text.WriteString(rest + after)
		} else if after, ok := strings.CutPrefix(line, label); ok {
			text.WriteString(after)
		} else {
			return "", fmt.Errorf("a line without a label: %.100q", line)
		}
	}
	return text.String(), nil
}

func FuzzLabeller(f *testing.F) {
	f.Add([]byte("a\nb"), 1, 1)
	f.Add([]byte("\n 3 | \n\x00\xff"), 2, 1)
	f.Add([]byte("abc\ndef\n"), 3, longestLine/2)
	f.Add([]byte("xyz"), 1000, longestLine)
	f.Fuzz(func(t *testing.T, text []byte, size, times int) {
		// Long lines too: the fuzzer would not find them by itself.
		if len(text) > 0 {
			text = bytes.Repeat(text, 1+abs(times)%(1+3*longestLine/len(text)))
		}
		var chunks [][]byte
		for rest := text; len(rest) > 0; {
			n := min(len(rest), 1+abs(size)%copySize)
			n = max(n, len(rest)/1000) // not forever
			chunks, rest = append(chunks, rest[:n]), rest[n:]
		}
		got, _ := labelled(t, false, append(chunks, nil)...)
		back, err := unlabel(got, " 3 | ", " 3 + ")
		if err != nil {
			t.Fatal(err)
		}
		want := string(text)
		if want != "" && want[len(want)-1] != '\n' {
			want += "\n"
		}
		if back != want {
			t.Errorf("%.200q came back as %.200q", want, back)
		}
		if longest := longestLine + len(" 3 | "); len(got) > longest {
			for line := range strings.SplitSeq(got, "\n") {
				if len(line) > longest {
					t.Errorf("a line of %d bytes", len(line))
				}
			}
		}
	})
}

func abs(n int) int { return max(n, -(n + 1)) }
