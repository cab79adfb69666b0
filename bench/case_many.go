//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// atOnce starts many ssh in the same moment. The server allows ten sessions per connection: ControlMaster lets the others log
// in on their own.
func atOnce(ctx context.Context, b *bench) error {
	n, ways := 200, allWays
	if b.quick {
		n, ways = 50, []way{controlMaster, pipes, fdpass}
	}
	return b.inWorld(ctx, setting{maxSessions: 10}, func(w *world) error {
		if _, err := w.holdAll(ctx, ways); err != nil {
			return err
		}
		what := fmt.Sprintf("%d ssh host true at once", n)
		took, failed := b.add(what, "ms", nil), b.add(what+", failures", "", atMost(0))
		logins := b.add(what+", logins", "", nil)
		reason := ""
		err := b.turns(b.rounds(3, 1), ways, func(_ int, by way) error {
			before := w.logins()
			began := time.Now()
			var procs []*proc
			bad := 0
			for range n {
				p, err := w.start(w.ssh(by, "box", "true"))
				if err != nil {
					return err
				}
				procs = append(procs, p)
			}
			for _, p := range procs {
				if err := p.wait(ctx); err != nil {
					bad++
					if reason == "" {
						reason = fmt.Sprintf("%s: %v", by, err)
					}
				}
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
			}
			took.put(by, float64(time.Since(began))/float64(time.Millisecond))
			failed.put(by, float64(bad))
			logins.put(by, float64(w.logins()-before))
			return nil
		})
		if err == nil && reason != "" {
			b.say.stage("%s: a failure was: %s", b.current, reason)
		}
		return err
	})
}

// memory is that of idle clients' masters, each client with a session open. Up to 50 of them are real ssh, the others speak
// to the master from this process.
func memory(ctx context.Context, b *bench) error {
	real, counts := 50, []int{1, 50, 100, 1000}
	if b.quick {
		real, counts = 20, []int{1, 20, 100, 300}
	}
	sessions := map[way][]*session{}
	var per *goal
	return b.inWorld(ctx, setting{}, func(w *world) error {
		// Clients through pipes and with --fdpass share a master; the numbers of both stand in the former's column.
		one := 0.0
		var guests []*guest
		defer func() {
			for _, g := range guests {
				g.close()
			}
		}()
		for _, n := range counts {
			b.say.step("%s: %d clients", b.current, n)
			for _, by := range []way{controlMaster, pipes} {
				for len(sessions[by]) < min(n, real) {
					via := by
					if by == pipes && len(sessions[by])%2 == 1 {
						via = fdpass
					}
					var s *session
					var err error
					if len(sessions[by]) == 0 {
						s, err = w.hold(ctx, by)
					} else {
						s, err = w.open(ctx, via, "box", "echo ready; exec cat")
					}
					if err != nil {
						return err
					}
					sessions[by] = append(sessions[by], s)
				}
			}
			for len(sessions[pipes])+len(guests) < n {
				g, err := w.guest(ctx)
				if err != nil {
					return fmt.Errorf("client %d: %w", len(sessions[pipes])+len(guests)+1, err)
				}
				guests = append(guests, g)
				if err := g.hold(); err != nil {
					return fmt.Errorf("client %d: %w", len(sessions[pipes])+len(guests), err)
				}
			}
			mine, err := b.settled(ctx, w.master)
			if err != nil {
				return err
			}
			clients := fmt.Sprintf("%d clients", n)
			if n == 1 {
				clients = "1 client"
			}
			var g *goal
			if n == 1 {
				g = atMost(30)
				one = mine.best()
			}
			rss, pss := b.add("master's memory, "+clients+", RSS", "MiB", g), b.add("master's memory, "+clients+", PSS", "MiB", nil)
			rss.put(pipes, mine.rss/1024)
			if mine.pss > 0 {
				pss.put(pipes, mine.pss/1024)
			}
			if n <= real {
				theirs, err := b.settled(ctx, sessions[controlMaster][0].pid())
				if err != nil {
					return err
				}
				rss.put(controlMaster, theirs.rss/1024)
				if theirs.pss > 0 {
					pss.put(controlMaster, theirs.pss/1024)
				}
			}
			if n == counts[len(counts)-1] {
				per = atMost(150)
				b.add(fmt.Sprintf("master's memory per further client, up to %d", n), "KiB", per).put(pipes, (mine.best()-one)/float64(n-1))
			}
		}
		return b.bridges(sessions[pipes])
	})
}

// best is what a process alone causes, as far as it can be seen.
func (m mem) best() float64 {
	if m.pss > 0 {
		return m.pss
	}
	return m.rss
}

// settled is the least of some looks at a process's memory, a second apart.
func (b *bench) settled(ctx context.Context, pid int) (mem, error) {
	var least mem
	for i := range b.rounds(4, 2) {
		if i > 0 {
			select {
			case <-ctx.Done():
				return mem{}, context.Cause(ctx)
			case <-time.After(time.Second):
			}
		}
		m, err := readMem(pid)
		if err != nil {
			return mem{}, err
		}
		if i == 0 || m.rss < least.rss {
			least = m
		}
	}
	return least, nil
}

// bridges adds the memory of the processes that ssh started as ProxyCommand and that are still there.
func (b *bench) bridges(sessions []*session) error {
	rss, pss := b.add("a bridge's memory, RSS", "MiB", nil), b.add("a bridge's memory, PSS", "MiB", nil)
	for _, s := range sessions {
		for pid := range descendants(s.pid()) {
			exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
			if err != nil || strings.TrimSuffix(exe, " (deleted)") != filepath.Join(b.bin, "muxproxy") {
				continue
			}
			m, err := readMem(pid)
			if err != nil {
				return err
			}
			rss.put(pipes, m.rss/1024)
			if m.pss > 0 {
				pss.put(pipes, m.pss/1024)
			}
		}
	}
	return nil
}

// growth compares what one more client costs among few and among many.
func growth(ctx context.Context, b *bench) error {
	few, many := 10, b.rounds(1000, 300)
	step := many / 10 // memory is that of so many more
	return b.inWorld(ctx, setting{}, func(w *world) error {
		var guests []*guest
		defer func() {
			for _, g := range guests {
				g.close()
			}
		}()
		attach := func(n int) error {
			for len(guests) < n {
				b.say.step("%s: %d of %d clients", b.current, len(guests), n)
				g, err := w.guest(ctx)
				if err != nil {
					return fmt.Errorf("client %d: %w", len(guests)+1, err)
				}
				guests = append(guests, g)
				if err := g.hold(); err != nil {
					return fmt.Errorf("client %d: %w", len(guests), err)
				}
			}
			return nil
		}
		times := func() ([]float64, error) {
			var all []float64
			for range 10 {
				start := time.Now()
				g, err := w.guest(ctx)
				if err != nil {
					return nil, err
				}
				err = g.run("true")
				all = append(all, float64(time.Since(start))/float64(time.Millisecond))
				g.close()
				if err != nil {
					return nil, err
				}
			}
			return all, nil
		}
		// What a client is worth between n and n+step of them.
		slope := func(n int) (float64, error) {
			if err := attach(n); err != nil {
				return 0, err
			}
			before, err := b.settled(ctx, w.master)
			if err != nil {
				return 0, err
			}
			if err := attach(n + step); err != nil {
				return 0, err
			}
			after, err := b.settled(ctx, w.master)
			return (after.best() - before.best()) / float64(step), err
		}

		if err := attach(few); err != nil {
			return err
		}
		fewTimes, err := times()
		if err != nil {
			return err
		}
		fewSlope, err := slope(few)
		if err != nil {
			return err
		}
		manySlope, err := slope(many - step)
		if err != nil {
			return err
		}
		manyTimes, err := times()
		if err != nil {
			return err
		}
		compare := func(what, unit string, small, large []float64) {
			a := b.add(fmt.Sprintf("%s, of %d", what, few), unit, nil)
			z := b.add(fmt.Sprintf("%s, of %d", what, many), unit,
				&goal{Op: "<=", Bound: 1.5, Of: fmt.Sprintf("that of %d", few), Base: a.Values})
			a.Values[pipes], z.Values[pipes] = small, large
		}
		compare("a client more: attach and run true", "ms", fewTimes, manyTimes)
		compare("a client more: master's memory", "KiB", []float64{fewSlope}, []float64{manySlope})
		return nil
	})
}
