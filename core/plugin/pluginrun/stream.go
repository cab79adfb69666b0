package pluginrun

import (
	"encoding/binary"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// TicketSize is how many bytes a ticket has.
const TicketSize = 16

const countTime = time.Second // between two times that a plugin is told what a stream has carried

// Socket is one that a plugin has handed over.
type Socket struct{ net.Conn }

// CloseWrite ends what is written to it.
func (s *Socket) CloseWrite() error {
	return s.Conn.(interface{ CloseWrite() error }).CloseWrite()
}

// Whole says whether the end of a TCP connection is to be one in good order. If not it is a reset, also if this process is
// killed: what was cut off must not look complete. Unix sockets have no way to say so.
func (s *Socket) Whole(so bool) {
	seconds := 0
	if so {
		seconds = -1 // the system's default
	}
	if t, ok := s.Conn.(*net.TCPConn); ok {
		_ = t.SetLinger(seconds) // fails if it is closed already
	}
}

// Counts are of a stream that was handed over, for the plugin. The zero value counts for nobody.
type Counts struct {
	in, out atomic.Uint64
	grown   chan struct{} // has an element if they have grown since they were told; nil: nobody wants to know
}

// In counts bytes towards the remote host.
func (n *Counts) In(bytes int) { n.add(&n.in, bytes) }

// Out counts bytes from the remote host.
func (n *Counts) Out(bytes int) { n.add(&n.out, bytes) }

func (n *Counts) add(to *atomic.Uint64, bytes int) {
	to.Add(uint64(bytes))
	select {
	case n.grown <- struct{}{}:
	default:
	}
}

// Tell writes the counts to c while they grow, until the function that it returns is called, which writes the last ones.
// A plugin that does not read them gets no more. It is called before there is anything to count.
func (n *Counts) Tell(c net.Conn) (last func()) {
	n.grown = make(chan struct{}, 1)
	done := make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() {
		for ended := false; !ended; {
			select {
			case <-n.grown:
				t := time.NewTimer(countTime)
				select {
				case <-t.C:
				case <-done:
					t.Stop()
					ended = true
				}
			case <-done:
				ended = true
			}
			b := binary.BigEndian.AppendUint64(nil, n.in.Load())
			c.SetWriteDeadline(time.Now().Add(countTime))
			if _, err := c.Write(binary.BigEndian.AppendUint64(b, n.out.Load())); err != nil {
				return
			}
		}
	})
	return func() {
		close(done)
		telling.Wait()
	}
}
