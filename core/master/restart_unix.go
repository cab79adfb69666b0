//go:build unix

package master

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/paths"
)

const canHandOver = true

// launch starts a program in a session of its own, with this one's standard error, and with the sockets as its descriptors
// from 3 on. Package os would make the sockets block, which they would then do here, too.
func launch(argv, env []string, sockets []*paths.Listener) (*os.Process, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	attr := &syscall.ProcAttr{
		Dir: "/", Env: env, Files: []uintptr{null.Fd(), null.Fd(), 2}, Sys: &syscall.SysProcAttr{Setsid: true},
	}
	defer func() {
		for _, fd := range attr.Files[3:] {
			unix.Close(int(fd))
		}
	}()
	for _, l := range sockets {
		raw, err := l.SyscallConn()
		if err != nil {
			return nil, err
		}
		dup := -1
		if e := raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }); err == nil {
			err = e
		}
		if err != nil {
			return nil, os.NewSyscallError("fcntl", err)
		}
		attr.Files = append(attr.Files, uintptr(dup))
	}
	pid, err := syscall.ForkExec(argv[0], argv, attr)
	if err != nil {
		return nil, &os.PathError{Op: "exec", Path: argv[0], Err: err}
	}
	return os.FindProcess(pid)
}
