package pgroup

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file opens the sockets that every worker is given by systemd's
// convention (sd_listen_fds(3)). The launcher keeps them while workers come and
// go: a connection that nobody has accepted yet waits in the socket's queue.
//
// They are left blocking, as systemd leaves them (NonBlocking= of
// systemd.service(5)). O_NONBLOCK is the socket's and not the descriptor's: one
// worker that sets it sets it for all, and what waits in accept(2) would be told
// EAGAIN. Servers with an event loop set it themselves (Go, Node, gunicorn, puma,
// asyncio, haproxy). The one that doesn't is nginx: of several that are woken
// for one connection, those that come late would wait in accept for the next. It
// wants SO_REUSEPORT.

// A Listen is a socket that every worker is given.
type Listen struct {
	Name    string // in LISTEN_FDNAMES; "" makes it "unknown"
	Network string // tcp or udp, with a 4 or 6 behind it for that version of IP alone, or unix
	Address string // HOST:PORT; a path; @ and an abstract name
}

// ParseListen reads `[NAME=]ADDR`, where ADDR is `[HOST]:PORT`,
// `NETWORK://[HOST]:PORT`, `unix:PATH` or `unix:@NAME`. Without HOST it is every
// address, of both versions of IP. Port 0 is one that is free.
func ParseListen(s string) (Listen, error) {
	l := Listen{Network: "tcp", Address: s}
	// No name has a colon, and every address has one.
	if name, addr, ok := strings.Cut(s, "="); ok && !strings.Contains(name, ":") {
		if name == "" {
			return Listen{}, fmt.Errorf("cannot listen on %q: no name before the =", s)
		}
		l.Name, l.Address = name, addr
	}
	if path, ok := strings.CutPrefix(l.Address, "unix:"); ok {
		l.Network, l.Address = "unix", path
	} else if network, addr, ok := strings.Cut(l.Address, "://"); ok {
		l.Network, l.Address = network, addr
	}
	if err := l.check(); err != nil {
		return Listen{}, fmt.Errorf("cannot listen on %q: %w", s, err)
	}
	return l, nil
}

// String returns the address as ParseListen reads it.
func (l Listen) String() string {
	switch l.Network {
	case "tcp":
		return l.Address
	case "unix":
		return "unix:" + l.Address
	}
	return l.Network + "://" + l.Address
}

// check says what can't be right, whatever the machine.
func (l Listen) check() error {
	// As systemd's fdname_is_valid has it.
	if len(l.Name) > 255 || strings.ContainsFunc(l.Name, func(r rune) bool { return r < ' ' || r > '~' || r == ':' }) {
		return errors.New("a name is at most 255 bytes of printable ASCII without a colon")
	}
	switch l.Network {
	case "unix":
		return checkPath(l.Address)
	case "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6":
	default:
		return errors.New("the network has to be tcp, tcp4, tcp6, udp, udp4, udp6 or unix")
	}
	host, port, err := net.SplitHostPort(l.Address)
	if err != nil {
		return errors.New("an address is :8000, 127.0.0.1:8000, [::1]:8000, udp://HOST:PORT or unix:PATH")
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return errors.New("the port has to be a number from 0 to 65535")
	}
	ip, err := netip.ParseAddr(host)
	switch {
	case err == nil && (strings.HasSuffix(l.Network, "4") && !ip.Is4() || strings.HasSuffix(l.Network, "6") && ip.Is4()):
		return fmt.Errorf("%s is not an address of %s", host, l.Network)
	case err != nil && strings.ContainsAny(host, "\x00\n /%:"):
		return fmt.Errorf("%q is neither an address nor the name of a host", host)
	}
	return nil
}

// maxPath is what sockaddr_un has room for, without the NUL (unix(7)).
const maxPath = 107

func checkPath(path string) error {
	switch {
	case path == "" || path == "@" || strings.HasSuffix(path, "/"):
		return errors.New("the path has no file name")
	case strings.HasPrefix(path, "//") && !strings.HasPrefix(path, "///"):
		return errors.New("the path is relative or absolute: write unix:run/x or unix:/run/x")
	case strings.ContainsRune(path, 0):
		return errors.New("a path has no NUL")
	case len(path) > maxPath:
		return fmt.Errorf("the path has %d bytes, and that of a socket has room for %d (unix(7))", len(path), maxPath)
	}
	return nil
}

// explain says what failed, on what, and what to do.
func (l Listen) explain(err error) error {
	var hint string
	var hinted hintedError
	var errno syscall.Errno
	var dns *net.DNSError
	switch {
	case errors.As(err, &hinted):
		err, hint = hinted.error, hinted.hint
	case errors.As(err, &dns):
		err, hint = dns, "give an address, or a name that /etc/hosts or DNS knows"
	case errors.As(err, &errno):
		err, hint = errno, l.hint(errno)
	}
	if hint != "" {
		hint = "; " + hint
	}
	return fmt.Errorf("cannot listen on %s: %w%s", l, err, hint)
}

// A hintedError is an error of which more is known than the errno.
type hintedError struct {
	error
	hint string
}

func (l Listen) hint(errno syscall.Errno) string {
	if l.Network == "unix" {
		switch errno {
		case unix.EADDRINUSE: // an abstract name
			return "ss -lxp shows by whom"
		case unix.ENOENT, unix.ENOTDIR:
			return fmt.Sprintf("create the directory %s first", filepath.Dir(l.Address))
		case unix.EACCES, unix.EPERM, unix.EROFS:
			return fmt.Sprintf("the directory %s has to be readable and writable", filepath.Dir(l.Address))
		}
		return ""
	}
	switch errno {
	case unix.EADDRINUSE:
		return "ss -lntup shows by whom"
	case unix.EADDRNOTAVAIL:
		return "no network interface has this address: ip address shows those that are there"
	case unix.EAFNOSUPPORT:
		return "this machine has no such version of IP"
	case unix.EACCES:
		_, port, _ := net.SplitHostPort(l.Address)
		n, _ := strconv.Atoi(port)
		if start := unprivilegedPort(); n < start {
			return fmt.Sprintf("ports below %d need root, CAP_NET_BIND_SERVICE or sysctl net.ipv4.ip_unprivileged_port_start", start)
		}
	}
	return ""
}

// unprivilegedPort returns the first port that needs no privilege: ip(7).
func unprivilegedPort() int {
	text, _ := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if n, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
		return n
	}
	return 1024
}

// sockets are all that the workers are given, in the order of the flags.
type sockets struct {
	list []*socket
}

// A socket is one Listen, opened: once for all workers, or once for each.
type socket struct {
	Listen               // the address is the one it got
	each    bool         // a worker has its own
	fds     map[int]int  // by worker; 0 where all have the same
	file    *socketFile  // of a unix socket with a path
	order   []int        // the workers, where each has its own, as the kernel lists their sockets
	retired map[int]bool // workers that get no new connections
}

// openSockets opens all sockets for as many workers, or none. With reuseport
// each worker has its own (SO_REUSEPORT, socket(7)): the kernel spreads what
// comes over them. A unix socket, which has nothing of that kind, is shared.
func openSockets(list []Listen, workers int, reuseport bool) (*sockets, error) {
	s := &sockets{}
	for _, l := range list {
		if err := l.check(); err != nil {
			return nil, fmt.Errorf("cannot listen on %s: %w", l, err)
		}
		s.list = append(s.list, &socket{Listen: l, each: reuseport && l.Network != "unix", fds: make(map[int]int), retired: make(map[int]bool)})
	}
	for n := range max(1, workers) {
		if _, err := s.files(n + 1); err != nil {
			s.close()
			return nil, err
		}
	}
	return s, nil
}

// files returns the descriptors for the worker, from 1. It opens what it has to:
// for a number that had none yet, all of its own. They stay the launcher's.
func (s *sockets) files(worker int) ([]int, error) {
	var fds []int
	for _, k := range s.list {
		n := 0
		if k.each {
			n = worker
		}
		fd, open := k.fds[n]
		if !open {
			var err error
			if fd, err = k.open(); err != nil {
				s.drop(worker)
				return nil, k.explain(err)
			}
			k.fds[n] = fd
			if k.each {
				k.order = append(k.order, n)
				k.steer()
			}
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// retire has no new connection come to the worker, which is to be stopped: those
// that its own socket has queued it can still accept. It has the rest of its life
// for that, and whatever is left in the queue at the end is reset by drop.
func (s *sockets) retire(worker int) {
	for _, k := range s.list {
		if _, own := k.fds[worker]; own && k.each {
			k.retired[worker] = true
			k.steer()
		}
	}
}

// drop closes what the worker alone had, once it has ended: there won't be one of
// that number. Connections that wait in the queue are reset, unless sysctl
// net.ipv4.tcp_migrate_req (5.14) has the kernel move them to another's.
func (s *sockets) drop(worker int) {
	for _, k := range s.list {
		fd, own := k.fds[worker]
		if !own || !k.each {
			continue
		}
		unix.Close(fd)
		delete(k.fds, worker)
		delete(k.retired, worker)
		// The kernel fills the gap with its last (reuseport_detach_sock).
		last := len(k.order) - 1
		k.order[slices.Index(k.order, worker)] = k.order[last]
		k.order = k.order[:last]
		k.steer()
	}
}

// steer has the kernel choose among the sockets of the workers that are not
// retired: at random, by a filter that needs no privilege
// (SO_ATTACH_REUSEPORT_CBPF in socket(7)). Without one it takes a hash of the
// addresses, and so it does where the filter is refused.
func (k *socket) steer() {
	if k.Network[:3] != "tcp" || len(k.order) == 0 {
		return // datagrams of one sender stay together
	}
	var open []int
	for i, worker := range k.order {
		if !k.retired[worker] {
			open = append(open, i)
		}
	}
	fd := k.fds[k.order[0]]
	if len(k.retired) == 0 || len(open) == 0 {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
		return
	}
	const random = 1<<32 - 0x1000 + 56 // SKF_AD_OFF + SKF_AD_RANDOM
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: random},
		{Code: unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K, K: uint32(len(open))},
	}
	for n, i := range open {
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(n), Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: uint32(i)})
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K})
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &prog)
}

// env is what the workers' environment says of the sockets, but for LISTEN_PID:
// that is each worker's own.
func (s *sockets) env() []string {
	if len(s.list) == 0 {
		return nil
	}
	var names []string
	for _, k := range s.list {
		name := k.Name
		if name == "" {
			name = "unknown" // what sd_listen_fds(3) calls those without one
		}
		names = append(names, name)
	}
	return []string{
		listenFDsVar + "=" + strconv.Itoa(len(names)),
		namesVar + "=" + strings.Join(names, ":"),
	}
}

// addrs returns the addresses that the sockets have, with the port in the place
// of 0, in the form that ParseListen reads.
func (s *sockets) addrs() []string {
	var addrs []string
	for _, k := range s.list {
		addrs = append(addrs, k.String())
	}
	return addrs
}

// close closes all sockets, and removes their files. Whoever has a descriptor
// goes on as before.
func (s *sockets) close() {
	for _, k := range s.list {
		if k.file != nil {
			// While the socket is open nobody takes its file for stale.
			k.file.remove()
		}
		for _, fd := range k.fds {
			unix.Close(fd)
		}
	}
	s.list = nil
}

// open opens the socket once more, on the address that it got the first time.
func (k *socket) open() (fd int, err error) {
	if k.Network == "unix" {
		return k.openUnix()
	}
	network := k.Network
	if host, _, err := net.SplitHostPort(k.Address); err == nil {
		if ip, err := netip.ParseAddr(host); err == nil && ip.Is4() {
			network = network[:3] + "4" // or package net takes 0.0.0.0 for ::
		}
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if k.each {
			c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		}
		return err
	}}
	lc.SetMultipathTCP(false) // the default since Go 1.24, and not what workers expect
	var opened interface {
		syscall.Conn
		Close() error
	}
	if network[:3] == "udp" {
		c, err := lc.ListenPacket(context.Background(), network, k.Address)
		if err != nil {
			return -1, err
		}
		opened, k.Address = c.(*net.UDPConn), c.LocalAddr().String()
	} else {
		c, err := lc.Listen(context.Background(), network, k.Address)
		if err != nil {
			return -1, err
		}
		opened, k.Address = c.(*net.TCPListener), c.Addr().String()
	}
	defer opened.Close()
	return keepFD(opened)
}

// keepFD returns a descriptor of c that outlives it, blocking.
func keepFD(c syscall.Conn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(p uintptr) {
		if fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 3); err == nil {
			err = unix.SetNonblock(fd, false)
		}
	})
	if cerr != nil {
		return -1, cerr
	}
	return fd, err
}

func (k *socket) openUnix() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if strings.HasPrefix(k.Address, "@") {
		if err = unix.Bind(fd, &unix.SockaddrUnix{Name: k.Address}); err == nil {
			err = unix.Listen(fd, maxBacklog)
		}
	} else if k.file, err = bindFile(fd, k.Address); err == nil {
		k.Address = k.file.path
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

const maxBacklog = math.MaxInt32 // the kernel makes it net.core.somaxconn

// A socketFile is the file of a socket that we bound.
type socketFile struct {
	path     string
	dir      int // the directory: we may be somewhere else by the time we remove it
	name     string
	dev, ino uint64
}

// bindFile binds fd to the path and listens. It takes over the file of a socket
// that nobody listens on any more.
//
// Whoever does so holds a lock on the directory meanwhile, which leaves nothing
// behind, and so does whoever creates one: between bind(2) and listen(2) it
// looks stale.
func bindFile(fd int, path string) (*socketFile, error) {
	f := &socketFile{path: path}
	// Absolute: for clients, and for workers that look at the socket's name
	// from some other directory.
	if abs, err := filepath.Abs(path); err == nil && len(abs) <= maxPath {
		f.path = abs
	}
	dir, name := filepath.Split(f.path)
	if dir == "" {
		dir = "."
	}
	f.name = name
	err := retry(func() (err error) {
		f.dir, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	locked := lock(f.dir)
	defer unix.Flock(f.dir, unix.LOCK_UN)
	bind := func() error { return unix.Bind(fd, &unix.SockaddrUnix{Name: f.path}) }
	err = bind()
	if err == unix.EADDRINUSE {
		if err = f.removeStale(locked); err == nil {
			err = bind()
		}
	}
	if err != nil {
		unix.Close(f.dir)
		return nil, err
	}
	st, err := f.stat()
	f.dev, f.ino = uint64(st.Dev), st.Ino
	if err == nil {
		err = unix.Listen(fd, maxBacklog)
	}
	if err != nil {
		f.remove()
		return nil, err
	}
	return f, nil
}

// lockTime is how long another may be at it. Anybody may lock a directory that
// he can read, and there are those who do for long (systemd-tmpfiles(8)).
const lockTime = time.Second

func lock(dir int) bool {
	for end := time.Now().Add(lockTime); ; time.Sleep(time.Millisecond) {
		if unix.Flock(dir, unix.LOCK_EX|unix.LOCK_NB) == nil {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}

func (f *socketFile) stat() (st unix.Stat_t, err error) {
	err = retry(func() error { return unix.Fstatat(f.dir, f.name, &st, unix.AT_SYMLINK_NOFOLLOW) })
	return st, err
}

// removeStale removes the file if it is a socket of ours that nobody listens on.
func (f *socketFile) removeStale(locked bool) error {
	inUse := func(hint string) error { return hintedError{unix.EADDRINUSE, hint} }
	st, err := f.stat()
	switch {
	case err == unix.ENOENT:
		return nil // by now
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return inUse("there is a file of this name, which is no socket")
	case !locked:
		return inUse("somebody holds a lock (flock(2)) on the directory, so it stays")
	}
	switch err := probe(f.path); err {
	case unix.ENOENT:
		return nil
	case unix.ECONNREFUSED:
	default:
		return inUse("ss -lxp shows by whom")
	}
	if int(st.Uid) != unix.Geteuid() {
		return inUse(fmt.Sprintf("nobody listens on it, but it belongs to user %d: remove it", st.Uid))
	}
	return unix.Unlinkat(f.dir, f.name, 0)
}

// probe connects to the socket: ECONNREFUSED means that nobody listens. A socket
// of another type says EPROTOTYPE, one with a full queue EAGAIN.
func probe(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return retry(func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: path}) })
}

// remove removes the file, unless another has taken its place.
func (f *socketFile) remove() {
	if st, err := f.stat(); err == nil && uint64(st.Dev) == f.dev && st.Ino == f.ino {
		unix.Unlinkat(f.dir, f.name, 0)
	}
	unix.Close(f.dir)
}
