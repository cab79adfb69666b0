package pool

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

// farm is a Dialer to servers that count sessions as sshd does.
type farm struct {
	openSSH bool
	max     int           // sessions that one connection allows (MaxSessions); -1: none
	person  bool          // each login needs an answer
	inVain  bool          // and is made with something else
	takes   time.Duration // for a silent login

	mu     sync.Mutex // guards what follows
	refuse error      // what silent logins fail with; nil: they don't
	specs  []Spec     // of all dials
	flying int
	most   int // dials at a time
	asked  int // questions
	conns  []*farmConn

	hold chan struct{} // silent logins wait until it is closed; nil: they don't
}

var errNeedsPerson = errors.New("h.example.com:22: permission denied")

func (f *farm) Dial(ctx context.Context, spec Spec, ask Asker) (Conn, error) {
	f.mu.Lock()
	f.specs = append(f.specs, spec)
	f.flying++
	f.most = max(f.most, f.flying)
	refuse := f.refuse
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.flying--
		f.mu.Unlock()
	}()
	if spec.Connected != nil {
		spec.Connected()
	}
	if spec.Silent && f.hold != nil {
		select {
		case <-f.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if spec.Silent {
		time.Sleep(f.takes) // in a bubble: its time is the test's
	}
	if spec.Silent && refuse != nil {
		return nil, refuse
	}
	if f.person {
		f.mu.Lock()
		f.asked++
		f.mu.Unlock()
		if _, err := ask.Ask(ctx, Question{Prompts: []Prompt{{Text: "Password: "}}}); err != nil {
			return nil, errNeedsPerson
		}
	}
	c := &farmConn{fakeConn: newFakeConn(""), farm: f, max: f.max, channels: map[*farmChannel]bool{}}
	f.mu.Lock()
	f.conns = append(f.conns, c)
	f.mu.Unlock()
	return c, nil
}

func (f *farm) dials() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.specs)
}

func (f *farm) spec(i int) Spec {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.specs[i]
}

func (f *farm) conn(i int) *farmConn {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.conns[i]
}

func (f *farm) setRefuse(err error) {
	f.mu.Lock()
	f.refuse = err
	f.mu.Unlock()
}

// farmConn is one connection to such a server.
type farmConn struct {
	*fakeConn
	farm   *farm
	marks  atomic.Int64 // the last class, plus one
	probes atomic.Int64 // how often it was asked for a sign of life
	ask    atomic.Bool  // the last probe had something to ask by
	last   atomic.Int64 // LastHeard, if set

	over atomic.Int64 // Over, if set

	mu       sync.Mutex // guards what follows
	max      int
	zombies  int // sessions that count for the server though their channel is closed
	channels map[*farmChannel]bool
	opened   int // session channels, refused ones too
}

func (c *farmConn) Server() ServerInfo {
	return ServerInfo{OpenSSH: c.farm.openSSH, Silent: !c.farm.person, Answered: c.farm.person && !c.farm.inVain}
}

func (c *farmConn) Mark(class Class) { c.marks.Store(int64(class) + 1) }

func (c *farmConn) LastHeard() time.Time {
	if ns := c.last.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Now()
}

func (c *farmConn) Over() time.Time {
	if ns := c.over.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

func (c *farmConn) Probe(ctx context.Context, ask func()) error {
	c.probes.Add(1)
	c.ask.Store(ask != nil)
	if ask != nil {
		ask()
	}
	if c.last.Load() == 0 {
		return nil
	}
	<-ctx.Done()
	return errors.New("h.example.com:22: no sign of life from the server")
}

func (c *farmConn) Close() error { c.end(nil); return nil }

func (c *farmConn) end(cause error) {
	c.over.CompareAndSwap(0, time.Now().UnixNano())
	c.fakeConn.end(cause)
	c.mu.Lock()
	defer c.mu.Unlock()
	for ch := range c.channels {
		ch.endLocked()
	}
}

func (c *farmConn) OpenChannel(kind string, _ []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Down() {
		return nil, nil, io.EOF
	}
	if kind == "session" {
		c.opened++
		if c.max != 0 && len(c.channels)+c.zombies >= max(c.max, 0) {
			return nil, nil, &ssh.OpenChannelError{Reason: ssh.ConnectionFailed, Message: "open failed"}
		}
	}
	ch := &farmChannel{conn: c, reqs: make(chan *ssh.Request)}
	c.channels[ch] = true
	return ch, ch.reqs, nil
}

func (c *farmConn) SendRequest(string, bool, []byte) (bool, []byte, error) { return true, nil, nil }

// opens is how many session channels were asked for, and how many are open.
func (c *farmConn) opens() (asked, open int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.opened, len(c.channels)
}

func (c *farmConn) setZombies(n int) {
	c.mu.Lock()
	c.zombies = n
	c.mu.Unlock()
}

// closeAll is what ChannelTimeout does.
func (c *farmConn) closeAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for ch := range c.channels {
		ch.endLocked()
	}
}

// farmChannel is a channel that can be asked and closed.
type farmChannel struct {
	ssh.Channel
	conn *farmConn
	reqs chan *ssh.Request

	asked  []string // guarded by conn.mu
	closed bool     // guarded by conn.mu
}

func (ch *farmChannel) endLocked() {
	if !ch.closed {
		ch.closed = true
		delete(ch.conn.channels, ch)
		close(ch.reqs)
	}
}

func (ch *farmChannel) Close() error {
	ch.conn.mu.Lock()
	defer ch.conn.mu.Unlock()
	ch.endLocked()
	return nil
}

func (ch *farmChannel) SendRequest(name string, wantReply bool, _ []byte) (bool, error) {
	ch.conn.mu.Lock()
	defer ch.conn.mu.Unlock()
	if ch.closed {
		return false, io.EOF
	}
	ch.asked = append(ch.asked, name)
	return wantReply, nil
}

func (ch *farmChannel) requests() []string {
	ch.conn.mu.Lock()
	defer ch.conn.mu.Unlock()
	return slices.Clone(ch.asked)
}

// yes is a person who answers.
var yes = person{answer: "secret"}

func acquireAs(t *testing.T, p *Pool, s Spec, a Asker) *Lease {
	t.Helper()
	l, err := p.Acquire(t.Context(), permit(t, use.Attach), s, a)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// open opens a session that must come.
func open(t *testing.T, l *Lease, lane Lane) *Channel {
	t.Helper()
	ch, reqs, err := l.Session(t.Context(), permit(t, use.Exec), lane, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.Discard(reqs)
	return ch
}

var bulk = Lane{Class: Bulk}

// forwarding is a spec whose client forwards this agent.
func forwarding(agent string) Spec {
	s := spec("alice")
	s.Lane.Agent = agent
	return s
}

// infos is List by number.
func infos(p *Pool) map[uint64]ConnInfo {
	m := map[uint64]ConnInfo{}
	for _, c := range p.List() {
		m[c.ID] = c
	}
	return m
}
