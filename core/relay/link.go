package relay

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/buffer"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// eofGrace is how long an EOF is doubted. x/crypto reports one on every channel when the connection ends. The
// upstream says beforehand that its transport failed, but for a DISCONNECT or a protocol error only right after.
const eofGrace = 10 * time.Millisecond

// link joins a client's channel to an upstream's.
type link struct {
	relay      *Relay
	use        use.Use
	client     ssh.Channel
	clientReqs <-chan *ssh.Request
	server     *pool.Channel
	serverReqs <-chan *ssh.Request
	since      time.Time

	in, out atomic.Int64

	turn     turn // nil: not a session
	terminal bool // a session with a pty

	clientClosed chan struct{} // the client has closed its side, or is gone
	serverClosed chan struct{} // the upstream has closed its side, or is gone, and its requests have been passed on
	ended        chan struct{} // an exit status or signal has been passed on
	stderrDone   chan struct{} // all of stderr has been passed on
	over         chan struct{} // run has returned

	status atomic.Pointer[use.Result] // how the program ended, set before ended is closed
}

// newLink makes a link and lists it; run takes it out again. turn is nil for a channel without stderr.
func (r *Relay) newLink(u use.Use, turn turn, client ssh.Channel, clientReqs <-chan *ssh.Request,
	server *pool.Channel, serverReqs <-chan *ssh.Request) *link {
	k := &link{
		relay: r, use: u, client: client, clientReqs: clientReqs, server: server, serverReqs: serverReqs,
		since: time.Now(), turn: turn, clientClosed: make(chan struct{}), serverClosed: make(chan struct{}),
		ended: make(chan struct{}), stderrDone: make(chan struct{}), over: make(chan struct{}),
	}
	r.mu.Lock()
	r.links[k] = struct{}{}
	r.mu.Unlock()
	return k
}

func (k *link) isSession() bool { return k.turn != nil }

// run relays data and requests until one side has closed, and closes the other. What the client sent last still goes
// to the server (x/crypto has told the client that it has); what the server sent last goes to the client as long as that reads. If the upstream has
// ended, the client's channel stays open: the client is about to be cut.
func (k *link) run() {
	defer func() {
		k.relay.mu.Lock()
		delete(k.relay.links, k)
		k.relay.mu.Unlock()
		close(k.over)
		if k.classed() {
			k.relay.lease.NoteMoved(k.use, max(k.in.Load(), k.out.Load()))
		}
	}()
	upDone := make(chan struct{})
	downDone := make(chan struct{})
	k.relay.lease.Go(k.clientRequests)
	k.relay.lease.Go(k.serverRequests)
	k.relay.lease.Go(func() {
		defer close(upDone)
		k.copyUp()
	})
	k.relay.lease.Go(func() {
		defer close(downDone)
		k.copyDown()
	})

	select {
	case <-k.clientClosed:
		k.await(upDone)
		k.server.Close()
		// The server has all that was sent when it closes too. The upstream may end with this client, and a connection
		// that is closed with something unread takes back what the network has not taken yet.
		k.await(k.serverClosed)
	case <-k.serverClosed:
		<-downDone
		if k.serverLives() {
			k.client.Close()
		}
	}
}

// await waits for done, on behalf of a client that has closed its channel. Once the client is gone altogether, the
// server is given up when it takes nothing for flushTime.
func (k *link) await(done <-chan struct{}) {
	gone := k.relay.ctx.Done()
	var tick <-chan time.Time // once the client is gone
	before := int64(-1)
	for {
		select {
		case <-done:
			return
		case <-k.serverClosed:
			return
		case <-k.relay.cutting:
			return
		case <-gone:
			gone = nil
			t := time.NewTicker(flushTime)
			defer t.Stop()
			tick = t.C
		case <-tick:
			now := k.in.Load()
			if now == before {
				return
			}
			before = now
		}
	}
}

// copyUp carries the client's data to the server. It ends with either channel.
func (k *link) copyUp() {
	if k.copy(k.server, k.client, &k.in, true) == nil {
		_ = k.server.CloseWrite() // RFC 4254 section 5.3: EOF is not CLOSE
	}
}

// copyDown carries the server's data to the client, and its EOF when that is one.
func (k *link) copyDown() {
	var stderr sync.WaitGroup
	if k.isSession() {
		stderr.Go(func() {
			defer close(k.stderrDone)
			_ = k.copy(turnWriter{k.turn, k.client}, k.server.Stderr(), &k.out, false)
		})
	}
	err := k.copy(k.client, k.server, &k.out, false)
	stderr.Wait()
	if err != nil || !k.serverLives() {
		return
	}
	if k.isSession() && !k.relay.noMoreSessions.Load() {
		// An ssh that is itself a ControlMaster answers EOF with CLOSE, x/crypto answers that at once and forgets the
		// channel, and the exit status is lost. Such a client never says no-more-sessions.
		select {
		case <-k.ended:
		case <-k.serverClosed:
		case <-k.clientClosed:
			return
		}
		if k.server.Down() {
			return
		}
	}
	k.turn.closeWrite(k.client)
}

// serverLives tells the server's own EOF or CLOSE from the end of the connection in mid-session. A server that serves one
// session only closes the connection right after the channel: what it sent before counts.
func (k *link) serverLives() bool {
	if !k.server.Down() {
		select {
		case <-k.ended:
			return true
		default:
		}
		t := time.NewTimer(eofGrace)
		defer t.Stop()
		select {
		case <-k.ended:
			return true
		case <-k.server.Lost():
		case <-t.C:
			if !k.server.Down() {
				return true
			}
		}
	}
	return k.server.ClosedInOrder()
}

// copy moves data until src ends; nil means that it ended by EOF.
func (k *link) copy(dst io.Writer, src io.Reader, count *atomic.Int64, up bool) error {
	var b buffer.Buffer
	defer b.Release()
	for {
		buf := b.Next()
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
			b.Took(n)
			k.moved(count.Add(int64(n)), int64(n))
			if up {
				k.server.Count(int64(n), 0)
			} else {
				k.server.Count(0, int64(n))
			}
		}
		switch {
		case n > 0: // an error beside data is that of a window adjustment; there may be more
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// moved notes that a session without a terminal has moved much, once.
func (k *link) moved(total, n int64) {
	if total >= pool.BulkBytes && total-n < pool.BulkBytes && k.classed() {
		k.relay.lease.NoteMoved(k.use, total)
	}
}

// classed tells whether what the session moves says something about those that run the same.
func (k *link) classed() bool { return k.isSession() && !k.terminal }

// turn is held by whoever writes to a client's stderr, or ends its streams: x/crypto allows one at a time. nil: there
// is no stderr.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) closeWrite(client ssh.Channel) {
	if t != nil {
		t <- struct{}{}
		defer func() { <-t }()
	}
	_ = client.CloseWrite() // a client that is gone needs no EOF
}

// turnWriter writes to a client's stderr when it is its turn.
type turnWriter struct {
	turn   turn
	client ssh.Channel
}

func (w turnWriter) Write(p []byte) (int, error) {
	w.turn <- struct{}{}
	defer func() { <-w.turn }()
	return w.client.Stderr().Write(p)
}

// clientRequests passes the client's channel requests on as they come (RFC 4254 section 5.4), those after the start.
func (k *link) clientRequests() {
	defer close(k.clientClosed)
	for q := range k.clientReqs {
		if _, start := startKind(q.Type); start || q.Type == "x11-req" || isAgentRequest(q.Type) {
			_ = q.Reply(false, nil) // too late
			continue
		}
		k.relay.forward(k.server, q)
	}
}

// serverRequests passes the server's channel requests on as they come. An exit status never waits for EOF: the server
// may send it before the last data.
func (k *link) serverRequests() {
	defer close(k.serverClosed)
	for q := range k.serverReqs {
		switch q.Type {
		case "exit-status":
			var m struct{ Status uint32 }
			if err := ssh.Unmarshal(q.Payload, &m); err == nil {
				k.status.Store(&use.Result{Status: "exit", ExitCode: &m.Status})
			}
		case "exit-signal":
			var m struct {
				Signal     string
				CoreDumped bool
				Error      string
				Lang       string
			}
			if err := ssh.Unmarshal(q.Payload, &m); err == nil {
				k.status.Store(&use.Result{Status: "signal", Signal: m.Signal})
			}
		}
		k.relay.forward(k.client, q)
		if q.Type == "exit-status" || q.Type == "exit-signal" {
			select {
			case <-k.ended: // twice; the client's business
			default:
				close(k.ended)
			}
		}
	}
}

// forward sends a channel request on and its reply back, if one is wanted.
func (r *Relay) forward(to ssh.Channel, q *ssh.Request) bool {
	ok, err := r.ask(to, q.Type, q.WantReply, q.Payload)
	_ = q.Reply(ok && err == nil, nil)
	return ok && err == nil
}

// ask is SendRequest that ends with the client. A reply that comes later is thrown away; the goroutine that waits for
// it ends with the channel.
func (r *Relay) ask(to ssh.Channel, name string, wantReply bool, payload []byte) (bool, error) {
	if !wantReply {
		return to.SendRequest(name, false, payload)
	}
	type reply struct {
		ok  bool
		err error
	}
	done := make(chan reply, 1)
	r.lease.Go(func() {
		ok, err := to.SendRequest(name, true, payload)
		done <- reply{ok, err}
	})
	select {
	case a := <-done:
		return a.ok, a.err
	case <-r.ctx.Done():
		return false, r.ctx.Err()
	}
}

// result is how the link ended, for the audit.
func (k *link) result() use.Result {
	res := use.Result{Status: "closed"}
	if st := k.status.Load(); st != nil {
		res = *st
	}
	if k.server.Down() && res.ExitCode == nil && res.Signal == "" {
		res.Status = "cut"
	}
	res.In, res.Out = k.in.Load(), k.out.Load()
	return res
}
