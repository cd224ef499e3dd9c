package pgroup

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A served is a channel with what came through it.
type served struct {
	*channel
	worker   *net.UnixConn
	lines    chan string // closed when serve has returned
	internal chan string
	err      error
}

func newServed(t *testing.T) *served {
	t.Helper()
	c, file, err := newChannel()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	s := &served{channel: c, worker: conn.(*net.UnixConn), lines: make(chan string, 1000), internal: make(chan string, 1000)}
	go func() {
		s.err = c.serve(func(line []byte, internal bool) {
			if internal {
				s.internal <- string(line)
			} else {
				s.lines <- string(line)
			}
		})
		close(s.lines)
	}()
	t.Cleanup(func() { c.close(); conn.Close() })
	return s
}

// wait returns serve's error and the lines that nobody took.
func (s *served) wait() (lines []string, err error) {
	for line := range s.lines {
		lines = append(lines, line)
	}
	return lines, s.err
}

func TestChannelBothWays(t *testing.T) {
	s := newServed(t)
	io.WriteString(s.worker, "{\"a\":1}\n[2]\n\"NODE_\"\n {\"cmd\":\"NODE_X\"}\r\n{\"cmd\":\"NODE_\"}\n\"cut")
	if err := s.send([]byte(`{"to":"worker"}`)); err != nil {
		t.Error(err)
	}
	if line, err := bufio.NewReader(s.worker).ReadString('\n'); line != "{\"to\":\"worker\"}\n" {
		t.Errorf("the worker got %q, %v", line, err)
	}
	s.worker.Close()
	lines, err := s.wait()
	if want := []string{`{"a":1}`, `[2]`, `"NODE_"`, `{"cmd":"NODE_"}`}; fmt.Sprint(lines) != fmt.Sprint(want) || err != nil {
		t.Errorf("got %q, %v; want %q", lines, err, want)
	}
	if line := <-s.internal; line != " {\"cmd\":\"NODE_X\"}\r" {
		t.Errorf("internal: %q", line)
	}
	if err := s.send([]byte(`1`)); err != ErrChannelClosed {
		t.Errorf("send on a closed channel: %v", err)
	}
}

func TestChannelRefusesToSend(t *testing.T) {
	s := newServed(t)
	for line, want := range map[string]error{
		"":                                   ErrNotJSON,
		"hello":                              ErrNotJSON,
		"[1,\n2]":                            ErrNotJSON,
		`"` + strings.Repeat("x", maxLine-1): ErrLineTooLong,
	} {
		if err := s.send([]byte(line)); err != want {
			t.Errorf("send(%.20q): %v, want %v", line, err, want)
		}
	}
}

// A worker that does it wrong loses its channel, and sees that.
func TestChannelViolation(t *testing.T) {
	for name, test := range map[string]struct {
		writes func(w io.Writer)
		want   error
	}{
		"no JSON":    {func(w io.Writer) { io.WriteString(w, "[1]\nhello\n[2]\n") }, ErrNotJSON},
		"empty line": {func(w io.Writer) { io.WriteString(w, "[1]\n\n") }, ErrNotJSON},
		"100 MB": {func(w io.Writer) {
			io.WriteString(w, "[1]\n")
			io.CopyN(w, endless{}, 100<<20)
		}, ErrLineTooLong},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServed(t)
			wrote := make(chan struct{})
			go func() { test.writes(s.worker); close(wrote) }()
			lines, err := s.wait()
			if !errors.Is(err, test.want) || len(lines) != 1 {
				t.Errorf("got %q, %v; want [1], %v", lines, err, test.want)
			}
			<-wrote // not for ever
			if _, err := s.worker.Read(make([]byte, 1)); err == nil {
				t.Error("the worker's end is still open")
			}
		})
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '1'
	}
	return len(p), nil
}

// A line of maxLine is taken, whole.
func TestChannelLongestLine(t *testing.T) {
	s := newServed(t)
	line := append(bytes.Repeat([]byte("1"), maxLine-1), '\n')
	go func() { s.worker.Write(line); s.worker.Close() }()
	lines, err := s.wait()
	if len(lines) != 1 || len(lines[0]) != maxLine-1 || err != nil {
		t.Errorf("%d lines, %v", len(lines), err)
	}
}

// A worker that does not read is refused messages, and gets all others when it
// does.
func TestChannelNeverReads(t *testing.T) {
	s := newServed(t)
	text := strings.Repeat("x", 10000)
	sent := 0
	for {
		line, _ := json.Marshal([]any{sent, text})
		if err := s.send(line); err != nil {
			if err != ErrChannelFull {
				t.Fatal(err)
			}
			break
		}
		if sent++; sent*len(line) > 2*maxQueue {
			t.Fatal("the queue has no bound")
		}
	}
	in := lineReader{r: s.worker}
	for n := range sent {
		line, err := in.next()
		if err != nil || !bytes.HasPrefix(line, fmt.Appendf(nil, "[%d,", n)) {
			t.Fatalf("message %d of %d is %.20q, %v", n, sent, line, err)
		}
	}
	if err := s.send([]byte(`"again"`)); err != nil {
		t.Error(err)
	}
	if line, err := in.next(); string(line) != `"again"` {
		t.Errorf("then %q, %v", line, err)
	}
}

// What the worker sent before the channel was closed is read, though something
// still holds the worker's end.
func TestChannelLastWords(t *testing.T) {
	s := newServed(t)
	for n := range 100 {
		fmt.Fprintln(s.worker, n)
	}
	s.close()
	if lines, err := s.wait(); len(lines) != 100 || err != nil {
		t.Errorf("%d lines, %v", len(lines), err)
	}
	if _, err := s.worker.Write([]byte("1\n")); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the worker's next write: %v", err)
	}
}

// A descriptor that a worker sends stays open nowhere.
func TestChannelTakesNoDescriptor(t *testing.T) {
	s := newServed(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, line := range []string{"[1]\n", `{"type":"net.Socket", "cmd":"NODE_HANDLE"}` + "\n"} {
		if _, _, err := s.worker.WriteMsgUnix([]byte(line), unix.UnixRights(int(w.Fd()), 0, 1, 2), nil); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	answer, err := bufio.NewReader(s.worker).ReadString('\n')
	if answer != `{"cmd":"NODE_HANDLE_NACK"}`+"\n" {
		t.Errorf("answer %q, %v", answer, err)
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("somebody holds the descriptor: %v", err)
	}
	if line := <-s.lines; line != "[1]" {
		t.Errorf("got %q", line)
	}
}

// A handle arrives with its line, and what follows waits for the answer.
func TestChannelHandle(t *testing.T) {
	for _, answer := range []string{"NODE_HANDLE_ACK", "NODE_HANDLE_NACK"} {
		s := newServed(t)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		refused := make(chan struct{}, 1)
		if err := s.sendCopy([]byte(`"handle"`), int(w.Fd()), func() { refused <- struct{}{} }); err != nil {
			t.Fatal(err)
		}
		w.Close()
		s.send([]byte(`"after"`))
		data, oob := make([]byte, 100), make([]byte, 100)
		n, oobn, _, _, err := s.worker.ReadMsgUnix(data, oob)
		if string(data[:n]) != "\"handle\"\n" || err != nil {
			t.Fatalf("got %q, %v", data[:n], err)
		}
		fd := -1
		if cmsgs, _ := unix.ParseSocketControlMessage(oob[:oobn]); len(cmsgs) == 1 {
			if fds, _ := unix.ParseUnixRights(&cmsgs[0]); len(fds) == 1 {
				fd = fds[0]
			}
		}
		unix.Write(fd, []byte("!"))
		unix.Close(fd)
		if data, err := io.ReadAll(r); string(data) != "!" {
			t.Errorf("through the descriptor came %q, %v: it was not sent, or is still open", data, err)
		}
		r.Close()
		s.mu.Lock()
		queued := len(s.queue)
		s.mu.Unlock()
		if queued != 1 {
			t.Errorf("%d messages wait for the answer, want 1", queued)
		}
		fmt.Fprintf(s.worker, "{\"cmd\":%q}\n", answer)
		if n, err := s.worker.Read(data); string(data[:n]) != "\"after\"\n" {
			t.Errorf("then %q, %v", data[:n], err)
		}
		s.worker.Close()
		s.wait()
		if (len(refused) == 1) != (answer == "NODE_HANDLE_NACK") {
			t.Errorf("%s: refused was called %d times", answer, len(refused))
		}
	}
}

// A channel that nobody uses costs no thread.
func TestChannelThreads(t *testing.T) {
	threads := func() int {
		entries, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := threads()
	for range 200 {
		s := newServed(t)
		io.WriteString(s.worker, "1\n")
		<-s.lines // it is being served
	}
	if n := threads(); n > before+50 {
		t.Errorf("%d threads, and %d before there were 200 channels", n, before)
	}
}

// The examples of workers in other languages.
func TestChannelExamples(t *testing.T) {
	for _, name := range []string{"worker.py", "worker.sh"} {
		t.Run(name, func(t *testing.T) {
			c, theirs, err := newChannel()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("../tests/testdata/channel/" + name)
			cmd.Env = append(os.Environ(), channelVar+"=3", formatVar+"=json")
			cmd.ExtraFiles, cmd.Stderr = []*os.File{theirs}, os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			theirs.Close()
			lines, done := make(chan string, 2), make(chan error)
			go func() { done <- c.serve(func(line []byte, _ bool) { lines <- string(line) }) }()
			for _, message := range []string{`{"hello":"wörld"}`, `[1,2]`} {
				c.send([]byte(message))
				var got struct {
					Said json.RawMessage `json:"you said"`
				}
				select {
				case line := <-lines:
					json.Unmarshal([]byte(line), &got)
				case err := <-done:
					t.Fatalf("the channel ended: %v", err)
				}
				var a, b any
				json.Unmarshal(got.Said, &a)
				json.Unmarshal([]byte(message), &b)
				if fmt.Sprint(a) != fmt.Sprint(b) {
					t.Errorf("sent %s, it answered %s", message, got.Said)
				}
			}
			c.close() // it ends of the end of file
			if err := <-done; err != nil {
				t.Error(err)
			}
			cmd.Wait()
		})
	}
}

// Lines come whole however the stream cuts them.
func FuzzLineReader(f *testing.F) {
	f.Add([]byte("1\n[2]\n\"three\"\n"), uint8(1))
	f.Add([]byte("1\nx\n3\n"), uint8(3))
	f.Add([]byte("\n"), uint8(9))
	f.Add(append(bytes.Repeat([]byte("1"), 10000), "\n2"...), uint8(255))
	f.Fuzz(func(t *testing.T, data []byte, cut uint8) {
		in := lineReader{r: &cutReader{data, int(cut)%50*100 + 1}}
		for rest := data; ; {
			want, after, ok := bytes.Cut(rest, []byte("\n"))
			got, err := in.next()
			switch {
			case !ok && err == io.EOF:
				return
			case ok && !json.Valid(want) && errors.Is(err, ErrNotJSON):
				return
			case !ok || err != nil || !bytes.Equal(got, want):
				t.Fatalf("got %q, %v; want %q, %v", got, err, want, ok)
			}
			rest = after
		}
	})
}

type cutReader struct {
	data []byte
	cut  int
}

func (r *cutReader) Read(p []byte) (int, error) {
	if len(r.data) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.data[:min(r.cut, len(r.data))])
	r.data = r.data[n:]
	return n, nil
}

// What is internal is so for Node as well.
func FuzzInternalCommand(f *testing.F) {
	f.Add([]byte(`{"cmd":"NODE_CLUSTER","act":"online"}`))
	f.Add([]byte(`{"\u0063md":"NOD\u0045_X"}`))
	f.Add([]byte(`["NODE_X"]`))
	f.Add([]byte(`{"CMD":"NODE_X","cmd":5}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		var v any
		if json.Unmarshal(line, &v) != nil {
			return // lineReader lets none through
		}
		object, _ := v.(map[string]any)
		cmd, _ := object["cmd"].(string)
		if !strings.HasPrefix(cmd, "NODE_") || cmd == "NODE_" {
			cmd = ""
		}
		if got := internalCommand(line); (got == "") != (cmd == "") {
			t.Errorf("internalCommand(%s) = %q, want %q", line, got, cmd)
		}
	})
}
