package relay

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// global is a global request of the client (RFC 4254 section 4).
type global struct {
	*ssh.Request
	answered chan struct{} // closed when the client has its reply, or needs none
}

// globals is the client's queue of global requests. Replies carry no ids: they go strictly first in, first out.
type globals struct {
	ready chan struct{} // one token: something may be waiting

	mu      sync.Mutex // guards what follows
	waiting []*global
	size    int           // bytes of payload in waiting
	last    chan struct{} // answered of the newest; closed at first
}

func (g *globals) init() {
	g.ready = make(chan struct{}, 1)
	g.last = make(chan struct{})
	close(g.last)
}

// barrier is closed when all requests so far have been answered.
func (g *globals) barrier() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.last
}

// add appends q; false means that too many wait.
func (g *globals) add(q *ssh.Request) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.waiting) >= maxQueued || g.size+len(q.Payload) > maxQueuedBytes {
		return false
	}
	g.size += len(q.Payload)
	g.last = make(chan struct{})
	g.waiting = append(g.waiting, &global{q, g.last})
	select {
	case g.ready <- struct{}{}:
	default:
	}
	return true
}

func (g *globals) next() *global {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.waiting) == 0 {
		return nil
	}
	q := g.waiting[0]
	g.waiting[0] = nil
	g.waiting = g.waiting[1:]
	g.size -= len(q.Payload)
	return q
}

// request takes one global request of the client.
func (r *Relay) request(q *ssh.Request) {
	if q.Type == "no-more-sessions@openssh.com" {
		// Kept here: sshd would end the shared connection at the next client's session (serverloop.c).
		r.noMoreSessions.Store(true)
		if !q.WantReply {
			return
		}
	}
	if !r.globals.add(q) {
		r.cut("too many global requests wait")
	}
}

func (r *Relay) serveGlobals() {
	for {
		select {
		case <-r.globals.ready:
		case <-r.ctx.Done():
			return
		}
		for q := r.globals.next(); q != nil; q = r.globals.next() {
			r.answer(q.Request)
			close(q.answered)
			if r.ctx.Err() != nil {
				return
			}
		}
	}
}

func (r *Relay) answer(q *ssh.Request) {
	switch q.Type {
	case "keepalive@openssh.com":
		// A ServerAliveInterval of the client's means the whole path, so nothing vouches for a silent server.
		if r.waitAlive() {
			_ = q.Reply(false, nil) // as sshd does; any answer will do
		}
	case "no-more-sessions@openssh.com":
		_ = q.Reply(true, nil)
	case "tcpip-forward", "streamlocal-forward@openssh.com":
		r.startForward(q)
	case "cancel-tcpip-forward", "cancel-streamlocal-forward@openssh.com":
		r.cancelForward(q)
	case "hostkeys-prove-00@openssh.com":
		_ = q.Reply(false, nil) // no key of the server's was shown to this client
	default:
		u := r.use(use.Other)
		u.Name = q.Type
		permit, denied := r.decide(u)
		if denied != nil {
			r.Tell("request " + use.Printable(u.Name) + ": " + denied.Error())
			_ = q.Reply(false, nil)
			return
		}
		ok, data, err := r.lease.Request(r.ctx, permit, q.Type, q.WantReply, q.Payload)
		_ = q.Reply(ok && err == nil, data)
		res := use.Result{Status: "ok"}
		if err != nil {
			res = use.Result{Status: "cut", Err: err.Error()}
		} else if q.WantReply && !ok {
			res.Status = "refused"
		}
		permit.End(res)
	}
}

// waitAlive returns true when the server has given a sign of life lately, false if the client ends first.
func (r *Relay) waitAlive() bool {
	if r.lease.Alive() {
		return true
	}
	t := time.NewTicker(aliveEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if r.lease.Alive() {
				return true
			}
		case <-r.ctx.Done():
			return false
		}
	}
}

// decide asks the gate about a global request. While that waits for a person, later requests wait too, the client's
// own keepalives among them: it gets requests of ours instead, for any packet counts as life.
func (r *Relay) decide(u use.Use) (*use.Permit, *use.Denied) {
	ctx, cancel := context.WithCancel(r.ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(reassureEvery)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				_, _, _ = r.client.SendRequest("keepalive@openssh.com", false, nil)
			case <-ctx.Done():
				return
			}
		}
	})
	defer wg.Wait()
	defer cancel()
	return r.gate.Decide(r.ctx, u, nil)
}

// forward is a remote forward of this client.
type forward struct {
	*pool.Listener
	permit *use.Permit
	since  time.Time
}

// forwardAddr reads the data of a forward request or its cancel (RFC 4254 section 7.1; PROTOCOL, 2.4).
func forwardAddr(q *ssh.Request) (pool.Addr, error) {
	if q.Type == "streamlocal-forward@openssh.com" || q.Type == "cancel-streamlocal-forward@openssh.com" {
		var m struct{ Path string }
		err := ssh.Unmarshal(q.Payload, &m)
		if err == nil && m.Path == "" {
			err = errors.New("no path")
		}
		return pool.Addr{Path: m.Path}, err
	}
	var m struct {
		Host string
		Port uint32
	}
	err := ssh.Unmarshal(q.Payload, &m)
	return pool.Addr{Host: m.Host, Port: m.Port}, err
}

func (r *Relay) startForward(q *ssh.Request) {
	a, err := forwardAddr(q)
	if err != nil {
		_ = q.Reply(false, nil)
		return
	}
	u := r.use(use.RemoteForward)
	u.Addr = a.String()
	permit, denied := r.decide(u)
	if denied != nil {
		r.Tell("remote forward of " + use.Printable(u.Addr) + ": " + denied.Error())
		_ = q.Reply(false, nil)
		return
	}
	f := &forward{permit: permit, since: time.Now()}
	f.Listener, err = r.lease.Listen(r.ctx, permit, a, func(nc *pool.NewChannel) {
		if !r.forwarded(permit, nc) {
			_ = nc.Reject(ssh.ConnectionFailed, "the client is gone")
		}
	})
	if err != nil {
		_ = q.Reply(false, nil)
		permit.End(use.Result{Status: "refused", Err: err.Error()})
		return
	}
	r.mu.Lock()
	replaced := r.listeners[f.Addr()]
	r.listeners[f.Addr()] = f
	r.mu.Unlock()
	if replaced != nil { // the server took the same path twice (StreamLocalBindUnlink)
		replaced.Close()
		replaced.permit.End(use.Result{Status: "closed"})
	}
	var data []byte
	if a.Path == "" && a.Port == 0 {
		data = ssh.Marshal(struct{ Port uint32 }{f.Addr().Port})
	}
	_ = q.Reply(true, data)
}

func (r *Relay) cancelForward(q *ssh.Request) {
	a, err := forwardAddr(q)
	if err != nil {
		_ = q.Reply(false, nil)
		return
	}
	r.mu.Lock()
	f := r.listeners[a]
	r.mu.Unlock()
	if f == nil {
		_ = q.Reply(false, nil) // not this client's
		return
	}
	u := r.use(use.CancelForward)
	u.Addr = a.String()
	permit, denied := r.decide(u)
	if denied != nil {
		r.Tell("end of the remote forward of " + use.Printable(u.Addr) + ": " + denied.Error())
		_ = q.Reply(false, nil)
		return
	}
	r.mu.Lock()
	delete(r.listeners, f.Addr())
	r.mu.Unlock()
	agreed := f.Cancel(r.ctx)
	_ = q.Reply(agreed, nil)
	f.permit.End(use.Result{Status: "closed"})
	permit.End(use.Result{Status: "ok"})
}

// endForwards cancels what the client left behind, however it ended.
func (r *Relay) endForwards() {
	r.mu.Lock()
	left := r.listeners
	r.listeners = nil // only serveGlobals adds, and that has ended
	r.mu.Unlock()
	for _, f := range left {
		f.Close()
		f.permit.End(use.Result{Status: "closed"})
	}
}

// forwarded carries one channel that the server opens to its client (RFC 4254 sections 6.3.2 and 7.2). It returns when
// the client has answered; the channel itself is served on. permit is that of what it belongs to, which the lock may have
// stopped since. false: the client is gone, and nc is still to be answered.
func (r *Relay) forwarded(permit *use.Permit, nc *pool.NewChannel) bool {
	if denied := permit.Connect(); denied != nil {
		_ = nc.Reject(ssh.Prohibited, "muxproxy: "+denied.Error())
		return true
	}
	client, clientReqs, err := r.openAtClient(nc.ChannelType(), nc.ExtraData())
	if refused := (*ssh.OpenChannelError)(nil); errors.As(err, &refused) {
		_ = nc.Reject(refused.Reason, refused.Message)
		return true
	}
	if err != nil {
		return false
	}
	server, serverReqs, err := nc.Accept()
	if err != nil {
		client.Close()
		for q := range r.queue(clientReqs) {
			_ = q.Reply(false, nil)
		}
		return true
	}
	k := r.newLink(permit.Use(), nil, client, r.queue(clientReqs), server, serverReqs)
	if !r.spawn(k.run) {
		r.abandon(server, serverReqs)
	}
	return true
}

// openAtClient opens a channel at the client, unless that ends first. x/crypto forgets an open that it sends in the
// moment when the connection ends, so nobody waits for the goroutine.
func (r *Relay) openAtClient(kind string, extra []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	type result struct {
		ch   ssh.Channel
		reqs <-chan *ssh.Request
		err  error
	}
	done := make(chan result, 1)
	go func() {
		ch, reqs, err := r.client.OpenChannel(kind, extra)
		done <- result{ch, reqs, err} // a channel of a client that has ended needs no closing
	}()
	select {
	case o := <-done:
		return o.ch, o.reqs, o.err
	case <-r.ctx.Done():
		return nil, nil, errors.New("the client is gone")
	}
}
