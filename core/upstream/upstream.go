// Package upstream is a driver: it dials one SSH connection with x/crypto/ssh, checks its host key, logs in and watches over it.
package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

// version is our identification string (RFC 4253 section 4.2). sshd sends eow@openssh.com only to a peer that calls
// itself OpenSSH, and this version matches no pattern of an old bug in OpenSSH's compat.c.
const version = "SSH-2.0-OpenSSH_9.9 muxproxy"

const (
	defaultConnectTimeout = 30 * time.Second
	// loginTimeout bounds the peer's silence during the login, as sshd's LoginGraceTime bounds ours. It does not run
	// while a person or an agent is thinking.
	loginTimeout = 120 * time.Second
	// proxyTimeout takes the place of a ConnectTimeout that is not set where a ProxyCommand connects.
	proxyTimeout = 10 * time.Minute
	// rekeyThreshold keeps x/crypto/ssh from starting a key exchange on its own. From its KEXINIT on it holds back what it is
	// to send, at most 64 packets; then its reader, too, waits as soon as it has to answer a CLOSE, and never reads the
	// peer's KEXINIT: the connection is frozen for ever. Of one that the peer starts, that is read by then. It is so high for every
	// peer, since the configuration is fixed before the peer says who it is. OpenSSH starts one by its own RekeyLimit: after
	// 1 GiB (64 GiB with AES), as RFC 4253 section 9 and RFC 4344 section 3.2 want. x/crypto/ssh's own limit of 2^31
	// packets for each direction remains (RFC 4344 section 3.1).
	rekeyThreshold = 1 << 62
	// maxBanners is how many bytes of banners are shown.
	maxBanners = 64 << 10
)

// Error is a line for a person about one host.
type Error struct {
	Host string // HOST:PORT, or USER@HOST:PORT where the login failed; escaped
	Msg  string // what failed and what to do; escaped
	Err  error  // the cause, or nil
	// Refused: by the server, by us because of its key or algorithms, or for want of a person's answer. It would be again.
	Refused bool
}

// Is makes a refused login a pool.ErrRefused.
func (e *Error) Is(target error) bool { return target == pool.ErrRefused && e.Refused }

func (e *Error) Error() string { return e.Host + ": " + e.Msg }

func (e *Error) Unwrap() error { return e.Err }

// Dialer implements pool.Dialer.
type Dialer struct {
	Log zerolog.Logger
}

var _ pool.Dialer = (*Dialer)(nil)

// dialing is what the steps of one Dial share.
type dialing struct {
	log    zerolog.Logger
	spec   pool.Spec
	host   string // HOST:PORT, escaped
	bypass string // the command that does without the master
	asker  pool.Asker
	guard  *guard
	// personal: a person had a part in the login.
	personal bool
	answers  int // that a person has given

	telling sync.Mutex // held while a callback of spec runs; guards told
	told    bool       // Dial has returned
}

// Dial connects, checks the host key against known_hosts and logs in, asking ask (nil: nobody) what only a person can answer.
// ctx bounds all of it, and nothing after it. Every error is an *Error; it says what would have been needed of a person who
// could not be asked. The Conn is a pool.HostKeyKeeper, and carries no hostkeys-00@openssh.com: that is answered here.
func (d *Dialer) Dial(ctx context.Context, spec pool.Spec, ask pool.Asker) (pool.Conn, error) {
	dl := newDialing(spec)
	dl.asker = ask
	defer dl.silence()
	dl.log = d.Log.With().Str("host", dl.host).Logger()
	c, err := dl.dial(ctx)
	if err != nil {
		var e *Error
		if !errors.As(err, &e) {
			e = dl.errorf("%s", use.Printable(err.Error()))
			e.Err = err
		}
		dl.log.Debug().Str("error", e.Error()).Msg("dial failed")
		return nil, e
	}
	return c, nil
}

func newDialing(spec pool.Spec) *dialing {
	if spec.Config == nil {
		spec.Config = &sshconfig.Resolved{}
	}
	name := spec.Target.Alias
	if name == "" {
		name = spec.Target.Host
	}
	return &dialing{
		log: zerolog.Nop(), spec: spec,
		host:   use.Printable(spec.Target.Addr()),
		bypass: "MUXPROXY_BYPASS=1 ssh " + use.Printable(name),
	}
}

func (d *dialing) errorf(format string, args ...any) *Error {
	return &Error{Host: d.host, Msg: fmt.Sprintf(format, args...)}
}

func (d *dialing) refusedf(format string, args ...any) *Error {
	return &Error{Host: d.host, Msg: fmt.Sprintf(format, args...), Refused: true}
}

// option is the value of a keyword, "" for none.
func (d *dialing) option(keyword string) string {
	if v := d.spec.Config.Get(keyword); !strings.EqualFold(v, "none") {
		return v
	}
	return ""
}

// on reads a keyword that is yes or no; ssh -G prints true and false for some.
func (d *dialing) on(keyword string, byDefault bool) bool {
	switch strings.ToLower(d.spec.Config.Get(keyword)) {
	case "":
		return byDefault
	case "no", "false", "off":
		return false
	}
	return true
}

// number reads a keyword that is a count or a number of seconds.
func (d *dialing) number(keyword string, byDefault int) int {
	if n, err := strconv.Atoi(d.spec.Config.Get(keyword)); err == nil && n >= 0 && n <= 1<<30 {
		return n
	}
	return byDefault
}

func (d *dialing) connectTimeout() time.Duration {
	if n := d.number("connecttimeout", 0); n > 0 {
		return time.Duration(n) * time.Second
	}
	return defaultConnectTimeout
}

func (d *dialing) dial(ctx context.Context) (*conn, error) {
	config, err := d.algorithms()
	if err != nil {
		return nil, err
	}
	keys, err := d.hostKeys()
	if err != nil {
		return nil, err
	}
	if config.HostKeyAlgorithms, err = keys.algorithms(config.HostKeyAlgorithms); err != nil {
		return nil, err
	}
	stream, err := d.transport(ctx)
	if err != nil {
		return nil, err
	}
	d.debugf("Connection established.")
	if d.spec.Connected != nil {
		d.spec.Connected()
	}
	t := newTransport(stream, d.host)
	c, err := d.handshake(ctx, t, config, keys)
	if err != nil {
		t.Close()
		t.reap()
		return nil, err
	}
	return c, nil
}

// transport makes what SSH runs over: what the spec brings, the user's ProxyCommand, or TCP.
func (d *dialing) transport(ctx context.Context) (net.Conn, error) {
	switch {
	case d.spec.Transport != nil:
		c, err := d.spec.Transport(ctx)
		if err == nil {
			return c, nil
		}
		var line *Error
		if errors.As(err, &line) { // it says already which host of the way failed
			return nil, err
		}
		e := d.errorf("%s", use.Printable(err.Error()))
		e.Err = err
		return nil, e
	case d.option("proxyjump") != "":
		return nil, d.refusedf("ProxyJump %s can't be shared; connect without sharing: %s", use.Printable(d.option("proxyjump")), d.bypass)
	case d.option("proxycommand") != "":
		return d.proxyCommand(ctx)
	}
	d.debugf("Connecting to %s port %d.", d.spec.Target.Host, d.spec.Target.Port)
	return d.connect(ctx)
}

// limitLogin starts the clock for the peer's next step of the login.
func (d *dialing) limitLogin() { d.guard.limit(loginTimeout, "no answer in %s while logging in") }

// handshake makes t an SSH connection that is logged in. It closes t on failure.
func (d *dialing) handshake(ctx context.Context, t *transport, config *ssh.ClientConfig, keys *hostKeys) (*conn, error) {
	// A question about a connection that is gone is of no use: sshd has its LoginGraceTime.
	asking, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	t.whenDown(func() { cancel(errDown) })
	d.guard = newGuard(ctx, t)
	defer d.guard.end()
	login := &login{dialing: d, ctx: asking}
	defer login.end()

	var hostKey ssh.PublicKey
	var trusted trust
	var hostKeyErr error
	// Behind a proxy the host has no address that we know; that of the proxy says nothing.
	remote := ""
	if a := t.RemoteAddr(); a != nil && d.spec.Transport == nil && d.option("proxycommand") == "" {
		remote = a.String()
	}
	config.HostKeyCallback = func(_ string, _ net.Addr, key ssh.PublicKey) error {
		if hostKey != nil { // a later key exchange: x/crypto has checked the signature
			if !sameKey(hostKey, key) {
				return errors.New("the host key changed within the connection")
			}
			return nil
		}
		d.guard.pause()
		d.debugf("Remote identification: %s", t.identification())
		if trusted, hostKeyErr = keys.accept(asking, key, remote); hostKeyErr != nil {
			return hostKeyErr
		}
		hostKey = key
		d.limitLogin()
		return nil
	}
	banners := 0
	config.BannerCallback = func(text string) error {
		if banners += len(text); banners > maxBanners {
			return nil
		}
		d.log.Debug().Str("banner", use.Printable(text)).Msg("server's banner")
		d.tell(d.spec.Banner, lines(text))
		return nil
	}
	config.AuthCallback = login.next
	config.User = d.spec.Target.User
	config.ClientVersion = version

	timeout := d.connectTimeout()
	if d.option("proxycommand") != "" && d.number("connecttimeout", 0) == 0 {
		timeout = proxyTimeout // it may log in somewhere by itself, and ask the person in a browser
	}
	d.guard.limit(timeout, "no answer in %s after the connection was made")
	sc, channels, requests, err := ssh.NewClientConn(t, d.spec.Target.Addr(), config)
	if late := d.guard.end(); late != nil && err == nil {
		sc.Close()
		err = late
		// x/crypto/ssh ends only when it can deliver what it holds.
		go ssh.DiscardRequests(requests)
		for range channels {
		}
	}
	if err != nil {
		return nil, d.explain(t, login, hostKeyErr, err)
	}
	t.established()
	info := pool.ServerInfo{
		Version: string(sc.ServerVersion()),
		OpenSSH: strings.HasPrefix(string(sc.ServerVersion()), "SSH-2.0-OpenSSH"),
		Addr:    remote,
		HostKey: hostKey,
	}
	info.Auth, info.AgentID = login.result()
	info.Silent, info.Answered = !d.personal, login.proof > 0 && login.proof == d.answers
	if m, ok := sc.(ssh.AlgorithmsConnMetadata); ok {
		a := m.Algorithms()
		login.negotiated(a)
		info.Kex, info.Cipher = a.KeyExchange, a.Write.Cipher
		t.Join(a.Write.Cipher)
		info.PostQuantum = postQuantum(a.KeyExchange)
	}
	via := remote
	if via == "" {
		via = "via proxy"
	}
	d.debugf("Authenticated to %s (%s) using %q.", d.spec.Target.Host, via, login.method)
	interval, count := time.Duration(d.number("serveraliveinterval", 0))*time.Second, d.number("serveralivecountmax", defaultAliveCount)
	if interval == 0 {
		interval, count = defaultAliveInterval, max(count, defaultAliveCount)
	}
	d.log.Debug().Str("server", use.Printable(info.Version)).Str("kex", info.Kex).Str("cipher", info.Cipher).
		Str("auth", info.Auth).Msg("connected")
	c := newConn(sc, channels, requests, t, info)
	c.qos, c.log = d.qos(), d.log
	c.Mark(d.spec.Lane.Class)
	c.accepted = !trusted.stored
	if trusted.update {
		c.update = keys.updater(sc.SessionID())
	}
	c.start(interval, count)
	return c, nil
}

// explain turns what x/crypto/ssh said into a line for a person.
func (d *dialing) explain(t *transport, login *login, hostKeyErr, err error) error {
	var e *Error
	var algorithm *ssh.AlgorithmNegotiationError
	text := strings.TrimPrefix(strings.TrimPrefix(err.Error(), "ssh: handshake failed: "), "ssh: ")
	reason, disconnected := disconnectText(err)
	switch late := d.guard.end(); {
	case late != nil:
		if errors.As(late, &e) {
			return e
		}
		e = d.errorf("gave up connecting: %s", use.Printable(late.Error()))
	case hostKeyErr != nil:
		e = d.refusedf("%s", hostKeyErr.Error())
	case errors.As(err, &algorithm):
		e = d.refusedf("no common algorithm for %s: the server offers only %s; connect without sharing: %s",
			use.Printable(algorithm.What), use.Printable(strings.Join(algorithm.RequestedAlgorithms, ",")), d.bypass)
	case disconnected:
		e = d.errorf("the server ended the connection: %s", use.Printable(reason))
		if login.started { // too many tries, most likely
			e.Msg += login.attempts()
			e.Refused = true
		}
	case t.failure() != nil && !t.identified():
		e = d.errorf("%s before the server identified itself", t.failure())
		if said := t.preamble(); said != "" {
			e.Msg += `; it said "` + use.Printable(said) + `"`
		}
		if p, ok := t.raw.(*proxyConn); ok {
			e.Msg = p.failure()
		}
	case t.failure() != nil && login.started:
		e = d.errorf("%s while logging in", t.failure())
		e.Msg += login.attempts()
	case t.failure() != nil:
		e = d.errorf("%s during the key exchange", t.failure())
	case login.denied != nil:
		return login.denied
	case !t.identified():
		e = d.errorf("what answers there is not an SSH server (%s)", use.Printable(text))
	default:
		e = d.errorf("%s", use.Printable(text))
	}
	e.Err = err
	return e
}

// disconnectText is the description in an SSH_MSG_DISCONNECT (RFC 4253 section 11.1), which x/crypto/ssh returns as an error of
// a type of its own.
func disconnectText(err error) (string, bool) {
	_, text, ok := strings.Cut(err.Error(), "ssh: disconnect, reason ")
	if !ok {
		return "", false
	}
	code, message, _ := strings.Cut(text, ": ")
	if plain, err := strconv.Unquote(message); err == nil {
		message = plain
	}
	if message == "" {
		message = "reason " + code
	}
	return message, true
}
