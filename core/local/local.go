// Package local is the first front door: the SSH server side, towards the user's own ssh.
package local

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/coalesce"
)

// loginGrace bounds how long a client may take until it asks to be let in; a person who is asked about our host key
// by a misconfigured ssh needs some of it. What the upstream needs is bounded by the dial.
const loginGrace = 2 * time.Minute

// Config is what one client is let in by.
type Config struct {
	// User is the only user name that is let in.
	User string
	// Principals are the names under which ssh may look for the host: host, alias, HostKeyAlias. Not empty.
	Principals []string
	// Login blocks until the client may be let in, or says why not. It is called at most once, as soon as the client
	// tries to log in by whatever method; ctx ends with the client. Questions that come meanwhile go by Handshake.Ask.
	Login func(ctx context.Context) error
}

// ErrHostKeyRefused is returned by Accept when the client left in the middle of the key exchange after it had seen
// our host key: its ssh_config does not name our known_hosts file.
var ErrHostKeyRefused = errors.New("ssh did not take the local host key")

// Conn is one local client that has been let in. Channels and Requests must be drained until they close.
type Conn struct {
	*ssh.ServerConn
	openSSH  bool
	channels <-chan ssh.NewChannel
	requests <-chan *ssh.Request
}

// Channels are the channels that the client opens (RFC 4254 section 5.1).
func (c *Conn) Channels() <-chan ssh.NewChannel { return c.channels }

// Requests are the client's global requests (RFC 4254 section 4).
func (c *Conn) Requests() <-chan *ssh.Request { return c.requests }

// OpenSSH tells whether the client calls itself OpenSSH.
func (c *Conn) OpenSSH() bool { return c.openSSH }

// Handshake is a client on its way in; its person can be spoken to by banner (RFC 4252 section 5.4) and asked by
// keyboard-interactive until it is let in.
type Handshake struct {
	questions chan *asked
	ended     chan struct{} // closed when authentication has ended

	mu     sync.Mutex            // guards conn, waiting and over
	conn   ssh.ServerPreAuthConn // nil until the key exchange is over
	banner []string              // said before that
	over   bool                  // authentication has ended
}

// NewHandshake returns a Handshake for one Accept.
func NewHandshake() *Handshake {
	return &Handshake{questions: make(chan *asked), ended: make(chan struct{})}
}

// Say shows a line to the person by banner; it is dropped once the client has been let in.
func (h *Handshake) Say(line string) {
	h.mu.Lock()
	conn, over := h.conn, h.over
	if conn == nil && !over {
		h.banner = append(h.banner, line)
	}
	h.mu.Unlock()
	if conn != nil && !over {
		_ = conn.SendAuthBanner(line + "\r\n") // a client that is gone reads no banner
	}
}

func (h *Handshake) begin(conn ssh.ServerPreAuthConn) {
	h.mu.Lock()
	h.conn = conn
	lines := h.banner
	h.banner = nil
	h.mu.Unlock()
	for _, l := range lines {
		_ = conn.SendAuthBanner(l + "\r\n")
	}
}

func (h *Handshake) end() {
	h.mu.Lock()
	h.over, h.banner = true, nil
	h.mu.Unlock()
	close(h.ended)
}

// Accept speaks SSH with one client until it is let in. It owns rwc from then on: on an error it is closed, else the
// returned Conn's Close does it. h may be used by other goroutines meanwhile.
func (a *Authority) Accept(ctx context.Context, rwc net.Conn, cfg Config, h *Handshake) (*Conn, error) {
	s := newStream(rwc)
	conn, err := a.accept(ctx, s, cfg, h)
	h.end()
	if err != nil {
		s.Close()
		return nil, err
	}
	return conn, nil
}

func (a *Authority) accept(ctx context.Context, s *stream, cfg Config, h *Handshake) (*Conn, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	grace := time.AfterFunc(loginGrace, func() { cancel(errors.New("the client did not log in in time")) })
	defer grace.Stop()

	if _, err := io.WriteString(s.Conn, Identification+"\r\n"); err != nil {
		return nil, err
	}
	in := bufio.NewReaderSize(s.Conn, 4096)
	o, err := readOpening(in)
	if err != nil {
		return nil, endError(ctx, err)
	}
	s.r = o.replay(in, s.Conn)

	config := &ssh.ServerConfig{
		Config:        o.algorithms(),
		ServerVersion: Identification,
		MaxAuthTries:  -1, // the only judge is Login, and it is asked once
	}
	signers, err := a.signers(o.kexInit.HostKeyAlgos, cfg.Principals, !o.openSSH())
	if err != nil {
		return nil, err
	}
	for _, k := range signers {
		config.AddHostKey(k)
	}

	var began atomic.Bool // the key exchange is over
	adm := &admission{h: h, user: cfg.User, done: make(chan struct{})}
	adm.refuse = func(err error) {
		cancel(err)
		// Before the method's failure can be sent: ssh would go on to ask for a password that nobody wants.
		s.Close()
	}
	lctx, lcancel := context.WithCancel(ctx)
	var login sync.WaitGroup
	defer login.Wait()
	defer lcancel()
	defer s.whenDone(lcancel)()
	adm.begin = sync.OnceFunc(func() {
		grace.Stop()
		login.Go(func() {
			if adm.err = cfg.Login(lctx); adm.err != nil {
				adm.refuse(adm.err)
			}
			close(adm.done)
		})
	})
	config.NoClientAuth = true
	config.NoClientAuthCallback = adm.none
	config.PublicKeyCallback = adm.publicKey
	config.KeyboardInteractiveCallback = adm.keyboardInteractive
	config.PasswordCallback = adm.password
	config.PreAuthConnCallback = func(c ssh.ServerPreAuthConn) {
		began.Store(true)
		h.begin(c)
	}

	sc, channels, requests, err := ssh.NewServerConn(s, config)
	switch {
	case err == nil:
	case !began.Load() && s.ended() && s.writes.Load() > 1:
		return nil, endError(ctx, ErrHostKeyRefused)
	default:
		return nil, endError(ctx, negotiated(err))
	}
	if m, ok := sc.Conn.(ssh.AlgorithmsConnMetadata); ok {
		s.Join(m.Algorithms().Write.Cipher)
	}
	return &Conn{ServerConn: sc, openSSH: o.openSSH(), channels: channels, requests: requests}, nil
}

// endError prefers the reason why we ended the client over what that did to its stream.
func endError(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// keywords name what ssh_config calls an algorithm that two peers agree on.
var keywords = []struct{ what, keyword string }{
	{"key exchange", "KexAlgorithms"}, {"host key", "HostKeyAlgorithms"}, {"cipher", "Ciphers"}, {"MAC", "MACs"},
	{"compression", "Compression"},
}

// negotiated makes a line for a person of the failure to agree on an algorithm. The client's choice is the person's own.
func negotiated(err error) error {
	var e *ssh.AlgorithmNegotiationError
	if !errors.As(err, &e) {
		return err
	}
	for _, k := range keywords {
		if strings.HasSuffix(e.What, k.what) {
			return fmt.Errorf("none of the %s of this ssh can be shared (%s); set MUXPROXY_BYPASS=1", k.keyword,
				strings.Join(e.RequestedAlgorithms, ","))
		}
	}
	return err
}

// Principals lists the names under which ssh may look for a host, without doubles and empty ones, lower case as ssh
// compares them.
func Principals(names ...string) []string {
	var out []string
	for _, n := range names {
		if bare, ok := strings.CutSuffix(strings.TrimPrefix(n, "["), "]"); ok && strings.HasPrefix(n, "[") {
			n = bare // an address; a HostKeyAlias may be [host]:port
		}
		if n = strings.ToLower(n); n != "" && !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}

// stream is a client's connection as x/crypto sees it: it replays the opening, swallows the identification string
// that has already been sent, and notices the end.
type stream struct {
	*coalesce.Conn
	r       io.Reader    // where to read; set before x/crypto reads
	swallow int          // bytes of identification still to be swallowed; owned by the writer of the handshake
	writes  atomic.Int32 // packets of the handshake so far: KEXINIT, then the one with the host key
	gone    atomic.Bool  // a read or write failed
	done    chan struct{}
	once    sync.Once // closes done
	closing sync.Once // closes Conn
	err     error     // of closing
}

func newStream(rwc net.Conn) *stream {
	c := coalesce.New(rwc)
	return &stream{Conn: c, r: c, swallow: len(Identification) + 2, done: make(chan struct{})}
}

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	return n, s.noted(err)
}

func (s *stream) Write(p []byte) (int, error) {
	swallowed := min(s.swallow, len(p))
	s.swallow -= swallowed
	if swallowed == len(p) {
		return len(p), nil
	}
	s.writes.Add(1)
	n, err := s.Conn.Write(p[swallowed:])
	return swallowed + n, s.noted(err)
}

// noted notices that the peer is gone.
func (s *stream) noted(err error) error {
	if err != nil {
		s.gone.Store(true)
		s.once.Do(func() { close(s.done) })
	}
	return err
}

func (s *stream) Close() error {
	s.closing.Do(func() {
		s.err = s.Conn.Close()
		s.once.Do(func() { close(s.done) })
	})
	return s.err
}

func (s *stream) ended() bool { return s.gone.Load() }

// whenDone calls f when the stream ends; the returned function stops waiting for that.
func (s *stream) whenDone(f func()) (stop func()) {
	quit := make(chan struct{})
	go func() {
		select {
		case <-s.done:
			f()
		case <-quit:
		}
	}()
	return func() { close(quit) }
}
