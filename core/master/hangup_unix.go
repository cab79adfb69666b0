//go:build unix

package master

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// onHangup calls f if the peer closes its side before the returned stop is called; no byte is taken from the stream.
// stop waits until that is decided.
func onHangup(c *net.UnixConn, f func()) (stop func()) {
	raw, err := c.SyscallConn()
	if err != nil {
		f()
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		gone := false
		var b [1]byte
		_ = raw.Read(func(fd uintptr) bool {
			n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
			if err == unix.EAGAIN || err == unix.EINTR {
				return false
			}
			gone = n <= 0
			return true
		})
		if gone {
			f()
		}
	}()
	return func() {
		_ = c.SetReadDeadline(time.Unix(1, 0)) // wakes raw.Read
		<-done
		_ = c.SetReadDeadline(time.Time{})
	}
}
