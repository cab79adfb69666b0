package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

// defaultConnectTimeout bounds a connection through a jump host where ConnectTimeout is not set.
const defaultConnectTimeout = 30 * time.Second

// transport returns how a dial reaches spec's host through its last jump host, which is an upstream of the pool like any
// other; nil without one. through is told which.
func (p *Pool) transport(spec Spec, by use.Use, ask Asker, through func(*upstream)) func(context.Context) (net.Conn, error) {
	if len(spec.Via) == 0 {
		return nil
	}
	last := len(spec.Via) - 1
	hop := spec.Via[last]
	hop.Via = spec.Via[:last]
	hop.Env, hop.Say, hop.Debug, hop.Silent = spec.Env, spec.Say, spec.Debug, spec.Silent
	if spec.Banner != nil {
		hop.Banner = func(text string) {
			for line := range strings.Lines(text) {
				spec.Banner("jump host " + hop.Target.Host + ": " + line) // or it would pass for the target's
			}
		}
	}
	timeout := defaultConnectTimeout
	if s, err := strconv.Atoi(spec.Config.Get("connecttimeout")); err == nil && s > 0 {
		timeout = time.Duration(s) * time.Second
	}
	return func(ctx context.Context) (net.Conn, error) {
		c, err := p.jump(ctx, hop, spec.Target, timeout, by, ask)
		if err != nil {
			return nil, err
		}
		through(c.up)
		return c, nil
	}
}

// jump opens a connection to a target through a jump host's upstream, which it holds a lease on until Close.
func (p *Pool) jump(ctx context.Context, hop Spec, to use.Target, timeout time.Duration, by use.Use, ask Asker) (*jumpConn, error) {
	permit, denied := p.gate.Decide(ctx, use.Use{
		Kind: use.Jump, Client: by.Client, Caller: by.Caller, Target: hop.Target, Addr: to.Addr(),
	}, nil)
	if denied != nil {
		return nil, fmt.Errorf("%s: jump through %s: %w", to.Addr(), hop.Target.Addr(), denied)
	}
	end := func(err error) error {
		permit.End(use.Result{Status: "refused", Err: err.Error()})
		return err
	}
	lease, err := p.Acquire(ctx, permit, hop, ask)
	if err != nil {
		return nil, end(err)
	}
	// Only the connection: a login at the jump host may wait for a person.
	openCtx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer in %s", timeout))
	defer cancel()
	ch, reqs, err := lease.Open(openCtx, permit, "direct-tcpip", ssh.Marshal(struct { // RFC 4254 section 7.2
		Host       string
		Port       uint32
		Origin     string
		OriginPort uint32
	}{to.Host, uint32(to.Port), "127.0.0.1", 0}))
	if err != nil {
		lease.Release()
		var refused *ssh.OpenChannelError
		if errors.As(err, &refused) {
			return nil, end(fmt.Errorf("%s: the jump host %s could not connect: %s", to.Addr(), hop.Target.Addr(),
				use.Printable(refused.Message)))
		}
		return nil, end(fmt.Errorf("%s: jump through %s: %w", to.Addr(), hop.Target.Addr(), err))
	}
	lease.Discard(reqs)
	return &jumpConn{Channel: ch, lease: lease, permit: permit, to: to}, nil
}

// jumpConn is a channel of a jump host's upstream as a network connection.
type jumpConn struct {
	*Channel
	lease  *Lease
	permit *use.Permit
	to     use.Target
	once   sync.Once
	err    error // of Close
}

func (c *jumpConn) Write(b []byte) (int, error) {
	n, err := c.Channel.Write(b)
	c.Count(int64(n), 0)
	return n, err
}

func (c *jumpConn) Read(b []byte) (int, error) {
	n, err := c.Channel.Read(b)
	c.Count(0, int64(n))
	if err == io.EOF && c.Down() {
		err = io.ErrUnexpectedEOF // the jump host's end is not the target's
	}
	return n, err
}

// Close gives the jump host's lease back.
func (c *jumpConn) Close() error {
	c.once.Do(func() {
		c.err = c.Channel.Close()
		c.lease.Release()
		c.permit.End(use.Result{Status: "closed"})
	})
	return c.err
}

func (c *jumpConn) LocalAddr() net.Addr              { return jumpAddr("jump") }
func (c *jumpConn) RemoteAddr() net.Addr             { return jumpAddr(c.to.Addr()) }
func (*jumpConn) SetDeadline(time.Time) error        { return errors.ErrUnsupported }
func (*jumpConn) SetReadDeadline(time.Time) error    { return errors.ErrUnsupported }
func (*jumpConn) SetWriteDeadline(t time.Time) error { return errors.ErrUnsupported }

type jumpAddr string

func (jumpAddr) Network() string  { return "tcp" }
func (a jumpAddr) String() string { return string(a) }
