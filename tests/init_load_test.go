package tests

import (
	"fmt"
	"io"
	"net"
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
// pid, once it was sent a line. On TERM it accepts no more, and ends when it has
// answered all. (Go's own http.Server.Shutdown does not: a request that it reads
// meanwhile finds its connection closed.)
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
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				if _, err := conn.Read(make([]byte, 1)); err == nil {
					io.WriteString(conn, strconv.Itoa(os.Getpid()))
				}
			})
		}
	})
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
	l.Close()
	all.Wait()
	return 0
}

// request asks what listens at the address, and returns its answer.
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

// TestChangeUnderLoad has clients ask without a pause, each time over a new
// connection, while the service is reloaded and scaled. Not one request may fail.
func TestChangeUnderLoad(t *testing.T) {
	for _, test := range []struct {
		name    string
		flags   []string
		changes [][]string
	}{
		{"shared", nil, [][]string{{"reload"}, {"scale", "4"}, {"reload"}, {"scale", "1"}, {"reload"}}},
		{"reuseport", []string{"--reuseport"}, [][]string{{"reload"}, {"scale", "4"}, {"reload"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newService(t)
			args := append([]string{"-n2", "--ready", "fd", "--listen", "tcp://127.0.0.1:0", "--events", "events"}, test.flags...)
			cmd := s.command("start", append(args, "--", testExe)...)
			cmd.Env = append(cmd.Env, usedRole(t, "answer"))
			if status, _, stderr := s.finish(cmd); status != 0 {
				t.Fatalf("status %d: %s", status, stderr)
			}
			text, _ := os.ReadFile(filepath.Join(s.dir, "events"))
			address := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(string(text))
			if address == "" {
				t.Fatalf("no address in\n%s", text)
			}
			var done, failed atomic.Int64
			var pids sync.Map
			stop := make(chan struct{})
			var clients sync.WaitGroup
			for range 4 {
				clients.Go(func() {
					for !isClosed(stop) {
						pid, err := request(address)
						if err == nil {
							pids.Store(pid, true)
							done.Add(1)
						} else if failed.Add(1) == 1 {
							t.Errorf("a request fails: %v", err)
						}
					}
				})
			}
			await := func(more int64) {
				t.Helper()
				want := done.Load() + more
				eventually(t, "requests are answered", func() bool { return done.Load() >= want || failed.Load() > 0 })
			}
			await(100)
			for _, change := range test.changes {
				s.want(0, change[0], change[1:]...)
				await(100)
			}
			close(stop)
			clients.Wait()
			servers := 0
			pids.Range(func(any, any) bool { servers++; return true })
			s.want(0, "stop")
			t.Logf("%d requests, answered by %d workers during %s: %d failed", done.Load(), servers,
				strings.ReplaceAll(strings.Trim(fmt.Sprint(test.changes), "[]"), "] [", ", "), failed.Load())
			if servers < 6 {
				t.Errorf("only %d workers have answered", servers)
			}
		})
	}
}
