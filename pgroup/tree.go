package pgroup

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The tree is the calling process's descendants. It is a subreaper, so that
// every orphan among them becomes its child: the tree has no way out.

// walk calls visit for each descendant that is not a zombie, parents before
// their children. It passes over those of skip, and what is below them.
func walk(skip map[int]bool, visit func(process)) {
	self := unix.Getpid()
	queue := []process{{pid: self}}
	for len(queue) > 0 {
		parent := queue[0]
		queue = queue[1:]
		for _, pid := range children(parent.pid, parent.threads) {
			if skip[pid] {
				continue
			}
			p, err := stat(pid)
			if err != nil && parent.pid == self {
				// Hidden from us (hidepid in proc(5)), yet our child until we
				// reap it.
				p, err = process{pid: pid, ppid: self, state: '?', threads: 1}, nil
			}
			// The number may be another process's by now.
			if err != nil || p.ppid != parent.pid && p.ppid != self {
				continue
			}
			// A zombie with threads is one whose main thread alone has ended.
			if p.state != 'Z' && p.state != 'X' || p.threads > 1 {
				visit(p)
				queue = append(queue, p)
			}
		}
	}
}

// signal sends sig to p. A child's pid is its own until we reap it. Any other
// process may have ended and its number been given away since we looked: there
// a pidfd holds whatever has the number now, and a second look tells if that
// is still the descendant that we mean.
func (p process) signal(sig syscall.Signal) error {
	self := unix.Getpid()
	if p.ppid == self {
		return unix.Kill(p.pid, sig)
	}
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	now, err := stat(p.pid)
	if err != nil || now.ppid != p.ppid && now.ppid != self {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(fd, sig, nil, 0)
}

// canSweep reports what keeps this process from sweeping: no /proc, no pidfd, or
// no descriptor for them. Then it must not start anything.
func canSweep() error {
	fd, err := unix.PidfdOpen(unix.Getpid(), 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if procFD < 0 {
		procFD, err = unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
	}
	_, err = readFile("self/stat", nil)
	return err
}

// maxWalks bounds the looks for new processes. What multiplies has stopped doing
// so after a few; what forks and exits, each time as a new process, may go on.
const maxWalks = 64

// walkAll walks until a walk finds nothing new, and calls visit once for each
// process. One walk alone misses those whose parent ends meanwhile: they have
// left its list, and ours was read before. late tells that the parent was
// visited in an earlier walk.
func walkAll(skip map[int]bool, visit func(p process, late bool)) {
	seen := make(map[int]bool) // by earlier walks
	before := -1
	for range maxWalks {
		var fresh []int
		n := 0
		walk(skip, func(p process) {
			n++
			if !seen[p.pid] {
				fresh = append(fresh, p.pid)
				visit(p, seen[p.ppid])
			}
		})
		if len(fresh) == 0 && n == before {
			return
		}
		for _, pid := range fresh {
			seen[pid] = true
		}
		before = n
	}
}

// kill sends SIGKILL to every descendant. It returns how many took it, and how
// many refused (EPERM: a set-uid program is not ours to signal); each that took
// it is added to killed. It stops them all first: a tree that forks again for
// each process that it loses would outrun us otherwise.
func kill(killed map[int]bool) (took, refused int) {
	var found []process
	walkAll(nil, func(p process, _ bool) {
		found = append(found, p)
		p.signal(unix.SIGSTOP)
	})
	for _, p := range found {
		switch p.signal(unix.SIGKILL) {
		case nil:
			took++
			killed[p.pid] = true
		case unix.EPERM:
			refused++
		}
	}
	return took, refused
}

// sweepPause is how long sweep waits before it looks again when there was
// nothing to kill and nothing to reap, yet wait4 knows of a child: one that we
// may not signal, or that a debugger holds.
const sweepPause = 20 * time.Millisecond

// sweep kills every descendant and calls reaped for each child that it reaps,
// until there is none. It returns how many it killed. refused is called once if
// there are processes that we may not signal: sweep then waits for their end.
func sweep(reaped func(pid int, status syscall.WaitStatus), refused func(n int)) int {
	killed := make(map[int]bool)
	for told := false; ; {
		took, r := kill(killed)
		if r > 0 && !told {
			told = true
			refused(r)
		}
		// Where all that live were sent a SIGKILL, one of them is our child, or
		// has an ancestor that is and was sent one too: wait4 returns. It need
		// not while a process that refused lives on.
		options := 0
		if took == 0 || r > 0 {
			options = unix.WNOHANG
		}
		news := false
		for {
			pid, status, err := waitAny(options)
			if err != nil {
				return len(killed) // ECHILD: nothing is left
			}
			if pid == 0 {
				break
			}
			news = true
			reaped(pid, status)
			options = unix.WNOHANG
		}
		if !news {
			time.Sleep(sweepPause)
		}
	}
}
