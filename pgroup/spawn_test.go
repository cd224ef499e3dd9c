package pgroup

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for _, sub := range []string{"plain", "prog", "dir/x"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, sub, "x")), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/plain/x", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/prog/x", nil, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir + "/prog")
	for _, test := range []struct {
		name, path, want string
		err              error
	}{
		{"x", dir + "/plain:" + dir + "/prog", dir + "/prog/x", nil},
		{"x", dir + "/plain", "", unix.EACCES},
		{"x", dir + "/dir", "", unix.EACCES},
		{"x", dir + "/none", "", unix.ENOENT},
		{"x", "", "./x", nil},
		{"x", dir + "/none:", "./x", nil},
		{"", dir + "/prog", "", unix.ENOENT},
		{"none/x", dir + "/prog", "none/x", nil},
	} {
		got, err := lookPath(test.name, []string{"PATH=" + test.path}, "")
		if got != test.want || err != test.err {
			t.Errorf("lookPath(%q) in %q = %q, %v; want %q, %v", test.name, test.path, got, err, test.want, test.err)
		}
	}
	t.Chdir("/")
	if got, err := lookPath("x", []string{"PATH=../plain:."}, dir+"/prog"); got != "./x" || err != nil {
		t.Errorf("lookPath relative to another directory = %q, %v", got, err)
	}
	if got, err := lookPath("sh", nil, ""); err != nil || got != "/bin/sh" {
		t.Errorf("lookPath without PATH = %q, %v", got, err)
	}
}
