package control

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/control/controlpb"
	"github.com/muxproxy/muxproxy/core/peercreds"
	"github.com/muxproxy/muxproxy/core/use"
)

// Plugin is one that the policy mentions.
type Plugin struct {
	Name     string    `json:"name"`
	Version  string    `json:"version,omitempty"`
	State    string    `json:"state"` // "up", "restarting", "failed"
	PID      int       `json:"pid,omitempty"`
	Since    time.Time `json:"since,omitzero"`
	Restarts int       `json:"restarts,omitempty"`
	Path     string    `json:"path"`
	Hooks    []string  `json:"hooks"`
	May      []string  `json:"may"`               // capabilities it has
	Lacks    []string  `json:"lacks,omitempty"`   // and those it would like to have
	Dropped  uint64    `json:"dropped,omitempty"` // events it did not take in time
	Error    string    `json:"error,omitempty"`   // the last one, escaped
	Verbs    []Verb    `json:"verbs,omitempty"`
}

// Verb is a form of a plugin's command line, escaped.
type Verb struct {
	Usage string `json:"usage"`
	Doc   string `json:"doc"`
}

// Pending is a use that a plugin asks a person about. Its text is escaped.
type Pending struct {
	ID         string    `json:"id"`
	Plugin     string    `json:"plugin"`
	Kind       string    `json:"kind"`
	Target     string    `json:"target"`
	Detail     string    `json:"detail,omitempty"` // command, subsystem, destination
	Caller     string    `json:"caller"`
	Message    string    `json:"message"`
	Since      time.Time `json:"since"`
	Answerable bool      `json:"answerable"` // by Decide
}

// PluginBackend is what a Backend may be besides: a master that runs plugins.
type PluginBackend interface {
	Plugins() []Plugin
	Pending() []Pending
	// Decide answers a pending use. The gate is asked first.
	Decide(ctx context.Context, by use.Caller, id string, allow bool, reason string) error
	// RunPlugin runs a command of a plugin and returns its exit status. The gate is asked first. The error wraps
	// ErrNoCommand if no plugin has it.
	RunPlugin(ctx context.Context, by use.Caller, plugin string, args []string, stdout, stderr io.Writer) (int, error)
}

// ErrNoCommand says that no plugin brings a command.
var ErrNoCommand = errors.New("no plugin has this command")

type pluginServer struct {
	controlpb.UnimplementedPluginsServer
	backend PluginBackend
}

func (s *pluginServer) List(context.Context, *controlpb.ListPluginsRequest) (*controlpb.ListPluginsResponse, error) {
	return &controlpb.ListPluginsResponse{Plugins: each(s.backend.Plugins(), pluginToPB)}, nil
}

func (s *pluginServer) Pending(context.Context, *controlpb.PendingRequest) (*controlpb.PendingResponse, error) {
	return &controlpb.PendingResponse{Uses: each(s.backend.Pending(), pendingToPB)}, nil
}

func (s *pluginServer) Decide(ctx context.Context, r *controlpb.DecideRequest) (*controlpb.DecideResponse, error) {
	if err := s.backend.Decide(ctx, peercreds.CallerOf(ctx), r.GetId(), r.GetAllow(), r.GetReason()); err != nil {
		return nil, errorToStatus(err)
	}
	return &controlpb.DecideResponse{}, nil
}

func (s *pluginServer) Run(r *controlpb.RunRequest, stream grpc.ServerStreamingServer[controlpb.RunResponse]) error {
	var mu sync.Mutex // held while sending: a gRPC stream has one sender at a time
	send := func(r *controlpb.RunResponse) error {
		mu.Lock()
		defer mu.Unlock()
		return stream.Send(r)
	}
	ctx := stream.Context()
	code, err := s.backend.RunPlugin(ctx, peercreds.CallerOf(ctx), r.GetPlugin(), r.GetArgs(),
		sender(func(b []byte) error {
			return send(&controlpb.RunResponse{Output: &controlpb.RunResponse_Stdout{Stdout: b}})
		}),
		sender(func(b []byte) error {
			return send(&controlpb.RunResponse{Output: &controlpb.RunResponse_Stderr{Stderr: b}})
		}))
	if errors.Is(err, ErrNoCommand) {
		return status.Error(codes.NotFound, err.Error())
	}
	if err != nil {
		return errorToStatus(err)
	}
	return send(&controlpb.RunResponse{Output: &controlpb.RunResponse_Status{Status: uint32(code)}})
}

// sender is a writer; each write is a message, of what a plugin sends in one of its own.
type sender func([]byte) error

func (s sender) Write(p []byte) (int, error) {
	if err := s(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Plugins returns the plugins that the policy mentions; none if the master runs no plugins.
func (m *Master) Plugins(ctx context.Context) ([]Plugin, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	r, err := controlpb.NewPluginsClient(m.conn).List(ctx, &controlpb.ListPluginsRequest{})
	return each(r.GetPlugins(), pluginFromPB), pluginError(err)
}

// Pending returns the uses that persons are being asked about, the oldest first.
func (m *Master) Pending(ctx context.Context) ([]Pending, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	r, err := controlpb.NewPluginsClient(m.conn).Pending(ctx, &controlpb.PendingRequest{})
	return each(r.GetUses(), pendingFromPB), pluginError(err)
}

// pluginError is the error of a list: a master without plugins has an empty one.
func pluginError(err error) error {
	if status.Code(err) == codes.Unimplemented {
		return nil
	}
	return statusToError(err)
}

// Decide answers a pending use.
func (m *Master) Decide(ctx context.Context, id string, allow bool, reason string) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	_, err := controlpb.NewPluginsClient(m.conn).Decide(ctx, &controlpb.DecideRequest{Id: text(id), Allow: allow, Reason: text(reason)})
	return statusToError(err)
}

// RunPlugin runs a command of a plugin for as long as it takes, and returns its exit status. The error wraps ErrNoCommand
// if no plugin has it.
func (m *Master) RunPlugin(ctx context.Context, plugin string, args []string, stdout, stderr io.Writer) (int, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := controlpb.NewPluginsClient(m.conn).Run(ctx, &controlpb.RunRequest{Plugin: text(plugin), Args: each(args, text)})
	for err == nil {
		var r *controlpb.RunResponse
		if r, err = stream.Recv(); err != nil {
			break
		}
		switch o := r.GetOutput().(type) {
		case *controlpb.RunResponse_Stdout:
			_, err = stdout.Write(o.Stdout)
		case *controlpb.RunResponse_Stderr:
			_, err = stderr.Write(o.Stderr)
		case *controlpb.RunResponse_Status:
			return int(o.Status), nil
		}
		if err != nil {
			return 0, err
		}
	}
	switch code := status.Code(err); {
	case code == codes.NotFound || code == codes.Unimplemented:
		return 0, ErrNoCommand
	case errors.Is(err, io.EOF):
		return 0, ErrLost
	}
	return 0, statusToError(err)
}

func pluginToPB(p Plugin) *controlpb.Plugin {
	return &controlpb.Plugin{
		Name: text(p.Name), Version: text(p.Version), State: text(p.State), Pid: int64(p.PID), Since: timeToPB(p.Since),
		Restarts: int64(p.Restarts), Path: []byte(p.Path), Hooks: each(p.Hooks, text), May: each(p.May, text),
		Lacks: each(p.Lacks, text), Dropped: p.Dropped, Error: text(p.Error),
		Verbs: each(p.Verbs, func(v Verb) *controlpb.PluginVerb {
			return &controlpb.PluginVerb{Usage: text(v.Usage), Doc: text(v.Doc)}
		}),
	}
}

func pluginFromPB(p *controlpb.Plugin) Plugin {
	return Plugin{
		Name: p.GetName(), Version: p.GetVersion(), State: p.GetState(), PID: int(p.GetPid()), Since: timeFromPB(p.GetSince()),
		Restarts: int(p.GetRestarts()), Path: string(p.GetPath()), Hooks: each(p.GetHooks(), text), May: each(p.GetMay(), text),
		Lacks: each(p.GetLacks(), text), Dropped: p.GetDropped(), Error: p.GetError(),
		Verbs: each(p.GetVerbs(), func(v *controlpb.PluginVerb) Verb { return Verb{v.GetUsage(), v.GetDoc()} }),
	}
}

func pendingToPB(p Pending) *controlpb.PendingUse {
	return &controlpb.PendingUse{
		Id: text(p.ID), Plugin: text(p.Plugin), Kind: text(p.Kind), Target: text(p.Target), Detail: text(p.Detail),
		Caller: text(p.Caller), Message: text(p.Message), Since: timeToPB(p.Since), Answerable: p.Answerable,
	}
}

func pendingFromPB(p *controlpb.PendingUse) Pending {
	return Pending{
		ID: p.GetId(), Plugin: p.GetPlugin(), Kind: p.GetKind(), Target: p.GetTarget(), Detail: p.GetDetail(),
		Caller: p.GetCaller(), Message: p.GetMessage(), Since: timeFromPB(p.GetSince()), Answerable: p.GetAnswerable(),
	}
}
