//go:build unix

package pluginrun

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// oobSize is room for the most files that one message can carry (SCM_MAX_FD of Linux, 253): with less room some systems
// open the surplus all the same, and nobody would know their numbers.
var oobSize = unix.CmsgSpace(253 * 4)

// ReadTicket reads a ticket and the socket that may come with it, which is the caller's even with an error.
func ReadTicket(c *net.UnixConn) (id [TicketSize]byte, socket *Socket, err error) {
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	oob := make([]byte, oobSize)
	for n := 0; n < len(id); {
		m, oobn, flags, _, err := c.ReadMsgUnix(id[n:], oob)
		if oobn > 0 {
			msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
			if err != nil {
				return id, nil, err
			}
			for i := range msgs {
				if got, err := unix.ParseUnixRights(&msgs[i]); err == nil {
					fds = append(fds, got...)
				}
			}
		}
		if err != nil {
			return id, nil, fmt.Errorf("no whole ticket: %w", err)
		}
		if flags&unix.MSG_CTRUNC != 0 {
			return id, nil, errors.New("the socket was lost on the way; is the limit of open files reached?")
		}
		n += m
	}
	switch len(fds) {
	case 0:
		return id, nil, nil
	case 1:
		socket, err = takeSocket(fds[0])
		return id, socket, err
	}
	return id, nil, fmt.Errorf("%d files with one ticket", len(fds))
}

// takeSocket makes a connection of a copy of fd.
func takeSocket(fd int) (*Socket, error) {
	if t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_STREAM {
		return nil, errors.New("the file that came along is no stream socket")
	}
	if _, err := unix.Getpeername(fd); err != nil {
		return nil, fmt.Errorf("the socket that came along is not connected: %w", err)
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(dup), "handed over")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("the socket that came along: %w", err)
	}
	if _, ok := conn.(interface{ CloseWrite() error }); !ok {
		conn.Close()
		return nil, errors.New("the socket that came along is of an unknown kind")
	}
	return &Socket{conn}, nil
}
