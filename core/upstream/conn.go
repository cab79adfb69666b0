package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/coalesce"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	defaultAliveInterval = 15 * time.Second
	defaultAliveCount    = 3
)

// transport is the stream below an SSH connection. It notes every sign of life, and the first reason to end before
// x/crypto/ssh hears of it.
type transport struct {
	*coalesce.Conn
	raw  net.Conn // below it
	host string

	in   atomic.Int64 // bytes read
	last atomic.Int64 // when the last of them came, in Unix nanoseconds: a wall clock goes on while the machine sleeps
	down atomic.Bool

	over atomic.Int64 // when x/crypto/ssh was told, in Unix nanoseconds

	waiting atomic.Bool // somebody waits for heard
	ready   atomic.Bool // the handshake is over

	mu     sync.Mutex // guards what follows
	heard  chan struct{}
	local  bool // we closed it
	cause  string
	early  []byte // what came first, until the handshake is over
	fallen func() // called when it is down; nil once called
}

// maxEarly is enough for the lines that a server or a proxy may send before it identifies itself (RFC 4253 section 4.2), where
// they matter to a person.
const maxEarly = 1024

func newTransport(c net.Conn, host string) *transport {
	t := &transport{Conn: coalesce.New(c), raw: c, host: host}
	t.last.Store(time.Now().UnixNano())
	return t
}

func (t *transport) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	if n > 0 {
		t.last.Store(time.Now().UnixNano())
		t.in.Add(int64(n))
		if !t.ready.Load() {
			t.mu.Lock()
			t.early = append(t.early, p[:min(n, maxEarly-len(t.early))]...)
			t.mu.Unlock()
		}
		if t.waiting.Load() {
			t.wake()
		}
	}
	if err != nil {
		t.fail(readText(err))
		if t.ready.Load() && t.over.Load() == 0 {
			time.Sleep(settleTime)
		}
		t.over.CompareAndSwap(0, time.Now().UnixNano())
	}
	return n, err
}

// lastReadTime is how long a connection that can't be written to may still be read.
const lastReadTime = 2 * time.Second

// settleTime is how long the end of the stream is kept from x/crypto/ssh, which ends all channels when it learns of it: what
// the server sent before, the CLOSE of a session that was over for one, is dealt with first.
const settleTime = 100 * time.Millisecond

func (t *transport) Write(p []byte) (int, error) {
	n, err := t.Conn.Write(p)
	if err != nil {
		t.fail(readText(err))
		// The reader has to end too, but what the peer sent before may still be there to be read.
		time.AfterFunc(lastReadTime, func() { t.Conn.Close() })
	}
	return n, err
}

// Close is called by x/crypto/ssh once it has failed. It does not say that we wanted it.
func (t *transport) Close() error {
	t.fall()
	t.over.CompareAndSwap(0, time.Now().UnixNano())
	return t.Conn.Close()
}

// closeLocal is Close because we want it.
func (t *transport) closeLocal() error {
	t.mu.Lock()
	t.local = t.local || t.cause == ""
	t.mu.Unlock()
	return t.Close()
}

// fail records why the connection ends, if that is not known yet.
func (t *transport) fail(cause string) {
	t.mu.Lock()
	// After a Close by x/crypto/ssh or us the reader fails too, which says nothing.
	if t.cause == "" && !t.local && !t.down.Load() {
		t.cause = cause
	}
	t.mu.Unlock()
	t.fall()
}

// fall makes the transport count as down.
func (t *transport) fall() {
	t.down.Store(true)
	t.wake()
	t.mu.Lock()
	fallen := t.fallen
	t.fallen = nil
	t.mu.Unlock()
	if fallen != nil {
		fallen()
	}
}

// whenDown has f called once, as soon as the transport is down.
func (t *transport) whenDown(f func()) {
	t.mu.Lock()
	t.fallen = f
	t.mu.Unlock()
	if t.down.Load() {
		t.fall()
	}
}

// end records what x/crypto/ssh ended with, for an end that the stream had no part in.
func (t *transport) end(cause string) {
	t.mu.Lock()
	if t.cause == "" && !t.local {
		t.cause = cause
	}
	t.mu.Unlock()
	t.fall()
}

func (t *transport) failure() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cause == "" {
		return nil
	}
	return errors.New(t.cause)
}

// next returns a channel that closes with the next byte or the end.
func (t *transport) next() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.heard == nil {
		t.heard = make(chan struct{})
		t.waiting.Store(true)
	}
	return t.heard
}

func (t *transport) wake() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.heard != nil {
		close(t.heard)
		t.heard = nil
		t.waiting.Store(false)
	}
}

// established forgets what is only needed to explain a failed handshake.
func (t *transport) established() {
	t.ready.Store(true)
	t.mu.Lock()
	t.early = nil
	t.mu.Unlock()
}

// identification is the line that the peer has identified itself with.
func (t *transport) identification() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for line := range bytes.Lines(t.early) {
		if bytes.HasPrefix(line, []byte("SSH-")) {
			return string(bytes.TrimRight(line, "\r\n"))
		}
	}
	return ""
}

// reap waits for what Close has told to end.
func (t *transport) reap() {
	if p, ok := t.raw.(*proxyConn); ok {
		p.wait()
	}
}

// identified reports whether the peer has sent an identification string.
func (t *transport) identified() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bytes.HasPrefix(t.early, []byte("SSH-")) || bytes.Contains(t.early, []byte("\nSSH-"))
}

// preamble is the last line that came from a peer that did not identify itself.
func (t *transport) preamble() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(string(t.early)), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

func readText(err error) string {
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.EPIPE) {
		return "connection closed by the remote host"
	}
	return systemText(err)
}

// conn implements pool.Conn. Its goroutines end with the connection; the one that waits for it waits for them, too.
type conn struct {
	ssh.Conn
	t        *transport
	channels <-chan ssh.NewChannel
	incoming <-chan *ssh.Request // as they come
	requests chan *ssh.Request   // those that are not for us
	info     pool.ServerInfo
	accepted bool          // the host key is not in the user's files, but was accepted
	update   *updater      // nil: the server's other host keys don't matter
	updated  chan struct{} // closed when update has done what it can

	globals globals

	ping  chan struct{} // asks for a sign of life; one slot
	ended chan struct{} // the connection is over
	done  chan struct{} // and its goroutines are
	err   error         // of x/crypto/ssh; set before done closes

	qos qos
	log zerolog.Logger

	good keptGood
}

var (
	_ pool.Conn          = (*conn)(nil)
	_ pool.Marker        = (*conn)(nil)
	_ pool.HostKeyKeeper = (*conn)(nil)
)

func newConn(sc ssh.Conn, channels <-chan ssh.NewChannel, requests <-chan *ssh.Request, t *transport, info pool.ServerInfo) *conn {
	return &conn{
		Conn: sc, t: t, channels: channels, incoming: requests, requests: make(chan *ssh.Request, 16), info: info,
		ping: make(chan struct{}, 1), ended: make(chan struct{}), done: make(chan struct{}), updated: make(chan struct{}),
	}
}

func (c *conn) start(interval time.Duration, count int) {
	var helpers sync.WaitGroup
	helpers.Go(c.pinger)
	helpers.Go(func() { c.keepAlive(interval, count) })
	updates := make(chan []byte, 1)
	helpers.Go(func() { c.sort(updates) })
	helpers.Go(func() {
		defer close(c.updated)
		// The server says it once, after the login.
		if payload, ok := <-updates; ok && c.update != nil {
			c.update.run(c, payload)
		}
	})
	go func() {
		c.err = c.Conn.Wait()
		c.t.end(endText(c.err))
		close(c.ended)
		c.t.reap()
		helpers.Wait()
		close(c.done)
	}()
}

// sort passes the peer's global requests on, but for the list of its host keys.
func (c *conn) sort(updates chan<- []byte) {
	defer close(c.requests)
	defer close(updates)
	seen := false
	for r := range c.incoming {
		if r.Type != "hostkeys-00@openssh.com" {
			c.requests <- r
			continue
		}
		if !seen {
			seen = true
			updates <- r.Payload
		}
		if r.WantReply {
			r.Reply(true, nil)
		}
	}
}

// keptGood remembers the files that HostKeyStillGood has read.
type keptGood struct {
	mu    sync.Mutex // guards the rest
	rules string     // of the client that asked
	files []fileStamp
}

// HostKeyStillGood implements pool.HostKeyKeeper. The error is an *Error.
func (c *conn) HostKeyStillGood(spec pool.Spec) error {
	d := newDialing(spec)
	var files []string
	for _, k := range []string{"userknownhostsfile", "globalknownhostsfile"} {
		files = append(files, d.hostFiles(k)...)
	}
	if f := d.option("revokedhostkeys"); f != "" {
		files = append(files, f)
	}
	rules := fmt.Sprintf("%q %q %q", d.spec.Target.Addr(), d.option("nohostauthenticationforlocalhost"), d.spec.Config.Key())
	now := stampFiles(files) // before they are read
	c.good.mu.Lock()
	same := c.good.rules == rules && slices.Equal(c.good.files, now)
	c.good.mu.Unlock()
	if same {
		return nil
	}
	if err := stillGood(spec, c.info, c.accepted); err != nil {
		return err
	}
	c.good.mu.Lock()
	c.good.rules, c.good.files = rules, now
	c.good.mu.Unlock()
	return nil
}

// fileStamp tells whether a file is still what it was.
type fileStamp struct {
	path  string
	mtime int64
	size  int64
	inode uint64
}

func stampFiles(paths []string) []fileStamp {
	out := make([]fileStamp, len(paths))
	for i, path := range paths {
		out[i].path = path
		if info, err := os.Stat(path); err == nil {
			out[i].mtime, out[i].size, out[i].inode = info.ModTime().UnixNano(), info.Size(), inode(info)
		}
	}
	return out
}

// endText explains an end that x/crypto/ssh found in the protocol.
func endText(err error) string {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return "connection closed by the remote host"
	}
	if text, ok := disconnectText(err); ok {
		return "the server ended the connection: " + use.Printable(text)
	}
	return "protocol error: " + use.Printable(strings.TrimPrefix(err.Error(), "ssh: "))
}

// Over implements pool.Conn.
func (c *conn) Over() time.Time {
	if ns := c.t.over.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

func (c *conn) Channels() <-chan ssh.NewChannel { return c.channels }
func (c *conn) Requests() <-chan *ssh.Request   { return c.requests }
func (c *conn) Server() pool.ServerInfo         { return c.info }
func (c *conn) Down() bool                      { return c.t.down.Load() }
func (c *conn) LastHeard() time.Time            { return time.Unix(0, c.t.last.Load()) }

// Close ends the connection. The first call decides whether that was our wish; it may be called again.
func (c *conn) Close() error {
	if err := c.t.closeLocal(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Wait returns when the connection has ended and nothing of it runs any more: the Cause, or nil if we closed it.
func (c *conn) Wait() error {
	<-c.done
	return c.Cause()
}

func (c *conn) Cause() error {
	if failure := c.t.failure(); failure != nil {
		return &Error{Host: c.t.host, Msg: failure.Error(), Err: failure}
	}
	return nil
}

// Probe waits for a sign of life of the peer, which ask provokes. Any byte that comes after the start of Probe is one.
func (c *conn) Probe(ctx context.Context, ask func()) error {
	before := c.t.in.Load()
	if ask == nil {
		ask = c.poke
	}
	asked := false
	for {
		heard := c.t.next()
		switch {
		case c.Down():
			if cause := c.Cause(); cause != nil {
				return cause
			}
			return &Error{Host: c.t.host, Msg: "connection closed", Err: net.ErrClosed}
		case c.t.in.Load() != before:
			return nil
		}
		if !asked {
			asked = true
			ask()
		}
		select {
		case <-heard:
		case <-ctx.Done():
			return &Error{Host: c.t.host, Msg: "no sign of life from the server", Err: ctx.Err()}
		}
	}
}

// poke asks for a sign of life.
func (c *conn) poke() {
	select {
	case c.ping <- struct{}{}:
	default:
	}
}

// keepAlive ends the connection when count keepalives, or what stands for them, one per interval of silence, brought nothing
// back.
func (c *conn) keepAlive(interval time.Duration, count int) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	heard, missed := c.t.in.Load(), 0
	for {
		select {
		case <-tick.C:
		case <-c.ended:
			return
		}
		if now := c.t.in.Load(); now != heard {
			heard, missed = now, 0
			continue
		}
		if missed >= count {
			c.t.fail(fmt.Sprintf("no answer to %d keepalives in %s", count, time.Duration(count)*interval))
			c.t.Conn.Close()
			return
		}
		missed++
		c.poke()
	}
}
