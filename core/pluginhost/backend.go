package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/muxproxy/muxproxy/core/use"
)

// Actor is a plugin that does something: it passes the gate like everybody else.
type Actor struct {
	Plugin string
	Caller use.Caller // its process
}

// Connection is one upstream.
type Connection struct {
	ID      uint64
	Target  use.Target
	Lane    string
	Up      bool
	Clients int
	Since   time.Time
}

// Dial is a stream that a plugin wants from the remote host.
type Dial struct {
	Connection uint64
	Network    string // "tcp" or "unix"
	Address    string // host:port or a path; escaped by nobody
	Origin     string // IP:PORT of whose stream it is; "": none
	PID        int    // of whose stream it is, as the plugin says; 0: its own
}

// Stream is one to or from the remote host. Close ends both directions; nothing is lost that was written before
// CloseWrite.
type Stream interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// Refused is a refusal by the remote server, as an error of Backend.Dial.
type Refused struct {
	Reason  uint32 // RFC 4254 section 5.1
	Message string // unescaped
}

func (r *Refused) Error() string {
	return fmt.Sprintf("refused by the server (reason %d): %s", r.Reason, use.Printable(r.Message))
}

// Incoming is a stream that somebody has opened at a Listener.
type Incoming interface {
	Stream
	// Permit asks, once, whether the stream may lead to an address of this machine's side: a host:port for network "tcp", a
	// path for "unix".
	Permit(ctx context.Context, by Actor, network, address string) error
}

// Listener accepts on the remote host. Accept ends with an error when the connection or the forward does, or after
// Close.
type Listener interface {
	Accept() (s Incoming, origin string, err error)
	Addr() string
	Close() error
}

// Backend is the master, as plugins reach it. That the plugin has the capability and that the host has a block of it is
// checked before. Denials by the gate come as *use.Denied, and what is about a connection that has ended is a pool.ErrGone;
// other errors are a line for a person. All may be called by many
// goroutines at once.
type Backend interface {
	Connections() []Connection
	// Resolve says what a target (HOST, USER@HOST or USER@HOST:PORT) means, as for ssh.
	Resolve(ctx context.Context, target string) (use.Target, error)
	// Connect returns the connection to t, which is made if there is none. Nobody can be asked anything; a refused login is a
	// pool.ErrRefused.
	Connect(ctx context.Context, by Actor, t use.Target) (Connection, error)
	Close(ctx context.Context, by Actor, connection uint64) error
	// Drain lets a connection take no new clients; it ends with its last, at once if there is none.
	Drain(ctx context.Context, by Actor, connection uint64) error
	Dial(ctx context.Context, by Actor, d Dial) (Stream, error)
	// Listen starts a forward; ctx is for that only.
	Listen(ctx context.Context, by Actor, connection uint64, network, address string) (Listener, error)
	// Record adds a line to the audit log; its text is escaped. It does not wait for the disk.
	Record(by Actor, event, target, detail string)
	// Notify shows a line, which is escaped, to the clients of a connection.
	Notify(ctx context.Context, by Actor, connection uint64, line string) error
}

// nowhere is the Backend where there is no master: plugins are only asked what they are.
type nowhere struct{}

var errNowhere = errors.New("there is no master here")

func (nowhere) Connections() []Connection                           { return nil }
func (nowhere) Resolve(context.Context, string) (use.Target, error) { return use.Target{}, errNowhere }
func (nowhere) Close(context.Context, Actor, uint64) error          { return errNowhere }
func (nowhere) Drain(context.Context, Actor, uint64) error          { return errNowhere }
func (nowhere) Dial(context.Context, Actor, Dial) (Stream, error)   { return nil, errNowhere }
func (nowhere) Notify(context.Context, Actor, uint64, string) error { return errNowhere }
func (nowhere) Record(Actor, string, string, string)                {}
func (nowhere) Connect(context.Context, Actor, use.Target) (Connection, error) {
	return Connection{}, errNowhere
}
func (nowhere) Listen(context.Context, Actor, uint64, string, string) (Listener, error) {
	return nil, errNowhere
}
