package pool

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

// laneInteractive is the default lane.
const laneInteractive = "interactive"

// upstream is one SSH connection to a remote host and what the pool knows of it.
type upstream struct {
	pool *Pool
	id   uint64
	key  string
	spec Spec
	conn Conn
	// through is the last jump host's upstream, which carries this one; nil: none. Set before the first lease.
	through *upstream
	since   time.Time
	dead    chan struct{} // closed when the connection has ended and the upstream has left the list

	channels atomic.Int64
	in, out  atomic.Int64
	// keepalives are channel keepalives of the server's to be answered. They don't wait for a client: one that is
	// stopped would let the server give the whole connection up.
	keepalives chan *ssh.Request

	// guarded by Pool.mu
	leases   map[*Lease]struct{}
	draining bool
	reason   error  // why we closed it, for its clients
	idle     uint64 // counts the times that the last client left; a decision about an older idle is void

	fwd forwards
}

func newUpstream(p *Pool, id uint64, k flightKey, spec Spec, conn Conn) *upstream {
	u := &upstream{
		pool: p, id: id, key: k.key, spec: spec, conn: conn, since: time.Now(),
		dead: make(chan struct{}), leases: map[*Lease]struct{}{}, keepalives: make(chan *ssh.Request, 16),
	}
	u.spec = Spec{Target: spec.Target, Config: spec.Config} // the rest belongs to clients that come and go
	u.fwd.init()
	return u
}

// serves tells whether a client with this key may ride; Pool.mu is held. An upstream that an agent's key logged in
// carries only clients of that agent.
func (u *upstream) serves(k flightKey) bool {
	agent := u.conn.Server().AgentID
	return u.key == k.key && !u.draining && !u.conn.Down() && (agent == "" || agent == k.agent)
}

func (u *upstream) leaseLocked() *Lease {
	l := &Lease{up: u, listeners: map[*Listener]struct{}{}}
	u.leases[l] = struct{}{}
	return l
}

func (u *upstream) infoLocked() ConnInfo {
	state := Up
	if u.draining {
		state = Draining
	}
	return ConnInfo{
		ID: u.id, Target: u.spec.Target, Lane: laneInteractive, State: state, Since: u.since, LastHeard: u.conn.LastHeard(),
		Server: u.conn.Server(), Clients: len(u.leases), Channels: u.channels.Load(), In: u.in.Load(), Out: u.out.Load(),
	}
}

// run starts what drains the connection and notices its end. Its goroutines end with the connection; the last one
// takes the upstream out of the list.
func (u *upstream) run() {
	var drains sync.WaitGroup
	drains.Go(u.serveRequests)
	drains.Go(u.answerKeepalives)
	drains.Go(u.serveChannels)
	u.pool.wg.Go(func() {
		err := u.conn.Wait()
		u.pool.mu.Lock()
		u.pool.ups = slices.DeleteFunc(u.pool.ups, func(o *upstream) bool { return o == u })
		if u.reason == nil {
			u.reason = lostError(u.spec.Target, u.conn.Cause())
		}
		clients := len(u.leases)
		u.pool.mu.Unlock()
		close(u.dead)
		drains.Wait()
		u.fwd.end()
		u.pool.log.Info().Uint64("upstream", u.id).Stringer("target", u.spec.Target).Int("clients", clients).
			AnErr("cause", u.conn.Cause()).AnErr("transport", err).Msg("upstream has ended")
	})
}

// serveRequests answers the server's global requests. keepalive@openssh.com wants any answer; hostkeys-00@openssh.com
// and whatever else comes are ours to refuse, never a client's.
func (u *upstream) serveRequests() {
	for r := range Queue(u.conn.Requests(), func() { u.conn.Close() }) {
		_ = r.Reply(false, nil) // a dead connection is noticed by its watcher
	}
}

// answerKeepalives answers what Lease.queue finds. A server that sends more of them than it reads answers to gets fewer.
func (u *upstream) answerKeepalives() {
	for {
		select {
		case r := <-u.keepalives:
			_ = r.Reply(false, nil) // any answer will do
		case <-u.dead:
			return
		}
	}
}

// serveChannels hands the channels that the server opens to their owners.
func (u *upstream) serveChannels() {
	var wg sync.WaitGroup
	slots := make(chan struct{}, maxPendingOpens)
	for nc := range u.conn.Channels() {
		select {
		case slots <- struct{}{}:
		default:
			_ = nc.Reject(ssh.ResourceShortage, "too many channels are waiting")
			continue
		}
		wg.Go(func() {
			l := u.fwd.find(u, nc)
			<-slots
			if l != nil {
				l.take(nc)
			}
		})
	}
	wg.Wait()
}

const (
	// maxQueued and maxQueuedBytes bound the requests that wait for someone who does not take them.
	maxQueued      = 4096
	maxQueuedBytes = 1 << 20
	// maxPendingOpens bounds the channels of a server that wait until their owner is known.
	maxPendingOpens = 256
	// maxPendingPerListener bounds those that wait for one owner's answer.
	maxPendingPerListener = 64
)

// Queue takes requests from in without ever letting them wait there: x/crypto stops reading the whole connection at
// the 17th that nobody takes (chanSize in its mux.go). It ends, and closes what it returns, when in is closed and the
// rest has been taken. Past a bound overflow is called, once, and all further requests are dropped; it must end the
// connection or channel that sends them. The returned channel must be drained.
func Queue(in <-chan *ssh.Request, overflow func()) <-chan *ssh.Request {
	out := make(chan *ssh.Request)
	go queue(in, out, nil, func() {}, overflow)
	return out
}

// queue is Queue; mine may keep a request for itself, and must not block; closed is called when in is closed.
func queue(in <-chan *ssh.Request, out chan<- *ssh.Request, mine func(*ssh.Request) bool, closed, overflow func()) {
	defer close(out)
	var waiting []*ssh.Request
	size := 0 // bytes of payload in waiting
	over := false
	for in != nil || len(waiting) > 0 {
		var next *ssh.Request
		var to chan<- *ssh.Request
		if len(waiting) > 0 {
			next, to = waiting[0], out
		}
		select {
		case r, ok := <-in:
			switch {
			case !ok:
				closed()
				in = nil
			case mine != nil && mine(r):
			case len(waiting) < maxQueued && size+len(r.Payload) <= maxQueuedBytes && !over:
				waiting = append(waiting, r)
				size += len(r.Payload)
			case !over:
				over = true
				// Not here: ending a connection may wait for its reader, which may wait for us.
				go overflow()
			}
		case to <- next:
			size -= len(next.Payload)
			waiting[0] = nil
			waiting = waiting[1:]
		}
	}
}

// release is called when the last client has left: it asks how long the upstream stays, and closes it when that is
// over and nobody came.
func (u *upstream) release(idle uint64) {
	for {
		ctx, cancel := context.WithTimeout(u.pool.ctx, 10*time.Second)
		u.pool.mu.Lock()
		info := u.infoLocked()
		u.pool.mu.Unlock()
		until := time.Time{}
		if info.State == Up {
			until = u.pool.retainer.Retain(ctx, info)
		}
		cancel()
		wait := time.Until(until)
		if wait <= 0 {
			break
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-u.dead:
			t.Stop()
			return
		}
		if !u.stillIdle(idle) {
			return
		}
	}
	u.pool.mu.Lock()
	if len(u.leases) > 0 || u.idle != idle {
		u.pool.mu.Unlock()
		return
	}
	// From here on newcomers dial anew; they never meet a closing upstream.
	u.draining = true
	u.pool.ups = slices.DeleteFunc(u.pool.ups, func(o *upstream) bool { return o == u })
	u.pool.mu.Unlock()
	u.conn.Close()
}

func (u *upstream) stillIdle(idle uint64) bool {
	u.pool.mu.Lock()
	defer u.pool.mu.Unlock()
	return len(u.leases) == 0 && u.idle == idle
}

// Lease is a client's hold on its target's upstream. It must be released.
type Lease struct {
	// Overflow ends the client: the server sends it more channel requests than can wait. Set before the first channel is
	// opened; nil: only the channel ends.
	Overflow func()

	up   *upstream
	once sync.Once

	mu        sync.Mutex // guards what follows
	released  bool
	listeners map[*Listener]struct{}
}

// hostKeysStillGood checks what the user's files say now about the keys that the server and the jump hosts on the way
// have shown. If they don't like one any more, its upstream and l's take no new clients.
func hostKeysStillGood(l *Lease, spec Spec) error {
	// The upstreams that carry l's, which may take no new clients themselves, rather than any for the same jump hosts.
	for u := l.up; u != nil; u = u.through {
		if err := u.hostKeyStillGood(spec); err != nil {
			l.up.drain()
			return err
		}
		if last := len(spec.Via) - 1; last >= 0 { // as many as there are upstreams below: they are part of the sharing key
			hop := spec.Via[last]
			hop.Via = spec.Via[:last]
			spec = hop
		}
	}
	return nil
}

func (u *upstream) hostKeyStillGood(spec Spec) error {
	k, ok := u.conn.(HostKeyKeeper)
	if !ok {
		return nil
	}
	err := k.HostKeyStillGood(spec)
	if err != nil {
		u.drain()
	}
	return err
}

// drain lets the upstream take no new clients.
func (u *upstream) drain() {
	u.pool.mu.Lock()
	u.draining = true
	u.pool.mu.Unlock()
}

// Lost is closed when the upstream has ended.
func (l *Lease) Lost() <-chan struct{} { return l.up.dead }

// Down tells that the upstream's transport has failed: an EOF on one of its channels may be because of that.
func (l *Lease) Down() bool { return l.up.conn.Down() }

// Reason is a person's line about why the upstream has ended; nil before Lost.
func (l *Lease) Reason() error {
	l.up.pool.mu.Lock()
	defer l.up.pool.mu.Unlock()
	return l.up.reason
}

// ID is the upstream's number, as in List.
func (l *Lease) ID() uint64 { return l.up.id }

// Count adds channel data to the upstream's totals: bytes towards the remote host, and bytes from it.
func (l *Lease) Count(in, out int64) {
	if in != 0 {
		l.up.in.Add(in)
	}
	if out != 0 {
		l.up.out.Add(out)
	}
}

// Alive tells whether the server has given a sign of life within two keepalive intervals: one that is late is not
// dead yet, but nothing should vouch for it.
func (l *Lease) Alive() bool {
	return !l.up.conn.Down() && time.Since(l.up.conn.LastHeard()) < 2*aliveInterval(l.up.spec.Config.Get("serveraliveinterval"))
}

func aliveInterval(seconds string) time.Duration {
	if d, err := time.ParseDuration(seconds + "s"); err == nil && d > 0 {
		return d
	}
	return DefaultAliveInterval
}

// DefaultAliveInterval is how often a silent upstream is asked for a sign of life where ServerAliveInterval is not set.
const DefaultAliveInterval = 15 * time.Second

// Release gives the lease back: its remote forwards are cancelled, and with the last lease the upstream ends unless
// the Retainer keeps it. It returns when nothing of the client is left on the upstream but channels that the caller
// still holds.
func (l *Lease) Release() {
	l.once.Do(func() {
		l.mu.Lock()
		l.released = true
		var listeners []*Listener
		for ln := range l.listeners {
			listeners = append(listeners, ln)
		}
		l.mu.Unlock()
		for _, ln := range listeners {
			ln.Close()
		}

		u := l.up
		u.pool.mu.Lock()
		delete(u.leases, l)
		last := len(u.leases) == 0
		if last {
			u.idle++
		}
		idle := u.idle
		if last && !u.pool.closed {
			u.pool.wg.Go(func() { u.release(idle) })
		}
		u.pool.mu.Unlock()
	})
}

// Session opens a session channel (RFC 4254 section 6.1). permit is of the kind that starts on it, or attach. The
// requests must be drained until their channel closes; the caller closes the channel.
func (l *Lease) Session(ctx context.Context, permit *use.Permit) (ssh.Channel, <-chan *ssh.Request, error) {
	if !permit.Valid(use.Attach, use.Shell, use.Exec, use.Subsystem) {
		return nil, nil, errors.New("no permit for a session")
	}
	return l.open(ctx, "session", nil)
}

// Open opens any other kind of channel (RFC 4254 section 5.1); a refusal is an *ssh.OpenChannelError. The requests
// must be drained until their channel closes; the caller closes the channel.
func (l *Lease) Open(ctx context.Context, permit *use.Permit, kind string, extra []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	if !permit.Valid(use.LocalForward, use.Jump, use.Other) || kind == "session" {
		return nil, nil, errors.New("no permit for a channel")
	}
	return l.open(ctx, kind, extra)
}

// Request sends a global request of the kind other and returns the reply (RFC 4254 section 4). It does not outlive
// ctx.
func (l *Lease) Request(ctx context.Context, permit *use.Permit, name string, wantReply bool, payload []byte) (bool, []byte, error) {
	if !permit.Valid(use.Other) {
		return false, nil, errors.New("no permit for a request")
	}
	return l.request(ctx, name, wantReply, payload)
}

func (l *Lease) request(ctx context.Context, name string, wantReply bool, payload []byte) (bool, []byte, error) {
	type result struct {
		ok   bool
		data []byte
		err  error
	}
	done := make(chan result, 1)
	l.Go(func() {
		ok, data, err := l.up.conn.SendRequest(name, wantReply, payload)
		done <- result{ok, data, err}
	})
	select {
	case r := <-done:
		return r.ok, r.data, r.err
	case <-ctx.Done():
		return false, nil, context.Cause(ctx)
	}
}

// Go runs f, which ends when the upstream or the client has ended, in a goroutine that the pool waits for.
func (l *Lease) Go(f func()) { l.up.pool.wg.Go(f) }

// Discard refuses what still comes on a channel's requests, until that closes.
func (l *Lease) Discard(reqs <-chan *ssh.Request) { l.Go(func() { discard(reqs) }) }

// Adopt makes a channel that the server opened count as one of the upstream's. The requests that it returns must be
// drained.
func (l *Lease) Adopt(ch ssh.Channel, reqs <-chan *ssh.Request) (ssh.Channel, <-chan *ssh.Request) {
	return l.queue(ch, reqs)
}

// open does not outlive ctx, but an open that is under way does: it is closed as soon as it has been confirmed.
func (l *Lease) open(ctx context.Context, kind string, extra []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	type result struct {
		ch   ssh.Channel
		reqs <-chan *ssh.Request
		err  error
	}
	u := l.up
	done := make(chan result)
	// Not one that the pool waits for: x/crypto forgets an open that it sends in the moment when the connection ends.
	go func() {
		ch, reqs, err := u.conn.OpenChannel(kind, extra)
		if err == nil {
			ch, reqs = l.queue(ch, reqs)
		}
		select {
		case done <- result{ch, reqs, err}:
			return
		case <-ctx.Done():
		case <-u.dead:
		}
		if err == nil {
			ch.Close()
			discard(reqs)
		}
	}()
	select {
	case r := <-done:
		return r.ch, r.reqs, r.err
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	case <-u.dead:
		return nil, nil, l.Reason()
	}
}

// queue keeps the channel in the upstream's count until the server has closed it too, and its requests from blocking
// the connection.
func (l *Lease) queue(ch ssh.Channel, in <-chan *ssh.Request) (ssh.Channel, <-chan *ssh.Request) {
	u := l.up
	u.channels.Add(1)
	out := make(chan *ssh.Request)
	c := &channel{Channel: ch, conn: u.conn}
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
		if l.Overflow != nil {
			l.Overflow()
		}
	}
	u.pool.wg.Go(func() {
		defer u.channels.Add(-1)
		queue(in, out, mine, func() { c.closed.Store(time.Now().UnixNano()) }, overflow)
	})
	return c, out
}

// channel is a channel of an upstream that knows how it ended.
type channel struct {
	ssh.Channel
	conn   Conn
	closed atomic.Int64 // when the server's CLOSE came, or the connection ended, in Unix nanoseconds
}

// overGrace is how long after it has ended all channels x/crypto may take to close its connection, for an end that did not
// come from the transport (a DISCONNECT, a protocol error).
const overGrace = 10 * time.Millisecond

// closedInOrder tells whether the server has closed the channel itself. It may take overGrace.
func (c *channel) closedInOrder() bool {
	closed := c.closed.Load()
	if closed == 0 {
		return false
	}
	end := time.Unix(0, closed).Add(overGrace)
	time.Sleep(time.Until(end))
	over := c.conn.Over()
	return over.IsZero() || over.After(end)
}

// ClosedInOrder tells whether the server has closed a channel of Session, Open or Adopt itself, so that all that it had
// to send was sent, rather than the connection's end. It may take 10 ms.
func ClosedInOrder(ch ssh.Channel) bool {
	c, ok := ch.(*channel)
	return ok && c.closedInOrder()
}

// discard refuses requests until their channel closes.
func discard(reqs <-chan *ssh.Request) {
	for r := range reqs {
		_ = r.Reply(false, nil)
	}
}
