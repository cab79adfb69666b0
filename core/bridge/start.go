package bridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/wire"
)

const (
	// startTimeout is how long a master may take until it is ready.
	startTimeout = 10 * time.Second
	// queueTimeout bounds the wait for other processes that start one.
	queueTimeout = 15 * time.Second
	// poll is how often a waiting process looks whether something has changed that nobody tells it.
	poll = 10 * time.Millisecond
	// maxLog is what master.log may hold when a master starts; the one before is kept as master.log.1.
	maxLog = 16 << 20
	// notifyName begins the name of the socket on which a new master says that it is ready.
	notifyName = "notify."
)

// ErrNoMaster says that no master lives.
var ErrNoMaster = errors.New("no master is running")

// Connect returns a connection to the living master's socket for bridges, which the caller closes. It starts none: the
// error wraps ErrNoMaster then.
func Connect(ctx context.Context, dirs paths.Dirs) (*net.UnixConn, error) {
	return ConnectTo(ctx, dirs, paths.MuxSocket)
}

// ConnectTo is Connect to another of the master's sockets, such as paths.ControlSocket. Directory and peer are this
// user's own: everything else is an error.
func ConnectTo(ctx context.Context, dirs paths.Dirs, name string) (*net.UnixConn, error) {
	var places []string
	// The link comes first, and can be trusted only as far as where it lies.
	switch err := paths.CheckDir(dirs.Run); {
	case err == nil:
		switch dir, err := dirs.Published(); {
		case err == nil:
			places = append(places, dir)
		case !errors.Is(err, os.ErrNotExist):
			return nil, err
		}
	case !errors.Is(err, os.ErrNotExist):
		return nil, err
	}
	if !slices.Contains(places, dirs.Runtime) {
		places = append(places, dirs.Runtime)
	}
	for _, dir := range places {
		conn, err := connectIn(ctx, dir, name)
		if err == nil || !errors.Is(err, ErrNoMaster) {
			return conn, err
		}
	}
	return nil, ErrNoMaster
}

func connectIn(ctx context.Context, dir, name string) (*net.UnixConn, error) {
	switch err := paths.CheckDir(dir); {
	case errors.Is(err, os.ErrNotExist):
		return nil, ErrNoMaster
	case err != nil:
		return nil, err
	}
	conn, err := paths.Dial(dir, name)
	for errors.Is(err, syscall.EAGAIN) { // its backlog is full
		if pause(ctx) != nil {
			return nil, fmt.Errorf("%s: the master takes no more connections", filepath.Join(dir, name))
		}
		conn, err = paths.Dial(dir, name)
	}
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, ErrNoMaster
	case err != nil:
		return nil, err
	}
	uid, _, err := paths.PeerCred(conn)
	if err == nil && uid != os.Geteuid() {
		err = fmt.Errorf("a process of uid %d listens there, this is uid %d", uid, os.Geteuid())
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
	}
	return conn, nil
}

// StartMaster starts a master, unless one lives, and returns when one takes connections. getenv is the environment
// that the master gets a part of.
func StartMaster(ctx context.Context, dirs paths.Dirs, getenv func(string) string) error {
	conn, err := obtain(ctx, dirs, getenv)
	if err != nil {
		return err
	}
	return conn.Close()
}

// obtain connects to the living master, or to one that it starts. However many processes do so at once, one starts a
// master and the others wait for that. Its errors are complete lines for a person.
func obtain(ctx context.Context, dirs paths.Dirs, getenv func(string) string) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, queueTimeout, errors.New("another process has been starting it for too long"))
	defer cancel()
	failed := func(err error) error {
		return fmt.Errorf("master did not start: %w; see %s, or %s", err, logFile(dirs), bypassHint)
	}
	made := false
	for {
		conn, err := Connect(ctx, dirs)
		switch {
		case err == nil:
			return conn, nil
		case !errors.Is(err, ErrNoMaster):
			return nil, fmt.Errorf("master not reached: %w; or %s", err, bypassHint)
		}
		if !made {
			if err := dirs.Make(); err != nil {
				return nil, failed(err)
			}
			made = true
		}
		lock, err := paths.TryLock(filepath.Join(dirs.Run, paths.StartLock))
		switch {
		case err == nil:
			conn, err := startLocked(ctx, dirs, getenv)
			lock.Close()
			if err != nil {
				return nil, failed(err)
			}
			return conn, nil
		case !errors.Is(err, paths.ErrLocked):
			return nil, failed(err)
		}
		if err := pause(ctx); err != nil {
			return nil, failed(err)
		}
	}
}

// startLocked looks again, since another process may have held the lock before, and starts a master.
func startLocked(ctx context.Context, dirs paths.Dirs, getenv func(string) string) (*net.UnixConn, error) {
	conn, err := Connect(ctx, dirs)
	if !errors.Is(err, ErrNoMaster) {
		return conn, err
	}
	if err := launch(ctx, dirs, getenv); err != nil {
		return nil, err
	}
	conn, err = Connect(ctx, dirs)
	if errors.Is(err, ErrNoMaster) {
		err = errors.New("it said that it is ready, but nothing listens")
	}
	return conn, err
}

// pause waits for the next look.
func pause(ctx context.Context) error {
	t := time.NewTimer(poll)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// launch runs `muxproxyd master` and waits until it says that it is ready (sd_notify(3)).
func launch(ctx context.Context, dirs paths.Dirs, getenv func(string) string) error {
	exe, err := findMaster()
	if err != nil {
		return err
	}
	if fi, err := os.Lstat(logFile(dirs)); err == nil && fi.Size() > maxLog {
		if err := os.Rename(logFile(dirs), logFile(dirs)+".1"); err != nil {
			return err
		}
	}
	sweepNotify(dirs.Run)
	log, err := os.OpenFile(logFile(dirs), os.O_WRONLY|os.O_CREATE|os.O_APPEND|noFollow, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	before, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	notify, address, remove, err := paths.NotifySocket(dirs.Run, fmt.Sprintf("%s%d", notifyName, os.Getpid()))
	if err != nil {
		return err
	}
	defer remove()
	env := append(masterEnv(os.Environ(), getenv), "NOTIFY_SOCKET="+address)
	child, err := spawn(exe, []string{"muxproxyd", "master"}, env, log)
	if err != nil {
		return fmt.Errorf("%s: %w", exe, err)
	}
	defer child.release()

	deadline := time.Now().Add(startTimeout)
	buf := make([]byte, 4096)
	exited, how := false, ""
	for {
		if !exited {
			exited, how = child.exited() // before the socket is read: what it said last is there by then
		}
		notify.SetReadDeadline(time.Now().Add(poll))
		n, err := notify.Read(buf)
		if err == nil {
			if ready, err := parseNotify(string(buf[:n])); ready || err != nil {
				return err
			}
			continue
		}
		switch {
		case exited:
			if line := lastLine(logFile(dirs), before); line != "" {
				return errors.New(line)
			}
			return errors.New(how)
		case !errors.Is(err, os.ErrDeadlineExceeded):
			child.terminate()
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx) // it goes on: another bridge may be served already
		case time.Now().After(deadline):
			if conn, err := Connect(ctx, dirs); err == nil {
				return conn.Close() // its word was lost
			}
			child.terminate()
			return fmt.Errorf("it was not ready within %v", startTimeout)
		}
	}
}

// sweepNotify removes what starters left that were killed; the caller holds StartLock, so none is in use.
func sweepNotify(dir string) {
	left, _ := filepath.Glob(filepath.Join(dir, notifyName+"*")) // the pattern is well formed but for odd folders
	for _, path := range left {
		os.Remove(path)
	}
}

// parseNotify reads one datagram of sd_notify(3): ready, or an error that the master names.
func parseNotify(msg string) (ready bool, err error) {
	status, failed := "", false
	for line := range strings.Lines(msg) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		switch name {
		case "READY":
			ready = value == "1"
		case "STATUS":
			status = value
		case "ERRNO":
			failed = true
		}
	}
	if !failed {
		return ready, nil
	}
	if status == "" {
		status = "it does not say why"
	}
	return false, errors.New(wire.Printable(status))
}

// lastLine is the last line with text in a file from an offset on, or "".
func lastLine(name string, from int64) string {
	f, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer f.Close()
	const tail = 4096
	if size, err := f.Seek(0, io.SeekEnd); err != nil {
		return ""
	} else if size-from > tail {
		from = size - tail
	}
	text, err := io.ReadAll(io.NewSectionReader(f, from, tail))
	if err != nil {
		return ""
	}
	last := ""
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" {
			last = line
		}
	}
	return wire.Printable(last)
}

// masterEnv is the part of the environment that a master gets: it serves every later client, whatever the environment
// of the first one was. GORACE and GOCOVERDIR are for tests.
func masterEnv(environ []string, getenv func(string) string) []string {
	exact := []string{"HOME", "USER", "LOGNAME", "PATH", "SHELL", "LANG", "TZ", "TMPDIR", "GORACE", "GOCOVERDIR"}
	var env []string
	for _, pair := range environ {
		name, _, _ := strings.Cut(pair, "=")
		switch {
		case name == "MUXPROXY_BYPASS", name == bypassing:
			continue
		case slices.Contains(exact, name), strings.HasPrefix(name, "LC_"), strings.HasPrefix(name, "XDG_"),
			strings.HasPrefix(name, "MUXPROXY_"):
			if v := getenv(name); v != "" {
				env = append(env, name+"="+v)
			}
		}
	}
	return env
}
