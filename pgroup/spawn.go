package pgroup

import (
	"os"
	"slices"
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
	workerVar    = "PGROUP_WORKER"
	workersVar   = "PGROUP_WORKERS"
	pidVar       = "PGROUP_PID"
	leaderVar    = "PGROUP_LEADER" // its pid
	startVar     = "PGROUP_START"  // of all starts of the run; what a worker leaves behind is known by it
	listenFDsVar = "LISTEN_FDS"
	listenPIDVar = "LISTEN_PID"
	namesVar     = "LISTEN_FDNAMES"
	channelVar   = "NODE_CHANNEL_FD"
	formatVar    = "NODE_CHANNEL_SERIALIZATION_MODE"
	uniqueIDVar  = "NODE_UNIQUE_ID"
	readyFDVar   = "PGROUP_READY_FD"
)

// about are the variables that speak of descriptors which a worker does not
// inherit, whoever set them.
var about = []string{listenFDsVar, listenPIDVar, "LISTEN_PIDFDID", namesVar, channelVar, formatVar, uniqueIDVar, readyFDVar}

func hasVar(env []string, name string) bool {
	return slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
}

// unsetEnv returns env without the variables of these names.
func unsetEnv(env []string, names ...string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return slices.Contains(names, name)
	})
}

// workerEnv returns env as all workers of this launcher have it.
func workerEnv(env []string) []string {
	env = unsetEnv(env, about...)
	return setEnv(env, pidVar, strconv.Itoa(os.Getpid()))
}

// setEnv returns env with the variable name set to value.
func setEnv(env []string, name, value string) []string {
	return append(unsetEnv(env, name), name+"="+value)
}

// defaultPath is what execvp(3) searches where there is no PATH.
const defaultPath = "/bin:/usr/bin"

// lookPath finds the program as execvp(3) does: relative entries of PATH are
// searched too, and a file that can't be executed is the error only if no later
// directory has one that can. Those entries are relative to cwd, which is ours if
// it is empty.
func lookPath(name string, env []string, cwd string) (string, error) {
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
		at := file
		if cwd != "" && !strings.HasPrefix(file, "/") {
			at = cwd + "/" + file
		}
		switch err := executable(at); err {
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

// A provision is what the next start of a worker is given.
type provision struct {
	files map[int]int // number there → ours
	env   []string
	err   error
}

func (l *leader) provision(worker int) *provision {
	p := l.next[worker]
	if p == nil {
		p = &provision{files: make(map[int]int)}
		l.next[worker] = p
	}
	return p
}

func (p *provision) add(number, fd int) {
	if fd < 0 {
		p.err = unix.EMFILE
		return
	}
	p.files[number] = fd
}

func (p *provision) close() {
	for _, fd := range p.files {
		unix.Close(fd)
	}
}

// start starts the worker, at its place of so many, and reports it started or
// failed.
func (l *leader) start(worker, place, of int) {
	p := l.provision(worker)
	delete(l.next, worker)
	defer p.close()
	pid, err := 0, p.err
	if err == nil {
		pid, err = l.spawn(worker, place, of, p)
	}
	if err != nil {
		errno, _ := err.(syscall.Errno)
		l.report(msgFailed, worker, int64(errno), 0)
		l.reap()
		return
	}
	l.empty = false
	l.workers[worker] = pid
	l.groups[pid] = true
	if place == 1 {
		l.first = worker
	}
	l.report(msgStarted, worker, int64(pid), 0)
	l.watch.look()
}

func (l *leader) spawn(worker, place, of int, p *provision) (pid int, err error) {
	path, err := lookPath(l.args[0], l.env, l.dir)
	if err != nil {
		return 0, err
	}
	env := setEnv(l.env, workersVar, strconv.Itoa(of))
	env = setEnv(env, workerVar, strconv.Itoa(place))
	env = setEnv(env, startVar, strconv.Itoa(worker))
	for _, e := range p.env {
		name, value, set := strings.Cut(e, "=")
		if set {
			env = setEnv(env, name, value)
		} else {
			env = unsetEnv(env, name)
		}
	}
	attr := &syscall.ProcAttr{
		Dir:   l.dir,
		Env:   env,
		Files: p.table(),
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	}
	if l.flags&flagTTY != 0 && l.flags&flagForeground != 0 && l.term != nil && place == 1 {
		attr.Sys.Foreground = true
		attr.Sys.Ctty = l.term.fd
	}
	if hasVar(p.env, listenFDsVar) {
		return l.spawnStub(path, attr)
	}
	pid, err = syscall.ForkExec(path, l.args, attr)
	if err == unix.ENOEXEC { // a script without #!: execvp(3) again
		pid, err = syscall.ForkExec("/bin/sh", l.script(path), attr)
	}
	return pid, err
}

// table returns the worker's descriptors: our own standard streams, but for what
// it was given.
func (p *provision) table() []uintptr {
	files := []uintptr{0, 1, 2}
	for number, fd := range p.files {
		for len(files) <= number {
			files = append(files, ^uintptr(0)) // closed
		}
		files[number] = uintptr(fd)
	}
	return files
}

// script returns the arguments with which sh runs the file path.
func (c *command) script(path string) []string {
	return append([]string{"sh", path}, c.args[1:]...)
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
