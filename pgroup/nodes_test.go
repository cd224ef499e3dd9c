package pgroup

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// nodeVersions are those that the tests run beside the one on PATH.
var nodeVersions = []string{"18", "22", "24"}

// nodeCache is where they are: see fetch.sh.
var nodeCache = sync.OnceValues(func() (dir string, err error) {
	cmd := exec.Command("sh", append([]string{"../tests/testdata/node/fetch.sh"}, nodeVersions...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("cannot fetch Node (-short does without): %s: %w", &stderr, err)
	}
	return strings.TrimSpace(string(out)), err
})

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
