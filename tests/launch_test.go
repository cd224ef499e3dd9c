package tests

import (
	"bytes"
	"flag"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

var launchRuns = flag.Int("launch", 100, "runs of each launcher in TestLaunchTime")

// TestLaunchTime prints what starting `true` by pgroup and by its peers costs,
// measured in turns in one run, as ratios to tini and bwrap. These machines are
// too noisy for a bound to hold in every run: it fails for what is far off.
func TestLaunchTime(t *testing.T) {
	launch := filepath.Join(t.TempDir(), "launch")
	if out, err := exec.Command("gcc", "-O2", "-o", launch, "testdata/launch.c").CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	commands := [][]string{
		{"true"},
		{"setsid", "-w", "true"},
		{"tini", "-s", "--", "true"},
		{"bwrap", "--bind", "/", "/", "--unshare-pid", "true"},
		{pgroupBin, "run", "--", "true"},
	}
	const tini, bwrap = 2, 3
	args := []string{strconv.Itoa(*launchRuns)}
	for i, c := range commands {
		if i > 0 {
			args = append(args, "---")
		}
		args = append(args, c...)
	}
	cmd := exec.Command(launch, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("launch: %v\n%s", err, &stderr)
	}
	var least, median [5]float64
	in := bytes.NewReader(out)
	for i := range commands {
		if _, err := fmt.Fscan(in, &least[i], &median[i]); err != nil {
			t.Fatalf("launch printed %q: %v", out, err)
		}
	}
	table := "| launcher of `true` | least ms | × tini | × bwrap | median ms | × tini | × bwrap |\n|---|---|---|---|---|---|---|\n"
	for i, c := range commands {
		table += fmt.Sprintf("| %s | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f |\n", filepath.Base(c[0]),
			least[i]/1000, least[i]/least[tini], least[i]/least[bwrap],
			median[i]/1000, median[i]/median[tini], median[i]/median[bwrap])
	}
	t.Logf("%d runs of each, in turns\n%s", *launchRuns, table)
	if ratio := least[len(least)-1] / least[tini]; ratio > 7 {
		t.Errorf("pgroup takes %.1f times as long as tini", ratio)
	}
}
