package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"pgroup/pgroup"
)

// A usage is what processes use, as proc_pid_stat(5) has it.
type usage struct {
	Memory    int64   `json:"memory"`    // bytes resident; what processes share counts for each
	CPU       float64 `json:"cpu"`       // seconds, those of children that have ended included
	Processes int     `json:"processes"` // that live
}

func (u *usage) add(p proc) {
	u.Memory += p.memory
	u.CPU += p.cpu
	u.Processes++
}

// A proc is one living process.
type proc struct {
	ppid, pgid int
	memory     int64
	cpu        float64
}

// measure returns what each worker's tree uses, by the worker's number, and what
// all below the leader, or below the launcher where that is PID 1, does. A
// process counts for the worker that it descends from, or in whose group it is.
func measure(s *pgroup.Status) (workers map[int]usage, all usage) {
	root := s.Leader
	if root == 0 {
		root = s.PID
	}
	procs := readProcs()
	number := make(map[int]int, len(s.Workers)) // by pid, seen from here
	for _, w := range s.Workers {
		if w.PID != 0 {
			number[w.PID] = w.Worker
		}
	}
	if inOtherNamespace(root) {
		number = translated(number, procs, root)
	}
	workers = make(map[int]usage)
	for pid, p := range procs {
		if pid == root || !descends(procs, pid, root) {
			continue
		}
		all.add(p)
		worker := number[p.pgid]
		for at := pid; worker == 0 && at != root; at = procs[at].ppid {
			worker = number[at]
		}
		if worker != 0 {
			u := workers[worker]
			u.add(p)
			workers[worker] = u
		}
	}
	return workers, all
}

// descends reports whether pid is below root. The list was not read in one
// moment: it may have circles.
func descends(procs map[int]proc, pid, root int) bool {
	for range procs {
		if pid == root {
			return true
		}
		p, ok := procs[pid]
		if !ok {
			return false
		}
		pid = p.ppid
	}
	return false
}

// inOtherNamespace reports whether pid, a leader of --contain pidns, gives its
// children numbers that are not ours.
func inOtherNamespace(pid int) bool {
	// The leader is in the namespace itself, as its first process.
	theirs, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/pid")
	ours, _ := os.Readlink("/proc/self/ns/pid")
	return err == nil && theirs != ours
}

// translated returns number, whose keys are pids of the namespace of root, with
// our pids instead.
func translated(number map[int]int, procs map[int]proc, root int) map[int]int {
	ours := make(map[int]int)
	for pid := range procs {
		text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
		if err != nil || !descends(procs, pid, root) {
			continue
		}
		for line := range bytes.Lines(text) {
			if fields := bytes.Fields(line); len(fields) > 2 && string(fields[0]) == "NSpid:" {
				inner, _ := strconv.Atoi(string(fields[2]))
				if worker := number[inner]; worker != 0 {
					ours[pid] = worker
				}
			}
		}
	}
	return ours
}

func readProcs() map[int]proc {
	procs := make(map[int]proc)
	names, _ := filepath.Glob("/proc/[0-9]*")
	for _, name := range names {
		pid, _ := strconv.Atoi(filepath.Base(name))
		if text, err := os.ReadFile(name + "/stat"); err == nil {
			if p, ok := parseProc(text); ok {
				procs[pid] = p
			}
		}
	}
	return procs
}

// parseProc parses /proc/PID/stat. The name in parentheses may hold anything: the
// last ")" ends it.
func parseProc(text []byte) (p proc, ok bool) {
	f := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(f) < 22 || f[0][0] == 'Z' || f[0][0] == 'X' {
		return p, false
	}
	var n [22]int64 // the fields from 3 on
	for i, field := range f[1:22] {
		n[i+1], _ = strconv.ParseInt(string(field), 10, 64)
	}
	const userHZ = 100 // on all that Go runs on
	ticks := n[11] + n[12] + n[13] + n[14]
	return proc{
		ppid:   int(n[1]),
		pgid:   int(n[2]),
		memory: n[21] * int64(unix.Getpagesize()),
		cpu:    float64(ticks) / userHZ,
	}, true
}

// percent is how much of one CPU was used since the start.
func (u usage) percent(since time.Time) float64 {
	age := time.Since(since).Seconds()
	if since.IsZero() || age <= 0 {
		return 0
	}
	return 100 * u.CPU / age
}
