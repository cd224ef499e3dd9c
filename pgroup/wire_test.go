package pgroup

import (
	"io"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMessageRoundTrip(t *testing.T) {
	want := message{kind: msgExited, worker: -3, a: -1 << 62, b: 1<<63 - 1}
	buf := want.append(nil)
	if len(buf) != messageSize {
		t.Errorf("a message has %d bytes, want %d", len(buf), messageSize)
	}
	if got, rest, ok := parseMessage(buf); got != want || len(rest) != 0 || !ok {
		t.Errorf("got %+v, %d bytes, %v; want %+v", got, len(rest), ok, want)
	}
}

// What comes with a record comes whole too, and each descriptor with its own.
func TestMessagePayload(t *testing.T) {
	a, b, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	from, to := newConn(a, true), newConn(b, true)
	defer to.close()
	var files []*os.File
	var sent []message
	for n := range 2*maxFDs + 10 {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
		env := envMessage(n, []string{"A=" + strings.Repeat("x", n), "B="})
		sent = append(sent, env, message{kind: msgFile, worker: int32(n), fd: int(f.Fd())}, message{kind: msgStart, worker: int32(n)})
	}
	go func() {
		from.send(sent...)
		from.close()
	}()
	for n := 0; ; {
		msgs, err := to.receive()
		for _, m := range msgs {
			want := sent[n]
			if m.kind != want.kind || m.worker != want.worker || m.text != want.text {
				t.Fatalf("message %d is %+v, want %+v", n, m, want)
			}
			if m.kind == msgFile {
				var got, st unix.Stat_t
				if err := unix.Fstat(m.fd, &got); err != nil {
					t.Fatalf("descriptor of message %d: %v", n, err)
				}
				unix.Fstat(want.fd, &st)
				if got.Ino != st.Ino {
					t.Fatalf("message %d came with another's descriptor", n)
				}
				unix.Close(m.fd)
			}
			n++
		}
		if err == io.EOF {
			if n != len(sent) {
				t.Errorf("%d messages came, want %d", n, len(sent))
			}
			break
		}
	}
	runtime.KeepAlive(files)
}

// Records come whole however the stream cuts them, then end of file.
func FuzzConn(f *testing.F) {
	f.Add(uint8(1), uint8(7))
	f.Add(uint8(5), uint8(messageSize))
	f.Add(uint8(3), uint8(messageSize+1))
	f.Fuzz(func(t *testing.T, count, cut uint8) {
		if cut == 0 {
			cut = 1
		}
		ours, theirs, err := socketPair()
		if err != nil {
			t.Skip(err)
		}
		c := newConn(ours, true)
		defer c.close()
		var data []byte
		for n := range int(count) {
			data = message{kind: msgAdopted, a: int64(n)}.append(data)
		}
		go func() {
			for len(data) > 0 {
				n := min(int(cut), len(data))
				unix.Write(theirs, data[:n])
				data = data[n:]
			}
			unix.Close(theirs)
		}()
		n := 0
		for {
			msgs, err := c.receive()
			for _, m := range msgs {
				if m.a != int64(n) {
					t.Fatalf("message %d came as %d", m.a, n)
				}
				n++
			}
			if err == io.EOF {
				break
			}
		}
		if n != int(count) {
			t.Errorf("%d messages came, want %d", n, count)
		}
	})
}
