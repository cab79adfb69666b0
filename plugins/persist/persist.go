// Package persist is the plugin that keeps connections without clients, makes them in advance, and makes them again when
// they are lost.
package persist

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// master is what the plugin needs of *plugin.Host.
type master interface {
	Connections(ctx context.Context) ([]plugin.Connection, error)
	Connect(ctx context.Context, target string) (plugin.Connection, error)
	Resolve(ctx context.Context, target string) (plugin.Target, any, error)
	Drain(ctx context.Context, connection uint64) error
	Record(ctx context.Context, event, target, detail string) error
}

// sleepTime is how long after the event sleep it is believed, by a clock that stands still meanwhile: the one that tells of
// the end may not come.
const sleepTime = time.Minute

// callTime bounds a call to the master that waits for nobody.
const callTime = 5 * time.Second

// persist is the plugin. Its goroutines end with ctx, and Close waits for them.
type persist struct {
	zone *time.Location // of until

	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup
	start   sync.Once // of watch

	mu     sync.Mutex // guards what follows
	master master     // nil before the first Configure
	log    zerolog.Logger
	names  []wanted  // in advance, by the last configuration
	warmed []wanted  // those that were begun with
	locked bool      // muxproxy is
	asleep time.Time // when the machine was about to be; zero: it has woken up
	conns  map[uint64]*conn
	series map[string]*series // by what is dialled
	news   chan struct{}      // one token: conns have changed
}

// New returns the plugin.
func New() plugin.Plugin { return newPersist() }

func newPersist() *persist {
	p := &persist{
		zone: time.Local, conns: map[uint64]*conn{}, series: map[string]*series{}, news: make(chan struct{}, 1),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

var (
	_ plugin.Retainer = (*persist)(nil)
	_ plugin.Observer = (*persist)(nil)
	_ master          = (*plugin.Host)(nil)
)

// Describe implements plugin.Plugin.
func (p *persist) Describe() plugin.Info {
	return plugin.Info{
		Name: "persist", Version: "1", Host: block{},
		Wants: []plugin.Capability{plugin.CanObserve, plugin.CanList, plugin.CanConnect, plugin.CanClose},
	}
}

// Configure implements plugin.Plugin. What it brings counts when the event "policy" comes.
func (p *persist) Configure(_ context.Context, c *plugin.Config) plugin.Diagnostics {
	return p.configure(c, c.Host)
}

// Check implements plugin.Checker.
func (*persist) Check(_ context.Context, c *plugin.Config) plugin.Diagnostics {
	_, problems := read(c)
	return problems
}

func (p *persist) configure(c *plugin.Config, m master) plugin.Diagnostics {
	names, problems := read(c)
	if problems.HasErrors() {
		return problems
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.master, p.log, p.names = m, c.Log, names
	p.start.Do(func() { p.running.Go(p.watch) })
	return problems
}

// read returns what a configuration wants to have made in advance, and its problems.
func read(c *plugin.Config) (names []wanted, problems plugin.Diagnostics) {
	for _, b := range c.Hosts {
		r := b.Value.(*block).read(func(attribute, format string, args ...any) {
			problems = append(problems, b.Errorf(plugin.Path{attribute}, format, args...))
		})
		if (r.prewarm || r.reconnect) && (r.idle == 0 || r.max == 0) {
			problems = append(problems, b.Warnf(nil, "nothing is kept for 0s, so that prewarm and reconnect do nothing"))
		}
		if !r.prewarm {
			continue
		}
		var patterns []string
		for _, label := range b.Hosts {
			switch {
			case strings.HasPrefix(label, "!"):
			case strings.ContainsAny(label, "*?"):
				patterns = append(patterns, label)
			case !slices.ContainsFunc(names, func(w wanted) bool { return w.name == label }):
				names = append(names, wanted{label, r})
			}
		}
		if len(patterns) > 0 {
			problems = append(problems, b.Warnf(plugin.Path{"prewarm"},
				"prewarm is for hosts by their names: nobody knows what %s stands for", strings.Join(patterns, " and ")))
		}
	}
	return names, problems
}

// Close implements io.Closer.
func (p *persist) Close() error {
	p.set(p.cancel) // nothing is started any more
	p.running.Wait()
	return nil
}

// Observe implements plugin.Observer.
func (p *persist) Observe(ctx context.Context, e plugin.Event) {
	if e.Dropped > 0 {
		// What was missed may have been anything but the lock's last change, which comes late, and sleep does not last here.
		p.sync(ctx)
		p.poke()
	}
	switch e.Kind {
	case "up":
		p.up(e.Connection)
	case "down":
		p.down(e)
	case "locked":
		p.set(func() { p.locked = true })
		p.closeAll(ctx, "muxproxy was locked", func(r *rule) bool { return r.closeLocked })
	case "unlocked":
		p.set(func() { p.locked = false })
		p.poke()
		p.warmAgain(func(r *rule) bool { return r.closeLocked })
	case "sleep":
		p.set(func() { p.asleep = time.Now() })
		p.closeAll(ctx, "the machine went to sleep", func(r *rule) bool { return r.closeAsleep })
	case "wake":
		// If sleep came too late, or not at all, the connections are still there.
		p.closeAll(ctx, "the machine was asleep", func(r *rule) bool { return r.closeAsleep })
		p.set(func() { p.asleep = time.Time{} })
		p.poke()
		p.warmAgain(func(r *rule) bool { return r.closeAsleep })
	case "policy":
		p.sync(ctx)
		p.poke()
		p.warm()
	}
}

// sleepingLocked tells whether the machine is about to sleep, or does.
func (p *persist) sleepingLocked() bool {
	return !p.asleep.IsZero() && time.Since(p.asleep) < sleepTime
}

// set changes what mu guards.
func (p *persist) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

// record adds a line to the audit log. That it can't be is the master's to say, which then has other worries.
func (p *persist) record(event, target, detail string) {
	p.mu.Lock()
	m, log := p.master, p.log
	p.mu.Unlock()
	log.Info().Str("target", target).Str("detail", detail).Msg(event)
	ctx, cancel := context.WithTimeout(p.ctx, callTime)
	defer cancel()
	_ = m.Record(ctx, event, target, detail)
}
