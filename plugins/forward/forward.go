// Package forward is the plugin for standing forwards: ports and Unix sockets that are open without an ssh, lead through
// the master's connections, which are made when somebody comes, and are opened again whenever they were lost.
package forward

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// block is what stands in a host block: forward { ... }
type block struct {
	Dynamic []dynamicBlock `hcl:"dynamic,block" doc:"SOCKS and HTTP CONNECT"`
	Local   []localBlock   `hcl:"local,block" doc:"from this machine to one place"`
	Remote  []remoteBlock  `hcl:"remote,block" doc:"from the host to one place here"`
}

type dynamicBlock struct {
	Address string `hcl:"address,label"`
	Users   string `hcl:"users,optional" default:"self" words:"self,any" doc:"whose processes may connect"`
	Gateway bool   `hcl:"gateway,optional" doc:"may listen on other addresses than loopback"`
}

type localBlock struct {
	Address string `hcl:"address,label"`
	To      string `hcl:"to" doc:"where it leads: HOST:PORT as the host sees it, or a socket's path there"`
	Users   string `hcl:"users,optional" default:"self" words:"self,any" doc:"whose processes may connect"`
	Gateway bool   `hcl:"gateway,optional" doc:"may listen on other addresses than loopback"`
}

type remoteBlock struct {
	Address string `hcl:"address,label"`
	To      string `hcl:"to" doc:"where it leads: HOST:PORT as this machine sees it, or a socket's path here"`
	Gateway bool   `hcl:"gateway,optional" doc:"may listen on other addresses than loopback"`
}

// timing are times that tests change.
type timing struct {
	first, most time.Duration // the pause before a forward is tried again, doubled each time
	grace       time.Duration // until a policy that Configure has brought has to be in force
	fresh       time.Duration // for which a connection needs no probe before it is used again
	clients     time.Duration // between two looks whether a connection has clients left
}

// maxWaiting is how many connections of one forward may be before their stream at once. Of a dynamic or local one more wait
// in the kernel. It is each forward's own: who may connect to one can't keep others from theirs.
const maxWaiting = 512

// Plugin is the plugin forward.
type Plugin struct {
	timing  timing
	uid     int // whose connections are let in
	finder  *finder
	dialer  dialer
	ctx     context.Context // ends with Close
	stop    context.CancelFunc
	running sync.WaitGroup // everything but streams that were handed over: those end by themselves
	keeping chan struct{}  // holds an element while what is kept is read or written: the last state is written last

	mu         sync.Mutex // guards what follows
	host       *plugin.Host
	log        zerolog.Logger
	forwards   []*forward
	lastID     int  // of those that commands have added
	lastOwn    int  // of those in policy
	configured bool // once at least
	restored   bool // what was kept has been read
	watching   bool // watch runs
}

// New returns the plugin.
func New() plugin.Plugin { return newPlugin() }

func newPlugin() *Plugin {
	p := &Plugin{
		timing: timing{
			first: time.Second, most: time.Minute, grace: 10 * time.Second, fresh: 5 * time.Second, clients: 2 * time.Second,
		},
		uid: os.Geteuid(), finder: newFinder(), keeping: make(chan struct{}, 1),
	}
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.dialer.init()
	return p
}

var (
	_ plugin.Plugin    = (*Plugin)(nil)
	_ plugin.Observer  = (*Plugin)(nil)
	_ plugin.Commander = (*Plugin)(nil)
)

// Describe implements plugin.Plugin.
func (*Plugin) Describe() plugin.Info {
	return plugin.Info{
		Name: "forward", Version: "1", Host: block{},
		Wants: []plugin.Capability{
			plugin.CanObserve, plugin.CanList, plugin.CanConnect, plugin.CanDial, plugin.CanListen, plugin.CanKeep,
		},
		Verbs: []plugin.Verb{
			{Usage: "add -L|-R|-D SPEC HOST", Doc: "open a forward, as ssh's option would"},
			{Usage: "list", Doc: "list the forwards, with their state and what they carry"},
			{Usage: "remove ID|SPEC", Doc: "close a forward that was added; its streams go on"},
		},
	}
}

// wish is one forward as it is asked for: two that are equal are the same over a reload.
type wish struct {
	spec             spec
	host             string // as ssh would be told
	anyUser, gateway bool
}

// wanted is a wish of policy's.
type wanted struct {
	wish
	block any    // the value of its block
	where string // a person's name for it
	pos   string // FILE:LINE of it
}

// Check implements plugin.Checker.
func (*Plugin) Check(_ context.Context, c *plugin.Config) plugin.Diagnostics {
	_, problems := read(c)
	return problems
}

// read returns what a configuration wants, and its problems.
func read(c *plugin.Config) (all []wanted, problems plugin.Diagnostics) {
	for _, b := range c.Hosts {
		w, ds := wishes(b)
		all = append(all, w...)
		problems = append(problems, ds...)
	}
	return all, append(problems, twice(c.Hosts, all)...)
}

// Configure implements plugin.Plugin. Forwards that are still wanted go on, with their listeners; those that are not are
// closed, and their streams go on.
func (p *Plugin) Configure(ctx context.Context, c *plugin.Config) plugin.Diagnostics {
	all, problems := read(c)
	if problems.HasErrors() {
		return problems
	}
	p.mu.Lock()
	p.host, p.log = c.Host, c.Log
	var gone []*forward
	p.forwards = slices.DeleteFunc(p.forwards, func(f *forward) bool {
		if f.where == "" { // a command's
			return false
		}
		i := slices.IndexFunc(all, func(w wanted) bool { return w.wish == f.wish })
		if i < 0 {
			gone = append(gone, f)
			return true
		}
		f.setBlock(all[i].block, all[i].pos)
		all = slices.Delete(all, i, i+1)
		return false
	})
	for _, f := range p.forwards {
		f.wake()
	}
	p.mu.Unlock()
	var ending sync.WaitGroup // before others take their addresses
	for _, f := range gone {
		ending.Go(func() { f.end("policy has it no more") })
	}
	ending.Wait()
	p.mu.Lock()
	for _, w := range all {
		p.lastOwn++
		p.startLocked(&forward{wish: w.wish, id: fmt.Sprintf("p%d", p.lastOwn), where: w.where, block: w.block, pos: w.pos})
	}
	first := !p.configured
	p.configured = true
	log := p.log
	p.mu.Unlock()
	if !first {
		return problems
	}
	if err := p.restore(ctx); err != nil {
		log.Error().Err(err).Msg("it is tried again")
		p.running.Go(p.restoreLater)
	}
	return problems
}

// wishes reads a block.
func wishes(b plugin.Block) (out []wanted, problems plugin.Diagnostics) {
	v := b.Value.(*block)
	host, where := "", "host"
	for _, label := range b.Hosts {
		where += fmt.Sprintf(" %q", label)
		if host == "" && !strings.ContainsAny(label, "*?!") {
			host = label
		}
	}
	if host == "" && len(v.Dynamic)+len(v.Local)+len(v.Remote) > 0 {
		return nil, plugin.Diagnostics{b.Errorf(nil,
			"a forward needs one host to go to, and no label of its host block names one: put it into a block of its own")}
	}
	add := func(k kind, i int, address, to, users string, gateway bool) {
		at := plugin.Path{string(k), i}
		w := wanted{wish{spec{kind: k}, host, users == "any", gateway}, b.Value, where, b.Pos}
		var err error
		if w.spec.listen, err = parseListen(k, address); err != nil {
			problems = append(problems, b.Errorf(at, "%q is nothing to listen on: %v", address, err))
			return
		}
		if k != dynamic {
			if w.spec.to, err = parseTo(to); err != nil {
				problems = append(problems, b.Errorf(append(at, "to"), "%v", err))
				return
			}
		}
		switch open := w.spec.listen.gateway(); {
		case open && !gateway:
			problems = append(problems, b.Errorf(at, "%s lets other machines in: say gateway = true if it should", w.spec.listen))
			return
		case open && k != remote && !w.anyUser:
			problems = append(problems, b.Warnf(at,
				`%s lets only your own processes on this machine in: for other machines say users = "any"`, w.spec.listen))
		}
		out = append(out, w)
	}
	for i, d := range v.Dynamic {
		add(dynamic, i, d.Address, "", d.Users, d.Gateway)
	}
	for i, l := range v.Local {
		add(local, i, l.Address, l.To, l.Users, l.Gateway)
	}
	for i, r := range v.Remote {
		add(remote, i, r.Address, r.To, "", r.Gateway)
	}
	return out, problems
}

// twice warns of addresses that only one of several forwards can have. It is no error: their blocks may hold in turns.
func twice(blocks []plugin.Block, all []wanted) (problems plugin.Diagnostics) {
	type place struct {
		listen endpoint
		host   string // of a remote forward
	}
	seen := map[place]string{}
	for _, w := range all {
		at := place{listen: w.spec.listen}
		if w.spec.kind == remote {
			at.host = w.host
		}
		if other, ok := seen[at]; ok {
			i := slices.IndexFunc(blocks, func(b plugin.Block) bool { return b.Value == w.block })
			problems = append(problems, blocks[i].Warnf(nil, "%s: %s listens there, too", w.spec.listen, other))
		}
		seen[at] = fmt.Sprintf("the %s forward of %s", w.spec.kind, w.where)
	}
	return problems
}

// startLocked begins a forward.
func (p *Plugin) startLocked(f *forward) {
	f.p, f.log = p, p.log.With().Str("forward", f.spec.String()).Str("host", f.host).Logger()
	f.master = p.host
	f.init()
	p.forwards = append(p.forwards, f)
	ctx, stop := context.WithCancelCause(p.ctx)
	f.stop = stop
	p.running.Go(func() { f.run(ctx) })
}

// Close implements io.Closer: all ports are closed.
func (p *Plugin) Close() error {
	p.stop()
	p.running.Wait()
	return nil
}

// Observe implements plugin.Observer: what waits is tried as soon as it may go better.
func (p *Plugin) Observe(_ context.Context, e plugin.Event) {
	switch e.Kind {
	case "up", "unlocked", "wake":
		for _, f := range p.all() {
			if f.overdue() {
				p.drop(f, errOver.Error())
			} else if f.waits() {
				f.wake()
			}
		}
	case "down":
		p.dialer.forget(e.Connection.ID)
	}
}

func (p *Plugin) all() []*forward {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.forwards)
}

var errOver = errors.New("its time is over")
