package forward

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// listen opens what an endpoint of this machine means: one socket or, without a host, one for each loopback address. With an
// error none is open.
func listen(e endpoint, anyUser bool) ([]net.Listener, error) {
	if e.path != "" {
		l, err := listenUnix(e.path, anyUser)
		if err != nil {
			return nil, err
		}
		return []net.Listener{l}, nil
	}
	hosts := []string{e.host}
	switch {
	case e.host == "" || strings.EqualFold(e.host, "localhost"):
		hosts = []string{"127.0.0.1", "::1"}
	case e.host == "*":
		hosts = []string{""}
	}
	var open []net.Listener
	var missing error
	for _, h := range hosts {
		l, err := net.Listen("tcp", net.JoinHostPort(h, fmt.Sprint(e.port)))
		switch {
		case err == nil:
			open = append(open, l)
		case len(hosts) > 1 && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)):
			missing = err // this machine has no IPv6, or no IPv4
		default:
			// Not one of the two only: whoever has the other would get what is meant for this one.
			closeAll(open)
			return nil, shorter(err)
		}
	}
	if len(open) == 0 {
		return nil, shorter(missing)
	}
	return open, nil
}

// shorter leaves out what the line that an error is in says already.
func shorter(err error) error {
	if e, ok := errors.AsType[*net.OpError](err); ok {
		if s, ok := errors.AsType[*os.SyscallError](e.Err); ok {
			return s.Err
		}
		return e.Err
	}
	return err
}

func closeAll(list []net.Listener) {
	for _, l := range list {
		l.Close()
	}
}

// unixListener removes its socket at the end, if that is still its own.
type unixListener struct {
	*net.UnixListener
	path string
	made fs.FileInfo
}

func (l *unixListener) Close() error {
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.made) {
		os.Remove(l.path)
	}
	return l.UnixListener.Close()
}

// listenUnix makes a socket that only this user may connect to, or everybody. One that is left of a process that was
// killed is replaced.
func listenUnix(path string, anyUser bool) (net.Listener, error) {
	bind := func() (*net.UnixListener, error) {
		return net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	}
	l, err := bind()
	if errors.Is(err, syscall.EADDRINUSE) {
		if err := removeDead(path); err != nil {
			return nil, err
		}
		l, err = bind()
	}
	if err != nil {
		return nil, shorter(err)
	}
	l.SetUnlinkOnClose(false)
	mode := fs.FileMode(0o600)
	if anyUser {
		mode = 0o666
	}
	err = os.Chmod(path, mode)
	if err == nil {
		var made fs.FileInfo
		if made, err = os.Lstat(path); err == nil {
			return &unixListener{l, path, made}, nil
		}
	}
	l.Close()
	os.Remove(path)
	return nil, err
}

// removeDead removes a socket of this user's that nobody listens on.
func removeDead(path string) error {
	fi, err := os.Lstat(path)
	switch {
	case err != nil:
		return err
	case fi.Mode().Type() != fs.ModeSocket:
		return errors.New("there is something else of this name")
	case !mine(fi):
		return errors.New("another user's socket is there")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return errors.New("another process listens there")
	}
	return os.Remove(path)
}

// accept calls serve for each connection, in a goroutine of its own, until l is closed. Whatever the system is short of,
// it comes back.
func (f *forward) accept(ctx context.Context, l net.Listener, serve func(context.Context, net.Conn)) {
	const least, most = 5 * time.Millisecond, time.Second
	pause := least
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			f.trouble("can't accept", shorter(err))
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
			pause = min(2*pause, most)
			continue
		}
		pause = least
		select {
		case f.slots <- struct{}{}:
		case <-ctx.Done():
			c.Close()
			return
		}
		f.p.running.Go(func() {
			defer func() { <-f.slots }()
			serve(ctx, c)
		})
	}
}
