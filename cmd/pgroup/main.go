// The runtime need not open and hold two files to learn of a CPU quota.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// Command pgroup runs a command so that nothing which it starts outlives it.
//
//	pgroup run [FLAGS] [--] COMMAND [ARG…]
//	pgroup start|restart [FLAGS] -p PATH [--] COMMAND [ARG…]
//	pgroup stop|status|signal|reload|scale|events [FLAGS] -p PATH
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/alecthomas/kong"

	"pgroup/pgroup"
)

// runOnly is what run needs of cli: kong takes a time for each flag of each
// verb, and run is to start at once.
type runOnly struct {
	Run runCmd `cmd:"" help:"Run a command, and end all that it started when it or pgroup ends."`
}

type cli struct {
	runOnly
	Start   startCmd   `cmd:"" help:"Run a command as a service: return when it is ready."`
	Stop    stopCmd    `cmd:"" help:"Stop a service: return when nothing of it lives."`
	Restart restartCmd `cmd:"" help:"Stop a service, then start it."`
	Reload  reloadCmd  `cmd:"" help:"Replace the workers of a service one by one."`
	Scale   scaleCmd   `cmd:"" help:"Change the number of workers of a service."`
	Signal  signalCmd  `cmd:"" help:"Send a service a signal."`
	Status  statusCmd  `cmd:"" help:"Show whether a service runs, and its workers."`
	Events  eventsCmd  `cmd:"" help:"Write what happens to a service."`
}

const description = `Runs a command so that, whatever ends pgroup, nothing that the command started lives on.`

// A commandLine is one cut before the command to run: see splitCommand.
type commandLine struct {
	flags, command []string
}

func main() {
	pgroup.Init()
	verb := ""
	if len(os.Args) > 1 {
		verb = os.Args[1]
	}
	var grammar any = new(cli)
	if verb == "run" {
		pgroup.Prepare()
		grammar = new(runOnly)
	}
	parser := newParser(grammar)
	args, command := splitCommand(parser.Model, os.Args[1:])
	ctx, err := parser.Parse(args)
	if err != nil {
		fail(failure{usageStatus(parser.Model, verb), usageError(err)})
	}
	if err := ctx.Run(commandLine{args, command}); err != nil {
		if verb == "run" {
			err = failure{pgroup.StatusFailed, err}
		}
		fail(err)
	}
}

func newParser(grammar any) *kong.Kong {
	return kong.Must(grammar,
		kong.Name("pgroup"),
		kong.Description(description),
		kong.Exit(exit),
		kong.ExplicitGroups([]kong.Group{
			{Key: "cluster", Title: "Several workers:"},
			{Key: "service", Title: "A service:"},
		}),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
	)
}

// usageStatus is the status of a wrong command line: LSB's where the verb is one
// for init scripts.
func usageStatus(app *kong.Application, verb string) int {
	for _, v := range app.Children {
		if v.Name == verb && verb != "run" {
			return badUsage
		}
	}
	return pgroup.StatusFailed
}

// splitCommand cuts the arguments of a verb that runs a command before that
// command. What follows is not ours to parse, and kong takes a time for it that
// grows with its square.
func splitCommand(app *kong.Application, args []string) (ours, command []string) {
	takesValue := make(map[string]bool)
	runs := false
	for _, verb := range app.Children {
		if len(args) == 0 || verb.Name != args[0] || len(verb.Positional) == 0 || verb.Positional[0].Name != "command" {
			continue
		}
		runs = true
		for _, flag := range verb.Flags {
			takesValue["--"+flag.Name] = !flag.IsBool()
			takesValue["-"+string(flag.Short)] = !flag.IsBool()
		}
	}
	if !runs {
		return args, nil
	}
	for i := 1; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--":
			return args[:i], args[i+1:]
		case arg == "-" || !strings.HasPrefix(arg, "-"):
			return args[:i], args[i:]
		case takesValue[arg] || !strings.HasPrefix(arg, "--") && endsInFlag(arg, takesValue):
			i++
		}
	}
	return args, nil
}

// endsInFlag reports whether a cluster of short flags (-vt) ends in one whose
// value is the next argument.
func endsInFlag(cluster string, takesValue map[string]bool) bool {
	for i, c := range cluster[1:] {
		if takesValue["-"+string(c)] {
			return i+1 == len(cluster)-1
		}
	}
	return false
}

// usageError adds to what kong found wrong where to read what is right.
func usageError(err error) error {
	help := "pgroup --help"
	var parse *kong.ParseError
	if errors.As(err, &parse) && parse.Context != nil && parse.Context.Command() != "" {
		help = "pgroup " + strings.Fields(parse.Context.Command())[0] + " --help"
	}
	// kong's own words for a flag at the end of the line, or before another.
	what := strings.Replace(err.Error(), `expected value value but got "EOL" (<EOL>)`, "needs a value", 1)
	what = strings.Replace(what, "expected value value but got", "needs a value, but what follows is", 1)
	return fmt.Errorf("%s; see %s", what, help)
}

// fail ends the command for a reason of its own.
func fail(err error) {
	status := failed
	var f failure
	switch {
	case errors.As(err, &f):
		status = f.status
	case errors.Is(err, fs.ErrPermission):
		status = notPermitted
	}
	pgroup.Write(2, message(err))
	exit(status)
}

// exit ends a command that has not run anything.
func exit(status int) {
	pgroup.Discard()
	os.Exit(status)
}

// message is a line of pgroup's on standard error.
func message(what any) []byte { return fmt.Appendf(nil, "pgroup: %v\n", what) }
