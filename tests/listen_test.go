package tests

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	_ "github.com/coreos/go-systemd/v22/activation" // testdata/servers/activation has it
	"golang.org/x/sys/unix"
)

func init() {
	roles["serve"] = serveRole
	roles["network"] = networkRole
}

// serveRole writes a line of what it was given, and serves the sockets: on each
// it tells who connects, or sends it a datagram, the socket's name, the worker's
// number and pid. It accepts one connection after the other.
func serveRole([]string) int {
	count, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	fmt.Println(os.Getpid(), os.Getenv("LISTEN_PID"), count, os.Getenv("LISTEN_FDNAMES"))
	for i := range count {
		f := os.NewFile(uintptr(3+i), names[i])
		answer := fmt.Appendf(nil, "%s %s %d\n", names[i], os.Getenv("PGROUP_WORKER"), os.Getpid())
		if l, err := net.FileListener(f); err == nil {
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						panic(err)
					}
					c.Write(answer)
					c.Close()
				}
			}()
			continue
		}
		c, err := net.FilePacketConn(f)
		if err != nil {
			panic(err)
		}
		go func() {
			for {
				_, from, err := c.ReadFrom(make([]byte, 16))
				if err != nil {
					panic(err)
				}
				c.WriteTo(answer, from)
			}
		}()
	}
	select {}
}

// networkRole executes args in a network that has nothing but lo yet.
func networkRole(args []string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "network:", err)
		return 125
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	ifr, _ := unix.NewIfreq("lo")
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fail(err)
	}
	return fail(syscall.Exec(args[0], args, withoutRole()))
}

// inNetwork reports whether the test runs as it should, in a network of its own:
// all ports are free there, and nobody else can connect to a wildcard address.
// If not it runs the test so, and the caller has nothing left to do.
func inNetwork(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideVar) != "" {
		return true
	}
	cmd := exec.Command(testExe, testExe, "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), usedRole(t, "network"), insideVar+"="+pgroupBin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in a network of its own: %v\n%s", err, out)
	}
	return false
}

// serve is the command line of a worker that plays serveRole.
func serve(t *testing.T) []string {
	t.Helper()
	return []string{"env", usedRole(t, "serve"), testExe}
}

// A listening is a run of several workers with its events.
type listening struct {
	*job
	events  *bufio.Reader
	addrs   []string    // of the listen events
	workers map[int]int // the pids, by number, as far as events were read
	dir     string      // marks its processes
}

// startListening starts `pgroup run args…`.
func startListening(t *testing.T, args ...string) *listening {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	t.Cleanup(func() { r.Close() })
	r.SetReadDeadline(time.Now().Add(jobLimit))
	cmd := pgroupRun(append([]string{"--events", "fd:3"}, args...)...)
	cmd.ExtraFiles = []*os.File{w}
	dir := t.TempDir()
	cmd.Env = append(os.Environ(), cellVar+"="+dir)
	return &listening{startJob(t, cmd), bufio.NewReader(r), nil, map[int]int{}, dir}
}

// next reads events to the next one called name.
func (c *listening) next(name string) event {
	c.t.Helper()
	for {
		line, err := c.events.ReadBytes('\n')
		if err != nil {
			text, _ := os.ReadFile(c.stderr)
			c.t.Fatalf("%s: no event %s: %v\n%s", c.cmd, name, err, text)
		}
		var e event
		if err := json.Unmarshal(line, &e); err != nil {
			c.t.Fatalf("%q: %v", line, err)
		}
		number := func(key string) int { n, _ := e[key].(float64); return int(n) }
		switch e["event"] {
		case "listen":
			c.addrs = append(c.addrs, e["address"].(string))
		case "start":
			c.workers[number("worker")] = number("pid")
		}
		if e["event"] == name {
			return e
		}
	}
}

// started reads events until n workers have been started.
func (c *listening) started(n int) {
	c.t.Helper()
	for range n {
		c.next("start")
	}
}

// stop sends TERM and returns the status, as the shell sees it.
func (c *listening) stop() int {
	c.t.Helper()
	c.cmd.Process.Signal(syscall.SIGTERM)
	return c.await()
}

// await waits for the end.
func (c *listening) await() int {
	c.t.Helper()
	select {
	case <-c.ended:
	case <-time.After(15 * time.Second):
		c.t.Fatalf("%s does not end", c.cmd)
	}
	ws := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// suspendGroup stops all threads of the group of pid, and waits until they have
// stopped: from then on none accepts.
func suspendGroup(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(-pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	members := pidsWith(func(p int) bool { s, ok := readStat(p); return ok && s.pgid == pid })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		running := 0
		for _, p := range members {
			tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p))
			for _, task := range tasks {
				if s, ok := readStatFile(task); ok && s.state != "T" {
					running++
				}
			}
		}
		if running == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d threads of group %d run in spite of SIGSTOP", running, pid)
		}
	}
}

// reservePort returns an address that is free, and stays so for others than
// those who ask for that port: it is bound, and nobody listens.
func reservePort(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port)
}

// askLimit is far more than any answer takes.
const askLimit = 15 * time.Second

// askHTTP returns which worker and process answers at addr on a new connection.
func askHTTP(addr string) (worker, pid int, err error) {
	client := http.Client{Timeout: askLimit, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + addr + "/")
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil {
		_, err = fmt.Sscan(string(body), &worker, &pid)
	}
	if err != nil || resp.StatusCode != 200 {
		err = fmt.Errorf("%s says %q, %v", resp.Status, body, err)
	}
	return worker, pid, err
}

// ask returns what a worker that plays serveRole tells at addr: the socket's
// name, its own number and its pid.
func ask(network, addr string) (name string, worker, pid int, err error) {
	c, err := net.DialTimeout(network, addr, askLimit)
	if err != nil {
		return "", 0, 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(askLimit))
	buf := make([]byte, 300)
	n := 0
	if network == "udp" {
		c.Write([]byte("who?"))
		n, err = c.Read(buf)
	} else {
		buf, err = io.ReadAll(c)
		n = len(buf)
	}
	if err != nil {
		return "", 0, 0, err
	}
	_, err = fmt.Sscan(string(buf[:n]), &name, &worker, &pid)
	return name, worker, pid, err
}

// TestListenServers: servers of all kinds, which find their sockets as they do
// under systemd, answer from every worker.
func TestListenServers(t *testing.T) {
	t.Parallel()
	dir, err := filepath.Abs("testdata/servers")
	if err != nil {
		t.Fatal(err)
	}
	built := func(t *testing.T, name string) []string {
		bin := filepath.Join(t.TempDir(), name)
		if out, err := exec.Command("go", "build", "-o", bin, dir+"/"+name+"/main.go").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return []string{bin}
	}
	for _, test := range []struct {
		name      string
		reuseport bool
		status    int // after TERM
		command   func(t *testing.T, addr string) []string
	}{
		{"gunicorn", false, 0, func(*testing.T, string) []string {
			return []string{"gunicorn", "--chdir", dir + "/gunicorn", "app"}
		}},
		{"puma", false, 128 + 15, func(_ *testing.T, addr string) []string {
			return []string{"puma", dir + "/puma/config.ru", "-b", "tcp://" + addr}
		}},
		{"node", false, 0, func(*testing.T, string) []string { return []string{"node", dir + "/node/server.js"} }},
		{"node", true, 0, func(*testing.T, string) []string { return []string{"node", dir + "/node/server.js"} }},
		{"nginx", true, 0, func(t *testing.T, addr string) []string {
			return []string{"sh", dir + "/nginx/run.sh", addr, t.TempDir()}
		}},
		{"activation", false, 0, func(t *testing.T, _ string) []string { return built(t, "activation") }},
		{"listeners", false, 0, func(t *testing.T, _ string) []string { return built(t, "listeners") }},
	} {
		name := test.name
		if test.reuseport {
			name += "-reuseport"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const n = 3
			addr := reservePort(t)
			args := []string{"-n", strconv.Itoa(n), "--listen", addr}
			if test.reuseport {
				args = append(args, "--reuseport")
			}
			command := test.command(t, addr)
			c := startListening(t, append(append(args, "--"), command...)...)
			c.started(n)
			answered := map[int]bool{}
			for tries := 0; len(answered) < n; tries++ {
				worker, pid, err := askHTTP(addr)
				if err != nil {
					t.Fatalf("after answers from %v: %v", answered, err)
				}
				// It may be a process that the worker has started.
				if pgid, err := syscall.Getpgid(pid); err != nil || pgid != c.workers[worker] {
					t.Fatalf("the answer is from worker %d, pid %d, in group %d (%v), but worker %d is process %d", worker, pid, pgid, err, worker, c.workers[worker])
				}
				answered[worker] = true
				switch {
				case test.reuseport && tries > 300:
					t.Fatalf("of %d answers all are from %v", tries, answered)
				case !test.reuseport && len(answered) < n:
					suspendGroup(t, c.workers[worker]) // so that another one has to answer
				}
			}
			if status := c.stop(); status != test.status {
				t.Errorf("status %d after TERM, want %d", status, test.status)
			}
			if _, _, err := askHTTP(addr); err == nil {
				t.Error("somebody answers after the end")
			}
		})
	}
}

// TestListenAddresses: sockets of all kinds in one run, each under its name.
func TestListenAddresses(t *testing.T) {
	t.Parallel()
	if !inNetwork(t) {
		return
	}
	path := filepath.Join(t.TempDir(), "socket")
	sockets := []struct {
		listen, reported, name string
		asks                   [][2]string // network, address
	}{
		{"four=127.0.0.1:7001", "127.0.0.1:7001", "four", [][2]string{{"tcp", "127.0.0.1:7001"}}},
		{"six=[::1]:7001", "[::1]:7001", "six", [][2]string{{"tcp", "[::1]:7001"}}},
		{"both=:7002", "[::]:7002", "both", [][2]string{{"tcp", "127.0.0.1:7002"}, {"tcp", "[::1]:7002"}}},
		{"tcp6://:7003", "tcp6://[::]:7003", "unknown", [][2]string{{"tcp", "[::1]:7003"}}},
		{"tcp://localhost:7004", "127.0.0.1:7004", "unknown", [][2]string{{"tcp", "127.0.0.1:7004"}}},
		{"dns=udp://127.0.0.1:7001", "udp://127.0.0.1:7001", "dns", [][2]string{{"udp", "127.0.0.1:7001"}}},
		{"any=udp://:7002", "udp://[::]:7002", "any", [][2]string{{"udp", "127.0.0.1:7002"}, {"udp", "[::1]:7002"}}},
		{"file=unix:" + path, "unix:" + path, "file", [][2]string{{"unix", path}}},
		{"abstract=unix:@x", "unix:@x", "abstract", [][2]string{{"unix", "@x"}}},
	}
	for _, reuseport := range []bool{false, true} {
		t.Run(fmt.Sprintf("reuseport=%t", reuseport), func(t *testing.T) {
			const n = 3
			args := []string{"-n", strconv.Itoa(n)}
			if reuseport {
				args = append(args, "--reuseport")
			}
			var reported, names []string
			for _, s := range sockets {
				args = append(args, "-l", s.listen)
				reported, names = append(reported, s.reported), append(names, s.name)
			}
			c := startListening(t, append(append(args, "--"), serve(t)...)...)
			c.started(n)
			if !slices.Equal(c.addrs, reported) {
				t.Errorf("listen events of %q, want %q", c.addrs, reported)
			}
			var given, want []string
			for worker := range n {
				pid := c.workers[worker+1]
				given = append(given, c.line())
				want = append(want, fmt.Sprintf("%d %d %d %s", pid, pid, len(sockets), strings.Join(names, ":")))
			}
			slices.Sort(given)
			slices.Sort(want)
			if !slices.Equal(given, want) {
				t.Errorf("pid, LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES are\n\t%s\nwant\n\t%s", strings.Join(given, "\n\t"), strings.Join(want, "\n\t"))
			}
			for _, s := range sockets {
				for _, a := range s.asks {
					name, worker, pid, err := ask(a[0], a[1])
					if err != nil || name != s.name || pid != c.workers[worker] {
						t.Errorf("%s %s: worker %d, process %d, answers on %q, %v; want %q; workers %v", a[0], a[1], worker, pid, name, err, s.name, c.workers)
					}
				}
			}
			if _, err := net.Dial("tcp", "127.0.0.1:7003"); err == nil {
				t.Error("tcp6:// accepts IPv4")
			}
			if status := c.stop(); status != 128+15 {
				t.Errorf("status %d after TERM", status)
			}
			if _, err := os.Lstat(path); err == nil {
				t.Error("the socket's file is there after the end")
			}
		})
	}
}

// TestListenTakeOver: the file of a socket that a killed launcher has left behind
// is no obstacle for the next one, and that of a living one is.
func TestListenTakeOver(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "socket")
	args := append([]string{"-n", "2", "--listen", "unix:" + path, "--"}, serve(t)...)
	answers := func(c *listening) {
		t.Helper()
		c.started(2)
		if _, worker, pid, err := ask("unix", path); err != nil || pid != c.workers[worker] {
			t.Fatalf("worker %d, process %d, answers, %v; want one of %v", worker, pid, err, c.workers)
		}
	}
	first := startListening(t, args...)
	answers(first)
	first.cmd.Process.Kill()
	<-first.ended
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		left := pidsWith(func(pid int) bool { return marked(pid, first.dir) })
		if len(left) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("processes %v live on", left)
		}
	}
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("the killed launcher has left no file, so this shows nothing: %v", err)
	}
	second := startListening(t, args...)
	answers(second)
	status, stdout, stderr := endSoon(t, pgroupRun(args...))
	wantRefused(t, status, stdout, stderr, "address already in use")
	if _, worker, pid, err := ask("unix", path); err != nil || pid != second.workers[worker] {
		t.Errorf("after another's start worker %d, process %d, answers, %v; want one of %v", worker, pid, err, second.workers)
	}
	second.stop()
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket's file is there after the end")
	}
}

// TestQueueOutlivesWorker: what waits in a worker's queue when the worker is
// killed is served by the next one. The worker that is killed has been suspended
// before, so that there is no connection that it has accepted: all that it had
// were in the queue.
func TestQueueOutlivesWorker(t *testing.T) {
	t.Parallel()
	for _, reuseport := range []bool{false, true} {
		t.Run(fmt.Sprintf("reuseport=%t", reuseport), func(t *testing.T) {
			t.Parallel()
			n := 1 // all are suspended, or the others would serve
			args := []string{"--restart", "always", "--listen", "127.0.0.1:0"}
			if reuseport {
				n = 3
				args = append(args, "--reuseport")
			}
			args = append(append(args, "-n", strconv.Itoa(n), "--"), serve(t)...)
			c := startListening(t, args...)
			c.started(n)
			for kill := range 2 * n {
				const clients = 60
				victim, old := 1+kill%n, c.workers[1+kill%n]
				suspendGroup(t, old)
				type answer struct {
					pid int
					err error
				}
				var connected sync.WaitGroup
				answers := make(chan answer)
				connected.Add(clients)
				for range clients {
					go func() {
						conn, err := net.Dial("tcp", c.addrs[0])
						connected.Done()
						if err != nil {
							answers <- answer{0, err}
							return
						}
						defer conn.Close()
						conn.SetDeadline(time.Now().Add(askLimit))
						line, err := io.ReadAll(conn)
						var name string
						var worker, pid int
						if err == nil {
							_, err = fmt.Sscan(string(line), &name, &worker, &pid)
						}
						answers <- answer{pid, err}
					}()
				}
				connected.Wait()
				if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				c.next("exit")
				c.next("start")
				lost, queued := 0, 0
				for range clients {
					switch a := <-answers; {
					case a.err != nil:
						lost++
						t.Log(a.err)
					case a.pid == c.workers[victim]:
						queued++
					case a.pid == old:
						t.Fatal("the worker has answered though it was suspended, so this shows nothing")
					}
				}
				if lost != 0 {
					t.Errorf("kill %d: %d connections are lost", kill, lost)
				}
				if queued == 0 || !reuseport && queued != clients {
					t.Errorf("kill %d: %d of %d connections were in the queue", kill, queued, clients)
				}
			}
			c.stop()
		})
	}
}

// TestKillUnderLoad: workers that serve as fast as they can get SIGKILL. Each
// accepts one connection after the other, so that a kill can cost the one that it
// has accepted and no more.
func TestKillUnderLoad(t *testing.T) {
	t.Parallel()
	for _, reuseport := range []bool{false, true} {
		t.Run(fmt.Sprintf("reuseport=%t", reuseport), func(t *testing.T) {
			t.Parallel()
			const n, kills, clients = 3, 6, 48
			args := []string{"-n", strconv.Itoa(n), "--restart", "always", "--listen", "127.0.0.1:0"}
			if reuseport {
				args = append(args, "--reuseport")
			}
			c := startListening(t, append(append(args, "--"), serve(t)...)...)
			c.started(n)
			var answers, failures atomic.Int64
			var mu sync.Mutex
			served := map[int]int{} // by pid
			var stop atomic.Bool
			var load sync.WaitGroup
			for range clients {
				load.Go(func() {
					for !stop.Load() {
						_, _, pid, err := ask("tcp", c.addrs[0])
						if err != nil {
							failures.Add(1)
							continue
						}
						answers.Add(1)
						mu.Lock()
						served[pid]++
						mu.Unlock()
					}
				})
			}
			hasServed := func(pid int) bool {
				mu.Lock()
				defer mu.Unlock()
				return served[pid] > 0
			}
			for kill := range kills {
				pid := c.workers[1+kill%n]
				if reuseport { // or nothing has it serve if the others are as fast
					for end := time.Now().Add(10 * time.Second); !hasServed(pid); time.Sleep(time.Millisecond) {
						if time.Now().After(end) {
							t.Fatalf("process %d has answered nobody for 10 s", pid)
						}
					}
				}
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				c.next("exit")
				c.next("start")
			}
			stop.Store(true)
			load.Wait()
			t.Logf("%d answers, %d connections failed that %d killed workers had accepted", answers.Load(), failures.Load(), kills)
			if failures.Load() > kills {
				t.Errorf("%d connections failed: at most %d were accepted, so the rest were lost in a queue", failures.Load(), kills)
			}
			c.stop()
		})
	}
}

// wantRefused checks what a run shows that could not listen: status 125, and one
// line in which the pattern matches.
func wantRefused(t *testing.T, status int, stdout, stderr, pattern string) {
	t.Helper()
	oneLine := strings.HasPrefix(stderr, "pgroup: ") && strings.Count(stderr, "\n") == 1 && strings.HasSuffix(stderr, "\n")
	if status != 125 || stdout != "" || !oneLine || !regexp.MustCompile(pattern).MatchString(stderr) {
		t.Errorf("status %d, standard output %q, standard error %q; want 125, nothing, and one line with %q", status, stdout, stderr, pattern)
	}
}

// TestListenRefused: nothing is started where a socket can't be opened, and no
// file is left of those that could.
func TestListenRefused(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, address, pattern string }{
		{"taken", taken.Addr().String(), `cannot listen on \S+: address already in use; ss -lntup`},
		{"file", "unix:" + plain, `cannot listen on \S+: address already in use; there is a file`},
		{"no-dir", "unix:" + dir + "/none/socket", `cannot listen on \S+: no such file or directory; create the directory`},
		{"elsewhere", "192.0.2.1:8000", `cannot listen on \S+: cannot assign requested address; no network interface`},
		{"no-port", "127.0.0.1", `cannot listen on "127.0.0.1": an address is`},
		{"bad-port", ":65536", `the port has to be`},
		{"bad-network", "sctp://:80", `the network has to be`},
		{"empty", "", `an address is`},
		{"bad-name", "a\tb=:0", `a name is`},
	} {
		for _, extra := range [][]string{nil, {"--reuseport"}} {
			t.Run(test.name+strings.Join(extra, ""), func(t *testing.T) {
				path := filepath.Join(dir, "socket")
				args := append([]string{"-n", "2", "--listen", "unix:" + path, "--listen", test.address}, extra...)
				status, stdout, stderr := endSoon(t, pgroupRun(append(args, "--", "echo", "started")...))
				wantRefused(t, status, stdout, stderr, test.pattern)
				if _, err := os.Lstat(path); err == nil {
					t.Error("it leaves the file of a socket")
				}
			})
		}
	}
	t.Run("port-80", func(t *testing.T) {
		// An ordinary user, in a network where no port below 1024 is allowed.
		cmd := pgroupRun("--listen", ":80", "--", "echo", "started")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if uid := os.Getuid(); uid == 0 {
			cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
		} else {
			cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		}
		status, stdout, stderr := endSoon(t, cmd)
		wantRefused(t, status, stdout, stderr, `cannot listen on :80: permission denied; ports below 1024 need root`)
	})
}

// writeProgram writes a file that is to be executed. Nothing is forked meanwhile:
// a child has it open for writing until its own exec, and execve(2) says ETXTBSY.
func writeProgram(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// TestListenExecFails: a command that can't be executed is the same failure with
// sockets, where the leader learns of it later, as without.
func TestListenExecFails(t *testing.T) {
	t.Parallel()
	dir := cellDir(t)
	for name, file := range map[string]struct {
		text string
		mode os.FileMode
	}{
		"plain":     {"echo ran", 0o644},
		"noshebang": {"echo ran; exit 7\n", 0o755},
		"nointerp":  {"#!/no/such/interpreter\n", 0o755},
		"badelf":    {"\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 100) + "\n", 0o755},
	} {
		writeProgram(t, filepath.Join(dir, name), file.text, file.mode)
	}
	for _, test := range []struct {
		command, want string // in pgroup's error
		status        int
	}{
		{"missing", "no such file", 127},
		{"pgroup-test-no-such-command", "no such file", 127},
		{"plain", "permission denied", 126},
		{".", "permission denied", 126},
		{"nointerp", "no such file", 127},
		{"noshebang", "", 7},
		{"badelf", "", 127}, // of sh, to which it is a script
	} {
		for _, workers := range []string{"1", "3"} {
			t.Run(test.command+"-"+workers, func(t *testing.T) {
				t.Parallel()
				command := test.command
				if !strings.HasPrefix(command, "pgroup-") {
					command = filepath.Join(dir, command)
				}
				var without string
				for _, listen := range [][]string{nil, {"--listen", "127.0.0.1:0"}} {
					args := append(slices.Clone(listen), "-n", workers, "--", command)
					status, stdout, stderr := endSoon(t, pgroupRun(args...))
					if status != test.status || strings.Contains(stdout, "ran") != (test.status == 7) {
						t.Errorf("%q: status %d, standard output %q, standard error %q; want %d", args, status, stdout, stderr, test.status)
					}
					if test.want == "" {
						continue
					}
					if strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "pgroup: cannot start ") || !strings.Contains(stderr, test.want) {
						t.Errorf("%q: standard error is %q, want one line with %q", args, stderr, test.want)
					}
					if listen != nil && stderr != without {
						t.Errorf("standard error is %q, and without sockets %q", stderr, without)
					}
					without = stderr
				}
			})
		}
	}
	t.Run("vanishes", func(t *testing.T) {
		t.Parallel()
		file := filepath.Join(dir, "vanishes")
		for _, listen := range [][]string{nil, {"--listen", "127.0.0.1:0"}} {
			writeProgram(t, file, "#!/bin/sh\nrm \"$0\"\nexit 1\n", 0o755)
			args := append(slices.Clone(listen), "--restart", "on-failure", "--max-restarts", "2", "--", file)
			if status, _, stderr := endSoon(t, pgroupRun(args...)); status != 127 || !strings.HasSuffix(stderr, "no such file or directory; check its name and PATH\n") {
				t.Errorf("%q: status %d, standard error %q; want 127", args, status, stderr)
			}
		}
	})
}

// limitedRun is `pgroup run args…` that may have so many open files.
func limitedRun(t *testing.T, nofile int, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(testExe, append([]string{"", "nofile", strconv.Itoa(nofile), pgroupBin, "run"}, args...)...)
	cmd.Env = append(os.Environ(), usedRole(t, "limited"))
	return cmd
}

// TestManyListeners: 200 workers, each with a socket and a channel of its own,
// within the usual limit on open files.
func TestManyListeners(t *testing.T) {
	t.Parallel()
	const n = 200
	cmd := limitedRun(t, 1024, "-n", strconv.Itoa(n), "--listen", "127.0.0.1:0", "--listen", "udp://127.0.0.1:0", "--reuseport", "--channel", "--",
		"sh", "-c", `echo $$ $LISTEN_PID $LISTEN_FDS $NODE_CHANNEL_FD $(ls -l /proc/self/fd/3 /proc/self/fd/4 /proc/self/fd/5 | grep -c socket); exec sleep 60`)
	j := startJob(t, cmd)
	pids := map[string]bool{}
	for range n {
		f := strings.Fields(j.line())
		if len(f) != 5 || f[0] != f[1] || f[2] != "2" || f[3] != "5" || f[4] != "3" {
			t.Fatalf("a worker's pid, LISTEN_PID, LISTEN_FDS, NODE_CHANNEL_FD and sockets are %q", f)
		}
		pids[f[0]] = true
	}
	if len(pids) != n {
		t.Errorf("%d processes, want %d", len(pids), n)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	c := &listening{job: j}
	if status := c.await(); status != 128+15 {
		t.Errorf("status %d after TERM", status)
	}
	if rest, _ := io.ReadAll(j.stdout); len(bytes.TrimSpace(rest)) != 0 {
		t.Errorf("%q after the end", rest)
	}
}

// TestListenOutOfFiles: 100 workers do not fit into 64 files, whoever lacks them.
func TestListenOutOfFiles(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "socket")
	// The launcher has room for these, but the leader has not.
	var many []string
	for i := range 52 {
		many = append(many, "--listen", fmt.Sprintf("unix:@pgroup-test-%d-%d", os.Getpid(), i))
	}
	for name, args := range map[string][]string{
		"leader":   append(many, "--listen", "unix:"+path),
		"sockets":  {"--listen", "unix:" + path, "--listen", "127.0.0.1:0", "--reuseport"},
		"channels": {"--listen", "unix:" + path, "--channel"},
	} {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"-n", "100", "--grace", "2"}, args...)
			status, _, stderr := endSoon(t, limitedRun(t, 64, append(args, "--", "sleep", "60")...))
			// One line of pgroup's own, beside those on workers that have ended.
			var lines []string
			for line := range strings.Lines(stderr) {
				if !strings.Contains(line, "SIGTERM") {
					lines = append(lines, line)
				}
			}
			wantRefused(t, status, "", strings.Join(lines, ""), `too many open files; raise the limit on open files \(ulimit -n\)`)
			if _, err := os.Lstat(path); err == nil {
				t.Error("it leaves the file of a socket")
			}
		})
	}
}
