package paths

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
)

// ErrInUse says that a living process listens on a socket already.
var ErrInUse = errors.New("another process listens there")

// Listener is a Unix stream socket with a name. Unlike net.UnixListener it knows whether the name still leads to it.
type Listener struct {
	*net.UnixListener
	path   string
	file   os.FileInfo
	kept   bool // the name is somebody else's
	closed atomic.Bool
}

// Adopt makes a Listener of one that another process has made at path, which the caller no longer uses. kept says that its
// name stays when it is closed.
func Adopt(l *net.UnixListener, path string, kept bool) (*Listener, error) {
	l.SetUnlinkOnClose(false)
	fi, err := os.Lstat(path)
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("a socket that was passed on: %w", err)
	}
	return &Listener{UnixListener: l, path: path, file: fi, kept: kept}, nil
}

// Listen makes a Unix socket of this name, mode 0600, in a directory that the caller has checked. A socket that nobody
// listens on any more is replaced; the caller holds MasterLock, since a socket between its creation and listen(2) looks
// just so. The error wraps ErrInUse if somebody listens. Paths may be longer than sockaddr_un where the system has a
// way (Linux).
func Listen(dir, name string) (*Listener, error) {
	path := filepath.Join(dir, name)
	addr, release, err := sockaddr(dir, name)
	if err != nil {
		return nil, err
	}
	defer release()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: addr, Net: "unix"})
	if errors.Is(err, syscall.EADDRINUSE) {
		if err := removeStale(dir, name); err != nil {
			return nil, err
		}
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: addr, Net: "unix"})
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, cause(err))
	}
	l.SetUnlinkOnClose(false) // addr may be meaningless by then
	fi, err := os.Lstat(path)
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return &Listener{UnixListener: l, path: path, file: fi}, nil
}

// Present reports whether the name still leads to this socket. If not, nobody can connect to it any more.
func (l *Listener) Present() bool {
	fi, err := os.Lstat(l.path)
	// Once this socket is closed its inode's number can be another one's.
	return err == nil && os.SameFile(fi, l.file) && !l.closed.Load()
}

// Path is the socket's whole path, which may be longer than what Addr can hold.
func (l *Listener) Path() string { return l.path }

// Close stops listening and removes the name if it still leads to this socket and is ours. Connections stay.
func (l *Listener) Close() error {
	if l.Present() && !l.kept {
		os.Remove(l.path) // if that fails, the next Listen removes it
	}
	return l.Leave()
}

// Leave stops listening here, for another process that listens on the same socket. Connections stay.
func (l *Listener) Leave() error {
	l.closed.Store(true)
	return l.UnixListener.Close()
}

// Dial connects to the Unix socket of this name. The directory should have been checked. Errors keep their errno:
// ENOENT and ECONNREFUSED mean that nobody listens, EAGAIN that too many wait to be accepted.
func Dial(dir, name string) (*net.UnixConn, error) {
	addr, release, err := sockaddr(dir, name)
	if err != nil {
		return nil, err
	}
	defer release()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: addr, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, name), cause(err))
	}
	return c, nil
}

// NotifySocket makes a datagram socket in a directory that the caller has checked, and returns it with the address by
// which a process of the same user can send to it while this one lives: a value for NOTIFY_SOCKET, see sd_notify(3).
// Calling remove closes it and removes its name.
func NotifySocket(dir, name string) (c *net.UnixConn, addr string, remove func(), err error) {
	path := filepath.Join(dir, name)
	local, release, err := sockaddr(dir, name)
	if err != nil {
		return nil, "", nil, err
	}
	// One of a process that had this pid before and was killed.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		release()
		return nil, "", nil, err
	}
	c, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: local, Net: "unixgram"})
	if err != nil {
		release()
		return nil, "", nil, fmt.Errorf("%s: %w", path, cause(err))
	}
	remove = func() {
		c.Close()
		os.Remove(path)
		release()
	}
	return c, fromOutside(local), remove, nil
}

// removeStale removes a socket that nobody listens on.
func removeStale(dir, name string) error {
	path := filepath.Join(dir, name)
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case fi.Mode()&os.ModeSocket == 0:
		return fmt.Errorf("%s is not a socket: remove it", path)
	}
	c, err := Dial(dir, name)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("%s: %w", path, ErrInUse)
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	case errors.Is(err, os.ErrNotExist):
		return nil
	}
	return err
}

// cause takes off what package net puts around a system call's error: it repeats the address, which is not the path.
func cause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
