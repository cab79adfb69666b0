package pool

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muxproxy/muxproxy/core/use"
)

// TCPChannel is what a direct-tcpip or forwarded-tcpip channel is opened with (RFC 4254 section 7.2): where it leads, or
// where the server has listened, and who has connected.
type TCPChannel struct {
	Host       string
	Port       uint32
	Origin     string
	OriginPort uint32
}

// StreamlocalChannel is what a direct-streamlocal@openssh.com channel is opened with (OpenSSH's PROTOCOL, 2.4).
type StreamlocalChannel struct {
	Path         string
	Reserved     string
	ReservedPort uint32
}

// Stream is a channel as a network connection, without deadlines. Its data counts for the upstream. It has one reader and
// one writer; Close may be called from anywhere.
type Stream struct {
	*Channel
	to      string
	release func(use.Result)

	in, out atomic.Int64
	cut     atomic.Bool
	once    sync.Once
	err     error // of Close
}

// NewStream returns ch as a connection to an address, which owns ch. The first Close calls release with how it has ended,
// to give back what carries the channel.
func NewStream(ch *Channel, to string, release func(use.Result)) *Stream {
	return &Stream{Channel: ch, to: to, release: release}
}

// Write implements net.Conn.
func (s *Stream) Write(b []byte) (int, error) {
	n, err := s.Channel.Write(b)
	s.Count(int64(n), 0)
	s.in.Add(int64(n))
	return n, err
}

// Read implements net.Conn. What the upstream's end has cut short ends with io.ErrUnexpectedEOF: it must not look complete.
func (s *Stream) Read(b []byte) (int, error) {
	n, err := s.Channel.Read(b)
	s.Count(0, int64(n))
	s.out.Add(int64(n))
	if err == io.EOF && s.Down() && !s.ClosedInOrder() {
		s.cut.Store(true)
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Close implements net.Conn.
func (s *Stream) Close() error {
	s.once.Do(func() {
		if s.err = s.Channel.Close(); s.err == io.EOF {
			s.err = nil // the server was first
		}
		r := use.Result{Status: "closed", In: s.in.Load(), Out: s.out.Load()}
		if s.cut.Load() {
			r.Status = "cut"
		}
		s.release(r)
	})
	return s.err
}

// LocalAddr implements net.Conn: there is none to tell.
func (s *Stream) LocalAddr() net.Addr { return streamAddr("") }

// RemoteAddr implements net.Conn.
func (s *Stream) RemoteAddr() net.Addr { return streamAddr(s.to) }

// SetDeadline implements net.Conn, and always fails, as the next two do.
func (*Stream) SetDeadline(time.Time) error { return errors.ErrUnsupported }

// SetReadDeadline implements net.Conn.
func (*Stream) SetReadDeadline(time.Time) error { return errors.ErrUnsupported }

// SetWriteDeadline implements net.Conn.
func (*Stream) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }

// streamAddr is a host's address beyond an upstream.
type streamAddr string

func (streamAddr) Network() string  { return "tcp" }
func (a streamAddr) String() string { return string(a) }
