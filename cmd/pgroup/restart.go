package main

type restartCmd struct {
	startFlags
}

// Help is what pgroup restart --help says below the first line.
func (c *restartCmd) Help() string {
	return `pgroup restart [FLAGS] -p PATH [--] COMMAND [ARG...]

As pgroup stop and then pgroup start, with the same --wait for both. Flags and
COMMAND are those of the new run. To replace the workers of a run that is to go
on, there is pgroup reload.`
}

func (c *restartCmd) Run(line commandLine) error {
	if err := c.check(line); err != nil {
		return err
	}
	if _, err := stop(*c.Pidfile, c.Wait.value); err != nil {
		return err
	}
	return c.start(line)
}
