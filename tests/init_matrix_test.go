package tests

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	roles["census"] = censusRole
}

// censusRole is a worker that notes how many processes of tree live in directory
// dir when it starts, and whether anybody has the FIFO log there open for writing.
//
//	census TREE DIR
func censusRole(args []string) int {
	bin, dir := args[0], args[1]
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "census:", err)
		return 99
	}
	log, err := unix.Open(filepath.Join(dir, "log"), unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return fail(err)
	}
	_, err = unix.Read(log, make([]byte, 1)) // EAGAIN: there is a writer
	found := len(pidsWith(func(pid int) bool { return samePath(pid, "exe", bin) && samePath(pid, "cwd", dir) }))
	note := fmt.Sprintf("%d members, written by others: %t", found, err != nil)
	if err := os.WriteFile(filepath.Join(dir, "census"), []byte(note), 0o600); err != nil {
		return fail(err)
	}
	fd, err := strconv.Atoi(os.Getenv("PGROUP_READY_FD"))
	if err != nil {
		return fail(err)
	}
	if _, err := unix.Write(fd, []byte("\n")); err != nil {
		return fail(err)
	}
	select {}
}

// A serviceCell is a detached launcher with one tree.
type serviceCell struct {
	*service
	*cell
	lock *os.File // the pid file, whose name may be gone
}

// startServiceCell starts a tree by pgroup start. What it writes goes to a FIFO,
// whose end of file tells that nobody has it open.
func startServiceCell(t *testing.T, k kind) serviceCell {
	t.Helper()
	s := newService(t)
	c := &cell{t: t, dir: s.dir, up: make(chan struct{}), eof: make(chan struct{}), ended: make(chan struct{})}
	close(c.ended) // it is no child of ours: await looks for it
	log := filepath.Join(s.dir, "log")
	if err := unix.Mkfifo(log, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := os.OpenFile(log, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	in, err := os.OpenFile(log, os.O_WRONLY, 0) // or there is an end of file already
	if err != nil {
		t.Fatal(err)
	}
	go c.read(out, k.ready)
	t.Cleanup(c.destroy)
	grace := "300ms"
	if k.name == "left-overs" {
		grace = "1s" // it has begun: time for the end to strike
	}
	args := append([]string{"--log", log, "--grace", grace}, k.flags...)
	s.want(0, "start", append(append(args, "--"), k.argv(t)...)...)
	process, err := os.FindProcess(s.launcher())
	if err != nil {
		t.Fatal(err)
	}
	c.cmd = &exec.Cmd{Process: process}
	lock, err := os.Open(s.pidfile)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lock.Close() })
	in.Close()
	c.awaitUp()
	if n := len(c.members()); n != k.members && !k.loose {
		t.Errorf("%d members, want %d", n, k.members)
	}
	return serviceCell{s, c, lock}
}

// wantGone wants nothing of the tree to live, nor of the launcher: when the lock is
// free, and not a moment later.
func (c serviceCell) wantGone() {
	c.cell.t.Helper()
	eventually(c.cell.t, "the lock is free", func() bool { return isFree(c.cell.t, c.lock) })
	if left := append(c.launchers(), c.members()...); len(left) > 0 {
		c.cell.t.Errorf("the lock is free, and these live:\n%s", c.report())
	}
	if survivors, hangs := c.await(10 * time.Second); survivors != 0 || hangs {
		c.cell.t.Errorf("%d of the tree survive, pgroup hangs: %t\n%s", survivors, hangs, c.report())
	}
}

// isFree reports whether nobody holds the lock of a pid file.
func isFree(t *testing.T, f *os.File) bool {
	t.Helper()
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		t.Fatal(err)
	}
	return lock.Type == unix.F_UNLCK
}

// wantFree wants nobody to hold the lock of the pid file.
func (s *service) wantFree() {
	s.t.Helper()
	f, err := os.Open(s.pidfile)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if !isFree(s.t, f) {
		s.t.Errorf("%s is locked", s.pidfile)
	}
}

// wantStarts wants the service to start, and to stop.
func (s *service) wantStarts() {
	s.t.Helper()
	s.want(0, "start", "-g0", "--", "sleep", "1000")
	if st := s.status(0); st.State != "ready" || st.PID != s.launcher() {
		s.t.Errorf("started again: %+v", st)
	}
	s.want(0, "stop")
	s.nothingLeft()
	s.noFiles()
}

// serviceEnds are those of the matrix that a service can come to.
var serviceEnds = []string{"TERM", "INT", "HUP", "QUIT", "KILL-launcher", "KILL-leader"}

// TestServiceOrphanMatrix is TestOrphanMatrix for a tree that pgroup start has
// started. INT, HUP and QUIT, which differ in nothing but their number, take turns
// over the kinds; with -whole each kind has all.
func TestServiceOrphanMatrix(t *testing.T) {
	if !inPidNamespace(t, 4) {
		usedRole(t, "census")
		return
	}
	tree(t)
	turn := []string{"INT", "HUP", "QUIT"}
	t.Run("cells", func(t *testing.T) {
		for i, k := range kinds {
			t.Run(k.name+"/stop", func(t *testing.T) {
				t.Parallel()
				c := startServiceCell(t, k)
				c.want(0, "stop")
				// When it returns nothing lives, not a moment later.
				if left := append(c.launchers(), c.members()...); len(left) > 0 {
					t.Errorf("stop has returned\n%s", c.report())
				}
				c.wantGone()
				c.wantGrace(k, graceOfAll(launcher{}))
				c.wantEnded(3)
			})
			t.Run(k.name+"/restart", func(t *testing.T) {
				t.Parallel()
				c := startServiceCell(t, k)
				cmd := c.command("restart", "--ready", "fd", "--", testExe, tree(t), c.service.dir)
				cmd.Env = append(cmd.Env, usedRole(t, "census"))
				if status, _, stderr := c.finish(cmd); status != 0 {
					t.Errorf("restart: status %d: %s", status, stderr)
				}
				note, err := os.ReadFile(filepath.Join(c.service.dir, "census"))
				if string(note) != "0 members, written by others: false" {
					t.Errorf("when the new worker starts: %s (%v)\n%s", note, err, c.report())
				}
				c.wantGrace(k, graceOfAll(launcher{}))
				c.want(0, "status")
				c.want(0, "stop")
				c.wantGone()
				c.wantEnded(3)
			})
			for _, name := range serviceEnds {
				e := ends[slices.IndexFunc(ends, func(e end) bool { return e.name == name })]
				if slices.Contains(k.not, name) || !*wholeFlag && slices.Contains(turn, name) && name != turn[i%len(turn)] {
					continue
				}
				t.Run(k.name+"/"+name, func(t *testing.T) {
					t.Parallel()
					c := startServiceCell(t, k)
					e.strike(c.cell)
					c.wantGone()
					c.wantGrace(k, e.grace(launcher{}))
					if name == "KILL-launcher" {
						c.wantEnded(1)
					} else {
						c.wantEnded(3)
					}
				})
			}
		}
	})
	noneLeft(t)
}

// wantGrace wants that many of the tree "graceful" to have ended by themselves.
func (c serviceCell) wantGrace(k kind, n int) {
	c.cell.t.Helper()
	if k.name != "graceful" {
		return
	}
	if cleaned, _ := filepath.Glob(filepath.Join(c.cell.dir, "cleaned-*")); len(cleaned) < n {
		c.cell.t.Errorf("%d of the tree had their grace, want %d", len(cleaned), n)
	}
}

// wantEnded is for when nothing lives: the lock is free, status says so, and the
// service starts.
func (c serviceCell) wantEnded(status int) {
	c.cell.t.Helper()
	c.wantFree()
	c.want(status, "status")
	if status == 3 {
		c.noFiles()
	}
	c.wantStarts()
}
