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
	"sync/atomic"
	"time"

	"github.com/muxproxy/muxproxy/core/buffer"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/plugin/pluginrun"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// maxTickets bounds those of one plugin that nobody has come with yet, and of them those of each connection's incoming
	// streams by themselves: whoever knocks there must not keep others from dialling.
	maxTickets = 1024
	helloTime  = 5 * time.Second // for a peer that connects and sends no ticket
	// presentEvery is how often the directory of sockets is looked after: logind takes /run/user/UID away with the user's
	// last session, and the master lives on.
	presentEvery = time.Second
)

// streams serves the stream socket, where plugins turn tickets into streams.
type streams struct {
	m         *Manager
	accepting sync.WaitGroup // run
	running   sync.WaitGroup // every connection, and what closes those

	mu      sync.Mutex // guards what follows
	at      *place
	closed  bool
	ending  chan struct{} // closed with it
	tickets map[[pluginrun.TicketSize]byte]*ticket
	taken   map[[pluginrun.TicketSize]byte]*ticket // those of incoming streams that were spent, while the streams last
	open    map[io.Closer]bool                     // what close has to end
}

type ticket struct {
	session    int    // of the plugin that may use it
	connection uint64 // of an incoming stream; 0: it was dialled
	stream     Stream
	data       []byte // goes first
	timer      *time.Timer
}

func listenStreams(m *Manager) (*streams, error) {
	at, err := makePlace(m.o.Dir())
	if err != nil {
		return nil, err
	}
	s := &streams{
		m: m, at: at, ending: make(chan struct{}), tickets: map[[pluginrun.TicketSize]byte]*ticket{},
		taken: map[[pluginrun.TicketSize]byte]*ticket{}, open: map[io.Closer]bool{},
	}
	s.accepting.Go(s.run)
	return s, nil
}

// place is where the sockets are.
func (s *streams) place() *place {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.at
}

// run accepts until close. If the directory vanishes there is another one, and plugins that can use it.
func (s *streams) run() {
	t := time.NewTicker(presentEvery)
	defer t.Stop()
	told := false
	for at := s.place(); ; at = s.place() {
		var accepting sync.WaitGroup
		accepting.Go(func() { s.accept(at.listener) })
		for at == s.place() {
			select {
			case <-t.C:
			case <-s.ending:
				at.remove()
				accepting.Wait()
				return
			}
			if at.listener.Present() {
				continue
			}
			next, err := makePlace(s.m.o.Dir())
			if err != nil {
				if !told {
					s.m.o.Log.Error().Err(err).Msg("the plugins' sockets have vanished and can't be made again yet")
				}
				told = true
				continue
			}
			told = false
			s.mu.Lock()
			s.at = next
			s.mu.Unlock()
			s.m.o.Log.Warn().Str("sockets", next.dir).Msg("the plugins' sockets had vanished; the plugins are started again")
			s.m.again()
		}
		at.remove()
		accepting.Wait()
	}
}

func (s *streams) accept(l *paths.Listener) {
	for {
		c, err := l.AcceptUnix()
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

// ticket makes a ticket for a stream, which is closed if nobody comes for it. connection is where an Incoming comes from.
func (s *streams) ticket(session int, connection uint64, stream Stream, data []byte) ([]byte, error) {
	var id [pluginrun.TicketSize]byte
	rand.Read(id[:]) // never fails
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.New("the master ends")
	}
	waiting := 0
	for _, t := range s.tickets {
		if t.session == session && t.connection == connection {
			waiting++
		}
	}
	if waiting >= maxTickets {
		return nil, fmt.Errorf("%d streams wait to be fetched", maxTickets)
	}
	t := &ticket{session: session, connection: connection, stream: stream, data: data}
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

// incoming finds a stream that a plugin's listener has accepted, by its ticket; nil: there is none. The ticket is good at
// least until release, and after that as long as a new one.
func (s *streams) incoming(session int, id []byte) (stream Incoming, connection uint64, release func()) {
	if len(id) != pluginrun.TicketSize {
		return nil, 0, nil
	}
	key := [pluginrun.TicketSize]byte(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	t, spent := s.taken[key]
	if !spent {
		t = s.tickets[key]
	}
	if t == nil || t.session != session || t.connection == 0 || !spent && !t.timer.Stop() {
		return nil, 0, nil
	}
	return t.stream.(Incoming), t.connection, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.tickets[key] == t {
			t.timer.Reset(s.m.o.Timing.Ticket)
		}
	}
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
	if t.connection != 0 {
		s.taken[id] = t
	}
	return t
}

// forget is told that the stream of a ticket that was redeemed has ended.
func (s *streams) forget(id [pluginrun.TicketSize]byte) {
	s.mu.Lock()
	delete(s.taken, id)
	s.mu.Unlock()
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
	defer s.forget(id)
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
		socket.Whole(false)
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
	if join(local, t.stream, &n) && socket != nil {
		socket.Whole(true)
	}
}

// duplex is a stream that can be closed for writing.
type duplex interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// join copies both ways until both have ended, or one has failed; then it returns false.
func join(local duplex, remote Stream, n *pluginrun.Counts) bool {
	var copying sync.WaitGroup
	var failed atomic.Bool
	one := func(to, from duplex, count func(int)) {
		if err := pump(to, from, count); err != nil {
			failed.Store(true)
			local.Close()
			remote.Close()
			return
		}
		_ = to.CloseWrite() // fails if it is closed already
	}
	copying.Go(func() { one(remote, local, n.In) })
	copying.Go(func() { one(local, remote, n.Out) })
	copying.Wait()
	return !failed.Load()
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

// close ends the socket, and all streams, for which it does not wait: one that a server does not take anything from ends
// with its connection.
func (s *streams) close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	close(s.ending)
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
	for _, c := range lost {
		s.running.Go(func() { c.Close() })
	}
	s.accepting.Wait()
}

// wait returns when all streams have ended. It is for after close.
func (s *streams) wait() { s.running.Wait() }

// place is a directory with the sockets of one master's plugins.
type place struct {
	dir      string
	lock     *paths.FileLock // says that its master lives
	listener *paths.Listener // of the stream socket
	short    string          // what is to be removed, too, with the last place in it; "": nothing
}

const (
	placeName = "plugins" // and a number
	placeLock = "lock"
	// maxSocket is how long the path of the sockets' directory may be, so that the longest address in it still is one.
	maxSocket = 104 - len("/p0123456789/plugin-dir0123456789/plugin0123456789")
)

// makePlace makes a place in dir or, where that path is too long for a socket's address, in the directory for temporary
// files. Those of masters that were killed, and their plugins with them, are removed; a master that drains has its own
// beside.
func makePlace(dir string) (p *place, err error) {
	for range 3 { // another master may be clearing up, and take this one for one that was left
		if p, err = tryPlace(dir); err == nil {
			return p, nil
		}
	}
	return nil, err
}

func tryPlace(dir string) (*place, error) {
	p := &place{}
	if len(dir)+len("/"+placeName+"0123456789") > maxSocket {
		short, err := shortDir(dir)
		if err != nil {
			return nil, err
		}
		dir, p.short = short, short
	}
	if err := paths.CheckDir(dir); err != nil {
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(dir, placeName+"[0-9]*"))
	if err != nil {
		return nil, err
	}
	for _, old := range left {
		if lock, err := paths.TryLock(filepath.Join(old, placeLock)); err == nil {
			os.RemoveAll(old) // what can't be is left to the next one
			lock.Close()
		}
	}
	if p.dir, err = os.MkdirTemp(dir, placeName); err != nil { // 0700
		return nil, err
	}
	if p.lock, err = paths.TryLock(filepath.Join(p.dir, placeLock)); err != nil {
		os.RemoveAll(p.dir)
		return nil, err
	}
	if p.listener, err = paths.Listen(p.dir, paths.StreamSocket); err != nil {
		os.RemoveAll(p.dir)
		p.lock.Close()
		return nil, err
	}
	return p, nil
}

// remove ends the socket and leaves nothing.
func (p *place) remove() {
	p.listener.Close()
	os.RemoveAll(p.dir)
	p.lock.Close()
	if p.short != "" {
		os.Remove(p.short) // unless another master's place is in it
	}
}
