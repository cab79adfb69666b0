package pool

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

// NewChannel is a channel that the server opens for a client. It has to be accepted or rejected, once.
type NewChannel struct {
	ssh.NewChannel
	up    *upstream
	lease *Lease
	// accepted is set where the channel had to be accepted to find out whose it is.
	accepted *Channel
	reqs     <-chan *ssh.Request
	// answered is shared by those that the same channel is offered to; nil: only one is. The first to answer has it.
	answered *atomic.Bool
}

// errTaken says that another client has taken the channel, or refused it.
var errTaken = errors.New("another client has answered")

// mine tells whether nobody else has answered.
func (n *NewChannel) mine() bool { return n.answered == nil || n.answered.CompareAndSwap(false, true) }

// Accept takes the channel. The requests must be drained until their channel closes; the caller closes the channel.
func (n *NewChannel) Accept() (*Channel, <-chan *ssh.Request, error) {
	if !n.mine() {
		return nil, nil, errTaken
	}
	p := n.up.pool
	if n.accepted != nil {
		p.mu.Lock()
		n.lease.holdLocked(n.up)
		n.accepted.giveLocked(n.lease)
		p.mu.Unlock()
		return n.accepted, n.reqs, nil
	}
	ch, reqs, err := n.NewChannel.Accept()
	if err != nil {
		return nil, nil, err
	}
	p.mu.Lock()
	n.lease.holdLocked(n.up)
	p.mu.Unlock()
	c, out := n.up.newChannel(n.lease, n.ChannelType(), ch, reqs)
	return c, out, nil
}

// Reject refuses the channel, or closes it where it had to be accepted before.
func (n *NewChannel) Reject(reason ssh.RejectionReason, message string) error {
	switch {
	case !n.mine():
		return errTaken
	case n.accepted == nil:
		return n.NewChannel.Reject(reason, message)
	}
	n.accepted.Close()
	n.up.pool.wg.Go(func() { discard(n.reqs) })
	return nil
}

// owner finds out whose channel nc is, and returns what hands it over, which returns when its owner has answered; nil:
// it has been refused.
func (u *upstream) owner(nc ssh.NewChannel) func() {
	switch nc.ChannelType() {
	case "x11":
		return u.x11Channel(nc)
	case "auth-agent@openssh.com":
		return func() { u.agentChannel(nc) }
	}
	l := u.fwd.find(u, nc)
	if l == nil {
		return nil
	}
	return func() { offer(&NewChannel{NewChannel: nc, up: u, lease: l.lease}, l.pending, l.incoming) }
}

// x11Owner is a session that forwards X11. The server tells nobody which session a connection belongs to, but the
// connection begins with the cookie that the session's x11-req has brought.
type x11Owner struct {
	lease    *Lease
	cookie   string // in hexadecimal, as in x11-req
	incoming func(*NewChannel)
	pending  chan struct{} // a place per channel that incoming has not answered
}

const (
	// x11Time is how long a connection to a forwarded display may take to show its cookie.
	x11Time = 30 * time.Second
	// maxX11Auth bounds the name and the data of its authorization, each.
	maxX11Auth = 256
)

// X11 makes the session's client the owner of the connections that bring the cookie of its x11-req (RFC 4254 section
// 6.3.1). incoming is called with each, in a goroutine of its own.
func (c *Channel) X11(cookie string, incoming func(*NewChannel)) {
	u := c.up
	u.pool.mu.Lock()
	defer u.pool.mu.Unlock()
	if c.closed.Load() == 0 {
		u.cookies[c] = &x11Owner{c.lease.Load(), strings.ToLower(cookie), incoming, make(chan struct{}, maxPendingPerListener)}
	}
}

// x11Channel accepts a connection to a forwarded display and reads its first bytes, which say whose it is.
func (u *upstream) x11Channel(nc ssh.NewChannel) func() {
	u.pool.mu.Lock()
	some := len(u.cookies) > 0
	u.pool.mu.Unlock()
	if !some {
		_ = nc.Reject(ssh.ConnectionFailed, "no client forwards X11")
		return nil
	}
	ch, reqs, err := nc.Accept()
	if err != nil {
		return nil
	}
	c, out := u.newChannel(nil, "x11", ch, reqs)
	n := &NewChannel{NewChannel: nc, up: u, accepted: c, reqs: out}
	t := time.AfterFunc(x11Time, func() { ch.Close() }) // ends the reads below
	first, cookie, err := readX11(ch)
	if !t.Stop() || err != nil {
		_ = n.Reject(ssh.ConnectionFailed, "")
		return nil
	}
	c.unread = first
	u.pool.mu.Lock()
	var owner *x11Owner
	for _, o := range u.cookies {
		if cookie != "" && o.cookie == cookie && o.lease != nil && !o.lease.gone {
			owner = o
		}
	}
	u.pool.mu.Unlock()
	if owner == nil {
		u.pool.log.Warn().Uint64("upstream", u.id).Msg("X11 connection with a cookie that no client has sent")
		_ = n.Reject(ssh.ConnectionFailed, "")
		return nil
	}
	n.lease = owner.lease
	return func() { offer(n, owner.pending, owner.incoming) }
}

// readX11 reads the set-up of an X11 connection up to and including its authorization data, and returns it and the
// latter in hexadecimal (X Window System Protocol, section 8).
func readX11(r io.Reader) (first []byte, cookie string, err error) {
	first = make([]byte, 12, 12+2*(maxX11Auth+3))
	if _, err := io.ReadFull(r, first); err != nil {
		return nil, "", err
	}
	var order binary.ByteOrder = binary.BigEndian
	switch first[0] {
	case 'B':
	case 'l':
		order = binary.LittleEndian
	default:
		return nil, "", errors.New("not the X11 protocol")
	}
	name, data := int(order.Uint16(first[6:])), int(order.Uint16(first[8:]))
	if name > maxX11Auth || data > maxX11Auth {
		return nil, "", errors.New("X11 authorization is too long")
	}
	padded := func(n int) int { return (n + 3) &^ 3 }
	first = first[:12+padded(name)+padded(data)]
	if _, err := io.ReadFull(r, first[12:]); err != nil {
		return nil, "", err
	}
	at := 12 + padded(name)
	return first, hex.EncodeToString(first[at : at+data]), nil
}

// agentOwner is a session that forwards its client's agent.
type agentOwner struct {
	lease    *Lease
	since    time.Time
	incoming func(*NewChannel) bool
	pending  chan struct{} // as an x11Owner's
}

// agentTime is how long a client may take to answer before another one of the same agent is asked, too: it may be stopped.
const agentTime = 2 * time.Second

// agentReq is the one request for agent forwarding that a server honours per connection.
type agentReq struct {
	done chan struct{} // closed when ok is set
	ok   bool
	// lost: its session has ended before the answer, which may have been yes. The next session asks again. Pool.mu guards it.
	lost bool
}

// Agent asks the server for agent forwarding (auth-agent-req@openssh.com by its name on the wire, request), once per
// connection, and makes the session's client an owner of the connections to the agent. incoming is called with each, in a
// goroutine of its own, and returns false if it has not taken it because the client is gone. Only for a session of an
// agent lane. It returns whether the server agreed.
func (c *Channel) Agent(ctx context.Context, permit *use.Permit, request string, incoming func(*NewChannel) bool) bool {
	u := c.up
	u.pool.mu.Lock()
	if !permit.Valid(use.Agent) || u.lane.Agent == "" || c.closed.Load() != 0 {
		u.pool.mu.Unlock()
		return false
	}
	u.agents[c] = &agentOwner{c.lease.Load(), time.Now(), incoming, make(chan struct{}, maxPendingPerListener)}
	q := u.agentReq
	if q == nil || q.lost {
		q = &agentReq{done: make(chan struct{})}
		u.agentReq = q
		u.pool.wg.Go(func() {
			ok, err := c.SendRequest(request, true, nil)
			u.pool.mu.Lock()
			q.ok, q.lost = ok, err != nil
			u.pool.mu.Unlock()
			close(q.done)
		})
	}
	u.pool.mu.Unlock()
	select {
	case <-q.done:
		return q.ok
	case <-ctx.Done():
		return false
	}
}

// agentChannel hands a connection to the forwarded agent to the client that came last: all of the lane have the same agent.
func (u *upstream) agentChannel(nc ssh.NewChannel) {
	u.pool.mu.Lock()
	owners := make([]*agentOwner, 0, len(u.agents))
	for _, o := range u.agents {
		if o.lease != nil && !o.lease.gone {
			owners = append(owners, o)
		}
	}
	u.pool.mu.Unlock()
	slices.SortFunc(owners, func(a, b *agentOwner) int { return b.since.Compare(a.since) })
	answered := &atomic.Bool{}
	taken := make(chan bool, len(owners))
	asked := 0
	for _, o := range owners {
		select {
		case o.pending <- struct{}{}:
		default:
			continue
		}
		asked++
		u.pool.wg.Go(func() { // ends with its client at the latest
			taken <- o.incoming(&NewChannel{NewChannel: nc, up: u, lease: o.lease, answered: answered})
			<-o.pending
		})
		select {
		case ok := <-taken:
			if asked--; ok {
				return
			}
		case <-time.After(agentTime):
		}
	}
	for ; asked > 0; asked-- {
		if <-taken {
			return
		}
	}
	_ = nc.Reject(ssh.ConnectionFailed, "no client forwards its agent")
}
