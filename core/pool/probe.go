package pool

import (
	"context"
	"time"
)

const (
	// trustTime is how long after its last sign of life an upstream is not asked for another before it is used again.
	trustTime = 5 * time.Second
	// probeTime is how long a server may take to give one.
	probeTime = 2 * time.Second
	// clockTick is how often the clock is looked at, and clockJump what counts as a jump: the machine slept, or somebody
	// set the clock.
	clockTick = time.Second
	clockJump = 3 * time.Second
)

// probe is a question for a sign of life, and those who wait for it.
type probe struct {
	done chan struct{} // closed when err is set
	err  error
}

// suspectLocked tells whether the last probe has failed, and nothing has come since. It compares no times: clocks are set.
func (u *upstream) suspectLocked() bool {
	return !u.suspect.IsZero() && u.conn.LastHeard().Equal(u.suspect)
}

// checked returns nil if the server is known to live, after asking it if it has been silent. Otherwise the upstream takes
// no new clients until it gives a sign of life; what is on it goes on, for it may only be slow.
func (u *upstream) checked(ctx context.Context) error {
	if age := u.pool.clock().Sub(u.conn.LastHeard()); age >= 0 && age < trustTime {
		return nil
	}
	q := u.probe()
	select {
	case <-q.done:
		return q.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// probe asks the server for a sign of life, unless somebody does already.
func (u *upstream) probe() *probe {
	p := u.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if u.probing != nil {
		return u.probing
	}
	q := &probe{done: make(chan struct{})}
	u.probing = q
	var ask func()
	if o := u.sessions.spare; o != nil && o.ch != nil {
		// Not a global request: that would wait behind others that the server is slow to answer. Any reply will do.
		ask = func() { go func() { _, _ = o.ch.SendRequest("keepalive@openssh.com", true, nil) }() }
	}
	heard := u.conn.LastHeard()
	p.goLocked(func() {
		ctx, cancel := context.WithTimeout(p.ctx, probeTime)
		defer cancel()
		began := time.Now()
		q.err = u.conn.Probe(ctx, ask)
		silent := q.err != nil && p.ctx.Err() == nil
		p.mu.Lock()
		u.probing = nil
		if silent {
			u.suspect = heard
		}
		close(q.done)
		p.mu.Unlock()
		if silent { // a log that takes nothing must not stop the pool
			p.log.Warn().Uint64("upstream", u.id).Stringer("target", u.spec.Target).Err(q.err).Dur("after", time.Since(began)).
				Msg("no sign of life; no new clients until there is one")
		}
	})
	return q
}

// watchClock asks all upstreams for a sign of life when the clock has jumped, or stood still for this process: connections
// seldom survive that, and nobody should find out by waiting.
func (p *Pool) watchClock() {
	tick := time.NewTicker(clockTick)
	defer tick.Stop()
	last := p.clock()
	for {
		select {
		case <-tick.C:
		case <-p.ctx.Done():
			return
		}
		now := p.clock()
		jump := now.Round(0).Sub(last.Round(0)) - clockTick // by the wall clock, which goes on while the machine sleeps
		last = now
		if jump.Abs() < clockJump {
			continue
		}
		p.mu.Lock()
		ups := append([]*upstream(nil), p.ups...)
		p.mu.Unlock()
		p.log.Info().Dur("by", jump).Msg("the clock has jumped")
		for _, u := range ups {
			u.probe()
		}
		p.Reconsider() // what was to be kept until then may be overdue
	}
}
