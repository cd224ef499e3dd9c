package pgroup

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// This file is for the worker: who it is, and its message channel.

// A Self is what a worker knows of itself.
type Self struct {
	Worker  int // its number, from 1, the same over restarts
	Workers int // how many there were when it was started
	PID     int // the launcher's
}

// Me returns what this process is as a worker; false if it isn't one, nor
// something that a worker started.
func Me() (Self, bool) {
	var s Self
	for name, n := range map[string]*int{workerVar: &s.Worker, workersVar: &s.Workers, pidVar: &s.PID} {
		var err error
		if *n, err = strconv.Atoi(os.Getenv(name)); err != nil || *n < 1 {
			return Self{}, false
		}
	}
	return s, true
}

// ErrNoChannel is OpenChannel's error in a process that was given none.
var ErrNoChannel = errors.New("no message channel: " + channelVar + " is not set")

// A Channel is a worker's end of its message channel, to a launcher of this
// package or to a Node program that called child_process.fork(). Its methods may
// be called by several goroutines.
type Channel struct {
	file *os.File
	read sync.Mutex // for Receive
	in   lineReader
}

// OpenChannel returns the channel that this process was given. There is one: the
// variables that name it are removed from the environment, so that no child
// takes it for its own.
func OpenChannel() (*Channel, error) {
	number, format := os.Getenv(channelVar), os.Getenv(formatVar)
	if number == "" {
		return nil, ErrNoChannel
	}
	os.Unsetenv(channelVar)
	os.Unsetenv(formatVar)
	if format != "" && format != "json" {
		return nil, fmt.Errorf("cannot use the message channel: its messages are %s, and not json", format)
	}
	fd, err := strconv.ParseUint(number, 10, 31)
	if err == nil {
		_, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot use the message channel that %s=%s names: %w", channelVar, number, err)
	}
	unix.CloseOnExec(int(fd))
	unix.SetNonblock(int(fd), true) // so that Close ends a Receive
	c := &Channel{file: os.NewFile(uintptr(fd), "channel")}
	c.in.r = c.file
	return c, nil
}

// Send sends v as JSON. It blocks while the other end does not read.
func (c *Channel) Send(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(line) >= maxLine {
		return ErrLineTooLong // the launcher would end the channel
	}
	return c.write(line)
}

func (c *Channel) write(line []byte) error {
	// One Write is one message, however many calls it takes: os.File has a lock.
	_, err := c.file.Write(append(line, '\n'))
	return err
}

// Receive waits for the next message and stores it in v as json.Unmarshal does;
// after an error of that the channel can still be used. io.EOF means that the
// other end has disconnected.
func (c *Channel) Receive(v any) error {
	c.read.Lock()
	defer c.read.Unlock()
	for {
		line, err := c.in.next()
		if errors.Is(err, syscall.ECONNRESET) { // with something of ours unread
			return io.EOF
		}
		if err != nil {
			return err
		}
		switch internalCommand(line) {
		case "":
			return json.Unmarshal(line, v)
		case "NODE_HANDLE":
			// Whoever sends one waits for this.
			if err := c.write([]byte(`{"cmd":"NODE_HANDLE_NACK"}`)); err != nil {
				return err
			}
		}
	}
}

// Close disconnects. A Receive that waits returns an error.
func (c *Channel) Close() error { return c.file.Close() }
