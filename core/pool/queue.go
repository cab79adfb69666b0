package pool

import "golang.org/x/crypto/ssh"

const (
	// maxQueued and maxQueuedBytes bound the requests that wait for someone who does not take them.
	maxQueued      = 4096
	maxQueuedBytes = 1 << 20
)

// Queue takes requests from in without ever letting them wait there: x/crypto stops reading the whole connection at
// the 17th that nobody takes (chanSize in its mux.go). It ends, and closes what it returns, when in is closed and the
// rest has been taken. Past a bound overflow is called, once, and all further requests are dropped; it must end the
// connection or channel that sends them. The returned channel must be drained.
func Queue(in <-chan *ssh.Request, overflow func()) <-chan *ssh.Request {
	out := make(chan *ssh.Request)
	go queue(in, out, nil, func() {}, overflow)
	return out
}

// queue is Queue; mine may keep a request for itself, and must not block; closed is called when in is closed.
func queue(in <-chan *ssh.Request, out chan<- *ssh.Request, mine func(*ssh.Request) bool, closed, overflow func()) {
	defer close(out)
	var waiting []*ssh.Request
	size := 0 // bytes of payload in waiting
	over := false
	for in != nil || len(waiting) > 0 {
		var next *ssh.Request
		var to chan<- *ssh.Request
		if len(waiting) > 0 {
			next, to = waiting[0], out
		}
		select {
		case r, ok := <-in:
			switch {
			case !ok:
				closed()
				in = nil
			case mine != nil && mine(r):
			case len(waiting) < maxQueued && size+len(r.Payload) <= maxQueuedBytes && !over:
				waiting = append(waiting, r)
				size += len(r.Payload)
			case !over:
				over = true
				// Not here: ending a connection may wait for its reader, which may wait for us.
				go overflow()
			}
		case to <- next:
			size -= len(next.Payload)
			waiting[0] = nil
			waiting = waiting[1:]
		}
	}
}
