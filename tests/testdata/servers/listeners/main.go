// Command listeners serves the sockets that it is given, by way of package pgroup.
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"

	"pgroup/pgroup"
)

func main() {
	listeners, err := pgroup.Listeners()
	if err != nil {
		log.Fatal(err)
	}
	if len(listeners) == 0 {
		log.Fatal("no sockets")
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "%s %d\n", os.Getenv("PGROUP_WORKER"), os.Getpid())
	})}
	term, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	for _, l := range listeners {
		go server.Serve(l)
	}
	<-term.Done()
	server.Shutdown(context.Background())
}
