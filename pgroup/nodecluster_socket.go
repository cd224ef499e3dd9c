package pgroup

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A nodeSocket is one that workers listen on, or receive datagrams from.
type nodeSocket struct {
	key    string
	quoted string // the key, as JSON
	kind   string // what Node calls a handle of its kind
	fd     int
	path   string // of a Unix socket that we bound
	name   string // its name, as JSON, where it has one
	data   json.RawMessage
	users  map[*nodeWorker]bool
	closed bool

	// Round robin alone: see startAccepting.
	file        *os.File // of fd, polled
	raw         syscall.RawConn
	free        []*nodeWorker
	connections []int         // that wait for a free worker
	wake        chan struct{} // has a token when a worker may be free
}

func (s *nodeSocket) accepting() bool { return s.file != nil }

// A nodeQuery is the part of a message that says which socket is meant.
type nodeQuery struct {
	Address     *string
	Port        jsInt
	AddressType json.RawMessage // 4, 6, -1 for a Unix socket, "udp4", "udp6"
	FD          *jsInt
	Index       jsInt // which of the worker's servers on this address
	Flags       jsInt
	Backlog     jsInt
	ReadableAll bool
	WritableAll bool
}

// A jsInt is what JavaScript's n|0 makes of a number or a string.
type jsInt int

func (n *jsInt) UnmarshalJSON(b []byte) error {
	f, err := strconv.ParseFloat(strings.Trim(string(b), `"`), 64)
	if err != nil || math.Abs(f) > math.MaxInt32 {
		f = 0
	}
	*n = jsInt(f)
	return nil
}

// What Flags are: UV_TCP_ and UV_UDP_ of libuv's uv.h.
const (
	flagIPv6Only  = 1
	flagReuseAddr = 4 // udp alone
)

// key is the same for all that share a socket.
func (q nodeQuery) key() string {
	address, fd := "null", "undefined"
	if q.Address != nil {
		address = *q.Address
	}
	if q.FD != nil {
		fd = strconv.Itoa(int(*q.FD))
	}
	return fmt.Sprintf("%s:%d:%s:%s:%d", address, q.Port, q.addressType(), fd, q.Index)
}

func (q nodeQuery) addressType() string { return strings.Trim(string(q.AddressType), `"`) }

func (q nodeQuery) udp() bool {
	t := q.addressType()
	return t == "udp4" || t == "udp6"
}

// open opens a socket. Its errors are errnos: the worker's server emits them.
func (p *primary) open(key string, q nodeQuery) (s *nodeSocket, err error) {
	switch {
	case p.closed || len(p.sockets) >= maxNodeSockets:
		return nil, unix.EMFILE
	case len(key) > maxNodeKey:
		return nil, unix.ENAMETOOLONG
	}
	s = &nodeSocket{key: key, quoted: quote(key), kind: "net.Native", users: make(map[*nodeWorker]bool)}
	if q.udp() {
		s.kind = "dgram.Native"
	}
	accepts := p.roundRobin && !q.udp()
	switch {
	case q.FD != nil && *q.FD >= 0:
		s.fd, err = p.copyGiven(int(*q.FD))
	case q.Port >= 0:
		s.fd, err = q.openIP()
	default:
		s.fd, err = q.openUnix()
		if err == nil {
			s.path = *q.Address
		}
	}
	if err != nil {
		return nil, err
	}
	// Node takes for granted that what it gets does not block.
	unix.SetNonblock(s.fd, true)
	if accepts {
		s.name = sockname(s.fd)
		if err = unix.Listen(s.fd, q.backlog()); err == nil {
			err = p.startAccepting(s)
		}
		if err != nil {
			s.close()
			return nil, err
		}
	}
	return s, nil
}

// backlog is what Node makes of none.
func (q nodeQuery) backlog() int {
	if q.Backlog <= 0 {
		return 511
	}
	return int(q.Backlog)
}

func (p *primary) copyGiven(n int) (fd int, err error) {
	fd, ok := p.given[n]
	if !ok {
		return -1, unix.EBADF
	}
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
}

// openIP opens a TCP or UDP socket. No address is every one, of both versions of
// IP if there are both.
func (q nodeQuery) openIP() (fd int, err error) {
	if q.Port > 65535 {
		return -1, unix.EINVAL
	}
	if q.Address != nil && *q.Address != "" {
		addr, err := netip.ParseAddr(*q.Address)
		if err != nil {
			return -1, unix.EINVAL
		}
		return q.bind(addr)
	}
	fd, err = q.bind(netip.IPv6Unspecified())
	if err == unix.EAFNOSUPPORT || err == unix.EADDRNOTAVAIL {
		return q.bind(netip.IPv4Unspecified())
	}
	return fd, err
}

func (q nodeQuery) bind(addr netip.Addr) (fd int, err error) {
	var name unix.Sockaddr = &unix.SockaddrInet4{Port: int(q.Port)}
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	if addr.Is4() {
		name.(*unix.SockaddrInet4).Addr = addr.As4()
	} else {
		family = unix.AF_INET6
		name = &unix.SockaddrInet6{Port: int(q.Port), Addr: addr.As16(), ZoneId: zone(addr.Zone())}
	}
	if q.udp() {
		kind = unix.SOCK_DGRAM
	}
	fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if !q.udp() || q.Flags&flagReuseAddr != 0 {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if family == unix.AF_INET6 {
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, int(q.Flags&flagIPv6Only))
	}
	if err := unix.Bind(fd, name); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// zone returns the number of the interface in fe80::1%eth0.
func zone(name string) uint32 {
	if i, err := net.InterfaceByName(name); err == nil {
		return uint32(i.Index)
	}
	n, _ := strconv.ParseUint(name, 10, 32)
	return uint32(n)
}

// openUnix opens a socket with a path. As in Node, what is there already is in
// the way even if nobody listens on it.
func (q nodeQuery) openUnix() (fd int, err error) {
	if q.Address == nil || !filepath.IsAbs(*q.Address) || strings.ContainsRune(*q.Address, 0) {
		return -1, unix.EINVAL // Node's workers send nothing else
	}
	path := *q.Address
	if len(path) > maxPath {
		// Node's primary would try a relative path. We are somewhere else, and go
		// by the directory's descriptor.
		dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, err
		}
		defer unix.Close(dir)
		path = fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path))
		if len(path) > maxPath {
			return -1, unix.ENAMETOOLONG
		}
	}
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	var more uint32
	if q.ReadableAll {
		more |= 0o444
	}
	if q.WritableAll {
		more |= 0o222
	}
	var st unix.Stat_t
	if more != 0 && unix.Stat(path, &st) == nil {
		unix.Chmod(path, st.Mode&0o777|more)
	}
	return fd, nil
}

// sockname returns the name of an IP socket as Node has it, "" for any other.
func sockname(fd int) string {
	name, _ := unix.Getsockname(fd)
	var addr netip.Addr
	family, port := "IPv4", 0
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		addr, port = netip.AddrFrom4(name.Addr), name.Port
	case *unix.SockaddrInet6:
		addr, port, family = netip.AddrFrom16(name.Addr), name.Port, "IPv6"
		if i, err := net.InterfaceByIndex(int(name.ZoneId)); err == nil {
			addr = addr.WithZone(i.Name)
		}
	default:
		return ""
	}
	return fmt.Sprintf(`{"address":%q,"family":%q,"port":%d}`, addr, family, port)
}

// close closes the socket and the connections that wait for a worker, and
// removes its path, as Node's primary does.
func (s *nodeSocket) close() {
	s.closed = true
	if s.accepting() {
		close(s.wake)
		s.file.Close()
	} else {
		unix.Close(s.fd)
	}
	for _, fd := range s.connections {
		unix.Close(fd)
	}
	s.connections, s.free = nil, nil
	if s.path != "" {
		unix.Unlink(s.path)
	}
}
