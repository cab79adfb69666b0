package pool

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/core/use"
)

// Class is what a session asks of the network.
type Class int

// The classes. Bulk has connections of its own where that needs no person, so that nobody types behind a copy.
const (
	Interactive Class = iota
	Bulk
)

// Lane is what keeps the upstreams of one target apart.
type Lane struct {
	Class Class
	// Agent is the identity of the agent that is forwarded there; "" for none. sshd honours one request per connection,
	// and gives the socket to every later session of it, asked or not.
	Agent string
}

// String is the lane's name for a person.
func (l Lane) String() string {
	switch {
	case l.Agent != "":
		return "agent"
	case l.Class == Bulk:
		return "bulk"
	}
	return "interactive"
}

const (
	// laneTime is how long a session waits for a connection of its lane, rather than share another's.
	laneTime = 3 * time.Second
	// slotTime is how long a session waits until one of those that the server allows at a time has ended.
	slotTime = time.Minute
	// sayAfter is how long it waits before its person is told: a login on the way is not worth a word.
	sayAfter = laneTime
	// lookEvery is how often a session that waits looks by itself.
	lookEvery = time.Second
	// growPause is how long after a failed silent login the next may be tried.
	growPause = 30 * time.Second
	// maxGrowing bounds the logins under way for one lane: sshd drops some beyond ten (MaxStartups).
	maxGrowing = 4
	// lingerTime is how long an upstream without clients stays for the next one, beside one that has clients.
	lingerTime = 30 * time.Second
)

// bulkPrograms are those whose sessions are bulk from the start, by the first word of the command.
var bulkPrograms = []string{"scp", "rsync", "sftp-server"}

// BulkBytes is what a session without a terminal has moved, in one direction, when it turns out to be bulk.
const BulkBytes = 8 << 20

// maxLearned bounds the programs of one target that are remembered to be bulk, and the targets.
const maxLearned = 256

// programOf is what a session runs, as far as that tells something about its successors.
func programOf(u use.Use) string {
	switch u.Kind {
	case use.Exec:
		program := use.Program(u.Command)
		return program[strings.LastIndexByte(program, '/')+1:]
	case use.Subsystem:
		return "subsystem " + u.Subsystem
	}
	return ""
}

// learnedAs is what tells a session's successors apart: its program, or where a shell makes more of the command than words
// (`cat >file`, `tar c . | zstd`) that very command, as a hash, for it may hold secrets. "" is for none.
func learnedAs(u use.Use) string {
	program := programOf(u)
	if program == "" && u.Command != "" {
		return fmt.Sprintf("command %x", sha256.Sum256([]byte(u.Command)))
	}
	return program
}

// KnownBulk tells whether a session that runs this is bulk from the start.
func KnownBulk(u use.Use) bool {
	program := programOf(u)
	return program == "subsystem sftp" || slices.Contains(bulkPrograms, program)
}

// Classify tells the class of a session that is about to start. What policy says comes first.
func (l *Lease) Classify(u use.Use, terminal bool) Class {
	if l.spec.Class != nil {
		if class, ok := l.spec.Class(u); ok {
			return class
		}
	}
	what := learnedAs(u)
	switch {
	case terminal || what == "":
		return Interactive
	case KnownBulk(u):
		return Bulk
	}
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	if l.pool.learned[l.key.key][what] {
		return Bulk
	}
	return Interactive
}

// NoteMoved says how many bytes a session without a terminal has moved, at least or in all. One that turns out to be bulk
// moves its successors to the bulk lane, one that turns out to be small takes them back.
func (l *Lease) NoteMoved(u use.Use, n int64) {
	what := learnedAs(u)
	if what == "" || KnownBulk(u) {
		return
	}
	l.pool.mu.Lock()
	defer l.pool.mu.Unlock()
	set := l.pool.learned[l.key.key]
	switch {
	case n < BulkBytes/8:
		delete(set, what)
	case n < BulkBytes:
	case set == nil:
		if len(l.pool.learned) >= maxLearned {
			clear(l.pool.learned)
		}
		l.pool.learned[l.key.key] = map[string]bool{what: true}
	default:
		if len(set) >= maxLearned {
			clear(set) // what is still run is soon learned again
		}
		set[what] = true
	}
}

// laneKey names the upstreams that may carry the same sessions.
type laneKey struct {
	flightKey
	class Class
}

func (l *Lease) laneKey(lane Lane) laneKey {
	k := l.key
	k.lane = lane.Agent
	return laneKey{k, lane.Class}
}

// growth is what is under way to give a lane another upstream, without a person.
type growth struct {
	dials   map[*flight]struct{} // under way
	waiting map[*Lease]int       // sessions that wait for room, by client
	failed  time.Time            // of the last that failed
}

// errNoSlot says that the server allows no more sessions at a time, and no other connection could be had.
var errNoSlot = errors.New("no free session")

// placeLocked reserves room for a session: an upstream on which it may open one, with the spare that it takes over, if there
// is one. Without an upstream, wait is closed when there may be one. Pool.mu is held.
func (l *Lease) placeLocked(lane Lane, waited time.Duration) (u *upstream, o *opening, wait <-chan struct{}, err error) {
	p := l.pool
	if l.gone {
		return nil, nil, nil, errGone
	}
	l.convertLocked(lane)
	var best *upstream
	var shared, full []*upstream
	silent := l.silent
	for _, o := range p.ups {
		if !l.mayUseLocked(o) {
			continue
		}
		silent = silent || o.conn.Server().Silent
		switch {
		case o.lane.Agent != lane.Agent:
		case !o.hasRoomLocked():
			full = append(full, o)
		case o.lane.Class != lane.Class && lane.Agent == "":
			shared = append(shared, o)
		case best == nil || l.rank(o) > l.rank(best):
			best = o
		}
	}
	if best == nil {
		g := p.growths[l.laneKey(lane)]
		patience := laneTime
		if len(shared) == 0 {
			patience = slotTime
		}
		growing := silent && waited < patience && (g == nil || time.Since(g.failed) > growPause)
		switch {
		case l.doomedLocked() && waited < laneTime:
			return nil, nil, p.wake, nil
		case l.doomedLocked():
			return nil, nil, nil, l.reasonLocked()
		case growing:
			return nil, nil, p.growLocked(l, lane), nil
		case len(shared) > 0:
			best = slices.MaxFunc(shared, func(a, b *upstream) int { return l.rank(a) - l.rank(b) })
		case len(full) > 0:
			limit := full[0].sessions.limit
			if waited >= slotTime {
				return nil, nil, nil, fmt.Errorf("%s: %w in %s: the server allows %d at a time (MaxSessions in its "+
					"sshd_config); close one, or set MUXPROXY_BYPASS=1", l.spec.Target.Addr(), errNoSlot, slotTime, limit)
			}
			return nil, nil, p.wake, nil
		case lane.Agent != "":
			return nil, nil, nil, errNoAgentLane
		case l.home != nil && l.home.lane.Agent != "" && !l.home.conn.Down():
			return nil, nil, nil, errAgentLane
		default:
			return nil, nil, nil, l.reasonLocked()
		}
	}
	l.holdLocked(best)
	return best, best.reserveLocked(), nil, nil
}

// errNoAgentLane says that forwarding the agent needs a connection of its own, which can't be had without a person.
var errNoAgentLane = errors.New("agent forwarding needs a login of its own, and nobody can be asked for that now; " +
	"put ForwardAgent yes into ssh_config or -A on the command line, or set MUXPROXY_BYPASS=1")

// errAgentLane says the opposite.
var errAgentLane = errors.New("a session without agent forwarding needs a login of its own beside one with it, and nobody " +
	"can be asked for that now; open it by another ssh, or set MUXPROXY_BYPASS=1")

// convertLocked gives the client's own connection to the lane, if nothing else is on it: it need not dial another.
func (l *Lease) convertLocked(lane Lane) {
	u := l.home
	if u == nil || u.lane == lane || len(u.leases) > 1 || l.holds[u] > 0 || u.agentReq != nil {
		return
	}
	if lane.Agent == "" && u.lane.Agent == "" && !u.conn.Server().Silent {
		return // whoever comes next could not have another
	}
	u.setLaneLocked(lane)
}

// mayUseLocked tells whether the lease may open something on u now.
func (l *Lease) mayUseLocked(u *upstream) bool {
	_, held := l.holds[u]
	return u.key == l.key.key && u.admits(l.key.agent) && !u.conn.Down() && !u.suspectLocked() && (held || !u.draining)
}

// rank orders upstreams that would do: the client's own before others that it uses, those before the rest, older first.
func (l *Lease) rank(u *upstream) int {
	if u == l.home {
		return 2
	}
	if _, held := l.holds[u]; held {
		return 1
	}
	return 0
}

func (p *Pool) growthLocked(k laneKey) *growth {
	g := p.growths[k]
	if g == nil {
		g = &growth{dials: map[*flight]struct{}{}, waiting: map[*Lease]int{}}
		p.growths[k] = g
	}
	return g
}

// dropGrowthsLocked forgets those that tell nothing any more: lanes come and go with agents and clients.
func (p *Pool) dropGrowthsLocked() {
	for k, g := range p.growths {
		if len(g.dials) == 0 && len(g.waiting) == 0 && time.Since(g.failed) > growPause {
			delete(p.growths, k)
		}
	}
}

// growLocked has another upstream dialled for a lane, unless enough are on their way, and returns what is closed when
// there is news. It asks nobody anything.
func (p *Pool) growLocked(l *Lease, lane Lane) <-chan struct{} {
	k := l.laneKey(lane)
	g := p.growthLocked(k)
	each := 1 << 30 // sessions that one upstream takes
	for _, u := range p.ups {
		if u.key == l.key.key && u.sessions.limit > 0 {
			each = min(each, u.sessions.limit)
		}
	}
	waiting := 0
	for _, n := range g.waiting {
		waiting += n
	}
	want := min(maxGrowing, 1+waiting/each)
	for len(g.dials) < want && !p.closed {
		spec := l.spec
		spec.Lane, spec.Silent = lane, true
		spec.Connected, spec.Banner, spec.Say, spec.Debug = nil, nil, nil, nil
		f := &flight{id: p.lastID.Add(1), target: spec.Target, lane: lane, since: time.Now(), growth: g}
		var ctx context.Context
		ctx, f.cancel = context.WithCancel(p.ctx)
		g.dials[f] = struct{}{}
		p.wg.Go(func() { p.grow(ctx, k, spec, l.by, f) })
	}
	return p.wake
}

func (p *Pool) grow(ctx context.Context, k laneKey, spec Spec, by use.Use, f *flight) {
	defer f.cancel()
	spec.Transport = p.transport(spec, by, nobody{}, func(u *upstream) { f.through = u })
	conn, err := p.dialer.Dial(ctx, spec, nobody{})
	p.mu.Lock()
	g := f.growth
	delete(g.dials, f)
	if err == nil && (p.closed || f.reason != nil) {
		p.wg.Go(func() { end(conn) })
		err = errClosed
	}
	var u *upstream
	if err == nil {
		u = newUpstream(p, f.id, k.flightKey, spec, conn)
		u.through = f.through
		p.ups = append(p.ups, u)
		if u.draining = f.drain; f.drain {
			for l := range g.waiting {
				l.mayHoldLocked(u)
			}
		}
		u.keepSpareLocked()
		// Those who waited for it may have left.
		if len(u.leases) == 0 {
			u.idleLocked()
		}
	} else if f.reason == nil {
		g.failed = time.Now()
	}
	p.dropGrowthsLocked()
	p.wakeLocked()
	p.mu.Unlock()
	if err != nil {
		p.log.Info().Stringer("target", spec.Target).Stringer("lane", spec.Lane).Err(err).Msg("no further connection")
		return
	}
	p.up(u, f.since)
}

// nobody is the Asker where no person can be asked.
type nobody struct{}

// Ask implements Asker.
func (nobody) Ask(context.Context, Question) ([]string, error) { return nil, ErrNobody }

// wakeLocked tells all that wait for room that there may be some.
func (p *Pool) wakeLocked() {
	close(p.wake)
	p.wake = make(chan struct{})
}
