package pgroup

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Signal is one that the launcher received.
type Signal struct {
	Signal syscall.Signal
	From   int // pid of the sender; 0 if the kernel sent it
}

// relayable are the signals that are there to be relayed: all that can be
// caught, but for CHLD, which is news for us, and the two that the C library
// keeps for itself (nptl(7)).
const relayable sigset = allSignals &^ (1<<(unix.SIGCHLD-1) | 1<<(unix.SIGKILL-1) | 1<<(unix.SIGSTOP-1) | 1<<(32-1) | 1<<(33-1))

// Relayable reports whether sig is among the signals that Signals returns.
func Relayable(sig syscall.Signal) bool { return relayable.has(sig) }

// Signals takes all signals that can be caught, CHLD, 32 and 33 apart, away from the Go
// runtime and os/signal, for good, and returns them: each once for each time
// that it came. Those that the process was started with ignored stay so. It is
// for a program that is nothing but a launcher.
func Signals() (<-chan Signal, error) {
	fd, err := newSelfPipe(relayable)
	if err != nil {
		return nil, os.NewSyscallError("pipe", err)
	}
	c := make(chan Signal)
	batches := make(chan []Signal)
	go func() {
		pipe := os.NewFile(uintptr(fd), "signals")
		buf := make([]byte, 2048*24)
		for {
			n, err := pipe.Read(buf)
			if err != nil {
				return
			}
			batches <- readSelfPipe(buf[:n])
		}
	}()
	go func() {
		// A queue without a bound: the pipe must not fill while a signal is
		// relayed.
		for queue := []Signal(nil); ; {
			if len(queue) == 0 {
				queue = <-batches
				continue
			}
			select {
			case more := <-batches:
				queue = append(queue, more...)
			case c <- queue[0]:
				queue = queue[1:]
			}
		}
	}()
	return c, nil
}
