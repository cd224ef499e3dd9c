package pgroup

import (
	"io"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMessageRoundTrip(t *testing.T) {
	want := message{kind: msgExited, worker: -3, a: -1 << 62, b: 1<<63 - 1}
	buf := want.append(nil)
	if len(buf) != messageSize {
		t.Errorf("a message has %d bytes, want %d", len(buf), messageSize)
	}
	if got := parseMessage(buf); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
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
