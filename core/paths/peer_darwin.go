package paths

import (
	"net"

	"golang.org/x/sys/unix"
)

// PeerCred says who is at the other end of a Unix socket: the effective uid and the pid of the process that called
// connect(2) or listen(2), at that time. The pid may since be another process's.
func PeerCred(conn *net.UnixConn) (uid, pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return -1, 0, err
	}
	var cred *unix.Xucred
	err1 := raw.Control(func(fd uintptr) {
		if cred, err = unix.GetsockoptXucred(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERCRED); err == nil {
			pid, err = unix.GetsockoptInt(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERPID)
		}
	})
	if err1 != nil {
		err = err1
	}
	if err != nil {
		return -1, 0, err
	}
	return int(cred.Uid), pid, nil
}
