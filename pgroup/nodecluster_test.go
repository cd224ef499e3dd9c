package pgroup

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A nodeRun is a primary with real workers.
type nodeRun struct {
	*primary
	t    *testing.T
	node string
	id   int
}

// A nodeProcess is one of them.
type nodeProcess struct {
	*channel
	t        *testing.T
	id       int
	cmd      *exec.Cmd
	ready    chan struct{}
	messages chan nodeTold
	gone     chan struct{} // it has ended, and everybody knows
}

// A nodeTold is what the scripts in testdata send.
type nodeTold struct {
	Listening json.RawMessage
	Worker    bool
	ID        int
	Error     string
	Echo      string
	Closed    bool
}

func newNodeRun(t *testing.T, node string, roundRobin bool) *nodeRun {
	r := &nodeRun{primary: newPrimary(roundRobin), t: t, node: node}
	t.Cleanup(r.close)
	return r
}

func (r *nodeRun) start(script string, args ...string) *nodeProcess {
	r.t.Helper()
	c, theirs, err := newChannel()
	if err != nil {
		r.t.Fatal(err)
	}
	r.id++
	w := &nodeProcess{channel: c, t: r.t, id: r.id, ready: make(chan struct{}),
		messages: make(chan nodeTold, 100), gone: make(chan struct{})}
	w.cmd = exec.Command(r.node, append([]string{"testdata/" + script}, args...)...)
	w.cmd.Env = append(os.Environ(), channelVar+"=3", formatVar+"=json", uniqueIDVar+"="+strconv.Itoa(w.id))
	if !testing.Short() {
		dir, _ := nodeCache()
		w.cmd.Env = append(w.cmd.Env, "NODE_PATH="+filepath.Join(dir, "modules/node_modules"))
	}
	w.cmd.ExtraFiles, w.cmd.Stderr = []*os.File{theirs}, os.Stderr
	r.join(w.id, c, func() { close(w.ready) })
	if err := w.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	theirs.Close()
	go func() {
		err := c.serve(func(line []byte, internal bool) {
			if internal {
				r.message(w.id, line)
				return
			}
			var m nodeTold
			if err := json.Unmarshal(line, &m); err != nil {
				r.t.Errorf("%s: %v", line, err)
			}
			w.messages <- m
		})
		if err != nil {
			r.t.Errorf("worker %d: %v", w.id, err)
		}
		r.leave(w.id)
		w.cmd.Wait()
		close(w.gone)
	}()
	r.t.Cleanup(func() { w.cmd.Process.Kill(); <-w.gone })
	return w
}

// told returns what the worker sends next.
func (w *nodeProcess) told() nodeTold {
	w.t.Helper()
	select {
	case m := <-w.messages:
		return m
	case <-w.gone:
		w.t.Fatalf("worker %d has ended: %v", w.id, w.cmd.ProcessState)
	}
	return nodeTold{}
}

// address waits until the worker is ready and returns where it listens.
func (w *nodeProcess) address() string {
	w.t.Helper()
	m := w.told()
	if m.Error != "" {
		w.t.Fatalf("worker %d: %s", w.id, m.Error)
	}
	<-w.ready
	var ip struct {
		Address string
		Port    int
	}
	var path string
	if json.Unmarshal(m.Listening, &path) == nil {
		return path
	}
	json.Unmarshal(m.Listening, &ip)
	switch ip.Address {
	case "::":
		ip.Address = "127.0.0.1" // of both versions
	case "":
		w.t.Fatalf("worker %d listens on %s", w.id, m.Listening)
	}
	return net.JoinHostPort(ip.Address, strconv.Itoa(ip.Port))
}

// get makes one request on a connection of its own.
func get(address, path string) (body string, err error) {
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
	}
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}}
	resp, err := client.Get("http://server" + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("status %s", resp.Status)
	}
	return string(b), err
}

// count makes n requests and returns how many each worker answered, by pid.
func count(t *testing.T, address string, n int) map[string]int {
	t.Helper()
	pids := make(map[string]int)
	for range n {
		pid, err := get(address, "/")
		if err != nil {
			t.Fatal(err)
		}
		pids[pid]++
	}
	return pids
}

// eachNode runs f for each version of Node.
func eachNode(t *testing.T, f func(t *testing.T, node string)) {
	for version, node := range nodes(t) {
		t.Run(version, func(t *testing.T) { f(t, node) })
	}
}

// eachPolicy runs f for each version and policy.
func eachPolicy(t *testing.T, f func(t *testing.T, node string, roundRobin bool)) {
	eachNode(t, func(t *testing.T, node string) {
		t.Run("rr", func(t *testing.T) { f(t, node, true) })
		t.Run("none", func(t *testing.T) { f(t, node, false) })
	})
}

// An unmodified server listens once for all workers, on any port, and its
// messages work.
func TestNodeHTTP(t *testing.T) {
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		r := newNodeRun(t, node, roundRobin)
		var workers []*nodeProcess
		for range 4 {
			workers = append(workers, r.start("http.js"))
		}
		first := ""
		for _, w := range workers {
			address := w.address()
			if first == "" {
				first = address
			}
			if address != first {
				t.Errorf("worker %d listens on %s, worker 1 on %s", w.id, address, first)
			}
			w.send([]byte(`{"echo":"hellö"}`))
			if m := w.told(); m.Echo != "hellö" {
				t.Errorf("got %+v", m)
			}
		}
		pids := count(t, first, 40)
		if roundRobin {
			for _, w := range workers {
				if n := pids[strconv.Itoa(w.cmd.Process.Pid)]; n < 5 {
					t.Errorf("worker %d answered %d requests of 40", w.id, n)
				}
			}
		}
	})
}

// What Node's own worker can see is as under Node's own primary.
func TestNodeWorkerIdentity(t *testing.T) {
	eachNode(t, func(t *testing.T, node string) {
		r := newNodeRun(t, node, true)
		r.start("http.js").address()
		if m := r.start("http.js").told(); !m.Worker || m.ID != 2 {
			t.Errorf("isWorker %v, worker.id %d", m.Worker, m.ID)
		}
	})
}

func TestNodeFrameworks(t *testing.T) {
	if testing.Short() {
		t.Skip("-short fetches no packages")
	}
	for _, script := range []string{"express.js", "fastify.js"} {
		t.Run(script, func(t *testing.T) {
			eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
				r := newNodeRun(t, node, roundRobin)
				a, b := r.start(script), r.start(script)
				address := a.address()
				b.address()
				if pids := count(t, address, 8); roundRobin && len(pids) != 2 {
					t.Errorf("of 2 workers answered %v", pids)
				}
			})
		})
	}
}

func TestNodeUDP(t *testing.T) {
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		for _, family := range [][]string{{"udp4", "127.0.0.1"}, {"udp6", "::1"}} {
			r := newNodeRun(t, node, roundRobin)
			a, b := r.start("udp.js", family...), r.start("udp.js", family...)
			address := a.address()
			if other := b.address(); other != address {
				t.Errorf("the workers listen on %s and %s", address, other)
			}
			c, err := net.Dial("udp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, "ping")
			buf := make([]byte, 100)
			n, err := c.Read(buf)
			if !strings.HasPrefix(string(buf[:n]), "ping ") {
				t.Errorf("answer %q, %v", buf[:n], err)
			}
		}
	})
}

func TestNodeUnixPath(t *testing.T) {
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		for _, path := range []string{"s", strings.Repeat("long", 20) + "/" + strings.Repeat("name", 10)} {
			r := newNodeRun(t, node, roundRobin)
			path = filepath.Join(t.TempDir(), path)
			os.Mkdir(filepath.Dir(path), 0o700)
			options, _ := json.Marshal(map[string]any{"path": path, "writableAll": true})
			a := r.start("http.js", string(options))
			if got := a.address(); got != path {
				t.Errorf("it listens on %s, want %s", got, path)
			}
			r.start("http.js", string(options)).address()
			if st, err := os.Stat(path); err != nil || st.Mode()&0o222 != 0o222 {
				t.Errorf("%v, %v", st, err)
			}
			// Through a name that fits: the client's limit is the same.
			dir, err := os.Open(filepath.Dir(path))
			if err != nil {
				t.Fatal(err)
			}
			defer dir.Close()
			count(t, fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)), 4)
			// The path is in nobody's way when all have closed it.
			r.close()
			if _, err := os.Stat(path); !os.IsNotExist(err) {
				t.Errorf("the path is still there: %v", err)
			}
		}
	})
}

// The worker's server emits what the primary's bind fails with.
func TestNodeBindErrors(t *testing.T) {
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		r := newNodeRun(t, node, roundRobin)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		port := l.Addr().(*net.TCPAddr).Port
		file := filepath.Join(t.TempDir(), "file")
		os.WriteFile(file, nil, 0o600)
		for options, want := range map[string]string{
			fmt.Sprintf(`{"port":%d,"host":"127.0.0.1"}`, port): "EADDRINUSE",
			fmt.Sprintf(`{"port":%d}`, port):                    "EADDRINUSE",
			`{"port":0,"host":"192.0.2.1"}`:                     "EADDRNOTAVAIL",
			fmt.Sprintf(`{"path":%q}`, file):                    "EADDRINUSE",
			fmt.Sprintf(`{"path":%q}`, file+"/none"):            "ENOTDIR",
			`{"fd":9}`:                                          "EBADF",
		} {
			w := r.start("http.js", options)
			if m := w.told(); m.Error != want {
				t.Errorf("%s: %+v, want %s", options, m, want)
			}
		}
		// An error is not for ever.
		l.Close()
		w := r.start("http.js", fmt.Sprintf(`{"port":%d,"host":"127.0.0.1"}`, port))
		count(t, w.address(), 1)
	})
}

// listen({fd}) is the descriptor that the worker was given.
func TestNodeGivenDescriptor(t *testing.T) {
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		r := newNodeRun(t, node, roundRobin)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		address := l.Addr().String()
		l.Close()
		r.give(3, int(f.Fd()))
		if got := r.start("http.js", `{"fd":3}`).address(); got != address {
			t.Errorf("it listens on %s, want %s", got, address)
		}
		f.Close()
		count(t, address, 2)
	})
}

// A worker that is asked to go finishes what it has, and the other one gets what
// comes.
func TestNodeDisconnect(t *testing.T) {
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		r := newNodeRun(t, node, roundRobin)
		going := r.start("http.js")
		address := going.address()
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
		in := bufio.NewReader(conn)
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		half := make([]byte, len("first half"))
		if _, err := io.ReadFull(resp.Body, half); err != nil {
			t.Fatal(err)
		}
		staying := r.start("http.js")
		staying.address()
		r.disconnect(going.id)
		if !roundRobin {
			// The worker answers on its listening socket until it reads that.
			going.send([]byte(`{"echo":"read"}`))
			going.told()
		} else if pids := count(t, address, 6); pids[strconv.Itoa(staying.cmd.Process.Pid)] != 6 {
			t.Errorf("answered: %v, want 6 by %d", pids, staying.cmd.Process.Pid)
		}
		going.send([]byte(`{}`))
		if rest, err := io.ReadAll(resp.Body); string(half)+string(rest) != "first half, second half" || err != nil {
			t.Errorf("the body is %q and %q, %v", half, rest, err)
		}
		conn.Close()
		<-going.gone
		if status := going.cmd.ProcessState; !status.Success() {
			t.Errorf("the worker ended with %v", status)
		}
		if pids := count(t, address, 2); len(pids) != 1 {
			t.Errorf("answered: %v", pids)
		}
	})
}

// The last worker goes: its socket stays for the next one.
func TestNodeRestart(t *testing.T) {
	ways := map[string]func(r *nodeRun, w *nodeProcess){
		"killed":       func(_ *nodeRun, w *nodeProcess) { w.cmd.Process.Kill() },
		"disconnected": func(r *nodeRun, w *nodeProcess) { r.disconnect(w.id) },
	}
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		r := newNodeRun(t, node, roundRobin)
		w := r.start("http.js")
		address := w.address()
		for way, end := range ways {
			end(r, w)
			<-w.gone
			type result struct {
				pid string
				err error
			}
			results := make(chan result, 5)
			for range cap(results) {
				go func() {
					pid, err := get(address, "/")
					results <- result{pid, err}
				}()
			}
			w = r.start("http.js")
			if again := w.address(); again != address {
				t.Errorf("%s: it listens on %s, and had %s", way, again, address)
			}
			for range cap(results) {
				if got := <-results; got.pid != strconv.Itoa(w.cmd.Process.Pid) || got.err != nil {
					t.Errorf("%s: a request meanwhile: %+v", way, got)
				}
			}
		}
	})
}

// A socket that one worker alone has stays while that is started again, and not
// if it was asked to go and others are there.
func TestNodeOnlyOne(t *testing.T) {
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		r := newNodeRun(t, node, roundRobin)
		for way, stays := range map[string]bool{"killed": true, "disconnected": false} {
			alone := r.start("http.js", `{"port":0,"host":"127.0.0.1"}`)
			other := r.start("http.js", `{"port":0,"host":"::1"}`)
			address := alone.address()
			other.address()
			if stays {
				alone.cmd.Process.Kill()
			} else {
				r.disconnect(alone.id)
			}
			<-alone.gone
			c, err := net.Dial("tcp", address)
			if (err == nil) != stays {
				t.Errorf("%s: %v", way, err)
			}
			if err == nil {
				c.Close()
			}
		}
	})
}

// A socket that its last server closes is closed.
func TestNodeServerClose(t *testing.T) {
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		r := newNodeRun(t, node, roundRobin)
		a, b := r.start("http.js"), r.start("http.js")
		address := a.address()
		b.address()
		for _, w := range []*nodeProcess{a, b} {
			count(t, address, 1)
			w.send([]byte(`{"close":true}`))
			if m := w.told(); !m.Closed {
				t.Errorf("got %+v", m)
			}
			w.send([]byte(`{"echo":"after the close"}`))
			w.told()
		}
		if _, err := net.Dial("tcp", address); err == nil {
			t.Error("something listens there")
		}
	})
}

// A worker that disconnects by itself ends as under Node's primary.
func TestNodeOwnDisconnect(t *testing.T) {
	eachPolicy(t, func(t *testing.T, node string, roundRobin bool) {
		r := newNodeRun(t, node, roundRobin)
		w := r.start("http.js")
		w.address()
		w.send([]byte(`{"disconnect":true}`))
		<-w.gone
		if status := w.cmd.ProcessState; !status.Success() {
			t.Errorf("the worker ended with %v", status)
		}
	})
}

// A connection that a worker was sent and did not accept goes to another one
// when it is killed.
func TestNodeKilledWithConnections(t *testing.T) {
	eachNode(t, func(t *testing.T, node string) {
		r := newNodeRun(t, node, true)
		stuck, other := r.start("http.js"), r.start("http.js")
		address := stuck.address()
		other.address()
		stuck.cmd.Process.Signal(syscall.SIGSTOP)
		results := make(chan error, 20)
		for range cap(results) {
			go func() {
				pid, err := get(address, "/")
				if err == nil && pid != strconv.Itoa(other.cmd.Process.Pid) {
					err = fmt.Errorf("answered by %s", pid)
				}
				results <- err
			}()
		}
		// All but the one that the stopped worker has.
		for range cap(results) - 1 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		r.mu.Lock()
		offers := len(r.workers[stuck.id].offers)
		r.mu.Unlock()
		if offers != 1 {
			t.Errorf("the stopped worker has %d connections, want 1", offers)
		}
		stuck.cmd.Process.Kill()
		if err := <-results; err != nil {
			t.Error(err)
		}
	})
}

// A worker at its maxConnections refuses: another one gets the connection, or
// the same one when it has finished.
func TestNodeRefusedConnection(t *testing.T) {
	eachNode(t, func(t *testing.T, node string) {
		r := newNodeRun(t, node, true)
		full := r.start("http.js", `{"port":0,"maxConnections":1}`)
		address := full.address()
		held, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(held, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
		if _, err := http.ReadResponse(bufio.NewReader(held), nil); err != nil {
			t.Fatal(err)
		}
		waits := make(chan string)
		go func() {
			pid, err := get(address, "/")
			waits <- fmt.Sprintln(pid, err)
		}()
		// It was refused at least once when a second number is given out.
		for {
			r.mu.Lock()
			seq := r.seq
			r.mu.Unlock()
			if seq > 5 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		other := r.start("http.js", `{"port":0}`)
		other.address()
		if got, want := <-waits, fmt.Sprintln(other.cmd.Process.Pid, nil); got != want {
			t.Errorf("answered by %s, want %s", got, want)
		}
		pids := count(t, address, 4)
		if len(pids) != 1 {
			t.Errorf("answered: %v", pids)
		}
		held.Close()
	})
}

// A fake is a worker that the test itself is.
type fake struct {
	*served
	p  *primary
	id int
	in lineReader
}

func newFake(t *testing.T, p *primary, id int) *fake {
	w := &fake{served: newServed(t), p: p, id: id}
	w.in.r = w.worker
	p.join(id, w.channel, nil)
	return w
}

// query asks for a socket, and returns where it is and the server's data.
func (w *fake) query(t *testing.T, data string) (port int, got string) {
	t.Helper()
	w.p.message(w.id, []byte(`{"cmd":"NODE_CLUSTER","act":"queryServer","address":"127.0.0.1","port":0,"addressType":4,"index":0,"seq":1,"data":`+data+`}`))
	line, err := w.in.next()
	var answer struct {
		Sockname struct{ Port int }
		Data     json.RawMessage
	}
	if json.Unmarshal(line, &answer); answer.Sockname.Port == 0 {
		t.Fatalf("answer %s, %v", line, err)
	}
	return answer.Sockname.Port, string(answer.Data)
}

// A connection or a socket that a worker has no descriptor free for is sent
// again.
func TestNodeRefusedDescriptor(t *testing.T) {
	for roundRobin, want := range map[bool]string{true: `"newconn"`, false: `"errno":0`} {
		p := newPrimary(roundRobin)
		defer p.close()
		w := newFake(t, p, 1)
		if roundRobin {
			port, _ := w.query(t, "null")
			c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		} else {
			p.message(1, []byte(`{"cmd":"NODE_CLUSTER","act":"queryServer","address":"127.0.0.1","port":0,"addressType":4,"index":0,"seq":1}`))
		}
		for range 3 {
			if line, err := w.in.next(); err != nil || !strings.Contains(string(line), want) {
				t.Fatalf("got %s, %v, want %s", line, err, want)
			}
			for _, s := range p.sockets {
				if p.wants(s) {
					t.Error("a connection is accepted that no worker is free for")
				}
			}
			io.WriteString(w.worker, `{"cmd":"NODE_HANDLE_NACK"}`+"\n")
		}
	}
}

// When no worker will be started again, sockets that nobody has are closed.
func TestNodeLast(t *testing.T) {
	for _, lastFirst := range []bool{true, false} {
		p := newPrimary(true)
		defer p.close()
		w := newFake(t, p, 1)
		port, _ := w.query(t, "null")
		steps := []func(){p.last, func() { p.disconnect(1) }}
		if !lastFirst {
			slices.Reverse(steps)
		}
		for n, step := range steps {
			c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				t.Fatalf("before step %d: %v", n, err)
			}
			c.Close()
			step()
		}
		if _, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			t.Error("the socket is still open")
		}
	}
}

// What the first server has for the others, the keys of its session tickets if
// it is TLS, they get.
func TestNodeServerData(t *testing.T) {
	p := newPrimary(true)
	defer p.close()
	for id, test := range []struct{ data, want string }{
		{"null", "null"},
		{`"` + strings.Repeat("x", maxNodeData) + `"`, "null"},
		{`{"keys":"abc"}`, `{"keys":"abc"}`},
		{`"mine"`, `{"keys":"abc"}`},
		{"null", `{"keys":"abc"}`},
	} {
		if _, got := newFake(t, p, id).query(t, test.data); got != test.want {
			t.Errorf("worker %d says %.20s and gets %s, want %s", id, test.data, got, test.want)
		}
	}
}

// hostile are messages that no Node worker sends.
var hostile = []string{
	`{"cmd":"NODE_CLUSTER","act":"queryServer","port":-1}`,
	`{"cmd":"NODE_CLUSTER","act":"queryServer","address":"127.0.0.1","port":0,"addressType":4,"index":{},"seq":-1}`,
	`{"cmd":"NODE_CLUSTER","act":"queryServer","address":"::1","port":"0","addressType":6,"backlog":-5,"flags":255}`,
	`{"cmd":"NODE_CLUSTER","act":"queryServer","address":"::1","port":"-0","addressType":"udp4"}`,
	`{"cmd":"NODE_CLUSTER","act":"queryServer","address":"a\u0000b","port":-1,"addressType":-1}`,
	`{"cmd":"NODE_CLUSTER","act":"queryServer","port":-1,"fd":1e99}`,
	`{"cmd":"NODE_CLUSTER","act":"listening"}`,
	`{"cmd":"NODE_CLUSTER","act":"close","key":"x"}`,
	`{"cmd":"NODE_CLUSTER","act":"exitedAfterDisconnect","seq":9}`,
	`{"cmd":"NODE_CLUSTER","ack":1,"accepted":false}`,
	`{"cmd":"NODE_CLUSTER","ack":"1","accepted":7}`,
}

// Whatever one worker says, the primary lives and answers the other one.
func FuzzPrimary(f *testing.F) {
	for _, m := range hostile {
		f.Add([]byte(m), true)
		f.Add([]byte(m), false)
	}
	f.Fuzz(func(t *testing.T, line []byte, roundRobin bool) {
		// The fuzzer is not to bind what it likes.
		var m nodeMessage
		json.Unmarshal(line, &m)
		if m.Port > 0 || m.Address != nil && *m.Address != "127.0.0.1" && *m.Address != "::1" ||
			m.Address == nil && m.Port == 0 && m.Act == "queryServer" {
			return
		}
		p := newPrimary(roundRobin)
		defer p.close()
		for id := range 2 {
			c, theirs, err := newChannel()
			if err != nil {
				t.Skip(err)
			}
			defer theirs.Close()
			done := make(chan struct{})
			go func() {
				c.serve(func([]byte, bool) {})
				p.leave(id)
				close(done)
			}()
			defer func() { c.close(); <-done }()
			p.join(id, c, func() {})
			if id == 1 {
				p.message(0, line)
				p.message(1, []byte(`{"cmd":"NODE_CLUSTER","act":"exitedAfterDisconnect","seq":77}`))
				got, err := (&lineReader{r: theirs}).next()
				if err != nil || !strings.Contains(string(got), `"ack":77`) {
					t.Fatalf("the other worker got %q, %v", got, err)
				}
			}
		}
	})
}

// A worker that asks for sockets without end gets a bounded number, and one that
// does not read the answers loses its channel.
func TestNodeGreedyWorker(t *testing.T) {
	p := newPrimary(true)
	defer p.close()
	w := newFake(t, p, 1)
	long := strings.Repeat("x", 1<<20)
	for n := range 2 * (maxQueue + nodeQueue) / len(long) {
		p.message(1, fmt.Appendf(nil, `{"cmd":"NODE_CLUSTER","act":"queryServer","address":%q,"index":%d,"seq":1}`, long, n))
	}
	if err := w.send([]byte("1")); err != ErrChannelClosed {
		t.Errorf("its channel: %v", err)
	}
	for n := range maxNodeSockets {
		p.sockets[strconv.Itoa(n)] = &nodeSocket{}
	}
	if _, err := p.open("one more", nodeQuery{}); err != unix.EMFILE {
		t.Errorf("one socket more: %v", err)
	}
	clear(p.sockets)
}
