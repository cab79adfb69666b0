package persist

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// lookTime bounds a wait for a time of the day: the wall clock may be set, and the machine may sleep.
const lookTime = time.Minute

// conn is a connection for which a block holds. All of it is guarded by persist.mu.
type conn struct {
	plugin.Connection
	rule *rule
	// since, until and why are of the last answer of Retain.
	since, until time.Time
	why          string // of its end, once that has come; "": it has not
	ended        bool   // it takes no new clients, or shall take none
	// again is when the master is to be told so once more; zero: it has been. tries counts how often it was told in vain.
	again time.Time
	tries int
}

// label says which connection is meant, in a record.
func label(id uint64) string { return fmt.Sprintf("connection %d", id) }

// up takes note of a connection.
func (p *persist) up(c plugin.Connection) {
	r := ruleOf(c.Block)
	if r == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.noteLocked(c, r)
}

func (p *persist) noteLocked(c plugin.Connection, r *rule) *conn {
	k := p.conns[c.ID]
	if k == nil {
		k = &conn{}
		p.conns[c.ID] = k
	}
	k.Connection, k.rule = c, r
	p.look()
	return k
}

// look has watch look again.
func (p *persist) look() {
	select {
	case p.news <- struct{}{}:
	default:
	}
}

// sync asks what connections there are, and for which of them blocks hold.
func (p *persist) sync(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	p.mu.Lock()
	m, log := p.master, p.log
	p.mu.Unlock()
	list, err := m.Connections(ctx)
	if err != nil {
		log.Warn().Err(err).Msg("connections can't be listed")
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.conns
	p.conns = map[uint64]*conn{}
	for _, c := range list {
		if r := ruleOf(c.Block); r != nil && c.Up {
			if k := before[c.ID]; k != nil {
				p.conns[c.ID] = k
			}
			p.noteLocked(c, r)
		}
	}
}

// Retain implements plugin.Retainer.
func (p *persist) Retain(_ context.Context, i *plugin.Idle) time.Time {
	c := i.Connection
	r := ruleOf(c.Block)
	if r == nil {
		return time.Time{}
	}
	until, why := r.keep(c.Since, i.Since, p.zone)
	now := wall()
	p.mu.Lock()
	switch {
	case p.locked && r.closeLocked:
		until, why = now, "muxproxy is locked"
	case p.sleepingLocked() && r.closeAsleep:
		until, why = now, "the machine goes to sleep"
	}
	k := p.noteLocked(c, r)
	again := k.since.Equal(i.Since) && k.until.Equal(until)
	k.since, k.until = i.Since, until
	kept := until.After(now)
	switch {
	case !kept:
		k.why = why
	case !k.ended: // else it is being closed, and that stays the reason
		k.why = ""
	}
	p.mu.Unlock()
	if kept && !again {
		stays := "kept until " + until.In(p.zone).Format(time.RFC3339)
		if until.Equal(never) {
			stays = "kept for ever"
		}
		p.record("keep", c.Target.String(), label(c.ID)+" "+stays)
	}
	return until
}

// down forgets a connection, and makes it again if it is to be.
func (p *persist) down(e plugin.Event) {
	c := e.Connection
	p.mu.Lock()
	k := p.conns[c.ID]
	delete(p.conns, c.ID)
	p.mu.Unlock()
	r := ruleOf(c.Block)
	switch {
	case e.Result == "lost" && r != nil && r.reconnect:
		until, _ := r.keep(c.Since, wall(), p.zone)
		if k != nil && c.Clients == 0 && !k.until.IsZero() {
			until = k.until
		}
		if k == nil || k.why == "" {
			p.again(c, r, e.Reason, until)
		}
	case e.Result == "closed" && k != nil && k.why != "":
		p.record("close", c.Target.String(), label(c.ID)+": "+k.why)
	}
}

// closeAll has the connections end for which one holds: those in use with their last client.
func (p *persist) closeAll(ctx context.Context, why string, which func(*rule) bool) {
	p.sync(ctx) // it is no time to have missed one
	p.mu.Lock()
	var ids []uint64
	for id, k := range p.conns {
		if which(k.rule) && !k.ended {
			k.ended, k.why = true, why
			ids = append(ids, id)
		}
	}
	p.mu.Unlock()
	p.drain(ids)
}

// drain tells the master that connections take no new clients. If that fails it is tried again: soon, or when what denied it
// may have changed.
func (p *persist) drain(ids []uint64) {
	p.mu.Lock()
	m, log := p.master, p.log
	p.mu.Unlock()
	for _, id := range ids {
		ctx, cancel := context.WithTimeout(p.ctx, callTime)
		err := m.Drain(ctx, id)
		cancel()
		if err == nil || errors.Is(err, plugin.ErrNotFound) || p.ctx.Err() != nil {
			continue
		}
		log.Warn().Err(err).Uint64("connection", id).Msg("can't be closed")
		p.set(func() {
			k := p.conns[id]
			if k == nil {
				return
			}
			if k.again = never; !errors.Is(err, plugin.ErrDenied) {
				k.again = wall().Add(backoff(k.tries))
				k.tries++
			}
			p.look()
		})
	}
}

// watch drains connections in use when their time is over. Those without clients the master asks about.
func (p *persist) watch() {
	t := time.NewTimer(lookTime)
	defer t.Stop()
	for {
		due, wait := p.due(wall())
		p.drain(due)
		if wait >= 0 {
			t.Reset(min(wait, lookTime))
		} else {
			t.Stop()
		}
		select {
		case <-t.C:
		case <-p.news:
		case <-p.ctx.Done():
			return
		}
	}
}

// due returns the connections whose time is over, and how long it is until that of the next one; negative: there is none.
func (p *persist) due(now time.Time) (ids []uint64, wait time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	wait = -1
	for id, k := range p.conns {
		at, why := k.rule.end(k.Since, p.zone)
		if k.ended {
			at, why = k.again, k.why
		}
		switch left := at.Sub(now); {
		case at.IsZero() || at.Equal(never):
		case left <= 0:
			k.ended, k.why, k.again = true, why, time.Time{}
			ids = append(ids, id)
		case wait < 0 || left < wait:
			wait = left
		}
	}
	return ids, wait
}
