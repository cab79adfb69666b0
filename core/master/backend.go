package master

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pluginhost"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// holdTime is how long a connection that a plugin wanted waits for what it was wanted for.
	holdTime = 10 * time.Second
	// openTime bounds the answer of a server to a plugin's channel or forward.
	openTime = 30 * time.Second
)

// backend is the master as plugins reach it. All that they do passes the gate.
type backend struct{ m *Master }

var _ pluginhost.Backend = backend{}

func connection(c pool.ConnInfo) pluginhost.Connection {
	return pluginhost.Connection{
		ID: c.ID, Target: c.Target, Lane: c.Lane, Up: c.State == pool.Up, Clients: c.Clients, Since: c.Since,
	}
}

// Connections implements pluginhost.Backend. Clients are those of people: plugins hold connections, too.
func (b backend) Connections() []pluginhost.Connection {
	clients := map[uint64]int{}
	for _, c := range b.m.snapshot() {
		clients[c.upstream.Load()]++
	}
	var out []pluginhost.Connection
	for _, c := range b.m.pool.List() {
		p := connection(c)
		p.Clients = clients[c.ID]
		out = append(out, p)
	}
	return out
}

func (b backend) connection(id uint64) (pluginhost.Connection, error) {
	list := b.Connections()
	if i := slices.IndexFunc(list, func(c pluginhost.Connection) bool { return c.ID == id }); i >= 0 {
		return list[i], nil
	}
	return pluginhost.Connection{}, fmt.Errorf("connection %d: %w", id, pool.ErrGone)
}

// Resolve implements pluginhost.Backend.
func (b backend) Resolve(ctx context.Context, target string) (use.Target, error) {
	t, err := ParseHost(target)
	if err != nil {
		return use.Target{}, err
	}
	return Resolve(ctx, b.m.policy.now.Load().Master().SSHConfig, t)
}

// nobody can be asked for a plugin's connection.
type nobody struct{}

func (nobody) Ask(context.Context, pool.Question) ([]string, error) { return nil, pool.ErrNobody }

// Connect implements pluginhost.Backend. The connection is held for a while, for what the plugin wants it for.
func (b backend) Connect(ctx context.Context, by pluginhost.Actor, t use.Target) (pluginhost.Connection, error) {
	caller := b.caller(by, 0)
	if !b.m.policy.lookup().For(t, caller).Share() {
		return pluginhost.Connection{}, &use.Denied{
			By: "policy", Reason: use.Printable(fmt.Sprintf("connections to %s are not shared (share = false)", t.Addr())),
		}
	}
	r, err := b.m.ownResolution(ctx, t)
	if err != nil {
		return pluginhost.Connection{}, err
	}
	spec, ag := r.spec(t, nil)
	defer ag.close()
	spec.Silent = true
	permit, denied := b.m.gate.Decide(ctx, use.Use{Kind: use.Attach, Caller: caller, Target: spec.Target}, nil)
	if denied != nil {
		return pluginhost.Connection{}, denied
	}
	lease, err := b.m.pool.Acquire(ctx, permit, spec, nobody{})
	if err != nil {
		permit.End(use.Result{Status: "refused", Err: err.Error()})
		return pluginhost.Connection{}, err
	}
	lease.Go(func() {
		select {
		case <-time.After(holdTime):
		case <-b.m.ending:
		}
		lease.Release()
		permit.End(use.Result{Status: "closed"})
	})
	return b.connection(lease.ID())
}

// Close implements pluginhost.Backend.
func (b backend) Close(ctx context.Context, by pluginhost.Actor, id uint64) error {
	return b.command(ctx, by, id, "close", func(c pluginhost.Connection) {
		b.m.pool.CloseMatching(func(o pool.ConnInfo) bool { return o.ID == id },
			fmt.Errorf("%s: closed by the plugin %s", c.Target.Addr(), by.Plugin))
	})
}

// Drain implements pluginhost.Backend.
func (b backend) Drain(ctx context.Context, by pluginhost.Actor, id uint64) error {
	return b.command(ctx, by, id, "drain", func(pluginhost.Connection) {
		b.m.pool.Drain(func(o pool.ConnInfo) bool { return o.ID == id })
	})
}

// command passes the gate as a person's command about a connection does.
func (b backend) command(ctx context.Context, by pluginhost.Actor, id uint64, verb string, do func(pluginhost.Connection)) error {
	c, err := b.connection(id)
	if err != nil {
		return err
	}
	permit, denied := b.m.gate.Decide(ctx, use.Use{
		Kind: use.Control, Caller: b.caller(by, 0), Target: c.Target, Name: verb, Addr: c.Target.String(),
	}, nil)
	if denied != nil {
		return denied
	}
	do(c)
	permit.End(use.Result{Status: "ok"})
	return nil
}

// caller is who wants something: the plugin, or, by way of it, the process that it says it acts for.
func (b backend) caller(by pluginhost.Actor, pid int) use.Caller {
	c := by.Caller
	if pid > 0 {
		c.Processes = append(slices.Clone(c.Processes[:min(1, len(c.Processes))]), use.Chain(pid)...)
	}
	if p, ok := c.Client(); ok {
		c.Env = use.ReadEnv(p, b.m.policy.now.Load().EnvNames())
	}
	return c
}

// attach passes the gate for one use of a connection, and takes a lease on it.
func (b backend) attach(ctx context.Context, by pluginhost.Actor, pid int, kind use.Kind, id uint64, addr string) (
	*pool.Lease, *use.Permit, error) {
	c, err := b.connection(id)
	if err != nil {
		return nil, nil, err
	}
	permit, denied := b.m.gate.Decide(ctx, use.Use{Kind: kind, Caller: b.caller(by, pid), Target: c.Target, Addr: addr}, nil)
	if denied != nil {
		return nil, nil, denied
	}
	lease, err := b.m.pool.Attach(ctx, permit, id)
	if err != nil {
		permit.End(use.Result{Status: "refused", Err: err.Error()})
		return nil, nil, err
	}
	return lease, permit, nil
}

// Dial implements pluginhost.Backend (RFC 4254 section 7.2; OpenSSH's PROTOCOL, 2.4).
func (b backend) Dial(ctx context.Context, by pluginhost.Actor, d pluginhost.Dial) (pluginhost.Stream, error) {
	kind, extra := "direct-streamlocal@openssh.com", []byte(nil)
	if d.Network == "unix" {
		extra = ssh.Marshal(pool.StreamlocalChannel{Path: d.Address})
	} else {
		host, port, err := hostPort(d.Address)
		if err != nil {
			return nil, err
		}
		origin, originPort, err := hostPort(d.Origin)
		if err != nil {
			origin, originPort = "127.0.0.1", 0 // nobody's, as in ssh -W
		}
		kind = "direct-tcpip"
		extra = ssh.Marshal(pool.TCPChannel{Host: host, Port: port, Origin: origin, OriginPort: originPort})
	}
	lease, permit, err := b.attach(ctx, by, d.PID, use.LocalForward, d.Connection, d.Address)
	if err != nil {
		return nil, err
	}
	end := func(err error) error {
		lease.Release()
		permit.End(use.Result{Status: "refused", Err: err.Error()})
		return err
	}
	opening, cancel := context.WithTimeoutCause(ctx, openTime, fmt.Errorf("%s: no answer in %v", d.Address, openTime))
	defer cancel()
	ch, reqs, err := lease.Open(opening, permit, kind, extra)
	if refused, ok := errors.AsType[*ssh.OpenChannelError](err); ok {
		return nil, end(&pluginhost.Refused{Reason: uint32(refused.Reason), Message: refused.Message})
	}
	if err != nil {
		return nil, end(err)
	}
	lease.Discard(reqs)
	return pool.NewStream(ch, d.Address, func(r use.Result) {
		lease.Release()
		permit.End(r)
	}), nil
}

func hostPort(address string) (string, uint32, error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, fmt.Errorf("%q: want host:port", use.Printable(address))
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q: the port must be a number up to 65535", use.Printable(address))
	}
	return host, uint32(port), nil
}

// Listen implements pluginhost.Backend.
func (b backend) Listen(ctx context.Context, by pluginhost.Actor, id uint64, network, address string) (pluginhost.Listener, error) {
	a := pool.Addr{Path: address}
	if network == "tcp" {
		host, port, err := hostPort(address)
		if err != nil {
			return nil, err
		}
		a = pool.Addr{Host: host, Port: port}
	}
	lease, permit, err := b.attach(ctx, by, 0, use.RemoteForward, id, a.String())
	if err != nil {
		return nil, err
	}
	l := &listener{
		b: b, lease: lease, permit: permit, accepted: make(chan accepted), closed: make(chan struct{}), lost: make(chan struct{}),
	}
	l.users.Add(1)
	lease.Watch(func(loss pool.Loss) {
		l.once.Do(func() {
			l.err = loss.Reason
			close(l.lost)
		})
	})
	opening, cancel := context.WithTimeoutCause(ctx, openTime, fmt.Errorf("%s: no answer in %v", a, openTime))
	defer cancel()
	if l.Listener, err = lease.Listen(opening, permit, a, l.incoming); err != nil {
		lease.Release()
		permit.End(use.Result{Status: "refused", Err: err.Error()})
		return nil, fmt.Errorf("%s: %w", a, err)
	}
	return l, nil
}

// listener is a remote forward in a plugin's hands.
type listener struct {
	*pool.Listener
	b        backend
	lease    *pool.Lease
	permit   *use.Permit
	accepted chan accepted
	users    atomic.Int64 // the listener and its streams; the last one gives the lease back

	closing sync.Once
	closed  chan struct{}
	once    sync.Once
	lost    chan struct{} // closed when err is set: the connection has ended
	err     error
}

type accepted struct {
	s      *arrival
	origin string
}

// arrival is a stream that has come to a listener.
type arrival struct {
	*pool.Stream
	b backend
	l *listener

	mu     sync.Mutex  // guards what follows
	permit *use.Permit // to lead somewhere here; nil: none yet
	ended  bool
}

// Permit implements pluginhost.Incoming.
func (a *arrival) Permit(ctx context.Context, by pluginhost.Actor, network, address string) error {
	if network == "tcp" {
		if _, _, err := hostPort(address); err != nil {
			return err
		}
	}
	permit, denied := a.b.m.gate.Decide(ctx, use.Use{
		Kind: use.RemoteForward, Name: "connect", Caller: a.b.caller(by, 0), Target: a.l.permit.Use().Target, Addr: address,
	}, nil)
	if denied != nil {
		return denied
	}
	a.mu.Lock()
	ended, twice := a.ended, a.permit != nil
	if !ended && !twice {
		a.permit = permit
	}
	a.mu.Unlock()
	switch {
	case ended:
		permit.End(use.Result{Status: "closed"})
		return fmt.Errorf("the stream has ended meanwhile: %w", pool.ErrGone)
	case twice:
		permit.End(use.Result{Status: "refused"})
		return errors.New("a stream leads to one place")
	}
	return nil
}

// leave is called when the stream has ended, with how.
func (a *arrival) leave(r use.Result) {
	a.mu.Lock()
	a.ended = true
	permit := a.permit
	a.mu.Unlock()
	permit.End(r)
	a.l.leave()
}

func (l *listener) incoming(nc *pool.NewChannel) {
	if denied := l.permit.Connect(); denied != nil {
		_ = nc.Reject(ssh.Prohibited, "muxproxy: "+denied.Error())
		return
	}
	origin := ""
	var m pool.TCPChannel
	if nc.ChannelType() == "forwarded-tcpip" && ssh.Unmarshal(nc.ExtraData(), &m) == nil {
		origin = use.Printable(net.JoinHostPort(strings.Trim(m.Origin, "[]"), strconv.Itoa(int(m.OriginPort))))
	}
	ch, reqs, err := nc.Accept()
	if err != nil {
		return
	}
	l.users.Add(1)
	l.lease.Discard(reqs)
	s := &arrival{b: l.b, l: l}
	s.Stream = pool.NewStream(ch, origin, s.leave)
	select {
	case l.accepted <- accepted{s, origin}:
	case <-l.closed:
		s.Close()
	case <-l.lost:
		s.Close()
	}
}

// leave is called by the listener and by each of its streams when they end.
func (l *listener) leave() {
	if l.users.Add(-1) == 0 {
		l.lease.Release()
	}
}

// Accept implements pluginhost.Listener.
func (l *listener) Accept() (pluginhost.Incoming, string, error) {
	select {
	case a := <-l.accepted:
		return a.s, a.origin, nil
	case <-l.lost:
		return nil, "", l.err
	case <-l.closed:
		return nil, "", net.ErrClosed
	}
}

// Addr implements pluginhost.Listener.
func (l *listener) Addr() string { return l.Listener.Addr().String() }

// Close implements pluginhost.Listener. Streams go on.
func (l *listener) Close() error {
	l.closing.Do(func() {
		close(l.closed)
		l.Listener.Close()
		l.permit.End(use.Result{Status: "closed"})
		l.leave()
	})
	return nil
}

// Record implements pluginhost.Backend.
func (b backend) Record(by pluginhost.Actor, event, target, detail string) {
	b.m.audit.Record(by.Plugin, event, target, detail)
}

// Notify implements pluginhost.Backend.
func (b backend) Notify(_ context.Context, _ pluginhost.Actor, id uint64, line string) error {
	for _, c := range b.m.snapshot() {
		if r := c.relay.Load(); r != nil && c.upstream.Load() == id {
			r.Tell(line)
		}
	}
	return nil
}
