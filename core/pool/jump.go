package pool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
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
func (p *Pool) jump(ctx context.Context, hop Spec, to use.Target, timeout time.Duration, by use.Use, ask Asker) (*Stream, error) {
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
	ch, reqs, err := lease.Open(openCtx, permit, "direct-tcpip", ssh.Marshal(TCPChannel{
		Host: to.Host, Port: uint32(to.Port), Origin: "127.0.0.1",
	}))
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
	return NewStream(ch, to.Addr(), func(r use.Result) {
		lease.Release()
		permit.End(r)
	}), nil
}
