//go:build unix

package paths

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Trusted reports whether a peer of this uid may connect to a master: this user, and root, who could do so anyway.
func Trusted(uid int) bool { return uid == 0 || uid == os.Geteuid() }

// CheckDir reports why a directory can't be trusted with sockets or state: it must be an absolute path to a directory,
// not to a symbolic link, that belongs to this user and is closed to all others, and none of its parents may let
// everybody rename what is in it. The error wraps os.ErrNotExist if there is none.
func CheckDir(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("%q: not an absolute path", dir)
	}
	dir = filepath.Clean(dir)
	fi, err := os.Lstat(dir)
	switch {
	case err != nil:
		return err
	case fi.Mode()&fs.ModeSymlink != 0:
		return fmt.Errorf("%s is a symbolic link: remove it", dir)
	case !fi.IsDir():
		return fmt.Errorf("%s is not a directory: remove it", dir)
	case owner(fi) != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, not to uid %d", dir, owner(fi), os.Geteuid())
	case fi.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s is open to others (mode %04o): chmod 700 %s", dir, fi.Mode().Perm(), dir)
	}
	return CheckParents(filepath.Dir(dir))
}

// CheckParents refuses a directory if it, or one above it, is writable by everybody without the sticky bit: what is made in it
// would not pass CheckDir.
func CheckParents(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	for {
		fi, err := os.Lstat(dir)
		if err != nil {
			return err
		}
		if fi.Mode()&0o002 != 0 && fi.Mode()&fs.ModeSticky == 0 {
			return fmt.Errorf("%s is writable by everybody: chmod o-w %s", dir, dir)
		}
		up := filepath.Dir(dir)
		if up == dir {
			return nil
		}
		dir = up
	}
}

// makeDir creates a directory of mode 0700, and its parents. It creates nothing in a directory of another user than
// this one or root, which matters to root: it could.
func makeDir(dir string) error {
	switch err := CheckDir(dir); {
	case err == nil:
		return nil
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	parent := filepath.Dir(dir)
	fi, err := os.Stat(parent)
	for errors.Is(err, os.ErrNotExist) && parent != filepath.Dir(parent) {
		parent = filepath.Dir(parent)
		fi, err = os.Stat(parent)
	}
	switch {
	case err != nil:
		return err
	case !Trusted(owner(fi)):
		return fmt.Errorf("can't create %s: %s belongs to uid %d", dir, parent, owner(fi))
	}
	if err := CheckParents(parent); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return CheckDir(dir)
}

// usableRuntime reports whether the sockets' directory in dir can be used, or made: dir is this user's own directory.
func usableRuntime(dir string) bool {
	fi, err := os.Stat(dir)
	if err != nil || !fi.IsDir() || owner(fi) != os.Geteuid() || fi.Mode().Perm()&0o300 != 0o300 {
		return false
	}
	err = CheckDir(filepath.Join(dir, "muxproxy"))
	return err == nil || errors.Is(err, os.ErrNotExist) && CheckParents(dir) == nil
}

// checkHome finds HOME to be this user's. One that does not exist belongs to nobody.
func checkHome(home string) error {
	fi, err := os.Stat(home)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case owner(fi) != os.Geteuid():
		return fmt.Errorf("%w: %s is owned by uid %d, this is uid %d; do it as that user, without sudo", ErrForeignHome, home, owner(fi), os.Geteuid())
	}
	return nil
}

// owner is the uid a file belongs to, or -1.
func owner(fi os.FileInfo) int {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return -1
	}
	return int(st.Uid)
}
