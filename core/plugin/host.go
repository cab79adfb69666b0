package plugin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

// ErrDenied is wrapped by the errors of calls to the Host that policy does not allow: `may` lacks the capability, the host
// has no block of the plugin, or the gate denied.
var ErrDenied = errors.New("denied")

// ErrNotFound is what errors of calls about a connection that has ended are, or about a use that is not pending any more.
var ErrNotFound = errors.New("not found")

// notFound is such an error, with the master's words.
type notFound string

func (e notFound) Error() string        { return string(e) }
func (e notFound) Is(target error) bool { return target == ErrNotFound }

// RefusedError is a refusal by the remote server.
type RefusedError struct {
	Reason  uint32 // RFC 4254 section 5.1
	Message string
}

func (e *RefusedError) Error() string { return "refused by the server: " + e.Message }

// LoginError is a login that was refused: by the server, because its host key is not good, or because a person would have
// had to answer. Another try would end the same until a person has done something.
type LoginError struct{ Message string }

func (e *LoginError) Error() string { return e.Message }

// Host is the master, as far as policy lets this plugin. It may be used by many goroutines.
type Host struct {
	client pluginpb.HostClient
	stream string              // path of the stream socket
	block  func(id string) any // set by Register
}

// NewHost returns the master that a Hello names, and what ends the connection to it. It connects when it is first used.
func NewHost(h Hello) (*Host, func() error, error) {
	conn, err := grpc.NewClient(h.Host, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(), grpc.WithPerRPCCredentials(token(h.HostToken)))
	if err != nil {
		return nil, nil, err
	}
	noBlock := func(string) any { return nil }
	return &Host{pluginpb.NewHostClient(conn), h.Stream, noBlock}, conn.Close, nil
}

// token goes with every call. The socket is local, in a directory of this user alone: nothing need be encrypted.
type token string

func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{TokenKey: string(t)}, nil
}

func (token) RequireTransportSecurity() bool { return false }

// hostError is an error of the master's as a line for a person.
func hostError(err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	switch st.Code() {
	case codes.PermissionDenied:
		return fmt.Errorf("%w: %s", ErrDenied, st.Message())
	case codes.NotFound:
		return notFound(st.Message())
	case codes.Canceled:
		return context.Canceled
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	}
	return errors.New(st.Message())
}

// Connections lists the connections to hosts with a block of this plugin. It needs CanList.
func (h *Host) Connections(ctx context.Context) ([]Connection, error) {
	r, err := h.client.Connections(ctx, &pluginpb.ConnectionsRequest{})
	return connectionsFromPB(r.GetConnections(), h.block), hostError(err)
}

// Connect returns the connection to a target (HOST, USER@HOST or USER@HOST:PORT, as ssh would be told), which it makes if
// there is none. Nobody can be asked for a password: the error is a *LoginError if that, or anything else about the login,
// is in the way. It needs CanConnect.
func (h *Host) Connect(ctx context.Context, target string) (Connection, error) {
	r, err := h.client.Connect(ctx, &pluginpb.ConnectRequest{Target: target})
	if err == nil && r.GetRefused() != "" {
		return Connection{}, &LoginError{r.GetRefused()}
	}
	return connectionFromPB(r.GetConnection(), h.block), hostError(err)
}

// Resolve says what a target of Connect means, and which block of this plugin holds for connections to it (as in Block;
// nil: none), without connecting. It needs CanConnect.
func (h *Host) Resolve(ctx context.Context, target string) (t Target, block any, err error) {
	r, err := h.client.Resolve(ctx, &pluginpb.ResolveRequest{Target: target})
	return targetFromPB(r.GetTarget()), h.block(r.GetBlock()), hostError(err)
}

// Close ends a connection and all that it carries. It needs CanClose.
func (h *Host) Close(ctx context.Context, connection uint64) error {
	_, err := h.client.Close(ctx, &pluginpb.CloseRequest{Connection: connection})
	return hostError(err)
}

// Drain lets a connection take no new clients: it ends with its last, at once if there is none. It needs CanClose.
func (h *Host) Drain(ctx context.Context, connection uint64) error {
	_, err := h.client.Drain(ctx, &pluginpb.DrainRequest{Connection: connection})
	return hostError(err)
}

// Decide answers one of this plugin's own pending uses, by its Request's ID. It needs CanDecide.
func (h *Host) Decide(ctx context.Context, id string, d Decision) error {
	_, err := h.client.Decide(ctx, &pluginpb.DecideRequest{Id: id, Decision: d.toPB()})
	return hostError(err)
}

// ErrNobody is the error of Ask where nobody can be asked.
var ErrNobody = errors.New("the client can't ask its person")

// Ask puts a question, one line, to the person at the client of one of this plugin's own pending uses, by its Request's
// ID, and waits for a yes or a no. The client's own ssh does the asking, on its terminal; it can before it has been let
// in, that is, for uses of the kind "attach". Else, and where ssh has no terminal or is in BatchMode, the error is
// ErrNobody. It needs no capability.
func (h *Host) Ask(ctx context.Context, id, question string) (yes bool, err error) {
	r, err := h.client.Ask(ctx, &pluginpb.AskRequest{Id: id, Question: question})
	switch {
	case err != nil:
		return false, hostError(err)
	case r.GetAnswer() == pluginpb.AskResponse_ANSWER_UNSPECIFIED:
		return false, ErrNobody
	}
	return r.GetAnswer() == pluginpb.AskResponse_ANSWER_YES, nil
}

// Notify shows a line to the clients of a connection. It needs CanNotify.
func (h *Host) Notify(ctx context.Context, connection uint64, line string) error {
	_, err := h.client.Notify(ctx, &pluginpb.NotifyRequest{Connection: connection, Message: line})
	return hostError(err)
}

// Keep stores at most 64 KiB over restarts of plugin and master, in place of what was stored before. It needs CanKeep.
func (h *Host) Keep(ctx context.Context, data []byte) error {
	_, err := h.client.Keep(ctx, &pluginpb.KeepRequest{Data: data})
	return hostError(err)
}

// Kept returns what was stored last; nil if nothing was. It needs CanKeep.
func (h *Host) Kept(ctx context.Context) ([]byte, error) {
	r, err := h.client.Kept(ctx, &pluginpb.KeptRequest{})
	return r.GetData(), hostError(err)
}

// Record adds a line to the audit log in the plugin's name: event is one word, target the USER@HOST:PORT that it is about
// or "", detail one line. The log may be full or slow: nothing waits for it.
func (h *Host) Record(ctx context.Context, event, target, detail string) error {
	_, err := h.client.Record(ctx, &pluginpb.RecordRequest{Event: event, Target: target, Detail: detail})
	return hostError(err)
}

// Stream is a stream to or from the remote host. It can be half-closed with CloseWrite.
type Stream struct {
	*net.UnixConn
	local, remote net.Addr
}

// LocalAddr is what was listened on, or empty.
func (s *Stream) LocalAddr() net.Addr { return s.local }

// RemoteAddr is what was dialled, or where the server says that the stream comes from.
func (s *Stream) RemoteAddr() net.Addr { return s.remote }

// addr is an address on the remote host's side.
type addr struct{ network, text string }

func (a addr) Network() string { return a.network }
func (a addr) String() string  { return a.text }

// Dial opens a stream through a connection, to an address as the remote host sees it: host:port for network "tcp", a path
// for "unix". The caller closes it. The error is a *RefusedError if the server did not want to. It needs CanDial.
func (h *Host) Dial(ctx context.Context, connection uint64, network, address string) (*Stream, error) {
	r, err := h.dial(ctx, &pluginpb.DialRequest{Connection: connection, Network: network, Address: address})
	if err != nil {
		return nil, err
	}
	c, err := h.redeem(ctx, r, nil)
	if err != nil {
		return nil, err
	}
	return &Stream{c, addr{}, addr{network, address}}, nil
}

// Handover is a stream for a socket that the plugin has.
type Handover struct {
	Connection       uint64
	Network, Address string
	Origin           string // IP:PORT of the socket's peer; may be ""
	PID              int    // of the process whose stream it is: policy and audit see it as the caller; 0: the plugin
	Data             []byte // what was already read from the socket, at most 64 KiB
	// Opened is called when the server has opened the stream, before any of its bytes go to the socket: for what a proxy's
	// protocol says then. With an error nothing is handed over. It has 10 s. May be nil.
	Opened func() error
}

// HandOver is Dial for a stream that the master itself copies to and from socket, a connected stream socket: no byte of
// it crosses the plugin. socket stays the caller's, who closes it at once. The stream lives without the plugin.
func (h *Host) HandOver(ctx context.Context, o Handover, socket syscall.Conn) (*Transfer, error) {
	r, err := h.dial(ctx, &pluginpb.DialRequest{
		Connection: o.Connection, Network: o.Network, Address: o.Address, Origin: o.Origin, Data: o.Data, Pid: int64(o.PID),
	})
	if err != nil {
		return nil, err
	}
	if o.Opened != nil {
		if err := o.Opened(); err != nil {
			if c, err := h.redeem(ctx, r, nil); err == nil {
				c.Close() // and the stream with it
			}
			return nil, err
		}
	}
	c, err := h.redeem(ctx, r, socket)
	if err != nil {
		return nil, err
	}
	return &Transfer{conn: c}, nil
}

// Transfer is a stream that was handed over.
type Transfer struct {
	conn    *net.UnixConn
	in, out atomic.Uint64
}

// Wait returns when the stream has ended; then Counts says all that it has carried. It has to be called, once.
func (t *Transfer) Wait() {
	defer t.conn.Close()
	var b [16]byte
	for {
		if _, err := io.ReadFull(t.conn, b[:]); err != nil {
			return
		}
		t.in.Store(binary.BigEndian.Uint64(b[:]))
		t.out.Store(binary.BigEndian.Uint64(b[8:]))
	}
}

// Counts returns how many bytes went towards the remote host and how many came from it. While Wait waits they are a
// second old at most.
func (t *Transfer) Counts() (in, out uint64) { return t.in.Load(), t.out.Load() }

func (h *Host) dial(ctx context.Context, r *pluginpb.DialRequest) (*pluginpb.Ticket, error) {
	answer, err := h.client.Dial(ctx, r)
	if err != nil {
		return nil, hostError(err)
	}
	if refused := answer.GetRefusal(); refused != nil {
		return nil, &RefusedError{refused.GetReason(), refused.GetMessage()}
	}
	return answer.GetTicket(), nil
}

// redeem spends a ticket at the stream socket.
func (h *Host) redeem(ctx context.Context, t *pluginpb.Ticket, socket syscall.Conn) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", h.stream)
	if err != nil {
		return nil, fmt.Errorf("stream socket: %w", err)
	}
	c := conn.(*net.UnixConn)
	stop := context.AfterFunc(ctx, func() { c.Close() })
	err = spend(c, t.GetId(), socket)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func spend(c *net.UnixConn, id []byte, socket syscall.Conn) error {
	if err := sendTicket(c, id, socket); err != nil {
		return fmt.Errorf("stream socket: %w", err)
	}
	var answer [256]byte
	if _, err := c.Read(answer[:1]); err != nil {
		return fmt.Errorf("stream socket: %w", err)
	}
	if answer[0] == 0 {
		return nil
	}
	n := 0
	for n < len(answer) {
		m, err := c.Read(answer[n:])
		n += m
		if err != nil {
			break
		}
	}
	return fmt.Errorf("stream socket: %s", answer[:n])
}

// Listen accepts streams on the remote host's side: at host:port (port 0: the server chooses) for network "tcp", at a
// path for "unix". Closing the listener, or the end of ctx, ends the forward, not the streams. It needs CanListen.
func (h *Host) Listen(ctx context.Context, connection uint64, network, address string) (*Listener, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := h.client.Listen(ctx, &pluginpb.ListenRequest{Connection: connection, Network: network, Address: address})
	var first *pluginpb.ListenResponse
	if err == nil {
		first, err = stream.Recv()
	}
	if err != nil {
		cancel()
		return nil, hostError(err)
	}
	l := &Listener{cancel: cancel, addr: addr{network, first.GetAddress()}, offers: make(chan *Offer), ended: make(chan struct{})}
	go l.run(ctx, h, stream)
	return l, nil
}

// Listener is a remote forward.
type Listener struct {
	cancel context.CancelFunc
	addr   addr
	offers chan *Offer
	once   sync.Once
	ended  chan struct{} // closed when run has ended
	err    error         // why; read after ended
}

var _ net.Listener = (*Listener)(nil)

func (l *Listener) run(ctx context.Context, h *Host, stream grpc.ServerStreamingClient[pluginpb.ListenResponse]) {
	defer close(l.ended)
	defer l.cancel()
	for {
		r, err := stream.Recv()
		if err != nil {
			l.err = hostError(err)
			return
		}
		select {
		case l.offers <- &Offer{h, r.GetAccepted().GetTicket(), l.addr, r.GetAccepted().GetOrigin()}:
		case <-ctx.Done():
		}
	}
}

// Accept returns the next stream, which the caller closes.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		o, err := l.AcceptOffer()
		if err != nil {
			return nil, err
		}
		if s, err := o.Stream(context.Background()); err == nil {
			return s, nil
		} // else it is too old, or has ended; the next one may not be
	}
}

// AcceptOffer is Accept for a stream that need not cross the plugin.
func (l *Listener) AcceptOffer() (*Offer, error) {
	select {
	case o := <-l.offers:
		return o, nil
	case <-l.ended:
		if errors.Is(l.err, context.Canceled) {
			return nil, net.ErrClosed
		}
		return nil, l.err
	}
}

// Close ends the forward.
func (l *Listener) Close() error {
	l.once.Do(l.cancel)
	<-l.ended
	return nil
}

// Addr is what the server listens on.
func (l *Listener) Addr() net.Addr { return l.addr }

// Offer is a stream that somebody has opened at a Listener. One of Stream, HandOver and Refuse is called, once, within 10 s
// or within 10 s after Permit.
type Offer struct {
	host   *Host
	ticket *pluginpb.Ticket
	addr   addr
	Origin string // where the server says that the stream comes from: IP:PORT, or ""
}

// Permit asks whether the stream may lead to an address as this machine sees it (host:port for network "tcp", a path for
// "unix"), before the plugin connects to that: policy, which sees a use of the kind "remote-forward" with the name "connect",
// and plugins decide, and a person may have to. An error means no; one that wraps ErrDenied says who. It is called once, before
// HandOver, or after Stream where only the stream says where it wants to go, and not after its end.
func (o *Offer) Permit(ctx context.Context, network, address string) error {
	_, err := o.host.client.Permit(ctx, &pluginpb.PermitRequest{Ticket: o.ticket, Network: network, Address: address})
	return hostError(err)
}

// Stream takes the stream; the caller closes it.
func (o *Offer) Stream(ctx context.Context) (*Stream, error) {
	c, err := o.host.redeem(ctx, o.ticket, nil)
	if err != nil {
		return nil, err
	}
	return &Stream{c, o.addr, addr{o.addr.network, o.Origin}}, nil
}

// HandOver has the master itself copy the stream to and from socket, as Host.HandOver does.
func (o *Offer) HandOver(ctx context.Context, socket syscall.Conn) (*Transfer, error) {
	c, err := o.host.redeem(ctx, o.ticket, socket)
	if err != nil {
		return nil, err
	}
	return &Transfer{conn: c}, nil
}

// Refuse closes the stream.
func (o *Offer) Refuse(ctx context.Context) {
	if s, err := o.Stream(ctx); err == nil {
		s.Close()
	}
}

// Authorized returns interceptors that turn away calls without the token, of every service.
func Authorized(token string) []grpc.ServerOption {
	check := func(ctx context.Context) error {
		md, _ := metadata.FromIncomingContext(ctx)
		if got := md.Get(TokenKey); len(got) != 1 || !sameToken(got[0], token) {
			return status.Error(codes.Unauthenticated, "the call lacks its token")
		}
		return nil
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := check(ctx); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := check(ss.Context()); err != nil {
				return err
			}
			return next(srv, ss)
		}),
	}
}
