package main

type reloadCmd struct {
	pidfileFlag
	Wait duration `default:"60s" placeholder:"D" help:"How long that may take (${default}); 0: any time."`
}

// Help is what pgroup reload --help says below the first line.
func (c *reloadCmd) Help() string {
	return `Replaces the workers one after the other. Each new worker is ready (see --ready of
pgroup run) before its old one is stopped, so that those who share a socket refuse
no connection. If a new worker ends before that, or --wait is over, the old ones
that are left go on, and that is an error.

The exit status is 7 if nothing runs, 4 without permission, 1 if it failed.`
}

func (c *reloadCmd) Run() error {
	wait := c.Wait.value.Seconds()
	return c.ask(request{Do: "reload", Wait: &wait})
}
