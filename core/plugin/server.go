package plugin

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

// heartbeat is how often the master is told that a person is still being asked; it has to hear so every 5 s.
const heartbeat = 4 * time.Second

// Register makes p answer on a gRPC server, as Serve does. host and log are what Configure gets. The error is a mistake
// in what p describes. It is for test harnesses; a plugin calls Serve.
func Register(s grpc.ServiceRegistrar, p Plugin, host *Host, log zerolog.Logger) error {
	info := p.Describe()
	described, err := infoToPB(p, info)
	if err != nil {
		return fmt.Errorf("plugin %s: %w", info.Name, err)
	}
	srv := &server{p: p, info: info, described: described, host: host, log: log}
	if host != nil {
		host.block = srv.value
	}
	pluginpb.RegisterPluginServer(s, srv)
	return nil
}

type server struct {
	pluginpb.UnimplementedPluginServer
	p         Plugin
	info      Info
	described *pluginpb.DescribeResponse
	host      *Host
	log       zerolog.Logger

	configuring sync.Mutex // held for a whole Configure

	mu sync.Mutex // guards what follows
	// blocks are the host blocks by id. Those of the configuration before are kept for the uses that were being decided when
	// it changed.
	blocks, before map[string]Block
}

func (s *server) Describe(context.Context, *pluginpb.DescribeRequest) (*pluginpb.DescribeResponse, error) {
	return s.described, nil
}

func (s *server) Configure(ctx context.Context, r *pluginpb.ConfigureRequest) (*pluginpb.ConfigureResponse, error) {
	s.configuring.Lock()
	defer s.configuring.Unlock()
	c, blocks, ds := s.read(r)
	if !ds.HasErrors() {
		ds = append(ds, s.p.Configure(ctx, c)...)
	}
	if !ds.HasErrors() {
		s.mu.Lock()
		s.blocks, s.before = blocks, s.blocks
		s.mu.Unlock()
	}
	return &pluginpb.ConfigureResponse{Diagnostics: diagnosticsToPB(ds)}, nil
}

func (s *server) Check(ctx context.Context, r *pluginpb.ConfigureRequest) (*pluginpb.ConfigureResponse, error) {
	c, _, ds := s.read(r)
	if p, ok := s.p.(Checker); ok && !ds.HasErrors() {
		ds = append(ds, p.Check(ctx, c)...)
	}
	return &pluginpb.ConfigureResponse{Diagnostics: diagnosticsToPB(ds)}, nil
}

// read reads a configuration, and the host blocks by id.
func (s *server) read(r *pluginpb.ConfigureRequest) (c *Config, blocks map[string]Block, ds Diagnostics) {
	c = &Config{Host: s.host, Log: s.log}
	blocks = map[string]Block{}
	for _, b := range r.GetBlocks() {
		like := s.info.Host
		if b.GetKind() == pluginpb.Block_KIND_PLUGIN {
			like = s.info.Plugin
		}
		value, bad := decode(b.GetValue(), like)
		block := Block{id: b.GetId(), Value: value, Hosts: b.GetHosts(), Pos: b.GetPos()}
		for _, e := range bad {
			ds = append(ds, block.Errorf(e.path, "%s", e.text))
		}
		switch b.GetKind() {
		case pluginpb.Block_KIND_PLUGIN:
			c.Plugin = block
		case pluginpb.Block_KIND_HOST:
			blocks[block.id] = block
			c.Hosts = append(c.Hosts, block)
		}
	}
	return c, blocks, ds
}

func (s *server) block(id string) (Block, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, blocks := range []map[string]Block{s.blocks, s.before} {
		if b, ok := blocks[id]; ok {
			return b, nil
		}
	}
	return Block{}, status.Errorf(codes.NotFound, "no block %q in the configuration", id)
}

// value is block where nil is good enough.
func (s *server) value(id string) any {
	b, _ := s.block(id)
	return b.Value
}

func (s *server) Authorize(r *pluginpb.AuthorizeRequest, stream grpc.ServerStreamingServer[pluginpb.AuthorizeResponse]) error {
	a, ok := s.p.(Authorizer)
	if !ok {
		return status.Error(codes.Unimplemented, "no Authorize")
	}
	block, err := s.block(r.GetBlock())
	if err != nil {
		return err
	}
	ctx := stream.Context()
	waits := make(chan waiting)
	done := make(chan Decision, 1)
	// It ends when Authorize does, which may be after this call; nothing waits for it then.
	go func() {
		done <- a.Authorize(ctx, &Request{
			ID: r.GetId(), Use: useFromPB(r.GetUse()), Block: block.Value, Pos: block.Pos,
			waiting: func(w waiting) {
				select {
				case waits <- w:
				case <-ctx.Done():
				}
			},
		})
	}()
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	var last *pluginpb.Waiting // nil: nobody is being asked
	for {
		select {
		case d := <-done:
			return stream.Send(&pluginpb.AuthorizeResponse{Answer: &pluginpb.AuthorizeResponse_Decision{Decision: d.toPB()}})
		case w := <-waits:
			last = &pluginpb.Waiting{Message: w.message, Answerable: w.answerable}
			beat.Reset(heartbeat)
		case <-beat.C:
			if last == nil {
				continue
			}
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := stream.Send(&pluginpb.AuthorizeResponse{Answer: &pluginpb.AuthorizeResponse_Waiting{Waiting: last}}); err != nil {
			return err
		}
	}
}

func (s *server) Retain(ctx context.Context, r *pluginpb.RetainRequest) (*pluginpb.RetainResponse, error) {
	p, ok := s.p.(Retainer)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "no Retain")
	}
	if _, err := s.block(r.GetConnection().GetBlock()); err != nil {
		return nil, err
	}
	until := p.Retain(ctx, &Idle{connectionFromPB(r.GetConnection(), s.value), timeFromPB(r.GetIdleSince())})
	return &pluginpb.RetainResponse{Until: timeToPB(until)}, nil
}

func (s *server) Observe(stream grpc.ClientStreamingServer[pluginpb.Event, pluginpb.ObserveResponse]) error {
	o, ok := s.p.(Observer)
	if !ok {
		return status.Error(codes.Unimplemented, "no Observe")
	}
	for {
		e, err := stream.Recv()
		if err == io.EOF {
			return stream.SendAndClose(&pluginpb.ObserveResponse{})
		}
		if err != nil {
			return err
		}
		o.Observe(stream.Context(), eventFromPB(e, s.value))
	}
}

func (s *server) Command(r *pluginpb.CommandRequest, stream grpc.ServerStreamingServer[pluginpb.CommandResponse]) error {
	c, ok := s.p.(Commander)
	if !ok {
		return status.Error(codes.Unimplemented, "no Command")
	}
	out := &output{stream: stream}
	code := c.Command(stream.Context(), r.GetArgs(), writer(out.stdout), writer(out.stderr))
	if code < 0 || code > 255 {
		code = 255
	}
	return out.send(&pluginpb.CommandResponse{Output: &pluginpb.CommandResponse_Status{Status: uint32(code)}})
}

// output is what a command writes; both streams may be written by many goroutines.
type output struct {
	mu     sync.Mutex // held while sending: a gRPC stream has one sender at a time
	stream grpc.ServerStreamingServer[pluginpb.CommandResponse]
}

func (o *output) send(r *pluginpb.CommandResponse) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.stream.Send(r)
}

func (o *output) stdout(b []byte) error {
	return o.send(&pluginpb.CommandResponse{Output: &pluginpb.CommandResponse_Stdout{Stdout: b}})
}

func (o *output) stderr(b []byte) error {
	return o.send(&pluginpb.CommandResponse{Output: &pluginpb.CommandResponse_Stderr{Stderr: b}})
}

// writer sends what is written in messages of at most 32 KiB.
type writer func([]byte) error

func (w writer) Write(p []byte) (n int, err error) {
	for n < len(p) {
		m := min(len(p)-n, 32<<10)
		if err := w(p[n : n+m]); err != nil {
			return n, err
		}
		n += m
	}
	return n, nil
}
