// Package plugin is the SDK of muxproxy's plugins: all that an author imports.
//
// A plugin is a value with Describe and Configure, and with the hooks that it needs: Authorizer, Retainer, Observer and
// Commander are found by type assertion, and a hook left out costs nothing. Its main function is one line:
//
//	func main() { plugin.Serve(New()) }
//
// The configuration is read into structs of the plugin's own, by the tags that Schema describes. Within one major
// version of the protocol (package pluginpb) a plugin keeps working with older and newer masters.
package plugin

import (
	"context"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/rs/zerolog"
)

// Plugin is what every plugin is. Its methods and those of its hooks are called by many goroutines at once, but Configure
// never by two.
type Plugin interface {
	// Describe says what the plugin is. It is called before Configure, and must always return the same.
	Describe() Info
	// Configure brings the whole configuration: once before any hook is called, and again when the policy has changed.
	// Values have been read into the structs of Info. If it returns an error the plugin goes on with what it had before,
	// so it checks first and keeps then. Blocks that hooks get are kept by this package. The policy is not in force yet,
	// and what c.Host is asked meanwhile is judged by the one before: what has to be done waits for the event "policy".
	// Hooks run while Configure runs again: what both touch needs a lock, and c.Host can be kept the first time only.
	Configure(ctx context.Context, c *Config) Diagnostics
}

// Checker looks at a configuration without taking it. Without it `muxproxy config check` finds only what the schema and the
// types of Info's structs tell, and the rest is found when the policy comes into force.
type Checker interface {
	// Check returns what Configure would, and does nothing else.
	Check(ctx context.Context, c *Config) Diagnostics
}

// Authorizer judges uses before they happen.
type Authorizer interface {
	// Authorize decides within 2 s, or calls r.Waiting within 2 s and decides when the person has. It returns soon after
	// ctx is done: the client has left, or somebody else has decided. Any answer but one made by Allow, Deny or NoOpinion
	// counts as a failure.
	Authorize(ctx context.Context, r *Request) Decision
}

// Retainer says how long connections stay without clients.
type Retainer interface {
	// Retain is called when a connection has lost its last client, and again at the time that it returned. The zero time,
	// and any that has passed, closes the connection. It decides within 2 s.
	Retain(ctx context.Context, r *Idle) time.Time
}

// Observer is told what happens. It needs the capability CanObserve.
type Observer interface {
	// Observe is called for one event after another. Events that come faster than it returns are dropped and counted.
	Observe(ctx context.Context, e Event)
}

// Commander brings commands: `muxproxy NAME ARGS...`.
type Commander interface {
	// Command runs for one person. It returns the exit status: 0 yes, 1 no, 2 wrong usage, 255 could not. ctx ends when
	// the person interrupts it.
	Command(ctx context.Context, args []string, stdout, stderr io.Writer) int
}

// A plugin that is an io.Closer is closed, within a second, before its process ends.
var _ io.Closer = (*Stream)(nil)

// Capability is something that the policy has to allow with `may`.
type Capability string

// The capabilities.
const (
	CanObserve Capability = "observe"
	CanList    Capability = "list"
	CanConnect Capability = "connect"
	CanClose   Capability = "close"
	CanDial    Capability = "dial"
	CanListen  Capability = "listen"
	CanDecide  Capability = "decide"
	CanNotify  Capability = "notify"
	CanKeep    Capability = "keep"
)

// Capabilities lists every capability.
func Capabilities() []Capability {
	return []Capability{CanObserve, CanList, CanConnect, CanClose, CanDial, CanListen, CanDecide, CanNotify, CanKeep}
}

// Info is what a plugin is.
type Info struct {
	Name    string // as in policy: [a-z][a-z0-9-]*, at most 32 bytes
	Version string
	// AsksPerson says that Authorize may ask a person: such plugins are asked after all others.
	AsksPerson bool
	Wants      []Capability
	// Plugin and Host are structs, or pointers to structs, whose tags say what the `plugin "NAME"` block and the block NAME
	// in host blocks hold; see Schema. nil: nothing of the plugin's own.
	Plugin, Host any
	Verbs        []Verb // of Command
}

// Verb is a form of a plugin's command line, for help texts.
type Verb struct {
	Usage string // "grants [HOST]"
	Doc   string // one line
}

// Config is a plugin's whole configuration.
type Config struct {
	Plugin Block   // the `plugin` block; there always is one, if only with defaults
	Hosts  []Block // the blocks in host blocks, in the file's order
	Host   *Host   // the master; the same for as long as the process lives
	Log    zerolog.Logger
}

// Block is one block of the configuration.
type Block struct {
	id string
	// Value is a pointer to a new value of the struct that Info has for such blocks; nil if it has none.
	Value any
	// Hosts are the labels of the host block that it is in.
	Hosts []string
	Pos   string // FILE:LINE of it, for a person; may be ""
}

// Target is what a client asked for.
type Target struct {
	User, Host string // an IPv6 address has no brackets
	Port       uint16
	Alias      string // as typed; "" if not known
}

// String is USER@HOST:PORT, with an IPv6 address in brackets.
func (t Target) String() string {
	return t.User + "@" + net.JoinHostPort(strings.Trim(t.Host, "[]"), strconv.Itoa(int(t.Port)))
}

// Process is what the kernel said of a process: a claim, not proof.
type Process struct {
	PID      int
	Start    uint64 // clock ticks after boot; with PID it names one process for ever
	Exe      string
	Args     []string
	Cwd, TTY string
}

// Use is one thing that a client asks for. Its text comes from the client: escape it before it is shown, see Printable.
type Use struct {
	// Kind is "attach", "shell", "exec", "subsystem", "local-forward", "remote-forward", "cancel-forward", "agent", "x11",
	// "jump", "other" or "control". More may come.
	Kind      string
	Client    uint64
	Target    Target
	Command   string
	Program   string // the first word of a command that is plain words, else ""
	Subsystem string
	Addr      string    // forwards and jumps: host:port or a path
	Name      string    // of kind "other" and "control"; "connect" of a remote-forward that Offer.Permit asks about
	UID       int       // of the caller
	Processes []Process // of the caller: who connected, then its parents
	// LoggedIn, in a Request: an answer of who asks has logged this connection in, since this process of the plugin was
	// started. What it is to stand for, and how often, is the plugin's to count.
	LoggedIn bool
}

// Request is a use to be judged.
type Request struct {
	ID    string // names it for Host.Decide, and for people in `muxproxy allow`
	Use   Use
	Block any    // the value of the block that holds for it, as in Block
	Pos   string // of that block

	waiting func(waiting)
}

type waiting struct {
	message    string
	answerable bool
}

// Waiting says that a person is being asked. message is what the person at the client is told; answerable, whether
// `muxproxy allow` and `muxproxy deny` may answer too: then ctx ends. It may be called again with something else to say.
// That it goes on is said by this package for as long as Authorize has not returned.
func (r *Request) Waiting(message string, answerable bool) {
	if r.waiting != nil { // nil in a Request that a test has made
		r.waiting(waiting{message, answerable})
	}
}

// Decision is the answer to a Request. The zero Decision is none.
type Decision struct {
	verdict      verdict
	reason, hint string
}

type verdict int

const (
	noVerdict verdict = iota
	noOpinion
	allow
	deny
)

// Allow has nothing against the use. It overrides no other plugin's denial.
func Allow() Decision { return Decision{verdict: allow} }

// NoOpinion leaves the decision to others.
func NoOpinion() Decision { return Decision{verdict: noOpinion} }

// Deny denies the use. reason is one line in lower case, hint says what to do next and may be "".
func Deny(reason, hint string) Decision { return Decision{verdict: deny, reason: reason, hint: hint} }

// Connection is one SSH connection of the master.
type Connection struct {
	ID      uint64
	Target  Target
	Lane    string
	Up      bool
	Clients int
	Since   time.Time
	// Block is the value of the block that holds for it, as in Block; nil if there is none, or if policy has just changed.
	Block any
}

// Idle is a connection without clients.
type Idle struct {
	Connection Connection // its Block is never nil
	Since      time.Time  // when the last client left
}

// Event is something that happened.
type Event struct {
	Time time.Time
	// Kind is "decision" or "end" of a use, "up" or "down" of a connection, "locked" or "unlocked" of the master (the last
	// of the two is never lost, and "locked" comes again before "policy" as long as that holds), "sleep" or "wake" of the
	// machine; "policy": the configuration that Configure brought last is in force; "answered":
	// `muxproxy allow` or `deny` has answered one of the plugin's own pending uses. More may come.
	Kind       string
	ID         string // joins the two records of a use; of "answered", the Request's
	Use        Use
	Allowed    bool
	By, Reason string // of a denial; Reason also of "down"
	// Result is "ok", "exit", "signal", "cut", "refused" or "closed" of an end; of "down", "closed" here or "lost".
	Result     string
	ExitCode   uint32
	In, Out    int64
	Connection Connection
	Dropped    uint64 // events lost since the one before
}

// The version of the protocol, and what tells a plugin that a master started it.
const (
	ProtocolVersion = 1
	CookieKey       = "MUXPROXY_PLUGIN"
	CookieValue     = "muxproxy.plugin.v1"
	// TokenKey is the metadata that carries a call's token.
	TokenKey = "muxproxy-token"
)

// Hello is the first line on a plugin's standard input, in JSON.
type Hello struct {
	Host        string `json:"host"`         // gRPC address of the service Host
	Stream      string `json:"stream"`       // path of the stream socket
	HostToken   string `json:"host_token"`   // for calls to the service Host
	PluginToken string `json:"plugin_token"` // that calls to the plugin carry
}
