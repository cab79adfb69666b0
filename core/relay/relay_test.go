package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

type envMsg struct{ Name, Value string }

type forwardMsg struct {
	Host string
	Port uint32
}

type tcpipMsg struct {
	Host       string
	Port       uint32
	Origin     string
	OriginPort uint32
}

// OpenSSH sends a session's whole set-up without waiting; it is held until the start, and then passed on in order.
func TestOpenSSHSetUpIsHeldUntilTheStart(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	near := take(t, "session", c.open("session", nil))
	if _, err := near.ch.SendRequest("env", false, ssh.Marshal(envMsg{"LANG", "C"})); err != nil {
		t.Fatal(err)
	}
	pty := request(near.ch, "pty-req", nil)
	nothing(t, "a channel before the start", w.channels)
	// x/crypto waits for each reply; ssh does not, so the start is sent as one without.
	if _, err := near.ch.SendRequest("shell", false, nil); err != nil {
		t.Fatal(err)
	}
	far := w.accept("session")
	var got []string
	for len(got) < 3 {
		q := take(t, "request", far.reqs)
		got = append(got, q.Type)
		q.Reply(q.Type != "pty-req", nil)
	}
	if want := "env pty-req shell"; strings.Join(got, " ") != want {
		t.Errorf("the server got %q, want %q", got, want)
	}
	if a := take(t, "reply to pty-req", pty); a.ok {
		t.Error("the server's refusal of pty-req was not relayed")
	}
}

// Other clients wait for each reply, so they get the upstream's channel at the first request that wants one.
func TestOtherClientsGetRepliesBeforeTheStart(t *testing.T) {
	w := newWorld(t)
	c := w.connect(false)
	near := take(t, "session", c.open("session", nil))
	pty := request(near.ch, "pty-req", nil)
	far := w.accept("session")
	take(t, "pty-req", far.reqs).Reply(true, nil)
	if a := take(t, "reply", pty); !a.ok {
		t.Errorf("pty-req: %+v", a)
	}
	started := request(near.ch, "exec", execMsg{"true"})
	take(t, "exec", far.reqs).Reply(false, nil)
	if a := take(t, "reply", started); a.ok {
		t.Error("the server's refusal of exec was not relayed")
	}
	again := request(near.ch, "exec", execMsg{"true"})
	if a := take(t, "reply to a second start", again); a.ok {
		t.Error("a second start request was accepted")
	}
	nothing(t, "a second start at the server", far.reqs)
}

// noMore lets a client say no-more-sessions, and returns when it has been heard.
func (w *world) noMore(c *client) {
	w.t.Helper()
	if _, _, err := c.SendRequest("no-more-sessions@openssh.com", false, nil); err != nil {
		w.t.Fatal(err)
	}
	if _, _, err := c.SendRequest("keepalive@openssh.com", true, nil); err != nil { // in order behind it
		w.t.Fatal(err)
	}
}

func TestDataStderrAndHalfClose(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	near, far := w.session(c, "cat")
	go ssh.DiscardRequests(near.reqs)
	big := strings.Repeat("0123456789abcdef", 1<<16)
	stdin, stdout, stderr := readAll(far.ch), readAll(near.ch), readAll(near.ch.Stderr())
	go func() {
		io.WriteString(near.ch, big)
		near.ch.CloseWrite()
	}()
	if got := take(t, "stdin until EOF", stdin); got != big {
		t.Fatalf("stdin: %d bytes", len(got))
	}
	// The other direction still works after the client's EOF.
	go func() {
		io.WriteString(far.ch.Stderr(), "e"+big)
		io.WriteString(far.ch, "o"+big)
		far.ch.SendRequest("exit-status", false, ssh.Marshal(statusMsg{0}))
		far.ch.Close()
	}()
	if got := take(t, "stdout", stdout); got != "o"+big {
		t.Errorf("stdout: %d bytes", len(got))
	}
	if got := take(t, "stderr", stderr); got != "e"+big {
		t.Errorf("stderr: %d bytes", len(got))
	}
}

// What a command without a terminal moves, either way, says where its likes go from then on: while it runs, and at its end.
func TestAProgramThatMovesMuchIsBulk(t *testing.T) {
	for name, c := range map[string]struct {
		terminal, up bool
		bytes        int64
		want         pool.Class
	}{
		"much, down":                   {bytes: pool.BulkBytes, want: pool.Bulk},
		"much, up":                     {up: true, bytes: pool.BulkBytes, want: pool.Bulk},
		"less":                         {bytes: pool.BulkBytes - 1, want: pool.Interactive},
		"much, in front of a terminal": {terminal: true, bytes: pool.BulkBytes, want: pool.Interactive},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c1 := w.connect(true)
			permit, denied := w.gate.Decide(t.Context(), use.Use{Kind: use.Attach, Target: target}, nil)
			if denied != nil {
				t.Fatal(denied)
			}
			next, err := w.pool.Acquire(t.Context(), permit,
				pool.Spec{Target: target, Config: &sshconfig.Resolved{Options: map[string][]string{}}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer next.Release()
			near := take(t, "session", c1.open("session", nil))
			go ssh.DiscardRequests(near.reqs)
			if c.terminal {
				if _, err := near.ch.SendRequest("pty-req", false, nil); err != nil {
					t.Fatal(err)
				}
			}
			started := request(near.ch, "exec", execMsg{"pg_dump x"})
			far := w.accept("session")
			for q := range far.reqs {
				q.Reply(true, nil)
				if q.Type == "exec" {
					break
				}
			}
			go ssh.DiscardRequests(far.reqs)
			if a := take(t, "reply to exec", started); !a.ok {
				t.Fatal(a.err)
			}
			from, to := far.ch, near.ch
			if c.up {
				from, to = to, from
			}
			got := async(func() int64 { n, _ := io.CopyN(io.Discard, to, c.bytes); return n })
			if _, err := from.Write(make([]byte, c.bytes)); err != nil {
				t.Fatal(err)
			}
			if n := take(t, "all of it", got); n != c.bytes {
				t.Fatalf("%d bytes", n)
			}
			u := use.Use{Kind: use.Exec, Target: target, Command: "/usr/bin/pg_dump y"}
			is := func() pool.Class { return next.Classify(u, false) }
			for late := time.Now().Add(patience); c.want == pool.Bulk && is() != pool.Bulk; { // it is noted right after the last write
				if time.Now().After(late) {
					t.Fatal("the next is not bulk while the first still runs")
				}
			}
			far.ch.Close()
			near.ch.Close()
			c1.Conn.Close()
			within(t, "the relay ends with its client", c1.ran)
			if is() != c.want {
				t.Errorf("the next is of class %d, want %d", is(), c.want)
			}
		})
	}
}

// sshd may send the exit status before the last data, and that must not cut them off.
func TestStatusBeforeDataAndCloseLast(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	near, far := w.session(c, "sleep 1 & exit 3")
	w.noMore(c)
	far.ch.SendRequest("exit-status", false, ssh.Marshal(statusMsg{3}))
	q := take(t, "exit-status before any EOF", near.reqs)
	var m statusMsg
	if err := ssh.Unmarshal(q.Payload, &m); q.Type != "exit-status" || err != nil || m.Status != 3 {
		t.Fatalf("got %s %+v %v", q.Type, m, err)
	}
	nothing(t, "CLOSE before the server's", near.reqs)
	stdout := readAll(near.ch)
	io.WriteString(far.ch, "late")
	far.ch.Close()
	if got := take(t, "stdout", stdout); got != "late" {
		t.Errorf("stdout %q", got)
	}
	if _, open := <-near.reqs; open {
		t.Error("more requests after the status")
	}
}

// Without an exit status from the server the client must not get one.
func TestNoStatusIsInvented(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	near, far := w.session(c, "x")
	far.ch.Close()
	for q := range near.reqs {
		t.Errorf("got %s", q.Type)
	}
}

// An ssh that is itself a ControlMaster answers EOF with CLOSE. The status comes after EOF here, so EOF waits for it.
func TestEOFWaitsForTheStatusOfAControlMaster(t *testing.T) {
	for _, plain := range []bool{false, true} {
		w := newWorld(t)
		c := w.connect(true)
		near, far := w.session(c, "x")
		if plain { // a plain ssh says so, and gets its EOF at once
			w.noMore(c)
		}
		eof := readAll(near.ch)
		far.ch.CloseWrite()
		if plain {
			take(t, "EOF", eof)
		} else {
			nothing(t, "EOF before the status", eof)
		}
		far.ch.SendRequest("exit-status", false, ssh.Marshal(statusMsg{9}))
		if q := take(t, "status", near.reqs); q.Type != "exit-status" {
			t.Errorf("got %s", q.Type)
		}
		if !plain {
			take(t, "EOF after the status", eof)
		}
		far.ch.Close()
	}
}

// A channel that ends with its upstream gets no EOF: a truncated copy must not look complete.
func TestADeadUpstreamIsNoEOF(t *testing.T) {
	for name, die := range map[string]func(*world){
		"reset":   func(w *world) { w.tcp.Close() },
		"our own": func(w *world) { w.conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c := w.connect(true)
			near, far := w.session(c, "cat big")
			w.noMore(c)
			io.WriteString(far.ch, "part")
			buf := make([]byte, 4)
			io.ReadFull(near.ch, buf)
			ended := make(chan error, 1)
			go func() { ended <- c.Wait() }()
			stderr := readAll(near.ch.Stderr())
			die(w)
			line := take(t, "stderr", stderr)
			if !strings.HasPrefix(line, "muxproxy: db.example.com:22: ") || strings.Count(line, "\n") != 1 {
				t.Errorf("stderr %q, want one line", line)
			}
			take(t, "the client is cut", ended)
			within(t, "relay", c.ran)
		})
	}
}

// A server that serves one session closes it, and then the connection: that is no cut, however much the client has still
// to read. Without a CLOSE it is.
func TestAServerThatLeavesAfterItsSession(t *testing.T) {
	for _, closed := range []bool{true, false} {
		w := newWorld(t)
		c := w.connect(true)
		near, far := w.session(c, "x")
		w.noMore(c)
		all := strings.Repeat("all of it", 100_000)
		io.WriteString(far.ch, all)
		if closed {
			far.ch.SendRequest("exit-status", false, ssh.Marshal(statusMsg{5}))
			far.ch.Close()
		}
		w.tcp.(*net.TCPConn).CloseWrite()
		nothing(t, "the end of the client before it has read", c.ran)
		stdout, stderr := readAll(near.ch), readAll(near.ch.Stderr())
		if got := take(t, "stdout", stdout); closed && got != all {
			t.Errorf("%d bytes of stdout", len(got))
		}
		if line := take(t, "stderr", stderr); (line == "") != closed {
			t.Errorf("closed %v: stderr %q", closed, line)
		}
		status := false
		for q := range near.reqs {
			status = status || q.Type == "exit-status"
		}
		if status != closed {
			t.Errorf("status %v, want %v", status, closed)
		}
		within(t, "relay", c.ran)
	}
}

// ssh sends its -R requests and then opens its session: the command must not run before a refusal has been told.
func TestOpensWaitForEarlierGlobalRequests(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	refused := async(func() answer {
		ok, _, err := c.SendRequest("tcpip-forward", true, ssh.Marshal(forwardMsg{"localhost", 8080}))
		return answer{ok, err}
	})
	q := take(t, "forward request", w.requests)
	near := take(t, "session", c.open("session", nil)) // accepted at once
	started := request(near.ch, "exec", execMsg{"true"})
	direct := c.open("direct-tcpip", ssh.Marshal(tcpipMsg{"localhost", 80, "127.0.0.1", 1}))
	nothing(t, "a channel before the reply", w.channels)
	q.Reply(false, nil)
	if a := take(t, "reply to the forward", refused); a.ok {
		t.Error("the refusal was not relayed")
	}
	for range 2 {
		nc := take(t, "channels after the reply", w.channels)
		nc.Reject(ssh.ConnectionFailed, "no")
	}
	take(t, "exec", started)
	take(t, "direct", direct)
}

func TestChannelRequestsGoBothWays(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	near, far := w.session(c, "vi")
	for _, name := range []string{"signal", "window-change", "break", "eow@openssh.com", "xon-xoff", "what@example.com"} {
		payload := []byte("payload of " + name)
		if _, err := near.ch.SendRequest(name, false, payload); err != nil {
			t.Fatal(err)
		}
		if q := take(t, name, far.reqs); q.Type != name || !bytes.Equal(q.Payload, payload) || q.WantReply {
			t.Errorf("server got %+v", q)
		}
		if _, err := far.ch.SendRequest(name, false, payload); err != nil {
			t.Fatal(err)
		}
		if q := take(t, name, near.reqs); q.Type != name || !bytes.Equal(q.Payload, payload) || q.WantReply {
			t.Errorf("client got %+v", q)
		}
	}
	for _, ok := range []bool{true, false} {
		reply := request(near.ch, "break", nil)
		take(t, "break", far.reqs).Reply(ok, nil)
		if a := take(t, "reply", reply); a.ok != ok {
			t.Errorf("reply %+v, want %v", a, ok)
		}
	}
	// keepalives of the server's are answered here, on the channel too: a stopped client must not cost the connection.
	alive := request(far.ch, "keepalive@openssh.com", nil)
	take(t, "answer to a channel keepalive", alive)
	nothing(t, "a keepalive at the client", near.reqs)
	alive2 := async(func() answer {
		ok, _, err := w.server.SendRequest("keepalive@openssh.com", true, nil)
		return answer{ok, err}
	})
	if a := take(t, "answer to a global keepalive", alive2); a.err != nil {
		t.Error(a.err)
	}
}

// x/crypto stops reading a connection at the 17th request or open that nobody takes. A client that takes nothing must
// not do that to the others.
func TestAStoppedClientBlocksNobody(t *testing.T) {
	w := newWorld(t)
	stopped := w.connect(true)
	near, flood := w.session(stopped, "yes")
	// Nobody reads from stopped's channel: its window fills, and then its queues.
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		chunk := make([]byte, 32<<10)
		for {
			if _, err := flood.ch.Write(chunk); err != nil {
				return
			}
		}
	}()
	for range 100 {
		if _, err := flood.ch.SendRequest("fill@example.com", false, nil); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		c := w.connect(true)
		near, far := w.session(c, "true")
		far.ch.SendRequest("exit-status", false, ssh.Marshal(statusMsg{0}))
		far.ch.Close()
		if q := take(t, "status beside a stopped client", near.reqs); q.Type != "exit-status" {
			t.Errorf("got %s", q.Type)
		}
		c.Close()
	}
	go ssh.DiscardRequests(near.reqs) // this test's own x/crypto must go on to notice the end
	stopped.Conn.Close()
	within(t, "the flood ends with its client", wrote)
}

// A client that floods us is cut, and only that one.
func TestAFloodingClientIsCut(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	near := take(t, "session", c.open("session", nil))
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	go func() {
		for {
			if _, err := near.ch.SendRequest("env", false, ssh.Marshal(envMsg{"A", "B"})); err != nil {
				return
			}
		}
	}()
	take(t, "the flooding client is cut", ended)
	other := w.connect(true)
	_, far := w.session(other, "true")
	far.ch.Close()
}

// A few large requests hold as much as many small ones.
func TestAClientThatHoldsMuchIsCut(t *testing.T) {
	const enough = 200 // of 100 KiB each; they would wait, by their number
	large := strings.Repeat("x", 100<<10)
	for name, send := range map[string]func(c *client) func() error{
		"set-up of a session": func(c *client) func() error {
			near := take(t, "session", c.open("session", nil))
			return func() error {
				_, err := near.ch.SendRequest("env", false, ssh.Marshal(envMsg{"A", large}))
				if err == nil { // not so fast that it is the channel's queue that overflows
					_, _, err = c.SendRequest("keepalive@openssh.com", true, nil)
				}
				return err
			}
		},
		"global requests behind one that is not answered": func(c *client) func() error {
			go c.SendRequest("tcpip-forward", true, ssh.Marshal(forwardMsg{"localhost", 4711}))
			return func() error {
				_, _, err := c.SendRequest("unknown", false, []byte(large))
				return err
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c := w.connect(true)
			one := send(c)
			for range enough {
				if one() != nil {
					break
				}
			}
			within(t, "the client is cut", c.ran)
		})
	}
}

// Sessions that are not started cost memory, and nothing at the server that would bound them.
func TestAClientWithTooManySessionsIsCut(t *testing.T) {
	const enough = 1024
	w := newWorld(t)
	c := w.connect(true)
	for range enough {
		if take(t, "session", c.open("session", nil)).ch == nil {
			t.Fatal("a session was refused before there were too many")
		}
	}
	select {
	case <-c.ran:
		t.Fatal("cut before there were too many")
	default:
	}
	c.open("session", nil)
	within(t, "the client is cut", c.ran)
}

func TestDirectChannels(t *testing.T) {
	kinds := map[string][]byte{
		"direct-tcpip": ssh.Marshal(tcpipMsg{"localhost", 80, "127.0.0.1", 1}),
		"direct-streamlocal@openssh.com": ssh.Marshal(struct {
			Path, Reserved string
			Port           uint32
		}{"/run/x.sock", "", 0}),
		"strange@example.com": []byte("whatever"),
	}
	for kind, extra := range kinds {
		t.Run(kind, func(t *testing.T) {
			w := newWorld(t)
			c := w.connect(true)
			opening := c.open(kind, extra)
			nc := take(t, "open", w.channels)
			if nc.ChannelType() != kind || !bytes.Equal(nc.ExtraData(), extra) {
				t.Errorf("server got %s %q", nc.ChannelType(), nc.ExtraData())
			}
			nc.Reject(ssh.ResourceShortage, "not today")
			var refusal *ssh.OpenChannelError
			if err := take(t, "refusal", opening).err; !errors.As(err, &refusal) ||
				refusal.Reason != ssh.ResourceShortage || refusal.Message != "not today" {
				t.Errorf("refused by %v", err)
			}

			opening = c.open(kind, extra)
			far := w.accept(kind)
			near := take(t, "open", opening)
			go ssh.DiscardRequests(near.reqs)
			down := readAll(near.ch)
			io.WriteString(far.ch, "down")
			far.ch.CloseWrite() // half-close: our direction stays open
			if got := take(t, "until EOF", down); got != "down" {
				t.Errorf("got %q", got)
			}
			up := readAll(far.ch)
			io.WriteString(near.ch, "up")
			near.ch.CloseWrite()
			if got := take(t, "until EOF", up); got != "up" {
				t.Errorf("got %q", got)
			}
			near.ch.Close()
			if _, open := <-far.reqs; open {
				t.Error("a request after the client's CLOSE")
			}
		})
	}
}

func TestTunIsRefusedHere(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	err := take(t, "refusal", c.open("tun@openssh.com", nil)).err
	var refusal *ssh.OpenChannelError
	if !errors.As(err, &refusal) || !strings.Contains(refusal.Message, "MUXPROXY_BYPASS") {
		t.Errorf("refused by %v", err)
	}
	nothing(t, "tun at the server", w.channels)
}

func (w *world) forward(c *client, name string, payload, reply any) {
	w.t.Helper()
	done := async(func() answer {
		ok, data, err := c.SendRequest(name, true, ssh.Marshal(payload))
		if ok && reply != nil && !bytes.Equal(data, ssh.Marshal(reply)) {
			err = errors.New("wrong data in the reply: " + string(data))
		}
		return answer{ok, err}
	})
	q := take(w.t, name, w.requests)
	if q.Type != name || !bytes.Equal(q.Payload, ssh.Marshal(payload)) {
		w.t.Fatalf("the server got %s %q", q.Type, q.Payload)
	}
	var data []byte
	if reply != nil {
		data = ssh.Marshal(reply)
	}
	q.Reply(true, data)
	if a := take(w.t, "reply", done); !a.ok || a.err != nil {
		w.t.Fatalf("%s: %+v", name, a)
	}
}

type portMsg struct{ Port uint32 }

// A client that came in the moment when the connection broke goes on with another; but not without the forwards that it was
// granted on the one that has ended.
func TestAGrantedForwardEndsWithItsConnection(t *testing.T) {
	for _, granted := range []bool{false, true} {
		w := newWorld(t)
		w.again = true
		c := w.connect(true)
		if granted {
			w.forward(c, "tcpip-forward", forwardMsg{"localhost", 4711}, nil)
		}
		w.tcp.Close()
		if granted {
			within(t, "the client is cut", c.ran)
		} else {
			nothing(t, "the end of a client that has lost nothing", c.ran)
		}
	}
}

func TestRemoteForwardsBelongToTheirClient(t *testing.T) {
	w := newWorld(t)
	a, b := w.connect(true), w.connect(true)
	w.forward(a, "tcpip-forward", forwardMsg{"localhost", 0}, portMsg{4711})
	w.forward(b, "tcpip-forward", forwardMsg{"localhost", 4712}, nil)
	w.forward(b, "streamlocal-forward@openssh.com", struct{ Path string }{"/tmp/s"}, nil)

	open := func(kind string, extra []byte) <-chan opened {
		return async(func() opened {
			ch, reqs, err := w.server.OpenChannel(kind, extra)
			return opened{ch, reqs, err}
		})
	}
	for _, x := range []struct {
		kind  string
		extra []byte
		to    *client
	}{
		{"forwarded-tcpip", ssh.Marshal(tcpipMsg{"localhost", 4711, "10.0.0.1", 5}), a},
		{"forwarded-tcpip", ssh.Marshal(tcpipMsg{"localhost", 4712, "10.0.0.1", 5}), b},
		{"forwarded-streamlocal@openssh.com", ssh.Marshal(struct{ Path, Reserved string }{"/tmp/s", ""}), b},
	} {
		opening := open(x.kind, x.extra)
		nc := take(t, "at the owner", x.to.channels)
		if nc.ChannelType() != x.kind || !bytes.Equal(nc.ExtraData(), x.extra) {
			t.Errorf("the owner got %s %q", nc.ChannelType(), nc.ExtraData())
		}
		near, nearReqs, err := nc.Accept()
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(nearReqs)
		far := take(t, "opened", opening)
		if far.err != nil {
			t.Fatal(far.err)
		}
		up := readAll(far.ch)
		io.WriteString(near, "hello")
		near.CloseWrite()
		if got := take(t, "data", up); got != "hello" {
			t.Errorf("got %q", got)
		}
		// The owner's refusal is relayed too.
		opening = open(x.kind, x.extra)
		take(t, "at the owner", x.to.channels).Reject(ssh.ConnectionFailed, "nobody home")
		var refusal *ssh.OpenChannelError
		if err := take(t, "refusal", opening).err; !errors.As(err, &refusal) || refusal.Message != "nobody home" {
			t.Errorf("refused by %v", err)
		}
	}
	for what, opening := range map[string]<-chan opened{
		"unowned port": open("forwarded-tcpip", ssh.Marshal(tcpipMsg{"localhost", 1, "10.0.0.1", 5})),
		"agent":        open("auth-agent@openssh.com", nil),
		"x11":          open("x11", nil),
		"malformed":    open("forwarded-tcpip", []byte{1}),
	} {
		if err := take(t, what, opening).err; err == nil {
			t.Errorf("%s: accepted", what)
		}
	}

	// One that is cancelled by its owner, one whose owner dies.
	done := async(func() answer {
		ok, _, err := b.SendRequest("cancel-tcpip-forward", true, ssh.Marshal(forwardMsg{"localhost", 4712}))
		return answer{ok, err}
	})
	q := take(t, "cancel", w.requests)
	if q.Type != "cancel-tcpip-forward" || !bytes.Equal(q.Payload, ssh.Marshal(forwardMsg{"localhost", 4712})) {
		t.Errorf("server got %s %q", q.Type, q.Payload)
	}
	q.Reply(true, nil)
	if a := take(t, "reply", done); !a.ok {
		t.Errorf("cancel: %+v", a)
	}
	theirs, _, err := b.SendRequest("cancel-tcpip-forward", true, ssh.Marshal(forwardMsg{"localhost", 4711}))
	if theirs || err != nil {
		t.Errorf("another client's forward was cancelled: %v %v", theirs, err)
	}
	a.tcp.Close()
	q = take(t, "cancel for the dead", w.requests)
	if q.Type != "cancel-tcpip-forward" || !bytes.Equal(q.Payload, ssh.Marshal(forwardMsg{"localhost", 4711})) {
		t.Errorf("server got %s %q, want a cancel with the allocated port", q.Type, q.Payload)
	}
	if err := take(t, "the dead's port", open("forwarded-tcpip", ssh.Marshal(tcpipMsg{"localhost", 4711, "10.0.0.1", 5}))).err; err == nil {
		t.Error("a channel for a dead owner was accepted")
	}
}

// With port 0 the server may open a channel before its reply has been read.
func TestAForwardedOpenBeforeTheReplyWaits(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	done := async(func() answer {
		ok, _, err := c.SendRequest("tcpip-forward", true, ssh.Marshal(forwardMsg{"", 0}))
		return answer{ok, err}
	})
	q := take(t, "forward request", w.requests)
	opening := async(func() error {
		_, _, err := w.server.OpenChannel("forwarded-tcpip", ssh.Marshal(tcpipMsg{"", 4711, "10.0.0.1", 5}))
		return err
	})
	nothing(t, "an answer before the owner is known", opening)
	q.Reply(true, ssh.Marshal(portMsg{4711}))
	take(t, "reply", done)
	take(t, "at the owner", c.channels).Reject(ssh.ConnectionFailed, "seen")
	if err := take(t, "answer", opening); err == nil || !strings.Contains(err.Error(), "seen") {
		t.Errorf("refused by %v", err)
	}
}

// Many may connect to a remote forward at once, before its owner has answered the first.
func TestManyForwardedOpensWait(t *testing.T) {
	const many = 600
	w := newWorld(t)
	c := w.connect(true)
	w.forward(c, "tcpip-forward", forwardMsg{"localhost", 4711}, nil)
	refusals := make(chan error, many)
	for range many {
		go func() {
			_, _, err := w.server.OpenChannel("forwarded-tcpip", ssh.Marshal(tcpipMsg{"localhost", 4711, "10.0.0.1", 5}))
			refusals <- err
		}()
	}
	var waiting []ssh.NewChannel
	for range many {
		waiting = append(waiting, take(t, "at the owner", c.channels))
	}
	for _, nc := range waiting {
		nc.Reject(ssh.ConnectionFailed, "seen")
	}
	for range many {
		if err := take(t, "answer", refusals); err == nil || !strings.Contains(err.Error(), "seen") {
			t.Errorf("refused by %v", err)
		}
	}
}

// A forward that is granted after its owner has died is cancelled, with the port that the server chose.
func TestAForwardGrantedTooLateIsCancelled(t *testing.T) {
	w := newWorld(t)
	holder := w.connect(true) // or the upstream would end with its last client
	defer holder.Close()
	c := w.connect(true)
	go c.SendRequest("tcpip-forward", true, ssh.Marshal(forwardMsg{"", 0}))
	q := take(t, "forward request", w.requests)
	c.tcp.Close()
	within(t, "relay", c.ran)
	q.Reply(true, ssh.Marshal(portMsg{4711}))
	q = take(t, "cancel", w.requests)
	if q.Type != "cancel-tcpip-forward" || !bytes.Equal(q.Payload, ssh.Marshal(forwardMsg{"", 4711})) {
		t.Errorf("server got %s %q", q.Type, q.Payload)
	}
}

func TestRepliesToGlobalRequestsAreInOrder(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	first := async(func() answer {
		ok, data, err := c.SendRequest("one@example.com", true, []byte("1"))
		if string(data) != "first" {
			err = errors.New("got " + string(data))
		}
		return answer{ok, err}
	})
	q := take(t, "first", w.requests)
	if q.Type != "one@example.com" || string(q.Payload) != "1" {
		t.Errorf("server got %+v", q)
	}
	second := async(func() answer {
		ok, _, err := c.SendRequest("keepalive@openssh.com", true, nil)
		return answer{ok, err}
	})
	nothing(t, "the second reply before the first", second)
	q.Reply(true, []byte("first"))
	if a := take(t, "first", first); !a.ok || a.err != nil {
		t.Errorf("first: %+v", a)
	}
	if a := take(t, "second", second); a.err != nil {
		t.Errorf("second: %+v", a)
	}
}

// A client's ServerAlive means the whole path.
func TestClientKeepaliveNeedsALiveServer(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	w.conn.silent.Store(int64(time.Hour))
	reply := async(func() error {
		_, _, err := c.SendRequest("keepalive@openssh.com", true, nil)
		return err
	})
	nothing(t, "an answer for a silent server", reply)
	w.conn.silent.Store(0)
	if err := take(t, "answer", reply); err != nil {
		t.Error(err)
	}
	nothing(t, "the keepalive at the server", w.requests)
}

func TestNoMoreSessions(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	w.noMore(c)
	if err := take(t, "refusal", c.open("session", nil)).err; err == nil {
		t.Error("a session after no-more-sessions")
	}
	nothing(t, "no-more-sessions at the server", w.requests)
	nothing(t, "session at the server", w.channels)
	// It binds that client only.
	other := w.connect(true)
	_, far := w.session(other, "true")
	far.ch.Close()
}

// While the gate waits for a person the client gets requests that keep its ServerAlive quiet.
func TestAWaitingGateKeepsTheClientAlive(t *testing.T) {
	asked, decide := make(chan struct{}), make(chan struct{})
	w := newWorld(t, func(_ context.Context, u use.Use, _ func(string)) *use.Denied {
		if u.Kind == use.RemoteForward {
			close(asked)
			<-decide
			return &use.Denied{By: "test", Reason: "no"}
		}
		return nil
	})
	c := w.connect(true)
	reply := async(func() bool {
		ok, _, _ := c.SendRequest("tcpip-forward", true, ssh.Marshal(forwardMsg{"", 1}))
		return ok
	})
	within(t, "the gate is asked", asked)
	if q := take(t, "a sign of life", c.requests); q.Type != "keepalive@openssh.com" || q.WantReply {
		t.Errorf("got %+v", q)
	}
	close(decide)
	if take(t, "reply", reply) {
		t.Error("a denied forward was granted")
	}
	nothing(t, "a denied forward at the server", w.requests)
}

// Whatever opens or asks something upstream passes the gate: denying everything but attach leaves nothing through.
func TestNothingPassesAClosedGate(t *testing.T) {
	w := newWorld(t, func(_ context.Context, u use.Use, _ func(string)) *use.Denied {
		if u.Kind == use.Attach {
			return nil
		}
		return &use.Denied{By: "test", Reason: "no " + string(u.Kind)}
	})
	c := w.connect(true)
	for name, payload := range map[string][]byte{"shell": nil, "exec": ssh.Marshal(execMsg{"x"}), "subsystem": ssh.Marshal(execMsg{"sftp"})} {
		near := take(t, "session", c.open("session", nil))
		stderr := readAll(near.ch.Stderr())
		go near.ch.SendRequest(name, true, payload)
		for q := range near.reqs {
			t.Errorf("%s: got %s", name, q.Type) // no exit status: ssh makes that 255
		}
		if got, want := take(t, "stderr", stderr), "muxproxy: denied by test: no "+name+"\n"; got != want {
			t.Errorf("%s: stderr %q, want %q", name, got, want)
		}
	}
	for _, kind := range []string{"direct-tcpip", "direct-streamlocal@openssh.com", "strange@example.com"} {
		extra := ssh.Marshal(tcpipMsg{"localhost", 80, "127.0.0.1", 1})
		if kind == "direct-streamlocal@openssh.com" {
			extra = ssh.Marshal(struct {
				Path, Reserved string
				Port           uint32
			}{"/x", "", 0})
		}
		var refusal *ssh.OpenChannelError
		if err := take(t, kind, c.open(kind, extra)).err; !errors.As(err, &refusal) || refusal.Reason != ssh.Prohibited {
			t.Errorf("%s: %v", kind, err)
		}
	}
	for _, name := range []string{"tcpip-forward", "streamlocal-forward@openssh.com", "other@example.com"} {
		payload := ssh.Marshal(forwardMsg{"localhost", 80})
		if strings.HasPrefix(name, "streamlocal") {
			payload = ssh.Marshal(struct{ Path string }{"/x"})
		}
		if ok, _, err := c.SendRequest(name, true, payload); ok || err != nil {
			t.Errorf("%s: %v %v", name, ok, err)
		}
	}
	nothing(t, "a channel at the server", w.channels)
	nothing(t, "a request at the server", w.requests)
	log, err := os.ReadFile(w.audit)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(log, []byte(`"deny"`)) + bytes.Count(log, []byte(`"denied"`)); n < 9 {
		t.Errorf("%d denials in the audit log, want 9:\n%s", n, log)
	}
}

// sshd's ClientAlive goes to the first open channel: a client that takes nothing of that must not leave it unanswered, or
// sshd ends the connection of all.
func TestServerKeepalivesDontWaitForTheClient(t *testing.T) {
	w := newWorld(t)
	alive := func(far opened) {
		t.Helper()
		if a := take(t, "answer to a keepalive", request(far.ch, "keepalive@openssh.com", nil)); a.err != nil {
			t.Error(a.err)
		}
	}
	waiting := w.connect(false) // nobody takes the channel's requests until it starts something
	unstarted := take(t, "session", waiting.open("session", nil))
	pty := request(unstarted.ch, "pty-req", nil)
	far := w.accept("session")
	take(t, "pty-req", far.reqs).Reply(true, nil)
	take(t, "reply", pty)
	for range 100 {
		alive(far)
	}
}

// What the client sent before its CLOSE goes on, however slowly the server takes it: the client was told that it has.
func TestNothingIsLostBehindACLOSE(t *testing.T) {
	for name, leave := range map[string]bool{"the client stays": false, "the client leaves": true} {
		for _, kind := range []string{"direct-tcpip", "forwarded-tcpip"} {
			t.Run(kind+", "+name, func(t *testing.T) {
				w := newWorld(t)
				c := w.connect(true)
				var near, far opened
				if kind == "direct-tcpip" {
					opening := c.open(kind, ssh.Marshal(tcpipMsg{"localhost", 80, "127.0.0.1", 1}))
					far = w.accept(kind)
					near = take(t, "open", opening)
				} else {
					w.forward(c, "tcpip-forward", forwardMsg{"localhost", 80}, nil)
					opening := async(func() opened {
						ch, reqs, err := w.server.OpenChannel(kind, ssh.Marshal(tcpipMsg{"localhost", 80, "10.0.0.1", 5}))
						return opened{ch, reqs, err}
					})
					var err error
					near.ch, near.reqs, err = take(t, "at the client", c.channels).Accept()
					if err != nil {
						t.Fatal(err)
					}
					far = take(t, "open", opening)
				}
				go ssh.DiscardRequests(near.reqs)
				go ssh.DiscardRequests(far.reqs)
				const size = 3 << 20 // more than the windows of both legs hold
				wrote := async(func() error {
					_, err := near.ch.Write(make([]byte, size))
					near.ch.CloseWrite()
					near.ch.Close()
					return err
				})
				buf := make([]byte, 1<<20) // so that the client's Write can end
				if _, err := io.ReadFull(far.ch, buf); err != nil {
					t.Fatal(err)
				}
				if err := take(t, "write", wrote); err != nil {
					t.Fatal(err)
				}
				if leave { // as ssh's pipes end: a reset would throw away what is under way
					c.tcp.(*net.TCPConn).CloseWrite()
				}
				if got := take(t, "the rest", readAll(far.ch)); len(got) != size-len(buf) {
					t.Errorf("%d bytes of %d", len(got)+len(buf), size)
				}
			})
		}
	}
}

// EOF and CLOSE follow all of stderr, not only stdout.
func TestStderrIsWaitedFor(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	near, far := w.session(c, "x")
	w.noMore(c)
	go ssh.DiscardRequests(near.reqs)
	big := strings.Repeat("e", 1<<20)
	stdout := readAll(near.ch)
	io.WriteString(far.ch.Stderr(), big) // more than the client's window takes at once is not there yet
	far.ch.SendRequest("exit-status", false, ssh.Marshal(statusMsg{0}))
	far.ch.Close()
	if got := take(t, "stderr", readAll(near.ch.Stderr())); got != big {
		t.Errorf("%d bytes", len(got))
	}
	take(t, "stdout", stdout)
}

func TestHostKeyProofsAreNotRelayed(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	if ok, _, err := c.SendRequest("hostkeys-prove-00@openssh.com", true, nil); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	nothing(t, "the request at the server", w.requests)
}

// An upstream channel that was taken for a session which never starts is closed with it.
func TestASessionThatNeverStartsLeavesNoChannel(t *testing.T) {
	w := newWorld(t)
	c := w.connect(false)
	near := take(t, "session", c.open("session", nil))
	pty := request(near.ch, "pty-req", nil)
	far := w.accept("session")
	take(t, "pty-req", far.reqs).Reply(true, nil)
	take(t, "reply", pty)
	near.ch.Close()
	if _, open := <-far.reqs; open {
		t.Error("a request instead of CLOSE")
	}
}

func TestAnEmptyPathIsNoTCPForward(t *testing.T) {
	w := newWorld(t)
	c := w.connect(true)
	for _, name := range []string{"streamlocal-forward@openssh.com", "cancel-streamlocal-forward@openssh.com"} {
		if ok, _, err := c.SendRequest(name, true, ssh.Marshal(struct{ Path string }{""})); ok || err != nil {
			t.Errorf("%s: %v, %v", name, ok, err)
		}
	}
	nothing(t, "a forward at the server", w.requests)
}

// With StreamLocalBindUnlink the server takes the same path again; the older owner's end is not the newer one's.
func TestANewerForwardOutlivesTheOlder(t *testing.T) {
	w := newWorld(t)
	a, b := w.connect(true), w.connect(true)
	path := struct{ Path string }{"/tmp/s"}
	w.forward(a, "streamlocal-forward@openssh.com", path, nil)
	w.forward(b, "streamlocal-forward@openssh.com", path, nil)
	a.Close()
	within(t, "relay", a.ran)
	nothing(t, "a cancel at the server", w.requests)
	opening := async(func() error {
		_, _, err := w.server.OpenChannel("forwarded-streamlocal@openssh.com", ssh.Marshal(struct{ Path, Reserved string }{"/tmp/s", ""}))
		return err
	})
	take(t, "at the newer owner", b.channels).Reject(ssh.ConnectionFailed, "seen")
	if err := take(t, "answer", opening); err == nil || !strings.Contains(err.Error(), "seen") {
		t.Errorf("refused by %v", err)
	}
}
