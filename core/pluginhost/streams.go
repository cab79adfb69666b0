package pluginhost

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/muxproxy/muxproxy/core/buffer"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/plugin/pluginrun"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	maxTickets = 1024            // that nobody has come with yet
	helloTime  = 5 * time.Second // for a peer that connects and sends no ticket
)

// streams serves the stream socket, where plugins turn tickets into streams.
type streams struct {
	m        *Manager
	dir      string // of all plugins' sockets
	path     string
	listener *paths.Listener
	running  sync.WaitGroup // the accept loop and every connection

	mu      sync.Mutex // guards what follows
	closed  bool
	tickets map[[pluginrun.TicketSize]byte]*ticket
	open    map[io.Closer]bool // what close has to end
}

type ticket struct {
	session int // of the plugin that may use it
	stream  Stream
	data    []byte // goes first
	timer   *time.Timer
}

func listenStreams(m *Manager, dir string) (*streams, error) {
	l, err := paths.Listen(filepath.Dir(dir), paths.StreamSocket)
	if err != nil {
		return nil, err
	}
	s := &streams{
		m: m, dir: dir, path: l.Path(), listener: l, tickets: map[[pluginrun.TicketSize]byte]*ticket{}, open: map[io.Closer]bool{},
	}
	s.running.Go(s.accept)
	return s, nil
}

func (s *streams) accept() {
	for {
		c, err := s.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors
			s.m.o.Log.Warn().Str("error", use.Printable(err.Error())).Msg("stream socket")
			time.Sleep(100 * time.Millisecond) // others may close some
			continue
		}
		if !s.track(c) {
			c.Close()
			return
		}
		s.running.Go(func() {
			defer s.untrack(c)
			s.serve(c)
		})
	}
}

// track has c closed with all others; false: that has happened already.
func (s *streams) track(c io.Closer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.open[c] = true
	return true
}

func (s *streams) untrack(c io.Closer) {
	s.mu.Lock()
	delete(s.open, c)
	s.mu.Unlock()
	c.Close()
}

// ticket makes a ticket for a stream, which is closed if nobody comes for it.
func (s *streams) ticket(session int, stream Stream, data []byte) ([]byte, error) {
	var id [pluginrun.TicketSize]byte
	rand.Read(id[:]) // never fails
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.New("the master ends")
	}
	if len(s.tickets) >= maxTickets {
		return nil, fmt.Errorf("%d streams wait to be fetched", maxTickets)
	}
	t := &ticket{session: session, stream: stream, data: data}
	t.timer = time.AfterFunc(s.m.o.Timing.Ticket, func() {
		if s.remove(id, t) {
			stream.Close()
		}
	})
	s.tickets[id] = t
	return id[:], nil
}

// remove reports whether t was still to be had; then the stream is the caller's.
func (s *streams) remove(id [pluginrun.TicketSize]byte, t *ticket) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tickets[id] != t {
		return false
	}
	delete(s.tickets, id)
	return true
}

// redeem returns what a ticket is for. One that another plugin comes with stays good for its owner.
func (s *streams) redeem(id [pluginrun.TicketSize]byte, session int) *ticket {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tickets[id]
	if t == nil || t.session != session {
		return nil
	}
	delete(s.tickets, id)
	t.timer.Stop()
	return t
}

// revoke closes the streams of a plugin that has ended and did not fetch them.
func (s *streams) revoke(session int) {
	var lost []Stream
	s.mu.Lock()
	for id, t := range s.tickets {
		if t.session == session {
			delete(s.tickets, id)
			t.timer.Stop()
			lost = append(lost, t.stream)
		}
	}
	s.mu.Unlock()
	for _, stream := range lost {
		stream.Close()
	}
}

// serve answers one connection to the stream socket.
func (s *streams) serve(c *net.UnixConn) {
	uid, pid, err := paths.PeerCred(c)
	if err != nil || !paths.Trusted(uid) {
		return
	}
	c.SetDeadline(time.Now().Add(helloTime))
	id, socket, err := pluginrun.ReadTicket(c)
	if socket != nil {
		defer socket.Close()
	}
	refuse := func(why string) {
		s.m.o.Log.Warn().Int("pid", pid).Str("error", why).Msg("stream socket: refused")
		_, _ = c.Write(append([]byte{1}, why...))
	}
	if err != nil {
		refuse(use.Printable(err.Error()))
		return
	}
	// A plugin leads a session of its own, which no other can join. Its children are it, too.
	session, err := sessionOf(pid)
	if err != nil {
		refuse("the caller has ended")
		return
	}
	t := s.redeem(id, session)
	if t == nil {
		refuse("the ticket is not good: unknown, used, too old, or another's")
		return
	}
	if !s.track(t.stream) {
		t.stream.Close()
		return
	}
	defer s.untrack(t.stream)
	if _, err := c.Write([]byte{0}); err != nil {
		return
	}
	c.SetDeadline(time.Time{})
	local := duplex(c)
	var n pluginrun.Counts
	if socket != nil {
		if !s.track(socket) {
			return
		}
		defer s.untrack(socket)
		local = socket
		defer n.Tell(c)()
	}
	if len(t.data) > 0 {
		m, err := t.stream.Write(t.data)
		n.In(m)
		if err != nil {
			return
		}
	}
	join(local, t.stream, &n)
}

// duplex is a stream that can be closed for writing.
type duplex interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// join copies both ways until both have ended, or one has failed.
func join(local duplex, remote Stream, n *pluginrun.Counts) {
	var copying sync.WaitGroup
	one := func(to, from duplex, count func(int)) {
		if err := pump(to, from, count); err != nil {
			if s, ok := local.(*pluginrun.Socket); ok {
				s.Cut()
			}
			local.Close()
			remote.Close()
			return
		}
		_ = to.CloseWrite() // fails if it is closed already
	}
	copying.Go(func() { one(remote, local, n.In) })
	copying.Go(func() { one(local, remote, n.Out) })
	copying.Wait()
}

// pump copies one way until from ends.
func pump(to io.Writer, from io.Reader, count func(int)) error {
	var b buffer.Buffer
	defer b.Release()
	for {
		buf := b.Next()
		m, err := from.Read(buf)
		if m > 0 {
			if _, err := to.Write(buf[:m]); err != nil {
				return err
			}
			count(m)
			b.Took(m)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// close ends the socket and all streams.
func (s *streams) close() {
	s.mu.Lock()
	s.closed = true
	lost := make([]io.Closer, 0, len(s.open)+len(s.tickets))
	for c := range s.open {
		lost = append(lost, c)
	}
	for id, t := range s.tickets {
		delete(s.tickets, id)
		t.timer.Stop()
		lost = append(lost, t.stream)
	}
	s.mu.Unlock()
	s.listener.Close()
	for _, c := range lost {
		c.Close()
	}
	s.running.Wait()
}

// maxSocket is how long the path of the sockets' directory may be, so that the longest address in it still is one.
const maxSocket = 104 - len("/p0123456789/plugin-dir0123456789/plugin0123456789")

// socketDir makes an empty directory for the plugins' sockets, in dir or, where that path is too long for a socket's
// address, in the directory for temporary files. What an earlier master left there is removed: it was killed, and its
// plugins with it.
func socketDir(dir string) (string, error) {
	if len(dir)+len("/plugins") > maxSocket {
		short, err := shortDir(dir)
		if err != nil {
			return "", err
		}
		dir = short
	}
	if err := paths.CheckDir(dir); err != nil {
		return "", err
	}
	dir = filepath.Join(dir, "plugins")
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	return dir, nil
}
