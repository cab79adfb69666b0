// Package pool decides which upstream carries what: sharing key, single flight, lanes, spares, drain and retention.
package pool

import (
	"context"
	"errors"
	"net"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

// Spec is one thing to dial.
type Spec struct {
	Target use.Target          // User, Host and Port win over what Config says
	Config *sshconfig.Resolved // never nil
	Agent  Agent               // the caller's agent; nil: none
	// Connected is called once when the transport (TCP, or what stands for it) is up, before the SSH handshake. May be nil.
	Connected func()
	// Transport makes what stands for TCP, for a host that is reached through another (ProxyJump). The connection is the
	// dialer's to close, also when it comes with ctx already ended. nil: TCP, or the user's own ProxyCommand.
	Transport func(ctx context.Context) (net.Conn, error)
	// Via are the jump hosts, in the order in which they are passed. The pool makes Transport of them.
	Via []Spec
	// Lane is what the client is expected to need. The driver marks its packets by the class.
	Lane Lane
	// Class is asked what policy says of a session that is about to start; false: nothing. nil: there is no policy.
	Class func(use.Use) (Class, bool)
	// Silent tells the driver that nobody can be asked, nor expected to touch a security key.
	Silent bool
	// Env holds NAME=VALUE of the caller's environment for a ProxyCommand, on top of the process's own. Its SHELL runs it.
	Env []string

	// What the caller's person may see of the dial, escaped; one call at a time, none after Dial has returned. Each may
	// be nil, and must not block for long.
	Banner func(text string) // a banner of the server (RFC 4252 section 5.4), its line breaks kept
	Say    func(line string) // what ssh says without -v, too: a host key was learnt
	Debug  func(line string) // a step, as `ssh -v` shows it
}

// Agent is the caller's authentication agent.
type Agent interface {
	// ID is the identity of the agent's socket (device and inode), or "" if it has none.
	ID() string
	// Dial returns a new connection to it; the caller closes that.
	Dial() (net.Conn, error)
}

// ServerInfo says what an upstream turned out to be.
type ServerInfo struct {
	Version     string // its identification string, unescaped text from the network
	OpenSSH     bool   // the identification string says so
	Addr        string // address and port that was dialled
	HostKey     ssh.PublicKey
	Kex, Cipher string
	PostQuantum bool   // the key exchange is hybrid post-quantum
	Auth        string // method that logged in, and the key's fingerprint where there is one
	AgentID     string // Agent.ID if an agent's key logged in, else ""
	Silent      bool   // the login took no person's answer, touch or time, so that one more like it would take none either
	Answered    bool   // the last answer that a person gave is part of what logged in
}

// Conn is one upstream SSH connection. All of it may be used by many goroutines.
// Channels and Requests must be drained until they close. Close ends it; Wait returns when it has ended.
type Conn interface {
	ssh.Conn
	Channels() <-chan ssh.NewChannel
	Requests() <-chan *ssh.Request
	Server() ServerInfo
	// Probe waits for a sign of life; an error means there was none before ctx ended. ask makes the peer give one, and must
	// not block; nil: a global request does.
	Probe(ctx context.Context, ask func()) error
	// Down tells that the transport has failed or was closed. It turns true before any channel of the connection
	// reports EOF because of that, except for a DISCONNECT or protocol error, where it follows within microseconds.
	Down() bool
	// Over is when x/crypto was told that the transport has failed; zero before. What channels report until then is the
	// server's own, even when the transport is down already: it had sent that before.
	Over() time.Time
	// Cause is a person's line about why the connection ended; nil while it lives or if we closed it.
	Cause() error
	// LastHeard is when the last byte came.
	LastHeard() time.Time
}

// Marker is what a Conn may be besides.
type Marker interface {
	// Mark says what the connection carries from now on, for the network's sake (IPQoS).
	Mark(Class)
}

// HostKeyKeeper is what a Conn may know besides.
type HostKeyKeeper interface {
	// HostKeyStillGood reports whether a client with spec, which shares the connection's sharing key, could have made the
	// connection by what the user's files say now about the host's key. It is cheap while they have not changed. The
	// error is a line for a person.
	HostKeyStillGood(spec Spec) error
}

// Dialer is a driver: it makes upstream connections. Errors are a line for a person, without the program's prefix:
// what failed, for which host, and what to do. Where another try would end the same until a person has done something, they
// are ErrRefused.
type Dialer interface {
	Dial(ctx context.Context, spec Spec, ask Asker) (Conn, error)
}

// ErrRefused is what errors of a login that was refused are (errors.Is): by the server, because of its host key, or for want
// of a person's answer.
var ErrRefused = errors.New("the login was refused")

// ErrNobody says that no person is there to answer.
var ErrNobody = errors.New("nobody is there to answer")

// Question is put to a person in the user's own ssh.
type Question struct {
	Title   string // whose question it is: "muxproxy", or "server HOST" where the server chose the words
	Text    string // lines to read first, escaped but for the line breaks between them; may be empty
	Prompts []Prompt
}

// Prompt is one line to answer.
type Prompt struct {
	Text string // one line, escaped
	Echo bool
}

// Asker puts questions to a person. It returns one answer per prompt, or ErrNobody.
type Asker interface {
	Ask(ctx context.Context, q Question) ([]string, error)
}

// Retainer says how long an upstream without clients stays; the zero time means: close now.
type Retainer interface {
	Retain(ctx context.Context, c ConnInfo) time.Time
}

// Watcher is what a Retainer may be besides. Its methods must not block.
type Watcher interface {
	// Up is called when a connection has come up.
	Up(ConnInfo)
	// Down is called when one has ended. lost: not because it was closed here. reason is a line for a person, nil if the
	// connection had no clients any more.
	Down(c ConnInfo, lost bool, reason error)
}

// CloseAtOnce is the Retainer that keeps nothing.
type CloseAtOnce struct{}

// Retain implements Retainer.
func (CloseAtOnce) Retain(context.Context, ConnInfo) time.Time { return time.Time{} }
