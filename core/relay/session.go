package relay

import (
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

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
		relay: r, client: client, reqs: r.queue(reqs), earlier: earlier, since: time.Now(), turn: newTurn(), over: make(chan struct{}),
	}
	r.mu.Lock()
	r.sessions[s] = struct{}{}
	r.mu.Unlock()
	s.serve()
	if k := s.link.Load(); !r.lease.Down() || k != nil && k.complete() {
		client.Close()
	} // else the client is about to be cut, and must not take that for a session's end
	close(s.over)
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
	over    chan struct{} // closed when the client has got all that it will get

	held       []*ssh.Request
	server     ssh.Channel // nil until taken
	serverReqs <-chan *ssh.Request
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
			if s.held = append(s.held, q); len(s.held) > maxQueued {
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
		if s.server == nil && !s.take(r.attach, q) {
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
	if s.server == nil && !s.take(permit, q) {
		permit.End(use.Result{Status: "refused"})
		return
	}
	ok, err := r.ask(s.server, q.Type, q.WantReply, q.Payload)
	_ = q.Reply(ok && err == nil, nil)
	k := r.newLink(u, s.turn, s.client, s.reqs, s.server, s.serverReqs)
	s.link.Store(k)
	k.run()
	permit.End(k.result())
}

// take takes an upstream channel under permit and replays what has been held. On failure the session is over.
func (s *session) take(permit *use.Permit, q *ssh.Request) bool {
	r := s.relay
	server, reqs, err := r.lease.Session(r.ctx, permit)
	if err != nil {
		if r.lease.Down() || r.ctx.Err() != nil {
			return false // watchUpstream cuts the client, or it is gone
		}
		_, text := refusal(err)
		s.fail(q, r.client.Target().Addr()+": the server refused another session: "+text+
			" (MaxSessions in its sshd_config?); close one, or set MUXPROXY_BYPASS=1")
		return false
	}
	s.server, s.serverReqs = server, reqs
	for _, h := range s.held {
		s.setUp(h)
	}
	s.held = nil
	return true
}

// setUp passes on one request before the start, with its reply.
func (s *session) setUp(q *ssh.Request) {
	switch {
	case isAgentRequest(q.Type):
		// sshd honours the first of a connection and gives the socket to every later session, asked or not.
		s.say("agent forwarding (-A) is not shared yet; set MUXPROXY_BYPASS=1 to use it")
		_ = q.Reply(false, nil)
	case q.Type == "x11-req":
		s.say("X11 forwarding (-X) is not shared yet; set MUXPROXY_BYPASS=1 to use it")
		_ = q.Reply(false, nil)
	default:
		s.relay.forward(s.server, q)
	}
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

// lastWord tells the person why the session is cut, behind all that the server sent, unless that takes too long. A session
// that was over before gets its end instead.
func (s *session) lastWord(line string) {
	done := make(chan struct{})
	// A client that does not read keeps this until it is cut, which comes next.
	s.relay.lease.Go(func() {
		defer close(done)
		if k := s.link.Load(); k != nil && s.relay.lease.Down() {
			<-k.stderrDone
			if k.complete() {
				<-s.over
				return
			}
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
