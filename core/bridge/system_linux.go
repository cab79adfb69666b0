package bridge

import (
	"math"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// closeOnExec keeps what this process has inherited beyond its standard streams from its children, and closes it where
// it can: the log of ssh -E, or the end of a pipe of whoever started ssh, which it would hold as long as the connection lasts.
func closeOnExec() {
	if names, err := os.ReadDir("/proc/self/fd"); err == nil {
		for _, n := range names {
			fd, err := strconv.Atoi(n.Name())
			if err != nil || fd <= 2 {
				continue
			}
			// What this process opened itself is closed on exec already.
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
				unix.Close(fd)
			}
		}
		return
	}
	if unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	for fd := 3; fd < 1024; fd++ { // Linux before 5.11
		unix.CloseOnExec(fd)
	}
}

// bindTo obeys BindInterface.
func bindTo(name string) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if err1 := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), name) }); err1 != nil {
			return err1
		}
		return os.NewSyscallError("BindInterface", err)
	}
}
