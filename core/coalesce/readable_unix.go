//go:build unix

package coalesce

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// readable returns what waits until c has something to read or has ended; nil if c has no file descriptor to look at.
func readable(c net.Conn) func() {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	fds := []unix.PollFd{{Events: unix.POLLIN}}
	look := func(fd uintptr) bool {
		fds[0].Fd = int32(fd)
		n, err := unix.Poll(fds, 0)
		return n != 0 || err != nil
	}
	return func() { _ = raw.Read(look) } // the read that comes next has the same error
}
