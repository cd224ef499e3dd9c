package pgroup

import (
	"os"
	"os/exec"
	"slices"
	"testing"
)

func TestParseStat(t *testing.T) {
	const rest = " S 7 8 9 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 3 0 100 0 0"
	for _, name := range []string{"sh", "a b", ") S 1 1 1", "((", "x)\n("} {
		got, err := parseStat([]byte("42 (" + name + ")" + rest))
		want := process{pid: 42, ppid: 7, pgid: 8, tpgid: -1, threads: 3, started: 100, state: 'S'}
		if err != nil || got != want {
			t.Errorf("parseStat of a process named %q = %+v, %v; want %+v", name, got, err, want)
		}
	}
	for _, text := range []string{"", "42", "42 (sh", "42 (sh)", "42 (sh) S 1", "x (sh)" + rest, ")(" + rest} {
		if p, err := parseStat([]byte(text)); err == nil {
			t.Errorf("parseStat(%q) = %+v, want an error", text, p)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (init) S 0 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 100 0 0"))
	f.Add([]byte("1 ()) S"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if p, err := parseStat(text); err == nil && p.state == 0 {
			t.Errorf("parseStat(%q) = %+v without a state", text, p)
		}
	})
}

func FuzzParseChildren(f *testing.F) {
	f.Add([]byte("12 13 14 "))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, pid := range parseChildren(nil, text) {
			if pid <= 0 {
				t.Errorf("parseChildren(%q) has pid %d: kill(2) would take it for a group", text, pid)
			}
		}
	})
}

// The kernel's own text, of a process with threads and a child.
func TestChildren(t *testing.T) {
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	self, err := stat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if self.ppid != os.Getppid() || self.threads < 2 {
		t.Errorf("stat of this process = %+v", self)
	}
	if pids := children(os.Getpid(), self.threads); !slices.Contains(pids, cmd.Process.Pid) {
		t.Errorf("children = %v, without %d", pids, cmd.Process.Pid)
	}
	found := false
	walk(nil, func(p process) { found = found || p.pid == cmd.Process.Pid })
	if !found {
		t.Errorf("walk did not visit %d", cmd.Process.Pid)
	}
}

// A file of any length is read whole.
func TestReadFileGrows(t *testing.T) {
	got, err := readFile("self/maps", make([]byte, 0, 16))
	if err != nil || len(got) < 1000 || got[len(got)-1] != '\n' {
		t.Errorf("readFile = %d bytes, %v", len(got), err)
	}
}
