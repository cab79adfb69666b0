//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
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

// growth compares what one more client costs beside few and beside many, in turns: each has a master of its own. The time is
// also that of sshd, which takes longer for a session where it has many on one connection, as is seen without a master. So
// the goals are about the time beyond that, and the master's processor time.
func growth(ctx context.Context, b *bench) error {
	const (
		with      = "a client more: attach and run true"
		without   = "a session more on one connection, without a master: run true"
		beyond    = "a client more: the time beyond that"
		processor = "a client more: the master's processor time"
		inUse     = "a client more: the memory that the master has in use"
	)
	few, many := 10, b.rounds(1000, 300)
	step := b.rounds(50, 20) // memory is that of so many more
	rounds := b.rounds(10, 3)
	return b.inWorld(ctx, setting{}, func(small *world) error {
		return b.inWorld(ctx, setting{}, func(large *world) error {
			crowds := []*crowd{{w: small, n: few}, {w: large, n: many}}
			for _, c := range crowds {
				b.say.step("%s: %d clients", b.current, c.n)
				defer c.end()
				if err := c.begin(ctx); err != nil {
					return err
				}
			}
			rows := map[string]map[int][]float64{with: {}, without: {}, beyond: {}, processor: {}, inUse: {}}
			put := func(row string, c *crowd, v float64) { rows[row][c.n] = append(rows[row][c.n], v) }
			for r := range rounds {
				b.say.step("%s: round %d of %d", b.current, r+1, rounds)
				took := map[string]map[int][]float64{with: {}, without: {}}
				before := map[int]time.Duration{}
				for _, c := range crowds {
					before[c.n] = onProcessor(c.w.master)
				}
				const each = 10
				for i := range each * len(crowds) { // by turns, for the machine may have other work
					c := crowds[i%len(crowds)]
					guest, alone, err := c.once(ctx)
					if err != nil {
						return fmt.Errorf("beside %d clients: %w", c.n, err)
					}
					took[with][c.n] = append(took[with][c.n], guest)
					took[without][c.n] = append(took[without][c.n], alone)
				}
				for _, c := range crowds {
					put(with, c, median(took[with][c.n]))
					put(without, c, median(took[without][c.n]))
					put(beyond, c, median(took[with][c.n])-median(took[without][c.n]))
					put(processor, c, (onProcessor(c.w.master)-before[c.n]).Seconds()*1000/each)
					size, err := c.more(ctx, step)
					if err != nil {
						return fmt.Errorf("beside %d clients: %w", c.n, err)
					}
					put(inUse, c, size)
				}
			}
			for _, row := range []struct {
				what, unit string
				bound      bool
			}{{with, "ms", false}, {without, "ms", false}, {beyond, "ms", true}, {processor, "ms", true}, {inUse, "KiB", true}} {
				var of *goal
				for _, c := range crowds {
					m := b.add(fmt.Sprintf("%s, of %d", row.what, c.n), row.unit, of)
					m.Values[pipes] = rows[row.what][c.n]
					if row.bound {
						of = &goal{Op: "<=", Bound: 1.5, Of: fmt.Sprintf("that of %d", few), Base: m.Values}
					}
				}
			}
			return nil
		})
	})
}

// crowd are the guests of a world, n but for measurements, each with a session, and one that is no guest but has n sessions
// on a connection of its own.
type crowd struct {
	w      *world
	n      int
	guests []*guest
	alone  *guest
}

// begin brings them. The caller calls end, whatever comes out.
func (c *crowd) begin(ctx context.Context) error {
	if err := c.come(ctx, c.n); err != nil {
		return err
	}
	var err error
	if c.alone, err = c.w.direct(ctx); err != nil {
		return err
	}
	for range c.n {
		if err := c.alone.hold(); err != nil {
			return fmt.Errorf("without a master: %w", err)
		}
	}
	return nil
}

func (c *crowd) end() {
	c.leave(0)
	if c.alone != nil {
		c.alone.close()
	}
}

// come makes them n.
func (c *crowd) come(ctx context.Context, n int) error {
	for len(c.guests) < n {
		g, err := c.w.guest(ctx)
		if err != nil {
			return fmt.Errorf("client %d: %w", len(c.guests)+1, err)
		}
		c.guests = append(c.guests, g)
		if err := g.hold(); err != nil {
			return fmt.Errorf("client %d: %w", len(c.guests), err)
		}
	}
	return nil
}

// leave makes them n again.
func (c *crowd) leave(n int) {
	for len(c.guests) > n {
		c.guests[len(c.guests)-1].close()
		c.guests = c.guests[:len(c.guests)-1]
	}
}

// once is how many milliseconds a guest more takes from its coming until its command has ended, and the command alone
// without a master.
func (c *crowd) once(ctx context.Context) (took, sshd float64, err error) {
	began := time.Now()
	g, err := c.w.guest(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer g.close()
	if err := g.run("true"); err != nil {
		return 0, 0, err
	}
	took = float64(time.Since(began)) / float64(time.Millisecond)
	began = time.Now()
	err = c.alone.run("true")
	return took, float64(time.Since(began)) / float64(time.Millisecond), err
}

// more is how many KiB the master has in use for a client more, by those of step more.
func (c *crowd) more(ctx context.Context, step int) (float64, error) {
	var in [2]float64
	for i := range in {
		if err := c.come(ctx, c.n+i*step); err != nil {
			return 0, err
		}
		var err error
		if in[i], err = c.w.inUse(ctx, len(c.guests)); err != nil {
			return 0, err
		}
	}
	c.leave(c.n)
	return (in[1] - in[0]) / float64(step), nil
}

// inUse is how many KiB the master has in use with n clients, once it has no others. What is resident says less of one
// client more: it depends on when the garbage was last collected.
func (w *world) inUse(ctx context.Context, n int) (float64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("the master does not come to have %d clients", n))
	defer cancel()
	for {
		cmd := w.command(filepath.Join(w.b.bin, "muxproxy"), "master", "dump")
		var out bytes.Buffer
		cmd.Stdout = &out
		if _, err := w.finish(ctx, cmd); err != nil {
			return 0, err
		}
		_, text, _ := strings.Cut(out.String(), "\n")
		line, text, _ := strings.Cut(text, "\n")
		var heap, stacks int64
		if _, err := fmt.Sscanf(line, "in use: heap %d, stacks %d bytes", &heap, &stacks); err != nil {
			return 0, fmt.Errorf("muxproxy master dump: %w", err)
		}
		var state struct{ Clients []struct{} }
		if err := json.NewDecoder(strings.NewReader(text)).Decode(&state); err != nil {
			return 0, fmt.Errorf("muxproxy master dump: %w", err)
		}
		if len(state.Clients) == n {
			return float64(heap+stacks) / 1024, nil
		}
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
