package tests

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// nodeCache is where testdata/node/fetch.sh has versions of Node and packages.
var nodeCache = sync.OnceValues(func() (dir string, err error) {
	cmd := exec.Command("sh", append([]string{"testdata/node/fetch.sh"}, nodeVersions...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("cannot fetch Node (-short does without): %s: %w", &stderr, err)
	}
	return strings.TrimSpace(string(out)), err
})

// nodeVersions are those that are tried beside the one on PATH.
var nodeVersions = []string{"18", "22", "24"}

// nodes returns the programs, by version; with -short the one on PATH alone.
func nodes(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{"PATH": "node"}
	if testing.Short() {
		return all
	}
	dir, err := nodeCache()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range nodeVersions {
		all[v] = filepath.Join(dir, v, "node")
	}
	return all
}

// nodeScript returns the path of a script in testdata/node.
func nodeScript(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("testdata/node/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// startNodes starts `pgroup run --node-cluster args…` with more variables.
func startNodes(t *testing.T, env []string, args ...string) *cluster {
	t.Helper()
	cmd := pgroupRun(append([]string{"--events=fd:3", "--node-cluster"}, args...)...)
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), env...)
	r, w := pipe(t)
	r.SetReadDeadline(time.Now().Add(jobLimit))
	cmd.ExtraFiles = []*os.File{w}
	c := &cluster{job: startJob(t, cmd), log: bufio.NewReader(r)}
	w.Close()
	return c
}

// awaitReady reads events until n workers are ready, and returns their pids.
func (c *cluster) awaitReady(n int) map[int]int {
	c.t.Helper()
	pids := map[int]int{}
	for range n {
		e := c.await("ready", 0)
		pids[e.number("worker")] = e.number("pid")
	}
	if len(pids) != n {
		c.t.Fatalf("ready are %v, want %d workers", pids, n)
	}
	return pids
}

// listens returns where the next worker says that it listens.
func (c *cluster) listens() (network, address string) {
	c.t.Helper()
	line := c.line()
	var ip struct {
		Address string
		Port    int
	}
	if json.Unmarshal([]byte(line), &address) == nil {
		return "unix", address
	}
	if err := json.Unmarshal([]byte(line), &ip); err != nil {
		c.t.Fatalf("a worker says %q and not where it listens", line)
	}
	return "tcp", fmt.Sprintf("%s:%d", ip.Address, ip.Port)
}

// listenOn returns what server.js takes.
func listenOn(address string) string {
	host, port, _ := net.SplitHostPort(address)
	return fmt.Sprintf(`{"port":%s,"host":%q}`, port, host)
}

// A slow is a request that is being answered.
type slow struct {
	t    *testing.T
	conn net.Conn
	body io.Reader
}

// askSlow makes a request whose answer ends when all of it was sent, which it is
// not yet, and reads the first half.
func askSlow(t *testing.T, address string) slow {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(askLimit))
	io.WriteString(conn, "POST /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	half := make([]byte, len("first half"))
	if _, err := io.ReadFull(resp.Body, half); err != nil || string(half) != "first half" {
		t.Fatalf("%q, %v", half, err)
	}
	return slow{t, conn, resp.Body}
}

// finish sends the rest and wants that of the answer.
func (s slow) finish() {
	s.t.Helper()
	io.WriteString(s.conn, "x")
	if rest, err := io.ReadAll(s.body); err != nil || string(rest) != ", second half" {
		s.t.Errorf("the second half of the answer is %q, %v", rest, err)
	}
}

// A nodeEnd is a way in which a run of Node processes comes to its end.
type nodeEnd struct {
	name   string
	window window
	strike func(*cell)
	status string // of the launcher, where it is our child
	grace  bool   // who handles TERM has had it
}

var nodeEnds = []nodeEnd{
	{name: "TERM", strike: func(c *cell) { c.signal(syscall.SIGTERM) }, status: "0", grace: true},
	{name: "INT", strike: func(c *cell) { c.signal(syscall.SIGINT) }, status: "INT"},
	{name: "HUP", strike: func(c *cell) { c.signal(syscall.SIGHUP) }, status: "HUP"},
	{name: "QUIT", strike: func(c *cell) { c.signal(syscall.SIGQUIT) }, status: "QUIT"},
	{name: "timeout", strike: func(*cell) {}, status: "124", grace: true},
	{name: "KILL-launcher", strike: func(c *cell) { c.signal(syscall.SIGKILL) }, status: "KILL", grace: true},
	{name: "KILL-leader", strike: (*cell).killLeader, status: "125", grace: true},
	{name: "KILL-both", strike: (*cell).killBoth, status: "KILL"},
	{name: "KILL-workers", strike: (*cell).killWorkers, status: "KILL"},
	{name: "window", window: windowJob, strike: func(c *cell) { c.window.Close() }},
	{name: "window-e", window: windowRoot, strike: func(c *cell) { c.window.Close() }},
}

// killWorkers kills what the leader has started.
func (c *cell) killWorkers() {
	c.t.Helper()
	leader := c.leader()
	workers := pidsWith(func(pid int) bool {
		s, ok := readStat(pid)
		return ok && s.ppid == leader
	})
	if leader == 0 || len(workers) == 0 {
		c.t.Fatalf("leader %d has no workers\n%s", leader, c.report())
	}
	for _, pid := range workers {
		kill(c.t, pid, unix.SIGKILL)
	}
}

// busy has one of the workers hear of nothing any more.
func busy(t *testing.T, address string) {
	t.Helper()
	client := http.Client{Timeout: askLimit}
	resp, err := client.Get("http://" + address + "/busy")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

// processes returns how many live of node, and of sleep.
func (c *cell) processes() (nodes, sleeps int) {
	for _, pid := range c.launchers() {
		switch filepath.Base(cmdline(pid)[0]) {
		case "node":
			nodes++
		case "sleep":
			sleeps++
		}
	}
	return nodes, sleeps
}

// A master with 8 workers, which have a child each, and the same server with no
// master at all: whatever ends the run, nothing of it is left.
func TestNodeOrphans(t *testing.T) {
	t.Parallel()
	type tree struct {
		name   string
		flags  string
		script string
		nodes  int
		sleeps int
		busy   bool
		ends   []string // nil: all but KILL-both
	}
	for _, k := range []tree{
		{name: "master", script: "cluster.js", nodes: 9, sleeps: 8},
		{
			name: "busy", script: "cluster.js", nodes: 9, sleeps: 8, flags: "--grace=1s", busy: true,
			ends: []string{"KILL-launcher", "KILL-workers"},
		},
		{name: "node-cluster", script: "server.js", nodes: 8, flags: "-n 8 --node-cluster"},
		{
			name: "restart", script: "server.js", nodes: 3, flags: "-n 3 --node-cluster --restart=always",
			ends: []string{"TERM", "INT", "KILL-launcher", "KILL-leader", "window"},
		},
		{
			name: "pidns", script: "server.js", nodes: 3, flags: "-n 3 --node-cluster --restart=always --contain=pidns",
			ends: []string{"TERM", "KILL-launcher", "KILL-both"},
		},
	} {
		for _, e := range nodeEnds {
			if k.ends == nil && e.name == "KILL-both" || k.ends != nil && !slices.Contains(k.ends, e.name) {
				continue
			}
			t.Run(k.name+"/"+e.name, func(t *testing.T) {
				t.Parallel()
				address := reservePort(t)
				args := append([]string{"--grace=5s"}, strings.Fields(k.flags)...)
				if e.name == "timeout" {
					args = append(args, "--timeout=5s")
				}
				args = append(args, "--", "node", nodeScript(t, k.script))
				ready := 1
				if k.script == "cluster.js" {
					_, port, _ := net.SplitHostPort(address)
					args = append(args, port)
				} else {
					args = append(args, listenOn(address))
					var port int
					fmt.Sscanf(address, "127.0.0.1:%d", &port)
					ready = k.nodes * len(fmt.Sprintf(`{"address":"127.0.0.1","family":"IPv4","port":%d}`+"\n", port))
				}
				c := startCell(t, pgroupRun(args...), e.window, ready)
				c.awaitUp()
				if e.name != "timeout" { // else it may be over
					if nodes, sleeps := c.processes(); nodes != k.nodes || sleeps != k.sleeps {
						t.Errorf("%d processes of node and %d of sleep, want %d and %d", nodes, sleeps, k.nodes, k.sleeps)
					}
				}
				if k.busy {
					busy(t, address)
				}
				e.strike(c)
				if survivors, hangs := c.await(15 * time.Second); survivors > 0 || hangs {
					t.Fatalf("something survives\n%s", c.report())
				}
				if e.window == noWindow {
					if status := statusOf(c.cmd.ProcessState); status != e.status {
						t.Errorf("status %s, want %s\n%s", status, e.status, c.report())
					}
				}
				exited, _ := filepath.Glob(c.dir + "/exited.*")
				if e.grace && !k.busy && len(exited) < k.nodes {
					t.Errorf("%d of %d had the time to exit\n%s", len(exited), k.nodes, c.report())
				}
			})
		}
	}
}

// What that is worth: without a launcher, the master's death leaves behind what
// its workers started, and who is too busy to notice.
func TestNodeOrphansWithoutLauncher(t *testing.T) {
	t.Parallel()
	address := reservePort(t)
	_, port, _ := net.SplitHostPort(address)
	c := startCell(t, exec.Command("node", nodeScript(t, "cluster.js"), port), noWindow, 1)
	c.awaitUp()
	busy(t, address)
	c.signal(syscall.SIGKILL)
	eventually(t, "the idle workers have noticed", func() bool {
		nodes, sleeps := c.processes()
		return nodes == 1 && sleeps == 8
	})
}

// The article's master does its work as it does without us.
func TestNodeMaster(t *testing.T) {
	t.Parallel()
	address := reservePort(t)
	_, port, _ := net.SplitHostPort(address)
	cmd := pgroupRun("--", "node", nodeScript(t, "cluster.js"), port)
	cmd.Dir = t.TempDir()
	j := startJob(t, cmd)
	var master int
	fmt.Sscanf(j.line(), "up %d", &master)
	pids := map[int]int{}
	for n := range 16 {
		_, pid, err := askHTTP(address)
		if err != nil {
			t.Fatal(err)
		}
		pids[pid]++
		if got, want := j.line(), fmt.Sprint("requests ", n+1); got != want {
			t.Fatalf("the master says %q, want %q", got, want)
		}
	}
	if len(pids) != 8 {
		t.Errorf("of 8 workers answered %v", pids)
	}
	var victim int
	for victim = range pids {
		break
	}
	kill(t, victim, unix.SIGKILL)
	for _, want := range []string{fmt.Sprint("died ", victim), fmt.Sprint("up ", master)} {
		if got := j.line(); got != want {
			t.Errorf("the master says %q, want %q", got, want)
		}
	}
	if _, _, err := askHTTP(address); err != nil {
		t.Error(err)
	}
	j.signal(syscall.SIGTERM)
	j.wantStatus("0")
}

// A server that knows nothing of clusters, with no master.
func TestNodeServer(t *testing.T) {
	t.Parallel()
	for version, node := range nodes(t) {
		for _, policy := range []string{"rr", "none"} {
			t.Run(version+"/"+policy, func(t *testing.T) {
				t.Parallel()
				testNodeServer(t, node, policy)
			})
		}
	}
}

// hasListener reports whether the process holds the socket that listens at address.
func hasListener(t *testing.T, pid int, address string) bool {
	t.Helper()
	var port int
	fmt.Sscanf(address, "127.0.0.1:%d", &port)
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	files := openFiles(t, pid)
	for line := range strings.Lines(string(table)) {
		const local, state, inode, listen = 1, 3, 9, "0A"
		f := strings.Fields(line)
		if strings.HasSuffix(f[local], fmt.Sprintf(":%04X", port)) && f[state] == listen {
			for _, file := range files {
				if file == "socket:["+f[inode]+"]" {
					return true
				}
			}
			return false
		}
	}
	t.Fatalf("nobody listens at %s", address)
	return false
}

func testNodeServer(t *testing.T, node, policy string) {
	const n = 3
	address := reservePort(t)
	c := startNodes(t, []string{"NODE_CLUSTER_SCHED_POLICY=" + policy}, "-n", "3", "--restart=on-failure", "--",
		node, nodeScript(t, "server.js"), listenOn(address))
	pids := c.awaitReady(n)
	for worker, pid := range pids {
		if has := hasListener(t, pid, address); has != (policy == "none") {
			t.Errorf("worker %d has the socket itself: %t", worker, has)
		}
	}

	// Who answers, by worker, and by what the workers report.
	answered, reported := map[int]int{}, map[int]int{}
	askOne := func() int {
		t.Helper()
		worker, pid, err := askHTTP(address)
		if err != nil {
			t.Fatalf("after answers from %v: %v", answered, err)
		}
		if pid != pids[worker] {
			t.Fatalf("worker %d, process %d, answers; the workers are %v", worker, pid, pids)
		}
		answered[worker]++
		return worker
	}
	if policy == "rr" {
		for range 10 * n {
			askOne()
		}
		for worker := 1; worker <= n; worker++ {
			if answered[worker] < 8 || answered[worker] > 12 {
				t.Errorf("of %d requests the workers answered %v", 10*n, answered)
			}
		}
	} else {
		for len(answered) < n {
			suspendGroup(t, pids[askOne()]) // so that another one has to answer
		}
		c.signal(syscall.SIGCONT)
	}
	requests := 0
	for _, times := range answered {
		requests += times
	}
	for range requests {
		e := c.await("message", 0)
		if cmd := e["data"].(map[string]any)["cmd"]; cmd != "notifyRequest" {
			t.Errorf("a worker sent %v", e)
		}
		reported[e.number("worker")]++
	}
	if fmt.Sprint(reported) != fmt.Sprint(answered) {
		t.Errorf("workers answered %v and reported %v", answered, reported)
	}

	// One is killed with the connection that it was sent, and did not accept.
	if policy == "rr" {
		suspendGroup(t, pids[1])
		results := make(chan error, 2*n)
		for range cap(results) {
			go func() {
				worker, _, err := askHTTP(address)
				if err == nil && worker == 1 {
					err = fmt.Errorf("answered by worker 1, which was killed")
				}
				results <- err
			}()
		}
		for k := range cap(results) {
			if k == cap(results)-1 {
				kill(t, pids[1], unix.SIGKILL)
			}
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
	} else {
		kill(t, pids[1], unix.SIGKILL)
		for range 4 {
			if _, _, err := askHTTP(address); err != nil {
				t.Error(err)
			}
		}
	}
	if e := c.await("exit", 0); e.number("worker") != 1 || e["signal"] != "KILL" || e["restart"] == nil {
		t.Errorf("event %v, want the death of worker 1", e)
	}
	pids[1] = c.await("ready", 1).number("pid")
	if policy == "rr" {
		for tries := 0; askOne() != 1; tries++ {
			if tries > 2*n {
				t.Fatalf("worker 1 is there again, and gets no connection: %v", answered)
			}
		}
	}

	// A stop: what is being answered is answered, what is new is refused.
	a := askSlow(t, address)
	b := askSlow(t, address)
	c.signal(syscall.SIGTERM)
	c.await("stop", 0)
	eventually(t, "connections are refused", func() bool {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	a.finish()
	b.finish()
	c.wantStatus("0")
	exits := 0
	for _, e := range c.all("exit") {
		if e["status"] == 0.0 {
			exits++
		}
	}
	if exits != n {
		t.Errorf("%d workers ended with 0, want %d:\n%s", exits, n, c.story())
	}
	if exited, _ := filepath.Glob(c.cmd.Dir + "/exited.*"); len(exited) != n {
		t.Errorf("%d workers had the time to exit, want %d", len(exited), n)
	}
}

// Half of the grace period is for requests: then comes the stop signal, and then
// SIGKILL.
func TestNodeStopInSteps(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ script, status string }{
		"TERM":    {`process.on('SIGTERM', () => process.exit(3))`, "3"},
		"ignored": {`process.on('SIGTERM', () => {})`, "KILL"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// Without an argument, what Node gets by -e is no worker of a cluster.
			c := startNodes(t, nil, "--grace=1s", "--", "node", "-e", test.script+`
				setInterval(() => {}, 1000)
				require('http').createServer().listen(0, '127.0.0.1')`, "argument")
			c.awaitReady(1)
			c.signal(syscall.SIGTERM)
			c.wantStatus(test.status)
			limit := 500 * time.Millisecond
			if test.status == "KILL" {
				limit *= 2
			}
			exit := c.all("exit")[0]
			for _, e := range c.events {
				if took := exit.at(t).Sub(e.at(t)); e["event"] == "stop" && (took < limit || took > limit+5*time.Second) {
					t.Errorf("it ended %v after the stop, want %v", took, limit)
				}
			}
		})
	}
}

// Workers that somebody has stopped are continued at once, to hear of the stop.
func TestNodeStopOfSuspended(t *testing.T) {
	t.Parallel()
	c := startNodes(t, nil, "-n", "2", "--grace=1m", "--", "node", nodeScript(t, "server.js"), `{"port":0,"host":"127.0.0.1"}`)
	pids := c.awaitReady(2)
	suspendGroup(t, pids[1])
	c.signal(syscall.SIGTERM)
	c.wantStatus("0")
}

// What else a worker may listen on.
func TestNodeListens(t *testing.T) {
	t.Parallel()
	server := nodeScript(t, "server.js")
	stop := func(c *cluster) {
		c.t.Helper()
		c.signal(syscall.SIGTERM)
		c.wantStatus("0")
	}
	t.Run("port 0", func(t *testing.T) {
		t.Parallel()
		c := startNodes(t, nil, "-n", "2", "--", "node", server, `{"port":0,"host":"127.0.0.1"}`)
		pids := c.awaitReady(2)
		_, first := c.listens()
		if _, second := c.listens(); second != first {
			t.Errorf("the workers listen on %s and %s", first, second)
		}
		if worker, pid, err := askHTTP(first); err != nil || pid != pids[worker] {
			t.Errorf("process %d answers, %v; the workers are %v", pid, err, pids)
		}
		stop(c)
	})
	t.Run("unix", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "socket")
		c := startNodes(t, nil, "-n", "2", "--", "node", server, fmt.Sprintf(`{"path":%q}`, path))
		pids := c.awaitReady(2)
		if network, address := c.listens(); network != "unix" || address != path {
			t.Errorf("it listens on %s %s, want %s", network, address, path)
		}
		answered := map[int]bool{}
		for range 4 {
			conn, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			var worker, pid int
			fmt.Fscan(resp.Body, &worker, &pid)
			conn.Close()
			if pid == 0 || pid != pids[worker] {
				t.Errorf("process %d answers; the workers are %v", pid, pids)
			}
			answered[worker] = true
		}
		if len(answered) != 2 {
			t.Errorf("workers %v answered", answered)
		}
		stop(c)
		if _, err := os.Lstat(path); err == nil {
			t.Error("the socket's file is there after the end")
		}
	})
	t.Run("udp", func(t *testing.T) {
		t.Parallel()
		c := startNodes(t, nil, "-n", "2", "--", "node", nodeScript(t, "udp.js"), `{"port":0,"address":"127.0.0.1"}`)
		pids := c.awaitReady(2)
		_, first := c.listens()
		if _, second := c.listens(); second != first {
			t.Errorf("the workers listen on %s and %s", first, second)
		}
		if _, worker, pid, err := ask("udp", first); err != nil || pid != pids[worker] {
			t.Errorf("process %d answers, %v; the workers are %v", pid, err, pids)
		}
		stop(c)
	})
	t.Run("address in use", func(t *testing.T) {
		t.Parallel()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		c := startNodes(t, nil, "-n", "2", "--", "node", server, listenOn(l.Addr().String()))
		for range 2 {
			if got := c.line(); got != "EADDRINUSE" {
				t.Errorf("the server's error is %q", got)
			}
		}
		c.wantStatus("1")
		if ready := c.all("ready"); len(ready) > 0 {
			t.Errorf("ready are %v", ready)
		}
	})
	for _, script := range []string{"express.js", "fastify.js"} {
		t.Run(script, func(t *testing.T) {
			t.Parallel()
			if testing.Short() {
				t.Skip("-short fetches no packages")
			}
			dir, err := nodeCache()
			if err != nil {
				t.Fatal(err)
			}
			c := startNodes(t, []string{"NODE_PATH=" + dir + "/modules/node_modules"}, "-n", "2", "--", "node", nodeScript(t, script), `{"port":0,"host":"127.0.0.1"}`)
			pids := c.awaitReady(2)
			_, address := c.listens()
			answered := map[int]bool{}
			for range 4 {
				worker, pid, err := askHTTP(address)
				if err != nil || pid != pids[worker] {
					t.Errorf("process %d answers, %v; the workers are %v", pid, err, pids)
				}
				answered[worker] = true
			}
			if len(answered) != 2 {
				t.Errorf("workers %v answered", answered)
			}
			stop(c)
		})
	}
}
