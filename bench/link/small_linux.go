package link

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// mss is Ethernet's. Loopback's, 64 KiB, is more than a small buffer holds, and TCP waits for windows that large.
const mss = 1460

// small bounds what the kernel takes from a peer before the link reads it. It has to be set before the connection
// stands, for that is when the window's scale is chosen.
func small(rcvbuf int) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if err1 := c.Control(func(fd uintptr) {
			if err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, rcvbuf); err == nil {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, mss)
			}
		}); err1 != nil {
			return err1
		}
		return err
	}
}
