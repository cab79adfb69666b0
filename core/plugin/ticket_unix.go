//go:build unix

package plugin

import (
	"net"
	"syscall"
)

// sendTicket sends a ticket, with a socket if there is one (SCM_RIGHTS, unix(7)).
func sendTicket(c *net.UnixConn, id []byte, socket syscall.Conn) error {
	if socket == nil {
		_, err := c.Write(id)
		return err
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	if err1 := raw.Control(func(fd uintptr) {
		var n int
		if n, _, err = c.WriteMsgUnix(id, syscall.UnixRights(int(fd)), nil); err == nil && n < len(id) {
			_, err = c.Write(id[n:])
		}
	}); err1 != nil {
		return err1
	}
	return err
}
