package pgroup

import "golang.org/x/sys/unix"

// A terminal is the one that the run was started on, as it was then. See
// termios(3) and tcsetpgrp(3).
type terminal struct {
	fd    int
	saved unix.Termios
}

// openTerminal returns the terminal among the standard streams, or the
// controlling terminal if ctty is set; nil if there is none.
func openTerminal(ctty bool) *terminal {
	fd := -1
	if ctty {
		fd, _ = unix.Open("/dev/tty", unix.O_RDWR|unix.O_CLOEXEC, 0)
	}
	for std := 0; std < 3 && fd < 0; std++ {
		if _, err := unix.IoctlGetTermios(std, unix.TCGETS); err == nil {
			fd, _ = unix.FcntlInt(uintptr(std), unix.F_DUPFD_CLOEXEC, 3)
		}
	}
	if fd < 0 {
		return nil
	}
	t := &terminal{fd: fd}
	t.saved = t.settings()
	return t
}

// foregroundTerminal returns the terminal if the caller's group is in its
// foreground, else nil.
func foregroundTerminal(ctty bool) *terminal {
	t := openTerminal(ctty)
	if t != nil && !t.inForeground() {
		t.close()
		return nil
	}
	return t
}

func (t *terminal) close() { unix.Close(t.fd) }

func (t *terminal) inForeground() bool { return t.foreground() == unix.Getpgrp() }

func (t *terminal) settings() unix.Termios {
	s, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if err != nil {
		return t.saved
	}
	return *s
}

// restore gives the terminal the settings that it had at first.
func (t *terminal) restore() {
	if t.settings() != t.saved {
		uninterrupted(func() { unix.IoctlSetTermios(t.fd, unix.TCSETS, &t.saved) })
	}
}

// foreground returns the terminal's foreground group, 0 if it isn't the
// caller's controlling terminal.
func (t *terminal) foreground() int {
	pgid, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	if err != nil {
		return 0
	}
	return pgid
}

// setForeground makes pgid the terminal's foreground group.
func (t *terminal) setForeground(pgid int) {
	uninterrupted(func() { unix.IoctlSetPointerInt(t.fd, unix.TIOCSPGRP, pgid) })
}

// hasTerminal reports whether the process has a controlling terminal now.
func hasTerminal() bool {
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// jobControlled reports whether somebody could continue the calling process if
// it stopped: a shell in its session, whose job its group is. The kernel drops
// the TSTP, TTIN and TTOU of a group that has no such parent, which it calls
// orphaned (setpgid(2)).
func jobControlled() bool {
	session, _ := unix.Getsid(0)
	group := unix.Getpgrp()
	for pid := unix.Getppid(); pid > 0; {
		if s, err := unix.Getsid(pid); err != nil || s != session {
			return false
		}
		// A script without job control is in the group too: its parent then.
		p, err := stat(pid)
		if err != nil || p.pgid != group {
			return err == nil
		}
		pid = p.ppid
	}
	return false
}
