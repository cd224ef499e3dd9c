package main

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"pgroup/pgroup"
	"pgroup/pidfile"
)

// A service is what a launcher has that was given a pid file.
type service struct {
	file    *pidfile.File
	lock    *os.File // of file, until this process has ended
	control *control
}

// openService makes the pid file and the control socket, or takes over stale
// ones.
func openService(path string) (s *service, err error) {
	s = new(service)
	if s.file, err = pidfile.Create(path); err != nil {
		return nil, err
	}
	fd, err := unix.FcntlInt(s.file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err == nil {
		s.lock = os.NewFile(uintptr(fd), path)
		if s.control, err = listenControl(path); err == nil {
			return s, nil
		}
		s.lock.Close()
	}
	s.file.Remove()
	return nil, err
}

func (s *service) close() error {
	s.control.close()
	return s.file.Remove()
}

// removeStale removes the pid file and the socket of a launcher that was killed,
// unless another launcher has taken them over.
func removeStale(path string) error {
	file, err := pidfile.Create(path)
	var held *pidfile.HeldError
	if errors.As(err, &held) {
		return nil
	}
	if err != nil {
		return err
	}
	socket := socketPath(path)
	if dir, err := openDir(socket); err == nil {
		c := control{dir: dir, name: filepath.Base(socket)}
		c.removeStale()
		dir.Close()
	}
	return file.Remove()
}

// tellManager tells the service manager, if one waits for it (Type=notify in
// systemd.service(5)), when all workers are ready.
func tellManager(run *pgroup.Run) {
	select {
	case <-run.Ready():
		pgroup.Notify("READY=1")
	case <-run.Done():
	}
}
