package pgroup

import (
	"errors"
	"fmt"
	"net"
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

// news is what a socket or a pipe has to tell, in order.
type news chan string

func (n news) ready()             { n <- "ready" }
func (n news) status(text string) { n <- "status " + text }

func (n news) want(t *testing.T, want ...string) {
	t.Helper()
	for _, w := range want {
		select {
		case got := <-n:
			if got != w {
				t.Fatalf("got %q, want %q", got, w)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%q did not come", w)
		}
	}
}

func newTestSocket(t *testing.T) (*notifySocket, news) {
	t.Helper()
	got := make(news, 16)
	n, err := newNotifySocket(got.ready, got.status)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.close)
	return n, got
}

func dial(t *testing.T, n *notifySocket) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestNotifySocket(t *testing.T) {
	n, got := newTestSocket(t)
	c := dial(t, n)
	for _, text := range []string{
		"READY=0", "READY=1\x00\nREADY=1", "X", "READY=1" + strings.Repeat("\n", notifySize), "",
		"STATUS=one\nMAINPID=1\nSTOPPING=1\nWATCHDOG=1",
		"STATUS=\x00", "STATUS=two\nREADY=1\n", "READY=1", "RELOADING=1\nREADY=1", "STATUS=last",
	} {
		if _, err := c.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	// Ready is told once, and what is no notification not at all.
	got.want(t, "status one", "status ", "status two", "ready", "status last")
}

// Descriptors that come along are closed before the next notification is read.
func TestNotifyDescriptors(t *testing.T) {
	n, got := newTestSocket(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	send := func(text string, rights []byte) {
		if err := unix.Sendmsg(fd, []byte(text), rights, &unix.SockaddrUnix{Name: n.name}, 0); err != nil {
			t.Fatal(err)
		}
	}
	open := openFDs(t)
	for _, text := range []string{"FDSTORE=1\nFDNAME=x", "BARRIER=1", "X"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		send(text, unix.UnixRights(int(w.Fd()), int(w.Fd())))
		w.Close()
		r.SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := r.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: %v, want the end of the file", text, err)
		}
		r.Close()
	}
	send("STATUS=end", nil)
	got.want(t, "status end")
	if now := openFDs(t); now != open {
		t.Errorf("%d descriptors are open, %d were", now, open)
	}
}

func openFDs(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// nobody is a user that we are not.
const nobody = 65534

// notifyCommand is systemd-notify(1), the real one, or a shell script around it.
func notifyCommand(n *notifySocket, script string) *exec.Cmd {
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/bin:/bin", n.env()}
	return cmd
}

func TestSystemdNotify(t *testing.T) {
	for _, as := range []int{os.Getuid(), nobody} {
		t.Run(fmt.Sprint("uid ", as), func(t *testing.T) {
			n, got := newTestSocket(t)
			// It waits for its barrier, so it would hang if that were not answered.
			cmd := notifyCommand(n, "systemd-notify --ready --status=serving; exit $?")
			if as != os.Getuid() {
				if os.Getuid() != 0 {
					t.Skip("only root can start a process as another user")
				}
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(as), Gid: uint32(as)}}
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			n.setPID(cmd.Process.Pid)
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
			got.want(t, "status serving", "ready")
		})
	}
}

// The name of the socket is no secret: another user who is not the worker is not
// heard, whenever it speaks.
func TestNotifyStranger(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start a process as another user")
	}
	n, got := newTestSocket(t)
	stranger := notifyCommand(n, "systemd-notify --no-block --ready; systemd-notify --ready")
	stranger.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	worker := exec.Command("sleep", "30")
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	defer worker.Wait()
	defer worker.Process.Kill()
	n.setPID(worker.Process.Pid)
	if err := stranger.Wait(); err != nil {
		t.Fatal(err)
	}
	dial(t, n).Write([]byte("STATUS=we"))
	got.want(t, "status we")
}

// A socket that is closed while a stranger waits for the pid holds nobody up, and
// is ready no more.
func TestNotifyClose(t *testing.T) {
	n, got := newTestSocket(t)
	c := dial(t, n)
	n.close()
	n.close()
	n.setPID(os.Getpid())
	if n.pid != 0 {
		t.Error("a pid was set after close")
	}
	if _, err := c.Write([]byte("READY=1")); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("write to a closed socket: %v, want ECONNREFUSED", err)
	}
	select {
	case s := <-got:
		t.Errorf("got %q", s)
	default:
	}
}

func TestReadyPipe(t *testing.T) {
	got := make(news, 16)
	w, stop, err := newReadyPipe(got.ready)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	w.WriteString("not yet")
	cmd := exec.Command("sh", "-c", "echo >&$PGROUP_READY_FD; echo again >&$PGROUP_READY_FD")
	cmd.Env = append(os.Environ(), "PGROUP_READY_FD=3")
	cmd.ExtraFiles = []*os.File{w}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got.want(t, "ready")
	w.Close()
	select {
	case s := <-got:
		t.Errorf("got %q again", s)
	default:
	}
}

// A worker that ends without a word, or says something else, is not ready.
func TestReadyPipeEnd(t *testing.T) {
	before := openFDs(t)
	got := make(news, 16)
	w, stop, err := newReadyPipe(got.ready)
	if err != nil {
		t.Fatal(err)
	}
	w.WriteString("no newline")
	w.Close()
	// The goroutine closes its end when it has seen all: then it is over.
	for deadline := time.Now().Add(30 * time.Second); openFDs(t) > before; {
		if time.Now().After(deadline) {
			t.Fatal("the pipe was not closed at its end")
		}
		time.Sleep(time.Millisecond)
	}
	select {
	case s := <-got:
		t.Errorf("got %q", s)
	default:
	}
	stop()

	w, stop, err = newReadyPipe(got.ready)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	stop()
	if _, err := w.WriteString("\n"); !errors.Is(err, unix.EPIPE) {
		t.Errorf("write after close: %v, want EPIPE", err)
	}
}

func TestNotify(t *testing.T) {
	t.Setenv(notifyVar, "")
	if err := Notify("READY=1"); err != nil {
		t.Errorf("without NOTIFY_SOCKET: %v", err)
	}
	for _, name := range []string{"relative", "vsock:2:1", "/none/such", "@pgroup-test-none"} {
		t.Setenv(notifyVar, name)
		if err := Notify("READY=1"); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("NOTIFY_SOCKET=%s: %v, want an error that names it", name, err)
		}
	}

	n, got := newTestSocket(t)
	t.Setenv(notifyVar, n.name)
	if err := Notify("STATUS=abstract"); err != nil {
		t.Error(err)
	}
	got.want(t, "status abstract")

	name := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv(notifyVar, name)
	if err := Notify("READY=1\nSTATUS=path"); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 100)
	if n, err := l.Read(buf); err != nil || string(buf[:n]) != "READY=1\nSTATUS=path" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
}

func TestReportReady(t *testing.T) {
	t.Setenv(notifyVar, "")
	t.Setenv(readyFDVar, "")
	os.Unsetenv(readyFDVar)
	if err := ReportReady(); err != nil {
		t.Errorf("where nobody asks: %v", err)
	}

	n, got := newTestSocket(t)
	t.Setenv(notifyVar, n.name)
	if err := ReportReady(); err != nil {
		t.Error(err)
	}
	got.want(t, "ready")
	t.Setenv(notifyVar, "")

	w, stop, err := newReadyPipe(got.ready)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	fd, err := unix.FcntlInt(w.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(readyFDVar, strconv.Itoa(fd))
	for range 2 { // the second time it has nothing to do
		if err := ReportReady(); err != nil {
			t.Error(err)
		}
	}
	got.want(t, "ready")
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor is still open: %v", err)
	}
	if v, ok := os.LookupEnv(readyFDVar); ok {
		t.Errorf("children would find %s=%s", readyFDVar, v)
	}

	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, value := range []string{"", "x", "1", "1000000", strconv.Itoa(int(null.Fd()))} {
		t.Setenv(readyFDVar, value)
		if err := ReportReady(); err == nil || !strings.Contains(err.Error(), readyFDVar+"="+value) {
			t.Errorf("%s=%s: %v, want an error that names it", readyFDVar, value, err)
		}
	}
}

func TestReadyFixtures(t *testing.T) {
	dir, err := filepath.Abs("../tests/testdata/ready")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"python3", "worker.py"}, {"sh", "worker.sh"}, {"node", "worker.js"}} {
		for _, mode := range []string{ReadyNotify, ReadyFD} {
			t.Run(args[0]+" "+mode, func(t *testing.T) {
				mark := filepath.Join(t.TempDir(), "mark")
				cmd := exec.Command(args[0], filepath.Join(dir, args[1]), mark)
				var got news
				if mode == ReadyNotify {
					var n *notifySocket
					n, got = newTestSocket(t)
					cmd.Env = append(os.Environ(), n.env())
				} else {
					got = make(news, 16)
					w, stop, err := newReadyPipe(got.ready)
					if err != nil {
						t.Fatal(err)
					}
					defer stop()
					defer w.Close()
					cmd.ExtraFiles = []*os.File{w}
					cmd.Env = append(os.Environ(), readyFDVar+"=3")
				}
				cmd.Stderr = os.Stderr
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				defer cmd.Wait()
				defer cmd.Process.Kill()
				got.want(t, "ready")
				if _, err := os.Stat(mark); err != nil {
					t.Errorf("it was ready before its time: %v", err)
				}
				if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
					t.Error(err)
				}
				if err := cmd.Wait(); err != nil {
					t.Errorf("after TERM: %v", err)
				}
			})
		}
	}
}

func FuzzParseNotification(f *testing.F) {
	for _, s := range []string{"READY=1", "STATUS=x\nREADY=1\n", "READY=1\x00", "READY=1\x00\n", "STATUS=\n\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ready, status, hasStatus := parseNotification(s)
		if ready && !strings.Contains(s, "READY=1") {
			t.Errorf("%q made ready", s)
		}
		if hasStatus && !strings.Contains("\n"+s, "\nSTATUS="+status) || strings.ContainsAny(status, "\n\x00") {
			t.Errorf("%q has the status %q", s, status)
		}
		if r, st, has := parseNotification(s + "\nREADY=1"); !strings.Contains(s, "\x00") && (!r || st != status || has != hasStatus) {
			t.Errorf("%q and READY=1: %v, %q, %v", s, r, st, has)
		}
	})
}
