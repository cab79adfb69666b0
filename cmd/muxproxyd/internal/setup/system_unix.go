//go:build unix

package setup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ownerLinks returns the uid that a file belongs to, -1 if that is not known, and how many names it has.
func ownerLinks(info fs.FileInfo) (uid int, links uint64) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return -1, 1
	}
	return int(st.Uid), uint64(st.Nlink)
}

// access says why this process can't make files in a directory; its mode is not all there is (read-only file systems).
func access(dir string) error { return unix.Access(dir, unix.W_OK|unix.X_OK) }

// sameOwner gives a file the owner and group of another.
func sameOwner(f *os.File, as fs.FileInfo) error {
	st, ok := as.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	if err := f.Chown(int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("its group can't be kept: %w", err)
	}
	return nil
}

// syncDir makes a rename outlast a crash. Some file systems know no such thing.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	return nil
}
