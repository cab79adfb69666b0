package paths

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Alive reports whether a process runs. One that nobody has waited for yet has ended all the same, which kill(2) would
// not tell: init may take its time.
func Alive(pid int) bool {
	if pid <= 0 {
		return false
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ENOSYS) { // before Linux 5.3
		return !errors.Is(unix.Kill(pid, 0), unix.ESRCH)
	}
	if err != nil {
		return !errors.Is(err, unix.ESRCH)
	}
	defer unix.Close(fd)
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return n == 0 || err != nil // readable once it has ended, pidfd_open(2)
}
