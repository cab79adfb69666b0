//go:build linux

package e2e

import (
	"net"
	"sync"
	"testing"
	"time"
)

// link is a TCP proxy in front of an sshd. It counts connections, and can cut, stall and delay them.
type link struct {
	ln net.Listener
	wg sync.WaitGroup

	mu       sync.Mutex // guards all below
	cond     *sync.Cond // told when stalled or closed changes
	to       string
	accepted int
	live     int // that the near end has not closed
	most     int // of those, ever at once
	pairs    map[*pair]bool
	stalled  bool
	closed   bool
	delay    time.Duration
	trips    int  // how often somebody at the near end spoke after having heard something
	heard    bool // something went to the near end since
}

type pair struct{ near, far *net.TCPConn }

// end resets both connections: who is at their ends sees an error, not an EOF.
func (p *pair) end() {
	for _, c := range []*net.TCPConn{p.near, p.far} {
		c.SetLinger(0)
		c.Close()
	}
}

// newLink starts a proxy to the address. It ends with the test.
func newLink(t testing.TB, to string) *link { return newLinkFrom(t, listenTCP(t), to) }

// newLinkFrom starts one at a listener, which it owns.
func newLinkFrom(t testing.TB, ln net.Listener, to string) *link {
	l := &link{ln: ln, to: to, pairs: map[*pair]bool{}}
	l.cond = sync.NewCond(&l.mu)
	l.wg.Add(1)
	go l.accept()
	t.Cleanup(l.close)
	return l
}

func (l *link) port() int { return l.ln.Addr().(*net.TCPAddr).Port }

// count is how many connections were accepted so far.
func (l *link) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.accepted
}

// alive is how many connections the near end has not closed, and how many there ever were at once.
func (l *link) alive() (now, most int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.live, l.most
}

// open is how many connections stand now.
func (l *link) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.pairs)
}

// cut resets all present connections. New ones are welcome.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for p := range l.pairs {
		p.end()
	}
}

// stall holds every byte back, or lets them go.
func (l *link) stall(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stalled = on
	l.cond.Broadcast()
}

// lead makes later connections go somewhere else.
func (l *link) lead(to string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.to = to
}

// slow delays each byte by d in each direction from now on.
func (l *link) slow(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.delay = d
}

// roundTrips is how often the near ends have spoken after hearing something, since the last call.
func (l *link) roundTrips() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.trips
	l.trips, l.heard = 0, true
	return n
}

func (l *link) close() {
	l.ln.Close()
	l.mu.Lock()
	l.closed = true
	l.cond.Broadcast()
	for p := range l.pairs {
		p.end()
	}
	l.mu.Unlock()
	l.wg.Wait()
}

func (l *link) accept() {
	defer l.wg.Done()
	for {
		c, err := l.ln.Accept()
		if err != nil {
			return
		}
		near := c.(*net.TCPConn)
		l.mu.Lock()
		l.accepted++
		to := l.to
		l.mu.Unlock()
		f, err := net.Dial("tcp", to)
		if err != nil {
			near.SetLinger(0)
			near.Close()
			continue
		}
		p := &pair{near, f.(*net.TCPConn)}
		l.mu.Lock()
		if l.closed {
			l.mu.Unlock()
			p.end()
			return
		}
		l.pairs[p] = true
		l.live++
		l.most = max(l.most, l.live)
		l.mu.Unlock()
		l.wg.Add(1)
		go func() {
			defer l.wg.Done()
			var both sync.WaitGroup
			both.Go(func() {
				l.pump(p.far, p.near, true)
				l.mu.Lock()
				l.live--
				l.mu.Unlock()
			})
			both.Go(func() { l.pump(p.near, p.far, false) })
			both.Wait()
			l.mu.Lock()
			delete(l.pairs, p)
			l.mu.Unlock()
			p.near.Close()
			p.far.Close()
		}()
	}
}

// chunk is what one read gave; no bytes mean EOF.
type chunk struct {
	b   []byte
	due time.Time
}

// pump copies one direction. Reader and writer are apart, so that a delay costs time and no throughput.
func (l *link) pump(dst, src *net.TCPConn, up bool) {
	queue := make(chan chunk, 256)
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(queue)
		for {
			b := make([]byte, 32<<10)
			n, err := src.Read(b)
			l.mu.Lock()
			due := time.Now().Add(l.delay)
			if up && n > 0 && l.heard {
				l.trips++
				l.heard = false
			}
			l.mu.Unlock()
			if n > 0 {
				queue <- chunk{b[:n], due}
			}
			if err != nil {
				queue <- chunk{nil, due}
				return
			}
		}
	})
	broken := false
	for c := range queue {
		if broken {
			continue // the reader must not block; its connection is closed below
		}
		time.Sleep(time.Until(c.due)) // the delay itself; nothing waits for it to have passed
		l.mu.Lock()
		for l.stalled && !l.closed {
			l.cond.Wait()
		}
		l.heard = l.heard || !up && c.b != nil
		l.mu.Unlock()
		if c.b == nil {
			dst.CloseWrite()
			continue
		}
		if _, err := dst.Write(c.b); err != nil {
			broken = true
			src.Close()
		}
	}
	reader.Wait()
}

// listenTCP listens on a free loopback port outside of the range that the kernel gives to outgoing connections, so that
// no connection of a test beside this one takes the port in between.
func listenTCP(t testing.TB) net.Listener {
	t.Helper()
	for range 200 {
		ln, err := net.Listen("tcp", loopback(somePort()))
		if err == nil {
			return ln
		}
	}
	t.Fatal("no free port on loopback")
	return nil
}

// freePort returns a port that nobody listens on.
func freePort(t testing.TB) int {
	t.Helper()
	ln := listenTCP(t)
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port
}

// snapshot are the connections that stand now.
func (l *link) snapshot() []*pair {
	l.mu.Lock()
	defer l.mu.Unlock()
	var pairs []*pair
	for p := range l.pairs {
		pairs = append(pairs, p)
	}
	return pairs
}
