package pgroup

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// This file is for the worker: it finds the sockets that it was given by the
// convention of sd_listen_fds(3), by pgroup, systemd or anybody else.

// handed are the sockets that nobody has taken yet.
var handed struct {
	sync.Mutex
	read  bool
	files []*os.File
	err   error
}

// ListenFiles returns the sockets that this process was given, in order, each
// under its name. They are the caller's from now on: none is returned twice, not
// by Listeners or PacketConns either. There are none if LISTEN_PID is another
// process. The variables are removed from the environment.
func ListenFiles() ([]*os.File, error) {
	return takeHanded(func(*os.File) bool { return true })
}

// Listeners returns those of ListenFiles that are to accept connections.
func Listeners() ([]net.Listener, error) {
	return convertHanded(func(f *os.File) bool { return sockopt(f, unix.SO_ACCEPTCONN) == 1 }, net.FileListener)
}

// PacketConns returns those of ListenFiles that receive datagrams.
func PacketConns() ([]net.PacketConn, error) {
	return convertHanded(func(f *os.File) bool { return sockopt(f, unix.SO_TYPE) == unix.SOCK_DGRAM }, net.FilePacketConn)
}

// takeHanded takes those that are wanted.
func takeHanded(wanted func(*os.File) bool) (taken []*os.File, err error) {
	handed.Lock()
	defer handed.Unlock()
	if !handed.read {
		handed.read = true
		handed.files, handed.err = readHanded(firstListenFD)
	}
	var left []*os.File
	for _, f := range handed.files {
		if wanted(f) {
			taken = append(taken, f)
		} else {
			left = append(left, f)
		}
	}
	handed.files = left
	return taken, handed.err
}

// readHanded reads the environment. The first descriptor is 3: sd_listen_fds(3).
func readHanded(first int) ([]*os.File, error) {
	pid, fds, list := os.Getenv(listenPIDVar), os.Getenv(listenFDsVar), os.Getenv(namesVar)
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil // not for us, but for whom we have it from
	}
	for _, name := range []string{listenPIDVar, listenFDsVar, namesVar} {
		os.Unsetenv(name)
	}
	n, err := strconv.ParseUint(fds, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("%s=%s is not a number of descriptors", listenFDsVar, fds)
	}
	var names []string
	if list != "" {
		names = strings.Split(list, ":")
	}
	var files []*os.File
	for i := range int(n) {
		fd, name := first+i, "unknown"
		if i < len(names) {
			name = names[i]
		}
		// What is closed on exec did not come by one: it is the Go runtime's.
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			return nil, fmt.Errorf("%s=%s, but descriptor %d was not given", listenFDsVar, fds, fd)
		}
		unix.CloseOnExec(fd)
		files = append(files, os.NewFile(uintptr(fd), name))
	}
	return files, nil
}

func sockopt(f *os.File, option int) (value int) {
	c, err := f.SyscallConn()
	if err != nil {
		return -1
	}
	value = -1
	c.Control(func(fd uintptr) {
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, option); err == nil {
			value = n
		}
	})
	return value
}

// convertHanded takes those that are wanted as what package net has for them.
func convertHanded[T interface{ Close() error }](wanted func(*os.File) bool, convert func(*os.File) (T, error)) ([]T, error) {
	files, err := takeHanded(wanted)
	if err != nil {
		return nil, err
	}
	var all []T
	for _, f := range files {
		one, cerr := convert(f) // a descriptor of its own
		if f.Close(); cerr != nil {
			err = fmt.Errorf("cannot use descriptor %s that was given: %w", f.Name(), cerr)
			continue
		}
		all = append(all, one)
	}
	if err != nil {
		for _, one := range all {
			one.Close()
		}
		return nil, err
	}
	return all, nil
}
