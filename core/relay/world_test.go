package relay_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/local"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/relay"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long something that must happen may take on a loaded machine.
const patience = 20 * time.Second

// quiet is how long something that must not happen is waited for.
const quiet = 100 * time.Millisecond

func socketPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func newSigner(t *testing.T) ssh.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// upstreamConn is a pool.Conn towards the scripted server.
type upstreamConn struct {
	ssh.Conn
	net      *watchedConn
	channels <-chan ssh.NewChannel
	requests <-chan *ssh.Request
	silent   atomic.Int64 // how long ago the last byte came, if set
	again    bool         // as world.again
}

type watchedConn struct {
	net.Conn
	down atomic.Bool
	over atomic.Int64
}

func (c *watchedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.down.Store(true)
		if err == io.EOF {
			time.Sleep(quiet) // as the upstream driver does
		}
		c.over.CompareAndSwap(0, time.Now().UnixNano())
	}
	return n, err
}

func (c *watchedConn) Close() error {
	c.down.Store(true)
	c.over.CompareAndSwap(0, time.Now().UnixNano())
	return c.Conn.Close()
}

func (c *upstreamConn) Channels() <-chan ssh.NewChannel { return c.channels }
func (c *upstreamConn) Requests() <-chan *ssh.Request   { return c.requests }
func (c *upstreamConn) Server() pool.ServerInfo {
	return pool.ServerInfo{Version: "SSH-2.0-test", Silent: c.again}
}
func (c *upstreamConn) Probe(context.Context, func()) error { return nil }
func (c *upstreamConn) Down() bool                          { return c.net.down.Load() }
func (c *upstreamConn) Over() time.Time {
	if ns := c.net.over.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}
func (c *upstreamConn) Cause() error {
	if c.again && c.Down() {
		return errors.New("db.example.com:22: connection reset by peer")
	}
	return nil
}
func (c *upstreamConn) LastHeard() time.Time {
	return time.Now().Add(-time.Duration(c.silent.Load()))
}

// world is one scripted server, the pool in front of it, and clients.
type world struct {
	t         *testing.T
	pool      *pool.Pool
	gate      use.Gate
	authority *local.Authority

	conn     *upstreamConn // set by the dial
	server   *ssh.ServerConn
	channels <-chan ssh.NewChannel // that we open on the server
	requests <-chan *ssh.Request
	tcp      net.Conn // the server's end
	audit    string
	lane     pool.Lane // that the clients are expected to need
	again    bool      // the server lets in without a person, and is lost by itself
}

// Dial implements pool.Dialer: the server's channels and global requests are left to the test.
func (w *world) Dial(context.Context, pool.Spec, pool.Asker) (pool.Conn, error) {
	near, far := socketPair(w.t)
	serverConfig := &ssh.ServerConfig{NoClientAuth: true}
	serverConfig.AddHostKey(newSigner(w.t))
	done := make(chan error, 1)
	go func() {
		var err error
		w.server, w.channels, w.requests, err = ssh.NewServerConn(far, serverConfig)
		done <- err
	}()
	watched := &watchedConn{Conn: near}
	c, chans, reqs, err := ssh.NewClientConn(watched, "", &ssh.ClientConfig{HostKeyCallback: ssh.InsecureIgnoreHostKey()})
	if err != nil {
		return nil, err
	}
	if err := <-done; err != nil {
		return nil, err
	}
	w.tcp = far
	w.conn = &upstreamConn{Conn: c, net: watched, channels: chans, requests: reqs, again: w.again}
	return w.conn, nil
}

func newWorld(t *testing.T, checks ...use.Check) *world {
	w := &world{t: t, audit: filepath.Join(t.TempDir(), "audit.log")}
	audit, err := use.OpenAudit(use.AuditOptions{Path: w.audit})
	if err != nil {
		t.Fatal(err)
	}
	w.gate = use.NewGate(audit, checks...)
	w.pool = pool.New(w, pool.CloseAtOnce{}, w.gate, zerolog.Nop())
	if w.authority, err = local.NewAuthority(func(string) error { return nil }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.pool.Close()
		if w.tcp != nil {
			w.tcp.Close()
			go ssh.DiscardRequests(w.requests)
			for nc := range w.channels {
				nc.Reject(ssh.Prohibited, "")
			}
			w.server.Wait()
		}
		audit.Close()
	})
	return w
}

// front is a client as the master would make it.
type front struct {
	*local.Conn
	id      uint64
	openSSH bool
}

func (f front) ID() uint64         { return f.id }
func (f front) Caller() use.Caller { return use.Caller{UID: os.Getuid()} }
func (f front) Target() use.Target { return target }
func (f front) OpenSSH() bool      { return f.openSSH }
func (f front) Agent() string      { return "agent" }
func (f front) OpenChannel(kind string, extra []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	return f.ServerConn.OpenChannel(kind, extra)
}

var target = use.Target{User: "alice", Host: "db.example.com", Port: 22}

// client is an ssh that has been let in.
type client struct {
	ssh.Conn
	tcp      net.Conn
	channels <-chan ssh.NewChannel
	requests <-chan *ssh.Request
	relay    *relay.Relay
	ran      chan struct{} // closed when the relay has ended
}

// connect brings one client in. openSSH says what the relay takes it for.
func (w *world) connect(openSSH bool) *client {
	t := w.t
	t.Helper()
	near, far := socketPair(t)
	permit, denied := w.gate.Decide(context.Background(), use.Use{Kind: use.Attach, Target: target}, nil)
	if denied != nil {
		t.Fatal(denied)
	}
	lease, err := w.pool.Acquire(context.Background(), permit,
		pool.Spec{Target: target, Config: &sshconfig.Resolved{Options: map[string][]string{}}, Lane: w.lane}, nil)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan *local.Conn, 1)
	go func() {
		conn, err := w.authority.Accept(context.Background(), far, local.Config{
			User: "alice", Principals: []string{"db.example.com"}, Login: func(context.Context) error { return nil },
		}, local.NewHandshake())
		if err != nil {
			t.Error(err)
		}
		accepted <- conn
	}()
	c := &client{tcp: near, ran: make(chan struct{})}
	c.Conn, c.channels, c.requests, err = ssh.NewClientConn(near, "db.example.com:22", &ssh.ClientConfig{
		User: "alice", HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		t.Fatal(err)
	}
	conn := <-accepted
	if conn == nil {
		t.FailNow()
	}
	c.relay = relay.New(front{conn, lease.ID(), openSSH}, lease, w.gate, permit, zerolog.Nop())
	go func() {
		defer close(c.ran)
		c.relay.Run()
		conn.Close()
		lease.Release()
		permit.End(use.Result{Status: "closed"})
	}()
	t.Cleanup(func() {
		c.Conn.Close()
		go ssh.DiscardRequests(c.requests)
		for nc := range c.channels {
			nc.Reject(ssh.Prohibited, "")
		}
		within(t, "the relay ends with its client", c.ran)
	})
	return c
}

// within waits for done.
func within(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s: not within %v", what, patience)
	}
}

// take receives what must come.
func take[T any](t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v, ok := <-from:
		if !ok {
			t.Fatalf("%s: closed", what)
		}
		return v
	case <-time.After(patience):
		t.Fatalf("%s: not within %v", what, patience)
	}
	panic("unreachable")
}

// nothing fails if something comes.
func nothing[T any](t *testing.T, what string, from <-chan T) {
	t.Helper()
	select {
	case v, ok := <-from:
		t.Fatalf("%s: got %+v (%v)", what, v, ok)
	case <-time.After(quiet):
	}
}

// async runs f and returns what it returns.
func async[T any](f func() T) <-chan T {
	c := make(chan T, 1)
	go func() { c <- f() }()
	return c
}

type answer struct {
	ok  bool
	err error
}

type opened struct {
	ch   ssh.Channel
	reqs <-chan *ssh.Request
	err  error
}

func (c *client) open(kind string, extra []byte) <-chan opened {
	return async(func() opened {
		ch, reqs, err := c.OpenChannel(kind, extra)
		return opened{ch, reqs, err}
	})
}

func request(ch ssh.Channel, name string, payload any) <-chan answer {
	var data []byte
	if payload != nil {
		data = ssh.Marshal(payload)
	}
	return async(func() answer {
		ok, err := ch.SendRequest(name, true, data)
		return answer{ok, err}
	})
}

type execMsg struct{ Command string }

// session opens a session and starts a command on it; it returns both ends.
func (w *world) session(c *client, command string) (near, far opened) {
	t := w.t
	t.Helper()
	near = take(t, "session", c.open("session", nil))
	if near.err != nil {
		t.Fatal(near.err)
	}
	started := request(near.ch, "exec", execMsg{command})
	far = w.accept("session")
	q := take(t, "exec at the server", far.reqs)
	if q.Type != "exec" {
		t.Fatalf("the server got %q", q.Type)
	}
	q.Reply(true, nil)
	if a := take(t, "reply to exec", started); !a.ok {
		t.Fatalf("exec refused: %v", a.err)
	}
	return near, far
}

// accept takes the next channel that we open on the server.
func (w *world) accept(kind string) opened {
	w.t.Helper()
	nc := take(w.t, kind+" at the server", w.channels)
	if nc.ChannelType() != kind {
		w.t.Fatalf("the server got a %q channel, want %q", nc.ChannelType(), kind)
	}
	ch, reqs, err := nc.Accept()
	if err != nil {
		w.t.Fatal(err)
	}
	return opened{ch, reqs, nil}
}

func readAll(r io.Reader) <-chan string {
	return async(func() string {
		b, err := io.ReadAll(r)
		if err != nil {
			return string(b) + " ERROR " + err.Error()
		}
		return string(b)
	})
}

type statusMsg struct{ Status uint32 }
