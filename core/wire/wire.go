// Package wire has the frames between bridge and master: hello, answer, resolution, note.
package wire

import "github.com/muxproxy/muxproxy/core/sshconfig"

// Version is the protocol's version. A master answers a hello of another version with an error that says what to do.
const Version = 1

// Target is USER@HOST:PORT as ssh gave it.
type Target struct {
	User  string `json:"user"`
	Host  string `json:"host"` // no brackets
	Port  uint16 `json:"port"`
	Alias string `json:"alias,omitempty"`
}

// Mode says how the SSH stream reaches the master.
type Mode string

const (
	Pipes Mode = "pipes" // fds 0 and 1 came with the hello; the socket carries notes and is the client's life line
	FDs   Mode = "fds"   // after Served the socket itself is the stream; the bridge has passed it back to ssh and left
	Copy  Mode = "copy"  // after Served the socket itself is the stream; the bridge copies
)

// Hello is the first frame of a bridge. With Mode Pipes it carries fds 0 and 1 by SCM_RIGHTS.
type Hello struct {
	Version int      `json:"version"`
	Target  Target   `json:"target"`
	Mode    Mode     `json:"mode"`
	SSHArgs []string `json:"ssh_args,omitempty"` // arguments of the ssh above the bridge that shape the connection, without its command
	// Env is what the master needs of the caller's environment; only names on EnvNames are sent.
	Env map[string]string `json:"env,omitempty"`
}

// EnvNames are the variables that a hello may carry.
var EnvNames = []string{"SSH_AUTH_SOCK", "HOME", "PATH", "SHELL", "USER", "LOGNAME"}

// AnswerKind is what the master wants next.
type AnswerKind string

const (
	Served  AnswerKind = "served"  // the stream begins
	Resolve AnswerKind = "resolve" // run ssh -G, connect the agent, send a Resolution, read another answer
	Bypass  AnswerKind = "bypass"  // connect to the host without the master
	Failed  AnswerKind = "error"   // print Message, exit 255
)

// Answer is the master's reply to a hello or a resolution.
type Answer struct {
	Kind    AnswerKind `json:"kind"`
	Message string     `json:"message,omitempty"`
	// Via, with Resolve, are the jump hosts in place of those that ssh_config names, each as ProxyJump has it; empty: none.
	// nil: as ssh_config says.
	Via []string `json:"via"`
}

// Resolution is the bridge's reply to Resolve. It carries the connected agent socket by SCM_RIGHTS if Agent is set.
type Resolution struct {
	Config    sshconfig.Resolved `json:"config"`
	AgentPath string             `json:"agent_path,omitempty"` // what IdentityAgent or SSH_AUTH_SOCK names
	Agent     bool               `json:"agent,omitempty"`      // its connected socket is attached
	Error     string             `json:"error,omitempty"`      // ssh -G failed: its last line
	Hops      []Hop              `json:"hops,omitempty"`       // jump hosts, in the order in which they are passed
}

// Hop is a jump host on the way to the target.
type Hop struct {
	Target    Target             `json:"target"`
	Config    sshconfig.Resolved `json:"config"`
	AgentPath string             `json:"agent_path,omitempty"`
}

// Note is what the master sends while the bridge waits (Mode Pipes only).
type Note struct {
	Text          string `json:"text,omitempty"`          // for the person, without prefix
	Authenticated bool   `json:"authenticated,omitempty"` // let go of stderr
	Fatal         bool   `json:"fatal,omitempty"`         // Text is why this client ends: print, exit 255
}
