package upstream

import (
	"net"

	"golang.org/x/sys/unix"
)

// unsentBytes is how much the kernel may hold of what the network has not taken yet. What is typed waits behind it.
const unsentBytes = 64 << 10

// limitUnsent keeps a copy's backlog out of the kernel, where nothing can pass it (tcp(7), TCP_NOTSENT_LOWAT).
func limitUnsent(c net.Conn) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	// A kernel without it holds more.
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsentBytes)
	})
}
