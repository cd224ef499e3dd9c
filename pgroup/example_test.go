package pgroup_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"

	"pgroup/pgroup"
)

// A program that is its own workers: HTTP servers that share a socket, and tell
// the master of each request. In main, after Init, it would be the one or the
// other by what Me says.
func Example_master() {
	exe, err := os.Executable()
	if err != nil {
		log.Fatal(err)
	}
	const many = 20
	requests := 0
	address, counted := make(chan string, 1), make(chan bool, 1)
	run, err := pgroup.Start(context.Background(), &pgroup.Spec{
		Args:    []string{exe, "serve"},
		Workers: 4,
		Restart: pgroup.RestartFailure,
		Listen:  []pgroup.Listen{{Network: "tcp", Address: "127.0.0.1:0"}},
		Channel: true,
		Grace:   5 * time.Second,
		Events: func(e pgroup.Event) {
			switch e.Type {
			case pgroup.EventListen:
				address <- e.Address
			case pgroup.EventMessage:
				var m struct{ Cmd string }
				if json.Unmarshal(e.Data, &m) == nil && m.Cmd == "notifyRequest" {
					requests++
				}
				if requests == many {
					counted <- true
				}
			}
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	url := "http://" + <-address
	for range many {
		resp, err := http.Get(url)
		if err != nil {
			log.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	<-counted
	run.Stop()
	run.Wait()
	fmt.Println(requests, "requests")
	// Output: 20 requests
}

// serve is the worker of Example_master.
func serve() {
	me, ok := pgroup.Me()
	if !ok {
		log.Fatal("start the master")
	}
	master, err := pgroup.OpenChannel()
	if err != nil {
		log.Fatal(err)
	}
	listeners, err := pgroup.Listeners()
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(http.Serve(listeners[0], http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		master.Send(map[string]string{"cmd": "notifyRequest"})
		fmt.Fprintf(w, "hello from worker %d\n", me.Worker)
	})))
}

// A shell command with a timeout and a variable, as Node's exec has them. What it
// started ends with it.
func ExampleStart_exec() {
	run, err := pgroup.Start(context.Background(), &pgroup.Spec{
		Args:    []string{"sh", "-c", `echo "hello, $NAME"; sleep 1000 & wait`},
		Env:     append(os.Environ(), "NAME=world"),
		Stdout:  os.Stdout,
		Timeout: time.Second,
		Grace:   5 * time.Second, // then SIGKILL
	})
	if err != nil {
		log.Fatal(err)
	}
	result, err := run.Wait()
	fmt.Println(result.TimedOut, result.Code(), err)
	// Output:
	// hello, world
	// true 124 <nil>
}

// A program with its arguments, no shell in between, and what it prints.
func ExampleStart_execFile() {
	var stdout bytes.Buffer
	run, err := pgroup.Start(context.Background(), &pgroup.Spec{
		Args:   []string{"printf", "%s\n", "$HOME stays as it is"},
		Stdout: &stdout,
	})
	if err != nil {
		log.Fatal(err)
	}
	result, err := run.Wait()
	fmt.Println(result.Code(), err)
	fmt.Print(stdout.String())
	// Output:
	// 0 <nil>
	// $HOME stays as it is
}

// A filter that reads what we write, and its end as an event.
func ExampleStart_spawn() {
	stdin, toIt, err := os.Pipe()
	if err != nil {
		log.Fatal(err)
	}
	fromIt, stdout, err := os.Pipe()
	if err != nil {
		log.Fatal(err)
	}
	exit := make(chan pgroup.Event, 1)
	run, err := pgroup.Start(context.Background(), &pgroup.Spec{
		Args:   []string{"sh", "-c", "tr a-z A-Z; exit 3"},
		Stdin:  stdin,
		Stdout: stdout,
		Events: func(e pgroup.Event) {
			if e.Type == pgroup.EventExit {
				exit <- e
			}
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	stdin.Close() // they are the worker's now
	stdout.Close()
	fmt.Fprintln(toIt, "hello")
	toIt.Close()
	io.Copy(os.Stdout, fromIt)
	e := <-exit
	fmt.Printf("worker %d ended with status %d\n", e.Worker, e.Status.ExitStatus())
	run.Wait()
	// Output:
	// HELLO
	// worker 1 ended with status 3
}

// Messages both ways, as with Node's fork: the worker may be a Node script, or
// anything else that reads and writes lines of JSON. An Events that has to answer
// leaves that to another goroutine.
func ExampleStart_fork() {
	exe, err := os.Executable()
	if err != nil {
		log.Fatal(err)
	}
	messages := make(chan json.RawMessage, 1)
	run, err := pgroup.Start(context.Background(), &pgroup.Spec{
		Args:    []string{exe, "double"},
		Channel: true,
		Events: func(e pgroup.Event) {
			if e.Type == pgroup.EventMessage {
				messages <- e.Data
			}
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	for n := range 3 {
		if err := run.Send(1, n); err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s\n", <-messages)
	}
	run.Stop()
	run.Wait()
	// Output:
	// 0
	// 2
	// 4
}

// double is the worker of ExampleStart_fork: it answers each number.
func double() {
	master, err := pgroup.OpenChannel()
	if err != nil {
		log.Fatal(err)
	}
	for {
		var n int
		switch err := master.Receive(&n); {
		case err == io.EOF: // the master has disconnected
			return
		case err != nil:
			log.Fatal(err)
		}
		master.Send(2 * n)
	}
}

// One program that is the master, and started again a worker.
func ExampleMe() {
	if me, ok := pgroup.Me(); ok {
		fmt.Printf("I am worker %d of %d\n", me.Worker, me.Workers)
		return
	}
	exe, err := os.Executable()
	if err != nil {
		log.Fatal(err)
	}
	run, err := pgroup.Start(context.Background(), &pgroup.Spec{
		Args:    []string{exe, "me"},
		Workers: 2,
		Stdout:  os.Stdout,
	})
	if err != nil {
		log.Fatal(err)
	}
	run.Wait()
	// Unordered output:
	// I am worker 1 of 2
	// I am worker 2 of 2
}

func ExampleRun_Scale() {
	ctx := context.Background()
	run, err := pgroup.Start(ctx, &pgroup.Spec{Args: []string{"sleep", "1000"}, Workers: 2})
	if err != nil {
		log.Fatal(err)
	}
	<-run.Ready()
	if err := run.Scale(ctx, 3); err != nil {
		log.Fatal(err)
	}
	status, err := run.Status()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(status.State)
	for _, w := range status.Workers {
		fmt.Println(w.Worker, w.State, w.Restarts)
	}
	run.Stop()
	result, _ := run.Wait()
	fmt.Println(result.Signal)
	// Output:
	// ready
	// 1 ready 0
	// 2 ready 0
	// 3 ready 0
	// killed
}
