// Package use says what a client asks for, who asks, and decides about it: uses, callers, the one gate and its audit.
package use

import (
	"context"
	"net"
	"slices"
	"strconv"
	"strings"
)

// Kind is what a client asks for.
type Kind string

// The kinds of use. Every way to a channel, a forward or a changing command is one of these.
const (
	Attach        Kind = "attach"         // a client joins an upstream
	Shell         Kind = "shell"          // RFC 4254 section 6.5
	Exec          Kind = "exec"           // RFC 4254 section 6.5
	Subsystem     Kind = "subsystem"      // RFC 4254 section 6.5
	LocalForward  Kind = "local-forward"  // RFC 4254 section 7.2, direct-streamlocal@openssh.com
	RemoteForward Kind = "remote-forward" // RFC 4254 section 7.1, streamlocal-forward@openssh.com
	CancelForward Kind = "cancel-forward" // RFC 4254 section 7.1
	Agent         Kind = "agent"          // auth-agent-req@openssh.com
	X11           Kind = "x11"            // RFC 4254 section 6.3
	Jump          Kind = "jump"           // a direct-tcpip channel that carries another upstream
	Other         Kind = "other"          // channels and requests that have no name here
	Control       Kind = "control"        // a command that changes something
)

// Kinds lists every kind, in the order of design and documentation.
func Kinds() []Kind { return slices.Clone(kinds) }

var kinds = []Kind{Attach, Shell, Exec, Subsystem, LocalForward, RemoteForward, CancelForward, Agent, X11, Jump, Other, Control}

// Target is what a client asked for on its ProxyCommand line.
type Target struct {
	User  string `json:"user"`
	Host  string `json:"host"` // %h: after HostName; an IPv6 address has no brackets
	Port  uint16 `json:"port"`
	Alias string `json:"alias,omitempty"` // %n: as typed; "" if not known
}

// String is USER@HOST:PORT, with an IPv6 address in brackets.
func (t Target) String() string { return t.User + "@" + t.Addr() }

// Addr is HOST:PORT, with an IPv6 address in brackets.
func (t Target) Addr() string {
	return net.JoinHostPort(strings.Trim(t.Host, "[]"), strconv.Itoa(int(t.Port)))
}

// Process is what the kernel said of one process at one moment. It is a claim, not proof of intent: a process of the
// same uid can rename itself, exec and trace others.
type Process struct {
	PID   int      `json:"pid"`
	Start uint64   `json:"start"` // clock ticks after boot; with PID it names one process for ever
	Exe   string   `json:"exe"`
	Args  []string `json:"args,omitempty"`
	Cwd   string   `json:"cwd,omitempty"`
	TTY   string   `json:"tty,omitempty"`
}

// Caller is who started a client.
type Caller struct {
	UID int `json:"uid"`
	// Processes holds the process that connected, then its parents up to and including the session leader.
	Processes []Process `json:"processes"`
	// Env holds the variables that policy refers to, of the process that started the client. They can be secret, and
	// whoever starts a client chooses them.
	Env map[string]string `json:"-"`
	// LoggedIn says that the person at this client has answered what the login of its connection wanted to know.
	LoggedIn bool `json:"-"`
}

// Use is one thing that a client asks for.
type Use struct {
	Kind      Kind
	Client    uint64 // the master's number for the client; 0: none (a command)
	Caller    Caller
	Target    Target
	Command   string // exec: the bytes as sent
	Subsystem string // subsystem: its name
	Addr      string // forwards and jumps: destination or listen address, host:port or a path
	Name      string // other: channel or request type; control: the verb; remote-forward: "connect" if a stream from the host is to lead to Addr
}

// Gate decides about every use. There is no way to a channel, a forward or a changing command around it.
type Gate interface {
	// Decide returns a permit or a denial, never both and never neither. say tells the person at the client's terminal
	// what is being waited for; it may be nil. A done ctx is a denial.
	Decide(ctx context.Context, u Use, say func(string)) (*Permit, *Denied)
}

// Denied says who denied a use, why, and what to do about it.
type Denied struct {
	By     string // "lock", "policy", "audit", or a plugin's name
	Reason string
	Hint   string // what to do next; may be ""
}

// Error is the line for a person, without the program's prefix.
func (d *Denied) Error() string {
	s := "denied by " + d.By + ": " + d.Reason
	if d.Hint != "" {
		s += "; " + d.Hint
	}
	return s
}

// Result is how a permitted use ended.
type Result struct {
	Status   string // "ok", "exit", "signal", "cut", "refused", "closed"
	ExitCode *uint32
	Signal   string
	In, Out  int64 // bytes towards the remote host, bytes from it
	Err      string
}
