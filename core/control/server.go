package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/control/controlpb"
	"github.com/muxproxy/muxproxy/core/peercreds"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	handshakeTime = 5 * time.Second // for a peer that connects and says nothing
	callTime      = 2 * time.Minute // for a call whose client set no deadline; a person may have to be asked
	stopTime      = 2 * time.Second // for calls under way when the server ends
	maxRequest    = 64 << 10
)

// Serve answers commands on l, whose connections have to be *net.UnixConn, until ctx is done or l is closed, and closes
// l. Calls under way get 2 s to end then. Peers of another user than this one or root are turned away. The error is nil
// unless l fails.
func Serve(ctx context.Context, l net.Listener, b Backend) error {
	s := grpc.NewServer(
		grpc.Creds(peercreds.New()),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.UnaryInterceptor(bound),
	)
	controlpb.RegisterControlServer(s, &server{backend: b})
	if p, ok := b.(PluginBackend); ok {
		controlpb.RegisterPluginsServer(s, &pluginServer{backend: p})
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	var err error
	select {
	case err = <-served:
		served <- nil
	case <-ctx.Done():
	}
	stopped := make(chan struct{})
	go func() {
		s.GracefulStop()
		close(stopped)
	}()
	t := time.NewTimer(stopTime)
	defer t.Stop()
	select {
	case <-stopped:
	case <-t.C:
		s.Stop() // ends what GracefulStop waits for
		<-stopped
	}
	<-served
	if err == nil || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return fmt.Errorf("control socket: %w", err)
}

// bound gives every call a deadline.
func bound(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	return handle(ctx, req)
}

type server struct {
	controlpb.UnimplementedControlServer
	backend Backend
}

func (s *server) Status(context.Context, *controlpb.StatusRequest) (*controlpb.StatusResponse, error) {
	return statusToPB(s.backend.Status()), nil
}

func (s *server) Exists(_ context.Context, r *controlpb.ExistsRequest) (*controlpb.ExistsResponse, error) {
	return &controlpb.ExistsResponse{Exists: s.backend.Exists(r.GetTarget())}, nil
}

func (s *server) Close(ctx context.Context, r *controlpb.CloseRequest) (*controlpb.CloseResponse, error) {
	n, err := s.backend.Close(ctx, peercreds.CallerOf(ctx), r.GetTarget())
	if err != nil {
		return nil, errorToStatus(err)
	}
	return &controlpb.CloseResponse{Upstreams: int64(n)}, nil
}

func (s *server) Drain(ctx context.Context, r *controlpb.DrainRequest) (*controlpb.DrainResponse, error) {
	n, err := s.backend.Drain(ctx, peercreds.CallerOf(ctx), r.GetTarget())
	if err != nil {
		return nil, errorToStatus(err)
	}
	return &controlpb.DrainResponse{Upstreams: int64(n)}, nil
}

func (s *server) Stop(ctx context.Context, r *controlpb.StopRequest) (*controlpb.StopResponse, error) {
	if err := s.backend.Stop(ctx, peercreds.CallerOf(ctx), r.GetDrain()); err != nil {
		return nil, errorToStatus(err)
	}
	return &controlpb.StopResponse{}, nil
}

func (s *server) Restart(ctx context.Context, _ *controlpb.RestartRequest) (*controlpb.RestartResponse, error) {
	pid, err := s.backend.Restart(ctx, peercreds.CallerOf(ctx))
	if err != nil {
		return nil, errorToStatus(err)
	}
	return &controlpb.RestartResponse{Pid: int64(pid)}, nil
}

func (s *server) Reload(ctx context.Context, r *controlpb.ReloadRequest) (*controlpb.ReloadResponse, error) {
	got, err := s.backend.Reload(ctx, peercreds.CallerOf(ctx), r.GetColor())
	if err != nil {
		return nil, errorToStatus(err)
	}
	return &controlpb.ReloadResponse{
		File: text(got.File), InForce: got.InForce, Text: []byte(got.Text), Diagnostics: got.Diagnostics,
	}, nil
}

func (s *server) Lock(ctx context.Context, r *controlpb.LockRequest) (*controlpb.LockResponse, error) {
	defer clear(r.Passphrase)
	if err := s.backend.Lock(ctx, peercreds.CallerOf(ctx), r.GetPassphrase()); err != nil {
		return nil, errorToStatus(err)
	}
	return &controlpb.LockResponse{}, nil
}

func (s *server) Unlock(ctx context.Context, r *controlpb.UnlockRequest) (*controlpb.UnlockResponse, error) {
	defer clear(r.Passphrase)
	state, err := s.backend.Unlock(ctx, peercreds.CallerOf(ctx), r.GetPassphrase())
	if errors.Is(err, use.ErrPassphrase) {
		return &controlpb.UnlockResponse{Lock: lockToPB(state), Wrong: true}, nil
	}
	if err != nil {
		return nil, errorToStatus(err)
	}
	return &controlpb.UnlockResponse{Lock: lockToPB(state)}, nil
}

func (s *server) HostKeys(_ context.Context, r *controlpb.HostKeysRequest) (*controlpb.HostKeysResponse, error) {
	plain, ca := s.backend.HostKeys(r.GetMade())
	return &controlpb.HostKeysResponse{Plain: each(plain, text), Ca: each(ca, text)}, nil
}

func (s *server) Dump(context.Context, *controlpb.DumpRequest) (*controlpb.DumpResponse, error) {
	return &controlpb.DumpResponse{Text: []byte(s.backend.Dump())}, nil
}

// errorToStatus and statusToError carry an error over the wire: a denial whole, of any other its text.
func errorToStatus(err error) error {
	var denied *use.Denied
	if errors.As(err, &denied) {
		st, detailErr := status.New(codes.PermissionDenied, text(denied.Error())).WithDetails(deniedToPB(denied))
		if detailErr != nil {
			panic(detailErr) // the message is one of ours, its strings are UTF-8
		}
		return st.Err()
	}
	code := codes.Unknown
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	}
	return status.Error(code, text(err.Error()))
}

func statusToError(err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	for _, detail := range st.Details() {
		if d, ok := detail.(*controlpb.Denied); ok {
			return deniedFromPB(d)
		}
	}
	switch st.Code() {
	case codes.Unavailable:
		return ErrLost
	case codes.Canceled:
		return context.Canceled
	case codes.DeadlineExceeded:
		return errors.New("the master did not answer in time; see `muxproxy log`")
	case codes.Unimplemented:
		return errors.New("the master is of an older version and does not know this command; run `muxproxy master restart`")
	}
	return errors.New(st.Message())
}
