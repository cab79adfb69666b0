package forward

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// Both are longer than what ssh and TCP wait for by themselves.
const (
	connectTime = 3 * time.Minute // for a connection that has to be made
	dialTime    = 3 * time.Minute // for the server to reach what a stream goes to
)

// dialer knows the connections to hosts.
type dialer struct {
	mu      sync.Mutex // guards what follows
	flights map[string]*flight
	links   map[string]link
}

// link is a connection that was just made, or found to be alive.
type link struct {
	id uint64
	at time.Time
}

// flight is one Connect that several wait for.
type flight struct {
	done chan struct{}
	id   uint64 // valid after done, as is err
	err  error
}

func (d *dialer) init() { d.flights, d.links = map[string]*flight{}, map[string]link{} }

// forget is told that a connection has ended.
func (d *dialer) forget(id uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for host, l := range d.links {
		if l.id == id {
			delete(d.links, host)
		}
	}
}

// connect returns the connection to a host. Many who come at once have it made once, and share its error.
func (p *Plugin) connect(ctx context.Context, h *plugin.Host, host string) (uint64, error) {
	d := &p.dialer
	d.mu.Lock()
	if l, ok := d.links[host]; ok && time.Since(l.at) < p.timing.fresh {
		d.mu.Unlock()
		return l.id, nil
	}
	f := d.flights[host]
	if f == nil {
		f = &flight{done: make(chan struct{})}
		d.flights[host] = f
		p.running.Go(func() {
			ctx, cancel := context.WithTimeout(p.ctx, connectTime)
			defer cancel()
			c, err := h.Connect(ctx, host)
			d.mu.Lock()
			delete(d.flights, host)
			if err == nil {
				d.links[host] = link{c.ID, time.Now()}
			}
			d.mu.Unlock()
			f.id, f.err = c.ID, err
			close(f.done)
		})
	}
	d.mu.Unlock()
	select {
	case <-f.done:
		return f.id, f.err
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// with does something with the connection to a host, a second time if the first one has ended meanwhile.
func (p *Plugin) with(ctx context.Context, h *plugin.Host, host string, do func(ctx context.Context, id uint64) error) error {
	for again := false; ; again = true {
		id, err := p.connect(ctx, h, host)
		if err != nil {
			return fmt.Errorf("can't connect to %s: %w", host, err)
		}
		limited, cancel := context.WithTimeout(ctx, dialTime)
		err = do(limited, id)
		cancel()
		if again || !errors.Is(err, plugin.ErrNotFound) {
			return err
		}
		p.dialer.forget(id)
	}
}
