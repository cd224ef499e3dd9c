package tests

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	chaosRuns = flag.Int("chaos", 0, "the runs of TestChaos; 0 is 1000, or 100 with -short")
	chaosSeed = flag.Uint64("seed", 0, "the seed of TestChaos; 0 picks one")
)

// TestChaos sends SIGKILL to the launcher or the leader at a random moment of
// start-up, of a stop and of the sweep of what a command has left over. With
// a pid namespace it sends it to both at once. Run n with seed s again:
// go test ./tests -run TestChaos/run/n -seed s
func TestChaos(t *testing.T) {
	if !inPidNamespace(t, 3) {
		return
	}
	tree(t)
	runs := *chaosRuns
	if runs == 0 {
		runs = 1000
		if testing.Short() {
			runs = 100
		}
	}
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	tally := struct {
		sync.Mutex
		of                  map[string]int
		survivors, survived int
	}{of: map[string]int{}}
	begin := time.Now()
	t.Run("run", func(t *testing.T) {
		for n := range runs {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				t.Parallel()
				story, survivors := strikeAtRandom(t, rand.New(rand.NewPCG(seed, uint64(n))))
				tally.Lock()
				defer tally.Unlock()
				tally.of[story]++
				tally.survivors += survivors
				if survivors > 0 {
					tally.survived++
				}
			})
		}
	})
	noneLeft(t)
	fmt.Printf("%d runs with seed %d in %.1f s: %d survivors, in %d runs\n",
		runs, seed, time.Since(begin).Seconds(), tally.survivors, tally.survived)
	rows := [][]string{{"moment", "launcher killed", "leader killed", "both killed (pidns)", "had no leader", "was over"}}
	for _, moment := range []string{"start-up", "stop", "sweep"} {
		row := []string{moment}
		for _, what := range []string{"launcher", "leader", "both", "none", "over"} {
			row = append(row, fmt.Sprint(tally.of[moment+" "+what]))
		}
		rows = append(rows, row)
	}
	printTable(rows)
}

// strikeAtRandom makes one run. It returns the moment with what was killed, and
// how many survive.
func strikeAtRandom(t *testing.T, r *rand.Rand) (story string, survivors int) {
	const grace = 100 * time.Millisecond
	uniform := func(limit time.Duration) time.Duration {
		return time.Duration(r.Int64N(int64(limit)))
	}
	moment := []string{"start-up", "stop", "sweep"}[r.IntN(3)]
	victim := []string{"launcher", "leader", "both"}[r.IntN(3)]
	delay := uniform(12 * time.Millisecond)
	if moment != "start-up" {
		// Most happens at once, and some when the grace period is over.
		delay = uniform([]time.Duration{time.Millisecond, delay + 1, grace + 30*time.Millisecond}[r.IntN(3)])
	}

	args := []string{"--grace", grace.String()}
	if victim == "both" {
		args = append(args, "--contain", "pidns")
	}
	small := kind{name: "small", ready: 4}
	c := startCell(t, pgroupRun(append(append(args, "--"), small.argv(t)...)...), noWindow, small.ready)
	switch moment {
	case "stop":
		c.awaitUp()
		c.signal(syscall.SIGTERM)
	case "sweep":
		c.awaitUp()
		c.tell()
	}
	time.Sleep(delay)

	leader := c.leader()
	happened := victim
	switch {
	case isClosed(c.ended):
		happened = "over"
	case victim == "launcher" || leader == 0:
		if leader == 0 && victim != "launcher" {
			happened = "none"
		}
		c.signal(syscall.SIGKILL)
	case victim == "leader":
		syscall.Kill(leader, syscall.SIGKILL)
	case victim == "both":
		c.signal(syscall.SIGKILL)
		syscall.Kill(leader, syscall.SIGKILL)
	}
	survivors, hangs := c.await(grace + 5*time.Second)
	if survivors > 0 || hangs {
		t.Errorf("%s, %v later SIGKILL for %s (%s): %d of the tree survive, pgroup hangs: %t\n%s",
			moment, delay, victim, happened, survivors, hangs, c.report())
	}
	return moment + " " + happened, survivors
}
