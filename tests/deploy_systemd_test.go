package tests

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A manager is what a service manager is for units with Type=notify: the socket
// that NOTIFY_SOCKET names.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
	name string
}

func newManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{t: t, name: filepath.Join(t.TempDir(), "notify")}
	var err error
	if m.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.name}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.conn.Close() })
	raw, err := m.conn.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
	}
	if err != nil {
		t.Fatal(err)
	}
	m.conn.SetReadDeadline(time.Now().Add(jobLimit))
	return m
}

// want waits for the next notification, which has to be text from the process
// pid: for NotifyAccess=main, the main one.
func (m *manager) want(text string, pid int) {
	m.t.Helper()
	got, from := m.next()
	if got != text || from != pid {
		m.t.Errorf("process %d notifies %q, want process %d and %q", from, got, pid, text)
	}
}

func (m *manager) next() (text string, from int) {
	m.t.Helper()
	buf, oob := make([]byte, 1024), make([]byte, 128)
	n, oobn, _, _, err := m.conn.ReadMsgUnix(buf, oob)
	if err != nil {
		m.t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		m.t.Fatalf("credentials: %v, %v", messages, err)
	}
	cred, err := unix.ParseUnixCredentials(&messages[0])
	if err != nil {
		m.t.Fatal(err)
	}
	return string(buf[:n]), int(cred.Pid)
}

// nothingMore is for after the end of all who could notify.
func (m *manager) nothingMore() {
	m.t.Helper()
	m.conn.SetReadDeadline(time.Unix(1, 0))
	buf := make([]byte, 1024)
	if n, err := m.conn.Read(buf); err == nil {
		m.t.Errorf("more notifications: %q", buf[:n])
	}
}

// TestUnit has systemd read the unit, and does what systemd does with it.
func TestUnit(t *testing.T) {
	t.Parallel()
	if !onMachine(t) {
		return
	}
	unit := exampleText(t, "myserver.service")
	install(t, "/run/myserver.service", unit, 0o644)
	if out := wantRun(t, 0, "systemd-analyze", "verify", "--man=no", "/run/myserver.service"); strings.Contains(out, "myserver") {
		t.Errorf("systemd-analyze says %q", out)
	}
	setting := func(name string) string {
		return section(t, strings.ReplaceAll(unit, "\\\n", ""), `(?m)^`+name+`=(.*)$`)
	}
	seconds := func(text string) int {
		n, err := strconv.Atoi(strings.TrimSuffix(text, "s"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	start := strings.Fields(setting("ExecStart"))
	grace := seconds(section(t, unit, `--grace (\S+)`))
	if limit := seconds(setting("TimeoutStopSec")); limit <= 2*grace {
		t.Errorf("TimeoutStopSec is %d s, and --grace %d s", limit, grace)
	}
	if err := os.Mkdir("/run/"+setting("RuntimeDirectory"), 0o755); err != nil {
		t.Fatal(err)
	}

	m := newManager(t)
	cmd := exec.Command(start[0], start[1:]...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.name)
	j := startJob(t, cmd)
	main := cmd.Process.Pid
	m.want("READY=1", main)
	const pidfile = "/run/myserver/myserver.pid"
	was := lookAt(t, pidfile)
	reload := strings.Fields(setting("ExecReload"))
	wantRun(t, 0, reload[0], reload[1:]...)
	if now := lookAt(t, pidfile); now.launcher != main || !now.replaced(was) {
		t.Errorf("reload: %+v, before: %+v", now, was)
	}
	// KillMode=mixed.
	j.signal(unix.SIGTERM)
	j.wantStatus("0")
	m.want("STOPPING=1", main)
	m.nothingMore()
	aloneOnMachine(t)
}

// TestNotifySocket: with --ready, the launcher is who notifies the service
// manager; without it, the worker is, as if the launcher weren't there.
func TestNotifySocket(t *testing.T) {
	t.Parallel()
	for _, flags := range []string{"--ready fd", "--ready 0.1", "--ready notify"} {
		t.Run(flags, func(t *testing.T) {
			m := newManager(t)
			text := `echo "$NOTIFY_SOCKET"; `
			switch flags {
			case "--ready fd":
				text += becomesReady
			case "--ready notify":
				text += `systemd-notify --ready; `
			}
			cmd := pgroupRun(append(strings.Fields(flags), "--", "sh", "-c", text+`exec sleep 1000`)...)
			cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.name)
			j := startJob(t, cmd)
			if name := j.line(); name == m.name || (name != "") != (flags == "--ready notify") {
				t.Errorf("the worker's NOTIFY_SOCKET is %q", name)
			}
			m.want("READY=1", cmd.Process.Pid)
			j.signal(unix.SIGTERM)
			m.want("STOPPING=1", cmd.Process.Pid)
			j.wantStatus("TERM")
			m.nothingMore()
		})
	}
	t.Run("none", func(t *testing.T) {
		m := newManager(t)
		cmd := pgroupRun("--", "sh", "-c", `echo "$NOTIFY_SOCKET"; systemd-notify --ready --pid=$PGROUP_PID; exec sleep 1000`)
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.name)
		j := startJob(t, cmd)
		if name := j.line(); name != m.name {
			t.Errorf("the worker's NOTIFY_SOCKET is %q", name)
		}
		if text, _ := m.next(); text != fmt.Sprintf("READY=1\nMAINPID=%d", cmd.Process.Pid) {
			t.Errorf("the worker notifies %q", text)
		}
		j.signal(unix.SIGTERM)
		j.wantStatus("TERM")
		m.nothingMore()
	})
	t.Run("failure", func(t *testing.T) {
		m := newManager(t)
		cmd := pgroupRun("--ready", "fd", "--", "sh", "-c", "exit 3")
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.name)
		startJob(t, cmd).wantStatus("3")
		m.nothingMore()
	})
}

// TestContainer runs what the Dockerfile says, as a container's first process.
func TestContainer(t *testing.T) {
	t.Parallel()
	usedRole(t, "myserver")
	file := exampleText(t, "Dockerfile")
	list := func(name string) (args []string) {
		for _, arg := range regexp.MustCompile(`"([^"]*)"`).FindAllStringSubmatch(section(t, file, `(?m)^`+name+` \[(.*)\]$`), -1) {
			args = append(args, arg[1])
		}
		return args
	}
	entry := list("ENTRYPOINT")
	// A root of a few directories of ours, with /usr/local/bin as COPY leaves it.
	root := t.TempDir()
	enter := `
mount -n -t tmpfs none "$1"
for dir in bin lib lib64 usr/bin usr/lib usr/lib64; do
	[ -d /$dir ] || continue
	mkdir -p "$1/$dir"
	mount -n --rbind /$dir "$1/$dir"
done
mkdir -p "$1/usr/local/bin" "$1/proc" "$1/tmp" "$1/dev"
touch "$1/dev/null" "$1/usr/local/bin/pgroup"
mount -n --bind /dev/null "$1/dev/null"
mount -n --bind "$2" "$1/usr/local/bin/pgroup"
printf '%s\n' "$3" >"$1/usr/local/bin/myserver"
chmod 755 "$1/usr/local/bin/myserver"
mount -n -t proc proc "$1/proc"
cd "$1"
shift 3
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin chroot . "$@"`
	container := func(server string, cmd ...string) *job {
		args := append([]string{"--pid", "--fork", "--kill-child", "--mount", "sh", "-ec", enter, "sh", root, pgroupBin, "#!/bin/sh\n" + server}, append(entry, cmd...)...)
		if os.Getuid() != 0 {
			args = append([]string{"--map-root-user"}, args...)
		}
		return startJob(t, exec.Command("unshare", args...))
	}
	// It reaps an orphan, and hears TERM, from its first process.
	j := container(`trap 'echo stopping; exit 5' TERM
(setsid sh -c 'echo $$ >/tmp/pid' &)
until [ -s /tmp/pid ] && [ ! -e /proc/$(cat /tmp/pid) ]; do sleep 0.01; done
echo $PGROUP_PID $(cat /proc/1/comm)
kill 1
while :; do sleep 0.01; done`, list("CMD")...)
	for _, want := range []string{"1 pgroup", "stopping"} {
		if line := j.line(); line != want {
			t.Errorf("it says %q, want %q", line, want)
		}
	}
	j.wantStatus("5")
	// docker run … COMMAND: the status, and a death by signal.
	container("", "sh", "-c", "exit 7").wantStatus("7")
	container("", "sh", "-c", "kill -KILL $$").wantStatus("137")
	container("", "no-such-command").wantStatus("127")
}

// TestCIStep cancels a step of the workflow in all ways, and has it end by itself.
func TestCIStep(t *testing.T) {
	t.Parallel()
	workflow := exampleText(t, "ci.yml")
	shellLine := section(t, workflow, `(?m)^\s+run:\n\s+shell: (pgroup .*)$`)
	script := section(t, workflow, `(?s)- name: Test against the server\n\s+run: \|\n(.*)$`)
	// Not as a child: a shell that forks loses an INT at times.
	const hangs = "exec sleep 1000"
	for how, ends := range map[string]string{"0": "", "3": "exit 3", "INT": hangs, "TERM": hangs, "KILL": hangs} {
		t.Run(how, func(t *testing.T) {
			s := newService(t)
			file := func(name, text string) {
				install(t, filepath.Join(s.dir, name), text, 0o755)
			}
			file("step.sh", regexp.MustCompile(`(?m)^ +`).ReplaceAllString(script, ""))
			file("myserver", "#!/bin/sh\nsetsid sh -c 'trap \"\" INT HUP; sleep 1000; :' &\nsleep 1000\n")
			file("integration-test", "#!/bin/sh\necho up\n"+ends)
			args := strings.Fields(strings.NewReplacer("{0}", "step.sh", "--grace 2s", "--grace 0.2s").Replace(shellLine))
			cmd := exec.Command(pgroupBin, args[1:]...)
			cmd.Dir, cmd.Env = s.dir, append(os.Environ(), cellVar+"="+s.dir)
			j := startJob(t, cmd)
			if line := j.line(); line != "up" {
				t.Errorf("it says %q", line)
			}
			if sig := unix.SignalNum("SIG" + how); sig != 0 {
				j.signal(sig)
			}
			j.wantStatus(how)
			if how == "KILL" {
				eventually(t, "nothing lives", func() bool { return len(s.living()) == 0 })
			}
			s.nothingLeft()
		})
	}
}

// TestProcfile runs the line as foreman does: by a shell, with PORT set.
func TestProcfile(t *testing.T) {
	t.Parallel()
	if !onMachine(t) {
		return
	}
	line := section(t, exampleText(t, "Procfile"), `(?m)^web: (.*)$`)
	cmd := exec.Command("sh", "-c", line)
	m := newManager(t) // it is told when all are ready
	cmd.Dir, cmd.Env = "/usr/local/bin", append(os.Environ(), "PORT=8080", "NOTIFY_SOCKET="+m.name)
	j := startJob(t, cmd)
	m.want("READY=1", cmd.Process.Pid)
	if _, _, err := askHTTP(exampleAddr); err != nil {
		t.Error(err)
	}
	j.signal(unix.SIGTERM)
	j.wantStatus("0")
	aloneOnMachine(t)
}
