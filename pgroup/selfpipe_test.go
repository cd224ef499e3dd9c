package pgroup

import (
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What is sent to the process comes from the pipe, once for each time and with
// its sender; what the runtime needs still reaches the runtime.
func TestSelfPipe(t *testing.T) {
	const rt = syscall.Signal(rtMin + 3)
	fd, err := newSelfPipe(1<<(unix.SIGUSR1-1) | 1<<(rt-1) | 1<<(unix.SIGURG-1) | 1<<(unix.SIGSEGV-1))
	if err != nil {
		t.Fatal(err)
	}
	read := func() []Signal {
		t.Helper()
		if err := poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, time.Now().Add(10*time.Second)); err != nil {
			t.Fatal(err)
		}
		var buf [128 * 24]byte
		n, err := unix.Read(fd, buf[:])
		if err != nil {
			t.Fatalf("nothing came: %v", err)
		}
		return readSelfPipe(buf[:n])
	}
	for _, sig := range []syscall.Signal{unix.SIGUSR1, rt, unix.SIGURG, unix.SIGSEGV} {
		unix.Kill(os.Getpid(), sig)
		if got := read(); len(got) != 1 || got[0] != (Signal{sig, os.Getpid()}) {
			t.Errorf("%v came as %v", sig, got)
		}
	}

	const burst = 100
	for range burst {
		unix.Kill(os.Getpid(), rt)
	}
	n := 0
	for n < burst {
		n += len(read())
	}
	if n > burst {
		t.Errorf("%d signals came of %d", n, burst)
	}

	// A fault of our own is a panic as ever.
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		var p *int
		*p = 1
	}()

	// The runtime's SIGURG stops a loop that has no other point to stop at, and
	// doesn't come to us.
	done := make(chan bool)
	var stop atomic.Bool
	go func() {
		for !stop.Load() {
		}
		close(done)
	}()
	for range 20 {
		runtime.GC()
	}
	stop.Store(true)
	<-done
	var buf [24]byte
	if n, err := unix.Read(fd, buf[:]); err != unix.EAGAIN {
		t.Errorf("the pipe has %v, %v", readSelfPipe(buf[:max(n, 0)]), err)
	}
}
