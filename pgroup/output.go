package pgroup

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// outputs copies what the workers write, where that is labelled or goes to the
// program's own io.Writers. Each start of a worker has a pipe for each of the two.
//
//	worker ── pipe ──▶ goroutine ── destination.mu ──▶ Stdout or Stderr
//
// Nothing is queued but for the rest of a line: a destination that is slow lets
// the pipes fill, and then the workers wait for it, as they would without us. A
// destination that has gone takes the read ends with it, so that the workers
// get their SIGPIPE.
type outputs struct {
	stdout, stderr *destination // nil: no pipe
	label          bool
	width          int // of the highest number at the start

	copying sync.WaitGroup
	mu      sync.Mutex
	readers map[*os.File]*destination
	failed  chan error // has the first error
}

// newOutputs returns the copier to stdout and stderr, by lines that begin with
// the worker's number if label is set. Where one is nil there will be no pipe.
func newOutputs(stdout, stderr io.Writer, label bool, workers int) *outputs {
	failed := make(chan error, 1)
	o := &outputs{
		stdout:  newDestination("output", stdout, failed),
		stderr:  newDestination("error", stderr, failed),
		label:   label,
		width:   len(strconv.Itoa(workers)),
		readers: make(map[*os.File]*destination),
		failed:  failed,
	}
	if o.stdout != nil && o.stderr != nil && sameWriter(stdout, stderr) {
		o.stderr.mu = o.stdout.mu
	}
	return o
}

// pipes returns the write ends for one start of a worker, nil where there is no
// destination. The caller closes them once the worker has them: the copying
// ends when nobody has.
func (o *outputs) pipes(worker int) (stdout, stderr *os.File, err error) {
	outR, stdout, err := o.stdout.pipe()
	if err != nil {
		return nil, nil, err
	}
	errR, stderr, err := o.stderr.pipe()
	if err != nil {
		if outR != nil {
			outR.Close()
			stdout.Close()
		}
		return nil, nil, err
	}
	o.start(outR, o.stdout, worker)
	o.start(errR, o.stderr, worker)
	return stdout, stderr, nil
}

func (o *outputs) start(r *os.File, d *destination, worker int) {
	if r == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.readers[r] = d
	o.copying.Go(func() { o.copy(r, d, worker) })
}

// copySize is how much is read from a pipe at once: a quarter of what it holds.
// There may be thousands of pipes, and pages never read to cost nothing.
const copySize = 16 << 10

func (o *outputs) copy(r *os.File, d *destination, worker int) {
	var out interface {
		write(p []byte, last bool) error
	} = plain{d}
	if o.label {
		out = newLabeller(d, worker, o.width)
	}
	buf := make([]byte, copySize)
	for {
		n, end := r.Read(buf) // end of file, or hangUp
		err := out.write(buf[:n], end != nil)
		if err != nil {
			o.hangUp(d)
		}
		if err != nil || end != nil {
			break
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.readers, r)
	r.Close()
}

// hangUp closes the read ends of all pipes to d: who writes to one gets SIGPIPE.
func (o *outputs) hangUp(d *destination) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for r, to := range o.readers {
		if to == d {
			r.Close()
		}
	}
}

// lastWords is how long what is on its way has after the limit of wait.
const lastWords = 100 * time.Millisecond

// wait waits until every pipe has reached its end and all was written. When
// limit is closed it waits for what is on its way, lastWords, and then hangs up:
// what is still in the pipes is lost. It returns the first error of a
// destination. No worker may be started after it.
func (o *outputs) wait(limit <-chan struct{}) error {
	done := make(chan struct{})
	go func() {
		o.copying.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-limit:
		late := time.AfterFunc(lastWords, func() {
			o.hangUp(o.stdout)
			o.hangUp(o.stderr)
		})
		defer late.Stop()
		select {
		case <-done:
		case <-time.After(2 * lastWords): // what was read has been written, or never will
		}
	}
	select {
	case err := <-o.failed:
		return err
	default:
		return nil
	}
}

// A destination is what all workers' standard output, or error, goes to.
type destination struct {
	name   string
	w      io.Writer
	file   syscall.RawConn // of w, if it is a file
	colour bool
	failed chan<- error

	mu   *sync.Mutex // held while one writes; one for both if they are one file
	buf  []byte      // of labelled lines
	gone error
}

func newDestination(name string, w io.Writer, failed chan<- error) *destination {
	if w == nil {
		return nil
	}
	d := &destination{name: name, w: w, failed: failed, mu: new(sync.Mutex)}
	if f, ok := w.(*os.File); ok {
		d.file, d.gone = f.SyscallConn()
		d.colour = d.isTerminal() && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	}
	return d
}

func (d *destination) isTerminal() (yes bool) {
	if d.gone == nil {
		d.file.Control(func(fd uintptr) {
			_, err := unix.IoctlGetTermios(int(fd), unix.TCGETS)
			yes = err == nil
		})
	}
	return yes
}

// pipe returns the ends of a pipe to d, nil if d is.
func (d *destination) pipe() (r, w *os.File, err error) {
	if d == nil {
		return nil, nil, nil
	}
	return newPipe("standard " + d.name)
}

// write writes all of p. The caller holds d.mu. An error is for good.
func (d *destination) write(p []byte) error {
	if d.gone != nil {
		return d.gone
	}
	err := d.writeAll(p)
	if err == nil {
		return nil
	}
	select {
	case d.failed <- fmt.Errorf("cannot write to standard %s: %w", d.name, err):
	default:
	}
	if d.file == nil || err == unix.EPIPE || errors.Is(err, os.ErrClosed) {
		d.gone = err
	}
	// Else it is a full disk, say, that may have room again. A worker that writes
	// to it directly gets an error, and no signal: let it live.
	return d.gone
}

func (d *destination) writeAll(p []byte) (err error) {
	if d.file == nil {
		n, err := d.w.Write(p)
		if err == nil && n < len(p) {
			err = io.ErrShortWrite
		}
		return err
	}
	if err := d.file.Control(func(fd uintptr) { err = Write(int(fd), p) }); err != nil {
		return err // closed
	}
	return err
}

// plain writes to a destination what it is given, as it is.
type plain struct{ d *destination }

func (w plain) write(p []byte, last bool) error {
	if len(p) == 0 {
		return nil
	}
	w.d.mu.Lock()
	defer w.d.mu.Unlock()
	return w.d.write(p)
}

// sameWriter reports whether a and b end in the same place.
func sameWriter(a, b io.Writer) bool {
	if f, ok := a.(*os.File); ok {
		if g, ok := b.(*os.File); ok {
			fi, ferr := f.Stat()
			gi, gerr := g.Stat()
			return ferr == nil && gerr == nil && os.SameFile(fi, gi)
		}
	}
	defer func() { recover() }() // types that can't be compared panic
	return a == b
}

// newPipe returns the ends of a pipe: the one to read doesn't block, so that a
// goroutine that waits for it takes no thread; the one to write does, as every
// program expects. os.Pipe would make neither block.
func newPipe(name string) (r, w *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("cannot open a pipe for a worker's %s: %w", name, err)
	}
	unix.SetNonblock(p[0], true)
	return os.NewFile(uintptr(p[0]), name), os.NewFile(uintptr(p[1]), name), nil
}
