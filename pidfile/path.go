package pidfile

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

// errChanging is met when others make, take over or remove the file at the same
// time: look again.
var errChanging = errors.New("keeps changing: who else makes and removes it?")

// A place is where a pid file is, or will be.
type place struct {
	path string // as the caller gave it, for messages
	dir  int    // stays the same wherever the process or the directory moves
	name string
}

// openPlace opens the directory, if only those may write to it whom we trust:
// who may rename a file there has a say in which pid is signalled.
func openPlace(path string) (p place, err error) {
	slash := strings.LastIndexByte(path, '/')
	dir, name := path[:slash+1], path[slash+1:]
	switch {
	case path == "":
		return p, errors.New("the path is empty")
	case strings.IndexByte(path, 0) >= 0:
		return p, errors.New("there is a NUL byte in the path")
	case name == "" || name == "." || name == "..":
		return p, errDirectory
	case dir == "":
		dir = "."
	}
	fd := -1
	err = retry(func() (err error) {
		fd, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return p, err
	}
	p = place{path: path, dir: fd, name: name}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		err = checkDir(&st)
	}
	if err != nil {
		p.close()
	}
	return p, err
}

func (p place) close() { unix.Close(p.dir) }

var errDirectory = errors.New("is a directory: name a file")

func checkDir(st *unix.Stat_t) error {
	if st.Uid != 0 && int(st.Uid) != unix.Geteuid() {
		return fmt.Errorf("its directory belongs to uid %d, who could replace it: be that user, or use a directory of your own or root's", st.Uid)
	}
	if st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
		return fmt.Errorf("others may write to its directory (mode %04o) and could replace it: chmod go-w the directory, or use another", st.Mode&0o7777)
	}
	return nil
}

// checkFile refuses what is not a file of ours or, if only to be looked at,
// root's. It must have no other name: in a sticky directory anybody may be able
// to link a file of ours there, for us to overwrite.
func checkFile(st *unix.Stat_t, look bool) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFLNK:
		return errors.New("is a symbolic link: name what it points to, or remove it")
	case unix.S_IFDIR:
		return errDirectory
	default:
		return errors.New("is not a regular file: choose another")
	}
	switch {
	case int(st.Uid) != unix.Geteuid() && !(look && st.Uid == 0):
		return fmt.Errorf("belongs to uid %d: be that user, or choose another file", st.Uid)
	case st.Mode&0o022 != 0:
		return fmt.Errorf("others may write to it (mode %04o): chmod go-w it, or choose another", st.Mode&0o7777)
	case st.Nlink > 1:
		return fmt.Errorf("has %d names (hard links): remove the others, or choose another", st.Nlink)
	}
	return nil
}

// open opens the file if it is there and in order. It looks first: to open a FIFO
// or a device may do something.
func (p place) open(mode int) (fd int, err error) {
	var st unix.Stat_t
	if err := p.stat(&st); err != nil {
		return -1, err
	}
	if err := checkFile(&st, mode == unix.O_RDONLY); err != nil {
		return -1, err
	}
	fd, err = p.openat(mode)
	if err == unix.ENOENT || err == unix.ELOOP {
		return -1, errChanging
	}
	if err == nil && !isFile(fd, &st) {
		unix.Close(fd)
		return -1, errChanging
	}
	return fd, err
}

// create makes the file, which wasn't there.
func (p place) create() (fd int, err error) {
	fd, err = p.openat(unix.O_RDWR | unix.O_CREAT | unix.O_EXCL)
	if err == unix.EEXIST {
		err = errChanging
	}
	return fd, err
}

func (p place) openat(flags int) (fd int, err error) {
	err = retry(func() (err error) {
		flags |= unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
		fd, err = unix.Openat(p.dir, p.name, flags, 0o644)
		return err
	})
	return fd, err
}

func (p place) stat(st *unix.Stat_t) error {
	return unix.Fstatat(p.dir, p.name, st, unix.AT_SYMLINK_NOFOLLOW)
}

// has reports whether fd is what the path names now.
func (p place) has(fd int) bool {
	var st unix.Stat_t
	return p.stat(&st) == nil && isFile(fd, &st)
}

// isFile reports whether fd is the file of st. While fd is open no other file is
// given its inode number.
func isFile(fd int, st *unix.Stat_t) bool {
	var now unix.Stat_t
	return unix.Fstat(fd, &now) == nil && now.Dev == st.Dev && now.Ino == st.Ino
}

// advice says what to do about an error number that doesn't say it.
var advice = []struct {
	err error
	do  string
}{
	{unix.ENOENT, "make its directory first"},
	{unix.ENOTDIR, "make its directory first"},
	{unix.EACCES, "be a user who may, or use another directory"},
	{unix.EROFS, "use a directory on another file system, as /run"},
	{unix.ENOSPC, "make room, or use another file system"},
	{unix.EDQUOT, "make room, or use another file system"},
	{unix.ENAMETOOLONG, "a name may have 255 bytes, a path 4095"},
	{unix.ENOLCK, "the file system must have locks: use another, as /run"},
}

func pathError(op, path string, err error) error {
	for _, a := range advice {
		if err == a.err {
			err = fmt.Errorf("%w: %s", err, a.do)
		}
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}
