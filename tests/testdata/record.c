// record CHILDREN: a process and its children, all of which block every
// signal and write each one that arrives to standard output, as the line
// "PID SIGNAL SENDER". A line with signal 0 says that the member is listening
// and names its parent. A Go program could not see all signals, nor how often.

#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	for (int n = argc > 1 ? atoi(argv[1]) : 0; n > 0; n--)
		if (fork() == 0)
			break;
	siginfo_t info = {.si_pid = getppid()};
	// It ends by itself when nobody reads on or nothing arrives.
	while (dprintf(1, "%d %d %d\n", getpid(), info.si_signo, info.si_pid) > 0)
		if (sigtimedwait(&all, &info, &(struct timespec){.tv_sec = 60}) < 0)
			return 1;
}
