// Package link simulates a network link in user space: a TCP forwarder on loopback whose connections share a delay, a
// bandwidth and a bounded queue.
//
// TCP at either end never sees a loss. What holds a sender back instead is that the link reads no more of it than fits
// into the queue and onto the wire, with small socket buffers on the link's side, so that the rest waits in the
// sender's own socket as it would before a real bottleneck. Not simulated are losses, slow start, and the bytes of
// headers. A connection costs its round trips: the server sees it after one and a half, and bytes of the client leave
// after one. Since the kernel answers for the listener, connect(2) itself returns at once.
package link

import (
	"context"
	"io"
	"net"
	"sync"
	"time"
)

// Config is what a link is like, in both directions.
type Config struct {
	RTT       time.Duration // of an empty link: half of it each way
	Bandwidth int64         // bits per second each way; 0: no limit
	// Queue bounds the bytes that wait for the bandwidth: with Fair those of each connection, else those of all
	// together. Each connection may go beyond by one read. 0: one bandwidth-delay product, at least 64 KiB.
	Queue int
	// Fair gives each connection its turn (deficit round robin, RFC 8290 without CoDel, for which a small Queue stands),
	// as a router with fq_codel does. Otherwise the first come is the first served.
	Fair bool
}

const (
	// quantum is a connection's turn in bytes, and what it reads at once: a packet of Ethernet.
	quantum = 1500
	// fastQuantum is what is read at once where packets would come faster than anyone wakes up.
	fastQuantum = 32 << 10
	// fast is the bandwidth from which on fastQuantum counts, in bits per second; a turn then is several packets.
	fast = 200e6
	// window bounds what is under way of one connection where bandwidth doesn't, as Linux's tcp_wmem does.
	window = 4 << 20
	// buffer is SO_RCVBUF of the link's sockets: bytes there wait in no queue that the link knows of.
	buffer = 16 << 10
	// dialTimeout bounds the connection with the server, which is on this machine.
	dialTimeout = 10 * time.Second
)

// Link is a link to one address. All its methods may be called from any goroutine.
type Link struct {
	config   Config
	to       string
	ln       net.Listener
	up, down *direction // from and to the clients
	wg       sync.WaitGroup
	ctx      context.Context // ends with the link
	cancel   context.CancelFunc

	mu       sync.Mutex // guards all below
	accepted int
	conns    map[*net.TCPConn]bool
	closed   bool
}

// New starts a link from a free loopback port to a TCP address. The caller closes it.
func New(to string, c Config) (*Link, error) {
	size := quantum
	if c.Bandwidth == 0 || c.Bandwidth >= fast {
		size = fastQuantum
	}
	lc := net.ListenConfig{Control: small(rcvbuf(c))}
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &Link{config: c, to: to, ln: ln, conns: map[*net.TCPConn]bool{}}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.up, l.down = newDirection(l.ctx, c, size), newDirection(l.ctx, c, size)
	for _, d := range []*direction{l.up, l.down} {
		l.wg.Go(d.send)
	}
	l.wg.Go(l.accept)
	return l, nil
}

// rcvbuf is SO_RCVBUF for a link's sockets: larger where it would else be what bounds the bandwidth, for the link may
// have to wait some milliseconds for a processor.
func rcvbuf(c Config) int {
	if c.Bandwidth == 0 {
		return 1 << 20
	}
	return max(buffer, int(c.Bandwidth/8/250))
}

// Addr is where clients connect.
func (l *Link) Addr() *net.TCPAddr { return l.ln.Addr().(*net.TCPAddr) }

// Accepted is how many connections there have been.
func (l *Link) Accepted() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.accepted
}

// Cut makes the link swallow everything from now on, or carry again what it has. Nobody is told: connections stay, and
// what was under way or is sent meanwhile arrives after the cut, as retransmissions would.
func (l *Link) Cut(on bool) {
	l.up.setCut(on)
	l.down.setCut(on)
}

// Close ends all connections by a reset and returns when nothing of the link runs any more.
func (l *Link) Close() error {
	err := l.ln.Close()
	l.cancel()
	l.mu.Lock()
	l.closed = true
	for c := range l.conns {
		reset(c)
	}
	l.mu.Unlock()
	l.up.end()
	l.down.end()
	l.wg.Wait()
	return err
}

// reset closes a connection so that its peer sees an error, not an end.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

func (l *Link) accept() {
	for {
		c, err := l.ln.Accept()
		if err != nil {
			if l.ctx.Err() != nil {
				return
			}
			// Out of descriptors, for instance.
			if l.sleep(10*time.Millisecond) != nil {
				return
			}
			continue
		}
		near := c.(*net.TCPConn)
		if !l.keep(near) {
			return
		}
		l.mu.Lock()
		l.accepted++
		l.mu.Unlock()
		l.wg.Go(func() { l.serve(near) })
	}
}

// keep registers a connection for Close; false says that the link is closed, and so is the connection.
func (l *Link) keep(c *net.TCPConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		reset(c)
		return false
	}
	l.conns[c] = true
	return true
}

func (l *Link) forget(c *net.TCPConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, c)
}

// sleep waits unless the link ends first.
func (l *Link) sleep(d time.Duration) error {
	if d <= 0 {
		return l.ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-l.ctx.Done():
		return l.ctx.Err()
	case <-t.C:
		return nil
	}
}

// serve carries one connection.
func (l *Link) serve(near *net.TCPConn) {
	defer l.forget(near)
	// SYN and SYN-ACK. Then the client may send, and its ACK, with which the server's accept(2) returns, leaves.
	if l.sleep(l.config.RTT) != nil {
		reset(near)
		return
	}
	up := l.up.take(near)
	far, err := l.dial()
	if err != nil {
		up.give(nil)
		return
	}
	defer l.forget(far)
	down := l.down.take(far)
	var both sync.WaitGroup
	both.Go(func() { up.give(far) })
	both.Go(func() { down.give(near) })
	both.Wait()
	near.Close()
	far.Close()
}

// dial connects to the server, half a round trip from now.
func (l *Link) dial() (*net.TCPConn, error) {
	if err := l.sleep(l.config.RTT / 2); err != nil {
		return nil, err
	}
	if !l.up.passable() {
		return nil, net.ErrClosed
	}
	d := net.Dialer{Timeout: dialTimeout, Control: small(rcvbuf(l.config))}
	c, err := d.DialContext(l.ctx, "tcp", l.to)
	if err != nil {
		return nil, err
	}
	far := c.(*net.TCPConn)
	if !l.keep(far) {
		return nil, net.ErrClosed
	}
	return far, nil
}

// direction is one of the two.
type direction struct {
	ctx    context.Context
	size   int // of a read
	limit  int // of the queue, in bytes
	window int // of one flow under way
	wake   chan struct{}

	mu    sync.Mutex // guards all below, and the flows
	room  *sync.Cond // told when something left, and when cut or over change
	sched scheduler
	cut   bool
	over  bool
}

func newDirection(ctx context.Context, c Config, size int) *direction {
	rate := float64(c.Bandwidth) / 8
	bdp := int(rate * c.RTT.Seconds())
	limit := c.Queue
	if limit == 0 {
		limit = max(bdp, 64<<10)
	}
	w := window
	if rate > 0 {
		w = limit + bdp + 64<<10
	}
	d := &direction{ctx: ctx, size: size, limit: limit, window: w, wake: make(chan struct{}, 1)}
	d.room = sync.NewCond(&d.mu)
	d.sched = scheduler{rate: rate, delay: c.RTT / 2, fair: c.Fair}
	return d
}

func (d *direction) setCut(on bool) {
	d.mu.Lock()
	d.cut = on
	d.mu.Unlock()
	d.room.Broadcast()
	d.nudge()
}

func (d *direction) end() {
	d.mu.Lock()
	d.over = true
	d.mu.Unlock()
	d.room.Broadcast()
}

// passable waits for the end of a cut; false says that the link has ended.
func (d *direction) passable() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.cut && !d.over {
		d.room.Wait()
	}
	return !d.over
}

// nudge tells send to look again.
func (d *direction) nudge() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// send is the wire: it takes what is queued at the link's rate.
func (d *direction) send() {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		d.mu.Lock()
		var c *chunk
		var wait time.Duration
		if !d.cut {
			c, wait = d.sched.next(time.Now())
		}
		if c != nil {
			c.flow.line.put(c)
		}
		d.mu.Unlock()
		if c != nil {
			d.room.Broadcast()
			continue
		}
		if wait == 0 {
			wait = time.Hour // until woken
		}
		t.Reset(wait)
		select {
		case <-d.ctx.Done():
			return
		case <-d.wake:
		case <-t.C:
		}
	}
}

// half is one direction of one connection.
type half struct {
	d      *direction
	f      *flow
	src    *net.TCPConn
	reader sync.WaitGroup
}

// take begins to read from a connection. The caller calls give once.
func (d *direction) take(src *net.TCPConn) *half {
	h := &half{d: d, f: &flow{}, src: src}
	h.f.line.init()
	h.reader.Go(h.read)
	return h
}

func (h *half) read() {
	d, f := h.d, h.f
	buf := make([]byte, d.size)
	for {
		n, err := h.src.Read(buf)
		d.mu.Lock()
		now := time.Now()
		if n > 0 {
			d.sched.add(&chunk{flow: f, b: append([]byte(nil), buf[:n]...), arrived: now})
			f.under += n
		}
		if err == io.EOF {
			d.sched.add(&chunk{flow: f, arrived: now})
		}
		d.mu.Unlock()
		d.nudge()
		if err != nil && err != io.EOF {
			f.line.end() // give resets both
		}
		if err != nil || !d.admit(f) {
			return
		}
	}
}

// give writes to the other connection, nil if there is none, and returns when the first one has ended and all has been
// written, or nothing can be any more: an error on either side resets both.
func (h *half) give(dst *net.TCPConn) {
	if dst == nil || !h.d.deliver(h.f, dst) {
		if dst != nil {
			reset(dst)
		}
		reset(h.src)
	}
	h.d.mu.Lock()
	h.f.over = true
	h.d.mu.Unlock()
	h.d.room.Broadcast()
	h.reader.Wait()
}

// admit waits until another read of a flow fits; false says that nobody takes it any more.
func (d *direction) admit(f *flow) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.over && !f.over && (d.cut || d.full(f) || f.under >= d.window) {
		d.room.Wait()
	}
	return !d.over && !f.over
}

func (d *direction) full(f *flow) bool {
	if d.sched.fair {
		return f.queued >= d.limit
	}
	return d.sched.queued >= d.limit
}

// deliver writes what comes out of the wire when it is due. It returns after the end of the flow, or false.
func (d *direction) deliver(f *flow, dst *net.TCPConn) bool {
	delivered := make(chan struct{})
	var watcher sync.WaitGroup
	watcher.Go(func() {
		select {
		case <-f.line.broken: // a write may be waiting for somebody who does not read
			dst.SetWriteDeadline(time.Unix(1, 0))
		case <-delivered:
		}
	})
	defer watcher.Wait()
	defer close(delivered)
	for {
		c := f.line.next(d.ctx)
		if c == nil || !d.passable() {
			return false
		}
		if len(c.b) == 0 {
			dst.CloseWrite()
			return true
		}
		_, err := dst.Write(c.b)
		d.mu.Lock()
		f.under -= len(c.b)
		d.mu.Unlock()
		d.room.Broadcast()
		if err != nil {
			return false
		}
	}
}

// line is the wire's length: chunks in the order of their dues.
type line struct {
	mu     sync.Mutex // guards chunks
	chunks []*chunk
	more   chan struct{} // one waits for it
	broken chan struct{} // closed by end
}

func (l *line) init() { l.more, l.broken = make(chan struct{}, 1), make(chan struct{}) }

func (l *line) put(c *chunk) {
	l.mu.Lock()
	l.chunks = append(l.chunks, c)
	l.mu.Unlock()
	select {
	case l.more <- struct{}{}:
	default:
	}
}

func (l *line) pop() *chunk {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.chunks) == 0 {
		return nil
	}
	c := l.chunks[0]
	l.chunks[0], l.chunks = nil, l.chunks[1:]
	return c
}

// next waits for a chunk, and until it is due; nil if the line breaks or ctx ends before.
func (l *line) next(ctx context.Context) *chunk {
	c := l.pop()
	for c == nil {
		select {
		case <-l.more:
		case <-l.broken:
			return nil
		case <-ctx.Done():
			return nil
		}
		c = l.pop()
	}
	if wait := time.Until(c.due); wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-l.broken:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
	return c
}

// end breaks the line: what it still holds is lost. It is called once.
func (l *line) end() { close(l.broken) }
