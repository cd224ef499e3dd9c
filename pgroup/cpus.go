package pgroup

import (
	"bytes"
	"math"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// CPUs returns how many CPUs this process may use at once: those that
// sched_getaffinity(2) names, or fewer if the quota of a cgroup is less
// (cgroups(7), cpu.max), rounded up. It is 1 at least.
func CPUs() int {
	n := 1
	var set unix.CPUSet
	if unix.SchedGetaffinity(0, &set) == nil {
		n = set.Count()
	}
	cgroups, _ := os.ReadFile("/proc/self/cgroup")
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	if quota := cpuQuota(cgroups, mounts, os.ReadFile); quota < float64(n) {
		n = int(math.Ceil(quota))
	}
	return max(1, n)
}

// cpuQuota returns the least quota, in CPUs, of the cgroup and those above it.
func cpuQuota(cgroups, mounts []byte, read func(string) ([]byte, error)) float64 {
	least := math.Inf(1)
	note := func(quota, period string) {
		q, err := strconv.ParseFloat(quota, 64)
		p, perr := strconv.ParseFloat(period, 64)
		if err == nil && perr == nil && q > 0 && p > 0 { // else "max", or -1
			least = min(least, q/p)
		}
	}
	for line := range bytes.Lines(cgroups) {
		// hierarchy-ID:controllers:path (cgroups(7)); version 2 has no controllers.
		f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		controllers := strings.Split(f[1], ",")
		v2 := f[0] == "0" && f[1] == ""
		mount, root := cgroupMount(mounts, v2, controllers)
		if mount == "" {
			continue
		}
		dir, ok := strings.CutPrefix(f[2], strings.TrimSuffix(root, "/"))
		for ; ok; dir = path.Dir(dir) {
			dir = path.Join("/", dir)
			if v2 {
				text, _ := read(path.Join(mount, dir, "cpu.max"))
				if f := strings.Fields(string(text)); len(f) == 2 {
					note(f[0], f[1])
				}
			} else {
				quota, _ := read(path.Join(mount, dir, "cpu.cfs_quota_us"))
				period, _ := read(path.Join(mount, dir, "cpu.cfs_period_us"))
				note(strings.TrimSpace(string(quota)), strings.TrimSpace(string(period)))
			}
			if dir == "/" {
				break
			}
		}
	}
	return least
}

// cgroupMount returns where the hierarchy is mounted that version 2 is, or that
// has the cpu controller of version 1, and which of its directories is there.
func cgroupMount(mounts []byte, v2 bool, controllers []string) (mount, root string) {
	for line := range bytes.Lines(mounts) {
		// 36 35 98:0 /root /mount opts [optional …] - type source super-opts
		before, after, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(g) < 3 {
			continue
		}
		if v2 && g[0] == "cgroup2" {
			return f[4], f[3]
		}
		if v2 || g[0] != "cgroup" {
			continue
		}
		for _, option := range strings.Split(g[2], ",") {
			for _, c := range controllers {
				if option == "cpu" && c == "cpu" {
					return f[4], f[3]
				}
			}
		}
	}
	return "", ""
}
