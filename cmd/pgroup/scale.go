package main

type scaleCmd struct {
	pidfileFlag
	Wait    duration `default:"60s" placeholder:"D" help:"How long that may take (${default}); 0: any time."`
	Workers count    `arg:"" placeholder:"N" help:"How many workers there are to be: 1 or more, or auto."`
}

// Help is what pgroup scale --help says below the first line.
func (c *scaleCmd) Help() string {
	return `Starts workers, or stops those with the highest numbers. Returns when the new ones
are ready, or nothing of the others is left. If that takes longer than --wait it
says so, and the run goes on towards N.

The exit status is 7 if nothing runs, 4 without permission, 1 if it failed.`
}

func (c *scaleCmd) Run() error {
	wait := c.Wait.value.Seconds()
	return c.ask(request{Do: "scale", Workers: c.Workers.value, Wait: &wait})
}
