// Package plugintest tests plugins: in process through real gRPC, or any executable in any language against all that the
// master expects.
//
// The plain value needs neither: its methods can be called. InProcess adds the wire and a master to talk to. Check, which
// `muxproxy plugin check` runs, starts an executable as the master does and reports what it does wrong.
package plugintest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/pluginrun"
)

// TB is what is needed of testing.TB, so that no program links package testing.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
	Cleanup(func())
	Context() context.Context
}

// Session is a plugin that runs in the test's own process.
type Session struct {
	Client pluginpb.PluginClient // calls it
	Master *Master               // what it calls
}

// InProcess serves p over gRPC until the test ends.
func InProcess(t TB, p plugin.Plugin) *Session {
	t.Helper()
	dir, err := os.MkdirTemp("", "mp") // a test's own directory can be too long for sockets
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	master, err := NewMaster(dir)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(master.Stop)
	hello := plugin.Hello{Host: "unix:" + filepath.Join(dir, "host"), Stream: master.stream, HostToken: "h", PluginToken: "p"}
	serve := func(path string, s *grpc.Server) {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatalf("%v", err)
		}
		var serving sync.WaitGroup
		serving.Go(func() { _ = s.Serve(l) })
		t.Cleanup(func() {
			s.Stop()
			serving.Wait()
		})
	}
	h := grpc.NewServer(plugin.Authorized(hello.HostToken)...)
	pluginpb.RegisterHostServer(h, master)
	serve(filepath.Join(dir, "host"), h)
	host, disconnect, err := plugin.NewHost(hello)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { disconnect() })
	s := grpc.NewServer()
	if err := plugin.Register(s, p, host, zerolog.New(io.Discard)); err != nil {
		t.Fatalf("%v", err)
	}
	serve(filepath.Join(dir, "plugin"), s)
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "plugin"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { conn.Close() })
	return &Session{pluginpb.NewPluginClient(conn), master}
}

// Configure brings a configuration: the value of the `plugin` block and those of host blocks, in JSON, which get the ids
// "0", "1" and so on. It returns the plugin's problems.
func (s *Session) Configure(t TB, own string, hosts ...string) []*pluginpb.Diagnostic {
	t.Helper()
	r := &pluginpb.ConfigureRequest{Blocks: []*pluginpb.Block{{Kind: pluginpb.Block_KIND_PLUGIN, Value: []byte(own)}}}
	for i, h := range hosts {
		r.Blocks = append(r.Blocks, &pluginpb.Block{
			Id: fmt.Sprint(i), Kind: pluginpb.Block_KIND_HOST, Value: []byte(h), Hosts: []string{"*"},
		})
	}
	answer, err := s.Client.Configure(t.Context(), r)
	if err != nil {
		t.Fatalf("configure: %v", err)
	}
	return answer.GetDiagnostics()
}

// Authorize asks about a use under a host block, and returns the decision.
func (s *Session) Authorize(t TB, block string, u *pluginpb.Use) *pluginpb.Decision {
	t.Helper()
	stream, err := s.Client.Authorize(t.Context(), &pluginpb.AuthorizeRequest{Id: "q", Block: block, Use: u})
	for err == nil {
		var r *pluginpb.AuthorizeResponse
		if r, err = stream.Recv(); err == nil && r.GetDecision() != nil {
			return r.GetDecision()
		}
	}
	t.Fatalf("authorize: %v", err)
	return nil
}

// Master is one with a single connection, number 1, to u@test.example.com. Streams that are dialled through it echo;
// listening accepts one stream, which says "hello" and ends. What is exported changes that: it is set before the plugin is
// configured, and functions are called by many goroutines at once.
type Master struct {
	pluginpb.UnimplementedHostServer

	// Block is the id of the plugin's block that holds for the connections.
	Block string
	// OnConnect answers Connect; nil: the connection that there is.
	OnConnect func(target string) (*pluginpb.ConnectResponse, error)
	// OnResolve answers Resolve; nil: the target is the connection's and Block holds for it.
	OnResolve func(target string) (*pluginpb.ResolveResponse, error)
	// OnDial opens what Dial is asked for, in the place of the server, which refuses with a *plugin.RefusedError.
	OnDial func(ctx context.Context, r *pluginpb.DialRequest) (net.Conn, error)
	// OnListen listens in the place of the server. The forward ends with Accept's error.
	OnListen func(ctx context.Context, r *pluginpb.ListenRequest) (net.Listener, error)
	// OnPermit decides where streams that a listener has accepted may lead; nil: anywhere.
	OnPermit func(ctx context.Context, r *pluginpb.PermitRequest) error
	// OnKept fails Kept; nil: nothing does.
	OnKept func() error

	stream   string
	listener *net.UnixListener
	running  sync.WaitGroup

	mu          sync.Mutex // guards what follows
	connections []*pluginpb.Connection
	set         bool // connections was
	person      func(question string) (yes bool)
	records     []string
	notices     []string
	drained     []uint64
	kept        []byte
	issued      int
	tickets     map[string]net.Conn // what their stream is
	open        map[io.Closer]bool
	closed      bool
}

// NewMaster makes a Master with a stream socket in dir. Stop ends it.
func NewMaster(dir string) (*Master, error) {
	m := &Master{
		Block: "0", stream: filepath.Join(dir, "stream"), tickets: map[string]net.Conn{}, open: map[io.Closer]bool{},
	}
	var err error
	if m.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: m.stream, Net: "unix"}); err != nil {
		return nil, err
	}
	m.running.Go(func() {
		for {
			c, err := m.listener.AcceptUnix()
			if err != nil {
				return
			}
			if m.track(c) {
				m.running.Go(func() {
					defer m.untrack(c)
					m.serve(c)
				})
			}
		}
	})
	return m, nil
}

// track has c closed by Stop, or closes it at once: false.
func (m *Master) track(c io.Closer) bool {
	m.mu.Lock()
	closed := m.closed
	m.open[c] = true
	m.mu.Unlock()
	if closed {
		c.Close()
	}
	return !closed
}

func (m *Master) untrack(c io.Closer) {
	m.mu.Lock()
	delete(m.open, c)
	m.mu.Unlock()
	c.Close()
}

// Stream is the path of the stream socket.
func (m *Master) Stream() string { return m.stream }

// Stop ends the stream socket and all streams.
func (m *Master) Stop() {
	m.mu.Lock()
	m.closed = true
	for c := range m.open {
		c.Close()
	}
	m.mu.Unlock()
	m.listener.Close()
	m.running.Wait()
}

// Notices returns what the plugin has notified.
func (m *Master) Notices() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.notices)
}

// serve turns a ticket into its stream.
func (m *Master) serve(c *net.UnixConn) {
	id, socket, err := pluginrun.ReadTicket(c)
	if socket != nil && m.track(socket) {
		defer m.untrack(socket)
	}
	if err != nil {
		return
	}
	m.mu.Lock()
	stream := m.tickets[string(id[:])]
	delete(m.tickets, string(id[:]))
	m.mu.Unlock()
	if stream == nil {
		_, _ = c.Write([]byte("\x01the ticket is not good"))
		return
	}
	defer m.untrack(stream)
	if _, err := c.Write([]byte{0}); err != nil {
		return
	}
	local := net.Conn(c)
	var n pluginrun.Counts
	if socket != nil {
		defer n.Tell(c)()
		local = socket
	}
	var copying sync.WaitGroup
	one := func(to, from net.Conn, count func(int)) {
		_, err := io.Copy(&counter{to, count}, struct{ io.Reader }{from})
		if w, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
			_ = w.CloseWrite()
			return
		}
		local.Close()
		stream.Close()
	}
	copying.Go(func() { one(stream, local, n.In) })
	copying.Go(func() { one(local, stream, n.Out) })
	copying.Wait()
}

type counter struct {
	io.Writer
	count func(int)
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	c.count(n)
	return n, err
}

// ticket makes one for a stream, which is the Master's from then on. data goes first.
func (m *Master) ticket(stream net.Conn, data []byte) *pluginpb.Ticket {
	if m.track(stream) && len(data) > 0 {
		_, _ = stream.Write(data) // if it fails, so does what follows
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.issued++
	id := fmt.Sprintf("%016d", m.issued) // 16 bytes; only a test relies on them
	m.tickets[id] = stream
	return &pluginpb.Ticket{Id: []byte(id)}
}

// fake returns a stream that says greeting and ends, or if that is "" echoes.
func (m *Master) fake(greeting string) (net.Conn, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, err
	}
	far, err := l.Accept()
	if err != nil {
		near.Close()
		return nil, err
	}
	if m.track(far) {
		m.running.Go(func() {
			defer m.untrack(far)
			if _, err := io.WriteString(far, greeting); err == nil && greeting == "" {
				_, _ = io.Copy(struct{ io.Writer }{far}, struct{ io.Reader }{far})
			}
		})
	}
	return near, nil
}

var testConnection = &pluginpb.Connection{
	Id: 1, Target: &pluginpb.Target{User: "u", Host: "test.example.com", Port: 22}, Lane: "interactive", Up: true,
}

// SetConnections says which connections there are, in place of the one that there is otherwise.
func (m *Master) SetConnections(list ...*pluginpb.Connection) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.connections, m.set = list, true
}

func (m *Master) listLocked() []*pluginpb.Connection {
	if m.set {
		return m.connections
	}
	return []*pluginpb.Connection{testConnection}
}

func (m *Master) connection(id uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.listLocked() {
		if c.GetId() == id {
			return nil
		}
	}
	return status.Errorf(codes.NotFound, "there is no connection %d", id)
}

// Connection returns the one that there is.
func (m *Master) Connection() *pluginpb.Connection {
	c := proto.CloneOf(testConnection)
	c.Block = m.Block
	return c
}

// Connections implements pluginpb.HostServer.
func (m *Master) Connections(context.Context, *pluginpb.ConnectionsRequest) (*pluginpb.ConnectionsResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := &pluginpb.ConnectionsResponse{}
	for _, c := range m.listLocked() {
		c = proto.CloneOf(c)
		c.Block = m.Block
		out.Connections = append(out.Connections, c)
	}
	return out, nil
}

// Connect implements pluginpb.HostServer.
func (m *Master) Connect(_ context.Context, r *pluginpb.ConnectRequest) (*pluginpb.ConnectResponse, error) {
	if m.OnConnect != nil {
		return m.OnConnect(r.GetTarget())
	}
	return &pluginpb.ConnectResponse{Connection: m.Connection()}, nil
}

// Resolve implements pluginpb.HostServer: whatever it is, the connection is to it.
func (m *Master) Resolve(_ context.Context, r *pluginpb.ResolveRequest) (*pluginpb.ResolveResponse, error) {
	if m.OnResolve != nil {
		return m.OnResolve(r.GetTarget())
	}
	return &pluginpb.ResolveResponse{Target: testConnection.GetTarget(), Block: m.Block}, nil
}

// Drain implements pluginpb.HostServer: the connection stays.
func (m *Master) Drain(_ context.Context, r *pluginpb.DrainRequest) (*pluginpb.DrainResponse, error) {
	m.mu.Lock()
	m.drained = append(m.drained, r.GetConnection())
	m.mu.Unlock()
	return &pluginpb.DrainResponse{}, m.connection(r.GetConnection())
}

// Drained returns the connections that the plugin wanted to take no new clients.
func (m *Master) Drained() []uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.drained)
}

// Close implements pluginpb.HostServer: the connection stays.
func (m *Master) Close(_ context.Context, r *pluginpb.CloseRequest) (*pluginpb.CloseResponse, error) {
	return &pluginpb.CloseResponse{}, m.connection(r.GetConnection())
}

// Dial implements pluginpb.HostServer.
func (m *Master) Dial(ctx context.Context, r *pluginpb.DialRequest) (*pluginpb.DialResponse, error) {
	if err := m.connection(r.GetConnection()); err != nil {
		return nil, err
	}
	dial := m.OnDial
	if dial == nil {
		dial = func(context.Context, *pluginpb.DialRequest) (net.Conn, error) { return m.fake("") }
	}
	stream, err := dial(ctx, r)
	if refused, ok := errors.AsType[*plugin.RefusedError](err); ok {
		return &pluginpb.DialResponse{Refusal: &pluginpb.Refusal{Reason: refused.Reason, Message: refused.Message}}, nil
	}
	if err != nil {
		return nil, err
	}
	return &pluginpb.DialResponse{Ticket: m.ticket(stream, r.GetData())}, nil
}

// Listen implements pluginpb.HostServer.
func (m *Master) Listen(r *pluginpb.ListenRequest, out grpc.ServerStreamingServer[pluginpb.ListenResponse]) error {
	if err := m.connection(r.GetConnection()); err != nil {
		return err
	}
	address := r.GetAddress()
	accept := func() (net.Conn, string, error) { // nobody but once
		c, err := m.fake("hello")
		return c, "192.0.2.1:4444", err
	}
	if m.OnListen != nil {
		l, err := m.OnListen(out.Context(), r)
		if err != nil {
			return err
		}
		defer l.Close()
		defer context.AfterFunc(out.Context(), func() { l.Close() })()
		address = l.Addr().String()
		accept = func() (net.Conn, string, error) {
			c, err := l.Accept()
			if err != nil {
				return nil, "", err
			}
			return c, c.RemoteAddr().String(), nil
		}
	}
	err := out.Send(&pluginpb.ListenResponse{Event: &pluginpb.ListenResponse_Address{Address: address}})
	for err == nil {
		c, origin, e := accept()
		if e != nil {
			return e
		}
		err = out.Send(&pluginpb.ListenResponse{Event: &pluginpb.ListenResponse_Accepted{
			Accepted: &pluginpb.Accepted{Ticket: m.ticket(c, nil), Origin: origin},
		}})
		if m.OnListen == nil {
			<-out.Context().Done()
			return out.Context().Err()
		}
	}
	return err
}

// Permit implements pluginpb.HostServer.
func (m *Master) Permit(ctx context.Context, r *pluginpb.PermitRequest) (*pluginpb.PermitResponse, error) {
	if m.OnPermit != nil {
		if err := m.OnPermit(ctx, r); err != nil {
			return nil, err
		}
	}
	return &pluginpb.PermitResponse{}, nil
}

// Notify implements pluginpb.HostServer.
func (m *Master) Notify(_ context.Context, r *pluginpb.NotifyRequest) (*pluginpb.NotifyResponse, error) {
	m.mu.Lock()
	m.notices = append(m.notices, r.GetMessage())
	m.mu.Unlock()
	return &pluginpb.NotifyResponse{}, m.connection(r.GetConnection())
}

// Keep implements pluginpb.HostServer.
func (m *Master) Keep(_ context.Context, r *pluginpb.KeepRequest) (*pluginpb.KeepResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kept = slices.Clone(r.GetData())
	return &pluginpb.KeepResponse{}, nil
}

// Kept implements pluginpb.HostServer.
func (m *Master) Kept(context.Context, *pluginpb.KeptRequest) (*pluginpb.KeptResponse, error) {
	if m.OnKept != nil {
		if err := m.OnKept(); err != nil {
			return nil, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return &pluginpb.KeptResponse{Data: m.kept}, nil
}

// SetPerson says what Ask is answered, which is plugin.ErrNobody without.
func (m *Master) SetPerson(p func(question string) (yes bool)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.person = p
}

// Ask implements pluginpb.HostServer.
func (m *Master) Ask(_ context.Context, r *pluginpb.AskRequest) (*pluginpb.AskResponse, error) {
	m.mu.Lock()
	p := m.person
	m.mu.Unlock()
	switch {
	case p == nil:
		return &pluginpb.AskResponse{}, nil
	case p(r.GetQuestion()):
		return &pluginpb.AskResponse{Answer: pluginpb.AskResponse_ANSWER_YES}, nil
	}
	return &pluginpb.AskResponse{Answer: pluginpb.AskResponse_ANSWER_NO}, nil
}

// Record implements pluginpb.HostServer.
func (m *Master) Record(_ context.Context, r *pluginpb.RecordRequest) (*pluginpb.RecordResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.records = append(m.records, strings.TrimSpace(r.GetEvent()+" "+r.GetTarget()+" "+r.GetDetail()))
	return &pluginpb.RecordResponse{}, nil
}

// Records returns what the plugin had written to the audit log, a line each.
func (m *Master) Records() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.records)
}

// errTime is that something took too long.
var errTime = errors.New("it takes too long")

func within(ctx context.Context, d time.Duration, done <-chan struct{}) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return nil
	case <-t.C:
		return errTime
	case <-ctx.Done():
		return ctx.Err()
	}
}
