// Package relay carries channels and requests between one client and its upstream, by the rules of RFC 4254 and
// OpenSSH's PROTOCOL.
package relay

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// Client is what a front door offers of one local client. Channels and Requests are read by Run only.
type Client interface {
	ID() uint64
	Caller() use.Caller
	Target() use.Target
	// OpenSSH tells whether the client is OpenSSH's, which sends a session's whole set-up without waiting.
	OpenSSH() bool
	// Agent is the identity of the agent that the client would forward; it need not have one.
	Agent() string
	Channels() <-chan ssh.NewChannel
	Requests() <-chan *ssh.Request
	OpenChannel(kind string, extra []byte) (ssh.Channel, <-chan *ssh.Request, error)
	SendRequest(name string, wantReply bool, payload []byte) (bool, []byte, error)
	// Close cuts the client off.
	Close() error
}

const (
	// maxQueued bounds the requests and channel opens of one client that wait, and maxQueuedBytes what its global requests
	// hold, and the set-up of each session; a client past one of them is cut.
	maxQueued      = 4096
	maxQueuedBytes = 1 << 20
	// maxSessions bounds a client's sessions, started or not; a client past it is cut.
	maxSessions = 1024
	// flushTime is how long the server may take nothing of what a client sent before it left.
	flushTime = 5 * time.Second
	// lastWordTime is how long a client may take to read why it is cut.
	lastWordTime = time.Second
	// reassureEvery is below the smallest ServerAliveInterval that ssh takes.
	reassureEvery = 900 * time.Millisecond
	// maxUntold bounds the lines that wait for a session.
	maxUntold = 16
	// aliveEvery is how often a keepalive that must not be answered yet looks again.
	aliveEvery = 250 * time.Millisecond
)

// Relay is one client on its lease.
type Relay struct {
	client Client
	lease  *pool.Lease
	gate   use.Gate
	attach *use.Permit
	log    zerolog.Logger

	ctx     context.Context // ends with the client
	cancel  context.CancelFunc
	wg      sync.WaitGroup // what Run waits for: dispatch adds, and spawn until the client has ended
	cutting chan struct{}  // closed by Cut
	cutOnce sync.Once

	noMoreSessions atomic.Bool
	hadSession     atomic.Bool  // one has started
	opening        atomic.Int64 // channels of the client between its open and our answer

	globals globals

	mu        sync.Mutex // guards what follows
	links     map[*link]struct{}
	sessions  map[*session]struct{} // started or not
	listeners map[pool.Addr]*forward
	untold    []string // lines for the person, until there is a session to say them
	ended     bool     // spawn starts nothing more
}

// New prepares a relay for a client that has been let in. attach is its permit; Run ends neither it nor the lease.
func New(c Client, l *pool.Lease, gate use.Gate, attach *use.Permit, log zerolog.Logger) *Relay {
	r := &Relay{
		client: c, lease: l, gate: gate, attach: attach, log: log,
		links: map[*link]struct{}{}, sessions: map[*session]struct{}{}, listeners: map[pool.Addr]*forward{},
	}
	r.cutting = make(chan struct{})
	r.globals.init()
	l.Overflow = func() { r.cut("too many requests of the server wait") }
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Run relays until the client's transport has ended, and cuts it when an upstream ends that it uses. When it returns nothing
// works for the client any more.
func (r *Relay) Run() {
	r.wg.Go(r.serveGlobals)
	r.lease.Watch(func(loss pool.Loss) { r.spawn(func() { r.lost(loss) }) })
	r.dispatch()
	r.cancel()
	r.mu.Lock()
	r.ended = true
	r.mu.Unlock()
	r.wg.Wait()
	r.endForwards()
}

// spawn runs f in a goroutine that Run waits for; false means that the client has ended.
func (r *Relay) spawn(f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.ended {
		r.wg.Go(f)
	}
	return !r.ended
}

// cut ends a client that asks for more than is good for the others.
func (r *Relay) cut(why string) {
	r.log.Warn().Str("why", why).Msg("client cut")
	r.client.Close()
}

func (r *Relay) tooManySessions() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sessions) >= maxSessions
}

// dispatch takes what the client opens and asks, and never blocks. x/crypto hands channels and global requests over
// by two Go channels, but puts each there in the order of the wire: what was sent before something that has been
// received is already in the other one.
func (r *Relay) dispatch() {
	channels, requests := r.client.Channels(), r.client.Requests()
	takeChannels := func() {
		for {
			select {
			case nc, ok := <-channels:
				if !ok {
					channels = nil
					return
				}
				r.open(nc, false)
			default:
				return
			}
		}
	}
	take := func(q *ssh.Request) {
		if q.Type == "no-more-sessions@openssh.com" {
			takeChannels() // ssh opens its session, and then says so
		}
		r.request(q)
	}
	takeRequests := func() {
		for {
			select {
			case q, ok := <-requests:
				if !ok {
					requests = nil
					return
				}
				take(q)
			default:
				return
			}
		}
	}
	for channels != nil || requests != nil {
		select {
		case nc, ok := <-channels:
			if !ok {
				channels = nil
				continue
			}
			late := r.noMoreSessions.Load()
			takeRequests()
			r.open(nc, late)
		case q, ok := <-requests:
			if !ok {
				requests = nil
				continue
			}
			take(q)
		}
	}
}

// open starts what serves a channel of the client. It does not pass it on before the client's earlier global requests
// have been answered, or ExitOnForwardFailure would come too late. late: the client is known to have said
// no-more-sessions before. One that says it and opens a session in the same breath gets that session: the order of the
// two can't be told.
func (r *Relay) open(nc ssh.NewChannel, late bool) {
	earlier := r.globals.barrier()
	if r.opening.Add(1) > maxQueued {
		r.cut("too many channel opens wait")
	}
	r.wg.Go(func() { // a client that does not read must not block dispatch
		switch {
		case nc.ChannelType() == "session" && late:
			_ = nc.Reject(ssh.Prohibited, "no more sessions: the client said so itself")
			r.opening.Add(-1)
		case nc.ChannelType() == "session":
			r.session(nc, earlier)
		case nc.ChannelType() == "tun@openssh.com":
			// x/crypto joins packets, and a tun channel's packets are its frames.
			_ = nc.Reject(ssh.Prohibited, "muxproxy can't carry tun devices; set MUXPROXY_BYPASS=1")
			r.opening.Add(-1)
		default:
			r.direct(nc, earlier)
		}
	})
}

// direct serves direct-tcpip (RFC 4254 section 7.2), direct-streamlocal@openssh.com (PROTOCOL, 2.4) and, as the kind
// other, channels that have no name here.
func (r *Relay) direct(nc ssh.NewChannel, earlier <-chan struct{}) {
	ch, k, permit := r.openDirect(nc, earlier)
	r.opening.Add(-1)
	if ch == nil {
		return
	}
	k.run()
	permit.End(k.result())
}

func (r *Relay) openDirect(nc ssh.NewChannel, earlier <-chan struct{}) (ssh.Channel, *link, *use.Permit) {
	u := r.use(use.Other)
	u.Name = nc.ChannelType()
	switch nc.ChannelType() {
	case "direct-tcpip":
		var m pool.TCPChannel
		if err := ssh.Unmarshal(nc.ExtraData(), &m); err != nil {
			_ = nc.Reject(ssh.ConnectionFailed, "malformed direct-tcpip")
			return nil, nil, nil
		}
		u.Kind, u.Name, u.Addr = use.LocalForward, "", pool.Addr{Host: m.Host, Port: m.Port}.String()
	case "direct-streamlocal@openssh.com":
		var m pool.StreamlocalChannel
		if err := ssh.Unmarshal(nc.ExtraData(), &m); err != nil {
			_ = nc.Reject(ssh.ConnectionFailed, "malformed direct-streamlocal@openssh.com")
			return nil, nil, nil
		}
		u.Kind, u.Name, u.Addr = use.LocalForward, "", m.Path
	}
	if !r.wait(earlier) {
		return nil, nil, nil
	}
	permit, denied := r.gate.Decide(r.ctx, u, nil)
	if denied != nil {
		_ = nc.Reject(ssh.Prohibited, "muxproxy: "+denied.Error())
		return nil, nil, nil
	}
	server, serverReqs, err := r.lease.Open(r.ctx, permit, nc.ChannelType(), nc.ExtraData())
	if err != nil {
		reason, text := refusal(err)
		_ = nc.Reject(reason, text)
		permit.End(use.Result{Status: "refused", Err: text})
		return nil, nil, nil
	}
	client, clientReqs, err := nc.Accept()
	if err != nil {
		r.abandon(server, serverReqs)
		permit.End(use.Result{Status: "closed", Err: err.Error()})
		return nil, nil, nil
	}
	k := r.newLink(u, nil, client, r.queue(clientReqs), server, serverReqs)
	return client, k, permit
}

// refusal is what a client is told about an upstream's refusal: reason and text as they came.
func refusal(err error) (ssh.RejectionReason, string) {
	var e *ssh.OpenChannelError
	if errors.As(err, &e) {
		return e.Reason, e.Message
	}
	return ssh.ConnectionFailed, "muxproxy: " + err.Error()
}

// abandon closes an upstream channel that found no client.
func (r *Relay) abandon(server *pool.Channel, reqs <-chan *ssh.Request) {
	server.Close()
	r.lease.Discard(reqs)
}

// queue keeps a client's channel requests from blocking its connection; a client past the bound is cut.
func (r *Relay) queue(reqs <-chan *ssh.Request) <-chan *ssh.Request {
	return pool.Queue(reqs, func() { r.cut("too many channel requests wait") })
}

// wait returns true when earlier is closed, false if the client ends first.
func (r *Relay) wait(earlier <-chan struct{}) bool {
	select {
	case <-earlier:
		return true
	case <-r.ctx.Done():
		return false
	}
}

// Tell shows a line to the person about what the protocol has no words for. Without a session it waits for the next one;
// for ssh -N there is none, and ssh's own warning has to do.
func (r *Relay) Tell(line string) {
	r.mu.Lock()
	var oldest *session
	for s := range r.sessions {
		if oldest == nil || s.since.Before(oldest.since) {
			oldest = s
		}
	}
	if oldest == nil && len(r.untold) < maxUntold {
		r.untold = append(r.untold, line)
	}
	r.mu.Unlock()
	if oldest != nil {
		r.spawn(func() { oldest.say(line) }) // which waits for a client that does not read
	}
}

// use is a use of this client.
func (r *Relay) use(kind use.Kind) use.Use {
	return use.Use{Kind: kind, Client: r.client.ID(), Caller: r.client.Caller(), Target: r.client.Target()}
}

// lost cuts the client if it used the upstream that has ended. Cutting, and never an EOF: a truncated copy must not
// look complete.
func (r *Relay) lost(loss pool.Loss) {
	// Channels that the server had closed before still get to their end.
	inOrder := true
	for _, k := range r.snapshot() {
		switch {
		case k.server.Upstream() != loss.Upstream:
			continue
		case !k.server.ClosedInOrder():
			inOrder = false
			continue
		}
		select {
		case <-k.over:
		case <-r.cutting:
		case <-r.ctx.Done():
			return
		}
	}
	if inOrder && loss.Elsewhere && !r.listens(loss.Upstream) {
		return
	}
	if inOrder && r.hadSession.Load() {
		// An ssh whose session is over leaves by itself. Cut before, it fails at its next write, and forgets what it has
		// not read yet.
		t := time.NewTimer(flushTime)
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.cutting:
		case <-r.ctx.Done():
			return
		}
	}
	r.Cut(loss.Reason)
}

// listens tells whether the client has remote forwards on an upstream.
func (r *Relay) listens(upstream uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.listeners {
		if f.Upstream() == upstream {
			return true
		}
	}
	return false
}

// Cut ends the client, after its sessions have been told why, if they read.
func (r *Relay) Cut(reason error) {
	r.cutOnce.Do(func() { close(r.cutting) })
	line := reason.Error()
	var told sync.WaitGroup
	r.mu.Lock()
	for s := range r.sessions {
		told.Go(func() { s.lastWord(line) })
	}
	r.mu.Unlock()
	told.Wait()
	r.client.Close()
}

func (r *Relay) snapshot() []*link {
	r.mu.Lock()
	defer r.mu.Unlock()
	links := make([]*link, 0, len(r.links))
	for k := range r.links {
		links = append(links, k)
	}
	slices.SortFunc(links, func(a, b *link) int { return a.since.Compare(b.since) })
	return links
}

// Channel is one open channel or remote forward, for status.
type Channel struct {
	Use      use.Use
	Upstream uint64 // number of its upstream
	Since    time.Time
	In, Out  int64
}

// Channels lists what is open.
func (r *Relay) Channels() []Channel {
	var list []Channel
	for _, k := range r.snapshot() {
		list = append(list, Channel{
			Use: k.use, Upstream: k.server.Upstream(), Since: k.since, In: k.in.Load(), Out: k.out.Load(),
		})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.listeners {
		list = append(list, Channel{Use: f.permit.Use(), Upstream: f.Upstream(), Since: f.since})
	}
	return list
}
