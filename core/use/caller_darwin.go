package use

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// ReadCaller asks the kernel who is at the other end of conn: the uid and, where it says so, the pid. Parents are not
// read on this system.
func ReadCaller(conn *net.UnixConn) (Caller, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Caller{}, fmt.Errorf("read the peer's identity: %w", err)
	}
	var cred *unix.Xucred
	pid := 0
	err2 := raw.Control(func(fd uintptr) {
		if cred, err = unix.GetsockoptXucred(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERCRED); err != nil {
			return
		}
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERPID); err == nil {
			pid = n
		}
	})
	if err = errors.Join(err, err2); err != nil {
		return Caller{}, fmt.Errorf("read the peer's identity: %w", err)
	}
	caller := Caller{UID: int(cred.Uid)}
	if pid > 0 {
		caller.Processes = []Process{{PID: pid}}
	}
	return caller, nil
}

// SameNamespaces is true: this system has none.
func SameNamespaces(Process) (bool, error) { return true, nil }
