package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// fakeConn is a connection that does nothing but live and end.
type fakeConn struct {
	ssh.Conn
	agent    string
	channels chan ssh.NewChannel
	requests chan *ssh.Request
	ended    chan struct{}
	once     sync.Once
	cause    error
	opens    atomic.Int64
}

func newFakeConn(agent string) *fakeConn {
	return &fakeConn{
		agent: agent, channels: make(chan ssh.NewChannel), requests: make(chan *ssh.Request), ended: make(chan struct{}),
	}
}

func (c *fakeConn) end(cause error) {
	c.once.Do(func() {
		c.cause = cause
		close(c.ended)
		close(c.channels)
		close(c.requests)
	})
}

func (c *fakeConn) Close() error                        { c.end(nil); return nil }
func (c *fakeConn) Wait() error                         { <-c.ended; return io.EOF }
func (c *fakeConn) Channels() <-chan ssh.NewChannel     { return c.channels }
func (c *fakeConn) Requests() <-chan *ssh.Request       { return c.requests }
func (c *fakeConn) Server() ServerInfo                  { return ServerInfo{AgentID: c.agent} }
func (c *fakeConn) Probe(context.Context, func()) error { return nil }
func (c *fakeConn) LastHeard() time.Time                { return time.Now() }
func (c *fakeConn) Over() time.Time                     { return time.Time{} }
func (c *fakeConn) Cause() error                        { <-c.ended; return c.cause }
func (c *fakeConn) Down() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

func (c *fakeConn) OpenChannel(string, []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	c.opens.Add(1)
	return nil, nil, &ssh.OpenChannelError{Reason: ssh.Prohibited, Message: "fake"}
}

// dialer hands out connections when it is told to.
type dialer struct {
	mu     sync.Mutex // guards what follows
	dials  int
	living int
	most   int
	conns  []*fakeConn

	hold  chan struct{} // nil: dials succeed at once; else they wait for a value or for its close
	err   error
	agent bool // the agent's key logs in
	ask   bool // puts a question
	asked chan []string
	// nobody gets a value when the question has found nobody; the dial then fails as soon as hold lets it. nil: at once.
	nobody chan struct{}
}

func (d *dialer) Dial(ctx context.Context, spec Spec, ask Asker) (Conn, error) {
	d.mu.Lock()
	d.dials++
	d.mu.Unlock()
	if spec.Connected != nil {
		spec.Connected()
	}
	if d.ask {
		answers, err := ask.Ask(ctx, Question{Prompts: []Prompt{{Text: "Password: "}}})
		if err != nil {
			if d.nobody != nil {
				d.nobody <- struct{}{}
				<-d.hold
			}
			return nil, errors.New("h.example.com:22: permission denied") // a driver's line, which does not wrap ErrNobody
		}
		d.asked <- answers
	}
	if d.hold != nil {
		select {
		case <-d.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if d.err != nil {
		return nil, d.err
	}
	c := newFakeConn("")
	if d.agent {
		c.agent = spec.Agent.ID()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.living++
	d.most = max(d.most, d.living)
	d.conns = append(d.conns, c)
	go func() {
		<-c.ended
		d.mu.Lock()
		d.living--
		d.mu.Unlock()
	}()
	return c, nil
}

func (d *dialer) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dials
}

func (d *dialer) conn(i int) *fakeConn {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conns[i]
}

type noAsker struct{}

func (noAsker) Ask(context.Context, Question) ([]string, error) { return nil, ErrNobody }

var gate = use.NewGate(nil)

func permit(t *testing.T, kind use.Kind) *use.Permit {
	t.Helper()
	p, denied := gate.Decide(context.Background(), use.Use{Kind: kind}, nil)
	if denied != nil {
		t.Fatal(denied)
	}
	return p
}

func spec(user string) Spec {
	return Spec{
		Target: use.Target{User: user, Host: "h.example.com", Port: 22},
		Config: &sshconfig.Resolved{Options: map[string][]string{"user": {user}, "hostname": {"h.example.com"}, "port": {"22"}}},
	}
}

type fakeAgent string

func (a fakeAgent) ID() string            { return string(a) }
func (fakeAgent) Dial() (net.Conn, error) { return nil, errors.New("no") }

func newPool(t *testing.T, d Dialer, r Retainer) *Pool {
	p := New(d, r, gate, zerolog.Nop())
	t.Cleanup(p.Close)
	return p
}

func acquire(t *testing.T, p *Pool, s Spec) *Lease {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	l, err := p.Acquire(ctx, permit(t, use.Attach), s, noAsker{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// lossOf waits for the end of an upstream of the lease.
func lossOf(l *Lease) Loss {
	c := make(chan Loss, 8)
	l.Watch(func(loss Loss) { c <- loss })
	return <-c
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

func TestManyShareOneDial(t *testing.T) {
	d := &dialer{hold: make(chan struct{})}
	p := newPool(t, d, CloseAtOnce{})
	const n = 200
	leases := make(chan *Lease, n)
	var connected atomic.Int64
	for range n {
		s := spec("alice")
		s.Connected = func() { connected.Add(1) }
		go func() { leases <- acquire(t, p, s) }()
	}
	eventually(t, "all wait", func() bool { l := p.List(); return len(l) == 1 && l[0].Clients == n })
	eventually(t, "all are told that TCP is up", func() bool { return connected.Load() == n })
	if l := p.List(); l[0].State != Dialling {
		t.Errorf("state %s", l[0].State)
	}
	close(d.hold)
	// Each is released as soon as it is there, and still all share the one connection.
	for range n {
		(<-leases).Release()
	}
	if d.count() != 1 {
		t.Errorf("%d dials", d.count())
	}
	eventually(t, "it closes with its last client", func() bool { return len(p.List()) == 0 && d.conn(0).Down() })
}

func TestAFailedDialIsEverybodysError(t *testing.T) {
	d := &dialer{hold: make(chan struct{}), err: errors.New("h.example.com:22: connection refused")}
	p := newPool(t, d, CloseAtOnce{})
	errs := make(chan error, 10)
	for range 10 {
		go func() {
			_, err := p.Acquire(context.Background(), permit(t, use.Attach), spec("alice"), noAsker{})
			errs <- err
		}()
	}
	eventually(t, "all wait", func() bool { l := p.List(); return len(l) == 1 && l[0].Clients == 10 })
	close(d.hold)
	for range 10 {
		if err := <-errs; !errors.Is(err, d.err) {
			t.Errorf("got %v", err)
		}
	}
	if d.count() != 1 {
		t.Errorf("%d dials", d.count())
	}
	if len(p.List()) != 0 {
		t.Errorf("left: %+v", p.List())
	}
}

func TestWhoMayShare(t *testing.T) {
	d := &dialer{agent: false}
	p := newPool(t, d, CloseAtOnce{})
	alice := acquire(t, p, spec("alice"))
	if again := acquire(t, p, spec("alice")); again.ID() != alice.ID() {
		t.Error("the same target got another upstream")
	}
	if bob := acquire(t, p, spec("bob")); bob.ID() == alice.ID() {
		t.Error("another user rides on alice's upstream")
	}
	careless := spec("alice")
	careless.Config.Options["stricthostkeychecking"] = []string{"no"}
	if l := acquire(t, p, careless); l.ID() == alice.ID() {
		t.Error("another StrictHostKeyChecking shares")
	}
	withAgent := spec("alice")
	withAgent.Agent = fakeAgent("1:2")
	if l := acquire(t, p, withAgent); l.ID() != alice.ID() {
		t.Error("a client with an agent does not ride where no agent logged in")
	}

	// Where an agent's key logged in, only that agent's clients ride.
	d2 := &dialer{agent: true}
	p2 := newPool(t, d2, CloseAtOnce{})
	first := acquire(t, p2, withAgent)
	if l := acquire(t, p2, withAgent); l.ID() != first.ID() {
		t.Error("the same agent got another upstream")
	}
	other := spec("alice")
	other.Agent = fakeAgent("1:3")
	if l := acquire(t, p2, other); l.ID() == first.ID() {
		t.Error("another agent's client rides")
	}
}

// Nobody rides through a jump host that it could not pass itself, or through another one of the same name.
func TestTheWayIsPartOfTheKey(t *testing.T) {
	with := func(change func(hop *Spec)) Spec {
		s, hop := spec("alice"), spec("jumper")
		change(&hop)
		s.Via = []Spec{hop}
		return s
	}
	same := with(func(*Spec) {})
	for name, other := range map[string]Spec{
		"no jump host":          spec("alice"),
		"another host":          with(func(h *Spec) { h.Target.Host = "elsewhere" }),
		"another user":          with(func(h *Spec) { h.Target.User = "root" }),
		"checks less":           with(func(h *Spec) { h.Config.Options["stricthostkeychecking"] = []string{"no"} }),
		"another key file":      with(func(h *Spec) { h.Config.Options["identityfile"] = []string{"/x"} }),
		"an agent":              with(func(h *Spec) { h.Agent = fakeAgent("1:2") }),
		"behind another":        with(func(h *Spec) { h.Via = []Spec{spec("x")} }),
		"one more in the chain": {Target: same.Target, Config: same.Config, Via: []Spec{spec("x"), same.Via[0]}},
	} {
		if keyOf(same) == keyOf(other) {
			t.Errorf("%s: shared", name)
		}
	}
	if again := with(func(*Spec) {}); keyOf(same) != keyOf(again) {
		t.Error("the same way is not shared")
	}
}

// judge is a driver whose connections know whether their host's key is still good, and carry others.
type judge struct {
	mu      sync.Mutex // guards revoked
	revoked string     // a user, who stands for a host
}

func (j *judge) revoke(user string) {
	j.mu.Lock()
	j.revoked = user
	j.mu.Unlock()
}

func (j *judge) good(s Spec) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if s.Target.User == j.revoked {
		return errors.New("the host key of " + j.revoked + " is revoked")
	}
	return nil
}

func (j *judge) Dial(ctx context.Context, s Spec, _ Asker) (Conn, error) {
	var way net.Conn
	if s.Transport != nil {
		var err error
		if way, err = s.Transport(ctx); err != nil {
			return nil, err
		}
	}
	c := newFakeConn("")
	go func() {
		<-c.ended
		if way != nil {
			way.Close()
		}
	}()
	if err := j.good(s); err != nil {
		c.Close()
		return nil, err
	}
	return judged{c, j}, nil
}

type judged struct {
	*fakeConn
	j *judge
}

func (c judged) HostKeyStillGood(s Spec) error { return c.j.good(s) }

func (c judged) OpenChannel(string, []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	requests := make(chan *ssh.Request)
	return &silent{close: sync.OnceFunc(func() { close(requests) })}, requests, nil
}

// silent is a channel that can only be closed.
type silent struct {
	ssh.Channel
	close func()
}

func (s *silent) Close() error { s.close(); return nil }

// A client rides only where it would trust each host of the way now: the keys of the very upstreams that carry it count.
func TestARevokedKeyOnTheWay(t *testing.T) {
	far := spec("far")
	far.Via = []Spec{spec("first"), spec("second")}
	isFirst := func(c ConnInfo) bool { return c.Target.User == "first" }
	for name, c := range map[string]struct {
		user  string
		drain bool
		way   int // upstreams of the way that take no new clients
	}{
		"the host":                      {"far", false, 1},
		"the nearest jump host":         {"second", false, 2},
		"the first jump host":           {"first", false, 3},
		"the first, which takes no new": {"first", true, 3},
	} {
		t.Run(name, func(t *testing.T) {
			j := &judge{}
			p := newPool(t, j, CloseAtOnce{})
			old := acquire(t, p, far)
			again := acquire(t, p, far)
			if again.ID() != old.ID() {
				t.Error("not shared")
			}
			again.Release()
			if c.drain && p.Drain(isFirst) != 1 {
				t.Error("no first jump host")
			}
			j.revoke(c.user)
			_, err := p.Acquire(t.Context(), permit(t, use.Attach), far, noAsker{})
			if err == nil || err.Error() != "the host key of "+c.user+" is revoked" {
				t.Fatalf("got %v", err)
			}
			draining := 0
			for _, u := range p.List() {
				if u.State == Draining {
					draining++
				}
			}
			if draining != c.way {
				t.Errorf("%d upstreams take no new clients, not %d", draining, c.way)
			}
			j.revoke("")
			fresh := acquire(t, p, far)
			if fresh.ID() == old.ID() {
				t.Error("it rides after all")
			}
			if old.home.conn.Down() {
				t.Error("who was there before is cut")
			}
			old.Release()
			fresh.Release()
			eventually(t, "all closed", func() bool { return len(p.List()) == 0 })
		})
	}
}

// welcoming is a judge whose hosts greet, and that tells which logins were silent.
type welcoming struct {
	*judge
	silent chan string // users, who stand for hosts
}

func (w welcoming) Dial(ctx context.Context, s Spec, a Asker) (Conn, error) {
	if s.Banner != nil {
		s.Banner("welcome\n")
	}
	if s.Silent {
		w.silent <- s.Target.User
	}
	c, err := w.judge.Dial(ctx, s, a)
	if err != nil {
		return nil, err
	}
	return ridden{c.(judged)}, nil
}

// ridden is a connection that was made without a person.
type ridden struct{ judged }

func (ridden) Server() ServerInfo { return ServerInfo{Silent: true} }

// A login that asks nobody has nobody to show a jump host's banner to either, and touches no security key on the way.
func TestASilentLoginThroughAJumpHost(t *testing.T) {
	w := welcoming{&judge{}, make(chan string, 2)}
	p := newPool(t, w, CloseAtOnce{})
	far := spec("far")
	far.Via = []Spec{spec("hop")}
	banner := ""
	far.Banner = func(s string) { banner += s }
	l, other := acquire(t, p, far), acquire(t, p, far)
	if banner != "welcome\njump host h.example.com: welcome\n" {
		t.Errorf("the person read %q", banner)
	}
	// The next login has to pass the jump host anew.
	if p.Drain(func(c ConnInfo) bool { return c.Target.User == "hop" }) != 1 {
		t.Error("no jump host")
	}
	ch := open(t, l, bulk)
	if ch.Upstream() == l.ID() {
		t.Error("bulk has no connection of its own")
	}
	ch.Close()
	close(w.silent)
	var silent []string
	for user := range w.silent {
		silent = append(silent, user)
	}
	if !slices.Equal(silent, []string{"far", "hop"}) {
		t.Errorf("silent logins at %q", silent)
	}
	if banner != "welcome\njump host h.example.com: welcome\n" {
		t.Errorf("the person read %q", banner)
	}
	l.Release()
	other.Release()
}

func TestTheLastWaiterEndsTheDial(t *testing.T) {
	d := &dialer{hold: make(chan struct{})}
	p := newPool(t, d, CloseAtOnce{})
	ctx1, leave1 := context.WithCancelCause(context.Background())
	ctx2, leave2 := context.WithCancelCause(context.Background())
	gone := errors.New("gone")
	errs := make(chan error, 2)
	for _, ctx := range []context.Context{ctx1, ctx2} {
		go func() {
			_, err := p.Acquire(ctx, permit(t, use.Attach), spec("alice"), noAsker{})
			errs <- err
		}()
	}
	eventually(t, "both wait", func() bool { l := p.List(); return len(l) == 1 && l[0].Clients == 2 })
	leave1(gone)
	if err := <-errs; !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
	if l := p.List(); len(l) != 1 {
		t.Fatal("the dial ended although somebody waits")
	}
	leave2(gone)
	<-errs
	if l := p.List(); len(l) != 0 {
		t.Errorf("left: %+v", l)
	}
	// A newcomer gets a dial of its own.
	close(d.hold)
	acquire(t, p, spec("alice")).Release()
	eventually(t, "two dials", func() bool { return d.count() == 2 }) // the first may not have begun before it was ended
}

// Clients that come around the moment when the last one leaves never fail, and there is no gap and no crowd.
func TestNoGapWhileClosing(t *testing.T) {
	d := &dialer{}
	p := newPool(t, d, CloseAtOnce{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 300 {
				l := acquire(t, p, spec("alice"))
				if l.home.conn.Down() {
					t.Error("a lease on a closed upstream")
				}
				l.Release()
				l.Release() // harmless
			}
		})
	}
	wg.Wait()
	eventually(t, "all closed", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return d.living == 0 })
}

func TestDrain(t *testing.T) {
	d := &dialer{}
	p := newPool(t, d, CloseAtOnce{})
	old := acquire(t, p, spec("alice"))
	if n := p.Drain(func(ConnInfo) bool { return true }); n != 1 {
		t.Errorf("%d drained", n)
	}
	if l := p.List(); len(l) != 1 || l[0].State != Draining {
		t.Errorf("list %+v", l)
	}
	fresh := acquire(t, p, spec("alice"))
	if fresh.ID() == old.ID() {
		t.Error("a newcomer rides on a draining upstream")
	}
	if old.home.conn.Down() {
		t.Error("the draining upstream ended with a client on it")
	}
	old.Release()
	eventually(t, "it ends with its last client", func() bool { return d.conn(0).Down() })
	fresh.Release()
}

func TestCloseMatchingTellsWhy(t *testing.T) {
	d := &dialer{}
	p := newPool(t, d, CloseAtOnce{})
	l := acquire(t, p, spec("alice"))
	why := errors.New("closed by hand")
	if n := p.CloseMatching(func(c ConnInfo) bool { return c.ID == l.ID() }, why); n != 1 {
		t.Errorf("%d closed", n)
	}
	if loss := lossOf(l); !errors.Is(loss.Reason, why) || loss.Elsewhere {
		t.Errorf("loss %+v", loss)
	}
	l.Release()

	d.hold = make(chan struct{})
	errs := make(chan error)
	go func() {
		_, err := p.Acquire(context.Background(), permit(t, use.Attach), spec("bob"), noAsker{})
		errs <- err
	}()
	eventually(t, "dialling", func() bool { l := p.List(); return len(l) == 1 && l[0].State == Dialling })
	p.CloseMatching(func(ConnInfo) bool { return true }, why)
	if err := <-errs; !errors.Is(err, why) {
		t.Errorf("the dial's error is %v", err)
	}
}

func TestALostUpstreamIsReplaced(t *testing.T) {
	d := &dialer{}
	p := newPool(t, d, CloseAtOnce{})
	l := acquire(t, p, spec("alice"))
	d.conn(0).end(errors.New("h.example.com:22: connection reset by peer"))
	// Down is what counts, not whether the watcher has noticed.
	next := acquire(t, p, spec("alice"))
	if next.ID() == l.ID() {
		t.Error("a lease on a lost upstream")
	}
	if got := fmt.Sprint(lossOf(l).Reason); got != "h.example.com:22: connection reset by peer" {
		t.Errorf("reason %q", got)
	}
	l.Release()
	next.Release()
}

// keeper is a Retainer that says how long, and tells when it is asked.
type keeper struct {
	until func() time.Time
	asked chan ConnInfo
}

func (k keeper) Retain(_ context.Context, c ConnInfo) time.Time {
	k.asked <- c
	return k.until()
}

func TestRetention(t *testing.T) {
	d := &dialer{}
	var until atomic.Pointer[time.Time]
	hour := time.Now().Add(time.Hour)
	until.Store(&hour)
	k := keeper{until: func() time.Time { return *until.Load() }, asked: make(chan ConnInfo, 10)}
	p := newPool(t, d, k)
	l := acquire(t, p, spec("alice"))
	id := l.ID()
	l.Release()
	if c := <-k.asked; c.ID != id || c.Clients != 0 {
		t.Errorf("asked about %+v", c)
	}
	l = acquire(t, p, spec("alice"))
	if l.ID() != id {
		t.Error("a kept upstream was not used again")
	}
	past := time.Now()
	until.Store(&past)
	l.Release()
	<-k.asked
	eventually(t, "it closes when its time is over", func() bool { return len(p.List()) == 0 })
	if d.count() != 1 {
		t.Errorf("%d dials", d.count())
	}
}

// A connection that is kept for long is used often: what waits for the end of a time without clients ends with that time.
func TestWhoComesEndsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hour := time.Now().Add(time.Hour)
		p := New(&dialer{}, keeper{until: func() time.Time { return hour }, asked: make(chan ConnInfo, 100)}, gate, zerolog.Nop())
		defer p.Close()
		acquire(t, p, spec("alice")).Release()
		synctest.Wait()
		before := runtime.NumGoroutine()
		for range 50 {
			acquire(t, p, spec("alice")).Release()
			synctest.Wait()
		}
		if n := runtime.NumGoroutine(); n > before+10 {
			t.Errorf("%d goroutines after 50 clients, %d before", n, before)
		}
	})
}

// slowly is a Retainer that takes a moment, or none, to say that a connection stays for a second.
type slowly struct{}

func (slowly) Retain(_ context.Context, c ConnInfo) time.Time {
	time.Sleep(time.Duration(rand.N(2)) * rand.N(time.Millisecond)) // in a bubble: its time is the test's
	return c.IdleSince.Add(time.Second)
}

// Clients that come when a connection's time is over get it, or a new one, and never one that is being closed.
func TestClientsAroundTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &dialer{}
		p := newPool(t, d, slowly{})
		acquire(t, p, spec("alice")).Release()
		met := 0 // rounds in which the connection was still there
		for range 200 {
			arrival := time.Now().Add(time.Second)
			switch rand.N(3) {
			case 0:
				arrival = arrival.Add(rand.N(3*time.Nanosecond) - time.Nanosecond)
			case 1:
				arrival = arrival.Add(rand.N(2 * time.Millisecond))
			}
			before := d.count()
			var clients sync.WaitGroup
			for range 1 + rand.N(4) {
				clients.Go(func() {
					time.Sleep(time.Until(arrival) + time.Duration(rand.N(2))*rand.N(time.Millisecond))
					l, err := p.Acquire(t.Context(), permit(t, use.Attach), spec("alice"), nobody{})
					if err != nil {
						t.Error(err)
						return
					}
					if l.home.conn.Down() {
						t.Error("a client was given a connection that has ended")
					}
					time.Sleep(rand.N(2 * time.Millisecond))
					if l.home.conn.Down() {
						t.Error("a connection was closed below a client")
					}
					l.Release()
				})
			}
			clients.Wait()
			if d.count() == before {
				met++
			}
			if n := len(p.List()); n > 2 {
				t.Errorf("%d connections", n)
			}
		}
		if met < 20 || met > 180 {
			t.Errorf("the connection was still there in %d rounds of 200: that is not around its end", met)
		}
		l := acquire(t, p, spec("alice"))
		time.Sleep(time.Second)
		if n := len(p.List()); n != 1 {
			t.Errorf("%d connections a second later", n)
		}
		l.Release()
		p.Close() // within the bubble
	})
}

// watcher is a Retainer that keeps a record of what it is told.
type watcher struct {
	keeper
	told chan string
}

func (w watcher) Up(c ConnInfo) { w.told <- fmt.Sprintf("up %d %s", c.ID, c.Target.Addr()) }
func (w watcher) Down(c ConnInfo, lost bool, reason error) {
	w.told <- fmt.Sprintf("down %d %v %v", c.ID, lost, reason)
}

func TestWatcherIsTold(t *testing.T) {
	d := &dialer{}
	var times atomic.Int64
	anHourOnce := func() time.Time {
		if times.Add(1) == 1 {
			return time.Now().Add(time.Hour)
		}
		return time.Time{}
	}
	w := watcher{keeper{anHourOnce, make(chan ConnInfo, 10)}, make(chan string, 10)}
	p := newPool(t, d, w)
	tell := func(want string) {
		t.Helper()
		if got := <-w.told; got != want {
			t.Errorf("told %q, not %q", got, want)
		}
	}
	l := acquire(t, p, spec("alice"))
	tell("up 1 h.example.com:22")
	d.conn(0).end(errors.New("h.example.com:22: connection reset by peer"))
	tell("down 1 true h.example.com:22: connection reset by peer")
	l.Release()

	l = acquire(t, p, spec("alice"))
	tell("up 2 h.example.com:22")
	p.CloseMatching(func(ConnInfo) bool { return true }, errors.New("closed by muxproxy close"))
	tell("down 2 false closed by muxproxy close")
	l.Release()

	l = acquire(t, p, spec("alice"))
	tell("up 3 h.example.com:22")
	l.Release()
	if c := <-w.asked; c.IdleSince.IsZero() || time.Since(c.IdleSince) > time.Minute {
		t.Errorf("idle since %v", c.IdleSince)
	}
	eventually(t, "it is known until when it is kept", func() bool {
		c := p.List()[0]
		return time.Until(c.KeptUntil) > 59*time.Minute && !c.IdleSince.IsZero()
	})
	p.Reconsider()
	if c := <-w.asked; c.ID != 3 {
		t.Errorf("asked about %+v", c)
	}
	tell("down 3 false <nil>")
}

// The times of a Retainer are the wall clock's: it is asked again when that has been set, or the machine has slept.
func TestTheRetainerIsAskedAgainAfterAJumpOfTheClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var offset atomic.Int64
		k := keeper{func() time.Time { return time.Now().Add(time.Hour) }, make(chan ConnInfo, 10)}
		p := newWithClock(&dialer{}, k, gate, zerolog.Nop(), func() time.Time { return time.Now().Add(time.Duration(offset.Load())) })
		t.Cleanup(p.Close)
		acquire(t, p, spec("alice")).Release()
		<-k.asked
		time.Sleep(10 * clockTick)
		for _, by := range []time.Duration{time.Hour, -time.Hour} {
			if n := len(k.asked); n != 0 {
				t.Errorf("asked %d times without a jump", n)
			}
			offset.Add(int64(by))
			time.Sleep(2 * clockTick)
			if n := len(k.asked); n != 1 {
				t.Errorf("asked %d times after a jump by %v", n, by)
			}
			for len(k.asked) > 0 {
				<-k.asked
			}
		}
	})
}

// Attach is for uses that are no client's.
func TestAttach(t *testing.T) {
	d := &dialer{}
	p := newPool(t, d, CloseAtOnce{})
	l := acquire(t, p, spec("alice"))
	if _, err := p.Attach(t.Context(), permit(t, use.Attach), l.ID()); err == nil {
		t.Error("attached by a permit for something else")
	}
	if _, err := p.Attach(t.Context(), permit(t, use.LocalForward), l.ID()+1); err == nil {
		t.Error("attached to what is not there")
	}
	second, err := p.Attach(t.Context(), permit(t, use.LocalForward), l.ID())
	if err != nil || second.ID() != l.ID() {
		t.Fatalf("%v", err)
	}
	l.Release()
	if n := len(p.List()); n != 1 {
		t.Errorf("%d upstreams while one is held", n)
	}
	p.Drain(func(ConnInfo) bool { return true })
	if third, err := p.Attach(t.Context(), permit(t, use.LocalForward), second.ID()); err == nil {
		third.Release()
		t.Error("attached to what takes nobody new")
	}
	second.Release()
	eventually(t, "it closes with the last", func() bool { return len(p.List()) == 0 })
	if _, err := p.Attach(t.Context(), permit(t, use.RemoteForward), 1); err == nil {
		t.Error("attached to what has ended")
	}
}

// person answers, or is nobody, or stays silent until it leaves.
type person struct {
	answer string
	asked  chan struct{}
}

func (p person) Ask(ctx context.Context, _ Question) ([]string, error) {
	if p.asked != nil {
		close(p.asked)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if p.answer == "" {
		return nil, ErrNobody
	}
	return []string{p.answer}, nil
}

func TestAQuestionGoesToTheNextIfTheAskedLeaves(t *testing.T) {
	d := &dialer{ask: true, asked: make(chan []string, 1)}
	p := newPool(t, d, CloseAtOnce{})
	silent := person{asked: make(chan struct{})}
	ctx, leave := context.WithCancel(context.Background())
	first := make(chan error, 1)
	go func() {
		_, err := p.Acquire(ctx, permit(t, use.Attach), spec("alice"), silent)
		first <- err
	}()
	<-silent.asked
	done := make(chan *Lease, 2)
	for _, a := range []person{{}, {answer: "secret"}} {
		go func() {
			l, err := p.Acquire(context.Background(), permit(t, use.Attach), spec("alice"), a)
			if err != nil {
				t.Error(err)
			}
			done <- l
		}()
	}
	eventually(t, "all wait", func() bool { l := p.List(); return len(l) == 1 && l[0].Clients == 3 })
	leave()
	if err := <-first; err == nil {
		t.Error("who left got a lease")
	}
	if a := <-d.asked; len(a) != 1 || a[0] != "secret" {
		t.Errorf("answers %q", a)
	}
	for range 2 {
		(<-done).Release()
	}
}

type askerFunc func() ([]string, error)

func (f askerFunc) Ask(context.Context, Question) ([]string, error) { return f() }

// Whose answer is part of the login has logged in; not who could not answer, who only waited, or who came later.
func TestWhoHasLoggedIn(t *testing.T) {
	for _, inVain := range []bool{false, true} {
		f := &farm{person: true, inVain: inVain}
		p := newPool(t, f, CloseAtOnce{})
		began := time.Now()
		leases := make([]chan *Lease, 3)
		all := make(chan struct{})
		for i, a := range []Asker{
			askerFunc(func() ([]string, error) {
				<-all
				return nil, ErrNobody
			}),
			yes,
			askerFunc(func() ([]string, error) { return nil, errors.New("asked though it was answered") }),
		} {
			leases[i] = make(chan *Lease, 1)
			go func() { leases[i] <- acquireAs(t, p, spec("alice"), a) }()
			eventually(t, "it waits", func() bool { l := p.List(); return len(l) == 1 && l[0].Clients == i+1 })
		}
		close(all)
		got := []*Lease{<-leases[0], <-leases[1], <-leases[2], acquireAs(t, p, spec("alice"), yes)}
		for i, l := range got {
			defer l.Release()
			if at := l.LoggedIn(); at.IsZero() == (i == 1 && !inVain) || !at.IsZero() && at.Before(began) {
				t.Errorf("in vain: %v; client %d has logged in at %v", inVain, i, at)
			}
		}
	}
}

// Who comes to a dial that has given up asking is asked by the next one, once, whatever the first one's error says.
func TestWhoComesAfterTheQuestionIsAskedAgain(t *testing.T) {
	for name, late := range map[string]struct {
		asker Asker
		in    bool
	}{"a person": {person{answer: "secret"}, true}, "nobody": {noAsker{}, false}} {
		t.Run(name, func(t *testing.T) {
			d := &dialer{ask: true, asked: make(chan []string, 1), hold: make(chan struct{}), nobody: make(chan struct{}, 2)}
			p := newPool(t, d, CloseAtOnce{})
			attach := func(a Asker) chan error {
				done := make(chan error, 1)
				s := spec("alice")
				connected := 0
				s.Connected = func() { connected++ }
				go func() {
					l, err := p.Acquire(context.Background(), permit(t, use.Attach), s, a)
					if err == nil {
						l.Release()
					}
					if connected != 1 {
						t.Errorf("told %d times that the transport is up", connected)
					}
					done <- err
				}()
				return done
			}
			first := attach(noAsker{})
			<-d.nobody
			second := attach(late.asker)
			eventually(t, "both wait", func() bool { l := p.List(); return len(l) == 1 && l[0].Clients == 2 })
			close(d.hold)
			if err := <-first; err == nil {
				t.Error("who can't be asked was let in")
			}
			if err := <-second; (err == nil) != late.in {
				t.Fatalf("the second got %v", err)
			}
			if late.in && !slices.Equal(<-d.asked, []string{"secret"}) {
				t.Error("another answer came")
			}
			if d.count() != 2 {
				t.Errorf("%d dials", d.count())
			}
		})
	}
}

// Nothing opens upstream without a permit of the right kind, made by a gate, and not ended.
func TestPermits(t *testing.T) {
	d := &dialer{}
	p := newPool(t, d, CloseAtOnce{})
	ctx := context.Background()
	may := map[string]map[use.Kind]bool{
		"acquire": {use.Attach: true, use.Jump: true},
		"session": {use.Attach: true, use.Shell: true, use.Exec: true, use.Subsystem: true},
		"open":    {use.LocalForward: true, use.Jump: true, use.Other: true},
		"listen":  {use.RemoteForward: true},
		"request": {use.Other: true},
	}
	l := acquire(t, p, spec("alice"))
	defer l.Release()
	try := map[string]func(*use.Permit) error{
		"acquire": func(pm *use.Permit) error {
			l, err := p.Acquire(ctx, pm, spec("alice"), noAsker{})
			if err == nil {
				l.Release()
			}
			return err
		},
		"session": func(pm *use.Permit) error { _, _, err := l.Session(ctx, pm, Lane{}, nil); return err },
		"open":    func(pm *use.Permit) error { _, _, err := l.Open(ctx, pm, "direct-tcpip", nil); return err },
		"listen":  func(pm *use.Permit) error { _, err := l.Listen(ctx, pm, Addr{Port: 1}, nil); return err },
		"request": func(pm *use.Permit) error { _, _, err := l.Request(ctx, pm, "x", true, nil); return err },
	}
	conn := d.conn(0)
	conn.Conn = refusing{}
	for what, f := range try {
		var bad []*use.Permit
		ended := permit(t, use.Attach)
		ended.End(use.Result{})
		bad = append(bad, nil, &use.Permit{}, ended)
		for _, kind := range use.Kinds() {
			if !may[what][kind] {
				bad = append(bad, permit(t, kind))
			}
		}
		for _, pm := range bad {
			if err := f(pm); err == nil || err.Error()[:9] != "no permit" {
				t.Errorf("%s with %+v: %v", what, pm, err)
			}
		}
		for kind := range may[what] {
			if err := f(permit(t, kind)); err != nil && err.Error()[:9] == "no permit" {
				t.Errorf("%s with a permit for %s: %v", what, kind, err)
			}
		}
	}
	if _, _, err := l.Open(ctx, permit(t, use.Other), "session", nil); err == nil {
		t.Error("a session by the kind other")
	}
}

// refusing is a server that refuses all global requests.
type refusing struct{ ssh.Conn }

func (refusing) SendRequest(string, bool, []byte) (bool, []byte, error) { return false, nil, nil }

// x/crypto stops at the 17th request that nobody takes; Queue takes them all, in order, up to a bound.
func TestQueue(t *testing.T) {
	in := make(chan *ssh.Request)
	over := make(chan struct{})
	out := Queue(in, func() { close(over) })
	for i := range maxQueued + 1 {
		select {
		case in <- &ssh.Request{Type: fmt.Sprint(i)}:
		case <-time.After(patience):
			t.Fatalf("request %d was not taken", i)
		}
	}
	<-over
	in <- &ssh.Request{Type: "dropped"}
	close(in)
	n := 0
	for r := range out {
		if r.Type != fmt.Sprint(n) {
			t.Fatalf("got %s, want %d", r.Type, n)
		}
		n++
	}
	if n != maxQueued {
		t.Errorf("%d requests came through", n)
	}
}

func TestQueueBoundsBytes(t *testing.T) {
	in := make(chan *ssh.Request)
	over := make(chan struct{})
	out := Queue(in, func() { close(over) })
	for range maxQueuedBytes/(256<<10) + 1 {
		in <- &ssh.Request{Payload: make([]byte, 256<<10)}
	}
	<-over
	close(in)
	n := 0
	for range out {
		n++
	}
	if n != maxQueuedBytes/(256<<10) {
		t.Errorf("%d requests came through", n)
	}
}

// A client that comes after a dial was told to close, or to drain, gets one of its own.
func TestNewcomersDontJoinAClosedDial(t *testing.T) {
	all := func(ConnInfo) bool { return true }
	for name, stop := range map[string]func(*Pool){
		"close": func(p *Pool) { p.CloseMatching(all, errors.New("closed by hand")) },
		"drain": func(p *Pool) { p.Drain(all) },
	} {
		t.Run(name, func(t *testing.T) {
			d := &dialer{hold: make(chan struct{})}
			p := newPool(t, d, CloseAtOnce{})
			old := make(chan *Lease, 1)
			go func() {
				l, _ := p.Acquire(context.Background(), permit(t, use.Attach), spec("alice"), noAsker{})
				old <- l
			}()
			eventually(t, "dialling", func() bool { return len(p.List()) == 1 && d.count() == 1 })
			stop(p)
			fresh := make(chan *Lease, 1)
			go func() { fresh <- acquire(t, p, spec("alice")) }()
			eventually(t, "a second dial", func() bool { return d.count() == 2 })
			close(d.hold)
			l := <-fresh
			if o := <-old; o != nil {
				if name == "close" || o.ID() == l.ID() {
					t.Errorf("leases %d and %d", o.ID(), l.ID())
				}
				o.Release()
			}
			l.Release()
		})
	}
}

// A login that is made for a plugin, which can't ask anybody, may fail for want of what a client's person would have given:
// the client that waited for it gets one of its own.
func TestASilentLoginIsNoClients(t *testing.T) {
	f := &farm{person: true, hold: make(chan struct{}), refuse: errNeedsPerson}
	p := New(f, CloseAtOnce{}, use.NewGate(nil), zerolog.Nop())
	defer p.Close()
	silent := spec("alice")
	silent.Silent = true
	var both sync.WaitGroup
	both.Go(func() {
		if l, err := p.Acquire(t.Context(), permit(t, use.Attach), silent, noAsker{}); err == nil {
			t.Error("a silent login that needs a person")
			l.Release()
		}
	})
	waiting := func(n int) {
		for list := p.List(); len(list) != 1 || list[0].Clients != n; list = p.List() {
			time.Sleep(time.Millisecond) // polling: joining has no event
		}
	}
	waiting(1)
	both.Go(func() { acquireAs(t, p, spec("alice"), yes).Release() })
	waiting(2)
	close(f.hold)
	both.Wait()
	if n := f.dials(); n != 2 {
		t.Errorf("%d dials", n)
	}
}
