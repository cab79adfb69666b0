package plugin

import (
	"errors"
	"fmt"
	"net"
	"syscall"
)

// sendTicket sends a ticket. Windows has no way to pass a socket along.
func sendTicket(c *net.UnixConn, id []byte, socket syscall.Conn) error {
	if socket != nil {
		return fmt.Errorf("hand over a socket: %w", errors.ErrUnsupported)
	}
	_, err := c.Write(id)
	return err
}
