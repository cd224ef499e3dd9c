package pidfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// nobody is an ordinary user.
const nobody = 65534

// tree returns the files below dir with their modes and texts.
func tree(t *testing.T, dir string) string {
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		b.WriteString(path + " " + info.Mode().String())
		if info.Mode().IsRegular() {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			b.Write(text)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestRefused(t *testing.T) {
	dir := private(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	mkdir := func(name string, mode uint32) {
		t.Helper()
		must(os.Mkdir(in(name), 0o700))
		must(syscall.Chmod(in(name), mode))
		write(t, in(name+"/pid"), "77\n")
	}
	write(t, in("file"), "77\n")
	must(os.Symlink("file", in("link")))
	must(os.Symlink("nothing", in("dangling")))
	must(unix.Mkfifo(in("fifo"), 0o600))
	write(t, in("two"), "77\n")
	must(os.Link(in("two"), in("names")))
	for name, mode := range map[string]uint32{"group": 0o664, "other": 0o646} {
		write(t, in(name), "77\n")
		must(syscall.Chmod(in(name), mode))
	}
	mkdir("opendir", 0o777)
	mkdir("groupdir", 0o775)
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(err)
	defer unix.Close(socket)
	must(os.Chmod(dir, 0o700))
	t.Chdir(dir) // the path of a socket is short
	must(unix.Bind(socket, &unix.SockaddrUnix{Name: "socket"}))

	type refusal struct{ path, why string }
	refusals := []refusal{
		{"", "the path is empty"},
		{dir, "is a directory"},
		{dir + "/", "is a directory"},
		{".", "is a directory"},
		{dir + "/file/", "is a directory"},
		{dir + "/opendir/..", "is a directory"},
		{in("file/pid"), "make its directory first"},
		{"a\x00b", "NUL byte"},
		{in(strings.Repeat("x", 256)), "a name may have 255 bytes"},
		{strings.Repeat("./", 2100) + "pid", "a name may have 255 bytes, a path 4095"},
		{in("link"), "symbolic link"},
		{in("dangling"), "symbolic link"},
		{in("fifo"), "not a regular file"},
		{in("socket"), "not a regular file"},
		{"/dev/null", "not a regular file"},
		{in("two"), "has 2 names"},
		{in("group"), "others may write to it (mode 0664)"},
		{in("other"), "others may write to it (mode 0646)"},
		{in("opendir/pid"), "others may write to its directory (mode 0777)"},
		{in("opendir/new"), "others may write to its directory (mode 0777)"},
		{in("groupdir/pid"), "others may write to its directory (mode 0775)"},
		{in("groupdir/new"), "others may write to its directory (mode 0775)"},
	}
	if os.Getuid() == 0 { // only root can give files away
		write(t, in("foreign"), "77\n")
		mkdir("foreigndir", 0o755)
		mkdir("stickydir", 0o1777)
		for _, name := range []string{"foreign", "foreigndir", "stickydir/pid"} {
			must(os.Chown(in(name), nobody, nobody))
		}
		refusals = append(refusals,
			refusal{in("foreign"), "belongs to uid 65534"},
			refusal{in("foreigndir/pid"), "its directory belongs to uid 65534"},
			refusal{in("foreigndir/new"), "its directory belongs to uid 65534"},
			refusal{in("stickydir/pid"), "belongs to uid 65534"})
	}
	before := tree(t, dir)
	for _, test := range refusals {
		_, createErr := Create(test.path)
		_, findErr := Find(test.path)
		for _, err := range []error{createErr, findErr} {
			var pathErr *fs.PathError
			if !errors.As(err, &pathErr) || pathErr.Path != test.path || !strings.Contains(pathErr.Err.Error(), test.why) {
				t.Errorf("%.80q: %v, want %q", test.path, err, test.why)
			}
			if errors.Is(err, ErrNotRunning) || errors.Is(err, ErrStale) {
				t.Errorf("%.80q: %v is a state", test.path, err)
			}
		}
	}
	if after := tree(t, dir); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if _, err := Create(in("no/pid")); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "make its directory first") {
		t.Errorf("Create in no directory: %v", err)
	}
	if _, err := Find(in("no/pid")); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Find in no directory: %v", err)
	}
}

func TestAllowed(t *testing.T) {
	dir := private(t)
	sticky := filepath.Join(dir, "tmp")
	if err := os.Mkdir(sticky, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(sticky, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "var-run")
	if err := os.Symlink(sticky, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{
		filepath.Join(sticky, "pid"),
		filepath.Join(link, "pid"), // as /var/run is one
		filepath.Join(sticky, strings.Repeat("x", 255)),
		filepath.Join(sticky, "a b\n\"é"),
	} {
		remove(t, create(t, path))
	}
}

func TestFullDisk(t *testing.T) {
	if !inside(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}) {
		return
	}
	dir := private(t)
	mount(t, "tmpfs", dir, 0, "size=4k,mode=700")
	path := filepath.Join(dir, "pid")
	full := filepath.Join(dir, "full")
	write(t, full, "full")
	for range 2 {
		_, err := Create(path)
		if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "make room") {
			t.Errorf("Create on a full disk: %v", err)
		}
		if _, err := Find(path); !errors.Is(err, ErrNotRunning) {
			t.Errorf("Find on a full disk: %v", err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	// A stale file that fills the disk itself.
	write(t, path, "77\n")
	remove(t, create(t, path))

	// One whose room is taken once it is empty.
	write(t, path, "77\n")
	step = func(name string) {
		if name == "emptied" {
			write(t, full, "full")
		}
	}
	defer func() { step = func(string) {} }()
	if _, err := Create(path); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Create on a disk that fills: %v", err)
	}
	if _, err := Find(path); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Find on a disk that filled: %v", err)
	}
}

func TestReadOnly(t *testing.T) {
	if !inside(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}) {
		return
	}
	dir := private(t)
	mount(t, "tmpfs", dir, 0, "mode=700")
	path := filepath.Join(dir, "pid")
	write(t, path, "77\n")
	remount := func(flags uintptr) {
		t.Helper()
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	remount(unix.MS_RDONLY)
	for _, path := range []string{path, filepath.Join(dir, "new")} {
		if _, err := Create(path); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "/run") {
			t.Errorf("Create: %v", err)
		}
	}
	if _, err := Find(path); !errors.Is(err, ErrStale) {
		t.Errorf("Find: %v", err)
	}
	remount(0)
	remove(t, create(t, path))
}

// An ordinary user among root's files.
func TestOrdinaryUser(t *testing.T) {
	if os.Getuid() != 0 && os.Getenv(insideVar) == "" {
		t.Skip("needs root, to become somebody else; the other tests run as an ordinary user now")
	}
	dir := os.Getenv("PIDFILE_TEST_DIR")
	if dir == "" {
		dir = private(t)
		for _, d := range []string{dir, filepath.Dir(dir), filepath.Dir(filepath.Dir(dir))} {
			if err := os.Chmod(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		home := filepath.Join(dir, "home")
		if err := errors.Join(os.Mkdir(home, 0o755), os.Chown(home, nobody, nobody)); err != nil {
			t.Fatal(err)
		}
		hold(t, filepath.Join(dir, "held"))
		write(t, filepath.Join(dir, "stale"), "77\n")
		inside(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}, "PIDFILE_TEST_DIR="+dir)
		if _, err := Find(filepath.Join(home, "pid")); err == nil || !strings.Contains(err.Error(), "directory belongs to uid 65534") {
			t.Errorf("root's Find of an ordinary user's file: %v", err)
		}
		return
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	if os.Geteuid() != nobody {
		t.Fatalf("uid %d", os.Geteuid())
	}
	h := find(t, in("held"))
	if h.Gone() || pidText(h.PID) != read(t, in("held")) {
		t.Errorf("Find of root's file: pid %d, gone %v", h.PID, h.Gone())
	}
	if err := h.Signal(syscall.SIGTERM); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "as root") {
		t.Errorf("Signal to root's process: %v", err)
	}
	if _, err := Find(in("stale")); !errors.Is(err, ErrStale) {
		t.Errorf("Find of root's stale file: %v", err)
	}
	for name, why := range map[string]string{"held": "belongs to uid 0", "stale": "belongs to uid 0", "new": "be a user who may"} {
		if _, err := Create(in(name)); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("Create of %s in root's directory: %v, want %q", name, err, why)
		}
	}
	f := create(t, in("home/pid"))
	if h := find(t, in("home/pid")); h.PID != os.Getpid() {
		t.Errorf("Find: pid %d", h.PID)
	}
	var held *HeldError
	if _, err := Create(in("home/pid")); !errors.As(err, &held) || held.PID != os.Getpid() {
		t.Errorf("Create of a held file: %v", err)
	}
	// Where it can't remove the file, it lets go of it all the same.
	if err := os.Chmod(in("home"), 0o555); err != nil {
		t.Fatal(err)
	}
	if err := f.Remove(); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Remove in a directory without write permission: %v", err)
	}
	if _, err := Find(in("home/pid")); !errors.Is(err, ErrStale) {
		t.Errorf("Find: %v", err)
	}
	if err := os.Chmod(in("home"), 0o755); err != nil {
		t.Fatal(err)
	}
	remove(t, create(t, in("home/pid")))
	write(t, in("home/pid"), "77\n")
	if err := os.Chmod(in("home/pid"), 0o444); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(in("home/pid")); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Create of a read-only file: %v", err)
	}
	if err := os.Chmod(in("home/pid"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(in("home/pid")); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Find of an unreadable file: %v", err)
	}
}
