package persist

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// The test binary plays the plugin.
func TestMain(m *testing.M) {
	if os.Getenv(plugin.CookieKey) != "" || os.Getenv("PLAY_PLUGIN") != "" {
		plugin.Serve(New())
	}
	// The one that starts processes lives as long as the program.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/muxproxy/muxproxy/core/plugin/pluginrun.init.func1.1"))
}

// fake is a master in memory. Its blocks are by the target's host or alias; connections come up and go as the tests say.
type fake struct {
	t *testing.T
	p *persist

	mu      sync.Mutex // guards what follows
	blocks  map[string]*block
	conns   map[uint64]plugin.Connection
	last    uint64
	results []error     // of the next calls of Connect; then all succeed
	dialled []time.Time // when Connect was called
	targets []string    // and with what
	records []string
	drained []uint64
	stall   bool        // Connect waits for its context
	fails   []error     // of the next calls of Drain
	tried   []time.Time // when it was called
}

// newFake starts a plugin with blocks, in a bubble of synctest.
func newFake(t *testing.T, blocks map[string]*block) *fake {
	t.Helper()
	f := &fake{t: t, p: newPersist(), conns: map[uint64]plugin.Connection{}}
	f.p.zone = time.UTC
	t.Cleanup(func() { f.p.Close() })
	f.configure(blocks)
	return f
}

// with is a block with the defaults but for what change says.
func with(change func(*block)) *block {
	b := &block{Idle: "10m", Max: "8h", OnSuspend: "keep", OnLock: "keep"}
	if change != nil {
		change(b)
	}
	return b
}

// configure puts blocks in force.
func (f *fake) configure(blocks map[string]*block) {
	f.t.Helper()
	f.bring(blocks)
	f.mu.Lock()
	f.blocks = blocks
	f.mu.Unlock()
	f.event("policy")
}

// bring tells the plugin what may come into force.
func (f *fake) bring(blocks map[string]*block) {
	f.t.Helper()
	c := &plugin.Config{Log: zerolog.Nop()}
	for _, host := range slices.Sorted(maps.Keys(blocks)) {
		c.Hosts = append(c.Hosts, plugin.Block{Value: blocks[host], Hosts: []string{host}})
	}
	if problems := f.p.configure(c, f); len(problems) > 0 {
		f.t.Fatal(problems)
	}
}

func (f *fake) event(kind string) {
	f.p.Observe(f.t.Context(), plugin.Event{Kind: kind, Time: time.Now()})
	synctest.Wait()
}

// blockLocked is a nil any where there is none.
func (f *fake) blockLocked(host string) any {
	if b := f.blocks[host]; b != nil {
		return b
	}
	return nil
}

func (f *fake) Connections(context.Context) ([]plugin.Connection, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []plugin.Connection
	for _, c := range f.conns {
		c.Block = f.blockLocked(c.Target.Host)
		list = append(list, c)
	}
	return list, nil
}

func (f *fake) Resolve(_ context.Context, target string) (plugin.Target, any, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := parse(target)
	b := f.blockLocked(t.Host)
	if b == nil {
		return t, nil, fmt.Errorf("%w: %s has no block of persist", plugin.ErrDenied, t)
	}
	return t, b, nil
}

func parse(target string) plugin.Target {
	_, host, found := strings.Cut(target, "@")
	if !found {
		host = target
	}
	host, _, _ = strings.Cut(host, ":")
	return plugin.Target{User: "u", Host: host, Port: 22}
}

func (f *fake) Connect(ctx context.Context, target string) (plugin.Connection, error) {
	f.mu.Lock()
	f.dialled = append(f.dialled, time.Now())
	f.targets = append(f.targets, target)
	var err error
	if len(f.results) > 0 {
		err, f.results = f.results[0], f.results[1:]
	}
	stall := f.stall
	f.mu.Unlock()
	if stall {
		<-ctx.Done()
		return plugin.Connection{}, ctx.Err()
	}
	if err != nil {
		return plugin.Connection{}, err
	}
	return f.come(parse(target).Host), nil
}

// come makes a connection.
func (f *fake) come(host string) plugin.Connection {
	f.mu.Lock()
	f.last++
	c := plugin.Connection{ID: f.last, Target: parse(host), Lane: "interactive", Up: true, Since: time.Now().Round(0)}
	c.Block = f.blockLocked(host)
	f.conns[c.ID] = c
	f.mu.Unlock()
	f.p.Observe(f.t.Context(), plugin.Event{Kind: "up", Connection: c, Time: time.Now()})
	return c
}

// end ends one.
func (f *fake) end(id uint64, result, reason string, clients int) {
	f.mu.Lock()
	c := f.conns[id]
	delete(f.conns, id)
	c.Block = f.blockLocked(c.Target.Host)
	c.Clients = clients
	f.mu.Unlock()
	f.p.Observe(f.t.Context(), plugin.Event{Kind: "down", Connection: c, Result: result, Reason: reason, Time: time.Now()})
	synctest.Wait()
}

func (f *fake) Drain(_ context.Context, id uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tried = append(f.tried, time.Now())
	if _, ok := f.conns[id]; !ok {
		return plugin.ErrNotFound
	}
	if len(f.fails) > 0 {
		var err error
		if err, f.fails = f.fails[0], f.fails[1:]; err != nil {
			return err
		}
	}
	f.drained = append(f.drained, id)
	return nil
}

func (f *fake) Record(_ context.Context, event, target, detail string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.records = append(f.records, event+" "+target+" "+detail)
	return nil
}

// retain is what Retain says of a connection whose last client left at since: how long from now it stays.
func (f *fake) retain(id uint64, since time.Time) time.Duration {
	f.mu.Lock()
	c := f.conns[id]
	c.Block = f.blockLocked(c.Target.Host)
	f.mu.Unlock()
	until := f.p.Retain(f.t.Context(), &plugin.Idle{Connection: c, Since: since.Round(0)})
	if until.IsZero() {
		return 0
	}
	return max(0, until.Sub(time.Now().Round(0)))
}

// recorded checks all records so far, and forgets them. Each begins as said.
func (f *fake) recorded(want ...string) {
	f.t.Helper()
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	ok := len(f.records) == len(want)
	for i := 0; ok && i < len(want); i++ {
		ok = strings.HasPrefix(f.records[i], want[i])
	}
	if !ok {
		f.t.Errorf("recorded\n%s\nwant\n%s", strings.Join(f.records, "\n"), strings.Join(want, "\n"))
	}
	f.records = nil
}

// dials checks what was dialled, and forgets it. It returns the times.
func (f *fake) dials(want ...string) []time.Time {
	f.t.Helper()
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(f.targets, want) {
		f.t.Errorf("dialled %q, want %q", f.targets, want)
	}
	times := f.dialled
	f.targets, f.dialled = nil, nil
	return times
}

// drains checks what was drained, and forgets it.
func (f *fake) drains(want ...uint64) {
	f.t.Helper()
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	slices.Sort(f.drained)
	if !slices.Equal(f.drained, want) {
		f.t.Errorf("drained %d, want %d", f.drained, want)
	}
	f.drained = nil
}

func (f *fake) next(results ...error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.results = results
}

// A connection is kept as its block says, and each decision is recorded once.
func TestRetain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"a": with(nil)})
		other := f.come("b")
		if got := f.retain(other.ID, time.Now()); got != 0 {
			t.Errorf("without a block it is kept for %v", got)
		}
		c := f.come("a")
		time.Sleep(time.Hour)
		left := time.Now()
		for range 3 { // the last client left; policy was read anew; the clock jumped
			if got := f.retain(c.ID, left); got != 10*time.Minute-time.Since(left) {
				t.Errorf("kept for %v", got)
			}
			time.Sleep(time.Minute)
		}
		f.recorded("keep u@a:22 connection 2 kept until 2000-01-01T01:10:00Z")
		time.Sleep(7 * time.Minute)
		if got := f.retain(c.ID, left); got != 0 {
			t.Errorf("kept on for %v", got)
		}
		f.recorded()
		f.end(c.ID, "closed", "", 0)
		f.recorded("close u@a:22 connection 2: no client for 10m")

		// A client that came at the last moment takes it all back.
		c = f.come("a")
		left = time.Now().Add(-10 * time.Minute)
		f.retain(c.ID, left)
		f.retain(c.ID, time.Now())
		f.recorded("keep u@a:22 connection 3")
		f.end(c.ID, "closed", "closed by muxproxy close", 0)
		f.recorded() // whose decision that was stands in the audit log already
	})
}

// Another policy counts for connections that already wait.
func TestPolicyChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"a": with(nil)})
		c := f.come("a")
		left := time.Now()
		f.retain(c.ID, left)
		f.recorded("keep u@a:22 connection 1 kept until 2000-01-01T00:10:00Z")
		f.configure(map[string]*block{"a": with(func(b *block) { b.Idle, b.Max = "forever", "forever" })})
		if got := f.retain(c.ID, left); got < 24*365*time.Hour {
			t.Errorf("kept for %v", got)
		}
		f.recorded("keep u@a:22 connection 1 kept for ever")
		f.configure(map[string]*block{"a": with(func(b *block) { b.Idle = "1m" })})
		if got := f.retain(c.ID, left); got != time.Minute {
			t.Errorf("kept for %v", got)
		}
		// It counts for those in use, too.
		f.configure(map[string]*block{"a": with(func(b *block) { b.Max = "1h" })})
		time.Sleep(59 * time.Minute)
		f.drains()
		time.Sleep(time.Minute)
		f.drains(c.ID)
		f.configure(nil)
		if got := f.retain(c.ID, left); got != 0 {
			t.Errorf("without a block it is kept for %v", got)
		}
	})
}

// A connection in use takes no more clients after max and until, and is not cut.
func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // it is midnight
		f := newFake(t, map[string]*block{"max": with(nil), "until": with(func(b *block) { b.Until = "07:30" }),
			"ever": with(func(b *block) { b.Max = "forever" })})
		max, until, ever := f.come("max"), f.come("until"), f.come("ever")
		time.Sleep(7*time.Hour + 29*time.Minute + 59*time.Second)
		f.drains()
		time.Sleep(time.Second)
		f.drains(until.ID)
		time.Sleep(30*time.Minute - time.Second)
		f.drains()
		time.Sleep(time.Second)
		f.drains(max.ID)
		time.Sleep(100 * time.Hour)
		f.drains()
		f.recorded()
		f.end(max.ID, "closed", "", 0)
		f.end(until.ID, "lost", "connection reset", 1)
		f.recorded("close u@max:22 connection 1: 8h after its login")
		f.end(ever.ID, "closed", "", 0)
		f.recorded()
	})
}

func TestLockAndSleep(t *testing.T) {
	for _, c := range []struct {
		begin, end, why string
		lasts           time.Duration // a machine that sleeps does not count it
	}{
		{"locked", "unlocked", "muxproxy was locked", 5 * time.Minute},
		{"sleep", "wake", "the machine went to sleep", 10 * time.Second},
	} {
		t.Run(c.begin, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, map[string]*block{
					"keep": with(nil),
					"warm": with(func(b *block) { b.Prewarm, b.Reconnect, b.OnLock, b.OnSuspend = true, true, "close", "close" }),
					"shut": with(func(b *block) { b.Reconnect, b.OnLock, b.OnSuspend = true, "close", "close" }),
					"lost": with(func(b *block) { b.Reconnect = true }),
				})
				f.dials("warm")
				f.recorded("connect u@warm:22 connection 1, made in advance")
				f.come("keep")
				shut, lost := f.come("shut"), f.come("lost")
				f.event(c.begin)
				f.drains(1, shut.ID)
				if got := f.retain(shut.ID, time.Now()); got != 0 {
					t.Errorf("kept for %v", got)
				}
				f.recorded()
				f.end(1, "closed", "", 0)
				f.end(shut.ID, "lost", "reset", 1) // in use it was not closed yet, and shall not come back
				f.recorded("close u@warm:22 connection 1: " + c.why)
				// Nothing is dialled meanwhile, and what was lost comes back afterwards.
				f.end(lost.ID, "lost", "connection reset", 1)
				f.recorded("lost u@lost:22 connection 4: connection reset; connecting again")
				time.Sleep(c.lasts)
				f.dials()
				f.event(c.end)
				f.dials("warm")
				time.Sleep(2 * time.Second)
				f.dials("u@lost:22")
				f.recorded("connect u@warm:22 connection 5, made in advance", "connect u@lost:22 connection 6, made again")
			})
		})
	}
}

// What was idle is tried again for no longer than it would have stayed; what changes makes tries frequent again.
func TestReconnectTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"a": with(func(b *block) { b.Reconnect = true })})
		f.next(slices.Repeat([]error{errors.New("no route to host")}, 1000)...)
		c := f.come("a")
		f.retain(c.ID, time.Now().Add(-9*time.Minute))
		lost := time.Now()
		f.end(c.ID, "lost", "reset", 0)
		time.Sleep(time.Hour)
		f.recorded("keep", "lost", "fail", "give-up")
		f.mu.Lock()
		if last := f.dialled[len(f.dialled)-1].Sub(lost); last > time.Minute || last < 15*time.Second {
			t.Errorf("the last try %v after the loss", last)
		}
		f.targets, f.dialled = nil, nil
		f.mu.Unlock()

		c = f.come("a")
		f.end(c.ID, "lost", "reset", 1)
		time.Sleep(5 * time.Minute)
		f.event("wake")
		awake := time.Now()
		f.mu.Lock()
		f.targets, f.dialled = nil, nil
		f.mu.Unlock()
		time.Sleep(11 * time.Second) // 1 s, 2 s, 4 s, 8 s, and half as much again
		if times := f.dials("u@a:22", "u@a:22", "u@a:22"); times[2].Sub(awake) > 10500*time.Millisecond {
			t.Errorf("the third try %v after waking up", times[2].Sub(awake))
		}
	})
}

// A sleep that nobody has told of in time closes what it should have closed.
func TestWakeWithoutSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"shut": with(func(b *block) { b.OnSuspend = "close" }), "keep": with(nil)})
		f.come("keep")
		shut := f.come("shut")
		f.event("wake")
		f.drains(shut.ID)
	})
}

// A sleep of which nobody tells the end is over after a while.
func TestSleepWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"a": with(func(b *block) { b.Reconnect = true })})
		c := f.come("a")
		f.event("sleep")
		f.end(c.ID, "lost", "reset", 0)
		time.Sleep(59 * time.Second)
		f.dials()
		time.Sleep(sleepTime + restTime)
		f.dials("u@a:22")
	})
}

// A lost connection is tried again after 1 s, then ever more seldom, at least once a minute, until there is one.
func TestReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"a": with(func(b *block) { b.Idle, b.Max, b.Reconnect = "forever", "forever", true })})
		c := f.come("a")
		var results []error
		for range 40 {
			results = append(results, errors.New("a:22: no route to host"))
		}
		f.next(results...)
		lost := time.Now()
		f.end(c.ID, "lost", "connection timed out", 0)
		time.Sleep(24 * time.Hour)
		times := f.dials(slices.Repeat([]string{"u@a:22"}, 41)...)
		last := lost
		for i, at := range times {
			least := min(time.Second<<min(i, 6), 40*time.Second)
			if wait := at.Sub(last); wait < least || wait > least*3/2 || wait > time.Minute {
				t.Errorf("try %d after %v", i, wait)
			}
			last = at
		}
		f.recorded("lost u@a:22 connection 1: connection timed out; connecting again", "fail u@a:22 a:22: no route to host; trying again",
			"connect u@a:22 connection 2, made again")
		// The next one begins anew.
		lost = time.Now()
		f.end(2, "lost", "connection timed out", 0)
		time.Sleep(2 * time.Second)
		if wait := f.dials("u@a:22")[0].Sub(lost); wait < time.Second || wait > 3*time.Second/2 {
			t.Errorf("after %v", wait)
		}
	})
}

// Many that are lost at once don't come back at once.
func TestReconnectIsSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		blocks := map[string]*block{}
		for i := range 50 {
			blocks[fmt.Sprintf("h%02d", i)] = with(func(b *block) { b.Reconnect = true })
		}
		f := newFake(t, blocks)
		for i := range 50 {
			f.come(fmt.Sprintf("h%02d", i))
		}
		for id := range uint64(50) {
			f.end(id+1, "lost", "no route to host", 0)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		slots := map[time.Duration]int{}
		for _, at := range f.dialled {
			slots[at.Sub(f.dialled[0]).Truncate(50*time.Millisecond)]++
		}
		if len(f.dialled) != 50 || len(slots) < 5 {
			t.Errorf("%d dials, in 50 ms each: %v", len(f.dialled), slots)
		}
	})
}

// What ends the tries.
func TestReconnectEnds(t *testing.T) {
	network := errors.New("a:22: connection refused")
	denied := fmt.Errorf("%w: locked", plugin.ErrDenied)
	for _, c := range []struct {
		name    string
		change  func(*block)
		clients int
		results []error
		then    func(*fake) // after a minute
		want    int         // tries within a day; -1: whatever
		records []string    // after that the connection was lost
	}{
		{name: "it is kept no more", results: slices.Repeat([]error{network}, 1000), want: -1,
			records: []string{"fail", "give-up u@a:22 the connection would not be kept any more; last: a:22: connection refused"}},
		{name: "a refused login", results: []error{network, &plugin.LoginError{Message: "u@a:22: permission denied"}}, want: 2,
			records: []string{"fail", "give-up u@a:22 u@a:22: permission denied"}},
		{name: "policy", results: slices.Repeat([]error{network}, 1000), want: -1,
			then:    func(f *fake) { f.configure(map[string]*block{"a": with(nil)}) },
			records: []string{"fail", "give-up u@a:22 policy does not want it any more"}},
		{name: "no block any more", results: slices.Repeat([]error{network}, 1000), want: -1,
			then:    func(f *fake) { f.configure(nil) },
			records: []string{"fail", "give-up u@a:22 policy does not want it any more"}},
		{name: "a denial waits", results: []error{denied}, want: 1, records: []string{"wait u@a:22 denied: locked"}},
		{name: "until the lock is opened", results: []error{denied}, want: 2,
			then: func(f *fake) { f.event("unlocked") }, records: []string{"wait", "connect"}},
		{name: "or policy changes", results: []error{denied, denied}, want: 2,
			then:    func(f *fake) { f.configure(map[string]*block{"a": with(func(b *block) { b.Reconnect = true })}) },
			records: []string{"wait", "wait"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, map[string]*block{"a": with(func(b *block) { b.Reconnect = true })})
				conn := f.come("a")
				f.retain(conn.ID, time.Now())
				f.next(c.results...)
				f.end(conn.ID, "lost", "reset", 0)
				lost := time.Now()
				time.Sleep(time.Minute)
				if c.then != nil {
					c.then(f)
				}
				time.Sleep(24 * time.Hour)
				f.recorded(append([]string{"keep", "lost"}, c.records...)...)
				f.mu.Lock()
				defer f.mu.Unlock()
				if c.want >= 0 && len(f.dialled) != c.want {
					t.Errorf("%d tries", len(f.dialled))
				}
				if n := len(f.dialled); f.dialled[n-1].Sub(lost) > 10*time.Minute {
					t.Errorf("the last try %v after the loss", f.dialled[n-1].Sub(lost))
				}
			})
		})
	}
}

// What is not made again.
func TestNoReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"off": with(nil), "on": with(func(b *block) { b.Reconnect = true })})
		f.end(f.come("off").ID, "lost", "reset", 0)
		f.end(f.come("none").ID, "lost", "reset", 0)
		f.end(f.come("on").ID, "closed", "closed by muxproxy close", 0)
		c := f.come("on")
		f.retain(c.ID, time.Now().Add(-time.Hour))
		f.end(c.ID, "lost", "reset", 0) // as it was being closed
		time.Sleep(time.Hour)
		f.dials()
		f.recorded()
		// Two at once for one target are one.
		a, b := f.come("on"), f.come("on")
		f.end(a.ID, "lost", "reset", 1)
		f.end(b.ID, "lost", "reset", 1)
		time.Sleep(time.Minute)
		f.dials("u@on:22")
	})
}

// A name that ssh_config knows is dialled by that name.
func TestReconnectByAlias(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"a": with(func(b *block) { b.Reconnect = true })})
		for _, c := range []struct {
			target plugin.Target
			want   string
		}{
			{plugin.Target{User: "u@corp", Host: "192.0.2.1", Port: 2200, Alias: "a"}, "u@corp@a:2200"},
			{plugin.Target{User: "u", Host: "2001:db8::1", Port: 22}, "u@[2001:db8::1]:22"},
		} {
			s := make(chan string, 1)
			r := ruleOf(f.blocks["a"])
			f.p.again(plugin.Connection{Target: c.target}, r, "reset", never)
			f.p.set(func() {
				for dial, series := range f.p.series {
					s <- dial
					series.cancel()
				}
			})
			synctest.Wait()
			if got := <-s; got != c.want {
				t.Errorf("%v: dials %s", c.target, got)
			}
		}
	})
}

func TestPrewarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		warm := with(func(b *block) { b.Prewarm = true })
		f := newFake(t, map[string]*block{"a": warm, "b": with(nil)})
		f.dials("a")
		f.recorded("connect u@a:22 connection 1, made in advance after 0s")
		// A policy that does not come into force.
		f.bring(map[string]*block{"x": warm})
		f.dials()
		// Another one: only what is new.
		f.configure(map[string]*block{"a": warm, "b": warm})
		f.dials("b")
		f.recorded("connect u@b:22")

		// A failure is told, and is all without reconnect.
		f.next(errors.New("c:22: connection refused"))
		f.configure(map[string]*block{"c": warm})
		time.Sleep(time.Hour)
		f.dials("c")
		f.recorded("give-up c c:22: connection refused")

		// With it there are other tries, as long as it would be kept.
		stubborn := with(func(b *block) { b.Prewarm, b.Reconnect = true, true })
		f.next(slices.Repeat([]error{errors.New("d:22: connection refused")}, 1000)...)
		f.configure(map[string]*block{"d": stubborn})
		time.Sleep(time.Hour)
		f.recorded("fail d d:22: connection refused; trying again", "give-up d the connection would not be kept")
		f.mu.Lock()
		if n := len(f.dialled); n < 12 || n > 25 {
			t.Errorf("%d tries in ten minutes", n)
		}
		f.targets, f.dialled, f.results = nil, nil, nil
		f.mu.Unlock()

		// Nobody is asked; a login that needs somebody is not tried again.
		f.next(&plugin.LoginError{Message: "u@e:22: needs a password"})
		f.configure(map[string]*block{"e": stubborn})
		time.Sleep(time.Hour)
		f.dials("e")
		f.recorded("give-up e u@e:22: needs a password")

		// A master that starts locked.
		f.next(fmt.Errorf("%w: locked", plugin.ErrDenied))
		f.configure(map[string]*block{"g": warm})
		time.Sleep(time.Hour)
		f.dials("g")
		f.event("unlocked")
		time.Sleep(2 * time.Second)
		f.dials("g")
		f.recorded("wait g denied: locked; until policy changes", "connect u@g:22")
	})
}

// What is not wanted any more is given up in the middle of a try, and at the end.
func TestPrewarmStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		warm := map[string]*block{"a": with(func(b *block) { b.Prewarm = true })}
		f := newFake(t, nil)
		f.stall = true
		f.configure(warm)
		f.dials("a")
		f.configure(nil)
		f.configure(warm)
		f.dials("a")
		if err := f.p.Close(); err != nil {
			t.Error(err)
		}
		f.recorded()
		f.p.beginWarm(wanted{"a", *ruleOf(warm["a"])})
		f.dials()
	})
}

// After events were lost, the plugin looks what there is.
func TestDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"a": with(nil)})
		early := f.come("a")
		f.p.set(func() { clear(f.p.conns) }) // its event was dropped
		f.blocks["a"].OnLock = "close"
		f.event("locked")
		f.drains(early.ID)
		f.end(early.ID, "closed", "", 0)
		c := f.come("a")
		f.p.set(func() { clear(f.p.conns) })
		f.p.Observe(t.Context(), plugin.Event{Kind: "decision", Dropped: 3})
		if !f.p.resting() {
			t.Error("the lock is taken for open, and nobody has opened it")
		}
		time.Sleep(8 * time.Hour)
		f.drains(c.ID)
		f.event("unlocked") // it is never lost
		if f.p.resting() {
			t.Error("the lock is taken for closed")
		}
	})
}

// What can't be drained is tried again, as long as there is something to drain.
func TestDrainFails(t *testing.T) {
	denied := fmt.Errorf("%w: by policy", plugin.ErrDenied)
	for _, c := range []struct {
		name  string
		fails []error
		begin func(*fake) // has it drained
		then  string      // an event a minute later; "": none
		gone  bool        // it has ended by then
		want  int         // tries
		ok    bool
	}{
		{"twice", []error{errors.New("busy"), context.DeadlineExceeded}, func(f *fake) { f.event("locked") }, "", false, 3, true},
		{"by max", []error{errors.New("busy")}, func(*fake) { time.Sleep(8 * time.Hour) }, "", false, 2, true},
		{"denied", []error{denied, denied}, func(f *fake) { f.event("locked") }, "", false, 1, false},
		{"denied, until policy changes", []error{denied}, func(f *fake) { f.event("locked") }, "policy", false, 2, true},
		{"it has ended already", []error{plugin.ErrNotFound}, func(f *fake) { f.event("locked") }, "", false, 1, false},
		{"it ends", slices.Repeat([]error{errors.New("busy")}, 100), func(f *fake) { f.event("locked") }, "", true, 6, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, map[string]*block{"a": with(func(b *block) { b.OnLock = "close" })})
				conn := f.come("a")
				f.mu.Lock()
				f.fails = c.fails
				f.mu.Unlock()
				c.begin(f)
				time.Sleep(time.Minute)
				if c.then != "" {
					f.event(c.then)
				}
				if c.gone {
					f.end(conn.ID, "closed", "", 0)
				}
				time.Sleep(24 * time.Hour)
				if c.ok {
					f.drains(conn.ID)
				} else {
					f.drains()
				}
				f.mu.Lock()
				defer f.mu.Unlock()
				if len(f.tried) != c.want {
					t.Errorf("%d tries, want %d: %v", len(f.tried), c.want, f.tried)
				}
			})
		})
	}
}

// What keeps a connection without clients for now does not undo that it is being closed.
func TestAFailedDrainKeepsItsReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, map[string]*block{"a": with(func(b *block) { b.OnLock, b.Reconnect = "close", true })})
		c := f.come("a")
		f.mu.Lock()
		f.fails = []error{errors.New("busy")}
		f.mu.Unlock()
		f.event("locked")
		f.drains() // it is tried again in a second
		f.event("unlocked")
		synctest.Wait()
		f.retain(c.ID, time.Now())
		f.recorded("keep u@a:22 connection 1")
		f.end(c.ID, "closed", "", 0)
		f.recorded("close u@a:22 connection 1: muxproxy was locked")
	})
}
