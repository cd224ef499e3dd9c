package tests

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// TestControlAbuse sends the control socket what is no request, and then wants it
// to serve as before.
func TestControlAbuse(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(serves, "--ready", "fd")...)
	healthy := func(after string) {
		t.Helper()
		if r := s.dial().wantOK(`{"do":"status"}`); r["status"].(map[string]any)["state"] != "ready" {
			t.Errorf("after %s: %v", after, r)
		}
	}
	for _, line := range []string{"", "garbage", "\x00\xff", "[]", `"do"`, `{"do":7}`, `{"do":`, strings.Repeat("[", 10000)} {
		a := s.dial()
		if r := a.ask(line); r["error"] == nil {
			t.Errorf("%.20q is answered with %v", line, r)
		}
		if r := a.next(); r != nil {
			t.Errorf("%.20q does not end the connection: %v", line, r)
		}
	}
	a := s.dial()
	for _, line := range []string{`null`, `{}`, `{"do":"bogus"}`, `{"do":"scale"}`, `{"do":"scale","workers":-1}`, `{"do":"scale","workers":1000000000}`} {
		if r := a.ask(line); r["error"] == nil {
			t.Errorf("%s is answered with %v", line, r)
		}
	}
	a.wantOK(`{"do":"status","more":[1,2]}`)
	healthy("garbage")

	// Lines that are too long: with an end or without one.
	for _, long := range [][]byte{bytes.Repeat([]byte("x"), 1<<20), append(bytes.Repeat([]byte(" "), 65536), '\n')} {
		a := s.dial()
		a.conn.Write(long) // it may be refused before it is all there
		if r := a.next(); r["error"] == nil {
			t.Errorf("a long line is answered with %v", r)
		}
	}
	if r := s.dial().ask(strings.Repeat(" ", 60000) + `{"do":"status"}`); r["ok"] != true {
		t.Errorf("a line of 60,000 bytes is answered with %v", r)
	}
	healthy("long lines")

	// Half messages, and clients that leave at once.
	for range 100 {
		a := s.dial()
		io.WriteString(a.conn, `{"do":"status"`)
		a.conn.Close()
		s.dial().conn.Close()
		a = s.dial()
		io.WriteString(a.conn, "{\"do\":\"status\"}\n")
		a.conn.Close()
	}
	half := s.dial()
	io.WriteString(half.conn, `{"do":"sta`)
	healthy("half messages")
	io.WriteString(half.conn, "tus\"}\n{\"do\":\"ready\"}\n") // two at once
	if r, q := half.next(), half.next(); r["ok"] != true || q["ok"] != true {
		t.Errorf("a message in halves is answered with %v, %v", r, q)
	}

	// Who closes its writing end still has its answer.
	b := s.dial()
	io.WriteString(b.conn, "{\"do\":\"status\"}\n")
	b.conn.(*net.UnixConn).CloseWrite()
	if r := b.next(); r["ok"] != true {
		t.Errorf("after a shutdown: %v", r)
	}
	s.want(0, "stop")
}

// TestControlCrowd has more clients than the launcher serves at once.
func TestControlCrowd(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(serves, "--ready", "fd")...)
	launcher := s.launcher()
	var clients []net.Conn
	defer func() {
		for _, c := range clients {
			c.Close()
		}
	}()
	for range 1000 {
		c, err := net.Dial("unix", s.pidfile+".sock")
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	s.want(0, "status")
	s.want(0, "scale", "2")
	s.want(0, "reload")
	if n := len(openFiles(t, launcher)); n > 100 {
		t.Errorf("the launcher has %d files open", n)
	}
	// Followers have a limit of their own, so that there is room for others. Those
	// that leave make room.
	for range 3 {
		var followers []*asker
		refused := 0
		for range 100 {
			a := s.dial()
			followers = append(followers, a)
			if r := a.ask(`{"do":"events"}`); r["ok"] != true {
				refused++
			}
		}
		if refused < 50 || refused > 90 {
			t.Errorf("%d of 100 followers were refused", refused)
		}
		s.want(0, "status")
		for _, a := range followers {
			a.conn.Close()
		}
	}
	s.want(0, "stop")
}

// TestControlOutOfFiles has a launcher that may open few files.
func TestControlOutOfFiles(t *testing.T) {
	t.Parallel()
	s := newService(t)
	cmd := s.command("start", shell(serves, "--ready", "fd")...)
	cmd.Args = append([]string{testExe, "", "nofile", "40"}, cmd.Args...)
	cmd.Path = testExe
	cmd.Env = append(cmd.Env, usedRole(t, "limited"))
	if status, stdout, stderr := s.finish(cmd); status != 0 {
		t.Fatalf("status %d, %q, %q", status, stdout, stderr)
	}
	for range 100 {
		s.dial()
	}
	s.want(0, "status")
	s.want(0, "reload")
	s.want(0, "scale", "3")
	s.want(0, "stop")
	s.nothingLeft()
}

// TestSlowFollower does not read its events: it loses some, is told how many, and
// nobody else waits for it.
func TestSlowFollower(t *testing.T) {
	t.Parallel()
	s := newService(t)
	// Of a real-time signal, each that is sent is received.
	const sig, enough = 40, 15000
	s.want(0, "start", shell(serves, "--ready", "fd", "--map", "40=")...)
	slow, quick := s.follow(), s.follow()
	launcher := s.launcher()
	var seen atomic.Int64
	done := make(chan struct{})
	count := func(e map[string]any) int64 {
		if e["event"] == "lost" {
			return int64(e["count"].(float64))
		}
		return 1
	}
	go func() {
		defer close(done)
		for e := quick.next(); e != nil; e = quick.next() {
			seen.Add(count(e))
		}
	}()
	for i := 0; seen.Load() < enough; i++ {
		kill(t, launcher, sig)
		if i%2000 == 0 {
			s.want(0, "status")
		}
	}
	// Now it reads, and is told of what it has missed.
	flood := seen.Load()
	var got, lost atomic.Int64
	read := make(chan struct{})
	go func() {
		defer close(read)
		for e := slow.next(); e != nil; e = slow.next() {
			if n := count(e); e["event"] == "lost" {
				lost.Add(n)
			} else {
				got.Add(n)
			}
		}
	}()
	eventually(t, "it has caught up", func() bool { return got.Load()+lost.Load() >= flood })
	s.want(0, "stop")
	<-done
	<-read
	if got, lost := got.Load(), lost.Load(); got < 100 || lost == 0 || got+lost != seen.Load() {
		t.Errorf("the slow one has %d events and lost %d, of %d", got, lost, seen.Load())
	}
	s.noFiles()
}

// TestEvents follows a service by the verb: the events are those of --events.
func TestEventsVerb(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.want(0, "start", shell(serves, "--ready", "fd", "--events", "events")...)
	j := startJob(t, s.command("events"))
	// It follows when it writes what happens.
	lines := make(chan string, 1)
	go func() {
		line, _ := j.stdout.ReadString('\n')
		lines <- line
	}()
	first := ""
	eventually(t, "an event", func() bool {
		s.want(0, "signal", "WINCH")
		select {
		case first = <-lines:
			return true
		default:
			return false
		}
	})
	if !strings.Contains(first, `"event":"relay"`) {
		t.Errorf("the first event is %q", first)
	}
	s.want(0, "scale", "2")
	s.want(0, "stop")
	j.wantStatus("0")
	rest, _ := io.ReadAll(j.stdout)
	text, _ := os.ReadFile(filepath.Join(s.dir, "events"))
	if !strings.HasSuffix(string(text), first+string(rest)) || !strings.Contains(string(rest), `"event":"end"`) {
		t.Errorf("it wrote\n%s%s--events has\n%s", first, rest, text)
	}

	// A killed launcher writes no end.
	s.want(0, "start", shell(serves, "--ready", "fd", "-g", "0")...)
	k := startJob(t, s.command("events"))
	go func() {
		line, _ := k.stdout.ReadString('\n')
		lines <- line
	}()
	eventually(t, "an event", func() bool {
		s.want(0, "signal", "WINCH")
		return len(lines) > 0
	})
	kill(t, s.launcher(), unix.SIGKILL)
	k.wantStatus("1")
	s.want(0, "stop")
}
