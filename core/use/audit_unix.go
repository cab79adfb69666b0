//go:build unix

package use

import (
	"os"

	"golang.org/x/sys/unix"
)

const openFilesCantMove = false

// openAppend opens the log for appending. O_NONBLOCK keeps a FIFO in its place from blocking the open.
func openAppend(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
}

func lockFile(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			return err
		}
	}
}

// openState opens a file that only this user writes, for reading.
func openState(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}
