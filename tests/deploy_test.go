package tests

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	roles["myserver"] = myserverRole
}

// myserverRole is the server of the examples, made for systemd: it serves HTTP on
// the socket that it was handed, if any, and tells there its worker's number and
// pid; it notifies who waits for that, and ends on TERM.
func myserverRole([]string) int {
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	if os.Getenv("LISTEN_FDS") != "" {
		l, err := net.FileListener(os.NewFile(3, "socket"))
		if err != nil {
			fmt.Fprintln(os.Stderr, "myserver:", err)
			return 1
		}
		go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintln(w, os.Getenv("PGROUP_WORKER"), os.Getpid())
		}))
	}
	if name := os.Getenv("NOTIFY_SOCKET"); name != "" {
		conn, err := net.Dial("unixgram", name)
		if err == nil {
			_, err = conn.Write([]byte("READY=1"))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "myserver:", err)
			return 1
		}
	}
	fmt.Println("up")
	<-term
	return 0
}

// exampleAddr is where the server of the examples is.
const exampleAddr = "127.0.0.1:8080"

// example is the path of a file that users are told to copy.
func example(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("../cmd/pgroup/examples/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func exampleText(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(example(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// onMachine reports whether the test runs as it should: as root of what is a
// machine of its own, as far as files, processes and the network go. If not it
// runs the test so, and the caller has nothing left to do.
func onMachine(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideVar) != "" {
		layOut(t)
		return true
	}
	usedRole(t, "myserver")
	cmd := exec.Command(testExe, "/usr/bin/env", usedRole(t, "network"), testExe, testExe, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), usedRole(t, "init"), insideVar+"="+pgroupBin)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
	}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	runtime.LockOSThread() // Pdeathsig is tied to it
	defer runtime.UnlockOSThread()
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name()+" ")) {
		t.Errorf("on a machine of its own: %v\n%s", err, out)
	}
	return false
}

// layOut makes the directories private that the examples are copied to, and
// installs pgroup and the server of the examples.
func layOut(t *testing.T) {
	t.Helper()
	for _, dir := range []string{"/run", "/var/log", "/usr/local/bin", "/etc/init.d", "/etc/default"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			t.Fatalf("tmpfs on %s: %v", dir, err)
		}
	}
	// Not by their names: the directories of tests are closed to other users.
	for name, bin := range map[string]string{"pgroup": pgroupBin, "tests": testExe} {
		path := "/usr/local/bin/" + name
		install(t, path, "", 0o755)
		if err := unix.Mount(bin, path, "", unix.MS_BIND, ""); err != nil {
			t.Fatalf("mount %s: %v", path, err)
		}
	}
	install(t, "/usr/local/bin/myserver", "#!/bin/sh\nexec env "+roleVar+"=myserver /usr/local/bin/tests\n", 0o755)
	if exec.Command("setpriv", "--reuid", "www-data", "true").Run() != nil {
		// An ordinary user has no other one.
		install(t, "/etc/default/myserver", "RUNAS=\n", 0o644)
	}
	os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

func install(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// wantRun runs a command, which has to end with that status, and returns what it
// says. What it leaves running must not hold its streams.
func wantRun(t *testing.T, status int, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = jobLimit
	limit := time.AfterFunc(jobLimit, func() { cmd.Process.Kill() })
	defer limit.Stop()
	if err := cmd.Run(); errors.Is(err, exec.ErrWaitDelay) || cmd.ProcessState == nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out.String())
	}
	if got := cmd.ProcessState.ExitCode(); got != status {
		t.Errorf("%s: status %d, want %d\n%s", cmd, got, status, out.String())
	}
	return out.String()
}

// A workersNow is what the server of the examples is now.
type workersNow struct {
	launcher int
	pids     map[int]int // by number
}

// lookAt asks over the network until both workers have answered.
func lookAt(t *testing.T, pidfile string) (now workersNow) {
	t.Helper()
	now.launcher = pidIn(t, pidfile)
	now.pids = make(map[int]int)
	eventually(t, "both workers have answered", func() bool {
		worker, pid, err := askHTTP(exampleAddr)
		if err != nil {
			t.Fatal(err)
		}
		now.pids[worker] = pid
		return len(now.pids) == 2
	})
	return now
}

func pidIn(t *testing.T, path string) int {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// replaced reports whether each worker is another process than before.
func (now workersNow) replaced(before workersNow) bool {
	return len(now.pids) == 2 && now.pids[1] != before.pids[1] && now.pids[2] != before.pids[2]
}

// aloneOnMachine is for a moment in which nothing may live but the machine's
// init and the test.
func aloneOnMachine(t *testing.T) {
	t.Helper()
	for _, pid := range others() {
		t.Errorf("process %d lives: %q", pid, cmdline(pid))
	}
}

// others returns the processes that live beside the machine's init and the test.
func others() []int {
	return pidsWith(func(pid int) bool {
		s, ok := readStat(pid)
		return pid != 1 && pid != os.Getpid() && ok && s.state != "Z"
	})
}

// section returns what the pattern's group matches in the text.
func section(t *testing.T, text, pattern string) string {
	t.Helper()
	match := regexp.MustCompile(pattern).FindStringSubmatch(text)
	if match == nil {
		t.Fatalf("no %q in\n%s", pattern, text)
	}
	return match[1]
}
