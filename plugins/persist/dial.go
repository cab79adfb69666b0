package persist

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// restTime is the time between two looks whether something may be dialled again.
const restTime = time.Minute

// dialTime bounds one try, a login that stalls included.
const dialTime = 2 * time.Minute

// wanted is a host that is to be connected to in advance.
type wanted struct {
	name string
	rule rule // of the block that names it first; that another one holds is found out on the way
}

// series is a connection that is to come, and the tries to make it. It is not changed but for its channel.
type series struct {
	dial    string        // what the master is told
	target  string        // for records
	prewarm bool          // in advance; else again
	rule    rule          // as it was in the beginning
	until   time.Time     // when the connection would not be kept any more
	poke    chan struct{} // one token: another try may do better now
	cancel  context.CancelFunc
}

// backoff is the wait before another try, after so many: 1 s, doubled up to 1 min, with up to half as much again, so that
// what was lost at once does not come back at once.
func backoff(waits int) time.Duration {
	d := min(time.Second<<min(waits, 6), 40*time.Second)
	return d + rand.N(d/2)
}

// warm begins with the connections that are wanted in advance and were not before, and ends the tries for those that are
// not any more.
func (p *persist) warm() {
	p.mu.Lock()
	before, names := p.warmed, p.names
	p.warmed = names
	has := func(list []wanted, name string) bool {
		return slices.ContainsFunc(list, func(w wanted) bool { return w.name == name })
	}
	for dial, s := range p.series {
		if s.prewarm && !has(names, dial) {
			s.cancel()
			delete(p.series, dial)
		}
	}
	p.mu.Unlock()
	for _, w := range names {
		if !has(before, w.name) {
			p.beginWarm(w)
		}
	}
}

// warmAgain begins anew with those that were closed for a while.
func (p *persist) warmAgain(which func(*rule) bool) {
	p.mu.Lock()
	names := p.warmed
	p.mu.Unlock()
	for _, w := range names {
		if which(&w.rule) {
			p.beginWarm(w)
		}
	}
}

func (p *persist) beginWarm(w wanted) {
	p.begin(&series{dial: w.name, target: w.name, prewarm: true, rule: w.rule, until: p.untilIfNow(w.rule)})
}

// untilIfNow is how long a connection would be kept that was made now.
func (p *persist) untilIfNow(r rule) time.Time {
	now := wall()
	until, _ := r.keep(now, now, p.zone)
	return until
}

// again makes a connection that was lost, and would have been kept until then.
func (p *persist) again(c plugin.Connection, r *rule, reason string, until time.Time) {
	host := c.Target.Host
	if c.Target.Alias != "" {
		host = c.Target.Alias // what ssh_config has of it may be under this name
	}
	s := &series{
		dial:   c.Target.User + "@" + net.JoinHostPort(host, strconv.Itoa(int(c.Target.Port))),
		target: c.Target.String(), rule: *r, until: until,
	}
	if until.After(wall()) && p.begin(s) {
		p.record("lost", s.target, fmt.Sprintf("%s: %s; connecting again", label(c.ID), reason))
	}
}

// begin starts a series, unless there is one for the same.
func (p *persist) begin(s *series) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.series[s.dial] != nil || p.ctx.Err() != nil {
		return false
	}
	s.poke = make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(p.ctx)
	s.cancel = cancel
	p.series[s.dial] = s
	p.running.Go(func() {
		defer cancel()
		p.run(ctx, s)
		p.set(func() {
			if p.series[s.dial] == s {
				delete(p.series, s.dial)
			}
		})
	})
	return true
}

// poke has all that failed tried again soon, that too which waits for something to change.
func (p *persist) poke() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.conns {
		if !k.again.IsZero() {
			k.again = wall()
		}
	}
	p.look()
	for _, s := range p.series {
		select {
		case s.poke <- struct{}{}:
		default:
		}
	}
}

// errUnwanted is that policy does not want a connection.
var errUnwanted = errors.New("policy does not want it any more")

// run tries until there is a connection, or none is to be had or wanted.
func (p *persist) run(ctx context.Context, s *series) {
	began := time.Now()
	wait, waits := time.Duration(0), 0
	if !s.prewarm {
		wait, waits = backoff(0), 1
	}
	var last error
	for until := s.until; ; {
		var timer <-chan time.Time
		if wait >= 0 {
			timer = time.After(wait)
		}
		select {
		case <-timer:
		case <-s.poke:
			wait, waits = backoff(0), 1
			if s.prewarm {
				until = p.untilIfNow(s.rule)
			}
			continue
		case <-ctx.Done():
			return
		}
		if p.resting() {
			wait = restTime // or until it is poked
			continue
		}
		if !wall().Before(until) {
			why := "the connection would not be kept any more"
			if last != nil {
				why += "; last: " + last.Error()
			}
			p.record("give-up", s.target, why)
			return
		}
		c, err := p.try(ctx, s)
		_, refused := errors.AsType[*plugin.LoginError](err)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			how := "made again"
			if s.prewarm {
				how = "made in advance"
			}
			took := time.Since(began).Round(time.Millisecond)
			p.record("connect", c.Target.String(), fmt.Sprintf("%s, %s after %s", label(c.ID), how, took))
			return
		case refused, errors.Is(err, errUnwanted), s.prewarm && !s.rule.reconnect && !errors.Is(err, plugin.ErrDenied):
			p.record("give-up", s.target, err.Error())
			return
		case errors.Is(err, plugin.ErrDenied):
			p.record("wait", s.target, err.Error()+"; until policy changes, or the lock is opened")
			wait = -1
		default:
			if last == nil {
				p.record("fail", s.target, err.Error()+"; trying again")
			}
			wait = backoff(waits)
			waits++
		}
		last = err
	}
}

// resting tells whether nothing is to be dialled now.
func (p *persist) resting() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.locked || p.sleepingLocked()
}

// try makes the connection if policy wants it.
func (p *persist) try(ctx context.Context, s *series) (plugin.Connection, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	p.mu.Lock()
	m := p.master
	p.mu.Unlock()
	_, value, err := m.Resolve(ctx, s.dial)
	switch r := ruleOf(value); {
	case errors.Is(err, plugin.ErrDenied) && !s.prewarm: // it had a block
		return plugin.Connection{}, errUnwanted
	case err != nil:
		return plugin.Connection{}, err
	case r == nil || s.prewarm && !r.prewarm || !s.prewarm && !r.reconnect:
		return plugin.Connection{}, errUnwanted
	}
	return m.Connect(ctx, s.dial)
}
