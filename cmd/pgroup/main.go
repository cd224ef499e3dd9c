// The runtime need not open and hold two files to learn of a CPU quota.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// Command pgroup runs a command so that nothing which it starts outlives it.
//
//	pgroup run [FLAGS] [--] COMMAND [ARG…]
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/alecthomas/kong"

	"pgroup/pgroup"
)

var cli struct {
	Run runCmd `cmd:"" help:"Run a command, and end all that it started when it or pgroup ends."`
}

const description = `Runs a command so that, whatever ends pgroup, nothing that the command started lives on.`

func main() {
	pgroup.Init()
	if len(os.Args) > 1 && os.Args[1] == "run" {
		pgroup.Prepare()
	}
	parser := newParser()
	args, command := splitCommand(parser.Model, os.Args[1:])
	ctx, err := parser.Parse(args)
	if err != nil {
		fail(usageError(err))
	}
	cli.Run.Command = command
	if err := ctx.Run(); err != nil {
		fail(err)
	}
}

func newParser() *kong.Kong {
	return kong.Must(&cli,
		kong.Name("pgroup"),
		kong.Description(description),
		kong.Exit(exit),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
	)
}

// splitCommand cuts the arguments of a verb that runs a command before that
// command. What follows is not ours to parse, and kong takes a time for it that
// grows with its square.
func splitCommand(app *kong.Application, args []string) (ours, command []string) {
	if len(args) == 0 || args[0] != "run" {
		return args, nil
	}
	takesValue := make(map[string]bool)
	for _, verb := range app.Children {
		for _, flag := range verb.Flags {
			takesValue["--"+flag.Name] = !flag.IsBool()
			takesValue["-"+string(flag.Short)] = !flag.IsBool()
		}
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
	// kong's own words for a flag at the end of the line.
	what := strings.Replace(err.Error(), `expected value value but got "EOL" (<EOL>)`, "needs a value", 1)
	return fmt.Errorf("%s; see %s", what, help)
}

// fail ends the command for a reason of its own.
func fail(err error) {
	pgroup.Write(2, message(err))
	exit(pgroup.StatusFailed)
}

// exit ends a command that has not run anything.
func exit(status int) {
	pgroup.Discard()
	os.Exit(status)
}

// message is a line of pgroup's on standard error.
func message(what any) []byte { return fmt.Appendf(nil, "pgroup: %v\n", what) }
