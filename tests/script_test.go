package tests

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// Each file in testdata is about one subject. The commands that run something
// are these instead of testscript's exec. STATUS is an exit status, or the
// name of the signal that killed; COMMAND is looked up, and may have
// assignments before it, as env(1) does it.
//
//	status STATUS COMMAND ARG…  run it: it ends so; stdout and stderr apply
//	fails STATUS REGEXP ARG…    run `pgroup run ARG…`: it writes nothing but
//	                            one line "pgroup: …", in which REGEXP matches
//	start NAME COMMAND ARG…     start it, with its output in NAME.out and NAME.err
//	signal NAME SIGNAL          send it a signal
//	ended NAME STATUS           wait for its end: it ends so
//	await FILE REGEXP           wait until REGEXP matches in the file
func TestScript(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:                "testdata",
		RequireUniqueNames: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", filepath.Dir(pgroupBin)+":"+env.Getenv("PATH"))
			// A user of pgroup has no GOTRACEBACK.
			vars := slices.DeleteFunc(slices.Clone(env.Vars), func(v string) bool { return strings.HasPrefix(v, "GOTRACEBACK=") })
			env.Values[scriptKey{}] = &script{env: vars, started: map[string]*exec.Cmd{}}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status": scriptCommand((*script).status),
			"fails":  scriptCommand((*script).fails),
			"start":  scriptCommand((*script).start),
			"signal": scriptCommand((*script).signal),
			"ended":  scriptCommand((*script).ended),
			"await":  scriptCommand((*script).await),
		},
	})
}

// A script is what the commands know of the script that they are in.
type script struct {
	*testscript.TestScript
	env     []string
	started map[string]*exec.Cmd
}

// scriptKey is the key of a script among testscript's values.
type scriptKey struct{}

// scriptCommand makes a command of testscript of a method with two arguments
// and more.
func scriptCommand(command func(s *script, first, second string, args []string)) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) < 2 {
			ts.Fatalf("usage: see TestScript")
		}
		s := ts.Value(scriptKey{}).(*script)
		s.TestScript = ts
		command(s, args[0], args[1], args[2:])
	}
}

func (s *script) start(name, command string, args []string) {
	cmd := exec.Command("env", append([]string{command}, args...)...)
	cmd.Dir = s.MkAbs(".")
	cmd.Env = s.env
	out, err := os.Create(s.MkAbs(name + ".out"))
	s.Check(err)
	defer out.Close()
	errs, err := os.Create(s.MkAbs(name + ".err"))
	s.Check(err)
	defer errs.Close()
	cmd.Stdout, cmd.Stderr = out, errs
	s.Check(cmd.Start())
	s.started[name] = cmd
	kill := time.AfterFunc(jobLimit, func() { cmd.Process.Kill() })
	s.Defer(func() {
		kill.Stop()
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
}

func (s *script) ended(name, want string, _ []string) {
	cmd := s.command(name)
	cmd.Wait() // what is wrong, the status says
	io.WriteString(s.Stdout(), s.ReadFile(name+".out"))
	io.WriteString(s.Stderr(), s.ReadFile(name+".err"))
	if got := statusOf(cmd.ProcessState); got != want {
		s.Fatalf("status %s, want %s", got, want)
	}
}

func (s *script) command(name string) *exec.Cmd {
	cmd := s.started[name]
	if cmd == nil {
		s.Fatalf("no command %q was started", name)
	}
	return cmd
}

// foreground is the name of what status and fails run.
func (s *script) foreground() string {
	return filepath.Join(s.Getenv("WORK"), ".tmp", "foreground")
}

func (s *script) status(want, command string, args []string) {
	s.start(s.foreground(), command, args)
	s.ended(s.foreground(), want, nil)
}

func (s *script) fails(want, pattern string, args []string) {
	s.status(want, "pgroup", append([]string{"run"}, args...))
	stdout, stderr := s.ReadFile(s.foreground()+".out"), s.ReadFile(s.foreground()+".err")
	if line, rest, _ := strings.Cut(stderr, "\n"); stdout != "" || rest != "" || !strings.HasPrefix(line, "pgroup: ") {
		s.Fatalf("it wrote %q and, on standard error, %q; want only one line there that says pgroup: …", stdout, stderr)
	}
	if !regexp.MustCompile(pattern).MatchString(stderr) {
		s.Fatalf("%q doesn't match %q", stderr, pattern)
	}
}

func (s *script) signal(name, sig string, _ []string) {
	number := unix.SignalNum("SIG" + sig)
	if n, err := strconv.Atoi(sig); err == nil {
		number = syscall.Signal(n)
	}
	s.Check(s.command(name).Process.Signal(number))
}

func (s *script) await(file, pattern string, _ []string) {
	re := regexp.MustCompile("(?m)" + pattern)
	for deadline := time.Now().Add(jobLimit); ; time.Sleep(2 * time.Millisecond) {
		text, _ := os.ReadFile(s.MkAbs(file))
		if re.Match(text) {
			return
		}
		if time.Now().After(deadline) {
			s.Fatalf("%s is %q, and nothing matches %q", file, text, pattern)
		}
	}
}
