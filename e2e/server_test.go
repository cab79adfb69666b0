//go:build linux

package e2e

import (
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// server is an SSH server that does what sshd never would. It shows the host keys of every sshd here and takes any key.
// Commands: "true" ends with 0; "storm" writes a line and waits for storm.
type server struct {
	t      testing.TB
	ln     net.Listener
	wg     sync.WaitGroup
	begin  chan struct{} // closed: the storm begins
	storms chan struct{} // one for each storm whose requests are written

	mu    sync.Mutex // guards conns
	conns []net.Conn
}

// newServer starts one. It ends with the test.
func newServer(t testing.TB) *server {
	t.Helper()
	s := &server{t: t, ln: listenTCP(t), begin: make(chan struct{}), storms: make(chan struct{}, 16)}
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil },
	}
	for _, k := range hostKeys {
		signer, err := ssh.ParsePrivateKey(k.private)
		if err != nil {
			t.Fatal(err)
		}
		config.AddHostKey(signer)
	}
	s.wg.Go(func() {
		for {
			c, err := s.ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns = append(s.conns, c)
			s.mu.Unlock()
			s.wg.Go(func() { s.serve(c, config) })
		}
	})
	t.Cleanup(func() {
		s.ln.Close()
		s.mu.Lock()
		for _, c := range s.conns {
			c.Close()
		}
		s.mu.Unlock()
		s.wg.Wait()
	})
	return s
}

func (s *server) addr() string { return s.ln.Addr().String() }

// storm lets the one waiting "storm" go and returns when its requests are written.
func (s *server) storm() {
	s.t.Helper()
	close(s.begin)
	select {
	case <-s.storms:
	case <-time.After(patience):
		s.t.Fatal("the server can't write its requests")
	}
}

func (s *server) serve(c net.Conn, config *ssh.ServerConfig) {
	defer c.Close()
	conn, channels, requests, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	defer conn.Close()
	s.wg.Go(func() { ssh.DiscardRequests(requests) })
	for ch := range channels {
		if ch.ChannelType() != "session" {
			ch.Reject(ssh.UnknownChannelType, "sessions only")
			continue
		}
		channel, requests, err := ch.Accept()
		if err != nil {
			return
		}
		s.wg.Go(func() { s.session(channel, requests) })
	}
}

func (s *server) session(ch ssh.Channel, requests <-chan *ssh.Request) {
	var running sync.WaitGroup
	defer running.Wait()
	defer ch.Close()
	for r := range requests {
		var exec struct{ Command string }
		if r.Type != "exec" || ssh.Unmarshal(r.Payload, &exec) != nil {
			r.Reply(r.Type == "env", nil)
			continue
		}
		r.Reply(true, nil)
		running.Go(func() {
			if exec.Command == "storm" {
				s.rage(ch)
			}
			ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{0}))
			ch.Close()
		})
	}
}

// rage sends a hundred requests into as much output as the window takes.
func (s *server) rage(ch ssh.Channel) {
	ch.Write([]byte("begun\n"))
	<-s.begin
	var flood sync.WaitGroup
	flood.Go(func() {
		b := make([]byte, 32<<10)
		for {
			if _, err := ch.Write(b); err != nil {
				return
			}
		}
	})
	for range 100 {
		if _, err := ch.SendRequest("unheard-of@e2e.invalid", false, nil); err != nil {
			break
		}
	}
	s.storms <- struct{}{}
	flood.Wait()
}
