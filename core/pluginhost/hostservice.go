package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/peercreds"
	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	maxKept     = 64 << 10
	maxDialData = 64 << 10
)

// hostService is the service Host for one process of a plugin.
type hostService struct {
	pluginpb.UnimplementedHostServer
	p   *supervised
	pid int // process, session
}

// may returns an error unless policy gives the capability.
func (h *hostService) may(c plugin.Capability) error {
	if h.p.has(c) {
		return nil
	}
	return status.Errorf(codes.PermissionDenied, "%s may not %s: policy has to say may = [%q] in its plugin block",
		h.p.spec.Name, c, string(c))
}

// covers returns an error unless the host of t has a block of the plugin.
func (h *hostService) covers(t use.Target) error {
	// A plugin that is being configured is in no set yet.
	if s := h.p.m.set(); s.find(h.p.spec.Name) == h.p && s.lookup.Covers(h.p.spec.Name, t) {
		return nil
	}
	return status.Errorf(codes.PermissionDenied, "%s has no block of %s", utf8(use.Printable(t.String())), h.p.spec.Name)
}

// connection finds one that the plugin may use. One that it may not is as unknown to it as one that is not there.
func (h *hostService) connection(c plugin.Capability, id uint64) error {
	if err := h.may(c); err != nil {
		return err
	}
	for _, conn := range h.p.m.o.Backend.Connections() {
		if conn.ID == id {
			return h.covers(conn.Target)
		}
	}
	return status.Errorf(codes.NotFound, "there is no connection %d", id)
}

func (h *hostService) actor(ctx context.Context) Actor {
	return Actor{Plugin: h.p.spec.Name, Caller: peercreds.CallerOf(ctx)}
}

// failed makes a status of the master's errors. Denials say that they are.
func failed(err error) error {
	code := codes.FailedPrecondition
	var denied *use.Denied
	switch {
	case err == nil:
		return nil
	case errors.As(err, &denied):
		code = codes.PermissionDenied
	case errors.Is(err, pool.ErrGone):
		code = codes.NotFound
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	}
	return status.Error(code, utf8(use.Printable(err.Error())))
}

func (h *hostService) Connections(context.Context, *pluginpb.ConnectionsRequest) (*pluginpb.ConnectionsResponse, error) {
	if err := h.may(plugin.CanList); err != nil {
		return nil, err
	}
	out := &pluginpb.ConnectionsResponse{}
	for _, c := range h.p.m.o.Backend.Connections() {
		if h.covers(c.Target) == nil {
			out.Connections = append(out.Connections, connectionToPB(c, h.block(c.Target)))
		}
	}
	return out, nil
}

func (h *hostService) Connect(ctx context.Context, r *pluginpb.ConnectRequest) (*pluginpb.ConnectResponse, error) {
	if err := h.may(plugin.CanConnect); err != nil {
		return nil, err
	}
	t, err := h.p.m.o.Backend.Resolve(ctx, r.GetTarget())
	if err != nil {
		return nil, failed(err)
	}
	if err := h.covers(t); err != nil {
		return nil, err
	}
	c, err := h.p.m.o.Backend.Connect(ctx, h.actor(ctx), t)
	switch {
	case errors.Is(err, pool.ErrRefused):
		return &pluginpb.ConnectResponse{Refused: utf8(use.Printable(err.Error()))}, nil
	case err != nil:
		return nil, failed(err)
	}
	return &pluginpb.ConnectResponse{Connection: connectionToPB(c, h.block(c.Target))}, nil
}

// block is the plugin's block that holds for connections to t.
func (h *hostService) block(t use.Target) string { return h.p.m.set().block(h.p.spec.Name, t) }

func (h *hostService) Resolve(ctx context.Context, r *pluginpb.ResolveRequest) (*pluginpb.ResolveResponse, error) {
	if err := h.may(plugin.CanConnect); err != nil {
		return nil, err
	}
	t, err := h.p.m.o.Backend.Resolve(ctx, r.GetTarget())
	if err != nil {
		return nil, failed(err)
	}
	if err := h.covers(t); err != nil {
		return nil, err
	}
	return &pluginpb.ResolveResponse{Target: targetToPB(t), Block: h.block(t)}, nil
}

func (h *hostService) Close(ctx context.Context, r *pluginpb.CloseRequest) (*pluginpb.CloseResponse, error) {
	if err := h.connection(plugin.CanClose, r.GetConnection()); err != nil {
		return nil, err
	}
	if err := h.p.m.o.Backend.Close(ctx, h.actor(ctx), r.GetConnection()); err != nil {
		return nil, failed(err)
	}
	return &pluginpb.CloseResponse{}, nil
}

func (h *hostService) Drain(ctx context.Context, r *pluginpb.DrainRequest) (*pluginpb.DrainResponse, error) {
	if err := h.connection(plugin.CanClose, r.GetConnection()); err != nil {
		return nil, err
	}
	if err := h.p.m.o.Backend.Drain(ctx, h.actor(ctx), r.GetConnection()); err != nil {
		return nil, failed(err)
	}
	return &pluginpb.DrainResponse{}, nil
}

func knownNetwork(network string) error {
	if network == "tcp" || network == "unix" {
		return nil
	}
	return status.Errorf(codes.InvalidArgument, "unknown network %q", utf8(use.Printable(network)))
}

func (h *hostService) Dial(ctx context.Context, r *pluginpb.DialRequest) (*pluginpb.DialResponse, error) {
	if err := h.connection(plugin.CanDial, r.GetConnection()); err != nil {
		return nil, err
	}
	if err := knownNetwork(r.GetNetwork()); err != nil {
		return nil, err
	}
	if len(r.GetData()) > maxDialData {
		return nil, status.Errorf(codes.InvalidArgument, "more than %d bytes of data", maxDialData)
	}
	s, err := h.p.m.o.Backend.Dial(ctx, h.actor(ctx), Dial{
		Connection: r.GetConnection(), Network: r.GetNetwork(), Address: r.GetAddress(), Origin: r.GetOrigin(),
		PID: int(r.GetPid()),
	})
	if refused, ok := errors.AsType[*Refused](err); ok {
		return &pluginpb.DialResponse{Refusal: &pluginpb.Refusal{
			Reason: refused.Reason, Message: utf8(use.Printable(refused.Message)),
		}}, nil
	}
	if err != nil {
		return nil, failed(err)
	}
	id, err := h.p.m.streams.ticket(h.pid, 0, s, r.GetData())
	if err != nil {
		s.Close()
		return nil, failed(err)
	}
	return &pluginpb.DialResponse{Ticket: &pluginpb.Ticket{Id: id}}, nil
}

func (h *hostService) Listen(r *pluginpb.ListenRequest, out grpc.ServerStreamingServer[pluginpb.ListenResponse]) error {
	ctx := out.Context()
	if err := h.connection(plugin.CanListen, r.GetConnection()); err != nil {
		return err
	}
	if err := knownNetwork(r.GetNetwork()); err != nil {
		return err
	}
	l, err := h.p.m.o.Backend.Listen(ctx, h.actor(ctx), r.GetConnection(), r.GetNetwork(), r.GetAddress())
	if err != nil {
		return failed(err)
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	err = out.Send(&pluginpb.ListenResponse{Event: &pluginpb.ListenResponse_Address{Address: utf8(l.Addr())}})
	for err == nil {
		s, origin, e := l.Accept()
		if e != nil {
			return failed(e)
		}
		id, e := h.p.m.streams.ticket(h.pid, r.GetConnection(), s, nil)
		if e != nil {
			s.Close()
			continue // too many tickets are out; the plugin does not take its streams
		}
		err = out.Send(&pluginpb.ListenResponse{Event: &pluginpb.ListenResponse_Accepted{
			Accepted: &pluginpb.Accepted{Ticket: &pluginpb.Ticket{Id: id}, Origin: utf8(origin)},
		}})
	}
	return err
}

func (h *hostService) Permit(ctx context.Context, r *pluginpb.PermitRequest) (*pluginpb.PermitResponse, error) {
	s, connection, release := h.p.m.streams.incoming(h.pid, r.GetTicket().GetId())
	if s == nil {
		return nil, status.Error(codes.NotFound, "the stream has ended, or is another's")
	}
	defer release()
	if err := h.connection(plugin.CanListen, connection); err != nil {
		return nil, err
	}
	if err := knownNetwork(r.GetNetwork()); err != nil {
		return nil, err
	}
	if err := s.Permit(ctx, h.actor(ctx), r.GetNetwork(), r.GetAddress()); err != nil {
		return nil, failed(err)
	}
	return &pluginpb.PermitResponse{}, nil
}

func (h *hostService) Ask(ctx context.Context, r *pluginpb.AskRequest) (*pluginpb.AskResponse, error) {
	yes, err := h.p.m.askOwn(ctx, h.p.spec.Name, r.GetId(), r.GetQuestion())
	switch {
	case errors.Is(err, use.ErrNobody):
		return &pluginpb.AskResponse{}, nil
	case errors.Is(err, ErrNotPending):
		return nil, status.Error(codes.NotFound, err.Error())
	case err != nil:
		return nil, failed(err)
	case yes:
		return &pluginpb.AskResponse{Answer: pluginpb.AskResponse_ANSWER_YES}, nil
	}
	return &pluginpb.AskResponse{Answer: pluginpb.AskResponse_ANSWER_NO}, nil
}

func (h *hostService) Decide(_ context.Context, r *pluginpb.DecideRequest) (*pluginpb.DecideResponse, error) {
	if err := h.may(plugin.CanDecide); err != nil {
		return nil, err
	}
	d, ok := h.p.decided(r.GetDecision())
	if !ok {
		return nil, status.Error(codes.InvalidArgument, "a decision that is none")
	}
	if err := h.p.m.decideOwn(h.p.spec.Name, r.GetId(), d); err != nil {
		return nil, status.Error(codes.NotFound, err.Error())
	}
	return &pluginpb.DecideResponse{}, nil
}

func (h *hostService) Notify(ctx context.Context, r *pluginpb.NotifyRequest) (*pluginpb.NotifyResponse, error) {
	if err := h.connection(plugin.CanNotify, r.GetConnection()); err != nil {
		return nil, err
	}
	line := h.p.spec.Name + ": " + use.Printable(clip(r.GetMessage(), 500))
	if err := h.p.m.o.Backend.Notify(ctx, h.actor(ctx), r.GetConnection(), line); err != nil {
		return nil, failed(err)
	}
	return &pluginpb.NotifyResponse{}, nil
}

func (h *hostService) Record(ctx context.Context, r *pluginpb.RecordRequest) (*pluginpb.RecordResponse, error) {
	text := func(s string, most int) string { return use.Printable(clip(s, most)) }
	h.p.m.o.Backend.Record(h.actor(ctx), text(r.GetEvent(), 32), text(r.GetTarget(), 300), text(r.GetDetail(), 1000))
	return &pluginpb.RecordResponse{}, nil
}

// keptFile is where a plugin's data is.
func (h *hostService) keptFile() string {
	return filepath.Join(h.p.m.o.State, "plugins", h.p.spec.Name+".kept")
}

func (h *hostService) Keep(_ context.Context, r *pluginpb.KeepRequest) (*pluginpb.KeepResponse, error) {
	if err := h.may(plugin.CanKeep); err != nil {
		return nil, err
	}
	if len(r.GetData()) > maxKept {
		return nil, status.Errorf(codes.InvalidArgument, "%d bytes are more than the %d that can be kept", len(r.GetData()), maxKept)
	}
	if err := h.p.keep(h.keptFile(), r.GetData()); err != nil {
		return nil, failed(fmt.Errorf("keep data: %w", err))
	}
	return &pluginpb.KeepResponse{}, nil
}

// keep replaces a file in one step, so that a full disk loses nothing.
func (s *supervised) keep(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err1 := f.Close(); err == nil {
		err = err1
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func (h *hostService) Kept(context.Context, *pluginpb.KeptRequest) (*pluginpb.KeptResponse, error) {
	if err := h.may(plugin.CanKeep); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(h.keptFile())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, failed(fmt.Errorf("kept data: %w", err))
	}
	return &pluginpb.KeptResponse{Data: slices.Clone(data)}, nil
}
