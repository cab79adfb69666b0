package pluginhost

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/use"
)

// maxEvents is how many wait for a plugin that does not read.
const maxEvents = 256

// Event is something that plugins with the capability "observe" are told.
type Event struct {
	Time time.Time
	// Kind is "decision" or "end" of a use, "up" or "down" of a connection, "locked" or "unlocked" of the master, "sleep"
	// or "wake" of the machine. "policy" is the Manager's own, which also tells "locked" anew to a plugin that starts.
	Kind string
	ID   string // joins the two records of a use
	// Use is set for the first two kinds, Connection for the next two.
	Use        use.Use
	Denied     *use.Denied // of a decision; nil: allowed
	Result     use.Result  // of an end; of "down", with status "closed" or "lost" and an error
	Connection Connection
}

// concerns reports whether a plugin may know of e: of hosts without a block of it, it may not.
func (e Event) concerns(plugin string, l Lookup) bool {
	switch {
	case e.Connection.ID != 0:
		return l.Covers(plugin, e.Connection.Target)
	case e.Use.Kind != "":
		return l.Covers(plugin, e.Use.Target)
	}
	return true
}

// Observe tells the plugins that may know. It never blocks: what a plugin does not take in time is dropped and counted.
func (m *Manager) Observe(e Event) {
	if lockChange(e.Kind) {
		m.telling.Lock()
		defer m.telling.Unlock()
		m.locked = e.Kind == "locked"
	}
	s := m.set()
	var wire *pluginpb.Event
	for _, p := range s.plugins {
		if d := p.description(); d == nil || !d.hook("observe") || !p.has(plugin.CanObserve) ||
			!e.concerns(p.spec.Name, s.lookup) {
			continue
		}
		if wire == nil {
			wire = eventToPB(e)
		}
		if e.Connection.ID != 0 {
			p.events.add(withBlock(wire, s.block(p.spec.Name, e.Connection.Target)))
		} else {
			p.events.add(wire)
		}
	}
}

// block is the plugin's block that holds for connections to t; "" if there is none, or it can't be evaluated.
func (s *Set) block(plugin string, t use.Target) string {
	if s.lookup == nil {
		return ""
	}
	id, denied := s.lookup.Block(plugin, use.Use{Target: t})
	if denied != nil {
		return ""
	}
	return id
}

// lockChange reports whether events of a kind are about the lock. The last of them is never lost.
func lockChange(kind string) bool { return kind == "locked" || kind == "unlocked" }

// tellPolicy tells a plugin that its configuration is in force, and that the lock holds, if it does: its process may be
// another one than that which was told.
func (s *supervised) tellPolicy() {
	if d := s.description(); d == nil || !d.hook("observe") || !s.has(plugin.CanObserve) {
		return
	}
	s.m.telling.Lock()
	defer s.m.telling.Unlock()
	if s.m.locked {
		s.events.add(eventToPB(Event{Time: time.Now(), Kind: "locked"}))
	}
	s.events.add(eventToPB(Event{Time: time.Now(), Kind: "policy"}))
}

// Observed reports whether there is a plugin that Observe tells anything.
func (m *Manager) Observed() bool {
	return slices.ContainsFunc(m.set().plugins, func(p *supervised) bool {
		d := p.description()
		return d != nil && d.hook("observe") && p.has(plugin.CanObserve)
	})
}

// events are what waits for one plugin. An event is shared by plugins, and not changed.
type events struct {
	mu    sync.Mutex // guards what follows
	queue []*pluginpb.Event
	lock  *pluginpb.Event // the lock's last change, if there was no room for it: it comes late
	lost  uint64          // since the last one that went
	total uint64          // lost ever
	more  chan struct{}   // has one element if the queue may have something
}

func newEvents() *events { return &events{more: make(chan struct{}, 1)} }

func (q *events) add(e *pluginpb.Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.queue) >= maxEvents {
		if lockChange(e.GetKind()) {
			if e, q.lock = q.lock, e; e == nil {
				return
			}
		}
		q.lost++
		q.total++
		return
	}
	q.queue = append(q.queue, e)
	select {
	case q.more <- struct{}{}:
	default:
	}
}

// take returns the oldest event, and how many were lost before it; nil if there is none.
func (q *events) take() (*pluginpb.Event, uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.queue) == 0 {
		return nil, 0
	}
	e, lost := q.queue[0], q.lost
	q.queue, q.lost = q.queue[1:], 0
	if q.lock != nil {
		q.queue, q.lock = append(q.queue, q.lock), nil
	}
	return e, lost
}

// clear forgets what waits.
func (q *events) clear() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.queue, q.lock, q.lost = nil, nil, 0
}

func (q *events) dropped() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.total
}

// deliver sends events to one process until it ends.
func (q *events) deliver(ctx context.Context, inst *instance, log zerolog.Logger) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := inst.Client.Observe(ctx)
	for err == nil {
		e, lost := q.take()
		if e == nil {
			select {
			case <-q.more:
				continue
			case <-inst.Done():
				return
			case <-ctx.Done():
				return
			case <-stream.Context().Done():
				err = stream.Context().Err()
				continue
			}
		}
		if lost > 0 {
			e = withDropped(e, lost)
		}
		err = stream.Send(e)
	}
	select {
	case <-inst.Done():
	case <-ctx.Done():
	default:
		log.Warn().Msg("the plugin observes no more")
	}
}
