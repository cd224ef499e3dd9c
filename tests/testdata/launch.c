// launch N COMMAND… [--- COMMAND…]…: starts each command N times, in turns, and
// prints for each the least and the median time from vfork to wait, in
// microseconds. C, because a Go program's own fork would be part of every time.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_COMMANDS = 32, MAX_RUNS = 100000 };

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	char **commands[MAX_COMMANDS];
	int runs = argc > 2 ? atoi(argv[1]) : 0, count = 1;
	if (runs < 1 || runs > MAX_RUNS)
		return 2;
	commands[0] = argv + 2;
	for (int i = 2; i < argc; i++)
		if (!strcmp(argv[i], "---") && count < MAX_COMMANDS) {
			argv[i] = NULL;
			commands[count++] = argv + i + 1;
		}
	double *times = calloc((size_t)count * runs, sizeof *times);
	if (!times)
		return 2;
	for (int r = 0; r < runs; r++)
		for (int c = 0; c < count; c++) {
			double start = now();
			pid_t pid = vfork();
			if (pid == 0) {
				execvp(commands[c][0], commands[c]);
				_exit(127);
			}
			int status;
			if (pid < 0 || waitpid(pid, &status, 0) < 0 || status != 0) {
				fprintf(stderr, "%s: status %d\n", commands[c][0], status);
				return 1;
			}
			times[c * runs + r] = now() - start;
		}
	for (int c = 0; c < count; c++) {
		double *t = times + c * runs;
		qsort(t, runs, sizeof *t, compare);
		printf("%.0f %.0f\n", t[0], t[runs / 2]);
	}
	return 0;
}
