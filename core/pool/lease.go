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

// Lease is a client's hold on its target's upstreams: the one that it attached to, its home, which carries its
// forwards, and those that carry its sessions. It must be released.
type Lease struct {
	// Overflow ends the client: the server sends it more channel requests than can wait. Set before the first channel is
	// opened; nil: only the channel ends.
	Overflow func()

	pool   *Pool
	key    flightKey
	spec   Spec    // to log in once more
	by     use.Use // the attach
	silent bool    // that takes no person
	since  time.Time
	// loggedIn: an answer of the client's person has logged its upstream in. Set before anybody has the lease.
	loggedIn bool
	once     sync.Once
	homeID   atomic.Uint64 // number of home

	mu        sync.Mutex // guards what follows
	released  bool
	listeners map[*Listener]struct{}

	// guarded by Pool.mu
	home   *upstream         // nil after it has ended without this client
	used   bool              // there has been something of the client's on an upstream
	holds  map[*upstream]int // channels and forwards on each
	lost   func(Loss)        // nil until Watch
	losses []Loss            // before Watch
	gone   bool              // released
}

// Loss is the end of an upstream that a lease held.
type Loss struct {
	Upstream uint64 // its number
	Reason   error  // a line for a person
	// Elsewhere: the client can go on, for its home, or channels or forwards of it, are on other upstreams, or it has had
	// none yet.
	Elsewhere bool
}

func (p *Pool) newLeaseLocked(u *upstream, k flightKey, spec Spec, by use.Use) *Lease {
	l := &Lease{
		pool: p, key: k, spec: spec, by: by, silent: u.conn.Server().Silent, since: time.Now(),
		listeners: map[*Listener]struct{}{}, holds: map[*upstream]int{},
	}
	l.setHomeLocked(u)
	if by.Kind == use.Attach {
		u.keepSpareLocked()
	}
	return l
}

var errGone = errors.New("the client is gone")

// Watch has lost called, in a goroutine of its own, for each upstream of the lease that has ended or will, until the
// lease is released. It may be called once.
func (l *Lease) Watch(lost func(Loss)) {
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	l.lost = lost
	for _, loss := range l.losses {
		l.pool.goLocked(func() { lost(loss) })
	}
	l.losses = nil
}

// lostLocked tells of u's end.
func (l *Lease) lostLocked(u *upstream) {
	loss := Loss{Upstream: u.id, Reason: u.reason, Elsewhere: l.elsewhereLocked(u)}
	if loss.Elsewhere && l.home == u {
		l.setHomeLocked(nil)
	}
	// x/crypto can forget an open that it sends in the moment when the connection ends: nobody would take its hold off.
	if l.holds[u] = 0; u != l.home {
		delete(l.holds, u)
		u.letGoLocked(l)
	}
	switch {
	case l.gone:
	case l.lost == nil:
		l.losses = append(l.losses, loss)
	default:
		lost := l.lost
		l.pool.goLocked(func() { lost(loss) })
	}
}

// newcomerTime is how long a client that has used nothing yet counts as one that would better have come later.
const newcomerTime = 3 * time.Second

// elsewhereLocked tells whether the client could go on without u. One that came in the moment when the connection broke has
// lost nothing by that, if another can be had.
func (l *Lease) elsewhereLocked(u *upstream) bool {
	if l.home != nil && l.home != u && !l.home.conn.Down() {
		return true
	}
	if l.silent && !l.used && time.Since(l.since) < newcomerTime && u.conn.Cause() != nil {
		return true
	}
	for o, n := range l.holds {
		if o != u && n > 0 {
			return true
		}
	}
	return false
}

// doomedLocked tells whether the client has lost its connection, and is about to hear of it.
func (l *Lease) doomedLocked() bool {
	return l.home != nil && l.home.conn.Down() && !l.elsewhereLocked(l.home)
}

// holdLocked counts a channel or forward of the lease on u. One that was released holds nothing: nobody would let it go. Nor
// does an upstream that has ended.
func (l *Lease) holdLocked(u *upstream) {
	select {
	case <-u.dead:
		return
	default:
	}
	if l.mayHoldLocked(u) {
		l.holds[u]++
	}
}

// mayHoldLocked lets the client use u though others may not. It tells whether the client is still there.
func (l *Lease) mayHoldLocked(u *upstream) bool {
	if l.gone {
		return false
	}
	l.holds[u] += 0
	u.joinLocked(l)
	return true
}

// unholdLocked is the opposite of holdLocked. What is not the client's home is let go with the last.
func (l *Lease) unholdLocked(u *upstream) {
	if l.gone || l.holds[u] == 0 {
		return
	}
	if l.holds[u]--; l.holds[u] == 0 && u != l.home {
		delete(l.holds, u)
		u.letGoLocked(l)
	}
}

// unholdSoonLocked is unholdLocked for a channel that has ended. If that was because of the connection, the lease must
// hold that still to hear of it; and a connection that is closed as soon as nobody holds it would look like the reason
// (Channel.ClosedInOrder).
func (l *Lease) unholdSoonLocked(u *upstream) {
	if u == l.home {
		l.unholdLocked(u)
		return
	}
	l.pool.goLocked(func() {
		t := time.NewTimer(2 * overGrace)
		defer t.Stop()
		select {
		case <-t.C:
		case <-u.dead:
		case <-l.pool.ctx.Done():
		}
		l.unhold(u)
	})
}

func (l *Lease) unhold(u *upstream) {
	l.pool.mu.Lock()
	l.unholdLocked(u)
	l.pool.mu.Unlock()
}

// Release gives the lease back: its remote forwards are cancelled, and with the last lease an upstream ends unless
// the Retainer keeps it. It returns when nothing of the client is left on the upstreams but channels that the caller
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

		p := l.pool
		p.mu.Lock()
		defer p.mu.Unlock()
		l.gone = true
		for u := range l.holds {
			u.letGoLocked(l)
		}
		clear(l.holds)
	})
}

// ID is the number of the client's home, as in List; 0 after that has ended without the client.
func (l *Lease) ID() uint64 { return l.homeID.Load() }

// LoggedIn is when the client's person has logged the upstream in, by an answer that was part of what the server took;
// zero: somebody else has, or nobody had to answer.
func (l *Lease) LoggedIn() time.Time {
	if l.loggedIn {
		return l.since
	}
	return time.Time{}
}

func (l *Lease) setHomeLocked(u *upstream) {
	l.home = u
	id := uint64(0)
	if u != nil {
		id = u.id
		l.holds[u] += 0
		u.joinLocked(l)
	}
	l.homeID.Store(id)
}

// homeNow is the client's home; if that has ended, another upstream that it may use becomes it, or one that can be
// dialled without a person. ctx bounds that.
func (l *Lease) homeNow(ctx context.Context) (*upstream, error) {
	began := time.Now()
	for {
		l.pool.mu.Lock()
		u, wait, err := l.homeLocked(time.Since(began))
		l.pool.mu.Unlock()
		if u != nil || err != nil {
			return u, err
		}
		select {
		case <-wait:
		case <-time.After(laneTime):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (l *Lease) homeLocked(waited time.Duration) (*upstream, <-chan struct{}, error) {
	p := l.pool
	if l.gone {
		return nil, nil, errGone
	}
	if l.home != nil {
		return l.home, nil, nil // also when it is down: its loss is on its way
	}
	lane := Lane{Agent: l.key.lane}
	var best *upstream
	for _, u := range p.ups {
		if l.mayUseLocked(u) && u.lane.Agent == lane.Agent && (best == nil || u.lane.Class < best.lane.Class) {
			best = u
		}
	}
	if best != nil {
		l.setHomeLocked(best)
		return best, nil, nil
	}
	g := p.growths[l.laneKey(lane)]
	if !l.silent || waited > slotTime || g != nil && time.Since(g.failed) < growPause {
		return nil, nil, errLost
	}
	return nil, p.growLocked(l, lane), nil
}

// reasonLocked is why the client has no upstream.
func (l *Lease) reasonLocked() error {
	if l.home != nil && l.home.reason != nil {
		return l.home.reason
	}
	return lostError(l.spec.Target, nil)
}

// Alive tells whether the servers that carry something of the client's have given a sign of life within two keepalive
// intervals: one that is late is not dead yet, but nothing should vouch for it.
func (l *Lease) Alive() bool {
	l.pool.mu.Lock()
	var ups []*upstream
	for u, n := range l.holds {
		if n > 0 {
			ups = append(ups, u)
		}
	}
	if len(ups) == 0 && l.home != nil {
		ups = append(ups, l.home)
	}
	l.pool.mu.Unlock()
	return !slices.ContainsFunc(ups, func(u *upstream) bool { return !u.alive() })
}

// Open opens any other kind of channel (RFC 4254 section 5.1) on the client's home; a refusal is an
// *ssh.OpenChannelError. The requests must be drained until their channel closes; the caller closes the channel.
func (l *Lease) Open(ctx context.Context, permit *use.Permit, kind string, extra []byte) (*Channel, <-chan *ssh.Request, error) {
	if !permit.Valid(use.LocalForward, use.Jump, use.Other) || kind == "session" {
		return nil, nil, errors.New("no permit for a channel")
	}
	u, err := l.homeNow(ctx)
	if err != nil {
		return nil, nil, err
	}
	l.pool.mu.Lock()
	l.holdLocked(u)
	l.pool.mu.Unlock()
	return u.open(ctx, l, kind, extra)
}

// Request sends a global request of the kind other and returns the reply (RFC 4254 section 4). It does not outlive
// ctx.
func (l *Lease) Request(ctx context.Context, permit *use.Permit, name string, wantReply bool, payload []byte) (bool, []byte, error) {
	if !permit.Valid(use.Other) {
		return false, nil, errors.New("no permit for a request")
	}
	u, err := l.homeNow(ctx)
	if err != nil {
		return false, nil, err
	}
	l.pool.mu.Lock()
	l.used = true
	l.pool.mu.Unlock()
	return u.request(ctx, name, wantReply, payload)
}

// Go runs f, which ends when the upstreams or the client have ended, in a goroutine that the pool waits for.
func (l *Lease) Go(f func()) { l.pool.spawn(f) }

// Discard refuses what still comes on a channel's requests, until that closes.
func (l *Lease) Discard(reqs <-chan *ssh.Request) { l.Go(func() { discard(reqs) }) }

// discard refuses requests until their channel closes.
func discard(reqs <-chan *ssh.Request) {
	for r := range reqs {
		_ = r.Reply(false, nil)
	}
}
