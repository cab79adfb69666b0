package upstream

import (
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pool"
)

// listen serves a TCP port until the test ends.
func listen(t *testing.T, serve func(net.Conn)) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	var wg sync.WaitGroup
	var mu sync.Mutex // guards conns
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// fake is a server of x/crypto/ssh. Its sessions stay open and silent.
type fake struct {
	port  uint16
	conns chan *fakeConn // those that have logged in
}

type fakeConn struct {
	*ssh.ServerConn
	raw      *pausable
	requests chan *ssh.Request // global requests; unanswered
	channels chan ssh.Channel
}

// pausable stops delivering what comes from the client, as a peer behind a cut cable.
type pausable struct {
	net.Conn
	mu     sync.Mutex // guards paused
	paused bool
}

func (p *pausable) pause() {
	p.mu.Lock()
	p.paused = true
	p.mu.Unlock()
}

func (p *pausable) Read(b []byte) (int, error) {
	for {
		n, err := p.Conn.Read(b)
		p.mu.Lock()
		drop := p.paused && err == nil
		p.mu.Unlock()
		if !drop {
			return n, err
		}
	}
}

func startFake(t *testing.T, config *ssh.ServerConfig, host ssh.Signer) *fake {
	t.Helper()
	config.AddHostKey(host)
	f := &fake{conns: make(chan *fakeConn, 64)}
	f.port = listen(t, func(c net.Conn) {
		raw := &pausable{Conn: c}
		sc, channels, requests, err := ssh.NewServerConn(raw, config)
		if err != nil {
			return
		}
		fc := &fakeConn{sc, raw, make(chan *ssh.Request, 64), make(chan ssh.Channel, 64)}
		f.conns <- fc
		var wg sync.WaitGroup
		wg.Go(func() {
			for r := range requests {
				if r.Type == "keepalive@openssh.com" && r.WantReply {
					r.Reply(false, nil)
					continue
				}
				fc.requests <- r
			}
		})
		wg.Go(func() {
			for n := range channels {
				ch, rs, err := n.Accept()
				if err == nil {
					wg.Go(func() { ssh.DiscardRequests(rs) })
					fc.channels <- ch
				}
			}
		})
		sc.Wait()
		wg.Wait()
	})
	return f
}

// dialFake dials it with an unknown host key.
func dialFake(t *testing.T, f *fake, options ...string) (pool.Conn, *fakeConn) {
	t.Helper()
	c := dial(t, spec(t, f.port, append(options, "stricthostkeychecking no")...))
	return c, <-f.conns
}

func openServer() *ssh.ServerConfig { return &ssh.ServerConfig{NoClientAuth: true} }

// Whatever ends the stream, no channel may look complete because of it.
func TestDownBeforeEOF(t *testing.T) {
	f := startFake(t, openServer(), newKey(t, "ed25519").signer)
	for name, end := range map[string]func(pool.Conn, *fakeConn){
		"peer closes": func(_ pool.Conn, s *fakeConn) { s.raw.Close() },
		"peer resets": func(_ pool.Conn, s *fakeConn) {
			s.raw.Conn.(*net.TCPConn).SetLinger(0)
			s.raw.Close()
		},
		"we close": func(c pool.Conn, _ *fakeConn) { c.Close() },
	} {
		for range 25 {
			c, s := dialFake(t, f)
			ch, requests, err := c.OpenChannel("session", nil)
			check(t, err)
			(<-s.channels).Write([]byte("part"))
			buf := make([]byte, 4)
			_, err = io.ReadFull(ch, buf)
			check(t, err)
			if c.Down() {
				t.Fatalf("%s: down while it lives", name)
			}
			go end(c, s)
			_, err = ch.Read(buf)
			if err == nil || !c.Down() {
				t.Fatalf("%s: %v with down %v", name, err, c.Down())
			}
			for range requests {
			}
			c.Wait()
		}
	}
}

func TestCause(t *testing.T) {
	f := startFake(t, openServer(), newKey(t, "ed25519").signer)
	for _, tc := range []struct {
		name string
		end  func(pool.Conn, *fakeConn)
		want string // "" for nil
	}{
		{"peer closes", func(_ pool.Conn, s *fakeConn) { s.raw.Close() }, ": connection closed by the remote host"},
		{"peer resets", func(_ pool.Conn, s *fakeConn) {
			s.raw.Conn.(*net.TCPConn).SetLinger(0)
			s.raw.Close()
		}, ": connection reset by peer"},
		{"we close", func(c pool.Conn, _ *fakeConn) { c.Close() }, ""},
		{"garbage", func(_ pool.Conn, s *fakeConn) { s.raw.Write([]byte(strings.Repeat("garbage ", 100))) }, ": protocol error: "},
	} {
		c, s := dialFake(t, f)
		tc.end(c, s)
		err := c.Wait()
		cause := c.Cause()
		if tc.want == "" {
			if err != nil || cause != nil {
				t.Errorf("%s: %v, %v", tc.name, err, cause)
			}
			continue
		}
		if cause == nil || !strings.Contains(cause.Error(), tc.want) || !strings.HasPrefix(cause.Error(), "127.0.0.1:") ||
			err == nil || err.Error() != cause.Error() {
			t.Errorf("%s: wait %v, cause %v", tc.name, err, cause)
		}
		// It stays what it was.
		c.Close()
		if again := c.Cause(); again == nil || again.Error() != cause.Error() {
			t.Errorf("%s: %v became %v", tc.name, cause, again)
		}
	}
}

func TestDisconnectIsTheCause(t *testing.T) {
	user := newKey(t, "ed25519")
	s := startSSHD(t, newKey(t, "ed25519"), []key{user})
	c := dial(t, spec(t, s.port, s.known(t), "identityfile "+user.file(t, s.dir, "id", "")))
	// sshd disconnects whoever opens a session after this.
	_, _, err := c.SendRequest("no-more-sessions@openssh.com", false, nil)
	check(t, err)
	if _, _, err := c.OpenChannel("session", nil); err == nil {
		t.Fatal("a session was opened")
	}
	if err := c.Wait(); err == nil || !strings.Contains(err.Error(), ": the server ended the connection: Possible attack") {
		t.Errorf("got %v", err)
	}
}

func TestKeepaliveFindsDeadPeer(t *testing.T) {
	f := startFake(t, openServer(), newKey(t, "ed25519").signer)
	c, s := dialFake(t, f, "serveraliveinterval 1", "serveralivecountmax 1")
	s.raw.pause()
	heard := c.LastHeard()
	err := c.Wait()
	if err == nil || !strings.Contains(err.Error(), ": no answer to 1 keepalives in 1s") || !c.Down() {
		t.Errorf("got %v", err)
	}
	if silence := time.Since(heard); silence < 1500*time.Millisecond {
		t.Errorf("ended after %v", silence)
	}
}

// A request of ours that the peer is slow to answer delays our keepalives, and is no reason to end a live connection.
func TestAnyByteIsLife(t *testing.T) {
	f := startFake(t, openServer(), newKey(t, "ed25519").signer)
	c, s := dialFake(t, f, "serveraliveinterval 1", "serveralivecountmax 1")
	replied := make(chan error, 1)
	go func() {
		_, _, err := c.SendRequest("slow", true, nil)
		replied <- err
	}()
	slow := <-s.requests
	ch, requests, err := c.OpenChannel("session", nil)
	check(t, err)
	go ssh.DiscardRequests(requests)
	far := <-s.channels
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(io.Discard, ch) })
	wg.Go(func() {
		tick := time.NewTicker(300 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				far.Write([]byte("x"))
			case <-stop:
				return
			}
		}
	})
	over := time.NewTimer(3500 * time.Millisecond)
	defer over.Stop()
	ended := make(chan struct{})
	go func() { c.Wait(); close(ended) }()
	select {
	case <-ended:
		t.Error("a live connection was ended:", c.Cause())
	case <-over.C:
	}
	check(t, c.Probe(t.Context(), nil)) // its request waits, but bytes come
	close(stop)
	slow.Reply(true, nil)
	check(t, <-replied)
	c.Close()
	wg.Wait()
	<-ended
}

func TestProbe(t *testing.T) {
	f := startFake(t, openServer(), newKey(t, "ed25519").signer)
	c, s := dialFake(t, f)
	before := c.LastHeard()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := c.Probe(t.Context(), nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if !c.LastHeard().After(before) {
		t.Error("nothing was heard")
	}
	s.raw.pause()
	ctx, cancel := contextFor(t, 300*time.Millisecond)
	defer cancel()
	err := c.Probe(ctx, nil)
	for range 2 { // one keepalive may have been under way, and one asked for: their answers are life, too
		if err == nil {
			err = c.Probe(ctx, nil)
		}
	}
	if err == nil || !strings.Contains(err.Error(), "no sign of life") {
		t.Errorf("got %v", err)
	}
	if c.Down() || c.Cause() != nil {
		t.Error("a failed probe ended the connection")
	}
	// A probe under way ends with the connection.
	probed := make(chan error, 1)
	go func() { probed <- c.Probe(t.Context(), nil) }()
	s.raw.Close()
	if err := <-probed; err == nil {
		t.Error("a probe outlived the connection")
	}
}
