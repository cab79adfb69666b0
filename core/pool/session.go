package pool

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// refusedPause is how long a session waits before it asks a connection again that was thought to have room: the server
	// may need a moment to forget a session that has ended.
	refusedPause = 100 * time.Millisecond
	// After maxRefused refusals in a row a connection that was thought to have room counts as full for fullTime: what an
	// ended session has left running still counts for sshd.
	maxRefused = 3
	fullTime   = time.Second
)

// Session opens a session channel (RFC 4254 section 6.1) on an upstream of the lane, or takes the spare that one keeps.
// permit is of the kind that starts on it, or attach. If the server allows no more sessions on one connection, another is
// dialled where that takes no person, else Session waits until one ends: waiting, which may be nil, is then called once.
// A refusal that has nothing to do with their number is an *ssh.OpenChannelError. The requests must be drained until
// their channel closes; the caller closes the channel.
func (l *Lease) Session(ctx context.Context, permit *use.Permit, lane Lane, waiting func()) (*Channel, <-chan *ssh.Request, error) {
	if !permit.Valid(use.Attach, use.Shell, use.Exec, use.Subsystem) {
		return nil, nil, errors.New("no permit for a session")
	}
	p := l.pool
	began := time.Now()
	for {
		p.mu.Lock()
		u, s, news, err := l.placeLocked(lane, time.Since(began))
		pause := lookEvery
		if u != nil {
			news = p.wake
			p.mu.Unlock()
			ch, reqs, failed := u.session(ctx, l, s)
			if failed == nil {
				return ch, reqs, nil
			}
			again := ctx.Err() == nil && (u.conn.Down() || errors.Is(failed, errSpareGone) || errors.Is(failed, errFull)) &&
				time.Since(began) < slotTime
			if !again {
				l.unhold(u)
				return nil, nil, failed
			}
			if pause = 0; errors.Is(failed, errFull) { // else nothing has been asked of it, and another will do
				pause = refusedPause
			}
			p.mu.Lock()
		}
		if err != nil {
			p.mu.Unlock()
			return nil, nil, err
		}
		g := p.growthLocked(l.laneKey(lane))
		g.waiting[l]++
		if u != nil { // not before: the target must not look as if it had no clients
			l.unholdLocked(u)
		}
		p.mu.Unlock()
		err = wake(ctx, news, pause)
		l.stopWaiting(g)
		if err != nil {
			return nil, nil, err
		}
		if waiting != nil && time.Since(began) >= sayAfter {
			waiting()
			waiting = nil
		}
	}
}

func (l *Lease) stopWaiting(g *growth) {
	p := l.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if g.waiting[l]--; g.waiting[l] == 0 {
		delete(g.waiting, l)
	}
	p.dropGrowthsLocked()
	p.quietLocked(l.key.key)
}

// wake returns when there is news, or after a time. The error is that of ctx.
func wake(ctx context.Context, news <-chan struct{}, after time.Duration) error {
	t := time.NewTimer(after)
	defer t.Stop()
	select {
	case <-news:
	case <-t.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// errFull says that the server allows no more sessions on this connection.
var errFull = errors.New("the server allows no more sessions")

// errSpareGone says that the server has closed a session of which nothing had been asked yet (ChannelTimeout).
var errSpareGone = errors.New("the server closed the session")

// sessions are those of one upstream, counted against what its server allows (MaxSessions of sshd). Pool.mu guards them.
type sessions struct {
	count int // open, or being opened
	open  int
	most  int // that were open at a time
	limit int // 0: not known
	// refused are refusals in a row since one was opened or has ended, the last at refusedAt.
	refused   int
	refusedAt time.Time
	spare     *opening
	// noSpare: the server does not bear a session that does nothing.
	noSpare bool
}

// opening is a session channel on its way. Until a client takes it it is a spare: a session that is opened before it is
// wanted, so that the next one starts without a round trip.
type opening struct {
	ready chan struct{} // closed when the rest is set
	spare bool
	ch    *Channel
	reqs  <-chan *ssh.Request
	err   error
}

// hasRoomLocked tells whether the server is not known to refuse another session. A spare that nobody has taken is room.
func (u *upstream) hasRoomLocked() bool {
	s := &u.sessions
	full := s.refused >= maxRefused && time.Since(s.refusedAt) < fullTime
	return s.spare != nil || s.limit == 0 || s.count < s.limit && !full
}

// keepSpareLocked opens a spare, if there is none and room for one. Only OpenSSH's server is known to bear it.
func (u *upstream) keepSpareLocked() {
	s := &u.sessions
	if s.spare == nil && !s.noSpare && u.conn.Server().OpenSSH && u.hasRoomLocked() && !u.conn.Down() && !u.pool.closed {
		s.spare = u.openSessionLocked(true)
	}
}

// reserveLocked makes room for one session: the spare, with the next one on its way, or one that is being opened.
func (u *upstream) reserveLocked() *opening {
	o := u.sessions.spare
	if o == nil {
		o = u.openSessionLocked(false)
	}
	u.sessions.spare = nil
	u.keepSpareLocked()
	return o
}

func (u *upstream) openSessionLocked(spare bool) *opening {
	o := &opening{ready: make(chan struct{}), spare: spare}
	u.sessions.count++
	// Not one that the pool waits for: x/crypto forgets an open that it sends in the moment when the connection ends.
	go func() {
		ch, reqs, err := u.conn.OpenChannel("session", nil)
		var c *Channel
		if err == nil {
			c, reqs = u.newChannel(nil, "session", ch, reqs)
		}
		u.pool.mu.Lock()
		defer u.pool.mu.Unlock()
		defer close(o.ready)
		o.ch, o.reqs, o.err = c, reqs, err
		s := &u.sessions
		if err == nil {
			s.open++
			s.refused = 0
			s.most = max(s.most, s.open)
			if s.limit > 0 { // replies are told out of order
				s.limit = max(s.limit, s.most)
			}
			return
		}
		s.count--
		if refused := (*ssh.OpenChannelError)(nil); errors.As(err, &refused) {
			s.refused++
			s.refusedAt = time.Now()
			switch {
			case s.count > 0 || s.most > 0:
				s.limit = max(s.most, 1)
				o.err = fmt.Errorf("%w: %w", errFull, err)
			case spare: // as for a server that is only jumped through (MaxSessions 0)
				s.noSpare = true
			}
		}
		if s.spare == o {
			s.spare = nil
		}
		u.pool.wakeLocked()
	}()
	return o
}

// session waits for a session that was reserved for l, which holds u for it: on failure the caller lets go.
func (u *upstream) session(ctx context.Context, l *Lease, o *opening) (*Channel, <-chan *ssh.Request, error) {
	var err error
	select {
	case <-o.ready:
		err = o.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-u.dead:
		err = u.why()
	}
	if err != nil {
		go func() { // see openSessionLocked
			select {
			case <-o.ready:
				if o.err == nil {
					o.ch.Close()
					discard(o.reqs)
				}
			case <-u.dead:
			}
		}()
		return nil, nil, err
	}
	u.pool.mu.Lock()
	gone := o.spare && o.ch.closed.Load() != 0
	if gone {
		u.sessions.noSpare = true
	} else {
		o.ch.giveLocked(l)
	}
	u.pool.mu.Unlock()
	if gone {
		l.Discard(o.reqs)
		return nil, nil, errSpareGone
	}
	return o.ch, o.reqs, nil
}

// sessionEndedLocked takes a session out of the count.
func (u *upstream) sessionEndedLocked(c *Channel) {
	s := &u.sessions
	s.count--
	s.open--
	s.refused = 0
	if o := s.spare; o != nil && o.ch == c {
		s.spare = nil
		s.noSpare = true // the server closes sessions that do nothing
		reqs := o.reqs
		u.pool.goLocked(func() { discard(reqs) })
	} else if s.limit > 0 {
		u.keepSpareLocked()
	}
	u.pool.wakeLocked()
}
