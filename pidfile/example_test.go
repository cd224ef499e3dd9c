package pidfile_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"pgroup/pidfile"
)

func Example() {
	dir, err := os.MkdirTemp("", "run-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "server.pid")

	// The server.
	f, err := pidfile.Create(path)
	if err != nil {
		log.Fatal(err) // names the holder, if that is the trouble
	}
	text, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("holds our pid:", string(text) == fmt.Sprintln(os.Getpid()))

	// A second one.
	_, err = pidfile.Create(path)
	var held *pidfile.HeldError
	fmt.Println("held:", errors.As(err, &held) && held.PID == os.Getpid())

	// The server ends.
	if err := f.Remove(); err != nil {
		log.Print(err)
	}
	_, err = pidfile.Find(path)
	fmt.Println("not running:", errors.Is(err, pidfile.ErrNotRunning))
	// Output:
	// holds our pid: true
	// held: true
	// not running: true
}

// Stop what holds a pid file, and wait until nothing of it is left.
func ExampleFind() {
	stop := func(path string) error {
		h, err := pidfile.Find(path)
		if errors.Is(err, pidfile.ErrNotRunning) || errors.Is(err, pidfile.ErrStale) {
			return nil
		}
		if err != nil {
			return err
		}
		defer h.Close()
		// If it is gone, those that still hold its lock are left to wait for.
		if err := h.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
		defer cancel()
		return h.Wait(ctx)
	}
	fmt.Println(stop("/run/no-such-server.pid"))
	// Output: <nil>
}
