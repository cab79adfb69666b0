package relay

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// startKind tells whether a channel request starts a session's program, and its kind (RFC 4254 section 6.5).
func startKind(request string) (use.Kind, bool) {
	switch request {
	case "shell":
		return use.Shell, true
	case "exec":
		return use.Exec, true
	case "subsystem":
		return use.Subsystem, true
	}
	return "", false
}

// isAgentRequest tells whether a channel request asks for agent forwarding, by its old or its newer name.
func isAgentRequest(request string) bool {
	return strings.HasPrefix(request, "auth-agent-req") || request == "agent-req"
}

// session serves a session channel. It is accepted at once. OpenSSH sends the whole set-up without waiting for
// anything, so it is held until the start shows what the session is for; then the gate is asked, an upstream channel
// taken, and the set-up replayed in order. Other clients wait for the reply to each request: they get the channel at
// the first that wants one.
func (r *Relay) session(nc ssh.NewChannel, earlier <-chan struct{}) {
	client, reqs, err := nc.Accept()
	r.opening.Add(-1)
	if err != nil {
		return
	}
	if r.tooManySessions() {
		r.cut("too many sessions")
	}
	s := &session{
		relay: r, client: client, reqs: r.queue(reqs), earlier: earlier, since: time.Now(), turn: newTurn(),
	}
	r.mu.Lock()
	r.sessions[s] = struct{}{}
	untold := r.untold
	r.untold = nil
	r.mu.Unlock()
	for _, line := range untold {
		s.say(line)
	}
	s.serve()
	s.endPermits()
	if s.server == nil || !s.server.Down() || s.link.Load() != nil && s.server.ClosedInOrder() {
		client.Close()
	} // else the client is about to be cut, and must not take that for a session's end
	for q := range s.reqs {
		_ = q.Reply(false, nil)
	}
	r.mu.Lock()
	delete(r.sessions, s)
	r.mu.Unlock()
}

// session is one session channel of a client.
type session struct {
	relay   *Relay
	client  ssh.Channel
	reqs    <-chan *ssh.Request
	earlier <-chan struct{}
	since   time.Time
	turn    turn

	held       []*ssh.Request
	heldBytes  int           // of payload in held, since the session was opened
	server     *pool.Channel // nil until taken
	serverReqs <-chan *ssh.Request
	agent      *use.Permit   // of the kind agent: the session has a lane for it
	permits    []*use.Permit // end with the session
	pty        atomic.Bool

	link atomic.Pointer[link] // nil until started
}

func (s *session) serve() {
	r := s.relay
	for q := range s.reqs {
		kind, start := startKind(q.Type)
		if q.Type == "pty-req" {
			s.pty.Store(true)
		}
		if !start && s.server == nil && (r.client.OpenSSH() || !q.WantReply) {
			s.held = append(s.held, q)
			if s.heldBytes += len(q.Payload); len(s.held) > maxQueued || s.heldBytes > maxQueuedBytes {
				r.cut("too much set-up for one session")
				return
			}
			continue
		}
		if !r.wait(s.earlier) {
			break
		}
		if start {
			s.start(kind, q)
			return
		}
		if s.server == nil && !s.take(r.attach, pool.Interactive, q) {
			return
		}
		s.setUp(q)
	}
	if s.server != nil {
		r.abandon(s.server, s.serverReqs)
	}
}

// start asks the gate, starts the program and relays until it has ended.
func (s *session) start(kind use.Kind, q *ssh.Request) {
	r := s.relay
	u := r.use(kind)
	if kind != use.Shell {
		var m struct{ What string }
		if err := ssh.Unmarshal(q.Payload, &m); err != nil {
			s.fail(q, "malformed "+q.Type+" request")
			return
		}
		if kind == use.Exec {
			u.Command = m.What
		} else {
			u.Subsystem = m.What
		}
	}
	permit, denied := r.gate.Decide(r.ctx, u, func(line string) { s.say(line) })
	if denied != nil {
		s.fail(q, denied.Error())
		return
	}
	if s.server == nil && !s.take(permit, r.lease.Classify(u, s.pty.Load()), q) {
		permit.End(use.Result{Status: "refused"})
		return
	}
	ok, err := r.ask(s.server, q.Type, q.WantReply, q.Payload)
	_ = q.Reply(ok && err == nil, nil)
	r.hadSession.Store(true)
	k := r.newLink(u, s.turn, s.client, s.reqs, s.server, s.serverReqs)
	k.terminal = s.pty.Load()
	s.link.Store(k)
	k.run()
	permit.End(k.result())
}

// take takes an upstream channel under permit and replays what has been held. On failure the session is over.
func (s *session) take(permit *use.Permit, class pool.Class, q *ssh.Request) bool {
	r := s.relay
	lane := pool.Lane{Class: class}
	if isAgentRequest(q.Type) || slices.ContainsFunc(s.held, func(h *ssh.Request) bool { return isAgentRequest(h.Type) }) {
		lane.Agent = s.agentLane()
	}
	waiting := func() { s.say("waiting for a free session of the connection to " + r.client.Target().Addr()) }
	server, reqs, err := r.lease.Session(r.ctx, permit, lane, waiting)
	if err != nil && lane.Agent != "" && r.ctx.Err() == nil {
		s.say("the agent is not forwarded: " + err.Error())
		s.agent = nil
		server, reqs, err = r.lease.Session(r.ctx, permit, pool.Lane{Class: class}, waiting)
	}
	if err != nil {
		if r.ctx.Err() == nil {
			line := err.Error()
			if refused := (*ssh.OpenChannelError)(nil); errors.As(err, &refused) {
				line = r.client.Target().Addr() + ": the server refused a session: " + refused.Message
			}
			s.fail(q, line)
		}
		return false
	}
	s.server, s.serverReqs = server, reqs
	for _, h := range s.held {
		s.setUp(h)
	}
	s.held = nil
	return true
}

// agentLane asks the gate for agent forwarding and returns the identity of the agent, "" without leave.
func (s *session) agentLane() string {
	permit, denied := s.relay.gate.Decide(s.relay.ctx, s.relay.use(use.Agent), s.say)
	if denied != nil {
		s.say(denied.Error())
		return ""
	}
	s.agent = permit
	s.permits = append(s.permits, permit)
	if id := s.relay.client.Agent(); id != "" {
		return id
	}
	return fmt.Sprintf("client %d", s.relay.client.ID()) // its own affair
}

func (s *session) endPermits() {
	for _, p := range s.permits {
		p.End(use.Result{Status: "closed"})
	}
}

// setUp passes on one request before the start, with its reply. What the server has granted once on this connection it
// is taken to grant again, so that the set-up costs no round trip.
func (s *session) setUp(q *ssh.Request) {
	switch {
	case isAgentRequest(q.Type):
		ok := s.agent != nil && s.server.Agent(s.relay.ctx, s.agent, q.Type, func(nc *pool.NewChannel) bool {
			return s.relay.forwarded(s.agent, nc)
		})
		_ = q.Reply(ok, nil)
	case q.Type == "x11-req":
		s.x11(q)
	case q.Type == "pty-req":
		s.ask(q)
	default:
		s.relay.forward(s.server, q)
	}
}

// ask passes on a request that the server is likely to grant.
func (s *session) ask(q *ssh.Request) {
	if s.server.Granted(q.Type) {
		_, err := s.server.SendRequest(q.Type, false, q.Payload)
		_ = q.Reply(err == nil, nil)
		return
	}
	if s.relay.forward(s.server, q) && q.WantReply {
		s.server.Grant(q.Type)
	}
}

// x11 passes on the request for X11 forwarding (RFC 4254 section 6.3.1), whose cookie tells the connections apart.
func (s *session) x11(q *ssh.Request) {
	var m struct {
		Single   bool
		Protocol string
		Cookie   string
		Screen   uint32
	}
	if err := ssh.Unmarshal(q.Payload, &m); err != nil {
		_ = q.Reply(false, nil)
		return
	}
	permit, denied := s.relay.gate.Decide(s.relay.ctx, s.relay.use(use.X11), s.say)
	if denied != nil {
		s.say(denied.Error())
		_ = q.Reply(false, nil)
		return
	}
	s.permits = append(s.permits, permit)
	s.server.X11(m.Cookie, func(nc *pool.NewChannel) {
		if !s.relay.forwarded(permit, nc) {
			_ = nc.Reject(ssh.ConnectionFailed, "the client is gone")
		}
	})
	s.ask(q)
}

// fail ends a session that never started: one line on its stderr, and no exit status, which ssh turns into 255. The
// start is answered as done, or ssh would add a line of its own.
func (s *session) fail(q *ssh.Request, line string) {
	s.say(line)
	for _, h := range s.held {
		_ = h.Reply(true, nil) // replies carry no ids: each wants its own, in order
	}
	s.held = nil
	_ = q.Reply(true, nil)
	s.turn.closeWrite(s.client)
	if s.server != nil {
		s.relay.abandon(s.server, s.serverReqs)
		s.server = nil
	}
}

// say shows a line on the session's stderr.
func (s *session) say(line string) {
	end := "\n"
	if s.pty.Load() {
		end = "\r\n" // ssh has put the terminal into raw mode
	}
	_, _ = turnWriter{s.turn, s.client}.Write([]byte("muxproxy: " + use.Printable(line) + end))
}

// lastWord tells the person why the session is cut, behind all that the server sent, unless that takes too long.
func (s *session) lastWord(line string) {
	done := make(chan struct{})
	// A client that does not read keeps this until it is cut, which comes next.
	s.relay.lease.Go(func() {
		defer close(done)
		if k := s.link.Load(); k != nil && k.server.Down() {
			<-k.stderrDone
		}
		s.say(line)
	})
	t := time.NewTimer(lastWordTime)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	case <-s.relay.ctx.Done():
	}
}
