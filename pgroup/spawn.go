package pgroup

import (
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A command is what a worker runs.
type command struct {
	args   []string
	env    []string
	dir    string       // where to start it once we have left that directory
	groups map[int]bool // of all workers ever started
}

// What a worker finds in its environment.
const (
	workerVar  = "PGROUP_WORKER"
	workersVar = "PGROUP_WORKERS"
	pidVar     = "PGROUP_PID"
)

// setEnv returns env with the variable name set to value.
func setEnv(env []string, name, value string) []string {
	var set []string
	for _, e := range env {
		if !strings.HasPrefix(e, name+"=") {
			set = append(set, e)
		}
	}
	return append(set, name+"="+value)
}

// defaultPath is what execvp(3) searches where there is no PATH.
const defaultPath = "/bin:/usr/bin"

// lookPath finds the program as execvp(3) does: relative entries of PATH are
// searched too, and a file that can't be executed is the error only if no later
// directory has one that can.
func lookPath(name string, env []string) (string, error) {
	if name == "" {
		return "", unix.ENOENT
	}
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := defaultPath
	for _, e := range env {
		if value, ok := strings.CutPrefix(e, "PATH="); ok {
			path = value
		}
	}
	found := error(unix.ENOENT)
	for _, dir := range strings.Split(path, ":") {
		if dir == "" {
			dir = "."
		}
		file := dir + "/" + name
		switch err := executable(file); err {
		case nil:
			return file, nil
		case unix.EACCES:
			found = err
		}
	}
	return "", found
}

// executable returns EACCES for what is there but can't be executed.
func executable(file string) error {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.EACCES
	}
	return unix.Faccessat(unix.AT_FDCWD, file, unix.X_OK, unix.AT_EACCESS)
}

// start starts worker n and reports it started or failed.
func (l *leader) start(n int) {
	pid, err := l.spawn(n)
	if err != nil {
		errno, _ := err.(syscall.Errno)
		l.report(msgFailed, n, int64(errno), 0)
		l.reap()
		return
	}
	l.empty = false
	l.workers[n] = pid
	l.groups[pid] = true
	l.report(msgStarted, n, int64(pid), 0)
	l.watch.look()
}

func (l *leader) spawn(n int) (pid int, err error) {
	path, err := lookPath(l.args[0], l.env)
	if err != nil {
		return 0, err
	}
	attr := &syscall.ProcAttr{
		Dir:   l.dir,
		Env:   setEnv(l.env, workerVar, strconv.Itoa(n)),
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	}
	if l.flags&flagTTY != 0 && l.flags&flagForeground != 0 && l.term != nil {
		attr.Sys.Foreground = true
		attr.Sys.Ctty = l.term.fd
	}
	pid, err = syscall.ForkExec(path, l.args, attr)
	if err == unix.ENOEXEC { // a script without #!: execvp(3) again
		pid, err = syscall.ForkExec("/bin/sh", append([]string{"sh", path}, l.args[1:]...), attr)
	}
	return pid, err
}

// leaveDir moves to /, so that the leader pins no file system. The workers
// started before inherited the directory, whatever became of its name.
func (l *leader) leaveDir() {
	if l.dir == "" {
		l.dir, _ = unix.Getwd()
		os.Chdir("/")
	}
}

// mountProc gives the leader of a new pid namespace a /proc that fits it. See
// pid_namespaces(7).
func mountProc() error {
	// Where mounts are shared, ours would show outside.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}
