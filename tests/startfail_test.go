package tests

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// nobody is an ordinary user.
const nobody = 65534

func init() {
	roles["limited"] = limitedRole
}

// users returns the users that tests can run as: root and an ordinary one, or
// only who we are.
func users() []int {
	if os.Getuid() == 0 {
		return []int{0, nobody}
	}
	return []int{os.Getuid()}
}

// asUser makes cmd run as uid, one of users.
func asUser(cmd *exec.Cmd, uid int) {
	if uid != os.Getuid() {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
}

// limitedRole executes args[3:] as user args[0] ("" for the same) with the
// limit args[1] ("nproc", "nofile") at args[2].
func limitedRole(args []string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "limited:", err)
		return 99
	}
	if args[0] != "" {
		uid, err := strconv.Atoi(args[0])
		if err != nil {
			return fail(err)
		}
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid)); err != nil {
			return fail(err)
		}
	}
	n, err := strconv.ParseUint(args[2], 10, 64)
	if err != nil {
		return fail(err)
	}
	which := map[string]int{"nproc": unix.RLIMIT_NPROC, "nofile": unix.RLIMIT_NOFILE}[args[1]]
	if err := unix.Setrlimit(which, &unix.Rlimit{Cur: n, Max: n}); err != nil {
		return fail(err)
	}
	return fail(syscall.Exec(args[3], args[3:], withoutRole()))
}

// endSoon runs cmd in a directory of its own, and fails the test if it
// does not end within 10 s or leaves a process behind. It returns the
// exit status, standard output and standard error.
func endSoon(t *testing.T, cmd *exec.Cmd) (status int, stdout, stderr string) {
	t.Helper()
	dir := cellDir(t)
	var files [2]*os.File
	for i := range files {
		var err error
		if files[i], err = os.Create(filepath.Join(dir, fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
		defer files[i].Close()
	}
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, files[0], files[1]
	cmd.Env = append(cmd.Environ(), cellVar+"="+dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	left := func() []int {
		return pidsWith(func(pid int) bool { return marked(pid, dir) || samePath(pid, "cwd", dir) })
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Errorf("%s hangs", cmd)
		cmd.Process.Kill()
		<-ended
	}
	var pids []int
	for end := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
		if pids = left(); len(pids) == 0 || time.Now().After(end) {
			break
		}
	}
	for _, pid := range pids {
		t.Errorf("%s leaves process %d: %q", cmd, pid, cmdline(pid))
		syscall.Kill(pid, syscall.SIGKILL)
	}
	out, _ := os.ReadFile(files[0].Name())
	errs, _ := os.ReadFile(files[1].Name())
	return cmd.ProcessState.ExitCode(), string(out), string(errs)
}

func TestExecFails(t *testing.T) {
	t.Setenv("PATH", "/usr/bin:/bin") // without directories that would make it EACCES
	dir := cellDir(t)
	plain := filepath.Join(dir, "plain")
	script := filepath.Join(dir, "script")
	for name, text := range map[string]string{plain: "no program", script: "#!/no/such/interpreter\n"} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(script, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		command string
		status  int
	}{
		{filepath.Join(dir, "missing"), 127},
		{"pgroup-test-no-such-command", 127},
		{plain, 126},
		{dir, 126},
		{script, 127}, // as env(1) and nohup(1): ENOENT of the interpreter
	} {
		for _, contain := range []string{"tree", "pidns"} {
			t.Run(contain+"/"+filepath.Base(test.command), func(t *testing.T) {
				status, stdout, stderr := endSoon(t, pgroupRun("--contain", contain, "--", test.command))
				if status != test.status {
					t.Errorf("status %d, want %d", status, test.status)
				}
				if lines := strings.Count(stderr, "\n"); stdout != "" || lines != 1 {
					t.Errorf("standard output %q, standard error %q: want one line of error", stdout, stderr)
				}
			})
		}
	}
}

// limited returns `pgroup run sh -c 'echo ran'`, run with a limit by the role.
func limited(t *testing.T, user, limit string, n int) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(testExe, user, limit, fmt.Sprint(n), pgroupBin, "run", "--", "/bin/sh", "-c", "echo ran")
	cmd.Env = append(os.Environ(), usedRole(t, "limited"))
	return cmd
}

// wantFailure checks what a run shows that may have lacked something: either
// the command ran, or pgroup says why not, or the Go runtime does; it may also
// fail after the command has run.
func wantFailure(t *testing.T, status int, stdout, stderr string) {
	t.Helper()
	ofRuntime := strings.HasPrefix(stderr, "runtime: ") || strings.HasPrefix(stderr, "fatal error: ")
	switch {
	case status == 0 && stdout == "ran\n":
	case status >= 125 && status <= 127 && (strings.HasPrefix(stderr, "pgroup: ") || ofRuntime):
	case status == 2 && ofRuntime:
	default:
		t.Errorf("status %d, standard output %q, standard error %.300q", status, stdout, stderr)
	}
}

// TestOutOfProcesses starts as an ordinary user who may have only a few
// processes, threads included, so that some step of the way fails with EAGAIN.
func TestOutOfProcesses(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start a process as a user who has none yet")
	}
	ran := false
	for n := 1; n <= 30; n++ {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			status, stdout, stderr := endSoon(t, limited(t, fmt.Sprint(nobody), "nproc", n))
			wantFailure(t, status, stdout, stderr)
			ran = ran || status == 0
		})
	}
	if !ran {
		t.Error("the command ran with none of the limits: raise them")
	}
}

func TestOutOfFiles(t *testing.T) {
	ran := false
	for n := 3; n <= 32; n++ {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			status, stdout, stderr := endSoon(t, limited(t, "", "nofile", n))
			wantFailure(t, status, stdout, stderr)
			ran = ran || status == 0
		})
	}
	if !ran {
		t.Error("the command ran with none of the limits: raise them")
	}
}
