// Package paths says where sockets, state and policy live, and whether those places can be trusted.
package paths

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Names of files. The first two are sockets in Dirs.Runtime, or in the directory that Dirs.Published names; the third is in
// a directory there, of which each master with plugins has one; the next three are in Dirs.State, the rest in Dirs.Run.
const (
	MuxSocket     = "muxproxy.sock" // bridges
	ControlSocket = "control.sock"  // commands
	StreamSocket  = "stream.sock"   // plugins' streams

	KnownHosts = "known_hosts"
	MasterLog  = "master.log"
	AuditLog   = "audit.log"

	// StartLock is held by whoever starts a master, until that master is ready. A master that was started must not
	// take it: its starter still holds it.
	StartLock = "start.lock"
	// MasterLock is held by a master for as long as it lives. Only its holder may remove a socket that another master
	// left, and write or remove the link to the living master's sockets.
	MasterLock = "master.lock"
	// LockState is what `muxproxy lock` and the session have locked: the next master begins with it.
	LockState = "lock.json"

	socketsLink = "sockets"
)

// ErrForeignHome says that HOME belongs to another user than the effective one, as under sudo. Nothing may be created
// there, and no master be used: errors that wrap it mean that the connection has to go without one.
var ErrForeignHome = errors.New("HOME belongs to another user")

// runUser is where logind keeps the users' runtime directories. Tests change it.
var runUser = "/run/user"

// Dirs are the places of one user on one host. Each is absolute.
type Dirs struct {
	Runtime string // sockets; it is Run where the system has no runtime directory for this user
	State   string // known_hosts and logs
	Config  string // policy
	Data    string // plugins are in its folder "plugins"
	// Run holds the locks and the link to the living master's sockets. It depends on the state directory and the host's
	// name alone, so that processes with different environments (cron, sudo -u, a login shell) meet the same master.
	Run string
}

// Find computes the places from the environment. It looks at the file system, but creates nothing and does not check
// what it returns: see Dirs.Make and CheckDir. A relative path in an XDG variable is ignored, as the XDG Base Directory
// Specification demands. The error wraps ErrForeignHome if HOME is another user's.
func Find(getenv func(string) string) (Dirs, error) {
	home := getenv("HOME")
	if home != "" {
		if !filepath.IsAbs(home) {
			return Dirs{}, fmt.Errorf("HOME is %q: not an absolute path", home)
		}
		if err := checkHome(home); err != nil {
			return Dirs{}, err
		}
	}
	var missing error
	base := func(variable, fallback string) string {
		if dir := getenv(variable); filepath.IsAbs(dir) {
			return filepath.Join(dir, "muxproxy")
		}
		if home == "" {
			missing = fmt.Errorf("HOME is not set, nor %s: set one of them to an absolute path", variable)
			return ""
		}
		return filepath.Join(home, fallback, "muxproxy")
	}
	d := Dirs{
		Data:   base("XDG_DATA_HOME", ".local/share"),
		Config: base("XDG_CONFIG_HOME", ".config"),
		State:  base("XDG_STATE_HOME", ".local/state"),
	}
	if missing != nil {
		return Dirs{}, missing
	}
	host, err := os.Hostname()
	if err != nil {
		return Dirs{}, fmt.Errorf("this host's name: %w", err)
	}
	d.Run = filepath.Join(d.State, "run-"+fileName(host))
	d.Runtime = d.Run
	for _, dir := range []string{getenv("XDG_RUNTIME_DIR"), filepath.Join(runUser, strconv.Itoa(os.Geteuid()))} {
		if filepath.IsAbs(dir) && usableRuntime(filepath.Clean(dir)) {
			d.Runtime = filepath.Join(dir, "muxproxy")
			break
		}
	}
	return d, nil
}

// Make creates Runtime, State and Run, private to this user, where they are missing, and checks them as CheckDir does.
func (d Dirs) Make() error {
	for _, dir := range []string{d.State, d.Run, d.Runtime} {
		if err := makeDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// Publish makes the link in Run point to the directory that holds the living master's sockets, in one step. The caller
// holds MasterLock.
func (d Dirs) Publish(sockets string) error {
	if !filepath.IsAbs(sockets) {
		return fmt.Errorf("%q: not an absolute path", sockets)
	}
	temp := filepath.Join(d.Run, socketsLink+".new")
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Symlink(sockets, temp); err != nil {
		return err
	}
	return os.Rename(temp, filepath.Join(d.Run, socketsLink))
}

// Published returns the directory of the living master's sockets, as the link says. That is a hint only: the master
// may have died since. The error is os.ErrNotExist if there is no link.
func (d Dirs) Published() (string, error) {
	sockets, err := os.Readlink(filepath.Join(d.Run, socketsLink))
	if err != nil {
		return "", err
	}
	if !filepath.IsAbs(sockets) {
		return "", fmt.Errorf("%s leads to %q: not an absolute path; remove it", filepath.Join(d.Run, socketsLink), sockets)
	}
	return sockets, nil
}

// Unpublish removes the link if it still leads to sockets. The caller holds MasterLock.
func (d Dirs) Unpublish(sockets string) error {
	switch now, err := d.Published(); {
	case errors.Is(err, os.ErrNotExist), err == nil && now != sockets:
		return nil
	case err != nil:
		return err
	}
	return os.Remove(filepath.Join(d.Run, socketsLink))
}

// fileName makes one component of a path from a host's name.
func fileName(host string) string {
	host = strings.Map(func(r rune) rune {
		if r <= ' ' || r == '/' || r == '\\' || r == 0x7f {
			return '_'
		}
		return r
	}, host)
	if host == "" {
		return "localhost"
	}
	return host
}
