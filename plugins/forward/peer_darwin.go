package forward

import (
	"net"

	"golang.org/x/sys/unix"
)

func peerOf(c net.Conn) (peer, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return peer{}, errUntold
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return peer{}, err
	}
	var cred *unix.Xucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptXucred(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERCRED) }); e != nil {
		return peer{}, e
	}
	if err != nil {
		return peer{}, err
	}
	return peer{uid: int(cred.Uid)}, nil
}
