package link

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience bounds what has to come at once.
const patience = 20 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a link with a server behind it that hands out its connections.
type world struct {
	t     *testing.T
	link  *Link
	conns chan *net.TCPConn
}

func newWorld(t *testing.T, c Config) *world {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, conns: make(chan *net.TCPConn)}
	over := make(chan struct{})
	var server sync.WaitGroup
	server.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			select {
			case w.conns <- c.(*net.TCPConn):
			case <-over:
				c.Close()
			}
		}
	})
	if w.link, err = New(ln.Addr().String(), c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.link.Close()
		close(over)
		ln.Close()
		server.Wait()
	})
	return w
}

// pair is a connection through the link, its client first.
func (w *world) pair() (client, server *net.TCPConn) {
	w.t.Helper()
	c, err := net.Dial("tcp", w.link.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	select {
	case s := <-w.conns:
		w.t.Cleanup(func() { s.Close() })
		return c.(*net.TCPConn), s
	case <-time.After(patience):
		w.t.Fatal("no connection arrives")
		panic("unreachable")
	}
}

// send writes a text and insists that exactly that arrives.
func send(t *testing.T, from, to *net.TCPConn, text string) time.Duration {
	t.Helper()
	start := time.Now()
	if _, err := from.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	to.SetReadDeadline(time.Now().Add(patience))
	got := make([]byte, len(text))
	if _, err := io.ReadFull(to, got); err != nil || string(got) != text {
		t.Fatalf("%q, %v; want %q", got, err, text)
	}
	return time.Since(start)
}

func TestDelay(t *testing.T) {
	const rtt = 60 * time.Millisecond
	w := newWorld(t, Config{RTT: rtt})
	start := time.Now()
	c, s := w.pair()
	if d := time.Since(start); d < rtt*3/2 {
		t.Errorf("the server saw the connection after %v; a round trip is %v", d, rtt)
	}
	there, back := send(t, c, s, "there"), send(t, s, c, "back")
	if there < rtt/2 || back < rtt/2 || there+back > rtt+5*time.Second {
		t.Errorf("%v there, %v back; a round trip is %v", there, back, rtt)
	}
	if w.link.Accepted() != 1 {
		t.Errorf("%d connections", w.link.Accepted())
	}
}

func TestThroughput(t *testing.T) {
	const size, rate = 1 << 20, 40e6 // bits per second: 0.21 s
	w := newWorld(t, Config{RTT: 10 * time.Millisecond, Bandwidth: rate})
	c, s := w.pair()
	for name, ends := range map[string][2]*net.TCPConn{"up": {c, s}, "down": {s, c}} {
		start := time.Now()
		var writer sync.WaitGroup
		writer.Go(func() { ends[0].Write(make([]byte, size)) })
		ends[1].SetReadDeadline(time.Now().Add(patience))
		n, err := io.CopyN(io.Discard, ends[1], size)
		writer.Wait()
		ideal := time.Duration(float64(size*8) / rate * float64(time.Second))
		if took := time.Since(start); err != nil || took < ideal || took > 10*ideal {
			t.Errorf("%s: %d bytes in %v, %v; at this bandwidth it takes %v", name, n, took, err, ideal)
		}
	}
}

// While one connection has more to send than the link takes, another one's byte waits for its turn or for the queue.
func TestQueue(t *testing.T) {
	const rate, queue = 8e6, 256 << 10 // a queue of 262 ms
	ideal := time.Duration(float64(queue*8) / rate * float64(time.Second))
	measure := func(fair bool) time.Duration {
		w := newWorld(t, Config{Bandwidth: rate, Queue: queue, Fair: fair})
		bc, bs := w.pair()
		ec, es := w.pair()
		var writer sync.WaitGroup
		writer.Go(func() {
			for {
				if _, err := bc.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		})
		// When this much has come out, the queue has been full for long.
		bs.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.CopyN(io.Discard, bs, 2*queue); err != nil {
			t.Fatal(err)
		}
		var reader sync.WaitGroup
		reader.Go(func() { io.Copy(io.Discard, bs) })
		best := patience
		for range 3 {
			best = min(best, send(t, ec, es, "x"))
		}
		w.link.Close()
		writer.Wait()
		reader.Wait()
		return best
	}
	plain, fair := measure(false), measure(true)
	if plain < ideal/2 {
		t.Errorf("plain: a byte passed a queue of %v in %v", ideal, plain)
	}
	if fair > plain/2 {
		t.Errorf("fair: a byte took %v, plain: %v", fair, plain)
	}
}

func TestFairness(t *testing.T) {
	w := newWorld(t, Config{Bandwidth: 16e6, Fair: true})
	var servers []*net.TCPConn
	var all sync.WaitGroup
	for range 2 {
		c, s := w.pair()
		servers = append(servers, s)
		all.Go(func() {
			for {
				if _, err := c.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		})
	}
	// Once the second one is under way, each gets as much as the other.
	if _, err := io.CopyN(io.Discard, servers[1], 64<<10); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, servers[0], 64<<10); err != nil {
		t.Fatal(err)
	}
	var got [2]int64
	until := time.Now().Add(500 * time.Millisecond)
	var readers sync.WaitGroup
	for i, s := range servers {
		s.SetReadDeadline(until)
		readers.Go(func() { got[i], _ = io.Copy(io.Discard, s) })
	}
	readers.Wait()
	w.link.Close()
	all.Wait()
	if small, large := min(got[0], got[1]), max(got[0], got[1]); small < large/2 || large == 0 {
		t.Errorf("%d and %d bytes", got[0], got[1])
	}
}

// What nobody reads fills the link up to its bounds, and then the sender waits.
func TestBounded(t *testing.T) {
	for name, config := range map[string]Config{
		"plain":     {Bandwidth: 1e9, Queue: 64 << 10},
		"fair":      {Bandwidth: 1e9, Queue: 64 << 10, Fair: true},
		"no limits": {},
		// Slower than the test writes, so that what waits does so in the queue.
		"slow":      {Bandwidth: 80e3, Queue: 16 << 10},
		"slow fair": {Bandwidth: 80e3, Queue: 16 << 10, Fair: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, config)
			c, s := w.pair()
			s.SetReadBuffer(16 << 10)
			c.SetWriteBuffer(16 << 10)
			total := 0
			for {
				c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
				n, err := c.Write(make([]byte, 16<<10))
				total += n
				if errors.Is(err, os.ErrDeadlineExceeded) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			bound := w.link.up.window + rcvbuf(config)*2 + 8<<20 // the server's kernel may take some MiB
			if total > bound {
				t.Errorf("%d bytes are under way, want %d at most", total, bound)
			}
			w.link.up.mu.Lock()
			queued, limit := w.link.up.sched.queued, w.link.up.limit+w.link.up.size
			w.link.up.mu.Unlock()
			if queued > limit {
				t.Errorf("%d bytes are queued, want %d at most", queued, limit)
			}
		})
	}
}

func TestCut(t *testing.T) {
	w := newWorld(t, Config{RTT: 2 * time.Millisecond, Bandwidth: 100e6})
	c, s := w.pair()
	send(t, c, s, "before")
	w.link.Cut(true)
	if _, err := c.Write([]byte("during")); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var silent sync.WaitGroup
	for name, end := range map[string]*net.TCPConn{"server": s, "client": c} {
		silent.Go(func() {
			end.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			n, err := end.Read(make([]byte, 100))
			if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %d bytes, %v through a link that is cut", name, n, err)
			}
		})
	}
	silent.Wait()
	// What waits still has to pass the bandwidth.
	queued := func() int {
		w.link.up.mu.Lock()
		defer w.link.up.mu.Unlock()
		return w.link.up.sched.queued
	}
	for end := time.Now().Add(patience); queued() != len("during"); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("%d bytes are queued during the cut", queued())
		}
	}
	// No more is read than was being read when the cut came.
	more, during := 0, len("during")
	for {
		c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := c.Write(make([]byte, 64<<10))
		if more += n; err != nil {
			break
		}
	}
	if n := queued(); n > during+w.link.up.size {
		t.Errorf("%d bytes are queued during the cut, after a write of %d more", n, more)
	}
	w.link.Cut(false)
	got := make([]byte, len("during"))
	s.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != "during" {
		t.Errorf("after the cut: %q, %v", got, err)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	if n, err := c.Read(got); err != io.EOF {
		t.Errorf("after the cut: %d bytes, %v; want EOF", n, err)
	}
}

func TestHalfClose(t *testing.T) {
	w := newWorld(t, Config{RTT: 4 * time.Millisecond, Bandwidth: 100e6})
	c, s := w.pair()
	send(t, c, s, "question")
	c.CloseWrite()
	s.SetReadDeadline(time.Now().Add(patience))
	if n, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("%d bytes, %v; want EOF", n, err)
	}
	send(t, s, c, "answer")
	s.Close()
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("%d bytes, %v; want EOF", n, err)
	}
}

// A reset at one end, and a server that is not there, are seen at the other end.
func TestReset(t *testing.T) {
	w := newWorld(t, Config{})
	c, s := w.pair()
	reset(s)
	c.SetReadDeadline(time.Now().Add(patience))
	if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes, %v after a reset", n, err)
	}

	// Also where the link is full of what nobody reads.
	c, s = w.pair()
	for {
		c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := c.Write(make([]byte, 64<<10)); err != nil {
			break
		}
	}
	reset(s)
	c.SetReadDeadline(time.Now().Add(patience))
	if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes, %v after a reset of a full connection", n, err)
	}

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := ln.Addr().String()
	ln.Close()
	l, err := New(nobody, Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	refused, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return // it was refused even before Dial looked
	}
	defer refused.Close()
	refused.SetReadDeadline(time.Now().Add(patience))
	if n, err := refused.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes, %v where nobody listens", n, err)
	}
}

// Who is still connected when the link ends sees an error and no end.
func TestClose(t *testing.T) {
	w := newWorld(t, Config{RTT: 2 * time.Millisecond})
	c, s := w.pair()
	send(t, c, s, "before")
	if err := w.link.Close(); err != nil {
		t.Fatal(err)
	}
	for name, end := range map[string]*net.TCPConn{"client": c, "server": s} {
		end.SetReadDeadline(time.Now().Add(patience))
		if n, err := end.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %d bytes, %v; want a reset", name, n, err)
		}
	}
}
