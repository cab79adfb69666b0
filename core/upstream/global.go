package upstream

import (
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// replyTime is how long a server may take to answer a global request before others stop waiting behind it.
	replyTime = 30 * time.Second
	// slowReply is after how long a sign of life is not expected of an outstanding global request any more.
	slowReply = time.Second
	keepalive = "keepalive@openssh.com"
)

// globals are the global requests of ours that want a reply. Replies carry no ids (RFC 4254 section 4), so there is one
// request at a time, and one that the server never answers is the last: x/crypto/ssh would let all others wait for ever.
type globals struct {
	mu          sync.Mutex // guards outstanding
	outstanding *outstanding
}

// outstanding is a global request without a reply.
type outstanding struct {
	name  string
	since time.Time
	done  chan struct{} // closed when its reply has come
}

// begin returns the new request, or the one that has to be answered before.
func (g *globals) begin(name string) (own, other *outstanding) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.outstanding != nil {
		return nil, g.outstanding
	}
	g.outstanding = &outstanding{name, time.Now(), make(chan struct{})}
	return g.outstanding, nil
}

// end is called when the reply to o has come, or the connection has ended.
func (g *globals) end(o *outstanding) {
	g.mu.Lock()
	g.outstanding = nil
	g.mu.Unlock()
	close(o.done)
}

// SendRequest sends a global request (RFC 4254 section 4) and waits for its reply, if it wants one, as long as the connection
// lives. It does not wait longer than replyTime for the reply to another one that came before.
func (c *conn) SendRequest(name string, wantReply bool, payload []byte) (bool, []byte, error) {
	if !wantReply {
		return c.Conn.SendRequest(name, false, payload)
	}
	for {
		own, other := c.globals.begin(name)
		if own != nil {
			defer c.globals.end(own)
			return c.Conn.SendRequest(name, true, payload)
		}
		late := time.NewTimer(replyTime - time.Since(other.since))
		select {
		case <-other.done:
			late.Stop()
		case <-late.C:
			return false, nil, &Error{Host: c.t.host, Msg: fmt.Sprintf(
				"the server has not answered the request %s for %s, and can't be asked for more", use.Printable(other.name), replyTime)}
		case <-c.ended:
			late.Stop()
			return false, nil, net.ErrClosed
		}
	}
}

// pinger asks for signs of life, one at a time: by a keepalive, or while that would have to wait, and some servers never
// answer one, by opening a channel of a type that no server has. Its refusal carries an id (RFC 4254 section 5.1).
func (c *conn) pinger() {
	var asked sync.WaitGroup
	defer asked.Wait()
	opening := make(chan struct{}, 1)
	for {
		select {
		case <-c.ping:
		case <-c.ended:
			return
		}
		for {
			own, other := c.globals.begin(keepalive)
			if own != nil {
				asked.Go(func() {
					defer c.globals.end(own)
					_, _, _ = c.Conn.SendRequest(keepalive, true, nil) // any answer will do; an error is the connection's end
				})
				break
			}
			slow := time.NewTimer(slowReply - time.Since(other.since))
			select {
			case <-other.done:
				slow.Stop()
				continue
			case <-c.ended:
				slow.Stop()
				return
			case <-slow.C:
			}
			select {
			case <-other.done:
				continue
			case <-c.ended:
				return
			case opening <- struct{}{}:
			}
			// Not one that is waited for: x/crypto/ssh forgets an open that it sends in the moment when the connection ends.
			go func() {
				defer func() { <-opening }()
				if ch, requests, err := c.Conn.OpenChannel(keepalive, nil); err == nil {
					ch.Close()
					ssh.DiscardRequests(requests)
				}
			}()
			break
		}
	}
}
