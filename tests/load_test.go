package tests

import (
	"bufio"
	"cmp"
	"encoding/json"
	"flag"
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
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// loadTime is for how long TestLoad measures each row of its table.
var loadTime = flag.Duration("load", 0, "for how long TestLoad loads each server in each way, in ten turns; 0 is one turn of a few requests")

func init() {
	roles["load"] = loadRole
}

// A tally is what a load generator has counted.
type tally struct {
	Requests int // that were answered
	Errors   int
	Error    string         // one of them
	By       map[string]int // by what was answered: the worker's pid
	Seconds  float64
}

func (t *tally) add(other tally) {
	t.Requests += other.Requests
	t.Errors += other.Errors
	t.Error = cmp.Or(t.Error, other.Error)
	if t.By == nil {
		t.By = map[string]int{}
	}
	for pid, n := range other.By {
		t.By[pid] += n
	}
}

// loadRole is the load generator: so many clients ask at an address, one request
// after the other, each on a new connection or all on the same, for a time or
// until there were so many requests. It writes the tally.
//
//	load ADDRESS new|keep-alive CLIENTS DURATION|REQUESTS
func loadRole(args []string) int {
	addr, keep := args[0], args[1] == "keep-alive"
	clients, _ := strconv.Atoi(args[2])
	limit, err := time.ParseDuration(args[3])
	count := int64(1 << 62)
	if err != nil {
		count, _ = strconv.ParseInt(args[3], 10, 64)
		limit = time.Hour
	}
	begin := time.Now()
	var all tally
	var begun atomic.Int64
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			c := client{addr: addr, keep: keep}
			mine := tally{By: map[string]int{}}
			for begun.Add(1) <= count && time.Since(begin) < limit {
				pid, err := c.request()
				if err != nil {
					mine.Errors++
					mine.Error = err.Error()
					continue
				}
				mine.Requests++
				mine.By[pid]++
			}
			c.close()
			mu.Lock()
			defer mu.Unlock()
			all.add(mine)
		})
	}
	wg.Wait()
	all.Seconds = time.Since(begin).Seconds()
	json.NewEncoder(os.Stdout).Encode(all)
	return 0
}

// A client costs less than net/http's, so that the servers are what is measured.
type client struct {
	addr string
	keep bool
	conn net.Conn
	r    *bufio.Reader
}

func (c *client) request() (body string, err error) {
	defer func() {
		if err != nil || !c.keep {
			c.close()
		}
	}()
	if c.conn == nil {
		if c.conn, err = net.Dial("tcp", c.addr); err != nil {
			return "", err
		}
		c.conn.SetDeadline(time.Now().Add(time.Minute))
		c.r = bufio.NewReader(c.conn)
	}
	header := "GET / HTTP/1.1\r\nHost: load\r\n"
	if !c.keep {
		header += "Connection: close\r\n"
	}
	if _, err := io.WriteString(c.conn, header+"\r\n"); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("answered %s", resp.Status)
	}
	return strings.TrimSpace(string(text)), err
}

func (c *client) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// A contender is one way to spread connections over four processes of
// testdata/load/server.js.
type contender struct {
	name    string
	policy  string // NODE_CLUSTER_SCHED_POLICY
	command func(script, addr, port string) []string
	even    bool // each new connection goes to the worker that has waited longest

	addr    string
	results map[string][]tally // of the turns, by the way of asking
}

// TestLoad asks the same Node server, scaled to four processes in six ways, in
// turns. The numbers to quote, which want a quiet machine, are those of
//
//	go test ./tests -run TestLoad -v -load 10s
func TestLoad(t *testing.T) {
	const workers = 4
	node := func(script, _, port string) []string { return []string{"node", script, port} }
	run := func(flags ...string) func(string, string, string) []string {
		return func(script, addr, port string) []string {
			args := []string{pgroupBin, "run", "-n", strconv.Itoa(workers)}
			for _, f := range flags {
				args = append(args, strings.Replace(f, "ADDR", addr, 1))
			}
			return append(args, "--", "node", script, port)
		}
	}
	contenders := []*contender{
		{name: "Node's primary, round robin", policy: "rr", command: node, even: true},
		{name: "`--node-cluster`, round robin", policy: "rr", command: run("--node-cluster"), even: true},
		{name: "Node's primary, shared", policy: "none", command: node},
		{name: "`--node-cluster`, shared", policy: "none", command: run("--node-cluster")},
		{name: "`--listen`", command: run("--listen=ADDR")},
		{name: "`--listen --reuseport`", command: run("--listen=ADDR", "--reuseport")},
	}
	script, err := filepath.Abs("testdata/load/server.js")
	if err != nil {
		t.Fatal(err)
	}
	turns, limit := 10, (*loadTime / 10).String()
	if *loadTime == 0 {
		turns, limit = 1, "400"
	}

	var jobs []*job
	for _, c := range contenders {
		c.addr, c.results = reservePort(t), map[string][]tally{}
		_, port, _ := net.SplitHostPort(c.addr)
		args := c.command(script, c.addr, port)
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "NODE_CLUSTER_SCHED_POLICY="+c.policy)
		// As the workers of pgroup are: the scheduler gives each session its share
		// (autogroup in sched(7)), and the load generator is in another one.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		jobs = append(jobs, startJob(t, cmd))
	}
	for i, c := range contenders {
		for range workers {
			if line := jobs[i].line(); line != "ready" {
				t.Fatalf("%s says %q", c.name, line)
			}
		}
	}
	ways := []string{"new", "keep-alive"}
	const clients = 32
	for turn := range turns {
		for _, way := range ways {
			for i := range contenders {
				c := contenders[(turn+i)%len(contenders)] // none comes always after the same
				c.results[way] = append(c.results[way], load(t, c.addr, way, clients, limit))
			}
		}
	}
	if *loadTime == 0 {
		for _, c := range contenders {
			c.check(t, workers)
		}
	}
	fmt.Printf("%d turns of %s, %d clients, %d workers; req/s are medians, ratios are to the first row in the same turn, and shares are the workers' of all requests\n", turns, limit, clients, workers)
	printTable(loadTable(contenders, ways, workers))
	for _, c := range contenders {
		for _, way := range ways {
			for _, r := range c.results[way] {
				if r.Errors > 0 {
					t.Errorf("%s, %s: %d errors, %s", c.name, way, r.Errors, r.Error)
				}
			}
		}
	}
}

// check makes sure that all workers serve, and evenly if they are to.
func (c *contender) check(t *testing.T, workers int) {
	t.Helper()
	if c.even {
		// One client, so that no worker is busy when its turn comes.
		const each = 25
		r := load(t, c.addr, "new", 1, strconv.Itoa(workers*each))
		for pid, n := range r.By {
			if n*10 > each*13 || n*13 < each*10 {
				t.Errorf("%s: process %s has served %d of %d requests, one after the other", c.name, pid, n, r.Requests)
			}
		}
		if r.Errors > 0 {
			t.Errorf("%s: %d errors, %s", c.name, r.Errors, r.Error)
		}
	}
	var all tally
	for _, r := range c.results["new"] {
		all.add(r)
	}
	// The kernel may wake the same process of several again and again.
	for extra := 0; extra < 20 && len(all.By) < workers; extra++ {
		all.add(load(t, c.addr, "new", 32, "400"))
	}
	if len(all.By) != workers || all.Errors > 0 {
		t.Errorf("%s: %d requests were served by these processes: %v; %d errors, %s", c.name, all.Requests, all.By, all.Errors, all.Error)
	}
}

// loadTable is what was measured, for people.
func loadTable(contenders []*contender, ways []string, workers int) [][]string {
	rows := [][]string{{fmt.Sprintf("%d workers", workers)}}
	for _, way := range ways {
		what := map[string]string{"new": "a connection each", "keep-alive": "keep-alive"}[way]
		rows[0] = append(rows[0], what+": req/s", "ratio", "shares")
	}
	rows[0] = append(rows[0], "errors")
	for _, c := range contenders {
		row, errors := []string{c.name}, 0
		for _, way := range ways {
			var rates, ratios []float64
			var all tally
			for turn, r := range c.results[way] {
				rate := func(r tally) float64 { return float64(r.Requests) / r.Seconds }
				rates = append(rates, rate(r))
				ratios = append(ratios, rate(r)/rate(contenders[0].results[way][turn]))
				all.add(r)
			}
			errors += all.Errors
			row = append(row, fmt.Sprintf("%.0f", median(rates)), fmt.Sprintf("%.2f", median(ratios)), all.shares(workers))
		}
		rows = append(rows, append(row, strconv.Itoa(errors)))
	}
	return rows
}

// shares are the least and the most that a worker has served, in percent.
func (t tally) shares(workers int) string {
	least, most := t.Requests, 0
	for _, n := range t.By {
		least, most = min(least, n), max(most, n)
	}
	if len(t.By) < workers {
		least = 0
	}
	percent := func(n int) float64 { return 100 * float64(n) / float64(max(1, t.Requests)) }
	return fmt.Sprintf("%.0f–%.0f %%", percent(least), percent(most))
}

func median(list []float64) float64 {
	list = slices.Sorted(slices.Values(list))
	if len(list)%2 == 0 {
		return (list[len(list)/2-1] + list[len(list)/2]) / 2
	}
	return list[len(list)/2]
}

// load runs the load generator.
func load(t *testing.T, addr, way string, clients int, limit string) (result tally) {
	t.Helper()
	cmd := exec.Command(testExe, addr, way, strconv.Itoa(clients), limit)
	cmd.Env = append(os.Environ(), usedRole(t, "load"))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &result)
	}
	if err != nil {
		t.Fatalf("load generator: %v", err)
	}
	return result
}
