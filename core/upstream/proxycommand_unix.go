//go:build unix

package upstream

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ownGroup keeps signals for one process group from the other.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// hangUp is what ssh does to its ProxyCommand; kill follows if that does not help. Neither is for a process that has been
// waited for: its number may be another's.
func hangUp(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGHUP) }

func kill(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }

// proxyFD runs a ProxyCommand that passes a connected socket back (ProxyUseFdpass in ssh_config(5)).
func (d *dialing) proxyFD(ctx context.Context, cmd *exec.Cmd, stderr *lineWriter) (net.Conn, error) {
	fail := func(err error) error {
		e := d.errorf("ProxyCommand: %s", systemText(err))
		e.Err = err
		return e
	}
	syscall.ForkLock.RLock()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(pair[0])
		unix.CloseOnExec(pair[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, fail(err)
	}
	near, far := os.NewFile(uintptr(pair[0]), "proxy"), os.NewFile(uintptr(pair[1]), "proxy")
	nc, err := net.FileConn(near)
	near.Close()
	if err != nil {
		far.Close()
		return nil, fail(err)
	}
	defer nc.Close()
	cmd.Stdin, cmd.Stdout = far, far
	ownGroup(cmd)
	err = cmd.Start()
	far.Close()
	if err != nil {
		return nil, fail(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, d.connectTimeout())
	defer cancel()
	stop := context.AfterFunc(ctx, func() { nc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	c, err := receiveConn(nc.(*net.UnixConn))
	// It has nothing more to do, as in ssh; a command that stays is told so.
	grace := time.NewTimer(proxyGrace)
	defer grace.Stop()
	var status error
	select {
	case status = <-done:
		done <- status
	default:
		if err != nil {
			hangUp(cmd)
		}
	}
	select {
	case status = <-done:
	case <-grace.C:
		kill(cmd)
		status = <-done
	}
	switch {
	case err == nil:
		return c, nil
	case errors.Is(err, errNoFD):
		return nil, d.errorf("%s", proxyFailure(status, stderr))
	case ctx.Err() != nil:
		return nil, fail(context.Cause(ctx))
	}
	return nil, fail(err)
}

var errNoFD = errors.New("no connection was passed")

// receiveConn takes one connected socket (mm_receive_fd of OpenSSH's monitor_fdpass.c).
func receiveConn(uc *net.UnixConn) (net.Conn, error) {
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4*4))
	_, n, _, _, err := uc.ReadMsgUnix(b[:], oob)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, err
	}
	if err != nil || n == 0 {
		return nil, errNoFD
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, errNoFD
	}
	var fds []int
	for _, m := range messages {
		if got, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, got...)
		}
	}
	var c net.Conn
	err = errNoFD
	for i, fd := range fds {
		unix.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "passed")
		if i == 0 {
			c, err = net.FileConn(f)
		}
		f.Close()
	}
	return c, err
}
