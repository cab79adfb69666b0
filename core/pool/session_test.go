package pool

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

// Who takes a spare is not counted among those who wait for room: that would be for nothing, for each session.
func TestWhoTakesASpareDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		l := acquire(t, p, spec("alice"))
		synctest.Wait()
		p.mu.Lock()
		p.growths = nil // writing to it panics
		p.mu.Unlock()
		for range 3 {
			open(t, l, Lane{}).Close()
		}
		l.Release()
	})
}

// A spare is open before anybody wants it; who takes it gets another one opened.
func TestSpare(t *testing.T) {
	for name, openSSH := range map[string]bool{"OpenSSH": true, "another server": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{openSSH: openSSH}
				p := newPool(t, f, CloseAtOnce{})
				l := acquire(t, p, spec("alice"))
				spare := 0
				if openSSH {
					spare = 1
				}
				for n := range 3 {
					synctest.Wait()
					if asked, open := f.conn(0).opens(); asked != n+spare || open != n+spare {
						t.Errorf("with %d sessions, %d opened and %d open", n, asked, open)
					}
					if got := infos(p)[l.ID()].Sessions; got != n+spare {
						t.Errorf("%d sessions are shown, not %d", got, n+spare)
					}
					open(t, l, Lane{})
				}
				l.Release()
			})
		})
	}
}

// A server that allows no sessions at all is not asked for a spare again, and its refusal is the session's.
func TestASpareThatIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true, max: -1}
		p := newPool(t, f, CloseAtOnce{})
		l := acquire(t, p, spec("alice"))
		synctest.Wait()
		for range 3 {
			var refused *ssh.OpenChannelError
			if _, _, err := l.Session(t.Context(), permit(t, use.Exec), Lane{}, nil); !errors.As(err, &refused) {
				t.Errorf("got %v", err)
			}
		}
		synctest.Wait()
		if asked, _ := f.conn(0).opens(); asked != 4 || f.dials() != 1 {
			t.Errorf("%d sessions opened by %d dials", asked, f.dials())
		}
		l.Release()
	})
}

// A server that closes sessions that do nothing (ChannelTimeout) gets no other spare; the next session is opened anew.
func TestASpareThatTheServerCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		l := acquire(t, p, spec("alice"))
		synctest.Wait()
		f.conn(0).closeAll()
		synctest.Wait()
		if asked, _ := f.conn(0).opens(); asked != 1 {
			t.Errorf("%d spares", asked)
		}
		ch := open(t, l, Lane{})
		synctest.Wait()
		if asked, now := f.conn(0).opens(); asked != 2 || now != 1 {
			t.Errorf("%d opened, %d open", asked, now)
		}
		ch.Close()
		l.Release()
	})
}

// It may be closed in the moment when it is taken: nothing has been asked of it yet, so another one does.
func TestASpareThatIsClosedAsItIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		l := acquire(t, p, spec("alice"))
		synctest.Wait()
		p.mu.Lock()
		u, o, _, err := l.placeLocked(Lane{}, 0)
		p.mu.Unlock()
		if err != nil || !o.spare {
			t.Fatalf("%+v, %v", o, err)
		}
		f.conn(0).closeAll()
		synctest.Wait()
		if _, _, err := u.session(t.Context(), l, o); !errors.Is(err, errSpareGone) {
			t.Errorf("got %v", err)
		}
		l.unhold(u) // as Session does
		open(t, l, Lane{})
		before, _ := f.conn(0).opens()
		open(t, l, Lane{})
		synctest.Wait()
		if after, _ := f.conn(0).opens(); after != before+1 {
			t.Errorf("another spare was opened after that")
		}
		l.Release()
	})
}

// Many sessions at once get as many connections as they need, whatever the server allows on one.
func TestGrowth(t *testing.T) {
	const n = 40
	for name, c := range map[string]struct {
		openSSH        bool
		max            int
		fewest, dearer int // connections
	}{
		"ten on each":            {true, 10, 4, 8},
		"ten, no spares":         {false, 10, 4, 8},
		"one on each":            {true, 1, n, n + maxGrowing},
		"one on each, no spares": {false, 1, n, n + maxGrowing},
		"no limit":               {true, 0, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{openSSH: c.openSSH, max: c.max, takes: 100 * time.Millisecond}
				p := newPool(t, f, CloseAtOnce{})
				leases := make([]*Lease, n)
				for i := range leases {
					leases[i] = acquire(t, p, spec("alice"))
				}
				channels := make(chan *Channel, n)
				for _, l := range leases {
					go func() {
						ch, reqs, err := l.Session(context.Background(), permit(t, use.Exec), Lane{}, nil)
						if err != nil {
							t.Error(err)
						} else {
							l.Discard(reqs)
						}
						channels <- ch
					}()
				}
				var all []*Channel
				for range n {
					all = append(all, <-channels)
				}
				if t.Failed() {
					return
				}
				if d := f.dials(); d < c.fewest || d > c.dearer {
					t.Errorf("%d dials", d)
				}
				if f.most > maxGrowing || c.fewest == n && f.most < maxGrowing {
					t.Errorf("%d dials at a time", f.most)
				}
				on := map[uint64]int{}
				for _, ch := range all {
					on[ch.Upstream()]++
				}
				for id, have := range on {
					if c.max > 0 && have > c.max {
						t.Errorf("%d sessions on upstream %d", have, id)
					}
					if limit := infos(p)[id].MaxSessions; limit != 0 && limit != c.max {
						t.Errorf("limit %d was learned", limit)
					}
				}
				for i, ch := range all {
					ch.Close()
					leases[i].Release()
				}
				time.Sleep(2 * f.takes) // of the bubble: what is still being dialled comes too late
				synctest.Wait()
				if left := p.List(); len(left) != 0 {
					t.Errorf("left: %+v", left)
				}
				p.mu.Lock()
				defer p.mu.Unlock()
				if len(p.growths) != 0 || len(p.quiet) != 0 {
					t.Errorf("left: %d growths, %d quiet", len(p.growths), len(p.quiet))
				}
			})
		})
	}
}

// later is a server whose answers are told in an order of their own: x/crypto tells each to a goroutine of its own.
type later struct {
	*farm
	turns chan turn
}

type turn struct {
	refused bool
	tell    chan struct{}
}

func (f later) Dial(ctx context.Context, s Spec, a Asker) (Conn, error) {
	c, err := f.farm.Dial(ctx, s, a)
	if err != nil {
		return nil, err
	}
	return laterConn{c.(*farmConn), f}, nil
}

type laterConn struct {
	*farmConn
	f later
}

func (c laterConn) OpenChannel(kind string, extra []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	ch, reqs, err := c.farmConn.OpenChannel(kind, extra)
	o := turn{err != nil, make(chan struct{})}
	c.f.turns <- o
	<-o.tell
	return ch, reqs, err
}

func TestTheLimitIsLearnedFromAnswersOutOfOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := later{&farm{max: 2}, make(chan turn)}
		p := newPool(t, f, CloseAtOnce{})
		l := acquire(t, p, spec("alice"))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, reqs, err := l.Session(ctx, permit(t, use.Exec), Lane{}, nil); err == nil {
					l.Discard(reqs) // the connection's end is its end
				}
			})
		}
		all := []turn{<-f.turns, <-f.turns, <-f.turns}
		slices.SortFunc(all, func(a, b turn) int { // the refusal first
			switch {
			case a.refused:
				return -1
			case b.refused:
				return 1
			}
			return 0
		})
		for _, o := range all {
			close(o.tell)
			synctest.Wait()
		}
		if got := infos(p)[l.ID()].MaxSessions; got != 2 {
			t.Errorf("limit %d was learned, not 2", got)
		}
		cancel()
		go func() {
			for o := range f.turns {
				close(o.tell)
			}
		}()
		wg.Wait()
		l.Release()
		p.Close()
		close(f.turns)
	})
}

// Where another login would need a person, a session waits for one of those that there are, and says so once.
func TestASessionWaitsForASlot(t *testing.T) {
	for name, c := range map[string]struct {
		frees time.Duration // when a slot gets free; 0: never
		told  int64
	}{
		"at once":  {time.Millisecond, 0},
		"in time":  {20 * time.Second, 1},
		"too late": {0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{openSSH: true, max: 2, person: true}
				p := newPool(t, f, CloseAtOnce{})
				first := acquireAs(t, p, spec("alice"), yes)
				second := acquireAs(t, p, spec("alice"), yes)
				taken := open(t, first, Lane{})
				open(t, first, Lane{})
				if c.frees != 0 {
					time.AfterFunc(c.frees, func() { taken.Close() })
				}
				var told atomic.Int64
				began := time.Now()
				ch, reqs, err := second.Session(t.Context(), permit(t, use.Shell), Lane{}, func() { told.Add(1) })
				took := time.Since(began)
				if told.Load() != c.told {
					t.Errorf("the person was told %d times", told.Load())
				}
				switch {
				case c.frees == 0:
					if !errors.Is(err, errNoSlot) || took < slotTime || took > slotTime+2*lookEvery {
						t.Errorf("%v after %s", err, took)
					} else if text := err.Error(); !strings.HasPrefix(text, "h.example.com:22: ") || !strings.Contains(text, "allows 2 ") {
						t.Errorf("error %q", text)
					}
				case err != nil:
					t.Fatal(err)
				default:
					if took > c.frees+refusedPause {
						t.Errorf("it took %s", took)
					}
					second.Discard(reqs)
					ch.Close()
				}
				if f.dials() > 1 && c.frees != 0 {
					t.Errorf("%d dials", f.dials())
				}
				first.Release()
				second.Release()
			})
		})
	}
}

// A session that has to wait ends with its client.
func TestAWaitingSessionEndsWithItsClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{max: 1, person: true}
		p := newPool(t, f, CloseAtOnce{})
		l := acquireAs(t, p, spec("alice"), yes)
		open(t, l, Lane{})
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(5*time.Second, func() { cancel(gone) })
		if _, _, err := l.Session(ctx, permit(t, use.Exec), Lane{}, nil); !errors.Is(err, gone) {
			t.Errorf("got %v", err)
		}
		if p.growths[l.laneKey(Lane{})] != nil {
			t.Error("it is counted as waiting still")
		}
		l.Release()
	})
}

// At attach a person can still be asked: if all is taken for long, that is done.
func TestWhoComesWhenAllIsTakenIsAsked(t *testing.T) {
	for name, frees := range map[string]time.Duration{"it stays": 0, "one ends": time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{openSSH: true, max: 1, person: true}
				p := newPool(t, f, CloseAtOnce{})
				first := acquireAs(t, p, spec("alice"), yes)
				ch := open(t, first, Lane{})
				synctest.Wait()
				if frees != 0 {
					time.AfterFunc(frees, func() { ch.Close() })
				}
				began := time.Now()
				second := acquireAs(t, p, spec("alice"), yes)
				took := time.Since(began)
				if same := second.ID() == first.ID(); same != (frees != 0) {
					t.Errorf("the same connection: %v", same)
				}
				if frees == 0 && (took < roomTime || took > roomTime+time.Second) || frees != 0 && took > frees {
					t.Errorf("it took %s", took)
				}
				open(t, second, Lane{})
				first.Release()
				second.Release()
			})
		})
	}
}

// sshd counts a session until its processes are gone. A connection that refuses below its limit is left alone after a few
// tries.
func TestAConnectionThatRefusesBelowItsLimit(t *testing.T) {
	for name, keep := range map[string]int{"one is open": 1, "none is open": 0} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{openSSH: true, max: 2}
				p := newPool(t, f, CloseAtOnce{})
				l := acquire(t, p, spec("alice"))
				chs := []*Channel{open(t, l, Lane{}), open(t, l, Lane{})}
				synctest.Wait()
				if got := infos(p)[l.ID()].MaxSessions; got != 2 {
					t.Fatalf("limit %d", got)
				}
				f.conn(0).setZombies(2 - keep)
				for _, ch := range chs[keep:] {
					ch.Close()
				}
				synctest.Wait()
				began := time.Now()
				ch := open(t, l, Lane{})
				if ch.Upstream() == l.ID() {
					t.Error("the server allowed one more")
				}
				if took := time.Since(began); took > fullTime {
					t.Errorf("it took %s", took)
				}
				// When they have gone at last, it has room again.
				f.conn(0).setZombies(0)
				time.Sleep(2 * fullTime) // of the test's own clock
				before, _ := f.conn(0).opens()
				for range 2 - keep {
					open(t, l, Lane{})
				}
				if after, _ := f.conn(0).opens(); after == before {
					t.Error("it was not asked again")
				}
				l.Release()
			})
		})
	}
}

// A lease that was released holds nothing any more, whatever was on its way.
func TestAReleasedLeaseOpensNothing(t *testing.T) {
	f := &farm{openSSH: true}
	p := newPool(t, f, CloseAtOnce{})
	l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
	l.Release()
	ctx := t.Context()
	_, _, session := l.Session(ctx, permit(t, use.Exec), Lane{}, nil)
	_, _, channel := l.Open(ctx, permit(t, use.Other), "direct-tcpip", nil)
	_, listen := l.Listen(ctx, permit(t, use.RemoteForward), Addr{Port: 1}, nil)
	_, _, request := l.Request(ctx, permit(t, use.Other), "x", true, nil)
	for what, err := range map[string]error{"session": session, "channel": channel, "listen": listen, "request": request} {
		if !errors.Is(err, errGone) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// A channel of the server's that comes too late does not bring it back.
	p.mu.Lock()
	l.holdLocked(other.home)
	p.mu.Unlock()
	other.Release()
	eventually(t, "all closed", func() bool { return len(p.List()) == 0 })
}

// What a server grants once on a connection is known there, and nowhere else.
func TestGranted(t *testing.T) {
	f := &farm{max: 1}
	p := newPool(t, f, CloseAtOnce{})
	l := acquire(t, p, spec("alice"))
	a, b := open(t, l, Lane{}), open(t, l, Lane{})
	if a.Upstream() == b.Upstream() {
		t.Fatal("one connection")
	}
	a.Grant("pty-req")
	if !a.Granted("pty-req") || a.Granted("x11-req") || b.Granted("pty-req") {
		t.Error("wrong grants")
	}
	l.Release()
}

// Nothing is lost or left behind when many come and go at once, on lanes of all kinds, while connections die.
func TestManyAtOnce(t *testing.T) {
	f := &farm{openSSH: true, max: 3}
	p := newPool(t, f, CloseAtOnce{})
	lanes := []Lane{{}, bulk, {Agent: "1:2"}, {Agent: "1:3"}}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				f.mu.Lock()
				conns := slices.Clone(f.conns)
				f.mu.Unlock()
				for _, c := range conns {
					if !c.Down() {
						c.end(errors.New("h.example.com:22: connection reset by peer"))
						break
					}
				}
			}
		}
	}()
	for i := range 200 {
		wg.Go(func() {
			s := spec("alice")
			if i%4 > 1 {
				s.Lane = lanes[i%4]
			}
			l := acquire(t, p, s)
			defer l.Release()
			l.Watch(func(Loss) {})
			for j := range 4 {
				lane := lanes[(i+j)%2]
				if i%4 > 1 && j%2 == 0 {
					lane = lanes[i%4]
				}
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				ch, reqs, err := l.Session(ctx, permit(t, use.Exec), lane, nil)
				cancel()
				if err != nil {
					if errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("session on %v: %v", lane, err)
					}
					continue // the connection has died
				}
				p.mu.Lock()
				agent := ch.up.lane.Agent
				p.mu.Unlock()
				if agent != lane.Agent && ch.closed.Load() == 0 {
					t.Errorf("a session of the lane %q is on one of %q", lane.Agent, agent)
				}
				l.Discard(reqs)
				ch.Close()
			}
		})
	}
	wg.Wait()
	close(stop)
	<-killed
	eventually(t, "all closed", func() bool { return len(p.List()) == 0 })
	eventually(t, "nobody is counted", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.quiet) == 0 && func() bool {
			for _, g := range p.growths {
				if len(g.waiting) != 0 || len(g.dials) != 0 {
					return false
				}
			}
			return true
		}()
	})
}
