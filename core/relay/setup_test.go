package relay_test

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// x11Msg is the data of x11-req (RFC 4254 section 6.3.1).
type x11Msg struct {
	Single   bool
	Protocol string
	Cookie   string
	Screen   uint32
}

// start sends a session's set-up and start as ssh does, without waiting for anything, and returns both ends. What the
// server got before the start, with a "?" where it is to reply, is answered by grant.
func (w *world) start(c *client, grant bool, setUp ...ssh.Request) (near, far opened, got []string, replies []<-chan answer) {
	t := w.t
	t.Helper()
	near = take(t, "session", c.open("session", nil))
	if near.err != nil {
		t.Fatal(near.err)
	}
	for _, q := range setUp {
		if !q.WantReply {
			if _, err := near.ch.SendRequest(q.Type, false, q.Payload); err != nil {
				t.Fatal(err)
			}
		} else {
			replies = append(replies, async(func() answer {
				ok, err := near.ch.SendRequest(q.Type, true, q.Payload)
				return answer{ok, err}
			}))
		}
	}
	if len(replies) > 0 { // x/crypto sends it by another goroutine; it has to be there before the start
		nothing(t, "a channel before the start", w.channels)
	}
	if _, err := near.ch.SendRequest("shell", false, nil); err != nil {
		t.Fatal(err)
	}
	far = w.accept("session")
	for {
		q := take(t, "request", far.reqs)
		name := q.Type
		if q.WantReply {
			name += "?"
		}
		q.Reply(grant, nil)
		if q.Type == "shell" {
			return near, far, got, replies
		}
		got = append(got, name)
	}
}

// The first pty-req and x11-req of a connection wait for the server's reply. Once it has granted one, later ones are
// answered at once, and what a server refuses is asked for again each time.
func TestWhatIsGrantedOnceIsNotWaitedFor(t *testing.T) {
	for name, q := range map[string]ssh.Request{
		"pty-req": {Type: "pty-req", WantReply: true},
		"x11-req": {Type: "x11-req", WantReply: true, Payload: ssh.Marshal(x11Msg{Protocol: "MIT-MAGIC-COOKIE-1", Cookie: "00ff"})},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			for i, c := range []struct {
				grant, ok bool
				got       string
			}{{false, false, name + "?"}, {true, true, name + "?"}, {false, true, name}, {true, true, name}} {
				client := w.connect(true)
				_, _, got, replies := w.start(client, c.grant, q)
				if strings.Join(got, " ") != c.got {
					t.Errorf("session %d: the server got %q, not %q", i, got, c.got)
				}
				if a := take(t, "reply", replies[0]); a.ok != c.ok || a.err != nil {
					t.Errorf("session %d: the client got %+v", i, a)
				}
				defer client.Close() // the connection has to stay
			}
		})
	}
}

// A granted request is not even waited for on the wire: the start follows at once.
func TestTheStartFollowsWhatIsGranted(t *testing.T) {
	w := newWorld(t)
	pty := ssh.Request{Type: "pty-req", WantReply: true}
	w.start(w.connect(true), true, pty)
	c := w.connect(true)
	near := take(t, "session", c.open("session", nil))
	reply := request(near.ch, "pty-req", nil)
	nothing(t, "a channel before the start", w.channels)
	if _, err := near.ch.SendRequest("shell", false, nil); err != nil {
		t.Fatal(err)
	}
	far := w.accept("session")
	// The server answers nothing at all.
	for _, want := range []string{"pty-req", "shell"} {
		if q := take(t, want, far.reqs); q.Type != want {
			t.Errorf("the server got %s, not %s", q.Type, want)
		}
	}
	if a := take(t, "reply", reply); !a.ok {
		t.Error("the client got a refusal")
	}
}

// agentReq is how ssh asks for agent forwarding.
var agentReq = ssh.Request{Type: "auth-agent-req@openssh.com"}

// openAtServer has the server open a channel.
func (w *world) openAtServer(kind string) <-chan opened {
	return async(func() opened {
		ch, reqs, err := w.server.OpenChannel(kind, nil)
		return opened{ch, reqs, err}
	})
}

// The server honours one request for the agent per connection, so it gets one. Its connections to the agent go to the
// client that came last, and to nobody when none forwards it.
func TestAgentForwarding(t *testing.T) {
	w := newWorld(t)
	w.lane = pool.Lane{Agent: "agent"}
	none := w.connect(true)
	w.start(none, true)
	if o := take(t, "agent channel", w.openAtServer("auth-agent@openssh.com")); o.err == nil {
		t.Error("a connection to the agent although nobody forwards it")
	}

	first, second := w.connect(true), w.connect(true)
	_, _, got, _ := w.start(first, true, agentReq)
	if !slices.Equal(got, []string{agentReq.Type + "?"}) {
		t.Errorf("the server got %q", got)
	}
	wanting := agentReq
	wanting.WantReply = true // as other clients do
	nearSecond, _, got, replies := w.start(second, false, wanting)
	if len(got) != 0 {
		t.Errorf("the server was asked again: %q", got)
	}
	if a := take(t, "reply", replies[0]); !a.ok {
		t.Error("the second client got a refusal")
	}

	exchange := func(c *client, text string) {
		t.Helper()
		far := w.openAtServer("auth-agent@openssh.com")
		nc := take(t, "agent channel at the client", c.channels)
		if nc.ChannelType() != "auth-agent@openssh.com" {
			t.Errorf("a %s channel", nc.ChannelType())
		}
		near, reqs, err := nc.Accept()
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(reqs)
		o := take(t, "agent channel", far)
		if o.err != nil {
			t.Fatal(o.err)
		}
		go ssh.DiscardRequests(o.reqs)
		io.WriteString(o.ch, text+" asks")
		o.ch.CloseWrite()
		if got := take(t, "question", readAll(near)); got != text+" asks" {
			t.Errorf("the agent got %q", got)
		}
		io.WriteString(near, text+" answers")
		near.Close()
		if got := take(t, "answer", readAll(o.ch)); got != text+" answers" {
			t.Errorf("the server got %q", got)
		}
		o.ch.Close()
	}
	exchange(second, "second")
	// A client's refusal is the server's answer.
	far := w.openAtServer("auth-agent@openssh.com")
	take(t, "agent channel at the client", second.channels).Reject(ssh.Prohibited, "no")
	if o := take(t, "agent channel", far); o.err == nil || !strings.Contains(o.err.Error(), "no") {
		t.Errorf("the server got %v", o.err)
	}
	nearSecond.ch.Close()
	second.Close()
	within(t, "the second client's end", second.ran)
	exchange(first, "first")
	first.Close()
	within(t, "the first client's end", first.ran)
	if o := take(t, "agent channel", w.openAtServer("auth-agent@openssh.com")); o.err == nil {
		t.Error("a connection to the agent of a client that has left")
	}
	select {
	case nc := <-none.channels:
		t.Errorf("a client that forwards nothing got a %s channel", nc.ChannelType())
	default:
	}
}

// If the server refuses to forward the agent, the session still starts.
func TestAgentForwardingThatTheServerRefuses(t *testing.T) {
	w := newWorld(t)
	w.lane = pool.Lane{Agent: "agent"}
	wanting := agentReq
	wanting.WantReply = true
	for range 2 {
		c := w.connect(true)
		defer c.Close()
		_, _, _, replies := w.start(c, false, wanting)
		if a := take(t, "reply", replies[0]); a.ok {
			t.Error("the client was told that it is forwarded")
		}
	}
}

// display is what an X client says first (X Window System Protocol, section 8).
func display(cookie string) string {
	data, err := hex.DecodeString(cookie)
	if err != nil {
		panic(err)
	}
	name := "MIT-MAGIC-COOKIE-1"
	b := []byte{'l', 0}
	for _, n := range []int{11, 0, len(name), len(data), 0} {
		b = binary.LittleEndian.AppendUint16(b, uint16(n))
	}
	return string(b) + name + "\x00\x00" + string(data)
}

// Two clients forward X11 over one connection; the cookie tells whose a connection is.
func TestX11Forwarding(t *testing.T) {
	w := newWorld(t)
	cookies := []string{strings.Repeat("0a", 16), strings.Repeat("0B", 16)}
	var clients []*client
	for _, cookie := range cookies {
		c := w.connect(true)
		clients = append(clients, c)
		w.start(c, true, ssh.Request{Type: "x11-req", WantReply: true,
			Payload: ssh.Marshal(x11Msg{Protocol: "MIT-MAGIC-COOKIE-1", Cookie: cookie})})
	}
	for _, i := range []int{1, 0} {
		o := take(t, "x11 channel", w.openAtServer("x11"))
		if o.err != nil {
			t.Fatal(o.err)
		}
		go ssh.DiscardRequests(o.reqs)
		said := display(cookies[i]) + "more"
		// In pieces, as a network may have it.
		for _, piece := range []string{said[:1], said[1:20], said[20:]} {
			io.WriteString(o.ch, piece)
		}
		o.ch.CloseWrite()
		nc := take(t, "x11 channel at the client", clients[i].channels)
		near, reqs, err := nc.Accept()
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(reqs)
		if got := take(t, "what it says", readAll(near)); got != said {
			t.Errorf("client %d got %q, not %q", i, got, said)
		}
		answer := fmt.Sprint("answer ", i)
		io.WriteString(near, answer)
		near.Close()
		if got := take(t, "answer", readAll(o.ch)); got != answer {
			t.Errorf("the server got %q", got)
		}
		o.ch.Close()
	}
	// A cookie that no client has sent, or none.
	for what, said := range map[string]string{"nobody's": display(strings.Repeat("0c", 16)), "none": display("")[:12]} {
		o := take(t, "x11 channel", w.openAtServer("x11"))
		if o.err != nil {
			t.Fatal(o.err)
		}
		io.WriteString(o.ch, said)
		o.ch.CloseWrite()
		if got := take(t, "the end of what "+what, readAll(o.ch)); got != "" {
			t.Errorf("%s: got %q", what, got)
		}
		for range o.reqs {
		}
	}
	// The client refuses: the server's side is closed, for it was accepted before.
	o := take(t, "x11 channel", w.openAtServer("x11"))
	io.WriteString(o.ch, display(cookies[0]))
	take(t, "x11 channel at the client", clients[0].channels).Reject(ssh.Prohibited, "no")
	within(t, "it is closed", drained(o.reqs))
	// And a client that has left.
	clients[0].Close()
	within(t, "the client's end", clients[0].ran)
	if o = take(t, "x11 channel", w.openAtServer("x11")); o.err == nil {
		io.WriteString(o.ch, display(cookies[0]))
		within(t, "it is closed", drained(o.reqs))
	}
	for i, c := range clients[1:] {
		select {
		case nc := <-c.channels:
			t.Errorf("client %d got another's %s channel", i+1, nc.ChannelType())
		default:
		}
	}
}

func drained(reqs <-chan *ssh.Request) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		ssh.DiscardRequests(reqs)
		close(done)
	}()
	return done
}

// What the gate denies does not reach the server, and the session starts without it.
func TestDeniedForwardsDontReachTheServer(t *testing.T) {
	for kind, q := range map[use.Kind]ssh.Request{
		use.X11:   {Type: "x11-req", WantReply: true, Payload: ssh.Marshal(x11Msg{Protocol: "p", Cookie: "00"})},
		use.Agent: {Type: "auth-agent-req@openssh.com", WantReply: true},
	} {
		t.Run(string(kind), func(t *testing.T) {
			w := newWorld(t, deny(kind))
			near, _, got, replies := w.start(w.connect(true), true, q)
			if len(got) != 0 {
				t.Errorf("the server got %q", got)
			}
			if a := take(t, "reply", replies[0]); a.ok {
				t.Error("granted")
			}
			line := make([]byte, 512)
			n, err := near.ch.Stderr().Read(line)
			if err != nil || !strings.Contains(string(line[:n]), "no forwards") {
				t.Errorf("the person reads %q, %v", line[:n], err)
			}
		})
	}
}

// deny is a check that denies one kind.
func deny(kind use.Kind) use.Check {
	return func(_ context.Context, u use.Use, _ func(string)) *use.Denied {
		if u.Kind == kind {
			return &use.Denied{By: "test", Reason: "no forwards"}
		}
		return nil
	}
}
