//go:build unix

package paths

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// ReadTrusted reads a file that others must not be able to change: a regular one of at most max bytes, which belongs to
// this user or root and is writable by its owner only (as ssh wants of its own, see read_config_file_depth of OpenSSH's
// readconf.c), in a directory of which the same holds, but for its group. A symbolic link is followed if those two own
// it. The error wraps os.ErrNotExist if there is none.
func ReadTrusted(path string, max int64) ([]byte, error) {
	real, err := resolveTrusted(path)
	if err != nil {
		return nil, err
	}
	// Without O_NONBLOCK a fifo would wait for its writer. The rest is asked of what was opened.
	f, err := os.OpenFile(real, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err == nil {
		err = checkFile(path, fi)
	}
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(text)) > max {
		return nil, fmt.Errorf("%s is longer than %d bytes", path, max)
	}
	return text, nil
}

// CheckFile reports why others could change a file, or put another in its place, by the rules of ReadTrusted. The error
// wraps os.ErrNotExist if there is none.
func CheckFile(path string) error {
	real, err := resolveTrusted(path)
	if err != nil {
		return err
	}
	fi, err := os.Stat(real)
	if err != nil {
		return err
	}
	return checkFile(path, fi)
}

// resolveTrusted follows the symbolic links of a path, all of it in directories where nobody else can put another file.
func resolveTrusted(path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("%q: not an absolute path", path)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	for _, p := range []string{path, real} {
		fi, err := os.Lstat(p)
		if err != nil {
			return "", err
		}
		dir, err := os.Stat(filepath.Dir(p))
		if err != nil {
			return "", err
		}
		switch {
		case !Trusted(owner(fi)):
			return "", fmt.Errorf("%s belongs to uid %d, not to uid %d", p, owner(fi), os.Geteuid())
		case !Trusted(owner(dir)):
			return "", fmt.Errorf("%s belongs to uid %d, not to uid %d", filepath.Dir(p), owner(dir), os.Geteuid())
		}
		if err := CheckParents(filepath.Dir(p)); err != nil {
			return "", err
		}
	}
	return real, nil
}

// checkFile judges what was found at path.
func checkFile(path string, fi os.FileInfo) error {
	switch {
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", path)
	case !Trusted(owner(fi)):
		return fmt.Errorf("%s belongs to uid %d, not to uid %d", path, owner(fi), os.Geteuid())
	case fi.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s is writable by others (mode %04o): chmod go-w %s", path, fi.Mode().Perm(), path)
	}
	return nil
}
