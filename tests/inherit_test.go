package tests

import (
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sleeper is a worker that writes its pid and then does nothing.
var sleeper = []string{"sh", "-c", "echo $$; exec sleep 60"}

// procStatus returns the fields of /proc/PID/status.
func procStatus(t *testing.T, pid int) map[string]string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.TrimSpace(value)
	}
	return fields
}

// openFiles returns what each open file of a process is.
func openFiles(t *testing.T, pid int) map[string]string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, e := range entries {
		files[e.Name()], _ = os.Readlink(filepath.Join(dir, e.Name()))
	}
	return files
}

// inherited returns all that a process has from who started it and that
// /proc tells.
func inherited(t *testing.T, pid int) map[string]string {
	t.Helper()
	status := procStatus(t, pid)
	priority, err := unix.Getpriority(unix.PRIO_PROCESS, pid)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{"priority": strconv.Itoa(priority)}
	for _, field := range []string{
		"Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb",
		"NoNewPrivs", "Seccomp", "Cpus_allowed_list", "THP_enabled",
	} {
		got[field] = status[field]
	}
	for _, file := range []string{"limits", "oom_score_adj", "cgroup"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err != nil {
			t.Fatal(err)
		}
		got[file] = string(text)
	}
	for _, link := range []string{"cwd", "root", "ns/mnt", "ns/net", "ns/pid", "ns/user"} {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, link))
		if err != nil {
			t.Fatal(err)
		}
		got[link] = target
	}
	return got
}

// Each shell text changes what a process inherits and then executes "$@".
func TestInherit(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, shell string }{
		{"plain", `exec "$@"`},
		{"umask", `umask 027; exec "$@"`},
		{"soft limit on files", `ulimit -Sn 256; exec "$@"`},
		{"hard limit on files", `ulimit -n 300; exec "$@"`},
		{"limits", `ulimit -t 1000; ulimit -f 100000; ulimit -Ss 4096; ulimit -Sc 0; exec "$@"`},
		{"nice", `exec nice -n 5 "$@"`},
		{"nohup", `exec nohup "$@"`},
		{"ignored HUP", `trap "" HUP; exec "$@"`},
		{"ignored INT and QUIT", `trap "" INT QUIT; exec "$@"`},
		{"background", `"$@" & wait`},
		{"directory", `mkdir -p "a directory"; cd "a directory"; exec "$@"`},
		{"cpu", `exec taskset -c 0 "$@"`},
		{"oom score", `echo 500 >/proc/self/oom_score_adj; exec "$@"`},
		{"no new privileges", `exec setpriv --no-new-privs "$@"`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			start := func(command ...string) map[string]string {
				cmd := exec.Command("sh", append([]string{"-c", test.shell, "sh"}, command...)...)
				cmd.Dir = dir
				j := startJob(t, cmd)
				pid := j.pid()
				t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
				return inherited(t, pid)
			}
			want := start(sleeper...)
			got := start(append([]string{pgroupBin, "run", "--"}, sleeper...)...)
			for _, field := range slices.Sorted(maps.Keys(want)) {
				if got[field] != want[field] {
					t.Errorf("the worker's %s is\n%s\nwithout pgroup\n%s", field, got[field], want[field])
				}
			}
		})
	}
}

func TestInheritSignalMask(t *testing.T) {
	t.Parallel()
	// A child inherits the mask of the thread that forks.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	mask := uint64(1<<(syscall.SIGUSR1-1) | 1<<(syscall.SIGWINCH-1) | 1<<(40-1))
	var set, old unix.Sigset_t
	set.Val[0] = mask
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &set, &old); err != nil {
		t.Fatal(err)
	}
	defer unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	worker := startJob(t, pgroupRun(sleeper...)).pid()
	if got, want := procStatus(t, worker)["SigBlk"], fmt.Sprintf("%016x", mask); got != want {
		t.Errorf("the worker's signal mask is %s, want %s", got, want)
	}
}

func TestInheritEnvironment(t *testing.T) {
	t.Parallel()
	path := "PATH=" + os.Getenv("PATH")
	tests := []struct {
		name      string
		env, kept []string
	}{
		{"empty", []string{}, []string{}},
		{"plain", []string{path, "A=b", "EMPTY=", "LINES=1\n2", "EQUAL=="}, []string{path, "A=b", "EMPTY=", "LINES=1\n2", "EQUAL=="}},
		{"GODEBUG", []string{path, "GODEBUG=madvdontneed=1"}, []string{path, "GODEBUG=madvdontneed=1"}},
		{"GODEBUG asyncpreemptoff", []string{path, "GODEBUG=asyncpreemptoff=0"}, []string{path, "GODEBUG=asyncpreemptoff=0"}},
		{"empty GODEBUG", []string{path, "GODEBUG="}, []string{path, "GODEBUG="}},
		{"nested", []string{"PGROUP_WORKER=7", "PGROUP_WORKERS=9", "PGROUP_PID=1", "PGROUP_START=5", "PGROUP_LEADER=1",
			"NODE_CHANNEL_FD=3", "NODE_CHANNEL_SERIALIZATION_MODE=json", "NODE_UNIQUE_ID=1", "LISTEN_PID=1", "LISTEN_FDS=1", "LISTEN_FDNAMES=x", "PGROUP_READY_FD=4", path}, []string{path}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cmd := pgroupRun("--", "cat", "/proc/self/environ")
			cmd.Env = test.env
			j := startJob(t, cmd)
			text, err := io.ReadAll(j.stdout)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
			leader := slices.IndexFunc(got, func(e string) bool { return strings.HasPrefix(e, "PGROUP_LEADER=") })
			if leader < 0 {
				t.Fatalf("no PGROUP_LEADER in %q", got)
			}
			if pid, err := strconv.Atoi(strings.TrimPrefix(got[leader], "PGROUP_LEADER=")); err != nil || pid == cmd.Process.Pid {
				t.Errorf("%s, and the launcher is %d", got[leader], cmd.Process.Pid)
			}
			got = slices.Delete(got, leader, leader+1)
			want := append(slices.Clone(test.kept), "PGROUP_WORKER=1", "PGROUP_WORKERS=1", "PGROUP_START=1", fmt.Sprintf("PGROUP_PID=%d", cmd.Process.Pid))
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("the worker's environment is %q, want %q", got, want)
			}
			j.wantStatus("0")
		})
	}
}

func TestRoles(t *testing.T) {
	t.Parallel()
	j := startJob(t, pgroupRun(sleeper...))
	launcher, worker := j.cmd.Process.Pid, j.pid()
	w, _ := readStat(worker)
	leader := w.ppid
	type place struct{ parent, group, session int }
	at := func(pid int) place {
		p, _ := readStat(pid)
		session, err := unix.Getsid(pid)
		if err != nil {
			t.Fatal(err)
		}
		return place{p.ppid, p.pgid, session}
	}
	own := at(os.Getpid())
	for _, process := range []struct {
		name string
		pid  int
		want place
	}{
		{"launcher", launcher, place{os.Getpid(), own.group, own.session}},
		{"leader", leader, place{launcher, leader, leader}},
		{"worker", worker, place{leader, worker, leader}},
	} {
		if got := at(process.pid); got != process.want {
			t.Errorf("the %s's %+v, want %+v", process.name, got, process.want)
		}
	}
	for _, pid := range []int{launcher, leader} {
		eventually(t, "launcher and leader move to /", func() bool {
			cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
			if err != nil {
				t.Fatal(err)
			}
			return cwd == "/"
		})
	}
}

// The streams are the caller's own, not copies, and nothing else is open.
func TestOpenFiles(t *testing.T) {
	t.Parallel()
	stdin, _ := pipe(t)
	// The worker waits without an exec, which opens libraries.
	cmd := exec.Command("sh", "-c", `readlink /proc/self/fd/0 /proc/self/fd/1; exec 9</dev/null 2>err; exec "$0" run -- sh -c 'echo $$; read line'`, pgroupBin)
	cmd.Dir = t.TempDir()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	cmd.Stdin, cmd.ExtraFiles = stdin, []*os.File{null, null}
	j := startJob(t, cmd)
	want := map[string]string{"0": j.line(), "1": j.line(), "2": filepath.Join(cmd.Dir, "err")}
	if got := openFiles(t, j.pid()); !maps.Equal(got, want) {
		t.Errorf("the worker has the open files %v, want %v", got, want)
	}
}

// A worker that closes its streams and lives on: the neighbours in the
// pipeline see the end, because nobody else holds them.
func TestClosedStreams(t *testing.T) {
	t.Parallel()
	inR, inW := pipe(t)
	errR, errW := pipe(t)
	cmd := pgroupRun("--", "sh", "-c", `echo $$; exec <&- >&- 2>&-; exec sleep 60`)
	cmd.Stdin, cmd.Stderr = inR, errW
	j := startJob(t, cmd)
	inR.Close()
	errW.Close()
	worker := j.pid()
	for name, r := range map[string]io.Reader{"output": j.stdout, "error": errR} {
		if text, err := io.ReadAll(r); err != nil || len(text) > 0 {
			t.Errorf("standard %s of a worker that closed it: %q, %v; want end of file", name, text, err)
		}
	}
	eventually(t, "standard input of a worker that closed it is a broken pipe", func() bool {
		_, err := inW.Write([]byte("x"))
		return err != nil
	})
	if err := syscall.Kill(worker, 0); err != nil {
		t.Errorf("the worker lives on: %v", err)
	}
}

// pipe returns a pipe whose reads are bounded in time.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.SetReadDeadline(time.Now().Add(jobLimit))
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	return r, w
}
