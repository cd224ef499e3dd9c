package tests

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// A kind is a kind of process tree that testdata/tree.c can become.
type kind struct {
	name    string
	title   string
	arg     string   // of tree; name when empty
	ready   int      // bytes on standard output when all are in place
	members int      // how many it has
	loose   bool     // a look at /proc may show another number
	flags   []string // of pgroup
	not     []string // ends that are none for this kind
}

var kinds = []kind{
	{name: "plain", title: "children and grandchildren", ready: 10, members: 10},
	{name: "groups", title: "process groups of their own", ready: 7, members: 7},
	{name: "daemons", title: "setsid daemons, forked twice", ready: 4, members: 4},
	{name: "ignore", title: "all signals ignored", ready: 6, members: 6},
	{name: "stopped", title: "stopped processes", ready: 6, members: 6},
	{name: "bare", title: "empty environment", ready: 4, members: 4},
	{name: "nested", title: "30 nested sessions", ready: 31, members: 31},
	{name: "many", title: "300 children", ready: 301, members: 301},
	{name: "left-overs", title: "left-overs of an ended command", ready: 2, members: 2, loose: true},
	{
		name: "waited-for", title: "left-overs, waited for", arg: "left-overs", ready: 2, members: 2, loose: true,
		flags: []string{"--leftovers", "wait"},
		// No worker is left that could get a relayed signal.
		not: []string{"INT", "HUP", "QUIT", "itself"},
	},
	{name: "hop", title: "forks and leaves, each 2 ms", ready: 2, members: 2, loose: true},
	{name: "sprint", title: "forks and leaves, at full speed", ready: 2, members: 2, loose: true},
	{name: "doubling", title: "doubles up to 256", ready: 16, members: 256, loose: true},
	{name: "graceful", title: "handles TERM in 50 ms", ready: 4, members: 4},
}

// argv returns the command that becomes a tree of this kind.
func (k kind) argv(t *testing.T) []string {
	arg := k.arg
	if arg == "" {
		arg = k.name
	}
	return []string{tree(t), arg}
}

// buildTree compiles testdata/tree.c once a run.
var buildTree = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(filepath.Dir(pgroupBin), "tree")
	out, err := exec.Command("gcc", "-Wall", "-O", "-o", bin, "testdata/tree.c").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("gcc: %v\n%s", err, out)
	}
	return bin, nil
})

// tree returns the path of the compiled testdata/tree.c.
func tree(t *testing.T) string {
	t.Helper()
	bin, err := buildTree()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}
