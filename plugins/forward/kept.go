package forward

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// maxAdded and maxText bound the forwards that commands add, and the texts of each, so that what is kept of them is below
// the 64 KiB that the master takes.
const (
	maxAdded = 64
	maxText  = 300
)

// kept is a forward that a command has added, as it is stored over restarts.
type kept struct {
	ID         int       `json:"id"`
	Kind       kind      `json:"kind"`
	Spec       string    `json:"spec"` // as it was given
	Host       string    `json:"host"`
	Until      time.Time `json:"until,omitzero"`
	WithClient bool      `json:"with_client,omitempty"`
}

// store is all that is stored.
type store struct {
	Version int    `json:"version"`
	Last    int    `json:"last"` // the highest ID that was given
	Added   []kept `json:"added"`
}

// restore starts the forwards that were stored, once. Without them nothing may be stored, since that would take their place: an
// error means that they could not be had, and may be later.
func (p *Plugin) restore(ctx context.Context) error {
	select {
	case p.keeping <- struct{}{}:
		defer func() { <-p.keeping }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p.mu.Lock()
	host, log, restored := p.host, p.log, p.restored
	p.mu.Unlock()
	if restored {
		return nil
	}
	data, err := host.Kept(ctx)
	if err != nil && !errors.Is(err, plugin.ErrDenied) { // what policy does not let it read it can't replace either
		return fmt.Errorf("the forwards that were added before can't be read: %w", err)
	}
	s := stored(data, log)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.restored = true
	p.lastID = max(p.lastID, s.Last)
	p.restoreLocked(s.Added)
	return nil
}

// restoreLater does the same until it goes well.
func (p *Plugin) restoreLater() {
	for pause := p.timing.first; ; pause = min(2*pause, p.timing.most) {
		select {
		case <-time.After(pause):
		case <-p.ctx.Done():
			return
		}
		if p.restore(p.ctx) == nil {
			return
		}
	}
}

// stored reads what was kept. What has come through and can't be understood is lost, with a line in the log: it must not keep
// the plugin from running.
func stored(data []byte, log zerolog.Logger) (s store) {
	if len(data) == 0 {
		return store{}
	}
	err := json.Unmarshal(data, &s)
	if err == nil && s.Version != 1 {
		err = fmt.Errorf("they are of version %d", s.Version)
	}
	if err != nil {
		log.Error().Err(err).Msg("the forwards that were added before are lost")
		return store{}
	}
	return s
}

// restoreLocked starts what was stored, but for what is over.
func (p *Plugin) restoreLocked(list []kept) {
	for _, k := range list {
		s, err := parseSpec(k.Kind, k.Spec)
		if err != nil || s.listen.gateway() || !k.Until.IsZero() && !time.Now().Before(k.Until) { // as add
			continue
		}
		p.startLocked(&forward{
			wish: wish{spec: s, host: k.Host}, id: fmt.Sprint(k.ID), text: k.Spec, until: k.Until, withClient: k.WithClient,
		})
	}
	p.watchLocked()
}

// keep stores the forwards that commands have added.
func (p *Plugin) keep(ctx context.Context) error {
	select {
	case p.keeping <- struct{}{}:
		defer func() { <-p.keeping }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p.mu.Lock()
	host := p.host
	s := store{Version: 1, Last: p.lastID, Added: []kept{}}
	for _, f := range p.forwards {
		if f.where == "" {
			k := kept{Kind: f.spec.kind, Spec: f.text, Host: f.host, Until: f.until, WithClient: f.withClient}
			_, _ = fmt.Sscan(f.id, &k.ID) // it is one
			s.Added = append(s.Added, k)
		}
	}
	p.mu.Unlock()
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return host.Keep(ctx, data)
}

// drop ends a forward that a command has added; false: somebody else has.
func (p *Plugin) drop(f *forward, why string) bool {
	p.mu.Lock()
	i := slices.Index(p.forwards, f)
	if i >= 0 {
		p.forwards = slices.Delete(p.forwards, i, i+1)
	}
	p.mu.Unlock()
	if i < 0 {
		return false
	}
	f.end(why)
	ctx, cancel := context.WithTimeout(p.ctx, 5*time.Second)
	defer cancel()
	if err := p.keep(ctx); err != nil && p.ctx.Err() == nil {
		f.log.Error().Err(err).Msg("a forward that has ended will be back after a restart")
	}
	return true
}

// watchLocked sees to it that forwards that end with a connection's clients do.
func (p *Plugin) watchLocked() {
	if p.watching || !slices.ContainsFunc(p.forwards, func(f *forward) bool { return f.withClient }) {
		return
	}
	p.watching = true
	p.running.Go(p.watch)
}

// watch looks at the clients of the connections for as long as there are forwards that end with them.
func (p *Plugin) watch() {
	tick := time.NewTicker(p.timing.clients)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-p.ctx.Done():
			return
		}
		p.mu.Lock()
		var list []*forward
		for _, f := range p.forwards {
			if f.withClient {
				list = append(list, f)
			}
		}
		p.watching = len(list) > 0
		host := p.host
		p.mu.Unlock()
		if len(list) == 0 {
			return
		}
		for _, f := range list {
			// What can't be told ends nothing.
			if n, err := f.clients(p.ctx, host); err == nil && n == 0 && f.resolved() {
				p.drop(f, "the connection's last client has left")
			}
		}
	}
}
