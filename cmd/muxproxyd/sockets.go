package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/muxproxy/muxproxy/core/master"
	"github.com/muxproxy/muxproxy/core/paths"
)

// handoverName is set where it is another master that passes its sockets on, by systemd's protocol (sd_listen_fds(3)): to
// the directory that they are in, after "kept:" if their names belong to systemd.
const handoverName = "MUXPROXY_HANDOVER"

// handover is master.Options' Handover.
func handover(dir string, names []string, kept bool) []string {
	if kept {
		dir = "kept:" + dir
	}
	return []string{
		handoverName + "=" + dir, "LISTEN_FDS=" + strconv.Itoa(len(names)), "LISTEN_FDNAMES=" + strings.Join(names, ":"),
	}
}

// passedSockets are those that the process was started with. They are taken out of the environment.
func passedSockets() (master.Sockets, error) {
	var s master.Sockets
	if dir, ok := os.LookupEnv(handoverName); ok {
		s.TakeOver = true
		s.Dir, s.Kept = strings.CutPrefix(dir, "kept:")
		// Who starts a process does not know its pid yet.
		if err := errors.Join(os.Unsetenv(handoverName), os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))); err != nil {
			return s, err
		}
	}
	files := activation.Files(true)
	if !s.TakeOver {
		s.Kept = len(files) > 0 // systemd's
	}
	defer func() {
		for _, f := range files {
			f.Close() // FileListener has made a duplicate
		}
	}()
	s.Listeners = map[string]*net.UnixListener{}
	for _, f := range files {
		l, err := net.FileListener(f)
		unix, ok := l.(*net.UnixListener)
		switch {
		case err != nil:
			return s, fmt.Errorf("socket that was passed on: %w", err)
		case !ok:
			return s, fmt.Errorf("a socket was passed on that is not a Unix socket, but %v", l.Addr())
		}
		unix.SetUnlinkOnClose(false)
		name := f.Name()
		if !s.TakeOver { // a path that is longer than a socket's address is passed on by masters only
			s.Dir, name = filepath.Split(unix.Addr().String())
			s.Dir = filepath.Clean(s.Dir)
		}
		if name != paths.MuxSocket && name != paths.ControlSocket {
			return s, fmt.Errorf("a socket was passed on that is called %q: want %s and %s", name, paths.MuxSocket, paths.ControlSocket)
		}
		s.Listeners[name] = unix
	}
	return s, nil
}
