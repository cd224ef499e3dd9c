// Package tests runs the built pgroup as its users do: from shells, pipelines
// and terminals, beside other launchers, and with SIGKILL at every moment.
//
// The test binary is also every helper process that the tests need: started
// again with the name of a role, it becomes that role (see roles).
package tests

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
)

// roleVar names the role that a re-executed test binary plays.
const roleVar = "PGROUP_TEST_ROLE"

// A role is the body of a helper process; its value is the exit status.
// args are the process's arguments after its name.
type role func(args []string) int

// roles holds every helper process by name. A role that no test starts fails
// the run: see usedRole.
var roles = map[string]role{}

var (
	usedRoles sync.Map // name → true, of this run
	pgroupBin string   // the built command
	testExe   string   // this test binary
)

func TestMain(m *testing.M) {
	if name := os.Getenv(roleVar); name != "" {
		r, ok := roles[name]
		if !ok {
			fmt.Fprintf(os.Stderr, "tests: no role %q\n", name)
			os.Exit(125)
		}
		os.Exit(r(os.Args[1:]))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "pgroup-tests-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755) // for tests that run pgroup as an ordinary user
	pgroupBin = filepath.Join(dir, "pgroup")
	if bin := os.Getenv(insideVar); bin != "" {
		pgroupBin = bin
	} else {
		build := exec.Command("go", "build", "-o", pgroupBin, "pgroup/cmd/pgroup")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "tests: go build: %v\n%s", err, out)
			return 1
		}
	}
	if testExe, err = os.Executable(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if code == 0 && wholeRun() {
		for _, name := range unusedRoles() {
			fmt.Fprintf(os.Stderr, "tests: no test started the role %q: delete it\n", name)
			code = 1
		}
	}
	return code
}

// wholeRun reports whether this run was of all tests, so that an unused role
// is really unused.
func wholeRun() bool {
	whole := true
	flag.Visit(func(f *flag.Flag) {
		switch strings.TrimPrefix(f.Name, "test.") {
		case "run", "skip", "list", "short", "bench", "fuzz":
			whole = whole && (f.Value.String() == "" || f.Value.String() == "false")
		}
	})
	return whole
}

func unusedRoles() []string {
	var unused []string
	for name := range roles {
		if _, ok := usedRoles.Load(name); !ok {
			unused = append(unused, name)
		}
	}
	sort.Strings(unused)
	return unused
}

// usedRole returns the environment entry that makes the test binary play the
// role called name.
func usedRole(t testing.TB, name string) string {
	t.Helper()
	if _, ok := roles[name]; !ok {
		t.Fatalf("no role %q", name)
	}
	usedRoles.Store(name, true)
	return roleVar + "=" + name
}
