package tests

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	roles["lines"] = linesRole
}

// labelLine returns the nth line of a worker, of which some are longer than what
// a pipe takes at once.
func labelLine(stream, worker string, n int) string {
	length := n * 37 % 300
	if n%250 == 7 {
		length = 10000
	}
	return fmt.Sprintf("%s %s %d %s\n", stream, worker, n, strings.Repeat("x", length))
}

// linesRole writes so many lines to standard output and to standard error, in
// pieces that begin and end anywhere.
func linesRole(args []string) int {
	n, _ := strconv.Atoi(args[0])
	streams := map[*os.File]*bytes.Buffer{os.Stdout: {}, os.Stderr: {}}
	for f, b := range streams {
		name := map[*os.File]string{os.Stdout: "out", os.Stderr: "err"}[f]
		for i := range n {
			b.WriteString(labelLine(name, os.Getenv("PGROUP_WORKER"), i))
		}
	}
	for piece := 1; streams[os.Stdout].Len()+streams[os.Stderr].Len() > 0; piece++ {
		for f, b := range streams {
			if _, err := f.Write(b.Next(1 + piece*piece%997)); err != nil {
				return 1
			}
		}
	}
	return 0
}

// wantLines checks that in are the lines of so many workers, each with its
// number, in the order in which it wrote them, and what pgroup itself says.
func wantLines(t *testing.T, in io.Reader, stream string, workers, lines int) {
	t.Helper()
	next := map[string]int{}
	r := bufio.NewReader(in)
	for {
		line, err := r.ReadString('\n')
		if err == io.EOF && line == "" {
			break
		}
		if err != nil {
			t.Fatalf("%s: %.100q, %v", stream, line, err)
		}
		if strings.HasPrefix(line, "pgroup: ") {
			continue
		}
		worker, text, _ := strings.Cut(line, " | ")
		if want := labelLine(stream, worker, next[worker]); text != want {
			t.Fatalf("%s: line %d of worker %s is %.100q, want %.100q", stream, next[worker], worker, text, want)
		}
		next[worker]++
	}
	for worker := 1; worker <= workers; worker++ {
		if n := next[strconv.Itoa(worker)]; n != lines {
			t.Errorf("%s: %d lines of worker %d, want %d", stream, n, worker, lines)
		}
	}
	if len(next) != workers {
		t.Errorf("%s: lines of %d workers, want %d", stream, len(next), workers)
	}
}

// No line of many workers that write at the same time is torn or lost.
func TestLabel(t *testing.T) {
	t.Parallel()
	const workers, lines = 8, 1000
	cmd := pgroupRun("-n", strconv.Itoa(workers), "--label", "--", "env", usedRole(t, "lines"), testExe, strconv.Itoa(lines))
	j := startJob(t, cmd)
	wantLines(t, j.stdout, "out", workers, lines)
	j.wantStatus("0")
	errors, err := os.Open(j.stderr)
	if err != nil {
		t.Fatal(err)
	}
	defer errors.Close()
	wantLines(t, errors, "err", workers, lines)
}

// Who reads slowly gets all, and the workers wait for him; the launcher doesn't.
func TestLabelSlowReader(t *testing.T) {
	t.Parallel()
	const workers, lines = 4, 1000
	r, w := pipe(t)
	out, stdout := pipe(t)
	cmd := pgroupRun("--events=fd:3", "-n", strconv.Itoa(workers), "--label", "--map=USR1=", "--", "env", usedRole(t, "lines"), testExe, strconv.Itoa(lines))
	cmd.ExtraFiles, cmd.Stdout = []*os.File{w}, stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	stdout.Close()
	w.Close()
	conn, err := out.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// Each write is of up to 4096 bytes, or of one longer line.
	eventually(t, "the pipe is full", func() (full bool) {
		conn.Control(func(fd uintptr) {
			size, _ := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0)
			n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
			full = err == nil && n > size-16384
		})
		return full
	})
	cmd.Process.Signal(syscall.SIGUSR1)
	log := bufio.NewReader(r)
	for {
		line, err := log.ReadString('\n')
		if err != nil {
			t.Fatalf("the launcher does not hear of a signal while nobody reads: %v", err)
		}
		if strings.Contains(line, `"event":"exit"`) {
			t.Fatalf("a worker does not wait for who reads: %s", line)
		}
		if strings.Contains(line, `"event":"relay"`) {
			break
		}
	}
	wantLines(t, out, "out", workers, lines)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestLabelText(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, flags, shell, stdout, stderr string }{
		{"no newline at the end", "", `printf 'a\nb'; printf 'c\nd' >&2`, "1 | a\n1 | b\n", "1 | c\n1 | d\n"},
		{"bytes", "", `printf '\000\377\r\n\n'`, "1 | \x00\xff\r\n1 | \n", ""},
		{"width", "-n 10 --relay=worker", `[ $PGROUP_WORKER != 1 ] || echo a`, " 1 | a\n", ""},
		{"nothing", "", `:`, "", ""},
		{"closed", "", `exec >&- 2>&-`, "", ""},
		{
			"restart", "--restart=on-failure", `printf "start $PGROUP_START"; [ $PGROUP_START = 3 ] && exit 0; kill -KILL $$`,
			"1 | start 1\n1 | start 2\n1 | start 3\n", "",
		},
		{"left-overs", "--leftovers=wait", `(sleep 0.1; echo later) & echo now`, "1 | now\n1 | later\n", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			args := append(strings.Fields(test.flags), "--label", "--", "sh", "-c", test.shell)
			var stdout, stderr strings.Builder
			cmd := pgroupRun(args...)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if err := cmd.Run(); err != nil {
				t.Error(err)
			}
			// What pgroup itself says is not labelled.
			said := regexp.MustCompile(`(?m)^pgroup: .*\n`).ReplaceAllString(stderr.String(), "")
			if stdout.String() != test.stdout || said != test.stderr {
				t.Errorf("standard output is %q, error %q; want %q and %q", &stdout, &stderr, test.stdout, test.stderr)
			}
		})
	}
}

// The labels are in colour where the output is a terminal, and it wants colour.
func TestLabelColour(t *testing.T) {
	t.Parallel()
	const script = `echo out; echo err >&2`
	coloured := `\x1b\[0;36m1 \|\x1b\[0m `
	for name, test := range map[string]struct {
		env        []string
		shell      string
		first, two string // in any order
	}{
		"terminal": {[]string{"TERM=xterm"}, `"$@"`, coloured + `out\r\n`, coloured + `err\r\n`},
		"stderr":   {[]string{"TERM=xterm"}, `"$@" | cat`, `(?m)^1 \| out\r\n`, coloured + `err\r\n`},
		"dumb":     {[]string{"TERM=dumb"}, `"$@"`, `(?m)^1 \| out\r\n`, `(?m)^1 \| err\r\n`},
		"NO_COLOR": {[]string{"TERM=xterm", "NO_COLOR=1"}, `"$@"`, `(?m)^1 \| out\r\n`, `(?m)^1 \| err\r\n`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tm := openTerminal(t, test.env, "sh", "-c", test.shell+`; echo over; read x`, "sh",
				pgroupBin, "run", "--label", "--", "sh", "-c", script)
			shown := tm.expect(`(?s)^.*over\r\n`)[0]
			for _, want := range []string{test.first, test.two} {
				if !regexp.MustCompile(want).MatchString(shown) {
					t.Errorf("the screen shows %q, want %q", shown, want)
				}
			}
		})
	}
}

// A pipeline whose reader has ended ends.
func TestLabelReaderEnds(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ line, want string }{
		"workers die":  {`pgroup run -n 2 --label -- sh -c 'while echo line; do :; done' | head -n 1 | cut -c 2-`, " | line\n141 0 0\n"},
		"of one write": {`pgroup run --label -- sh -c 'echo line; read x <go; while echo again; do sleep 0.02; done' | { head -n 1; exec <&-; echo >go; }`, "1 | line\n141 0\n"},
		// The second worker's first write is the first that nobody can read.
		"another's": {`pgroup run -n 2 --label -- sh -c '
			[ $PGROUP_WORKER = 1 ] && { (while echo line; do :; done); : >over; exit 0; }
			until [ -e over ]; do sleep 0.01; done; echo once' | head -n 1 | cut -c 2-`, " | line\n141 0 0\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("bash", "-c", test.line+`; echo ${PIPESTATUS[*]}`)
			cmd.Dir = t.TempDir()
			if err := unix.Mkfifo(cmd.Dir+"/go", 0o600); err != nil {
				t.Fatal(err)
			}
			cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(pgroupBin)+":"+os.Getenv("PATH"))
			j := startJob(t, cmd)
			out, err := io.ReadAll(j.stdout)
			if err != nil || string(out) != test.want {
				t.Errorf("%q, %v; want %q", out, err, test.want)
			}
			j.wantStatus("0")
		})
	}
}

// While labelled output flows, launcher or leader is killed: nothing is left.
func TestLabelKilled(t *testing.T) {
	t.Parallel()
	for name, strike := range map[string]func(c *cell){
		"launcher": func(c *cell) { c.signal(syscall.SIGKILL) },
		"leader":   (*cell).killLeader,
	} {
		for worker, script := range map[string]string{
			"writes":  `while echo line; do :; done`,
			"ignores": `trap "" PIPE TERM; while :; do echo line; done 2>/dev/null`,
		} {
			t.Run(name+"/"+worker, func(t *testing.T) {
				t.Parallel()
				c := startCell(t, pgroupRun("-n", "3", "--label", "--grace=300ms", "--", "sh", "-c", script), noWindow, 1000)
				c.awaitUp()
				strike(c)
				if survivors, hangs := c.await(jobLimit); survivors > 0 || hangs {
					t.Errorf("something survives\n%s", c.report())
				}
			})
		}
	}
}
