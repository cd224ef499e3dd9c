package pgroup

import (
	"bytes"
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// A process is what /proc says of one.
type process struct {
	pid     int
	ppid    int
	pgid    int
	tpgid   int // the foreground group of its controlling terminal
	threads int
	started int  // ticks after the boot, see bootTicks
	state   byte // as in proc_pid_stat(5): Z is a zombie, T stopped
}

var errProcStat = errors.New("malformed /proc/PID/stat")

// parseStat reads the text of /proc/PID/stat. The name in parentheses may hold
// anything, parentheses and spaces included: the last ")" ends it.
func parseStat(text []byte) (p process, err error) {
	open, end := bytes.IndexByte(text, '('), bytes.LastIndexByte(text, ')')
	if open < 1 || end < open {
		return p, errProcStat
	}
	f := bytes.Fields(text[end+1:])
	if len(f) < 20 || len(f[0]) != 1 {
		return p, errProcStat
	}
	p.state = f[0][0]
	for _, n := range []struct {
		text []byte
		to   *int
	}{
		{text[:open-1], &p.pid}, {f[1], &p.ppid}, {f[2], &p.pgid}, {f[5], &p.tpgid}, {f[17], &p.threads}, {f[19], &p.started},
	} {
		if *n.to, err = strconv.Atoi(string(n.text)); err != nil {
			return p, errProcStat
		}
	}
	return p, nil
}

// stat reads what the kernel says of pid now.
func stat(pid int) (process, error) {
	var buf [512]byte
	text, err := readFile(strconv.Itoa(pid)+"/stat", buf[:0])
	if err != nil {
		return process{}, err
	}
	return parseStat(text)
}

// children returns the pids of the children of pid. The kernel lists them by
// the thread that forked or adopted them, and promises the whole list only
// while they stand still: callers look again.
func children(pid, threads int) []int {
	dir := strconv.Itoa(pid) + "/task/"
	if threads == 1 {
		return readChildren(nil, dir+strconv.Itoa(pid)+"/children")
	}
	fd, err := openProc(dir)
	if err != nil {
		return nil // it has ended
	}
	file := os.NewFile(uintptr(fd), dir)
	defer file.Close()
	tasks, _ := file.ReadDir(-1)
	var pids []int
	for _, task := range tasks {
		pids = readChildren(pids, dir+task.Name()+"/children")
	}
	return pids
}

func readChildren(pids []int, name string) []int {
	var buf [1024]byte
	text, err := readFile(name, buf[:0])
	if err != nil {
		return pids
	}
	return parseChildren(pids, text)
}

// parseChildren appends the pids in the text of /proc/PID/task/TID/children.
func parseChildren(pids []int, text []byte) []int {
	for _, f := range bytes.Fields(text) {
		if pid, err := strconv.Atoi(string(f)); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// procFD is /proc, as it was when we began: a command may mount something over
// it. Before that it is -1.
var procFD = -1

// openProc opens a file below /proc.
func openProc(name string) (fd int, err error) {
	dir := procFD
	if dir < 0 {
		dir, name = unix.AT_FDCWD, "/proc/"+name
	}
	err = retry(func() (err error) {
		fd, err = unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// readFile appends the content of a file below /proc to buf. os.ReadFile costs
// three more system calls, and a sweep reads two files for each descendant.
func readFile(name string, buf []byte) ([]byte, error) {
	fd, err := openProc(name)
	if err != nil {
		return buf, err
	}
	defer unix.Close(fd)
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		var n int
		err := retry(func() (err error) {
			n, err = unix.Read(fd, buf[len(buf):cap(buf)])
			return err
		})
		if err != nil || n == 0 {
			return buf, err
		}
		buf = buf[:len(buf)+n]
	}
}
