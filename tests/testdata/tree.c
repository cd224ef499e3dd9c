/*
 * tree KIND: become a process tree of that kind (see kinds in tree_test.go)
 * and hold still, so that a launcher can be shown to leave nothing of it.
 *
 * C, since a Go process can't fork without exec, takes 2 ms to start and runs
 * threads that would blur what is being counted.
 *
 * Each member writes one byte to standard output when it is in place. Every
 * member keeps the working directory that the tree was started in. The root
 * exits 0 when it reads a byte. Whatever becomes of its launcher a member ends
 * after LIFE seconds; those too quick to be killed from outside also end when a
 * file "stop" appears in the working directory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LIFE 60 /* seconds */

static char *self;

static void fail(const char *what)
{
	fprintf(stderr, "tree: %s: %s\n", what, strerror(errno));
	_exit(99);
}

/* SIGKILL from a timer ends also what is stopped or ignores SIGALRM. */
static void expire(void)
{
	struct sigevent ev = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
	struct itimerspec at = {.it_value.tv_sec = LIFE};
	timer_t timer;

	if (timer_create(CLOCK_MONOTONIC, &ev, &timer) || timer_settime(timer, 0, &at, NULL))
		fail("timer");
}

static pid_t branch(void)
{
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (pid == 0)
		expire();
	return pid;
}

static void in_place(void)
{
	if (write(1, "r", 1) != 1)
		_exit(98);
}

static void nap(long ms)
{
	struct timespec t = {ms / 1000, ms % 1000 * 1000000};

	nanosleep(&t, NULL);
}

static void hold(void)
{
	in_place();
	for (;;)
		pause();
}

/* A terminal is not read: a member in its background would be stopped. */
static void hold_root(void)
{
	char c;

	in_place();
	if (!isatty(0)) {
		ssize_t n;
		while ((n = read(0, &c, 1)) < 0 && errno == EINTR)
			;
		if (n == 1)
			_exit(0);
	}
	for (;;)
		pause();
}

static void ignore_all(void)
{
	for (int sig = 1; sig < NSIG; sig++)
		signal(sig, SIG_IGN);
}

/* The root gives way to the keyboard's signals even where its tree doesn't:
 * relayed, they are no stop, and a root that ignores them may live on. */
static void heed_keyboard(void)
{
	signal(SIGHUP, SIG_DFL);
	signal(SIGINT, SIG_DFL);
	signal(SIGQUIT, SIG_DFL);
}

/* Two forks and a setsid between them, as daemon(3) but for the directory.
 * Returns 0 in the daemon, which has still to call hold_daemon. */
static pid_t daemonize(void)
{
	pid_t middle = branch();

	if (middle == 0) {
		setsid();
		if (branch())
			_exit(0);
		return 0;
	}
	waitpid(middle, NULL, 0);
	return middle;
}

static void hold_daemon(void)
{
	in_place();
	close(0);
	close(1);
	close(2);
	for (;;)
		pause();
}

static void plain(void)
{
	for (int i = 0; i < 3; i++)
		if (branch() == 0) {
			for (int j = 0; j < 2; j++)
				if (branch() == 0)
					hold();
			hold();
		}
	hold_root();
}

static void groups(void)
{
	for (int i = 0; i < 3; i++)
		if (branch() == 0) {
			setpgid(0, 0);
			if (branch() == 0)
				setpgid(0, 0);
			hold();
		}
	hold_root();
}

static void daemons(void)
{
	for (int i = 0; i < 3; i++)
		if (daemonize() == 0)
			hold_daemon();
	hold_root();
}

static void ignore(void)
{
	ignore_all();
	signal(SIGCHLD, SIG_DFL);
	for (int i = 0; i < 2; i++)
		if (branch() == 0) {
			branch();
			hold();
		}
	if (daemonize() == 0)
		hold_daemon();
	heed_keyboard();
	hold_root();
}

static void until_stopped(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, WUNTRACED) != pid || !WIFSTOPPED(status))
		fail("waiting for a stop");
}

static void hold_stopped(void)
{
	raise(SIGSTOP);
	for (;;)
		pause();
}

/* A byte is written for a member by the process that has seen it stop. */
static void stopped(void)
{
	pid_t pid;

	for (int own_group = 0; own_group < 2; own_group++) {
		if ((pid = branch()) == 0) {
			if (own_group) {
				setpgid(0, 0);
				signal(SIGHUP, SIG_IGN); /* sent to a stopped group whose parent ends */
			}
			if ((pid = branch()) == 0)
				hold_stopped();
			until_stopped(pid);
			in_place();
			hold_stopped();
		}
		until_stopped(pid);
		in_place();
	}
	/* Its own session, so that no group is orphaned by the middle's end: a
	 * stopped one would get HUP and CONT for that. */
	if ((pid = branch()) == 0) {
		setsid();
		if ((pid = branch()) == 0) {
			setsid();
			hold_stopped();
		}
		until_stopped(pid);
		in_place();
		_exit(0);
	}
	waitpid(pid, NULL, 0);
	hold_root();
}

static void exec_bare(const char *kind)
{
	char *args[] = {"tree", (char *)kind, NULL}, *none[] = {NULL};

	execve(self, args, none);
	fail("execve");
}

static void bare_root(void)
{
	for (int i = 0; i < 2; i++)
		if (branch() == 0)
			exec_bare("bare-child");
	if (daemonize() == 0)
		exec_bare("bare-daemon");
	hold_root();
}

static void nested(void)
{
	for (int i = 0; i < 30; i++) {
		if (branch()) {
			if (i == 0)
				hold_root();
			hold();
		}
		setsid();
	}
	hold();
}

static void many(void)
{
	for (int i = 0; i < 300; i++)
		if (branch() == 0)
			hold();
	hold_root();
}

/* TERM is ignored from the start, so that an end can strike while what is left
 * over has its grace. */
static void leftovers(void)
{
	signal(SIGTERM, SIG_IGN);
	if (branch() == 0)
		hold();
	if (daemonize() == 0)
		hold_daemon();
	_exit(0);
}

/* A new process and a new session, again and again, one at a time. */
static void hop(long pace)
{
	struct timespec t;
	time_t until;

	clock_gettime(CLOCK_MONOTONIC, &t);
	until = t.tv_sec + LIFE / 2;
	if (fork() == 0)
		for (long n = 0; n < 400000 && t.tv_sec < until; n++) {
			pid_t pid = fork();
			if (pid > 0)
				_exit(0);
			if (pid == 0) {
				setsid();
				if (n == 20)
					in_place();
				if (n % 16 == 0 && access("stop", F_OK) == 0)
					_exit(0);
			}
			if (pace || pid < 0)
				nap(pid < 0 ? 1 : pace);
			clock_gettime(CLOCK_MONOTONIC, &t);
		}
	else
		hold_root();
	_exit(0);
}

static void hop_2ms(void) { hop(2); }
static void sprint(void) { hop(0); }

/* Sixteen are in place; they go on to double while the end strikes. */
static void doubling(void)
{
	pid_t root = getpid();

	for (int depth = 0; depth < 8; depth++) {
		if (depth == 4)
			in_place();
		if (depth >= 4)
			nap(4);
		if (branch() == 0 && depth % 2)
			setsid();
	}
	if (getpid() == root && !isatty(0)) {
		char c;
		if (read(0, &c, 1) == 1)
			_exit(0);
	}
	for (;;)
		pause();
}

static void clean_up(int sig)
{
	char name[32] = "cleaned-";
	char digits[16];
	int i = 0, n = strlen(name), fd;

	(void)sig;
	nap(50);
	for (pid_t pid = getpid(); pid; pid /= 10)
		digits[i++] = '0' + pid % 10;
	while (i)
		name[n++] = digits[--i];
	fd = open(name, O_CREAT | O_WRONLY, 0666);
	_exit(fd < 0);
}

/* All but the root clean up when they get TERM, and only then. */
static void graceful(void)
{
	signal(SIGHUP, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	signal(SIGQUIT, SIG_IGN);
	signal(SIGTERM, clean_up);
	if (branch() == 0) {
		if (branch() == 0)
			setpgid(0, 0);
		hold();
	}
	if (daemonize() == 0)
		hold_daemon();
	heed_keyboard();
	hold_root();
}

/* A little of all, for many runs. */
static void small(void)
{
	if (branch() == 0)
		hold();
	if (daemonize() == 0)
		hold_daemon();
	if (branch() == 0) {
		signal(SIGTERM, SIG_IGN);
		setpgid(0, 0);
		hold();
	}
	hold_root();
}

static const struct {
	const char *name;
	void (*run)(void);
} kinds[] = {
	{"plain", plain},
	{"groups", groups},
	{"daemons", daemons},
	{"ignore", ignore},
	{"stopped", stopped},
	{"bare", NULL},
	{"bare-root", bare_root},
	{"bare-child", hold},
	{"bare-daemon", hold_daemon},
	{"nested", nested},
	{"many", many},
	{"left-overs", leftovers},
	{"hop", hop_2ms},
	{"sprint", sprint},
	{"doubling", doubling},
	{"graceful", graceful},
	{"small", small},
};

int main(int argc, char **argv)
{
	self = realpath("/proc/self/exe", NULL);
	expire();
	for (size_t i = 0; argc == 2 && i < sizeof kinds / sizeof *kinds; i++)
		if (strcmp(argv[1], kinds[i].name) == 0) {
			if (!kinds[i].run)
				exec_bare("bare-root");
			kinds[i].run();
		}
	fprintf(stderr, "usage: tree KIND\n");
	return 99;
}
