package bridge

import (
	"math"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// closeOnExec keeps what this process has inherited beyond its standard streams, as the log of ssh -E, from its children.
func closeOnExec() {
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
