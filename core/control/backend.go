// Package control is the API between commands and master: gRPC over control.sock.
package control

import (
	"context"
	"encoding/json"
	"time"

	"github.com/muxproxy/muxproxy/core/use"
)

// Status is what the master holds at one moment. Its JSON form is what `muxproxy status --json` prints.
type Status struct {
	Version   string        `json:"version"`
	PID       int           `json:"pid"`
	Since     time.Time     `json:"since"`
	Sockets   string        `json:"sockets"` // directory
	Draining  bool          `json:"draining,omitempty"`
	Policy    string        `json:"policy,omitempty"` // path of the file; "": there is none
	Lock      use.LockState `json:"lock"`
	Upstreams []Upstream    `json:"upstreams"`
	Clients   []Client      `json:"clients"`
}

// Upstream is one SSH connection to a remote host.
type Upstream struct {
	ID          uint64    `json:"id"`
	Target      string    `json:"target"` // user@host:port
	Lane        string    `json:"lane"`
	State       string    `json:"state"` // "dialling", "up", "draining"
	Since       time.Time `json:"since"`
	LastHeard   time.Time `json:"last_heard"`
	Addr        string    `json:"addr,omitempty"`
	Server      string    `json:"server,omitempty"` // identification string, escaped
	HostKey     string    `json:"host_key,omitempty"`
	Kex         string    `json:"kex,omitempty"`
	Cipher      string    `json:"cipher,omitempty"`
	PostQuantum bool      `json:"post_quantum"`
	Auth        string    `json:"auth,omitempty"`
	Clients     int       `json:"clients"`
	Channels    int       `json:"channels"`
	In          int64     `json:"in"`                     // bytes of channel data towards the remote host
	Out         int64     `json:"out"`                    // bytes of channel data from it
	Sessions    int       `json:"sessions"`               // open session channels, one kept in advance among them
	MaxSessions int       `json:"max_sessions,omitempty"` // how many the server was found to allow; 0: not known
	Suspect     bool      `json:"suspect,omitempty"`      // no sign of life when asked for one; no new clients until there is
	IdleSince   time.Time `json:"idle_since,omitzero"`    // when the last client left; zero: there are some
	KeptUntil   time.Time `json:"kept_until,omitzero"`    // zero: there are clients, or it is about to close
}

// Client is one local ssh connection.
type Client struct {
	ID       uint64     `json:"id"`
	Target   string     `json:"target"`
	Alias    string     `json:"alias,omitempty"`
	Upstream uint64     `json:"upstream,omitempty"` // that it attached to; 0: not yet
	Mode     string     `json:"mode"`
	Since    time.Time  `json:"since"`
	Caller   use.Caller `json:"caller"`
	Channels []Channel  `json:"channels"`
}

// Channel is one channel or remote forward of a client.
type Channel struct {
	Kind     string    `json:"kind"`             // a use's kind
	Upstream uint64    `json:"upstream"`         // that carries it
	Detail   string    `json:"detail,omitempty"` // program word of a command, subsystem, destination; escaped
	Since    time.Time `json:"since"`
	In       int64     `json:"in"`
	Out      int64     `json:"out"`
}

// Reloaded is what came of reading the policy file. Its JSON form is what `muxproxy master reload --json` prints.
type Reloaded struct {
	File        string          `json:"file"`
	InForce     bool            `json:"in_force"` // else the file has errors, and the policy that was in force still is
	Text        string          `json:"-"`        // the diagnostics for a person
	Diagnostics json.RawMessage `json:"diagnostics"`
}

// Backend is what the API asks of the master. Every changing call gets the caller and passes the gate in the backend;
// a denial comes back as *use.Denied.
type Backend interface {
	Status() Status
	// Exists reports whether an upstream for target (HOST, USER@HOST or USER@HOST:PORT, or an alias in use) is up.
	Exists(target string) bool
	// Close ends matching upstreams and their clients now; Drain takes no new clients and ends each with its last.
	// An empty target means all. Both return how many upstreams matched.
	Close(ctx context.Context, by use.Caller, target string) (int, error)
	Drain(ctx context.Context, by use.Caller, target string) (int, error)
	// Stop ends the master: at once, or with its last client if drain is set.
	Stop(ctx context.Context, by use.Caller, drain bool) error
	// Restart gives the sockets to a new master, the program that is installed now, and ends this one with its last
	// session. It returns the new one's pid. After an error all is as before.
	Restart(ctx context.Context, by use.Caller) (pid int, err error)
	// Reload reads the policy file. color allows ANSI colours in the text.
	Reload(ctx context.Context, by use.Caller, color bool) (Reloaded, error)
	// Lock locks; the passphrase may be empty. Unlock opens that, and returns what still locks; a wrong passphrase is
	// use.ErrPassphrase.
	Lock(ctx context.Context, by use.Caller, passphrase []byte) error
	Unlock(ctx context.Context, by use.Caller, passphrase []byte) (use.LockState, error)
	// HostKeys returns the public halves of the plain local host keys and of the CAs, in authorized_keys form: of all types,
	// or, if made is set, of those that have been made.
	HostKeys(made bool) (plain, ca []string)
	// Dump is text for a bug report: goroutines and state, no secrets.
	Dump() string
}
