package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

// Pool holds the upstreams and hands out leases on them. Safe for use by many goroutines.
type Pool struct {
	dialer   Dialer
	retainer Retainer
	gate     use.Gate
	log      zerolog.Logger

	ctx    context.Context // ends with Close; dials live in it
	cancel context.CancelFunc
	clock  func() time.Time
	wg     sync.WaitGroup // dials, watchers and idle decisions

	lastID atomic.Uint64

	mu      sync.Mutex // guards what follows, and all fields of upstreams and flights that say so
	ups     []*upstream
	flights map[flightKey]*flight
	growths map[laneKey]*growth
	learned map[string]map[string]bool // by sharing key: the programs and commands that turned out to be bulk
	wake    chan struct{}              // closed, and made anew, when there may be room for a session
	quiet   map[string]chan struct{}   // by sharing key: closed when no client is left
	again   chan struct{}              // closed, and made anew, when the Retainer is to be asked again
	closed  bool
}

// New returns an empty pool. The gate is asked for jumps through pooled upstreams. Close ends it and waits.
func New(d Dialer, r Retainer, gate use.Gate, log zerolog.Logger) *Pool {
	return newWithClock(d, r, gate, log, time.Now)
}

// newWithClock is New; clock tells the wall-clock time, which may jump.
func newWithClock(d Dialer, r Retainer, gate use.Gate, log zerolog.Logger, clock func() time.Time) *Pool {
	p := &Pool{
		dialer: d, retainer: r, gate: gate, log: log, clock: clock, flights: map[flightKey]*flight{},
		growths: map[laneKey]*growth{}, learned: map[string]map[string]bool{}, wake: make(chan struct{}),
		quiet: map[string]chan struct{}{}, again: make(chan struct{}),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.wg.Go(p.watchClock)
	return p
}

// Close ends all dials and upstreams, and waits for what belongs to them.
func (p *Pool) Close() {
	p.mu.Lock()
	p.closed = true
	ups := slices.Clone(p.ups)
	p.mu.Unlock()
	p.cancel()
	for _, u := range ups {
		u.conn.Close()
	}
	p.wg.Wait()
}

// goLocked runs f in a goroutine that Close waits for. After Close has begun nothing may be added to what it waits for: then
// f ends by itself, with its connection. Pool.mu is held.
func (p *Pool) goLocked(f func()) {
	if p.closed {
		go f()
		return
	}
	p.wg.Go(f)
}

// spawn is goLocked for those who do not hold Pool.mu. Plugins may still open channels and forwards while Close runs.
func (p *Pool) spawn(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.goLocked(f)
}

var errClosed = errors.New("the master is stopping")

// flightKey names what one dial serves: the sharing key, the agent that may log in, and the agent that is forwarded.
type flightKey struct{ key, agent, lane string }

// keyOf is the flightKey of a spec. The jump hosts are part of the sharing key with all that they are logged in to by,
// their agents too: nobody rides through a host that it could not pass, or through another one of the same name.
func keyOf(spec Spec) flightKey {
	k := flightKey{key: spec.Config.Key()}
	for _, hop := range spec.Via {
		h := keyOf(hop)
		k.key += "\x00" + hop.Target.String() + "\x00" + h.key + "\x00" + h.agent
	}
	k.lane = spec.Lane.Agent
	if spec.Agent != nil {
		k.agent = spec.Agent.ID()
	}
	return k
}

// flight is one dial and those who wait for it.
type flight struct {
	id     uint64
	target use.Target
	lane   Lane
	since  time.Time
	cancel context.CancelFunc
	growth *growth       // whose dial it is, for sessions that wait there; nil: it is for the waiters
	done   chan struct{} // closed when the waiters have their leases, or err is set
	err    error

	through *upstream // the last jump host's; nil: none. The dial's own

	// guarded by Pool.mu
	waiters []*waiter // oldest first
	tcpUp   bool
	unasked bool    // a question has found nobody to answer it
	last    *waiter // whose person gave the last answer; nil: none did, to this dial or to those of its jump hosts
	drain   bool    // the upstream takes no others than those that wait
	reason  error   // why we ended it
}

type waiter struct {
	asker     Asker
	spec      Spec
	by        use.Use
	connected func()        // nil once called
	gone      chan struct{} // closed when the waiter leaves
	// late: it came when a question of the dial had found nobody, and was not asked. Set by join.
	late bool
	// again: the dial has failed, and not for want of this waiter's answers. Set before the flight's done is closed.
	again bool
	// lease is set before the flight's done is closed. All get theirs at once: if each took its own when it wakes, the
	// first could be gone by then, and the upstream with it.
	lease *Lease
}

// Attach returns a lease on the living upstream of that number, for one use of it that is no client's. The lease must be
// released.
func (p *Pool) Attach(ctx context.Context, permit *use.Permit, id uint64) (*Lease, error) {
	if !permit.Valid(use.LocalForward, use.RemoteForward) {
		return nil, errors.New("no permit to attach")
	}
	p.mu.Lock()
	i := slices.IndexFunc(p.ups, func(u *upstream) bool { return u.id == id })
	if i < 0 || p.closed || p.ups[i].draining || p.ups[i].conn.Down() {
		p.mu.Unlock()
		return nil, fmt.Errorf("connection %d: %w", id, ErrGone)
	}
	u := p.ups[i]
	k := flightKey{key: u.key, agent: u.conn.Server().AgentID, lane: u.lane.Agent}
	l := p.newLeaseLocked(u, k, u.spec, permit.Use())
	p.mu.Unlock()
	if err := u.checked(ctx); err != nil {
		l.Release()
		if ctx.Err() == nil {
			err = fmt.Errorf("connection %d: %w: %w", id, ErrGone, err)
		}
		return nil, err
	}
	return l, nil
}

// Acquire returns a lease on an upstream for spec: a living one if there is one that may be shared, else the result
// of one dial that all who ask for the same share, its error too. permit is the attach permit of the client; ask puts
// the login's questions to the client's person; who comes when a question has found nobody to answer it gets another dial
// if that one fails. A client that leaves (ctx) leaves the dial to the others; the last one ends it. The lease must be
// released.
func (p *Pool) Acquire(ctx context.Context, permit *use.Permit, spec Spec, ask Asker) (*Lease, error) {
	if !permit.Valid(use.Attach, use.Jump) {
		return nil, errors.New("no permit to attach")
	}
	k := keyOf(spec)
	began := time.Now()
	if spec.Connected != nil {
		spec.Connected = sync.OnceFunc(spec.Connected)
	}
	for {
		l, u, f, w, wait, err := p.join(k, spec, permit.Use(), ask, time.Since(began))
		switch {
		case err != nil:
			return nil, err
		case wait != nil:
			if err := wake(ctx, wait, roomTime); err != nil {
				return nil, err
			}
			continue
		case l == nil:
			if l, err = p.await(ctx, f, w); ctx.Err() == nil && w.again {
				continue
			}
			return l, err
		}
		if err = hostKeysStillGood(u, spec); err != nil {
			p.log.Warn().Stringer("target", spec.Target).Err(err).Msg("the host key is not good any more; no new clients")
		} else {
			err = u.checked(ctx)
		}
		switch {
		case err == nil && spec.Connected != nil:
			spec.Connected()
			fallthrough
		case err == nil:
			return l, nil
		}
		l.Release()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		// The next one is another, or a new dial, which finds out and says so.
	}
}

// await waits for a flight's result, and leaves it.
func (p *Pool) await(ctx context.Context, f *flight, w *waiter) (*Lease, error) {
	select {
	case <-f.done:
	case <-ctx.Done():
	}
	p.leave(f, w)
	switch {
	case ctx.Err() == nil && w.lease != nil:
		return w.lease, nil
	case ctx.Err() == nil:
		return nil, f.err
	case w.lease != nil:
		w.lease.Release()
	}
	return nil, context.Cause(ctx)
}

// join finds a living upstream, or a flight to wait for, starting one if there is none.
func (p *Pool) join(k flightKey, spec Spec, by use.Use, ask Asker, waited time.Duration) (
	l *Lease, u *upstream, f *flight, w *waiter, wait <-chan struct{}, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, nil, nil, nil, nil, errClosed
	}
	u, room, grow := p.attachLocked(k, spec.Lane.Class)
	switch {
	case u != nil && (room || grow):
		l := p.newLeaseLocked(u, k, spec, by)
		if grow { // it takes the time of a login, and the client has its own handshake before it
			p.growLocked(l, spec.Lane)
		}
		return l, u, nil, nil, nil, nil
	case u != nil && waited < roomTime:
		return nil, nil, nil, nil, p.wake, nil
	}
	w = &waiter{asker: ask, spec: spec, by: by, connected: spec.Connected, gone: make(chan struct{})}
	if f = p.flights[k]; f == nil {
		f = &flight{
			id: p.lastID.Add(1), target: spec.Target, lane: spec.Lane, since: time.Now(),
			done: make(chan struct{}),
		}
		p.flights[k] = f
		var ctx context.Context
		ctx, f.cancel = context.WithCancel(p.ctx)
		spec.Connected = func() { p.tcpUp(f) }
		spec.Banner = func(s string) { p.tellOldest(f, s, func(s Spec) func(string) { return s.Banner }) }
		spec.Say = func(s string) { p.tellOldest(f, s, func(s Spec) func(string) { return s.Say }) }
		spec.Debug = func(s string) { p.debug(f, s) }
		spec.Transport = p.transport(spec, by, flightAsker{p, f}, func(u *upstream) { f.through = u })
		p.wg.Go(func() { p.dial(ctx, k, spec, f) })
	} else if f.tcpUp && w.connected != nil {
		p.wg.Go(w.connected)
		w.connected = nil
	}
	w.late = f.unasked
	f.waiters = append(f.waiters, w)
	return nil, nil, f, w, nil, nil
}

// roomTime is how long a client waits for room on an upstream before it has its person asked for another login. That is
// now or never: after the handshake nobody can be asked.
const roomTime = 3 * time.Second

// attachLocked chooses the upstream that a client attaches to, nil if there is none. room: its sessions may be carried by
// one that there is. grow: they are better carried by another, which can be had without a person.
func (p *Pool) attachLocked(k flightKey, class Class) (best *upstream, room, grow bool) {
	rank := func(u *upstream) int {
		switch {
		case !u.hasRoomLocked():
			return 1
		case u.lane.Class != class:
			return 2
		}
		return 3
	}
	for _, u := range p.ups {
		if u.serves(k) && (best == nil || rank(u) > rank(best)) {
			best = u
		}
	}
	if best == nil || rank(best) == 3 {
		return best, true, false
	}
	room = rank(best) == 2
	switch g := p.growths[laneKey{k, class}]; {
	case !best.conn.Server().Silent:
	case room && len(best.leases) == 0:
		best.setLaneLocked(Lane{class, k.lane})
	default:
		grow = g == nil || time.Since(g.failed) > growPause
	}
	return best, room, grow
}

// leave takes a waiter away. A dial that nobody waits for any more is ended, unless it is over.
func (p *Pool) leave(f *flight, w *waiter) {
	p.mu.Lock()
	f.waiters = slices.DeleteFunc(f.waiters, func(o *waiter) bool { return o == w })
	close(w.gone)
	alone := len(f.waiters) == 0
	if alone {
		select {
		case <-f.done:
		default:
			// A newcomer must not join a dial that is being ended.
			p.dropFlightLocked(f)
		}
	}
	p.mu.Unlock()
	if alone {
		f.cancel()
	}
}

func (p *Pool) dropFlightLocked(f *flight) {
	for k, o := range p.flights {
		if o == f {
			delete(p.flights, k)
		}
	}
}

// tcpUp tells the waiters, and those to come, that the transport is there, or that a question has come before it.
func (p *Pool) tcpUp(f *flight) {
	p.mu.Lock()
	f.tcpUp = true
	var tell []func()
	for _, w := range f.waiters {
		if w.connected != nil {
			tell = append(tell, w.connected)
			w.connected = nil
		}
	}
	p.mu.Unlock()
	for _, c := range tell {
		c()
	}
}

// tellOldest passes text of the dial to the first of its waiting clients that takes it.
func (p *Pool) tellOldest(f *flight, text string, how func(Spec) func(string)) {
	p.mu.Lock()
	var tell func(string)
	for _, w := range f.waiters {
		if tell = how(w.spec); tell != nil {
			break
		}
	}
	p.mu.Unlock()
	if tell != nil {
		tell(text)
	}
}

// debug passes a step of the dial to all of its waiting clients that want to see it.
func (p *Pool) debug(f *flight, line string) {
	p.mu.Lock()
	var tell []func(string)
	for _, w := range f.waiters {
		if w.spec.Debug != nil {
			tell = append(tell, w.spec.Debug)
		}
	}
	p.mu.Unlock()
	for _, t := range tell {
		t(line)
	}
}

func (p *Pool) dial(ctx context.Context, k flightKey, spec Spec, f *flight) {
	defer f.cancel()
	conn, err := p.dialer.Dial(ctx, spec, flightAsker{p, f})

	p.mu.Lock()
	p.dropFlightLocked(f)
	if err == nil && (p.closed || len(f.waiters) == 0 || f.reason != nil) {
		// Nobody is left to hold it, and an upstream without a client closes at once.
		p.wg.Go(func() { end(conn) })
		err = errClosed
	}
	var u *upstream
	if err == nil {
		u = newUpstream(p, f.id, k, spec, conn)
		u.through = f.through
		u.draining = f.drain
		p.ups = append(p.ups, u)
		for _, w := range f.waiters {
			w.lease = p.newLeaseLocked(u, keyOf(w.spec), w.spec, w.by)
			w.lease.loggedIn = w == f.last && conn.Server().Answered
		}
	} else if f.err = err; f.reason != nil {
		f.err = f.reason
	} else {
		for _, w := range f.waiters {
			w.again = w.late || spec.Silent && !w.spec.Silent // a login without its person says nothing about one with
		}
	}
	close(f.done)
	p.mu.Unlock()
	if err != nil {
		p.log.Info().Stringer("target", spec.Target).Err(err).Msg("dial failed")
		return
	}
	p.up(u, f.since)
}

// up starts what serves a new upstream.
func (p *Pool) up(u *upstream, since time.Time) {
	s := u.conn.Server()
	p.log.Info().Uint64("upstream", u.id).Stringer("target", u.spec.Target).Str("addr", s.Addr).Str("auth", s.Auth).
		Str("server", use.Printable(s.Version)).Dur("took", time.Since(since)).Msg("upstream is up")
	if w, ok := p.retainer.(Watcher); ok {
		p.mu.Lock()
		info := u.infoLocked()
		p.mu.Unlock()
		w.Up(info)
	}
	u.run()
}

// Reconsider has the Retainer asked again about all connections without clients: it would say something else now.
func (p *Pool) Reconsider() {
	p.mu.Lock()
	close(p.again)
	p.again = make(chan struct{})
	p.mu.Unlock()
}

// end closes a connection that nobody uses.
func end(conn Conn) {
	conn.Close()
	go ssh.DiscardRequests(conn.Requests())
	for nc := range conn.Channels() {
		_ = nc.Reject(ssh.ConnectionFailed, "closing")
	}
	_ = conn.Wait() // closed by us
}

// flightAsker puts a dial's question to the oldest waiting client that can show it; if that one leaves, to the next.
type flightAsker struct {
	p *Pool
	f *flight
}

// Ask implements Asker.
func (a flightAsker) Ask(ctx context.Context, q Question) ([]string, error) {
	// A jump host's question comes before the transport is there, and a client that waits for that can't show it.
	a.p.tcpUp(a.f)
	asked := map[*waiter]bool{}
	for {
		a.p.mu.Lock()
		var w *waiter
		for _, o := range a.f.waiters {
			if !asked[o] {
				w = o
				break
			}
		}
		a.f.unasked = a.f.unasked || w == nil
		a.p.mu.Unlock()
		if w == nil {
			return nil, ErrNobody
		}
		asked[w] = true
		wctx, cancel := context.WithCancel(ctx)
		go func() {
			select {
			case <-w.gone:
				cancel()
			case <-wctx.Done():
			}
		}()
		answers, err := w.asker.Ask(wctx, q)
		left := wctx.Err() != nil
		cancel()
		switch {
		case err == nil:
			a.p.mu.Lock()
			a.f.last = w
			a.p.mu.Unlock()
			return answers, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case left, errors.Is(err, ErrNobody):
			continue
		default:
			return nil, err
		}
	}
}

// State of an upstream.
type State string

// The states of an upstream, in the order in which it goes through them.
const (
	Dialling State = "dialling"
	Up       State = "up"
	Draining State = "draining" // takes no new clients, ends with its last
)

// ConnInfo is what is known of one upstream at one moment.
type ConnInfo struct {
	ID        uint64
	Target    use.Target
	Lane      string
	State     State
	Since     time.Time
	LastHeard time.Time
	Server    ServerInfo
	Clients   int
	IdleSince time.Time // when the last client left; zero: there are some
	KeptUntil time.Time // by what the Retainer said last; zero: there are clients, or it has not said anything yet
	Channels  int64
	In, Out   int64 // bytes of channel data: towards the remote host, from it
	Sessions  int   // open session channels, the spare among them
	// MaxSessions is how many sessions the server was found to allow on this connection; 0: not known.
	MaxSessions int
	Suspect     bool // the server has given no sign of life when it was asked; no new clients until it does
}

// List returns all upstreams, those that are being dialled too.
func (p *Pool) List() []ConnInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]ConnInfo, 0, len(p.ups)+len(p.flights))
	for _, u := range p.ups {
		list = append(list, u.infoLocked())
	}
	for f := range p.dialsLocked {
		list = append(list, f.infoLocked())
	}
	slices.SortFunc(list, func(a, b ConnInfo) int { return int(a.ID) - int(b.ID) })
	return list
}

func (f *flight) infoLocked() ConnInfo {
	clients := len(f.waiters)
	if f.growth != nil {
		clients = len(f.growth.waiting)
	}
	return ConnInfo{ID: f.id, Target: f.target, Lane: f.lane.String(), State: Dialling, Since: f.since, Clients: clients}
}

// dialsLocked yields all dials, those too that give a lane another upstream. yield may drop the one that it is given.
func (p *Pool) dialsLocked(yield func(*flight) bool) {
	for _, f := range p.flights {
		if !yield(f) {
			return
		}
	}
	for _, g := range p.growths {
		for f := range g.dials {
			if !yield(f) {
				return
			}
		}
	}
}

// Alive reports whether Acquire for spec would be served without a dial.
func (p *Pool) Alive(spec Spec) bool {
	k := keyOf(spec)
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.ups, func(u *upstream) bool { return u.serves(k) })
}

// Drain lets the upstreams that match take no new clients; each ends with its last one. It returns how many matched.
func (p *Pool) Drain(match func(ConnInfo) bool) int {
	p.mu.Lock()
	var idle []*upstream
	n := 0
	for _, u := range p.ups {
		if match(u.infoLocked()) {
			n++
			u.draining = true
			if len(u.leases) == 0 {
				idle = append(idle, u)
			}
		}
	}
	for f := range p.dialsLocked {
		if match(f.infoLocked()) {
			n++
			f.drain = true
			p.dropFlightLocked(f)
		}
	}
	p.mu.Unlock()
	for _, u := range idle {
		u.conn.Close()
	}
	return n
}

// CloseMatching ends the upstreams and dials that match now, with their clients; reason is what those are told. It returns how
// many matched.
func (p *Pool) CloseMatching(match func(ConnInfo) bool, reason error) int {
	p.mu.Lock()
	var ups []*upstream
	for _, u := range p.ups {
		if match(u.infoLocked()) {
			u.draining = true
			u.reason = reason
			ups = append(ups, u)
		}
	}
	var flights []*flight
	for f := range p.dialsLocked {
		if match(f.infoLocked()) {
			f.reason = reason
			flights = append(flights, f)
			p.dropFlightLocked(f) // a newcomer gets a dial of its own
		}
	}
	p.mu.Unlock()
	for _, u := range ups {
		u.conn.Close()
	}
	for _, f := range flights { // last, or a session that waits for one has the next dialled for a client that is to go
		f.cancel()
	}
	return len(ups) + len(flights)
}

var errLost = errors.New("connection lost")

// ErrGone is that a connection which was named has ended, or takes nobody any more.
var ErrGone = errors.New("the connection has ended")

func lostError(t use.Target, cause error) error {
	if cause != nil {
		return cause
	}
	return fmt.Errorf("%s: %w", t.Addr(), errLost)
}
