package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func openSink(t *testing.T, path string) *sink {
	t.Helper()
	fd, err := openEvents(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return newSink(fd)
}

func TestSinkLost(t *testing.T) {
	s := openSink(t, "/dev/full")
	s.write([]byte("one\n"), false)
	s.write([]byte("two\n"), false)
	if err := s.close(); err == nil || err.Error() != "2 events were lost: cannot write: no space left on device" {
		t.Errorf("/dev/full: %v", err)
	}

	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.Close()
	s = newSink(int(w.Fd()))
	s.write([]byte("one\n"), false)
	if err := s.close(); err == nil || err.Error() != "1 event was lost: cannot write: broken pipe" {
		t.Errorf("a reader that has gone: %v", err)
	}

	file, err := os.Create(filepath.Join(t.TempDir(), "events"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, test := range []struct {
		file *os.File
		why  string
	}{{file, "3 events were lost: the file of"}, {w, "3 events were lost: the reader of"}} {
		s = newSink(int(test.file.Fd()))
		s.lost = 3
		if err := s.close(); err == nil || !strings.HasPrefix(err.Error(), test.why) {
			t.Errorf("%v, want %q", err, test.why)
		}
	}
}

// TestSinkFullDisk writes to a disk that fills in the middle of a line, and then
// has room again.
func TestSinkFullDisk(t *testing.T) {
	const inside = "PGROUP_TEST_INSIDE"
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestSinkFullDisk$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		if os.Getuid() != 0 {
			cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
		}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestSinkFullDisk") {
			t.Fatalf("inside: %v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path, full := filepath.Join(dir, "events"), filepath.Join(dir, "full")
	if err := os.WriteFile(full, make([]byte, 8<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	line := func(n int) []byte {
		text, _ := json.Marshal(map[string]any{"line": n, "text": strings.Repeat("x", 900)})
		return append(text, '\n')
	}
	s := openSink(t, path)
	const n = 12 // of which 8 fit, and a part of another
	for i := range n {
		s.write(line(i), false)
	}
	written := func() []byte {
		text, _ := os.ReadFile(path)
		return text
	}
	await := func(what string, f func() bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %d bytes", what, len(written()))
			}
		}
	}
	await("never full", func() bool { return len(written()) == 8<<10 })
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	await("not read", func() bool { return len(s.queue) == 0 })
	s.write(line(n), false)
	err := s.close()
	var whole, torn int
	for text := range bytes.Lines(written()) {
		if json.Valid(text) {
			whole++
		} else {
			torn++
		}
	}
	// How many were lost depends on when there was room again.
	if torn != 1 || whole < 9 || !bytes.HasSuffix(written(), line(n)) {
		t.Errorf("%d whole lines and %d torn ones", whole, torn)
	}
	if err == nil || s.unsaid != n+1-whole || !strings.HasSuffix(err.Error(), "lost: cannot write: no space left on device") {
		t.Errorf("%d lost, %d there: %v", s.unsaid, whole, err)
	}
}
