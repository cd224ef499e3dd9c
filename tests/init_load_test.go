package tests

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	roles["answer"] = answerRole
}

// answerRole answers each connection to the socket that it was handed with its
// pid, once it was sent a line. On TERM it accepts what is in the socket's queue
// and no more, and ends when it has answered all. (Go's own http.Server.Shutdown
// does not: a request that it reads meanwhile finds its connection closed.)
func answerRole([]string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "answer:", err)
		return 99
	}
	l, err := net.FileListener(os.NewFile(3, "listen"))
	if err != nil {
		return fail(err)
	}
	terms := make(chan os.Signal, 1)
	signal.Notify(terms, unix.SIGTERM)
	answer := func(conn net.Conn) {
		defer conn.Close()
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			io.WriteString(conn, strconv.Itoa(os.Getpid()))
		}
	}
	var all sync.WaitGroup
	accepting := make(chan struct{})
	go func() {
		defer close(accepting)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { answer(conn) })
		}
	}()
	fd, err := strconv.Atoi(os.Getenv("PGROUP_READY_FD"))
	if err != nil {
		return fail(err)
	}
	ready := os.NewFile(uintptr(fd), "ready")
	defer ready.Close()
	if _, err := ready.WriteString("\n"); err != nil {
		return fail(err)
	}
	<-terms
	l.(*net.TCPListener).SetDeadline(time.Unix(1, 0))
	<-accepting
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		return fail(err)
	}
	raw.Control(func(fd uintptr) {
		for {
			queued, _, err := unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if err != nil { // EAGAIN
				return
			}
			file := os.NewFile(uintptr(queued), "connection")
			defer file.Close()
			if conn, err := net.FileConn(file); err == nil {
				all.Go(func() { answer(conn) })
			}
		}
	})
	l.Close()
	all.Wait()
	return 0
}

// request asks what listens at the address, over a new connection, and returns its
// answer.
func request(address string) (answer string, err error) {
	conn, err := net.DialTimeout("tcp", address, jobLimit)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(jobLimit))
	if _, err := conn.Write([]byte("?")); err != nil {
		return "", err
	}
	text, err := io.ReadAll(conn)
	if err == nil && len(text) == 0 {
		err = io.ErrUnexpectedEOF
	}
	return string(text), err
}

// httpRequest returns what does the same by HTTP. With keep, connections are kept for
// the next request: then the client, as every one, asks again if the server has
// closed such a one meanwhile.
func httpRequest(t *testing.T, keep bool) func(address string) (answer string, err error) {
	transport := &http.Transport{DisableKeepAlives: !keep, MaxIdleConnsPerHost: loadClients}
	t.Cleanup(transport.CloseIdleConnections)
	client := &http.Client{Transport: transport, Timeout: jobLimit}
	return func(address string) (answer string, err error) {
		resp, err := client.Get("http://" + address + "/")
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = errors.New(resp.Status)
		}
		return strings.TrimSpace(string(text)), err
	}
}

const loadClients = 4

// A change is one verb.
type change []string

// underLoad has clients ask without a pause while the service is reloaded and scaled.
// Not one request may fail, and as many workers have to have answered.
func (s *service) underLoad(address string, ask func(address string) (string, error), workers int, changes ...change) {
	s.t.Helper()
	var done, failed atomic.Int64
	var pids sync.Map
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range loadClients {
		clients.Go(func() {
			for !isClosed(stop) {
				pid, err := ask(address)
				if err == nil {
					pids.Store(pid, true)
					done.Add(1)
				} else if failed.Add(1) == 1 {
					s.t.Errorf("a request fails: %v", err)
				}
			}
		})
	}
	await := func(more int64) {
		s.t.Helper()
		want := done.Load() + more
		eventually(s.t, "requests are answered", func() bool { return done.Load() >= want || failed.Load() > 0 })
	}
	await(100)
	for _, change := range changes {
		begin, before := time.Now(), failed.Load()
		s.want(0, change[0], change[1:]...)
		s.t.Logf("%q: %v, %d failed", change, time.Since(begin).Round(time.Millisecond), failed.Load()-before)
		await(100)
	}
	close(stop)
	clients.Wait()
	servers := 0
	pids.Range(func(any, any) bool { servers++; return true })
	s.want(0, "stop")
	s.t.Logf("%d requests, answered by %d workers during %q: %d failed", done.Load(), servers, changes, failed.Load())
	if failed.Load() > 0 {
		s.t.Errorf("%d of %d requests failed", failed.Load(), done.Load()+failed.Load())
	}
	if servers < workers {
		s.t.Errorf("only %d workers have answered, want %d", servers, workers)
	}
}

// TestChangeUnderLoad changes a service whose workers share sockets that they were
// handed.
func TestChangeUnderLoad(t *testing.T) {
	changes := []change{{"reload"}, {"scale", "4"}, {"reload"}, {"scale", "1"}, {"scale", "3"}, {"reload"}}
	for _, test := range []struct {
		name  string
		flags []string
	}{
		{"shared", nil},
		{"reuseport", []string{"--reuseport"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newService(t)
			args := append([]string{"-n2", "--ready", "fd", "--listen", "tcp://127.0.0.1:0", "--events", "events"}, test.flags...)
			cmd := s.command("start", append(args, "--", testExe)...)
			// Under the race detector, each worker's exit would take a second.
			cmd.Env = append(cmd.Env, usedRole(t, "answer"), "GORACE=atexit_sleep_ms=0")
			if status, _, stderr := s.finish(cmd); status != 0 {
				t.Fatalf("status %d: %s", status, stderr)
			}
			text, _ := os.ReadFile(filepath.Join(s.dir, "events"))
			address := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(string(text))
			if address == "" {
				t.Fatalf("no address in\n%s", text)
			}
			s.underLoad(address, request, 6, changes...)
		})
	}
}

// TestNodeChangeUnderLoad changes a service of Node's own http server, which knows
// nothing of it.
func TestNodeChangeUnderLoad(t *testing.T) {
	script, err := filepath.Abs("testdata/load/server.js")
	if err != nil {
		t.Fatal(err)
	}
	changes := []change{{"scale", "3"}, {"reload"}, {"scale", "1"}}
	for version, node := range nodes(t) {
		for _, policy := range []string{"rr", "none"} {
			for _, keep := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/keep-alive=%t", version, policy, keep), func(t *testing.T) {
					s := newService(t)
					address := reservePort(t)
					_, port, _ := net.SplitHostPort(address)
					// A server does not end a kept connection that is busy, nor Node 18 an
					// idle one: its worker goes at half of the grace period.
					grace := map[bool]string{false: "4s", true: "1s"}[keep]
					cmd := s.command("start", "-n2", "-g", grace, "--node-cluster", "--", node, script, port)
					cmd.Env = append(cmd.Env, "NODE_CLUSTER_SCHED_POLICY="+policy)
					if status, _, stderr := s.finish(cmd); status != 0 {
						t.Fatalf("status %d: %s", status, stderr)
					}
					s.underLoad(address, httpRequest(t, keep), 3, changes...)
				})
			}
		}
	}
}
