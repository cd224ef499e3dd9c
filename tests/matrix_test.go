package tests

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	launchersFlag = flag.String("launchers", "pgroup,pgroup-pidns,pgroup-cluster",
		"for TestOrphanMatrix: the launchers to measure, of "+launcherNames()+"; only pgroup's have to be clean")
	wholeFlag = flag.Bool("whole", false, "for TestOrphanMatrix: every end for pgroup-cluster too, not only some")
)

// A launcher is a program that starts a command, with the flags that make it
// leave as little as it can.
type launcher struct {
	name    string
	argv    []string // the command follows
	timeout []string // the same, with a timeout of 1 s; nil if it has none
	workers int      // how many trees it starts, again when one ends; 0 is one, once
}

var launchers = []launcher{
	{
		name:    "pgroup",
		argv:    []string{"pgroup", "run", "--grace", "300ms"},
		timeout: []string{"pgroup", "run", "--grace", "300ms", "--timeout", "1s"},
	},
	{
		name:    "pgroup-pidns",
		argv:    []string{"pgroup", "run", "--contain", "pidns", "--grace", "300ms"},
		timeout: []string{"pgroup", "run", "--contain", "pidns", "--grace", "300ms", "--timeout", "1s"},
	},
	{
		name:    "pgroup-cluster",
		argv:    []string{"pgroup", "run", "-n", "4", "--restart", "always", "--grace", "300ms"},
		timeout: []string{"pgroup", "run", "-n", "4", "--restart", "always", "--grace", "300ms", "--timeout", "1s"},
		workers: 4,
	},
	{name: "tini", argv: []string{"tini", "-s", "-g", "--"}},
	{name: "dumb-init", argv: []string{"dumb-init", "--"}},
	{name: "catatonit", argv: []string{"catatonit", "-g", "--"}},
	{name: "setsid", argv: []string{"setsid", "-w"}},
	{
		name:    "timeout",
		argv:    []string{"timeout", "-k", "0.3", "60"},
		timeout: []string{"timeout", "-k", "0.3", "1"},
	},
	{
		name: "bwrap",
		argv: []string{
			"bwrap", "--bind", "/", "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc",
			"--unshare-pid", "--die-with-parent", "--",
		},
	},
}

func launcherNames() string {
	var names []string
	for _, l := range launchers {
		names = append(names, l.name)
	}
	return strings.Join(names, ",")
}

// trees returns how many trees the launcher starts.
func (l launcher) trees() int { return max(1, l.workers) }

func (l launcher) ours() bool { return strings.HasPrefix(l.name, "pgroup") }

// command returns the launcher's command for a tree of kind k.
func (l launcher) command(t *testing.T, k kind, e end) *exec.Cmd {
	argv := l.argv
	if e.name == "timeout" {
		argv = l.timeout
	}
	argv = slices.Clone(argv)
	if l.ours() {
		argv[0] = pgroupBin
		argv = append(append(argv, k.flags...), "--")
	}
	argv = append(argv, k.argv(t)...)
	return exec.Command(argv[0], argv[1:]...)
}

// An end is a way in which a run comes to its end.
type end struct {
	name   string
	window window
	strike func(*cell)
	grace  func(launcher) int // how many of the tree "graceful" must have had their grace
}

// The root of "graceful" heeds INT, HUP and QUIT, and ends without having had
// TERM; where it reads a byte it ends with status 0.
func graceOfMembers(launcher) int { return 3 }

func graceOfAll(launcher) int { return 4 }

// As PID 1 of a pid namespace the leader takes all with it, at once.
func graceOfLeader(l launcher) int {
	if l.name == "pgroup-pidns" {
		return 0
	}
	return 4
}

func noGrace(launcher) int { return 0 }

var ends = []end{
	{name: "TERM", strike: func(c *cell) { c.signal(syscall.SIGTERM) }, grace: graceOfAll},
	{name: "INT", strike: func(c *cell) { c.signal(syscall.SIGINT) }, grace: graceOfMembers},
	{name: "HUP", strike: func(c *cell) { c.signal(syscall.SIGHUP) }, grace: graceOfMembers},
	{name: "QUIT", strike: func(c *cell) { c.signal(syscall.SIGQUIT) }, grace: graceOfMembers},
	{name: "timeout", strike: func(*cell) {}, grace: graceOfAll},
	{name: "KILL-launcher", strike: func(c *cell) { c.signal(syscall.SIGKILL) }, grace: graceOfAll},
	{name: "KILL-leader", strike: (*cell).killLeader, grace: graceOfLeader},
	{name: "KILL-both", strike: (*cell).killBoth, grace: noGrace},
	{name: "window", window: windowJob, strike: func(c *cell) { c.window.Close() }, grace: graceOfMembers},
	{name: "window-e", window: windowRoot, strike: func(c *cell) { c.window.Close() }, grace: graceOfMembers},
	{name: "itself", strike: (*cell).tell, grace: graceOfMembers},
	{name: "itself+TERM", strike: (*cell).tellAndTerm, grace: graceOfMembers},
}

// tellAndTerm lets one tree's root end, and ends the launcher at a moment at which
// the rest of that tree is stopped, or has been and the next one starts.
func (c *cell) tellAndTerm() {
	c.tell()
	time.Sleep(rand.N(600 * time.Millisecond))
	c.signal(syscall.SIGTERM)
}

// possible reports whether launcher l can come to the end e.
func (e end) possible(l launcher) bool {
	switch e.name {
	case "timeout":
		return l.timeout != nil
	case "KILL-leader":
		return l.ours()
	case "KILL-both":
		// Nothing but the kernel is left to end the tree.
		return l.name == "pgroup-pidns"
	case "itself":
		return l.workers == 0 // else there is another tree
	case "itself+TERM":
		return l.workers > 0
	}
	// 14 kinds of tree, 4 times each: all of them take some 20 s.
	return l.workers == 0 || *wholeFlag || e.name == "TERM" || e.name == "KILL-launcher" || e.name == "KILL-leader"
}

func (c *cell) killLeader() {
	c.t.Helper()
	pid := c.leader()
	if pid == 0 {
		c.t.Fatalf("launcher %d has no leader\n%s", c.cmd.Process.Pid, c.report())
	}
	syscall.Kill(pid, syscall.SIGKILL)
}

func (c *cell) killBoth() {
	c.t.Helper()
	pid := c.leader()
	if pid == 0 {
		c.t.Fatalf("launcher %d has no leader\n%s", c.cmd.Process.Pid, c.report())
	}
	c.signal(syscall.SIGKILL)
	syscall.Kill(pid, syscall.SIGKILL)
}

// A result is what a cell of the matrix shows.
type result struct {
	members, survivors int
	hangs              bool // the launcher has not ended
	abrupt             bool // a member that handles TERM had no grace
}

func (r result) clean() bool { return r.survivors == 0 && !r.hangs }

func (r result) String() string {
	s := fmt.Sprintf("%d/%d", r.survivors, r.members)
	if r.hangs {
		s += " h"
	}
	if r.abrupt {
		s += " !"
	}
	return s
}

// A matrix holds a launcher's results: kind → end → result.
type matrix map[string]map[string]result

// clean counts the cells that are clean and those that are, among those that
// keep reports true for.
func (m matrix) clean(keep func(kind, end string) bool) string {
	clean, all := 0, 0
	for k, row := range m {
		for e, r := range row {
			if keep(k, e) {
				all++
				if r.clean() {
					clean++
				}
			}
		}
	}
	if all == 0 {
		return "n/a"
	}
	return fmt.Sprintf("%d/%d", clean, all)
}

// TestOrphanMatrix starts every kind of tree and brings it to every end. Where
// pgroup starts four of them, and again when they end, it does so for a few of the
// ends, and for all with -whole.
func TestOrphanMatrix(t *testing.T) {
	if !inPidNamespace(t, 4) {
		usedRole(t, "session")
		return
	}
	tree(t)
	matrices := map[string]matrix{}
	var found []launcher
	for _, name := range strings.Split(*launchersFlag, ",") {
		i := slices.IndexFunc(launchers, func(l launcher) bool { return l.name == name })
		if i < 0 {
			t.Fatalf("no launcher %q: have %s", name, launcherNames())
		}
		l := launchers[i]
		if _, err := exec.LookPath(l.argv[0]); err != nil && !l.ours() {
			fmt.Printf("%s is left out: %v\n", name, err)
			continue
		}
		found = append(found, l)
		t.Run(name, func(t *testing.T) { matrices[name] = measure(t, l) })
		noneLeft(t)
	}
	for _, l := range found {
		printMatrix(l, matrices[l.name])
	}
	printSummary(found, matrices)
}

// measure fills l's matrix, some cells at a time.
func measure(t *testing.T, l launcher) matrix {
	var mu sync.Mutex
	m := matrix{}
	t.Run("cells", func(t *testing.T) {
		for _, k := range kinds {
			if k.flags != nil && !l.ours() {
				continue
			}
			m[k.name] = map[string]result{}
			for _, e := range ends {
				if !e.possible(l) || slices.Contains(k.not, e.name) {
					continue
				}
				t.Run(k.name+"/"+e.name, func(t *testing.T) {
					t.Parallel()
					r := runCell(t, l, k, e)
					mu.Lock()
					defer mu.Unlock()
					m[k.name][e.name] = r
				})
			}
		}
	})
	return m
}

func runCell(t *testing.T, l launcher, k kind, e end) result {
	limit := 10 * time.Second
	if !l.ours() {
		limit = 2 * time.Second
	}
	c := startCell(t, l.command(t, k, e), e.window, l.trees()*k.ready)
	members := l.trees() * k.members
	c.awaitUp()
	if n := len(c.members()); n != members && !k.loose {
		t.Errorf("%d members, want %d", n, members)
	}
	r := result{members: members}
	e.strike(c)
	r.survivors, r.hangs = c.await(limit)
	r.survivors = min(r.survivors, members)
	if k.name == "graceful" {
		cleaned, _ := filepath.Glob(filepath.Join(c.dir, "cleaned-*"))
		r.abrupt = len(cleaned) < e.grace(l)*l.trees()
	}
	if l.ours() && (!r.clean() || r.abrupt) {
		t.Errorf("%d of %d survive, launcher hangs: %t, grace denied: %t\n%s",
			r.survivors, r.members, r.hangs, r.abrupt, c.report())
	}
	return r
}

func printMatrix(l launcher, m matrix) {
	rows := [][]string{{strings.Join(l.argv, " ")}}
	var columns []end
	for _, e := range ends {
		if e.possible(l) {
			columns = append(columns, e)
			rows[0] = append(rows[0], e.name)
		}
	}
	for _, k := range kinds {
		if m[k.name] == nil {
			continue
		}
		row := []string{k.title}
		for _, e := range columns {
			if r, ok := m[k.name][e.name]; ok {
				row = append(row, r.String())
			} else {
				row = append(row, "")
			}
		}
		rows = append(rows, row)
	}
	printTable(rows)
	fmt.Println("survivors/members; h: the launcher has not ended, !: who handles TERM had no grace")
}

// printSummary sets the launchers side by side: cells without survivors/cells,
// by end, by kind of tree, and in all.
func printSummary(found []launcher, matrices map[string]matrix) {
	row := func(title string, cell func(l launcher, m matrix) string) []string {
		cells := []string{title}
		for _, l := range found {
			cells = append(cells, cell(l, matrices[l.name]))
		}
		return cells
	}
	count := func(title string, keep func(kind, end string) bool) []string {
		return row(title, func(_ launcher, m matrix) string { return m.clean(keep) })
	}
	rows := [][]string{row("clean cells/cells", func(l launcher, _ matrix) string { return l.name })}
	for _, e := range ends {
		if slices.ContainsFunc(found, e.possible) {
			rows = append(rows, count(e.name, func(_, end string) bool { return end == e.name }))
		}
	}
	for _, k := range kinds {
		rows = append(rows, count(k.title, func(kind, _ string) bool { return kind == k.name }))
	}
	rows = append(rows,
		row("has its grace", func(_ launcher, m matrix) string {
			given := 0
			for _, r := range m["graceful"] {
				if !r.abrupt {
					given++
				}
			}
			return fmt.Sprintf("%d/%d", given, len(m["graceful"]))
		}),
		count("all", func(_, _ string) bool { return true }))
	printTable(rows)
}

// printTable prints rows, the first of which is the head, in Markdown.
func printTable(rows [][]string) {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len(cell))
		}
	}
	fmt.Println()
	for n, row := range rows {
		for i, cell := range row {
			fmt.Printf("| %-*s ", widths[i], cell)
		}
		fmt.Println("|")
		if n == 0 {
			for _, w := range widths {
				fmt.Print("|", strings.Repeat("-", w+2))
			}
			fmt.Println("|")
		}
	}
}

// TestPidnsKillBoth gives launcher and leader SIGKILL at the same instant, as
// root and as an ordinary user: then only the kernel is left.
func TestPidnsKillBoth(t *testing.T) {
	for _, name := range []string{"daemons", "ignore", "nested", "hop"} {
		for _, uid := range users() {
			t.Run(fmt.Sprintf("%s/uid=%d", name, uid), func(t *testing.T) {
				k := kinds[slices.IndexFunc(kinds, func(k kind) bool { return k.name == name })]
				cmd := pgroupRun(append([]string{"--contain", "pidns", "--"}, k.argv(t)...)...)
				asUser(cmd, uid)
				c := startCell(t, cmd, noWindow, k.ready)
				c.awaitUp()
				c.killBoth()
				if survivors, hangs := c.await(5 * time.Second); survivors != 0 || hangs {
					t.Errorf("%d of the tree survive, pgroup hangs: %t\n%s", survivors, hangs, c.report())
				}
			})
		}
	}
}

// TestPidnsProc checks that /proc inside is that of the new pid namespace.
func TestPidnsProc(t *testing.T) {
	for _, uid := range users() {
		t.Run(fmt.Sprintf("uid=%d", uid), func(t *testing.T) {
			// The shell itself opens the file, so that self is the shell.
			script := `read pid rest </proc/self/stat; echo $$ $pid; cd /proc; echo [0-9]*`
			cmd := pgroupRun("--contain", "pidns", "--", "sh", "-c", script)
			asUser(cmd, uid)
			cmd.Dir = cellDir(t)
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v\n%s", err, err.(*exec.ExitError).Stderr)
			}
			lines := strings.Split(strings.TrimSpace(string(out)), "\n")
			var shell, self int
			fmt.Sscan(lines[0], &shell, &self)
			if shell != self || shell == 0 {
				t.Errorf("the shell is process %d, /proc/self is %d", shell, self)
			}
			if have, want := strings.Fields(lines[1]), []string{"1", strconv.Itoa(shell)}; !slices.Equal(have, want) {
				t.Errorf("/proc holds %q, want %q", have, want)
			}
		})
	}
}
