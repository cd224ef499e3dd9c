package pgroup

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Some tests are of another process: this one, started again in a role.
const listenRole = "PGROUP_LISTEN_ROLE"

func init() {
	roles := map[string]func() error{"wildcard": wildcardRole, "port80": port80Role, "given": givenRole}
	if role, ok := roles[os.Getenv(listenRole)]; ok {
		if err := role(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// inNetwork runs the role in a network of its own, with nothing but lo.
func inNetwork(t *testing.T, role string) (output string, err error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), listenRole+"="+role)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out)), err
}

func open(t *testing.T, workers int, reuseport bool, addrs ...string) *sockets {
	t.Helper()
	s, err := tryOpen(workers, reuseport, addrs...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	return s
}

func tryOpen(workers int, reuseport bool, addrs ...string) (*sockets, error) {
	var list []Listen
	for _, a := range addrs {
		l, err := ParseListen(a)
		if err != nil {
			return nil, err
		}
		list = append(list, l)
	}
	return openSockets(list, workers, reuseport)
}

func files(t *testing.T, s *sockets, worker int) []int {
	t.Helper()
	fds, err := s.files(worker)
	if err != nil {
		t.Fatal(err)
	}
	return fds
}

// readable reports whether something waits in the queue of fd.
func readable(fd int, timeout time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	return poll(fds, time.Now().Add(timeout)) == nil && fds[0].Revents&unix.POLLIN != 0
}

const long = 10 * time.Second // for what has to come

// exchange connects to addr and sees that fd accepts it.
func exchange(fd int, network, addr string) error {
	c, err := net.Dial(network, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if !readable(fd, long) {
		return fmt.Errorf("nothing to accept on %s", addr)
	}
	nfd, _, err := unix.Accept(fd)
	if err != nil {
		return err
	}
	unix.Write(nfd, []byte("hello"))
	unix.Close(nfd)
	if got, err := io.ReadAll(c); string(got) != "hello" {
		return fmt.Errorf("read %q, %v from %s", got, err, addr)
	}
	return nil
}

func countFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestParseListen(t *testing.T) {
	for _, test := range []struct {
		in   string
		want Listen
	}{
		{":8000", Listen{"", "tcp", ":8000"}},
		{"127.0.0.1:8000", Listen{"", "tcp", "127.0.0.1:8000"}},
		{"[::1]:8000", Listen{"", "tcp", "[::1]:8000"}},
		{"[fe80::1%lo]:8000", Listen{"", "tcp", "[fe80::1%lo]:8000"}},
		{"localhost:0", Listen{"", "tcp", "localhost:0"}},
		{"tcp://:80", Listen{"", "tcp", ":80"}},
		{"tcp4://h:80", Listen{"", "tcp4", "h:80"}},
		{"tcp6://[::]:80", Listen{"", "tcp6", "[::]:80"}},
		{"udp://127.0.0.1:53", Listen{"", "udp", "127.0.0.1:53"}},
		{"unix:/run/a=b:c", Listen{"", "unix", "/run/a=b:c"}},
		{"unix:///run/x", Listen{"", "unix", "///run/x"}},
		{"unix:@x", Listen{"", "unix", "@x"}},
		{"web=:80", Listen{"web", "tcp", ":80"}},
		{"a b/c=unix:x=y", Listen{"a b/c", "unix", "x=y"}},
	} {
		if got, err := ParseListen(test.in); err != nil || got != test.want {
			t.Errorf("ParseListen(%q) = %q, %v", test.in, got, err)
		}
	}
	for in, want := range map[string]string{
		"":                                   "an address is",
		"8000":                               "an address is",
		"/run/x":                             "an address is",
		"::1:8000":                           "an address is",
		":http":                              "the port",
		":65536":                             "the port",
		":-1":                                "the port",
		"tcp://:80/":                         "the port",
		"sctp://:80":                         "the network",
		"unix:":                              "no file name",
		"unix:@":                             "no file name",
		"unix:/run/":                         "no file name",
		"unix://run/x":                       "relative or absolute",
		"unix:" + strings.Repeat("x", 108):   "108 bytes",
		"=:80":                               "no name",
		"a\n=:80":                            "a name is",
		"é=:80":                              "a name is",
		strings.Repeat("n", 256) + "=:80":    "a name is",
		"tcp4://[::1]:80":                    "not an address of tcp4",
		"udp6://127.0.0.1:80":                "not an address of udp6",
		"two words:80":                       "neither an address",
		"[fe80::1%]:80":                      "neither an address",
		"[" + strings.Repeat("1:", 9) + "]:": "the port",
	} {
		l, err := ParseListen(in)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("ParseListen(%q) = %q, %v; want an error with %q", in, l, err, want)
		}
	}
}

func FuzzParseListen(f *testing.F) {
	for _, s := range []string{":8000", "web=[::1]:80", "udp://h:1", "unix:/a=b", "unix:@x", "a=b=c://d:1", "tcp6://[::%1]:0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseListen(s)
		if err != nil {
			if l != (Listen{}) || strings.Contains(err.Error(), "\n") {
				t.Errorf("ParseListen(%q) = %q, %q", s, l, err)
			}
			return
		}
		again := l.String()
		if l.Name != "" {
			again = l.Name + "=" + again
		}
		if got, err := ParseListen(again); err != nil || got != l {
			t.Errorf("ParseListen(%q) = %q, but of that %q it is %q, %v", s, l, again, got, err)
		}
	})
}

func TestSockets(t *testing.T) {
	path := t.TempDir() + "/x"
	abstract := "@pgroup-test-" + strconv.Itoa(os.Getpid())
	s := open(t, 3, false, "127.0.0.1:0", "six=[::1]:0", "localhost:0", "unix:"+path, "unix:"+abstract, "dns=udp://127.0.0.1:0")
	if got, want := s.env(), []string{"LISTEN_FDS=6", "LISTEN_FDNAMES=unknown:six:unknown:unknown:unknown:dns"}; !slices.Equal(got, want) {
		t.Errorf("env = %q", got)
	}
	fds, addrs := files(t, s, 1), s.addrs()
	if again := files(t, s, 3); !slices.Equal(fds, again) {
		t.Errorf("worker 1 has %v, worker 3 %v", fds, again)
	}
	s.drop(3)
	for i, fd := range fds {
		flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		status, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 || status&unix.O_NONBLOCK != 0 {
			t.Errorf("%s: flags %#x, %#x, %v", addrs[i], flags, status, err)
		}
	}
	for i, addr := range addrs[:3] {
		if err := exchange(fds[i], "tcp", addr); err != nil {
			t.Error(err)
		}
		if n, _ := unix.GetsockoptInt(fds[i], unix.SOL_SOCKET, unix.SO_REUSEADDR); n != 1 {
			t.Errorf("%s has no SO_REUSEADDR", addr)
		}
		if n, _ := unix.GetsockoptInt(fds[i], unix.SOL_SOCKET, unix.SO_PROTOCOL); n != unix.IPPROTO_TCP {
			t.Errorf("%s is of protocol %d", addr, n)
		}
	}
	if want := []string{"unix:" + path, "unix:" + abstract}; !slices.Equal(addrs[3:5], want) {
		t.Errorf("addrs = %q, want %q", addrs[3:5], want)
	}
	for i, addr := range []string{path, abstract} {
		if err := exchange(fds[3+i], "unix", addr); err != nil {
			t.Error(err)
		}
	}
	c, err := net.Dial("udp", strings.TrimPrefix(addrs[5], "udp://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("datagram"))
	buf := make([]byte, 20)
	if !readable(fds[5], long) {
		t.Fatal("no datagram came")
	}
	if n, _, err := unix.Recvfrom(fds[5], buf, 0); string(buf[:n]) != "datagram" {
		t.Errorf("received %q, %v", buf[:n], err)
	}
	s.close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("after close: %v", err)
	}
}

// TestWildcard: an address without a host is for both versions of IP, and
// 0.0.0.0 and tcp6:// for one. In a network of its own, so that nobody can
// connect.
func TestWildcard(t *testing.T) {
	if out, err := inNetwork(t, "wildcard"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func loUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, _ := unix.NewIfreq("lo")
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func wildcardRole() error {
	if err := loUp(); err != nil {
		return err
	}
	for _, test := range []struct {
		addr     string
		v4, v6   bool
		workers  int
		reported string
	}{
		{":0", true, true, 1, "[::]:"},
		{":0", true, true, 2, "[::]:"},
		{"[::]:0", true, true, 2, "[::]:"},
		{"0.0.0.0:0", true, false, 2, "0.0.0.0:"},
		{"tcp4://:0", true, false, 2, "tcp4://0.0.0.0:"},
		{"tcp6://:0", false, true, 2, "tcp6://[::]:"},
	} {
		s, err := tryOpen(test.workers, test.workers > 1, test.addr)
		if err != nil {
			return err
		}
		addr := s.addrs()[0]
		if !strings.HasPrefix(addr, test.reported) {
			return fmt.Errorf("%s is %s", test.addr, addr)
		}
		port := addr[strings.LastIndexByte(addr, ':'):]
		for host, want := range map[string]bool{"127.0.0.1": test.v4, "[::1]": test.v6} {
			c, err := net.Dial("tcp", host+port)
			if (err == nil) != want {
				return fmt.Errorf("%s, %d workers: %s%s: %v", test.addr, test.workers, host, port, err)
			}
			if err == nil {
				c.Close()
			}
		}
		s.close()
	}
	return nil
}

func TestReusePort(t *testing.T) {
	dir := t.TempDir()
	s := open(t, 4, true, "127.0.0.1:0", "udp://[::1]:0", "unix:"+dir+"/x")
	addrs := s.addrs()
	sockets := make(map[int]bool)
	for n := 1; n <= 4; n++ {
		fds := files(t, s, n)
		if fds[2] != files(t, s, 1)[2] {
			t.Errorf("worker %d has a unix socket of its own", n)
		}
		for i, fd := range fds[:2] {
			sockets[fd] = true
			sa, _ := unix.Getsockname(fd)
			var got string
			switch sa := sa.(type) {
			case *unix.SockaddrInet4:
				got = fmt.Sprintf("127.0.0.1:%d", sa.Port)
			case *unix.SockaddrInet6:
				got = fmt.Sprintf("udp://[::1]:%d", sa.Port)
			}
			if got != addrs[i] {
				t.Errorf("worker %d has %s, not %s", n, got, addrs[i])
			}
		}
	}
	if len(sockets) != 8 {
		t.Errorf("%d sockets for 4 workers and 2 addresses", len(sockets))
	}
	// Without luck one has none: 4 * (3/4)^100.
	dial := func() {
		t.Helper()
		for range 100 {
			c, err := net.Dial("tcp", addrs[0])
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
		}
	}
	dial()
	for n := 1; n <= 4; n++ {
		if !readable(files(t, s, n)[0], long) {
			t.Errorf("worker %d has no connection", n)
		}
	}
	// Another number of workers, at the same address.
	before := countFDs(t)
	five := files(t, s, 5)
	if slices.Contains(files(t, s, 4), five[0]) || !slices.Equal(five, files(t, s, 5)) {
		t.Errorf("worker 5 has %v, then %v", five, files(t, s, 5))
	}
	if got := countFDs(t); got != before+2 {
		t.Errorf("worker 5 took %d descriptors", got-before)
	}
	dial()
	if !readable(five[0], long) {
		t.Error("worker 5 has no connection")
	}
	before = countFDs(t)
	s.drop(5)
	s.drop(5)
	if got := countFDs(t); got != before-2 {
		t.Errorf("without worker 5 %d descriptors fewer", before-got)
	}
	for _, fd := range files(t, s, 5) { // again
		if _, err := unix.Getsockname(fd); err != nil {
			t.Errorf("the new worker 5 has no socket: %v", err)
		}
	}
	if got := s.addrs(); !slices.Equal(got, addrs) {
		t.Errorf("addrs = %q, then %q", addrs, got)
	}
}

// TestRetire: no connection comes to a retired worker, whatever the kernel has
// moved to where, and all come to somebody.
func TestRetire(t *testing.T) {
	s := open(t, 4, true, "127.0.0.1:0", "udp://127.0.0.1:0")
	addr := s.addrs()[0]
	// get makes connections and accepts them all, and returns who got some.
	get := func() (workers []int) {
		t.Helper()
		for range 100 {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
		own, end := s.list[0].fds, time.Now().Add(long)
		for n, got := 1, 0; got < 100; n = n%6 + 1 {
			fd, ok := own[n]
			if !ok || !readable(fd, 0) {
				if time.Now().After(end) {
					t.Fatalf("%d of 100 connections came", got)
				}
				continue
			}
			c, _, err := unix.Accept(fd)
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(c)
			if got++; !slices.Contains(workers, n) {
				workers = append(workers, n)
			}
		}
		slices.Sort(workers)
		return workers
	}
	for _, test := range []struct {
		do   string
		f    func()
		want []int
	}{
		{"nothing", func() {}, []int{1, 2, 3, 4}},
		{"retire 2", func() { s.retire(2) }, []int{1, 3, 4}},
		{"drop 2", func() { s.drop(2) }, []int{1, 3, 4}},
		{"retire 4, which has the place of 2", func() { s.retire(4) }, []int{1, 3}},
		{"5", func() { files(t, s, 5) }, []int{1, 3, 5}},
		{"retire 1", func() { s.retire(1) }, []int{3, 5}},
		{"drop 4", func() { s.drop(4) }, []int{3, 5}},
		{"4", func() { files(t, s, 4) }, []int{3, 4, 5}},
		{"drop 1", func() { s.drop(1) }, []int{3, 4, 5}},
		{"all", func() { s.retire(3); s.retire(4); s.retire(5) }, []int{3, 4, 5}},
	} {
		test.f()
		if got := get(); !slices.Equal(got, test.want) {
			t.Errorf("%s: connections came to %v, not %v", test.do, got, test.want)
		}
	}
}

// TestAllOrNothing: what was opened before the error is closed, its file removed.
func TestAllOrNothing(t *testing.T) {
	taken := open(t, 1, false, "127.0.0.1:0").addrs()[0]
	path := t.TempDir() + "/x"
	before := countFDs(t)
	for range 3 {
		if _, err := tryOpen(3, true, "unix:"+path, "127.0.0.1:0", "udp://127.0.0.1:0", taken); !errors.Is(err, unix.EADDRINUSE) {
			t.Fatalf("error %v", err)
		}
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors, then %d", before, after)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the file: %v", err)
	}
}

func TestListenErrors(t *testing.T) {
	dir := t.TempDir()
	taken := open(t, 1, false, "127.0.0.1:0", "unix:"+dir+"/live", "udp://127.0.0.1:0")
	addrs := taken.addrs()
	if err := os.WriteFile(dir+"/file", []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("live", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	datagram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/datagram"})
	if err != nil {
		t.Fatal(err)
	}
	defer datagram.Close()
	before := countFDs(t)
	for addr, want := range map[string]string{
		addrs[0]:                      "address already in use; ss -lntup shows by whom",
		addrs[2]:                      "address already in use; ss -lntup shows by whom",
		"192.0.2.1:0":                 "cannot assign requested address; no network interface has this address: ip address shows those that are there",
		"no-such-host.invalid:0":      "; give an address, or a name that /etc/hosts or DNS knows",
		"unix:" + dir + "/live":       "address already in use; ss -lxp shows by whom",
		"unix:" + dir + "/datagram":   "address already in use; ss -lxp shows by whom",
		"unix:" + dir + "/file":       "address already in use; there is a file of this name, which is no socket",
		"unix:" + dir + "/link":       "address already in use; there is a file of this name, which is no socket",
		"unix:" + dir + "/no/such":    "no such file or directory; create the directory " + dir + "/no first",
		"unix:" + dir + "/file/x":     "not a directory; create the directory " + dir + "/file first",
		"unix:" + filepath.Dir(dir):   "address already in use; there is a file of this name, which is no socket",
		"unix:/proc/self/pgroup-test": "cannot listen on unix:/proc/self/pgroup-test: ",
	} {
		_, err := tryOpen(1, false, addr)
		if err == nil || !strings.HasPrefix(err.Error(), "cannot listen on "+addr+": ") || !strings.HasSuffix(err.Error(), want) && !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v; want %q", addr, err, want)
		}
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors, then %d", before, after)
	}
	if text, _ := os.ReadFile(dir + "/file"); string(text) != "precious" {
		t.Errorf("the file holds %q", text)
	}
	// The connections that asked whether anybody listens are gone; it still does.
	fds := files(t, taken, 1)
	for readable(fds[1], 0) {
		fd, _, _ := unix.Accept(fds[1])
		unix.Close(fd)
	}
	if err := exchange(fds[1], "unix", dir+"/live"); err != nil {
		t.Error(err)
	}
}

// TestPort80 listens as an ordinary user where the ports below 1024 are root's.
func TestPort80(t *testing.T) {
	out, err := inNetwork(t, "port80")
	want := "cannot listen on :80: permission denied; ports below 1024 need root, CAP_NET_BIND_SERVICE or sysctl net.ipv4.ip_unprivileged_port_start"
	if err == nil || out != want {
		t.Errorf("%v: %s\nwant %s", err, out, want)
	}
}

func port80Role() error {
	if os.Getuid() == 0 {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(65534), syscall.Setuid(65534)); err != nil {
			return err
		}
	}
	_, err := tryOpen(1, false, ":80")
	return err
}

// leaveStale leaves the file of a socket that nobody listens on.
func leaveStale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestStaleSocket(t *testing.T) {
	dir := t.TempDir()
	defer syscall.Umask(syscall.Umask(0o027))
	leaveStale(t, dir+"/x")
	t.Chdir(dir)
	s := open(t, 1, false, "unix:x")
	if err := exchange(files(t, s, 1)[0], "unix", dir+"/x"); err != nil {
		t.Error(err)
	}
	if got, want := s.addrs()[0], "unix:"+dir+"/x"; got != want {
		t.Errorf("addrs = %s, want %s", got, want)
	}
	info, err := os.Lstat("x")
	if err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	// Another's file in its place is not ours to remove.
	os.Remove("x")
	other := open(t, 1, false, "unix:x")
	t.Chdir("/")
	s.close()
	if err := exchange(files(t, other, 1)[0], "unix", dir+"/x"); err != nil {
		t.Error(err)
	}
	other.close()
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

func TestStaleSocketOfAnother(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make a file somebody else's")
	}
	path := t.TempDir() + "/x"
	leaveStale(t, path)
	if err := os.Lchown(path, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	_, err := tryOpen(1, false, "unix:"+path)
	if want := "it belongs to user 65534"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

// TestLongPath: a relative path is used as it is where the absolute one has no
// room in the address.
func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", maxPath))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	leaveStale(t, "x")
	s := open(t, 1, false, "unix:x")
	if err := exchange(files(t, s, 1)[0], "unix", "x"); err != nil {
		t.Error(err)
	}
	t.Chdir("/")
	s.close()
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

// TestStaleRace: of many that find a stale file one gets it, and keeps it.
func TestStaleRace(t *testing.T) {
	path := t.TempDir() + "/x"
	for range 20 {
		leaveStale(t, path)
		var wg sync.WaitGroup
		opened := make([]*sockets, 8)
		begin := make(chan struct{})
		for i := range opened {
			wg.Go(func() {
				<-begin
				s, err := tryOpen(1, false, "unix:"+path)
				if err != nil && !errors.Is(err, unix.EADDRINUSE) {
					t.Error(err)
				}
				opened[i] = s
			})
		}
		close(begin)
		wg.Wait()
		winners := 0
		for _, s := range opened {
			if s == nil {
				continue
			}
			winners++
			fd := files(t, s, 1)[0]
			for readable(fd, 0) { // the losers asked
				c, _, _ := unix.Accept(fd)
				unix.Close(c)
			}
			if err := exchange(fd, "unix", path); err != nil {
				t.Error(err)
			}
			s.close()
		}
		if winners != 1 {
			t.Fatalf("%d of %d got it", winners, len(opened))
		}
	}
}

// TestLockedDirectory: somebody else's lock does not stop us, but for a stale
// file.
func TestLockedDirectory(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	open(t, 1, false, "unix:"+dir+"/new")
	leaveStale(t, dir+"/stale")
	if _, err := tryOpen(1, false, "unix:"+dir+"/stale"); err == nil || !strings.Contains(err.Error(), "lock (flock(2)) on the directory") {
		t.Errorf("error %v", err)
	}
}

// TestGiven looks at what a worker finds.
func TestGiven(t *testing.T) {
	path := t.TempDir() + "/x"
	s := open(t, 1, false, "web=127.0.0.1:0", "udp://127.0.0.1:0", "un=unix:"+path)
	var given []*os.File
	for _, fd := range files(t, s, 1) {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(dup), "")
		defer f.Close()
		given = append(given, f)
	}
	addrs := s.addrs()
	all := addrs[0] + " " + path + "\n" + strings.TrimPrefix(addrs[1], "udp://") + "\n\n"
	for _, test := range []struct{ script, want string }{
		{`LISTEN_PID=$$ exec "$0"`, all},
		{`LISTEN_PID=$$ FILES=1 exec "$0"`, "web unknown un\n\n\n"},
		{`LISTEN_PID=1 exec "$0"`, "\n\nLISTEN_FDNAMES LISTEN_FDS LISTEN_PID\n"},
		{`LISTEN_PID=$$ LISTEN_FDS=4 exec "$0"`, "LISTEN_FDS=4, but descriptor 6 was not given\n"},
		{`LISTEN_PID=$$ LISTEN_FDS=x exec "$0"`, "LISTEN_FDS=x is not a number of descriptors\n"},
		{`unset LISTEN_FDNAMES; LISTEN_PID=$$ FILES=1 exec "$0"`, "unknown unknown unknown\n\n\n"},
	} {
		cmd := exec.Command("sh", "-c", test.script, "/proc/"+strconv.Itoa(os.Getpid())+"/exe")
		cmd.Env = append(os.Environ(), s.env()...)
		cmd.Env = append(cmd.Env, listenRole+"=given")
		cmd.ExtraFiles = given
		if out, _ := cmd.CombinedOutput(); string(out) != test.want {
			t.Errorf("%s: %q, want %q", test.script, out, test.want)
		}
	}
}

func givenRole() error {
	if os.Getenv("FILES") != "" {
		files, err := ListenFiles()
		if err != nil {
			return err
		}
		var names []string
		for _, f := range files {
			names = append(names, f.Name())
		}
		fmt.Println(strings.Join(names, " "))
	}
	listeners, err := Listeners()
	if err != nil {
		return err
	}
	var accept []string
	for _, l := range listeners {
		accept = append(accept, l.Addr().String())
	}
	conns, err := PacketConns()
	if err != nil {
		return err
	}
	var receive []string
	for _, c := range conns {
		receive = append(receive, c.LocalAddr().String())
	}
	var left []string
	for _, e := range os.Environ() {
		if name, _, _ := strings.Cut(e, "="); strings.HasPrefix(name, "LISTEN_") {
			left = append(left, name)
		}
	}
	slices.Sort(left)
	if os.Getenv("FILES") == "" {
		fmt.Println(strings.Join(accept, " "))
	} else if len(accept) > 0 {
		return errors.New("given twice")
	}
	fmt.Println(strings.Join(receive, " "))
	fmt.Println(strings.Join(left, " "))
	for fd := 3; fd < 6 && left == nil; fd++ {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			return fmt.Errorf("what this process starts has descriptor %d", fd)
		}
	}
	if more, err := ListenFiles(); len(more) > 0 || err != nil {
		return fmt.Errorf("%d more, %v", len(more), err)
	}
	return nil
}
