package pgroup

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
)

func TestMe(t *testing.T) {
	for _, test := range []struct {
		worker, workers, pid string
		want                 Self
	}{
		{"2", "4", "99", Self{2, 4, 99}},
		{"", "4", "99", Self{}},
		{"0", "4", "99", Self{}},
		{"2", "4", "x", Self{}},
	} {
		t.Setenv(workerVar, test.worker)
		t.Setenv(workersVar, test.workers)
		t.Setenv(pidVar, test.pid)
		if got, ok := Me(); got != test.want || ok != (test.want != Self{}) {
			t.Errorf("%+v: got %+v, %v", test, got, ok)
		}
	}
}

func TestOpenChannelErrors(t *testing.T) {
	for _, test := range []struct{ fd, format string }{{"x", ""}, {"1000000", ""}, {"-1", ""}, {"0", "advanced"}} {
		t.Setenv(channelVar, test.fd)
		t.Setenv(formatVar, test.format)
		if _, err := OpenChannel(); err == nil || errors.Is(err, ErrNoChannel) {
			t.Errorf("%+v: %v", test, err)
		}
	}
	if _, err := OpenChannel(); err != ErrNoChannel {
		t.Errorf("without a channel: %v", err)
	}
}

// beWorker is what this test binary does as a worker: it answers, until the end
// of the channel.
func beWorker() error {
	c, err := OpenChannel()
	if err != nil {
		return err
	}
	if os.Getenv(channelVar) != "" || os.Getenv(formatVar) != "" {
		return errors.New("the variables are still there")
	}
	for {
		var text string
		switch err := c.Receive(&text); {
		case err == io.EOF:
			return nil
		case err != nil:
			text = "error" // no string
		}
		if err := c.Send(map[string]string{"you said": text}); err != nil {
			return err
		}
	}
}

const asWorker = "PGROUP_TEST_AS_WORKER"

// TestBeWorker is no test: see beWorker.
func TestBeWorker(t *testing.T) {
	if os.Getenv(asWorker) != "" {
		if err := beWorker(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func TestOpenChannel(t *testing.T) {
	c, theirs, err := newChannel()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestBeWorker$")
	cmd.Env = append(os.Environ(), asWorker+"=1", channelVar+"=3")
	cmd.ExtraFiles, cmd.Stderr = []*os.File{theirs}, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	lines := make(chan string, 3)
	go func() {
		c.serve(func(line []byte, _ bool) { lines <- string(line) })
		close(lines)
	}()
	c.send([]byte(`{"cmd":"NODE_SOMETHING"}`))
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	refused := make(chan bool, 1)
	c.sendCopy(nodeHandle("net.Native", `1`), int(null.Fd()), func() { refused <- true })
	c.send([]byte(`"hello"`))
	c.send([]byte(`5`))
	if line := <-lines; line != `{"you said":"hello"}` {
		t.Errorf("got %s", line)
	}
	if line := <-lines; line != `{"you said":"error"}` {
		t.Errorf("got %s", line)
	}
	<-refused
	c.close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("the worker: %v", err)
	}
}

// A worker in Go has Node's own fork() for a parent.
func TestOpenChannelUnderNode(t *testing.T) {
	script := `
		const c = require('child_process').spawn(process.argv[1], ['-test.run=^TestBeWorker$'],
			{stdio: [0, 1, 2, 'ipc'], env: {...process.env, ` + asWorker + `: '1'}})
		c.on('message', m => { console.log(JSON.stringify(m)); c.disconnect() })
		c.on('exit', (code, signal) => console.log(code, signal))
		c.send('hellö')`
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range nodes(t) {
		out, err := exec.Command(node, "-e", script, exe).CombinedOutput()
		if want := "{\"you said\":\"hellö\"}\n0 null\n"; string(out) != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", node, out, err, want)
		}
	}
}
