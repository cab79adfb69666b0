package pool

import (
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// Channel is a channel of one of a lease's upstreams.
type Channel struct {
	ssh.Channel

	up     *upstream
	lease  atomic.Pointer[Lease] // nil: a spare
	kind   string
	closed atomic.Int64 // when the server's CLOSE came, or the connection ended, in Unix nanoseconds
	unread []byte       // has been read, but not by the caller; the reader's
}

// newChannel makes a channel that has been opened count as one of the upstream's until the server has closed it, and
// keeps its requests from blocking the connection. l is nil for a spare. The hold of the lease ends with it.
func (u *upstream) newChannel(l *Lease, kind string, ch ssh.Channel, in <-chan *ssh.Request) (*Channel, <-chan *ssh.Request) {
	u.channels.Add(1)
	c := &Channel{Channel: ch, up: u, kind: kind}
	c.lease.Store(l)
	out := make(chan *ssh.Request)
	mine := func(r *ssh.Request) bool {
		if r.Type != "keepalive@openssh.com" {
			return false
		}
		select {
		case u.keepalives <- r:
		default:
		}
		return true
	}
	overflow := func() {
		ch.Close()
		if l := c.lease.Load(); l != nil && l.Overflow != nil {
			l.Overflow()
		}
	}
	u.pool.mu.Lock()
	if l != nil {
		l.used = true
	}
	u.pool.goLocked(func() { queue(in, out, mine, c.ended, overflow) })
	u.pool.mu.Unlock()
	return c, out
}

// ended is called when the server has closed the channel, or the connection has ended.
func (c *Channel) ended() {
	u := c.up
	u.channels.Add(-1)
	u.pool.mu.Lock()
	defer u.pool.mu.Unlock()
	c.closed.Store(time.Now().UnixNano())
	if l := c.lease.Load(); l != nil {
		l.unholdSoonLocked(u)
	}
	delete(u.agents, c)
	delete(u.cookies, c)
	if c.kind == "session" {
		u.sessionEndedLocked(c)
	}
}

// giveLocked makes a channel of a session l's, which holds the upstream for it.
func (c *Channel) giveLocked(l *Lease) {
	c.lease.Store(l)
	l.used = true
	if c.closed.Load() != 0 {
		l.unholdLocked(c.up) // ended could not
	}
}

// Upstream is the number of the channel's upstream, as in List.
func (c *Channel) Upstream() uint64 { return c.up.id }

// Lost is closed when the channel's upstream has ended.
func (c *Channel) Lost() <-chan struct{} { return c.up.dead }

// Down tells that the upstream's transport has failed: an EOF on the channel may be because of that.
func (c *Channel) Down() bool { return c.up.conn.Down() }

// Count adds channel data to the upstream's totals: bytes towards the remote host, and bytes from it.
func (c *Channel) Count(in, out int64) {
	if in != 0 {
		c.up.in.Add(in)
	}
	if out != 0 {
		c.up.out.Add(out)
	}
}

// Read reads the channel's data. It is for one reader.
func (c *Channel) Read(b []byte) (int, error) {
	if len(c.unread) > 0 {
		n := copy(b, c.unread)
		c.unread = c.unread[n:]
		return n, nil
	}
	return c.Channel.Read(b)
}

// overGrace is how long after it has ended all channels x/crypto may take to close its connection, for an end that did not
// come from the transport (a DISCONNECT, a protocol error).
const overGrace = 10 * time.Millisecond

// ClosedInOrder tells whether the server has closed the channel itself, so that all that it had to send was sent, rather
// than the connection's end. It may take 10 ms.
func (c *Channel) ClosedInOrder() bool {
	closed := c.closed.Load()
	if closed == 0 {
		return false
	}
	end := time.Unix(0, closed).Add(overGrace)
	time.Sleep(time.Until(end))
	over := c.up.conn.Over()
	return over.IsZero() || over.After(end)
}

// Granted tells whether a channel request of this type (pty-req, x11-req) has been granted on the upstream before, so
// that the next need not be waited for.
func (c *Channel) Granted(request string) bool {
	c.up.pool.mu.Lock()
	defer c.up.pool.mu.Unlock()
	return c.up.granted[request]
}

// Grant notes that it has been.
func (c *Channel) Grant(request string) {
	c.up.pool.mu.Lock()
	defer c.up.pool.mu.Unlock()
	c.up.granted[request] = true
}

// open opens a channel for l, which holds u for it. It does not outlive ctx, but an open that is under way does: it is
// closed as soon as it has been confirmed.
func (u *upstream) open(ctx context.Context, l *Lease, kind string, extra []byte) (*Channel, <-chan *ssh.Request, error) {
	type result struct {
		ch   *Channel
		reqs <-chan *ssh.Request
		err  error
	}
	done := make(chan result)
	// Not one that the pool waits for: x/crypto forgets an open that it sends in the moment when the connection ends.
	go func() {
		ch, reqs, err := u.conn.OpenChannel(kind, extra)
		var c *Channel
		if err == nil {
			c, reqs = u.newChannel(l, kind, ch, reqs)
		} else {
			l.unhold(u)
		}
		select {
		case done <- result{c, reqs, err}:
			return
		case <-ctx.Done():
		case <-u.dead:
		}
		if err == nil {
			c.Close()
			discard(reqs)
		}
	}()
	select {
	case r := <-done:
		return r.ch, r.reqs, r.err
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	case <-u.dead:
		return nil, nil, u.why()
	}
}

// request sends a global request. It does not outlive ctx.
func (u *upstream) request(ctx context.Context, name string, wantReply bool, payload []byte) (bool, []byte, error) {
	type result struct {
		ok   bool
		data []byte
		err  error
	}
	done := make(chan result, 1)
	u.pool.spawn(func() {
		ok, data, err := u.conn.SendRequest(name, wantReply, payload)
		done <- result{ok, data, err}
	})
	select {
	case r := <-done:
		return r.ok, r.data, r.err
	case <-ctx.Done():
		return false, nil, context.Cause(ctx)
	}
}
