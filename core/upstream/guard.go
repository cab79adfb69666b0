package upstream

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// guard ends a handshake that takes too long, by closing its transport: x/crypto/ssh knows no context.
type guard struct {
	t    *transport
	ctx  context.Context
	stop func() bool // takes the watch off the context

	mu     sync.Mutex // guards what follows
	timer  *time.Timer
	turn   int // of the timer: one that has fired late does not count
	over   bool
	reason error
}

func newGuard(ctx context.Context, t *transport) *guard {
	g := &guard{t: t, ctx: ctx}
	g.stop = context.AfterFunc(ctx, func() { g.fail(-1, context.Cause(ctx)) })
	return g
}

// limit starts the clock anew. format says what is late, with %s for how long it took.
func (g *guard) limit(d time.Duration, format string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.disarm()
	if g.over {
		return
	}
	turn := g.turn
	g.timer = time.AfterFunc(d, func() { g.fail(turn, &Error{Host: g.t.host, Msg: fmt.Sprintf(format, d)}) })
}

// pause stops the clock: somebody on our side is busy.
func (g *guard) pause() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.disarm()
}

// disarm is called with mu held.
func (g *guard) disarm() {
	g.turn++
	if g.timer != nil {
		g.timer.Stop()
		g.timer = nil
	}
}

func (g *guard) fail(turn int, reason error) {
	g.mu.Lock()
	if g.over || turn >= 0 && turn != g.turn {
		g.mu.Unlock()
		return
	}
	g.over, g.reason = true, reason
	g.mu.Unlock()
	g.t.Close()
}

// end takes the guard away and returns why it has closed the transport, or nil. It may be called again.
func (g *guard) end() error {
	g.stop()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.disarm()
	if !g.over && g.ctx.Err() != nil { // who was asked has heard of it first
		g.reason = context.Cause(g.ctx)
	}
	g.over = true
	return g.reason
}
