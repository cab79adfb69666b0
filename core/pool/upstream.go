package pool

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// upstream is one SSH connection to a remote host and what the pool knows of it.
type upstream struct {
	pool *Pool
	id   uint64
	key  string
	spec Spec
	conn Conn
	// through is the last jump host's upstream, which carries this one; nil: none. Set before the first lease.
	through *upstream
	since   time.Time
	dead    chan struct{} // closed when the connection has ended and the upstream has left the list

	channels atomic.Int64
	in, out  atomic.Int64
	// keepalives are channel keepalives of the server's to be answered. They don't wait for a client: one that is
	// stopped would let the server give the whole connection up.
	keepalives chan *ssh.Request

	// guarded by Pool.mu
	leases   map[*Lease]struct{}
	lane     Lane
	sessions sessions
	granted  map[string]bool          // session requests that the server has granted once
	cookies  map[*Channel]*x11Owner   // of the sessions that forward X11
	agents   map[*Channel]*agentOwner // of the sessions that forward their client's agent
	agentReq *agentReq                // the one that the server honours; nil: not asked yet
	probing  *probe                   // under way
	suspect  time.Time                // LastHeard when a probe failed, until it changes
	draining bool
	reason   error         // why we closed it, for its clients
	idle     chan struct{} // of the time without clients that is now, closed when one comes; nil: there are some
	left     time.Time     // when the last client left
	kept     time.Time     // until when, as the Retainer said after that; zero: nothing yet

	fwd forwards
}

func newUpstream(p *Pool, id uint64, k flightKey, spec Spec, conn Conn) *upstream {
	u := &upstream{
		pool: p, id: id, key: k.key, spec: spec, conn: conn, since: time.Now(), lane: spec.Lane,
		dead: make(chan struct{}), leases: map[*Lease]struct{}{}, keepalives: make(chan *ssh.Request, 16),
		granted: map[string]bool{}, cookies: map[*Channel]*x11Owner{}, agents: map[*Channel]*agentOwner{},
	}
	u.spec = Spec{Target: spec.Target, Config: spec.Config} // the rest belongs to clients that come and go
	u.fwd.init()
	return u
}

// serves tells whether a client with this key may attach; Pool.mu is held.
func (u *upstream) serves(k flightKey) bool {
	return u.key == k.key && u.lane.Agent == k.lane && u.admits(k.agent) && !u.draining && !u.conn.Down() && !u.suspectLocked()
}

// admits tells whether a client of this agent may ride: what an agent's key logged in carries only clients of that agent.
func (u *upstream) admits(agent string) bool {
	by := u.conn.Server().AgentID
	return by == "" || by == agent
}

func (u *upstream) infoLocked() ConnInfo {
	state := Up
	if u.draining {
		state = Draining
	}
	since, kept := u.left, u.kept
	if len(u.leases) > 0 {
		since, kept = time.Time{}, time.Time{}
	}
	return ConnInfo{
		ID: u.id, Target: u.spec.Target, Lane: u.lane.String(), State: state, Since: u.since, LastHeard: u.conn.LastHeard(),
		IdleSince: since, KeptUntil: kept,
		Server: u.conn.Server(), Clients: len(u.leases), Channels: u.channels.Load(), In: u.in.Load(), Out: u.out.Load(),
		Sessions: u.sessions.open, MaxSessions: u.sessions.limit, Suspect: u.suspectLocked(),
	}
}

// setLaneLocked makes the upstream part of another lane.
func (u *upstream) setLaneLocked(lane Lane) {
	u.lane = lane
	if m, ok := u.conn.(Marker); ok {
		m.Mark(lane.Class)
	}
}

// letGoLocked takes a lease off the upstream, which with the last one closes, or stays for a while.
func (u *upstream) letGoLocked(l *Lease) {
	if _, ok := u.leases[l]; !ok {
		return
	}
	delete(u.leases, l)
	if len(u.leases) > 0 {
		return
	}
	u.idleLocked()
	u.pool.quietLocked(u.key)
}

// joinLocked makes a lease one of the upstream's.
func (u *upstream) joinLocked(l *Lease) {
	u.leases[l] = struct{}{}
	if u.idle != nil {
		close(u.idle)
		u.idle = nil
	}
}

// idleLocked begins a time without clients.
func (u *upstream) idleLocked() {
	idle := make(chan struct{})
	u.idle = idle
	u.left, u.kept = time.Now(), time.Time{}
	if !u.pool.closed {
		u.pool.wg.Go(func() { u.release(idle) })
	}
}

// why is a person's line about why the upstream has ended.
func (u *upstream) why() error {
	u.pool.mu.Lock()
	defer u.pool.mu.Unlock()
	if u.reason != nil {
		return u.reason
	}
	return lostError(u.spec.Target, u.conn.Cause())
}

// alive tells whether the server has given a sign of life within two keepalive intervals.
func (u *upstream) alive() bool {
	return !u.conn.Down() && time.Since(u.conn.LastHeard()) < 2*aliveInterval(u.spec.Config.Get("serveraliveinterval"))
}

func aliveInterval(seconds string) time.Duration {
	if d, err := time.ParseDuration(seconds + "s"); err == nil && d > 0 {
		return d
	}
	return DefaultAliveInterval
}

// DefaultAliveInterval is how often a silent upstream is asked for a sign of life where ServerAliveInterval is not set.
const DefaultAliveInterval = 15 * time.Second

// run starts what drains the connection and notices its end. Its goroutines end with the connection; the last one
// takes the upstream out of the list.
func (u *upstream) run() {
	var drains sync.WaitGroup
	drains.Go(u.serveRequests)
	drains.Go(u.answerKeepalives)
	drains.Go(u.serveChannels)
	u.pool.wg.Go(func() {
		err := u.conn.Wait()
		u.pool.mu.Lock()
		u.pool.ups = slices.DeleteFunc(u.pool.ups, func(o *upstream) bool { return o == u })
		lost, reason := u.reason == nil && u.conn.Cause() != nil, u.reason
		if u.reason == nil {
			u.reason = lostError(u.spec.Target, u.conn.Cause())
		}
		if lost {
			reason = u.reason
		}
		info := u.infoLocked()
		clients := len(u.leases)
		for l := range u.leases {
			l.lostLocked(u)
		}
		u.pool.wakeLocked()
		close(u.dead)
		u.pool.mu.Unlock()
		drains.Wait()
		u.fwd.end()
		if w, ok := u.pool.retainer.(Watcher); ok {
			w.Down(info, lost, reason)
		}
		u.pool.log.Info().Uint64("upstream", u.id).Stringer("target", u.spec.Target).Int("clients", clients).
			AnErr("cause", u.conn.Cause()).AnErr("transport", err).Msg("upstream has ended")
	})
}

// serveRequests answers the server's global requests. keepalive@openssh.com wants any answer; hostkeys-00@openssh.com
// and whatever else comes are ours to refuse, never a client's.
func (u *upstream) serveRequests() {
	for r := range Queue(u.conn.Requests(), func() { u.conn.Close() }) {
		_ = r.Reply(false, nil) // a dead connection is noticed by its watcher
	}
}

// answerKeepalives answers what Lease.queue finds. A server that sends more of them than it reads answers to gets fewer.
func (u *upstream) answerKeepalives() {
	for {
		select {
		case r := <-u.keepalives:
			_ = r.Reply(false, nil) // any answer will do
		case <-u.dead:
			return
		}
	}
}

// serveChannels hands the channels that the server opens to their owners.
func (u *upstream) serveChannels() {
	var wg sync.WaitGroup
	slots := make(chan struct{}, maxPendingOpens)
	for nc := range u.conn.Channels() {
		select {
		case slots <- struct{}{}:
		default:
			_ = nc.Reject(ssh.ResourceShortage, "too many channels are waiting")
			continue
		}
		wg.Go(func() {
			owner := u.owner(nc)
			<-slots
			if owner != nil {
				owner()
			}
		})
	}
	wg.Wait()
}

const (
	// maxPendingOpens bounds the channels of a server that wait until their owner is known: more than come at once where
	// many connect to a remote forward.
	maxPendingOpens = 1024
	// maxPendingPerListener bounds those that wait for one owner's answer.
	maxPendingPerListener = 1024
)

// release is called when the last client has left: it asks how long the upstream stays, and closes it when that is
// over and nobody came, which closes idle. One beside others of its target stays for their clients, but not beyond them.
func (u *upstream) release(idle chan struct{}) {
	lingered := false
	for {
		u.pool.mu.Lock()
		if u.idle != idle {
			u.pool.mu.Unlock()
			return
		}
		info := u.infoLocked()
		extra, quiet := u.extraLocked()
		again := u.pool.again
		u.pool.mu.Unlock()
		wait := time.Duration(0)
		switch {
		case info.State != Up || u.conn.Down():
		case quiet != nil && !(extra && lingered):
			wait = lingerTime
			lingered = true
		case !extra:
			ctx, cancel := context.WithTimeout(u.pool.ctx, 10*time.Second)
			until := u.pool.retainer.Retain(ctx, info)
			cancel()
			u.pool.mu.Lock()
			wait = time.Until(until)
			if u.idle == idle && wait > 0 {
				u.kept = until
			}
			u.pool.mu.Unlock()
		}
		if wait <= 0 {
			break
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-quiet:
		case <-again:
		case <-idle:
		case <-u.dead:
			t.Stop()
			return
		case <-u.pool.ctx.Done():
			t.Stop()
			return
		}
		t.Stop()
	}
	u.pool.mu.Lock()
	if u.idle != idle {
		u.pool.mu.Unlock()
		return
	}
	// From here on newcomers dial anew; they never meet a closing upstream.
	u.draining = true
	u.pool.ups = slices.DeleteFunc(u.pool.ups, func(o *upstream) bool { return o == u })
	u.pool.mu.Unlock()
	u.conn.Close()
}

// extraLocked tells whether the upstream is one beside another that serves the same clients, and what is closed when
// its target has no clients any more; nil: it has none.
func (u *upstream) extraLocked() (extra bool, quiet <-chan struct{}) {
	p := u.pool
	for _, o := range p.ups {
		if o == u || o.key != u.key || o.draining || o.conn.Down() {
			continue
		}
		if o.lane.Agent == u.lane.Agent && o.conn.Server().AgentID == u.conn.Server().AgentID {
			before := o.lane.Class < u.lane.Class || o.lane.Class == u.lane.Class && o.id < u.id
			extra = extra || before
		}
	}
	if p.busyLocked(u.key) {
		if p.quiet[u.key] == nil {
			p.quiet[u.key] = make(chan struct{})
		}
		quiet = p.quiet[u.key]
	}
	return extra, quiet
}

// busyLocked tells whether a client of the target holds an upstream, or waits for room.
func (p *Pool) busyLocked(key string) bool {
	for _, u := range p.ups {
		if u.key == key && len(u.leases) > 0 {
			return true
		}
	}
	for k, g := range p.growths {
		if k.key == key && len(g.waiting) > 0 {
			return true
		}
	}
	return false
}

// quietLocked tells those that linger when the target has no clients any more.
func (p *Pool) quietLocked(key string) {
	if c := p.quiet[key]; c != nil && !p.busyLocked(key) {
		close(c)
		delete(p.quiet, key)
	}
}

// drain lets the upstream take no new clients.
func (u *upstream) drain() {
	u.pool.mu.Lock()
	u.draining = true
	u.pool.mu.Unlock()
}

// hostKeysStillGood checks what the user's files say now about the keys that the server and the jump hosts on the way
// have shown. If they don't like one any more, its upstream and u take no new clients.
func hostKeysStillGood(u *upstream, spec Spec) error {
	// The upstreams that carry it, which may take no new clients themselves, rather than any for the same jump hosts.
	for o := u; o != nil; o = o.through {
		if err := o.hostKeyStillGood(spec); err != nil {
			u.drain()
			return err
		}
		if last := len(spec.Via) - 1; last >= 0 { // as many as there are upstreams below: they are part of the sharing key
			hop := spec.Via[last]
			hop.Via = spec.Via[:last]
			spec = hop
		}
	}
	return nil
}

func (u *upstream) hostKeyStillGood(spec Spec) error {
	k, ok := u.conn.(HostKeyKeeper)
	if !ok {
		return nil
	}
	err := k.HostKeyStillGood(spec)
	if err != nil {
		u.drain()
	}
	return err
}
