package pluginhost

import (
	"errors"
	"io"
	"net"
)

func sessionOf(int) (int, error) { return 0, errors.ErrUnsupported }

func shortDir(string) (string, error) { return "", errors.ErrUnsupported }

// handed would be a socket that a plugin has handed over.
type handed struct{ net.Conn }

// CloseWrite ends what is written to it.
func (*handed) CloseWrite() error { return errors.ErrUnsupported }

// readTicket reads a ticket; sockets can't come along.
func readTicket(c *net.UnixConn) (id [ticketSize]byte, socket *handed, err error) {
	_, err = io.ReadFull(c, id[:])
	return id, nil, err
}
