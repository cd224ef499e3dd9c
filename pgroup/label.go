package pgroup

import (
	"bytes"
	"fmt"
	"strconv"
)

const (
	// longestLine is how long a line may be. What is longer comes as several, with a
	// label that says so: without a bound one worker could take all memory, or,
	// if it kept the destination until its newline, silence all others.
	longestLine = 64 << 10

	// pipeBuf is how long a write to a pipe may be to be atomic (PIPE_BUF in
	// pipe(7)): lines are written together up to it, so that they stay whole
	// where other programs write to the same pipe.
	pipeBuf = 4096
)

// A labeller writes lines to a destination, each with the worker's number in
// front:
//
//	3 | a line
//	3 + the rest of a line of more than 64 KiB: no newline was here
//
// Lines that come together are written together, and nothing between them. The
// last line gets a newline if it has none. Other than that, every byte is passed
// on: NUL, carriage return and what is no UTF-8.
type labeller struct {
	d          *destination
	label      []byte
	more       []byte // the label of what goes on with a line
	rest       []byte // of a line without its newline yet
	continuing bool   // with rest
}

// colours are the SGR parameters of workers 1, 2, …: no red, which means an
// error, and nothing that is unseen on black or white.
var colours = [...]int{36, 33, 32, 35, 34}

func newLabeller(d *destination, worker, width int) *labeller {
	label := func(sign string) []byte {
		text := fmt.Sprintf("%*s %s", width, strconv.Itoa(worker), sign)
		if d.colour {
			// The 0 ends what the line before may have left switched on.
			text = fmt.Sprintf("\x1b[0;%dm%s\x1b[0m", colours[(worker-1)%len(colours)], text)
		}
		return []byte(text + " ")
	}
	return &labeller{d: d, label: label("|"), more: label("+")}
}

func (l *labeller) write(p []byte, last bool) error {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	for len(p) > 0 {
		line, after, ended := bytes.Cut(p, []byte("\n"))
		for len(l.rest)+len(line) > longestLine {
			piece := line[:longestLine-len(l.rest)]
			line = line[len(piece):]
			if err := l.put(piece); err != nil {
				return err
			}
			l.continuing = true
		}
		if ended {
			if err := l.put(line); err != nil {
				return err
			}
		} else {
			l.rest = append(l.rest, line...)
		}
		p = after
	}
	if last && len(l.rest) > 0 {
		if err := l.put(nil); err != nil {
			return err
		}
	}
	return l.flush()
}

// put adds the line that rest begins and end ends to what flush will write.
func (l *labeller) put(end []byte) error {
	label := l.label
	if l.continuing {
		label = l.more
	}
	if len(l.d.buf)+len(label)+len(l.rest)+len(end)+1 > pipeBuf {
		if err := l.flush(); err != nil {
			return err
		}
	}
	buf := append(l.d.buf, label...)
	buf = append(buf, l.rest...)
	buf = append(buf, end...)
	l.d.buf = append(buf, '\n')
	l.continuing = false
	l.rest = l.rest[:0]
	if cap(l.rest) > pipeBuf {
		l.rest = nil // thousands of workers may have had one long line
	}
	return nil
}

func (l *labeller) flush() error {
	if len(l.d.buf) == 0 {
		return nil
	}
	err := l.d.write(l.d.buf)
	l.d.buf = l.d.buf[:0]
	return err
}
