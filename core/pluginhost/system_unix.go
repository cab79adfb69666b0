//go:build unix

package pluginhost

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/paths"
)

// sessionOf returns the session of a process.
func sessionOf(pid int) (int, error) {
	if pid <= 0 { // 0 would be this process; a peer in another pid namespace has none
		return 0, unix.ESRCH
	}
	return unix.Getsid(pid)
}

// onlyMine reports whether nobody but this user and root can change a file.
func onlyMine(path string, fi fs.FileInfo) error {
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || !paths.Trusted(int(st.Uid)) {
		return fmt.Errorf("%s belongs to another user", path)
	}
	if fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s can be changed by others (mode %04o): chmod go-w %s", path, fi.Mode().Perm(), path)
	}
	return nil
}

// shortDir is a directory with a short path for a runtime directory with a long one, the same each time.
func shortDir(long string) (string, error) {
	sum := sha256.Sum256([]byte(long))
	dir := filepath.Join("/tmp", fmt.Sprintf("muxproxy-%d-%x", os.Geteuid(), sum[:4]))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return dir, nil // the caller checks whose it is
}
