package pool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

// Bulk has a connection of its own, which is logged in to without a person, and marked for the network.
func TestBulkHasAConnectionOfItsOwn(t *testing.T) {
	f := &farm{openSSH: true}
	p := newPool(t, f, CloseAtOnce{})
	l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
	shell := open(t, other, Lane{})
	copied := open(t, l, bulk)
	if copied.Upstream() == shell.Upstream() || copied.Upstream() == l.ID() {
		t.Error("they share a connection")
	}
	if s := f.spec(1); !s.Silent || s.Lane != bulk || s.Connected != nil || s.Banner != nil || s.Say != nil || s.Debug != nil {
		t.Errorf("dialled %+v", s)
	}
	list := infos(p)
	if a, b := list[shell.Upstream()].Lane, list[copied.Upstream()].Lane; a != "interactive" || b != "bulk" {
		t.Errorf("lanes %s and %s", a, b)
	}
	// The next ones of each kind find theirs.
	if a, b := open(t, l, Lane{}), open(t, other, bulk); a.Upstream() != shell.Upstream() || b.Upstream() != copied.Upstream() {
		t.Error("the next ones are elsewhere")
	}
	if f.dials() != 2 {
		t.Errorf("%d dials", f.dials())
	}
	l.Release()
	other.Release()
}

// Who is alone on a connection makes it what it needs; nobody logs in twice for one copy.
func TestWhoIsAloneTakesTheConnectionAlong(t *testing.T) {
	for name, c := range map[string]struct {
		person, shared bool
		lane           Lane
		lanes          []string // of all connections then
	}{
		"bulk":                   {false, false, bulk, []string{"bulk"}},
		"bulk, another is there": {false, true, bulk, []string{"interactive", "bulk"}},
		// Who comes next can't have another one.
		"bulk, after a password":            {true, false, bulk, []string{"interactive"}},
		"agent":                             {false, false, Lane{Agent: "1:2"}, []string{"agent"}},
		"agent, another is there":           {false, true, Lane{Agent: "1:2"}, []string{"interactive", "agent"}},
		"agent, after a password":           {true, false, Lane{Agent: "1:2"}, []string{"agent"}},
		"bulk, after a password, with more": {true, true, bulk, []string{"interactive"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := &farm{openSSH: true, person: c.person}
			p := newPool(t, f, CloseAtOnce{})
			l := acquireAs(t, p, spec("alice"), yes)
			if c.shared {
				other := acquireAs(t, p, spec("alice"), yes)
				defer other.Release()
			}
			ch := open(t, l, c.lane)
			var lanes []string
			for _, u := range p.List() {
				lanes = append(lanes, u.Lane)
			}
			if strings.Join(lanes, " ") != strings.Join(c.lanes, " ") {
				t.Errorf("lanes %q, want %q", lanes, c.lanes)
			}
			if want := c.lanes[len(c.lanes)-1]; infos(p)[ch.Upstream()].Lane != want {
				t.Errorf("it is on %+v", infos(p)[ch.Upstream()])
			}
			if !c.shared && c.lane == bulk && !c.person && f.conn(0).marks.Load() != int64(Bulk)+1 {
				t.Error("the connection is not marked anew")
			}
			l.Release()
		})
	}
}

// If bulk can't have its own connection it shares at once, and the login is not tried again for a while.
func TestBulkSharesIfItMust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true, refuse: errNeedsPerson}
		p := newPool(t, f, CloseAtOnce{})
		l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
		began := time.Now()
		for range 3 {
			if ch := open(t, l, bulk); ch.Upstream() != l.ID() {
				t.Error("it does not share")
			}
		}
		if took := time.Since(began); took != 0 || f.dials() != 2 {
			t.Errorf("%s, %d dials", took, f.dials())
		}
		time.Sleep(growPause + time.Second) // of the test's own clock
		f.setRefuse(nil)
		if ch := open(t, l, bulk); ch.Upstream() == l.ID() || f.dials() != 3 {
			t.Errorf("it shares still, after %d dials", f.dials())
		}
		l.Release()
		other.Release()
	})
}

// A login that takes long keeps nobody waiting for long: what comes meanwhile shares.
func TestBulkDoesNotWaitLongForItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true, hold: make(chan struct{})}
		p := newPool(t, f, CloseAtOnce{})
		l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
		began := time.Now()
		if ch := open(t, l, bulk); ch.Upstream() != l.ID() {
			t.Error("it does not share")
		}
		if took := time.Since(began); took < laneTime || took > laneTime+lookEvery {
			t.Errorf("it took %s", took)
		}
		close(f.hold)
		synctest.Wait()
		if ch := open(t, l, bulk); ch.Upstream() == l.ID() || f.dials() != 2 {
			t.Errorf("%d dials", f.dials())
		}
		l.Release()
		other.Release()
	})
}

// What a client is expected to do decides which connection it attaches to, and what is dialled beside.
func TestAttachToTheExpectedLane(t *testing.T) {
	expecting := func(l Lane) Spec { s := spec("alice"); s.Lane = l; return s }
	t.Run("a copy first", func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		l := acquire(t, p, expecting(bulk))
		if got := infos(p)[l.ID()].Lane; got != "bulk" {
			t.Errorf("lane %s", got)
		}
		shell := acquire(t, p, spec("alice")) // attaches there, and has its own dialled
		if shell.ID() != l.ID() {
			t.Error("it waited for a login")
		}
		eventually(t, "an interactive one", func() bool { return len(p.List()) == 2 })
		if ch := open(t, shell, Lane{}); ch.Upstream() == l.ID() {
			t.Error("the shell is behind the copy")
		}
		l.Release()
		shell.Release()
	})
	t.Run("one that nobody uses is taken as it is", func(t *testing.T) {
		f := &farm{openSSH: true}
		hour := func() time.Time { return time.Now().Add(time.Hour) }
		p := newPool(t, f, keeper{until: hour, asked: make(chan ConnInfo, 10)})
		acquire(t, p, spec("alice")).Release()
		l := acquire(t, p, expecting(bulk))
		if got := infos(p)[l.ID()].Lane; got != "bulk" || f.dials() != 1 {
			t.Errorf("lane %s, %d dials", got, f.dials())
		}
		l.Release()
	})
}

func TestClasses(t *testing.T) {
	f := &farm{}
	p := newPool(t, f, CloseAtOnce{})
	l, stranger := acquire(t, p, spec("alice")), acquire(t, p, spec("bob"))
	exec := func(command string) use.Use { return use.Use{Kind: use.Exec, Command: command} }
	subsystem := func(name string) use.Use { return use.Use{Kind: use.Subsystem, Subsystem: name} }
	check := func(u use.Use, terminal bool, want Class) {
		t.Helper()
		if got := l.Classify(u, terminal); got != want {
			t.Errorf("%q, terminal %v: class %d, not %d", u.Command+u.Subsystem, terminal, got, want)
		}
	}
	for command, want := range map[string]Class{
		"scp -t /x": Bulk, "/usr/bin/rsync --server .": Bulk, "/usr/lib/sftp-server": Bulk, "cat /x": Interactive,
		"scpx": Interactive, "": Interactive, "scp; id": Interactive, "git-upload-pack '/x'": Interactive,
	} {
		check(exec(command), false, want)
		check(exec(command), true, Interactive)
	}
	check(subsystem("sftp"), false, Bulk)
	check(subsystem("netconf"), false, Interactive)
	check(use.Use{Kind: use.Shell}, false, Interactive)

	// Learned from what was moved, by the last one that tells.
	for _, c := range []struct {
		n    int64
		want Class
	}{{BulkBytes - 1, Interactive}, {BulkBytes, Bulk}, {BulkBytes - 1, Bulk}, {BulkBytes / 8, Bulk}, {BulkBytes/8 - 1, Interactive},
		{BulkBytes, Bulk}} {
		l.NoteMoved(exec("git-upload-pack '/x'"), c.n)
		check(exec("/usr/bin/git-upload-pack '/another'"), false, c.want)
	}
	check(exec("git-upload-pack '/x'"), true, Interactive)
	if stranger.Classify(exec("git-upload-pack '/x'"), false) != Interactive {
		t.Error("it was learned for another target")
	}
	l.NoteMoved(exec("scp -t /x"), 1)
	check(exec("scp -t /x"), false, Bulk) // known, whatever one of them moved
	l.NoteMoved(use.Use{Kind: use.Shell}, BulkBytes)
	check(use.Use{Kind: use.Shell}, false, Interactive)
	l.NoteMoved(subsystem("netconf"), BulkBytes)
	check(subsystem("netconf"), false, Bulk)
	check(exec("netconf"), false, Interactive)

	// What a shell has to read tells only about itself, and is not kept as it is.
	pipeline := "zcat 'the secret'.gz | psql"
	l.NoteMoved(exec(pipeline), BulkBytes)
	check(exec(pipeline), false, Bulk)
	check(exec(pipeline), true, Interactive)
	check(exec("zcat another.gz | psql"), false, Interactive)
	for what := range p.learned[l.key.key] {
		if strings.Contains(what, "secret") {
			t.Errorf("%q is kept", what)
		}
	}
	l.NoteMoved(exec(pipeline), 1)
	check(exec(pipeline), false, Interactive)

	// A server's programs don't fill the memory.
	for i := range 2 * maxLearned {
		l.NoteMoved(exec(fmt.Sprint("p", i)), BulkBytes)
	}
	if n := len(p.learned[l.key.key]); n > maxLearned {
		t.Errorf("%d programs are remembered", n)
	}
	check(exec(fmt.Sprint("p", 2*maxLearned-1)), false, Bulk)
	l.Release()
	stranger.Release()
}

// sshd gives the forwarded agent to every session of the connection: none may be there that did not ask, nor one of
// another agent.
func TestAgentLanesAreApart(t *testing.T) {
	f := &farm{openSSH: true}
	p := newPool(t, f, CloseAtOnce{})
	one, other, none := acquire(t, p, forwarding("1:2")), acquire(t, p, forwarding("1:3")), acquire(t, p, spec("alice"))
	if one.ID() == other.ID() || one.ID() == none.ID() || other.ID() == none.ID() {
		t.Fatalf("homes %d, %d and %d", one.ID(), other.ID(), none.ID())
	}
	again := acquire(t, p, forwarding("1:2"))
	if again.ID() != one.ID() {
		t.Error("the same agent is not shared")
	}
	on := map[uint64]string{}
	for _, c := range []struct {
		l     *Lease
		agent string
	}{{one, "1:2"}, {other, "1:3"}, {none, ""}, {one, ""}, {none, "1:2"}, {again, "1:3"}} {
		for _, class := range []Class{Interactive, Bulk} {
			ch := open(t, c.l, Lane{class, c.agent})
			if agent, ok := on[ch.Upstream()]; ok && agent != c.agent {
				t.Errorf("a session with agent %q is on a connection with %q", c.agent, agent)
			}
			on[ch.Upstream()] = c.agent
		}
	}
	for id, agent := range on {
		if lane := infos(p)[id].Lane; (lane == "agent") != (agent != "") {
			t.Errorf("connection %d with agent %q is called %s", id, agent, lane)
		}
	}
	for _, l := range []*Lease{one, other, none, again} {
		l.Release()
	}
	eventually(t, "all closed", func() bool { return len(p.List()) == 0 })
}

// Without a person the wish for an agent, or for none beside one, is refused rather than granted on the wrong connection.
func TestNoAgentLaneWithoutAPerson(t *testing.T) {
	f := &farm{openSSH: true, person: true}
	p := newPool(t, f, CloseAtOnce{})
	l, other := acquireAs(t, p, spec("alice"), yes), acquireAs(t, p, spec("alice"), yes)
	if _, _, err := l.Session(t.Context(), permit(t, use.Exec), Lane{Agent: "1:2"}, nil); !errors.Is(err, errNoAgentLane) {
		t.Errorf("with an agent: %v", err)
	}
	with := acquireAs(t, p, forwarding("1:2"), yes)
	open(t, with, Lane{Agent: "1:2"})
	l.Release()
	other.Release()
	f.conn(0).end(errors.New("reset"))
	eventually(t, "one is left", func() bool { return len(p.List()) == 1 })
	if _, _, err := with.Session(t.Context(), permit(t, use.Exec), Lane{}, nil); !errors.Is(err, errAgentLane) {
		t.Errorf("without: %v", err)
	}
	with.Release()
}

// The request for agent forwarding goes to the server once per connection; a session that ends before the answer leaves
// it to the next.
func TestTheAgentIsAskedForOnce(t *testing.T) {
	f := &farm{openSSH: true}
	p := newPool(t, f, CloseAtOnce{})
	l := acquire(t, p, forwarding("1:2"))
	lane := Lane{Agent: "1:2"}
	pm := permit(t, use.Agent)
	none := func(*NewChannel) bool { return false }
	const name = "auth-agent-req@openssh.com"

	gone := open(t, l, lane)
	gone.Channel.Close()
	if gone.Agent(t.Context(), pm, name, none) {
		t.Error("granted by a channel that is closed")
	}
	var channels []*Channel
	for i := range 3 {
		ch := open(t, l, lane)
		if !ch.Agent(t.Context(), pm, name, none) {
			t.Errorf("session %d has no agent", i)
		}
		channels = append(channels, ch)
	}
	asked := 0
	for _, ch := range channels {
		asked += len(ch.Channel.(*farmChannel).requests())
	}
	if asked != 1 {
		t.Errorf("the server was asked %d times", asked)
	}
	plain := open(t, l, Lane{})
	if plain.Agent(t.Context(), pm, name, none) || len(plain.Channel.(*farmChannel).requests()) != 0 {
		t.Error("forwarded on a connection that is not the agent's")
	}
	if channels[0].Agent(t.Context(), permit(t, use.Exec), name, none) {
		t.Error("forwarded by a permit for something else")
	}
	l.Release()

	// Nor does the connection become one for sessions without it: the server would give them the agent's socket.
	again := acquire(t, p, forwarding("1:4"))
	ch := open(t, again, Lane{Agent: "1:4"})
	ch.Agent(t.Context(), pm, name, none)
	ch.Close()
	eventually(t, "its session has ended", func() bool { return ch.closed.Load() != 0 })
	if plain := open(t, again, Lane{}); plain.Upstream() == ch.Upstream() {
		t.Error("a session without the agent is on the connection with it")
	}
	again.Release()
}

// incoming is a channel that the server opens.
type incoming struct {
	kind     string
	ch       ssh.Channel
	reqs     chan *ssh.Request
	accepted atomic.Int64
	rejected chan ssh.RejectionReason
}

func newIncoming(kind string, ch ssh.Channel) *incoming {
	return &incoming{kind: kind, ch: ch, reqs: make(chan *ssh.Request), rejected: make(chan ssh.RejectionReason, 8)}
}

func (n *incoming) ChannelType() string { return n.kind }
func (n *incoming) ExtraData() []byte   { return nil }
func (n *incoming) Accept() (ssh.Channel, <-chan *ssh.Request, error) {
	n.accepted.Add(1)
	return n.ch, n.reqs, nil
}
func (n *incoming) Reject(r ssh.RejectionReason, _ string) error { n.rejected <- r; return nil }

// A connection to the agent goes to the client that came last. If that is stopped, others of the same agent are asked;
// who answers first has it.
func TestAgentConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		pm := permit(t, use.Agent)
		lane := Lane{Agent: "1:2"}
		var leases []*Lease
		type asked struct {
			who int
			n   *NewChannel
			ok  chan bool
		}
		asks := make(chan asked, 16)
		for who := range 3 {
			l := acquire(t, p, forwarding("1:2"))
			leases = append(leases, l)
			open(t, l, lane).Agent(t.Context(), pm, "auth-agent-req@openssh.com", func(n *NewChannel) bool {
				a := asked{who, n, make(chan bool)}
				asks <- a
				return <-a.ok
			})
			time.Sleep(time.Millisecond) // of the test's own clock: who came last must be known
		}
		in := func() *incoming {
			var reqs *incoming
			reqs = newIncoming("auth-agent@openssh.com", &silent{close: sync.OnceFunc(func() { close(reqs.reqs) })})
			f.conn(0).fakeConn.channels <- reqs
			return reqs
		}
		take := func(a asked) {
			t.Helper()
			ch, reqs, err := a.n.Accept()
			if err != nil {
				t.Errorf("client %d: %v", a.who, err)
			} else {
				leases[a.who].Discard(reqs)
				ch.Close()
			}
			a.ok <- true
		}

		first := in()
		a := <-asks
		if a.who != 2 {
			t.Errorf("client %d was asked first", a.who)
		}
		take(a)

		// The newest is stopped, the second is gone.
		second := in()
		began := time.Now()
		stopped := <-asks
		a = <-asks
		if a.who != 1 || time.Since(began) != agentTime {
			t.Errorf("client %d was asked after %s", a.who, time.Since(began))
		}
		a.ok <- false
		a = <-asks
		if a.who != 0 {
			t.Errorf("client %d was asked", a.who)
		}
		take(a)
		// Now it goes on: too late.
		if _, _, err := stopped.n.Accept(); !errors.Is(err, errTaken) {
			t.Errorf("two clients have one connection: %v", err)
		}
		if err := stopped.n.Reject(ssh.Prohibited, ""); !errors.Is(err, errTaken) {
			t.Errorf("one client refuses another's connection: %v", err)
		}
		stopped.ok <- true

		// Nobody takes it.
		third := in()
		for range 3 {
			(<-asks).ok <- false
		}
		if <-third.rejected != ssh.ConnectionFailed {
			t.Error("another reason")
		}
		for _, l := range leases[1:] {
			l.Release()
		}
		// Only a living client is asked.
		fourth := in()
		if a = <-asks; a.who != 0 {
			t.Errorf("client %d was asked after its end", a.who)
		}
		take(a)
		synctest.Wait()
		for i, n := range []*incoming{first, second, third, fourth} {
			if want := int64(1); i != 2 && (n.accepted.Load() != want || len(n.rejected) != 0) {
				t.Errorf("connection %d: %d accepted, %d refused", i, n.accepted.Load(), len(n.rejected))
			}
		}
		leases[0].Release()
	})
}

// xChannel is a connection to a forwarded display.
type xChannel struct {
	silent
	r io.Reader
}

func (x *xChannel) Read(b []byte) (int, error) { return x.r.Read(b) }

// x11Setup is what an X client says first (X Window System Protocol, section 8).
func x11Setup(order binary.AppendByteOrder, name, data string) []byte {
	b := []byte("l\x00")
	if order == binary.AppendByteOrder(binary.BigEndian) {
		b[0] = 'B'
	}
	for _, n := range []int{11, 0, len(name), len(data), 0} {
		b = order.AppendUint16(b, uint16(n))
	}
	pad := func(s string) string { return s + strings.Repeat("\x00", (4-len(s)%4)%4) }
	return append(b, pad(name)+pad(data)...)
}

// A connection to a forwarded display goes to the client whose cookie it brings, with all its bytes, and to no other.
func TestX11Connections(t *testing.T) {
	const name = "MIT-MAGIC-COOKIE-1"
	cookies := []string{"0123456789abcdef", "\x00\xff23456789abcdee"}
	for what, c := range map[string]struct {
		first []byte
		owner int // -1: closed
	}{
		"first":                 {x11Setup(binary.LittleEndian, name, cookies[0]), 0},
		"first, big endian":     {x11Setup(binary.BigEndian, name, cookies[0]), 0},
		"second":                {x11Setup(binary.LittleEndian, name, cookies[1]), 1},
		"nobody's":              {x11Setup(binary.LittleEndian, name, "0123456789abcdeg"), -1},
		"a beginning":           {x11Setup(binary.LittleEndian, name, cookies[0][:8]), -1},
		"none":                  {x11Setup(binary.LittleEndian, "", ""), -1},
		"of a client that left": {x11Setup(binary.LittleEndian, name, "left456789abcdef"), -1},
		"too long":              {x11Setup(binary.LittleEndian, name, strings.Repeat("x", maxX11Auth+1)), -1},
		"not X11":               {[]byte("GET / HTTP/1.1\r\n\r\n"), -1},
		"cut short":             {x11Setup(binary.LittleEndian, name, cookies[0])[:30], -1},
		"nothing":               {nil, -1},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{openSSH: true}
				p := newPool(t, f, CloseAtOnce{})
				got := make(chan string, 1)
				var leases []*Lease
				for i, cookie := range append([]string{"left456789abcdef", ""}, cookies...) {
					l := acquire(t, p, spec("alice"))
					leases = append(leases, l)
					open(t, l, Lane{}).X11(strings.ToUpper(fmt.Sprintf("%x", cookie)), func(n *NewChannel) {
						ch, reqs, err := n.Accept()
						if err != nil {
							t.Error(err)
							return
						}
						l.Discard(reqs)
						b, err := io.ReadAll(ch)
						got <- fmt.Sprint(i-2, " ", string(b), err)
						ch.Close()
					})
				}
				leases[0].Release()
				rest := "and what follows"
				var n *incoming
				closed := make(chan struct{})
				end := sync.OnceFunc(func() { close(n.reqs); close(closed) })
				var r io.Reader = io.MultiReader(bytes.NewReader(c.first), strings.NewReader(rest))
				if c.owner < 0 {
					r = bytes.NewReader(c.first)
				}
				n = newIncoming("x11", &xChannel{silent{close: end}, r})
				f.conn(0).fakeConn.channels <- n
				<-closed
				if c.owner < 0 {
					if len(got) > 0 {
						t.Errorf("somebody got it: %q", <-got)
					}
				} else if g, want := <-got, fmt.Sprint(c.owner, " ", string(c.first), rest, nil); g != want {
					t.Errorf("got  %q\nwant %q", g, want)
				}
				for _, l := range leases {
					l.Release()
				}
			})
		})
	}
}

// Who says nothing is not waited for, and without a client that forwards X11 there is nobody to read.
func TestX11ConnectionsThatSayNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		l := acquire(t, p, spec("alice"))
		none := newIncoming("x11", nil)
		f.conn(0).fakeConn.channels <- none
		<-none.rejected
		open(t, l, Lane{}).X11("00", func(*NewChannel) { t.Error("it is somebody's") })
		r, w := io.Pipe()
		began := time.Now()
		var n *incoming
		n = newIncoming("x11", &xChannel{silent{close: sync.OnceFunc(func() { close(n.reqs); w.Close() })}, r})
		f.conn(0).fakeConn.channels <- n
		for range n.reqs {
		}
		if took := time.Since(began); took != x11Time {
			t.Errorf("closed after %s", took)
		}
		l.Release()
	})
}

func FuzzReadX11(f *testing.F) {
	f.Add(x11Setup(binary.LittleEndian, "MIT-MAGIC-COOKIE-1", "0123456789abcdef"))
	f.Add(x11Setup(binary.BigEndian, "", ""))
	f.Add(x11Setup(binary.BigEndian, strings.Repeat("n", 1<<16-1), ""))
	f.Add(x11Setup(binary.LittleEndian, "MIT-MAGIC-COOKIE-1", strings.Repeat("d", maxX11Auth+4)))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		first, cookie, err := readX11(r)
		if err != nil {
			return
		}
		if !bytes.HasPrefix(in, first) || len(first)+r.Len() != len(in) {
			t.Error("what was read is not what came")
		}
		if len(cookie)/2 > maxX11Auth {
			t.Errorf("a cookie of %d bytes", len(cookie)/2)
		}
	})
}

// A connection beside another one stays a while after its last client, but not beyond the clients of its target; how long
// the last one stays is for the Retainer to say.
func TestExtraConnectionsLingerWithTheOthers(t *testing.T) {
	for name, c := range map[string]struct {
		after time.Duration // that the other client leaves
		gone  time.Duration // when the extra connection is gone
	}{
		"while its target is used": {time.Hour, lingerTime},
		"with the last client":     {10 * time.Second, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{openSSH: true}
				later := time.Now().Add(2 * time.Hour)
				k := keeper{until: func() time.Time { return later }, asked: make(chan ConnInfo, 10)}
				p := newPool(t, f, k)
				l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
				open(t, other, Lane{})
				copied := open(t, l, bulk)
				began := time.Now()
				copied.Close()
				l.Release()
				left := time.AfterFunc(c.after, other.Release)
				<-f.conn(1).ended
				if got := time.Since(began); got != c.gone {
					t.Errorf("gone after %s, not %s", got, c.gone)
				}
				if left.Stop() {
					if len(k.asked) != 0 || f.conn(0).Down() {
						t.Error("the one with a client was touched")
					}
					other.Release()
				}
				if a := <-k.asked; a.ID != other.ID() {
					t.Errorf("asked about %d", a.ID)
				}
				<-f.conn(0).ended
			})
		})
	}
}

// Who comes while one lingers uses it.
func TestALingeringConnectionIsUsedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
		for range 5 {
			ch := open(t, l, bulk)
			ch.Close()
			synctest.Wait()
			time.Sleep(lingerTime / 2) // of the test's own clock
		}
		if f.dials() != 2 {
			t.Errorf("%d dials", f.dials())
		}
		l.Release()
		other.Release()
	})
}

// If the one that it was beside dies meanwhile, it is the one that the Retainer is asked about.
func TestALingeringConnectionThatIsTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		later := time.Now().Add(2 * time.Hour)
		k := keeper{until: func() time.Time { return later }, asked: make(chan ConnInfo, 10)}
		p := newPool(t, f, k)
		l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
		ch := open(t, l, bulk)
		id := ch.Upstream()
		ch.Close()
		l.Release()
		synctest.Wait()
		f.conn(0).end(errors.New("reset"))
		synctest.Wait()
		other.Release()
		if a := <-k.asked; a.ID != id {
			t.Errorf("asked about %d, not %d", a.ID, id)
		}
		if again := acquire(t, p, spec("alice")); again.ID() != id {
			t.Error("it was not kept")
		} else {
			again.Release()
		}
	})
}

// A dead connection hurts what is on it, and nothing else.
func TestALostConnectionHurtsOnlyItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
		open(t, other, Lane{})
		copied := open(t, l, bulk)
		losses := map[*Lease]chan Loss{}
		for _, o := range []*Lease{l, other} {
			c := make(chan Loss, 8)
			losses[o] = c
			o.Watch(func(loss Loss) { c <- loss })
		}
		home := l.ID()
		why := errors.New("h.example.com:22: connection reset by peer")
		f.conn(0).end(why)
		synctest.Wait()
		if loss := <-losses[l]; loss.Upstream != home || !loss.Elsewhere || !errors.Is(loss.Reason, why) {
			t.Errorf("the copy's client: %+v", loss)
		}
		if loss := <-losses[other]; loss.Elsewhere {
			t.Errorf("the shell's client: %+v", loss)
		}
		if copied.closed.Load() != 0 || l.ID() != 0 {
			t.Error("the copy was hurt")
		}
		// What needs a home gets another, without a question.
		ch, reqs, err := l.Open(t.Context(), permit(t, use.LocalForward), "direct-tcpip", nil)
		if err != nil {
			t.Fatal(err)
		}
		l.Discard(reqs)
		if l.ID() == 0 || ch.Upstream() != l.ID() {
			t.Errorf("it is on %d, home is %d", ch.Upstream(), l.ID())
		}
		ch.Close()
		other.Release()
		l.Release()
	})
}

// One that is not the client's home is its loss, too, when it dies with a session on it: nobody else would tell the client.
func TestALostConnectionBesideTheHome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
		copied := open(t, l, bulk)
		why := errors.New("h.example.com:22: connection reset by peer")
		f.conn(1).end(why)
		if loss := lossOf(l); loss.Upstream != copied.Upstream() || !errors.Is(loss.Reason, why) || !loss.Elsewhere {
			t.Errorf("loss %+v", loss)
		}
		if copied.ClosedInOrder() {
			t.Error("it looks complete")
		}
		synctest.Wait()
		other.Watch(func(loss Loss) { t.Errorf("who was not on it has lost %+v", loss) })
		l.Release()
		other.Release()
	})
}

// forgetful is a farm whose connections never answer the opening of a direct-tcpip channel, not even when they end.
type forgetful struct {
	*farm
	over chan struct{}
}

func (f forgetful) Dial(ctx context.Context, s Spec, a Asker) (Conn, error) {
	c, err := f.farm.Dial(ctx, s, a)
	if err != nil {
		return nil, err
	}
	return forgetfulConn{c.(*farmConn), f.over}, nil
}

type forgetfulConn struct {
	*farmConn
	over chan struct{}
}

func (c forgetfulConn) OpenChannel(kind string, extra []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	if kind == "direct-tcpip" {
		<-c.over
		return nil, nil, io.EOF
	}
	return c.farmConn.OpenChannel(kind, extra)
}

// x/crypto forgets an open that it sends in the moment when the connection ends. The client is not taken for dead because of
// that, if it has another connection.
func TestAForgottenOpenHoldsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := forgetful{&farm{openSSH: true}, make(chan struct{})}
		p := newPool(t, f, CloseAtOnce{})
		l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
		copied := open(t, l, bulk)
		failed := make(chan error, 1)
		go func() {
			_, _, err := l.Open(t.Context(), permit(t, use.LocalForward), "direct-tcpip", nil)
			failed <- err
		}()
		synctest.Wait()
		why := errors.New("h.example.com:22: connection reset by peer")
		f.conn(0).end(why)
		if err := <-failed; !errors.Is(err, why) {
			t.Errorf("got %v", err)
		}
		synctest.Wait()
		if !l.Alive() || copied.closed.Load() != 0 {
			t.Error("the client is taken for dead")
		}
		f.conn(1).end(why)
		l.Watch(func(loss Loss) {
			if loss.Upstream == copied.Upstream() && loss.Elsewhere {
				t.Errorf("who has lost all can't go on: %+v", loss)
			}
		})
		synctest.Wait()
		close(f.over)
		l.Release()
		other.Release()
	})
}

// A client that came in the moment when the connection broke gets another, where that takes no person and nobody wanted the
// connection closed.
func TestANewcomerOutlivesTheConnection(t *testing.T) {
	why := errors.New("h.example.com:22: connection reset by peer")
	reset := func(_ *Pool, f *farm) { f.conn(0).end(why) }
	for name, c := range map[string]struct {
		person bool
		before func(t *testing.T, l *Lease)
		end    func(p *Pool, f *farm)
		lives  bool
	}{
		"reset":    {end: reset, lives: true},
		"a person": {person: true, end: reset},
		"used": {before: func(t *testing.T, l *Lease) {
			open(t, l, Lane{}).Close()
			time.Sleep(time.Second)
		}, end: reset},
		"a forward": {before: func(t *testing.T, l *Lease) {
			_, reqs, err := l.Open(t.Context(), permit(t, use.LocalForward), "direct-tcpip", nil)
			if err != nil {
				t.Fatal(err)
			}
			l.Discard(reqs)
		}, end: reset},
		"not new": {before: func(*testing.T, *Lease) { time.Sleep(newcomerTime) }, end: reset},
		"closed":  {end: func(p *Pool, f *farm) { p.CloseMatching(func(ConnInfo) bool { return true }, why) }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{openSSH: true, person: c.person}
				p := newPool(t, f, CloseAtOnce{})
				l := acquireAs(t, p, spec("alice"), yes)
				if c.before != nil {
					c.before(t, l)
				}
				c.end(p, f)
				if loss := lossOf(l); loss.Elsewhere != c.lives || !errors.Is(loss.Reason, why) {
					t.Errorf("%+v", loss)
				}
				if c.lives {
					if ch := open(t, l, Lane{}); ch.Upstream() != 2 {
						t.Errorf("its session is on %d", ch.Upstream())
					}
				}
				l.Release()
			})
		})
	}
}

// Without any connection left, forwards get a new one where that takes no person, else an error.
func TestAHomeIsReplaced(t *testing.T) {
	for name, person := range map[string]bool{"silently": false, "not with a password": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{person: person, max: 1}
				p := newPool(t, f, CloseAtOnce{})
				l := acquireAs(t, p, spec("alice"), yes)
				open(t, l, Lane{})
				p.mu.Lock()
				l.setHomeLocked(nil) // as lostLocked does
				p.mu.Unlock()
				f.conn(0).end(errors.New("reset"))
				synctest.Wait()
				_, reqs, err := l.Open(t.Context(), permit(t, use.LocalForward), "direct-tcpip", nil)
				switch {
				case person != (err != nil):
					t.Errorf("got %v", err)
				case err == nil:
					l.Discard(reqs)
				}
				l.Release()
			})
		})
	}
}

// A server that was silent is asked once for all who come; one that gives no sign of life gets no new clients until it does.
func TestProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true}
		p := newPool(t, f, CloseAtOnce{})
		l := acquire(t, p, spec("alice"))
		synctest.Wait()
		c := f.conn(0)

		// It answers: the fake's LastHeard is now, so nobody asks.
		acquire(t, p, spec("alice")).Release()
		if n := c.probes.Load(); n != 0 {
			t.Errorf("%d probes of a server that has just been heard", n)
		}

		heard := time.Now()
		c.last.Store(heard.UnixNano())
		time.Sleep(trustTime) // of the test's own clock
		began := time.Now()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				late := acquire(t, p, spec("alice"))
				if late.ID() == l.ID() {
					t.Error("it rides on a server that is silent")
				}
				late.Release()
			})
		}
		wg.Wait()
		if took := time.Since(began); took != probeTime {
			t.Errorf("it took %s", took)
		}
		if c.probes.Load() != 1 || !c.ask.Load() {
			t.Errorf("%d probes, by the spare: %v", c.probes.Load(), c.ask.Load())
		}
		if u := infos(p)[l.ID()]; !u.Suspect || c.Down() {
			t.Errorf("%+v", u)
		}
		// What is on it goes on.
		open(t, l, Lane{})

		// A byte later it is as good as any, whatever the clock said then.
		for _, at := range []time.Time{heard.Add(time.Millisecond), heard.Add(-time.Hour)} {
			c.last.Store(at.UnixNano())
			if infos(p)[l.ID()].Suspect {
				t.Error("it is suspect still")
			}
		}
		c.last.Store(0)
		back := acquire(t, p, spec("alice"))
		back.Release()
		l.Release()
	})
}

// A jump of the clock, in either direction, has all servers asked, and nobody else.
func TestAClockThatJumps(t *testing.T) {
	for name, c := range map[string]struct {
		by    time.Duration
		asked int64
	}{
		"forwards":       {time.Hour, 1},
		"backwards":      {-time.Hour, 1},
		"a little":       {time.Second, 0},
		"a little, back": {-time.Second, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var offset atomic.Int64
				f := &farm{}
				p := newWithClock(f, CloseAtOnce{}, gate, zerolog.Nop(),
					func() time.Time { return time.Now().Add(time.Duration(offset.Load())) })
				t.Cleanup(p.Close)
				l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("bob"))
				time.Sleep(10 * clockTick) // of the test's own clock
				offset.Store(int64(c.by))
				time.Sleep(10 * clockTick)
				for i := range 2 {
					if got := f.conn(i).probes.Load(); got != c.asked {
						t.Errorf("server %d was asked %d times", i, got)
					}
				}
				l.Release()
				other.Release()
			})
		})
	}
}

// Who comes after a jump does not trust what was heard before it, nor what seems to come from the future.
func TestNobodyTrustsAnotherClock(t *testing.T) {
	for name, by := range map[string]time.Duration{"forwards": time.Hour, "backwards": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			f := &farm{}
			p := newWithClock(f, CloseAtOnce{}, gate, zerolog.Nop(), func() time.Time { return time.Now().Add(by) })
			t.Cleanup(p.Close)
			l := acquire(t, p, spec("alice"))
			other := acquire(t, p, spec("alice"))
			if f.conn(0).probes.Load() == 0 {
				t.Error("it was not asked")
			}
			l.Release()
			other.Release()
		})
	}
}

// Drain and close are for all connections of a target that match.
func TestDrainAndCloseOfSeveral(t *testing.T) {
	all := func(ConnInfo) bool { return true }
	why := errors.New("closed by hand")
	for name, c := range map[string]struct {
		stop func(*Pool) int
		cut  bool
	}{
		"drain": {func(p *Pool) int { return p.Drain(all) }, false},
		"close": {func(p *Pool) int { return p.CloseMatching(all, why) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{openSSH: true}
				p := newPool(t, f, CloseAtOnce{})
				l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
				shell, copied := open(t, other, Lane{}), open(t, l, bulk)
				lingering := acquire(t, p, forwarding("1:2"))
				lingering.Release()
				synctest.Wait()
				if n := c.stop(p); n != 3 {
					t.Errorf("%d matched", n)
				}
				synctest.Wait()
				for i, ch := range []*Channel{shell, copied} {
					if cut := ch.closed.Load() != 0; cut != c.cut {
						t.Errorf("session %d is cut: %v", i, cut)
					}
				}
				if !f.conn(2).Down() {
					t.Error("one without clients stays")
				}
				if c.cut {
					if loss := lossOf(l); !errors.Is(loss.Reason, why) {
						t.Errorf("loss %+v", loss)
					}
				} else {
					// Its own clients may still open sessions there.
					if ch := open(t, other, Lane{}); ch.Upstream() != other.ID() {
						t.Error("a draining connection's client was sent away")
					}
				}
				fresh := acquire(t, p, spec("alice"))
				if fresh.ID() == l.ID() || fresh.ID() == copied.Upstream() {
					t.Error("a newcomer rides on it")
				}
				for _, o := range []*Lease{l, other, fresh} {
					o.Release()
				}
				synctest.Wait()
				if len(p.List()) != 0 {
					t.Errorf("left: %+v", p.List())
				}
			})
		})
	}
}

// A login on the way for sessions that wait is listed like another, and ends like one: what is closed does not come up, what
// is drained takes the sessions that wait for it, and no newcomers.
func TestALoginForSessionsThatWaitIsListed(t *testing.T) {
	all := func(ConnInfo) bool { return true }
	why := errors.New("closed by hand")
	for name, c := range map[string]struct {
		stop func(*Pool) int
		cut  bool
	}{
		"drain": {func(p *Pool) int { return p.Drain(all) }, false},
		"close": {func(p *Pool) int { return p.CloseMatching(all, why) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{max: 1, hold: make(chan struct{})} // no spares, which would compete for the one session
				p := newPool(t, f, CloseAtOnce{})
				l := acquire(t, p, spec("alice"))
				l.Watch(func(Loss) {})
				open(t, l, Lane{})
				ctx, cut := context.WithCancel(t.Context())
				type result struct {
					ch  *Channel
					err error
				}
				waits := make(chan result, 1)
				go func() {
					ch, reqs, err := l.Session(ctx, permit(t, use.Exec), Lane{}, nil)
					if err == nil {
						l.Discard(reqs)
					}
					waits <- result{ch, err}
				}()
				time.Sleep(refusedPause)
				synctest.Wait()
				list := p.List()
				if len(list) != 2 || list[1].State != Dialling || list[1].Clients != 1 || list[1].Lane != "interactive" {
					t.Fatalf("listed: %+v", list)
				}
				if n := c.stop(p); n != 2 {
					t.Errorf("%d matched", n)
				}
				synctest.Wait()
				if c.cut {
					if list := p.List(); len(list) != 0 {
						t.Errorf("left: %+v", list)
					}
					time.Sleep(laneTime / 2) // nothing is dialled for a client that has lost its connection
					cut()
					if got := <-waits; !errors.Is(got.err, context.Canceled) || f.dials() != 2 {
						t.Errorf("the session: %v, after %d dials", got.err, f.dials())
					}
					l.Release()
					return
				}
				close(f.hold)
				got := <-waits
				if got.err != nil || got.ch.Upstream() != list[1].ID {
					t.Fatalf("the session: %+v", got)
				}
				fresh := acquire(t, p, spec("alice"))
				if id := fresh.ID(); id == list[0].ID || id == list[1].ID {
					t.Error("a newcomer rides on it")
				}
				fresh.Release()
				l.Release()
				cut()
				synctest.Wait()
				if len(p.List()) != 0 {
					t.Errorf("left: %+v", p.List())
				}
			})
		})
	}
}

// The pool closes a connection with its last channel, where the client is on another one too. That must not make the
// channel look cut.
func TestTheLastSessionOfAConnectionIsNotCut(t *testing.T) {
	for name, c := range map[string]struct {
		end     func(p *Pool, c *farmConn, copied uint64)
		inOrder bool
	}{
		"it was draining": {func(p *Pool, c *farmConn, copied uint64) {
			p.Drain(func(u ConnInfo) bool { return u.ID == copied })
			c.closeAll()
		}, true},
		"it is drained just then": {func(p *Pool, c *farmConn, copied uint64) {
			c.closeAll()
			synctest.Wait()
			p.Drain(func(u ConnInfo) bool { return u.ID == copied })
		}, true},
		"the connection has ended": {func(_ *Pool, c *farmConn, _ uint64) { c.end(errors.New("reset")) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &farm{}
				p := newPool(t, f, CloseAtOnce{})
				l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
				copied := open(t, l, bulk)
				c.end(p, f.conn(1), copied.Upstream())
				<-f.conn(1).ended
				synctest.Wait()
				if got := copied.ClosedInOrder(); got != c.inOrder {
					t.Errorf("closed in order: %v", got)
				}
				l.Release()
				other.Release()
			})
		})
	}
}

// A login that comes back when the pool has closed is ended.
func TestALoginThatIsTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{openSSH: true, hold: make(chan struct{})}
		p := New(ignoring{f}, CloseAtOnce{}, gate, zerolog.Nop())
		l, other := acquire(t, p, spec("alice")), acquire(t, p, spec("alice"))
		failed := make(chan error)
		go func() {
			_, _, err := l.Session(context.Background(), permit(t, use.Exec), bulk, nil)
			failed <- err
		}()
		synctest.Wait()
		closed := make(chan struct{})
		go func() { p.Close(); close(closed) }()
		synctest.Wait()
		close(f.hold)
		<-closed
		<-failed
		if !f.conn(1).Down() {
			t.Error("its connection stays")
		}
		l.Release()
		other.Release()
	})
}

// ignoring is a driver that does not stop when it is told to.
type ignoring struct{ f *farm }

func (d ignoring) Dial(ctx context.Context, s Spec, a Asker) (Conn, error) {
	return d.f.Dial(context.WithoutCancel(ctx), s, a)
}

// stuckLog is a log that takes nothing until it is let go, as the stopped terminal of a master in the foreground.
type stuckLog struct{ stuck, goOn chan struct{} }

func (l stuckLog) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("no sign of life")) {
		close(l.stuck)
		<-l.goOn
	}
	return len(p), nil
}

// A log that nobody reads stops neither the pool nor those who wait for the probe.
func TestAStuckLogDoesNotStopThePool(t *testing.T) {
	f := &farm{}
	log := stuckLog{make(chan struct{}), make(chan struct{})}
	p := New(f, CloseAtOnce{}, gate, zerolog.New(log))
	t.Cleanup(p.Close)
	var once sync.Once
	goOn := func() { once.Do(func() { close(log.goOn) }) }
	t.Cleanup(goOn) // before Close, which waits for it
	l := acquire(t, p, spec("alice"))
	f.conn(0).last.Store(time.Now().Add(-2 * trustTime).UnixNano())
	rode := make(chan *Lease, 1)
	go func() { rode <- acquire(t, p, spec("alice")) }()
	select {
	case <-log.stuck:
	case <-time.After(patience):
		t.Fatal("no probe failed")
	}
	select {
	case late := <-rode:
		late.Release()
	case <-time.After(patience):
		t.Fatal("who waits for the probe waits for the log")
	}
	goOn()
	l.Release()
}
