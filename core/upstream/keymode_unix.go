//go:build unix

package upstream

import (
	"errors"
	"os"
	"syscall"
)

// checkKeyMode is ssh's own test of a private key (sshkey_perm_ok of authfile.c): a file of this user must be closed to all
// others.
func checkKeyMode(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) == os.Getuid() && info.Mode().Perm()&0o077 != 0 {
		return errors.New("others can read it; chmod 600 it")
	}
	return nil
}

// inode tells a file from one that took its name.
func inode(info os.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return uint64(st.Ino)
	}
	return 0
}
