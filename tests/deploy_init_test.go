package tests

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestInitScript drives the LSB init script by service(8), as an administrator
// does, through all that LSB has statuses for.
func TestInitScript(t *testing.T) {
	t.Parallel()
	if !onMachine(t) {
		return
	}
	const script, pidfile = "/etc/init.d/myserver", "/run/myserver.pid"
	install(t, script, exampleText(t, "myserver.init"), 0o755)
	want := func(status int, action string) string {
		t.Helper()
		return wantRun(t, status, "service", "myserver", action)
	}

	// Not running.
	want(3, "status")
	want(0, "stop")
	want(7, "reload")
	want(7, "force-reload")
	want(0, "try-restart")
	want(2, "bogus")
	want(3, "status")

	// Running.
	if out := want(0, "start"); !strings.Contains(out, "Starting my server: myserver") {
		t.Errorf("start says %q", out)
	}
	was := lookAt(t, pidfile)
	_, err := os.Stat("/etc/default/myserver")
	if uid := procStatus(t, was.pids[1])["Uid"]; err != nil && strings.HasPrefix(uid, "0") {
		t.Errorf("the worker's users: %q", uid)
	}
	want(0, "start")
	want(0, "status")
	if out := wantRun(t, 0, "service", "--status-all"); !strings.Contains(out, "[ + ]  myserver") {
		t.Errorf("--status-all says %q", out)
	}
	if now := lookAt(t, pidfile); now.launcher != was.launcher || now.pids[1] != was.pids[1] {
		t.Errorf("a second start: %+v, before: %+v", now, was)
	}
	for _, action := range []string{"reload", "force-reload"} {
		was = lookAt(t, pidfile)
		want(0, action)
		if now := lookAt(t, pidfile); now.launcher != was.launcher || !now.replaced(was) {
			t.Errorf("%s: %+v, before: %+v", action, now, was)
		}
	}
	for _, action := range []string{"restart", "try-restart", "--full-restart"} {
		was = lookAt(t, pidfile)
		want(0, action)
		if now := lookAt(t, pidfile); now.launcher == was.launcher || !now.replaced(was) {
			t.Errorf("%s: %+v, before: %+v", action, now, was)
		}
	}

	// Dead.
	kill(t, pidIn(t, pidfile), syscall.SIGKILL)
	eventually(t, "all dead", func() bool { return len(others()) == 0 })
	want(1, "status")
	want(0, "start")
	lookAt(t, pidfile)
	want(0, "stop")
	aloneOnMachine(t)
	want(3, "status")

	// What LSB has statuses for in start.
	install(t, script, strings.Replace(exampleText(t, "myserver.init"), "--max-restarts 5", "--max-restarts 1", 1), 0o755)
	install(t, "/usr/local/bin/myserver", "#!/bin/sh\necho no such database >&2\nexit 3\n", 0o755)
	if out := want(1, "start"); !strings.Contains(out, "no such database\n") {
		t.Errorf("a start that fails says %q", out)
	}
	os.Chmod("/usr/local/bin/myserver", 0o644)
	want(5, "start")
	os.Chmod("/usr/local/bin/myserver", 0o755)
	if err != nil {
		wantRun(t, 4, "setpriv", "--reuid", "nobody", script, "start")
	}
	aloneOnMachine(t)
}

// TestOpenRC drives the OpenRC script by openrc-run and rc-service.
func TestOpenRC(t *testing.T) {
	t.Parallel()
	if !onMachine(t) {
		return
	}
	const script, pidfile = "/etc/init.d/myserver", "/run/myserver.pid"
	// What an OpenRC that has booted the machine has left: the service needs net.
	for _, dir := range strings.Fields("daemons exclusive failed hotplugged inactive init.d options scheduled started starting stopping tmp wasinactive") {
		if err := os.MkdirAll("/run/openrc/"+dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	install(t, "/run/openrc/softlevel", "default\n", 0o644)
	install(t, "/etc/init.d/lo", "#!/sbin/openrc-run\ndepend() { provide net; }\nstart() { :; }\n", 0o755)
	text := exampleText(t, "myserver.openrc")
	if _, err := os.Stat("/etc/default/myserver"); err == nil { // see layOut
		text = strings.Replace(text, "setpriv --reuid www-data --regid www-data --init-groups", "", 1)
	}
	install(t, script, text, 0o755)
	want := func(status int, action string) string {
		t.Helper()
		return wantRun(t, status, "rc-service", "myserver", action)
	}
	want(3, "status")
	want(1, "reload")
	if out := want(0, "start"); !strings.Contains(out, "Starting myserver") {
		t.Errorf("start says %q", out)
	}
	was := lookAt(t, pidfile)
	want(0, "status")
	want(0, "reload")
	now := lookAt(t, pidfile)
	if now.launcher != was.launcher || !now.replaced(was) {
		t.Errorf("reload: %+v, before: %+v", now, was)
	}
	want(0, "restart")
	if again := lookAt(t, pidfile); again.launcher == now.launcher {
		t.Errorf("restart: %+v, before: %+v", again, now)
	}
	kill(t, pidIn(t, pidfile), syscall.SIGKILL)
	eventually(t, "all dead", func() bool { return len(others()) == 0 })
	want(32, "status")
	want(0, "restart")
	lookAt(t, pidfile)
	want(0, "stop")
	aloneOnMachine(t)
	want(3, "status")
	install(t, "/usr/local/bin/myserver", "#!/bin/sh\nexit 3\n", 0o755)
	install(t, script, strings.Replace(text, "--max-restarts 5", "--max-restarts 1", 1), 0o755)
	want(1, "start")
	want(3, "status")
	aloneOnMachine(t)
}

// TestInitScriptsAreLinted has shellcheck read the scripts, and lintian a package
// that has them.
func TestInitScriptsAreLinted(t *testing.T) {
	t.Parallel()
	wantRun(t, 0, "shellcheck", "-s", "sh", example(t, "myserver.init"), example(t, "myserver.openrc"))

	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	for name, file := range map[string]struct {
		text string
		mode os.FileMode
	}{
		"etc/init.d/myserver":                 {exampleText(t, "myserver.init"), 0o755},
		"lib/systemd/system/myserver.service": {exampleText(t, "myserver.service"), 0o644},
		"etc/logrotate.d/myserver":            {exampleText(t, "myserver.logrotate"), 0o644},
		"DEBIAN/conffiles":                    {"/etc/init.d/myserver\n/etc/logrotate.d/myserver\n", 0o644},
		"DEBIAN/control": {`Package: myserver
Version: 1
Architecture: all
Maintainer: Nobody <nobody@example.com>
Description: my server
 It serves.
`, 0o644},
		"DEBIAN/postinst": {"#!/bin/sh\nset -e\nupdate-rc.d myserver defaults >/dev/null\n", 0o755},
		"DEBIAN/postrm":   {"#!/bin/sh\nset -e\n[ \"$1\" != purge ] || update-rc.d myserver remove >/dev/null\n", 0o755},
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		install(t, path, file.text, file.mode)
	}
	deb := filepath.Join(dir, "myserver.deb")
	wantRun(t, 0, "dpkg-deb", "--root-owner-group", "--build", root, deb)
	lint := func() string {
		return wantRun(t, 0, "lintian", "--allow-root", "--fail-on", "none", "--display-info", "--pedantic", "--check-part", "init-d,systemd,scripts", deb)
	}
	if out := lint(); out != "" {
		t.Errorf("lintian says\n%s", out)
	}
	// It does read the script.
	broken := strings.Replace(exampleText(t, "myserver.init"), "# Required-Start:", "# Required-Begin:", 1)
	install(t, filepath.Join(root, "etc/init.d/myserver"), broken, 0o755)
	wantRun(t, 0, "dpkg-deb", "--root-owner-group", "--build", root, deb)
	if out := lint(); !strings.Contains(out, "init.d-script-missing-lsb-keyword") {
		t.Errorf("of a broken script, lintian says\n%q", out)
	}
}

// TestOtherStoppers stops a service with what knows its pid file and nothing of
// pgroup. Nothing lives when they say that the process has ended.
func TestOtherStoppers(t *testing.T) {
	t.Parallel()
	stubborn := `(trap '' TERM; setsid sh -c 'trap "" TERM; sleep 1000; :' & sleep 1000 &); ` + serves
	for _, test := range []struct{ name, running, stop string }{
		{"start-stop-daemon", "start-stop-daemon --status --pidfile x.pid", "start-stop-daemon --stop --quiet --retry TERM/30/KILL/5 --pidfile x.pid"},
		{"kill", "kill -0 $(cat x.pid)", "pid=$(cat x.pid); kill $pid; while kill -0 $pid 2>/dev/null; do sleep 0.02; done"},
		{"pkill", "pgrep --pidfile x.pid", "pid=$(cat x.pid); pkill --pidfile x.pid; tail --pid=$pid -s 0.02 -f /dev/null"},
		{"lsb", ". /lib/lsb/init-functions; pidofproc -p $PWD/x.pid pgroup", ". /lib/lsb/init-functions; killproc -p $PWD/x.pid pgroup"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			do := func(text string) int {
				cmd := exec.Command("sh", "-c", text)
				cmd.Dir = s.dir
				out, _ := cmd.CombinedOutput()
				t.Logf("%s: %s", text, out)
				return cmd.ProcessState.ExitCode()
			}
			s.want(0, "start", shell(stubborn, "--ready", "fd", "-g", "0.2")...)
			if status := do(test.running); status != 0 {
				t.Errorf("of a running service, it ends with %d", status)
			}
			if status := do(test.stop); status != 0 {
				t.Errorf("its stop ends with %d", status)
			}
			s.nothingLeft()
			s.noFiles()
			if status := do(test.running); status == 0 {
				t.Error("of a stopped service, it ends with 0")
			}
			s.want(3, "status")
		})
	}
}

// TestMonit has monit start the service, and start it again when its launcher was
// killed.
func TestMonit(t *testing.T) {
	t.Parallel()
	if !onMachine(t) {
		return
	}
	const pidfile = "/run/myserver.pid"
	install(t, "/etc/init.d/myserver", exampleText(t, "myserver.init"), 0o755)
	install(t, "/run/myserver.monit", exampleText(t, "myserver.monit"), 0o600)
	install(t, "/run/monitrc", "set daemon 1\nset idfile /run/monit.id\nset statefile /run/monit.state\nset pidfile /run/monit.pid\ninclude /run/myserver.monit\n", 0o600)
	if out := wantRun(t, 0, "monit", "-t", "-c", "/run/monitrc"); !strings.Contains(out, "syntax OK") {
		t.Errorf("monit says %q", out)
	}
	monit := startJob(t, exec.Command("monit", "-I", "-c", "/run/monitrc"))
	for range 2 { // started, and started again
		for !strings.Contains(monit.line(), "'myserver' process is running with pid") {
		}
		kill(t, lookAt(t, pidfile).launcher, syscall.SIGKILL)
	}
	monit.signal(syscall.SIGTERM)
	monit.wantStatus("0")
}

// TestLogrotate rotates the log that a service writes to.
func TestLogrotate(t *testing.T) {
	t.Parallel()
	if !onMachine(t) {
		return
	}
	const log = "/var/log/myserver.log"
	install(t, "/run/logrotate", exampleText(t, "myserver.logrotate"), 0o644)
	install(t, "/etc/init.d/myserver", exampleText(t, "myserver.init"), 0o755)
	wantRun(t, 0, "service", "myserver", "start")
	text := func(name string) string {
		b, _ := os.ReadFile(name)
		return string(b)
	}
	eventually(t, "both are up", func() bool { return text(log) == "up\nup\n" })
	wantRun(t, 0, "logrotate", "--force", "--state", "/run/logrotate.state", "/run/logrotate")
	if text(log) != "" || text(log+".1") != "up\nup\n" {
		t.Errorf("after the rotation: %q and %q", text(log), text(log+".1"))
	}
	wantRun(t, 0, "service", "myserver", "reload")
	// At the start of the file, and not after a hole.
	eventually(t, "a new one is up", func() bool { return strings.HasPrefix(text(log), "up\n") })
	wantRun(t, 0, "service", "myserver", "stop")
}
