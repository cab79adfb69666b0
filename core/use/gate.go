package use

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
)

// Check is one judge of uses. It returns nil if it has nothing against u. It may ask a person, but returns soon after
// ctx is done. It is called by many goroutines at once.
type Check func(ctx context.Context, u Use, say func(string)) *Denied

// Observer is told of every decision, and of the end of what was allowed. Its methods are called by many goroutines at
// once and must not block. The id joins the two.
type Observer interface {
	Decided(id string, u Use, d *Denied)
	Ended(id string, u Use, r Result)
}

// NewGate returns a gate that asks the checks in their order, takes the first denial, and allows what none denies. A use
// of a kind that Kinds does not list is denied. Every decision goes to audit, which may be nil and which the caller
// closes after the last use has ended.
func NewGate(audit *Audit, checks ...Check) Gate { return newGate(audit, nil, nil, checks) }

// NewGate returns a gate that asks the lock before all checks, and once more after them: they may have waited for a
// person. The lock is also asked about what comes of uses that were permitted before: see Permit.Connect. observer may be
// nil.
func (l *Lock) NewGate(audit *Audit, observer Observer, checks ...Check) Gate {
	return newGate(audit, l, observer, checks)
}

func newGate(audit *Audit, l *Lock, observer Observer, checks []Check) Gate {
	var b [4]byte
	rand.Read(b[:]) // never fails
	if observer == nil {
		observer = nobody{}
	}
	return &gate{audit: audit, lock: l, observer: observer, checks: checks, prefix: hex.EncodeToString(b[:]) + "-"}
}

// nobody observes.
type nobody struct{}

func (nobody) Decided(string, Use, *Denied) {}
func (nobody) Ended(string, Use, Result)    {}

type gate struct {
	audit    *Audit
	lock     *Lock // nil: none
	observer Observer
	checks   []Check
	prefix   string // tells this gate's ids from those of earlier masters in the same log
	last     atomic.Uint64
}

// Decide implements Gate.
func (g *gate) Decide(ctx context.Context, u Use, say func(string)) (*Permit, *Denied) {
	began := time.Now()
	if say == nil {
		say = func(string) {}
	}
	denied := g.ask(ctx, u, say)
	now := time.Now()
	id := g.prefix + strconv.FormatUint(g.last.Add(1), 10)
	if err := g.audit.decision(ctx, id, u, denied, now, now.Sub(began)); err != nil && denied == nil && !TakesAway(u) {
		denied = &Denied{
			By: "audit", Reason: "this can't be logged, and policy wants it to be: " + Printable(err.Error()),
			Hint: "see `muxproxy log`",
		}
		g.audit.denial(id, u, denied, now, now.Sub(began))
	}
	g.observer.Decided(id, u, denied)
	if denied != nil {
		return nil, denied
	}
	return &Permit{&permit{gate: g, id: id, use: u, since: now}}, nil
}

// locked is the lock's denial of u.
func (g *gate) locked(u Use) *Denied {
	if g.lock == nil {
		return nil
	}
	return g.lock.denied(u)
}

func (g *gate) ask(ctx context.Context, u Use, say func(string)) *Denied {
	if !slices.Contains(kinds, u.Kind) {
		return &Denied{By: "gate", Reason: "unknown kind of use " + strconv.Quote(Printable(string(u.Kind)))}
	}
	if d := g.locked(u); d != nil {
		return d
	}
	for _, check := range g.checks {
		if ctx.Err() != nil {
			break
		}
		if d := check(ctx, u, say); d != nil {
			return d
		}
	}
	switch err := ctx.Err(); {
	case err == nil:
		return g.locked(u)
	case errors.Is(err, context.DeadlineExceeded):
		return &Denied{By: "gate", Reason: "no decision in time", Hint: "try again"}
	default:
		return &Denied{By: "gate", Reason: "whoever asked left before the decision"}
	}
}

// Permit is leave to do one use once. Only a gate makes one that is valid. Whoever gets it calls End when the use is
// over, however it ends. It may be used by many goroutines.
type Permit struct{ p *permit }

type permit struct {
	gate  *gate
	id    string
	use   Use
	since time.Time
	ended atomic.Bool
}

// Use returns what was permitted; the zero Use for a permit that no gate made.
func (p *Permit) Use() Use {
	if p == nil || p.p == nil {
		return Use{}
	}
	return p.p.use
}

// ID names the use in the audit log; "" for a permit that no gate made.
func (p *Permit) ID() string {
	if p == nil || p.p == nil {
		return ""
	}
	return p.p.id
}

// Valid reports whether a gate made p, it has not ended, and its use is of one of kinds (of any, if none are given).
func (p *Permit) Valid(kinds ...Kind) bool {
	return p != nil && p.p != nil && !p.p.ended.Load() && (len(kinds) == 0 || slices.Contains(kinds, p.p.use.Kind))
}

// Connect asks whether a new connection may come of a use that was permitted earlier and still stands: one to a remote
// forward, to the forwarded agent or display. It is nil unless the lock is on; a denial goes to the audit as one of the
// use's kind.
func (p *Permit) Connect() *Denied {
	if !p.Valid() {
		return &Denied{By: "gate", Reason: "what this belongs to has ended"}
	}
	d := p.p.gate.locked(p.p.use)
	if d != nil {
		g := p.p.gate
		id := g.prefix + strconv.FormatUint(g.last.Add(1), 10)
		g.audit.denial(id, p.p.use, d, time.Now(), 0)
		g.observer.Decided(id, p.p.use, d)
	}
	return d
}

// End says how the use ended. The first call counts, later ones and those on an invalid permit do nothing.
func (p *Permit) End(r Result) {
	if p == nil || p.p == nil || p.p.ended.Swap(true) {
		return
	}
	now := time.Now()
	p.p.gate.audit.end(p.p.id, r, now, now.Sub(p.p.since))
	p.p.gate.observer.Ended(p.p.id, p.p.use, r)
}
