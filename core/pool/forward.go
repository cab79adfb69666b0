package pool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

// Addr is where the server listens for a remote forward: Host and Port (RFC 4254 section 7.1; port 0: the server
// chooses), or Path (streamlocal-forward@openssh.com).
type Addr struct {
	Host string
	Port uint32
	Path string
}

// String is host:port or the path.
func (a Addr) String() string {
	if a.Path != "" {
		return a.Path
	}
	return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port)))
}

// forwardMsg is the data of tcpip-forward and its cancel (RFC 4254 section 7.1).
type forwardMsg struct {
	Host string
	Port uint32
}

// streamlocalMsg is the data of streamlocal-forward@openssh.com and its cancel (OpenSSH's PROTOCOL, 2.4).
type streamlocalMsg struct{ Path string }

// requests returns the names of the request that starts and of the one that ends the listener, and their data.
func (a Addr) requests() (start, end string, data []byte) {
	if a.Path != "" {
		return "streamlocal-forward@openssh.com", "cancel-streamlocal-forward@openssh.com", ssh.Marshal(streamlocalMsg{a.Path})
	}
	return "tcpip-forward", "cancel-tcpip-forward", ssh.Marshal(forwardMsg{a.Host, a.Port})
}

// ErrForwardRefused is the server's refusal of a remote forward.
var ErrForwardRefused = errors.New("the server refused the remote forward")

// Listener is a remote forward, owned by one lease.
type Listener struct {
	lease *Lease
	up    *upstream
	addr  Addr // with the real port
	// incoming takes the channels that belong here; it is served by one goroutine per channel.
	incoming func(*NewChannel)
	pending  chan struct{} // a place per channel that incoming has not answered
	once     sync.Once
}

// offer has a channel answered by its owner, unless too many wait for that.
func offer(nc *NewChannel, pending chan struct{}, incoming func(*NewChannel)) {
	select {
	case pending <- struct{}{}:
		incoming(nc)
		<-pending
	default:
		_ = nc.Reject(ssh.ResourceShortage, "too many connections wait for this client")
	}
}

// Addr is where the server listens, with the port that it chose.
func (l *Listener) Addr() Addr { return l.addr }

// Upstream is the number of the upstream whose server listens, as in List.
func (l *Listener) Upstream() uint64 { return l.up.id }

// Close ends the forward without waiting for the server: a request of another client for the same address that comes
// later is behind the cancel on the wire. It may be called again.
func (l *Listener) Close() {
	l.end(func(name string, data []byte) { _, _, _ = l.up.conn.SendRequest(name, false, data) })
}

// Cancel ends the forward and returns whether the server agreed; it does not outlive ctx.
func (l *Listener) Cancel(ctx context.Context) (agreed bool) {
	l.end(func(name string, data []byte) { agreed, _, _ = l.up.request(ctx, name, true, data) })
	return agreed
}

func (l *Listener) end(send func(name string, data []byte)) {
	l.once.Do(func() {
		l.lease.mu.Lock()
		delete(l.lease.listeners, l)
		l.lease.mu.Unlock()
		l.lease.unhold(l.up)
		if !l.up.fwd.remove(l) {
			return // the server gave the address to a newer forward (StreamLocalBindUnlink); a cancel would end that
		}
		if _, name, data := l.addr.requests(); !l.up.conn.Down() {
			send(name, data)
		}
	})
}

// forwards are the remote forwards of one upstream.
type forwards struct {
	mu      sync.Mutex // guards what follows
	owners  map[Addr]*Listener
	pending int           // forward requests without an answer
	settled chan struct{} // closed and replaced when one gets its answer
}

func (f *forwards) init() {
	f.owners = map[Addr]*Listener{}
	f.settled = make(chan struct{})
}

func (f *forwards) begin() {
	f.mu.Lock()
	f.pending++
	f.mu.Unlock()
}

// settle ends what begin began; l is the new owner, or nil.
func (f *forwards) settle(l *Listener) {
	f.mu.Lock()
	f.pending--
	if l != nil {
		f.owners[l.addr] = l
	}
	close(f.settled)
	f.settled = make(chan struct{})
	f.mu.Unlock()
}

// remove takes l out, unless a newer forward has its place.
func (f *forwards) remove(l *Listener) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.owners[l.addr] != l {
		return false
	}
	delete(f.owners, l.addr)
	return true
}

// end forgets all owners, when the upstream has ended.
func (f *forwards) end() {
	f.mu.Lock()
	clear(f.owners)
	f.mu.Unlock()
}

// owner finds whose address it is. While an answer to a forward request is outstanding the address may be the one
// that it tells: with port 0 the server can open a channel before its answer has been read.
func (f *forwards) owner(a Addr, dead <-chan struct{}) *Listener {
	for {
		f.mu.Lock()
		l, pending, settled := f.owners[a], f.pending, f.settled
		f.mu.Unlock()
		if l != nil || pending == 0 {
			return l
		}
		select {
		case <-settled:
		case <-dead:
			return nil
		}
	}
}

// find returns the owner of a channel that the server opened; nil means that it has been refused.
func (f *forwards) find(u *upstream, nc ssh.NewChannel) *Listener {
	var a Addr
	switch nc.ChannelType() {
	case "forwarded-tcpip":
		var m TCPChannel
		if err := ssh.Unmarshal(nc.ExtraData(), &m); err != nil {
			_ = nc.Reject(ssh.ConnectionFailed, "malformed forwarded-tcpip")
			return nil
		}
		a = Addr{Host: m.Host, Port: m.Port}
	case "forwarded-streamlocal@openssh.com":
		var m struct {
			Path     string
			Reserved string
		}
		if err := ssh.Unmarshal(nc.ExtraData(), &m); err != nil {
			_ = nc.Reject(ssh.ConnectionFailed, "malformed forwarded-streamlocal@openssh.com")
			return nil
		}
		a = Addr{Path: m.Path}
	default:
		_ = nc.Reject(ssh.UnknownChannelType, "no client asked for "+use.Printable(nc.ChannelType()))
		return nil
	}
	l := f.owner(a, u.dead)
	if l == nil {
		_ = nc.Reject(ssh.ConnectionFailed, "no client listens on "+use.Printable(a.String()))
		return nil
	}
	return l
}

// Listen asks the server for a remote forward (RFC 4254 section 7.1). incoming is called, in a goroutine of its own,
// with each channel that the server opens for it, and returns when it has accepted or rejected it. The forward ends with Close or with
// the lease; if ctx ends before the server has answered, a forward that it still grants is cancelled.
func (l *Lease) Listen(ctx context.Context, permit *use.Permit, a Addr, incoming func(*NewChannel)) (*Listener, error) {
	if !permit.Valid(use.RemoteForward) {
		return nil, errors.New("no permit for a remote forward")
	}
	type result struct {
		ln  *Listener
		err error
	}
	u, err := l.homeNow(ctx)
	if err != nil {
		return nil, err
	}
	done := make(chan result, 1)
	l.pool.mu.Lock()
	l.holdLocked(u)
	l.pool.mu.Unlock()
	u.fwd.begin()
	u.pool.spawn(func() {
		ln, err := u.listen(l, a, incoming)
		u.fwd.settle(ln)
		if ln == nil {
			l.unhold(u)
		}
		if ln != nil && !l.own(ln) {
			ln.Close()
			ln, err = nil, errGone
		}
		done <- result{ln, err}
	})
	select {
	case r := <-done:
		return r.ln, r.err
	case <-ctx.Done():
		// The lease is about to be released: own cancels what comes after that.
		return nil, context.Cause(ctx)
	}
}

// own makes ln end with the lease; false if that has already ended.
func (l *Lease) own(ln *Listener) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.released {
		return false
	}
	l.listeners[ln] = struct{}{}
	return true
}

func (u *upstream) listen(l *Lease, a Addr, incoming func(*NewChannel)) (*Listener, error) {
	start, _, data := a.requests()
	ok, reply, err := u.conn.SendRequest(start, true, data)
	if err != nil {
		return nil, fmt.Errorf("asking for a remote forward: %w", err)
	}
	if !ok {
		return nil, ErrForwardRefused
	}
	if a.Path == "" && a.Port == 0 {
		var m struct{ Port uint32 }
		if err := ssh.Unmarshal(reply, &m); err != nil {
			return nil, fmt.Errorf("the server did not tell the port of the remote forward: %w", err)
		}
		a.Port = m.Port
	}
	return &Listener{
		lease: l, up: u, addr: a, incoming: incoming, pending: make(chan struct{}, maxPendingPerListener),
	}, nil
}
