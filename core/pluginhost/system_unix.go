//go:build unix

package pluginhost

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// sessionOf returns the session of a process.
func sessionOf(pid int) (int, error) {
	if pid <= 0 { // 0 would be this process; a peer in another pid namespace has none
		return 0, unix.ESRCH
	}
	return unix.Getsid(pid)
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
