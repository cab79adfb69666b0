//go:build unix

package bridge

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/wire"
)

const noFollow = unix.O_NOFOLLOW

// replace is execve(2) with this process's environment. It returns only an error.
func replace(path string, argv []string) error {
	return &os.PathError{Op: "exec", Path: path, Err: syscall.Exec(path, argv, os.Environ())}
}

// fdOf is a file's descriptor. Unlike File.Fd it leaves alone whether reads block, which others may share.
func fdOf(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	return fd, raw.Control(func(n uintptr) { fd = int(n) })
}

func isStream(f *os.File) bool {
	fd, err := fdOf(f)
	if err != nil {
		return false
	}
	ok, err := wire.IsStream(fd)
	return ok && err == nil
}

// isUnixSocket reports whether files can be passed over f.
func isUnixSocket(f *os.File) bool {
	fd, err := fdOf(f)
	if err != nil {
		return false
	}
	addr, err := unix.Getsockname(fd)
	_, ok := addr.(*unix.SockaddrUnix)
	return err == nil && ok
}

// letGo puts /dev/null in the place of the descriptors of files. Closing them would let the next file take their number.
func letGo(files ...*os.File) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for _, f := range files {
		fd, err := fdOf(f)
		if err == nil {
			err = unix.Dup2(int(null.Fd()), fd)
		}
		if err != nil {
			return fmt.Errorf("letting go of %s: %w", f.Name(), err)
		}
	}
	return nil
}

// sendSocket passes a socket over f with one byte, as mm_send_fd of OpenSSH's monitor_fdpass.c does. Its reads and writes
// will block, as those of a socket that ssh made would.
func sendSocket(f *os.File, socket syscall.Conn) error {
	out, err := fdOf(f)
	if err != nil {
		return err
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	err1 := raw.Control(func(fd uintptr) {
		if err = unix.SetNonblock(int(fd), false); err != nil {
			return
		}
		for {
			err = unix.Sendmsg(out, []byte{0}, unix.UnixRights(int(fd)), nil, 0)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	if err1 != nil {
		return err1
	}
	return err
}

// socketPair makes two connected sockets, one to pass on and one for a program's standard streams.
func socketPair() (ours, theirs *os.File, err error) {
	syscall.ForkLock.RLock()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(fds[0])
		unix.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "socketpair"), os.NewFile(uintptr(fds[1]), "socketpair"), nil
}

// input reads a file whose reads block, and can be stopped. O_NONBLOCK would do so too, but it belongs to the open file,
// not to the descriptor: whoever shares a terminal with us would have it as well.
type input struct {
	f          *os.File
	wait, wake *os.File // a pipe; nil if there was no descriptor left for it
}

func newInput(f *os.File) *input {
	in := &input{f: f}
	if r, w, err := os.Pipe(); err == nil {
		in.wait, in.wake = r, w
	}
	return in
}

func (in *input) Read(p []byte) (int, error) {
	if in.wait == nil {
		return in.f.Read(p)
	}
	fd, err := fdOf(in.f)
	if err != nil {
		return 0, err
	}
	wait, err := fdOf(in.wait)
	if err != nil {
		return 0, err
	}
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wait), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		switch {
		case err == nil && fds[1].Revents != 0:
			return 0, os.ErrClosed
		case err == nil:
			var n int
			if n, err = unix.Read(fd, p); err == nil && n == 0 {
				return 0, io.EOF
			}
			if err == nil {
				return n, nil
			}
		}
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return 0, err
		}
	}
}

// stop ends a Read, now or later, and reports whether it will.
func (in *input) stop() bool {
	if in.wait == nil {
		return false
	}
	in.wake.Close()
	return true
}

// release closes what is left once no Read is under way.
func (in *input) release() { in.wait.Close() }

// child is a master that is not ready yet.
type child struct{ process *os.Process }

// spawn starts a program in a session of its own, in the root directory, with errors going to log.
func spawn(path string, argv, env []string, log *os.File) (child, error) {
	cmd := &exec.Cmd{Path: path, Args: argv, Env: env, Dir: "/", Stderr: log, SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	if err := cmd.Start(); err != nil {
		return child{}, err
	}
	return child{cmd.Process}, nil
}

// exited reports whether the program has ended, and how. It reaps it, so nothing may follow but release.
func (c child) exited() (bool, string) {
	var ws unix.WaitStatus
	pid, err := unix.Wait4(c.process.Pid, &ws, unix.WNOHANG, nil)
	switch {
	case errors.Is(err, unix.ECHILD): // reaped by the kernel, since SIGCHLD was ignored when we were started
		return true, "it ended"
	case err != nil || pid == 0:
		return false, ""
	case ws.Signaled():
		return true, fmt.Sprintf("it was ended by signal %d (%v)", ws.Signal(), ws.Signal())
	}
	return true, fmt.Sprintf("it ended with status %d", ws.ExitStatus())
}

// terminate tells a program that has not exited to end.
func (c child) terminate() { c.process.Signal(syscall.SIGTERM) }

// release lets the program live on. Whoever adopts it reaps it.
func (c child) release() { c.process.Release() }
