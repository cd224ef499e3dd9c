package pgroup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// startWith runs a shell script as the worker n.
func startWith(t *testing.T, o *outputs, n int, script string) *exec.Cmd {
	t.Helper()
	stdout, stderr, err := o.pipes(n)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", script)
	if stdout != nil {
		defer stdout.Close()
		cmd.Stdout = stdout
	}
	if stderr != nil {
		defer stderr.Close()
		cmd.Stderr = stderr
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

func waitFor(t *testing.T, o *outputs) {
	t.Helper()
	limit := make(chan struct{})
	timer := time.AfterFunc(30*time.Second, func() { close(limit) })
	if err := o.wait(limit); err != nil {
		t.Error(err)
	}
	if !timer.Stop() {
		t.Fatal("the pipes did not reach their end")
	}
}

func TestOutputsApart(t *testing.T) {
	for _, label := range []bool{false, true} {
		var stdout, stderr recorder
		o := newOutputs(&stdout, &stderr, label, 12)
		startWith(t, o, 1, "echo out; echo err >&2; printf end")
		waitFor(t, o)
		wantOut, wantErr := "out\nend", "err\n"
		if label {
			wantOut, wantErr = " 1 | out\n 1 | end\n", " 1 | err\n"
		}
		if stdout.String() != wantOut || stderr.String() != wantErr {
			t.Errorf("label %v: got %q and %q, want %q and %q", label, &stdout, &stderr, wantOut, wantErr)
		}
	}
}

func TestOutputsNil(t *testing.T) {
	var stderr recorder
	o := newOutputs(nil, &stderr, false, 1)
	stdout, w, err := o.pipes(1)
	if err != nil || stdout != nil || w == nil {
		t.Fatalf("pipes = %v, %v, %v; want no pipe for standard output", stdout, w, err)
	}
	w.Close()
	waitFor(t, o)
}

// Six workers write to both streams, which are one pipe, in odd sizes.
func TestLinesStayWhole(t *testing.T) {
	const workers, lines = 6, 500
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dup, err := unix.FcntlInt(w.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	w2 := os.NewFile(uintptr(dup), "the same")
	o := newOutputs(w, w2, true, workers)
	var writing sync.WaitGroup
	for n := 1; n <= workers; n++ {
		stdout, stderr, err := o.pipes(n)
		if err != nil {
			t.Fatal(err)
		}
		for stream, file := range map[string]*os.File{"out": stdout, "err": stderr} {
			writing.Go(func() {
				defer file.Close()
				var text bytes.Buffer
				for i := range lines {
					fmt.Fprintf(&text, "%d %s %d %s\n", n, stream, i, strings.Repeat("x", i*n%300))
				}
				for size := 1; text.Len() > 0; size = 1 + size*7%1000 {
					file.Write(text.Next(size))
				}
			})
		}
	}
	go func() {
		writing.Wait()
		o.wait(nil)
		w.Close()
		w2.Close()
	}()
	next := make(map[string]int)
	total := 0
	for s := bufio.NewScanner(r); s.Scan(); total++ {
		var label, n, i int
		var sign, stream string
		line := s.Text()
		if _, err := fmt.Sscanf(line, "%d %s %d %s %d", &label, &sign, &n, &stream, &i); err != nil || sign != "|" || label != n {
			t.Fatalf("a torn line: %.100q", line)
		}
		key := fmt.Sprint(n, stream)
		want := fmt.Sprintf("%d | %d %s %d %s", n, n, stream, next[key], strings.Repeat("x", i*n%300))
		if line != want {
			t.Fatalf("got %.100q, want %.100q", line, want)
		}
		next[key]++
	}
	if total != 2*workers*lines {
		t.Errorf("got %d lines, want %d", total, 2*workers*lines)
	}
}

func TestSameWriter(t *testing.T) {
	type incomparable struct {
		io.Writer
		_ []int
	}
	dir := t.TempDir()
	a, b := openFile(t, filepath.Join(dir, "a")), openFile(t, filepath.Join(dir, "a"))
	c := openFile(t, filepath.Join(dir, "c"))
	var r, s recorder
	for _, test := range []struct {
		a, b io.Writer
		want bool
	}{
		{a, a, true}, {a, b, true}, {a, c, false}, {&r, &r, true}, {&r, &s, false}, {a, &r, false},
		{incomparable{}, incomparable{}, false},
	} {
		if got := sameWriter(test.a, test.b); got != test.want {
			t.Errorf("sameWriter(%T, %T) = %v, want %v", test.a, test.b, got, test.want)
		}
	}
	o := newOutputs(a, b, true, 1)
	if o.stdout.mu != o.stderr.mu {
		t.Error("two locks for one file")
	}
}

func openFile(t *testing.T, name string) *os.File {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// When the reader of a pipeline has gone, the worker gets its SIGPIPE, and so
// does one that is started later.
func TestReaderGone(t *testing.T) {
	for _, label := range []bool{false, true} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr recorder
		o := newOutputs(w, &stderr, label, 2)
		cmd := startWith(t, o, 1, "exec yes") // for as long as it can
		if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		r.Close()
		for range 2 {
			err := cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGPIPE {
				t.Errorf("label %v: yes: %v, want SIGPIPE", label, err)
			}
			cmd = startWith(t, o, 2, "exec yes")
		}
		cmd.Wait()
		if err := o.wait(nil); !errors.Is(err, unix.EPIPE) {
			t.Errorf("wait = %v, want EPIPE", err)
		}
		w.Close()
	}
}

// A file that takes nothing at the moment costs what was to be written, and no
// more: the worker lives on.
func TestFullDisk(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	var stderr recorder
	o := newOutputs(full, &stderr, true, 1)
	startWith(t, o, 1, "yes | head -c 300000 && echo done >&2")
	if err := o.wait(nil); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("wait = %v, want ENOSPC", err)
	}
	if got := stderr.String(); got != "1 | done\n" {
		t.Errorf("standard error is %q: the worker did not come to its end", got)
	}
}

type failing struct{ calls int }

func (f *failing) Write(p []byte) (int, error) {
	f.calls++
	return len(p) - 1, nil
}

func TestWriterFails(t *testing.T) {
	var w failing
	o := newOutputs(&w, nil, false, 1)
	startWith(t, o, 1, "exec yes").Wait()
	if err := o.wait(nil); !errors.Is(err, io.ErrShortWrite) || w.calls != 1 {
		t.Errorf("wait = %v after %d writes, want %v after 1", err, w.calls, io.ErrShortWrite)
	}
}

// blocked takes nothing until it is let go.
type blocked struct {
	recorder
	entered chan struct{}
	letGo   chan struct{}
}

func (b *blocked) Write(p []byte) (int, error) {
	select {
	case b.entered <- struct{}{}:
	default:
	}
	<-b.letGo
	return b.recorder.Write(p)
}

// A slow reader makes the worker wait: nothing is lost, nothing piles up.
func TestSlowDestination(t *testing.T) {
	w := &blocked{entered: make(chan struct{}, 1), letGo: make(chan struct{})}
	o := newOutputs(w, nil, true, 1)
	stdout, _, err := o.pipes(1)
	if err != nil {
		t.Fatal(err)
	}
	fd := int(stdout.Fd())
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Fatal("the worker's end doesn't block")
	}
	line := []byte("a line of the worker\n")
	stdout.Write(line)
	<-w.entered // and its copying waits there
	unix.SetNonblock(fd, true)
	sent := 1
	for {
		n, err := unix.Write(fd, line) // less than PIPE_BUF: all or nothing
		if err == unix.EAGAIN {
			break
		}
		if err != nil || n != len(line) {
			t.Fatal(n, err)
		}
		sent++
	}
	if capacity, _ := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0); sent*len(line) > capacity+copySize {
		t.Errorf("%d bytes were taken, more than the pipe holds", sent*len(line))
	}
	close(w.letGo)
	stdout.Close()
	waitFor(t, o)
	if got, want := w.String(), strings.Repeat("1 | "+string(line), sent); got != want {
		t.Errorf("%d of %d bytes came", len(got), len(want))
	}
}

// A pipe that somebody keeps open doesn't hold up the end for longer than asked.
func TestWaitLimit(t *testing.T) {
	w := &blocked{entered: make(chan struct{}, 1), letGo: make(chan struct{})}
	close(w.letGo)
	o := newOutputs(w, nil, true, 1)
	stdout, _, err := o.pipes(1)
	if err != nil {
		t.Fatal(err)
	}
	defer stdout.Close()
	stdout.WriteString("first\nrest")
	<-w.entered // with the first line; both have been read
	limit := make(chan struct{})
	close(limit)
	if err := o.wait(limit); err != nil {
		t.Error(err)
	}
	if got, want := w.String(), "1 | first\n1 | rest\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if _, err := stdout.WriteString("more"); !errors.Is(err, unix.EPIPE) {
		t.Errorf("write after the end: %v, want EPIPE", err)
	}

	// What is in the pipes is not lost for that.
	var all recorder
	o = newOutputs(&all, nil, true, 1)
	stdout, _, err = o.pipes(1)
	if err != nil {
		t.Fatal(err)
	}
	stdout.WriteString(strings.Repeat("line\n", 8000))
	stdout.Close()
	o.wait(limit)
	if n := strings.Count(all.String(), "1 | line\n"); n != 8000 {
		t.Errorf("%d lines came, want 8000", n)
	}

	// Nor does a destination that takes nothing hold it up.
	stuck := &blocked{entered: make(chan struct{}, 1), letGo: make(chan struct{})}
	defer close(stuck.letGo)
	o = newOutputs(stuck, nil, true, 1)
	startWith(t, o, 1, "echo stuck")
	<-stuck.entered
	o.wait(limit)
}

// Waiting for a pipe takes no thread.
func TestManyPipes(t *testing.T) {
	threads := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	before := threads()
	var w recorder
	o := newOutputs(&w, &w, true, 200)
	var ends []*os.File
	for n := 1; n <= 200; n++ {
		stdout, stderr, err := o.pipes(n)
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, stdout, stderr)
	}
	for i, f := range ends {
		fmt.Fprintf(f, "%d\n", i)
	}
	if n := threads() - before; n > 50 {
		t.Errorf("400 pipes took %d threads", n)
	}
	for _, f := range ends {
		f.Close()
	}
	waitFor(t, o)
	if n := strings.Count(w.String(), "\n"); n != 400 {
		t.Errorf("%d lines came, want 400", n)
	}
}

func TestColourOnTerminal(t *testing.T) {
	master, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	defer tty.Close()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, test := range []struct {
		term, noColour string
		want           bool
	}{{"xterm", "", true}, {"dumb", "", false}, {"xterm", "1", false}} {
		t.Setenv("TERM", test.term)
		t.Setenv("NO_COLOR", test.noColour)
		o := newOutputs(tty, null, true, 1)
		if o.stdout.colour != test.want || o.stderr.colour {
			t.Errorf("TERM=%s NO_COLOR=%s: colour on the terminal %v, want %v; on /dev/null %v",
				test.term, test.noColour, o.stdout.colour, test.want, o.stderr.colour)
		}
		startWith(t, o, 1, "echo hello")
		waitFor(t, o)
		want := "1 | hello\r\n"
		if test.want {
			want = "\x1b[0;36m1 |\x1b[0m hello\r\n"
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(master, got); err != nil || string(got) != want {
			t.Errorf("the terminal shows %q, %v; want %q", got, err, want)
		}
	}
}
