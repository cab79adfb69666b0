// Package pluginrun runs one plugin process: start, handshake, tokens, sockets, life line and end. The master and the
// conformance suite start plugins with it; a plugin itself has no use for it.
package pluginrun

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

const (
	connectTime  = 5 * time.Second // to a plugin that said where it listens
	shutdownTime = time.Second     // for the answer to Shutdown; go-plugin waits for 2 s more until it kills
	drainTime    = 500 * time.Millisecond
	maxLine      = 8 << 10
	maxMessage   = 1 << 20
)

// Options say what to run and how.
type Options struct {
	Name string
	Path string // the executable
	Args []string
	Env  []string // the whole environment, but for what the handshake adds
	// Dir is a directory of this user alone, in which the plugin gets one of its own for its sockets. Its path must leave
	// room for about 50 bytes more in a socket's address.
	Dir    string
	Stream string // path of the stream socket
	// Host makes the service that the plugin can call, told the plugin's pid, which is also the id of its session and
	// process group. HostOptions are for its server.
	Host        func(pid int) pluginpb.HostServer
	HostOptions []grpc.ServerOption
	// Stderr gets every line that the plugin writes to standard error, without its end and cut off at 8 KiB, from one
	// goroutine that ends before Done is closed.
	Stderr       func(line string)
	StartTimeout time.Duration // until the handshake; 0: 10 s
	// Bare is for the conformance suite: without the cookie in the environment.
	Bare bool
}

// Process is a running plugin.
type Process struct {
	Client pluginpb.PluginClient
	Hello  plugin.Hello // what it was told

	conn   *grpc.ClientConn
	runner *process
	client *goplugin.Client
	host   *grpc.Server
	dir    string
	stop   sync.Once
}

// Start starts a plugin and returns when it is connected. The error is a line for a person without the plugin's name;
// then nothing is left of it. If ctx ends, starting does.
func Start(ctx context.Context, o Options) (*Process, error) {
	if o.StartTimeout == 0 {
		o.StartTimeout = 10 * time.Second
	}
	if o.Stderr == nil {
		o.Stderr = func(string) {}
	}
	dir, err := os.MkdirTemp(o.Dir, "p")
	if err != nil {
		return nil, fmt.Errorf("no place for its sockets: %w", err)
	}
	p := &Process{dir: dir}
	listener, err := net.Listen("unix", filepath.Join(dir, "host"))
	if err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("its host service: %w", err)
	}
	p.Hello = plugin.Hello{
		Host: "unix:" + filepath.Join(dir, "host"), Stream: o.Stream, HostToken: rand.Text(), PluginToken: rand.Text(),
	}
	line, err := json.Marshal(p.Hello)
	if err != nil {
		panic(err) // strings only
	}
	p.runner = &process{dir: dir, line: append(line, '\n'), stderr: o.Stderr, done: make(chan struct{})}
	p.client = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: goplugin.HandshakeConfig{MagicCookieKey: plugin.CookieKey, MagicCookieValue: plugin.CookieValue},
		VersionedPlugins: map[int]goplugin.PluginSet{plugin.ProtocolVersion: {
			"plugin": &dispensed{},
		}},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		// With a Cmd go-plugin gives the plugin this process's standard input, panics over some lines of standard error,
		// leaves children alive and ignores TempDir.
		RunnerFunc: func(_ hclog.Logger, cmd *exec.Cmd, _ string) (runner.Runner, error) {
			p.runner.cmd = exec.Command(o.Path, o.Args...)
			p.runner.cmd.Dir = "/"
			p.runner.cmd.Env = append(append([]string{}, o.Env...), cmd.Env...)
			if o.Bare {
				p.runner.cmd.Env = o.Env
			}
			return p.runner, nil
		},
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: dir},
		SkipHostEnv:      true,
		StartTimeout:     o.StartTimeout,
		Logger:           hclog.NewNullLogger(), // what matters comes back as an error
		Stderr:           io.Discard,
		GRPCDialOptions: []grpc.DialOption{
			grpc.WithNoProxy(),
			grpc.WithPerRPCCredentials(token(p.Hello.PluginToken)),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: connectTime}),
			grpc.WithChainUnaryInterceptor(boundShutdown),
			grpc.WithChainStreamInterceptor(noBroker),
		},
	})
	cancel := context.AfterFunc(ctx, p.runner.kill)
	err = p.connect(listener, o)
	if !cancel() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		p.Stop()
		listener.Close()
		if why := p.runner.failure(); why != nil {
			err = why
		}
		if ctx.Err() != nil {
			err = errors.New("starting it was given up")
		}
		return nil, err
	}
	return p, nil
}

func (p *Process) connect(listener net.Listener, o Options) error {
	if _, err := p.client.Start(); err != nil {
		if _, ok := errors.AsType[*os.PathError](err); ok || p.runner.pid() == 0 {
			return fmt.Errorf("can't be started: %w", err)
		}
		return fmt.Errorf("does not begin as a plugin does: %s", strings.Join(strings.Fields(err.Error()), " "))
	}
	p.host = grpc.NewServer(append(append([]grpc.ServerOption{grpc.MaxRecvMsgSize(maxMessage)}, o.HostOptions...),
		plugin.Authorized(p.Hello.HostToken)...)...)
	pluginpb.RegisterHostServer(p.host, o.Host(p.runner.pid()))
	go func() { _ = p.host.Serve(listener) }() // until Stop; a plugin whose host service fails finds out
	conn, err := p.client.Client()
	if err != nil {
		return fmt.Errorf("can't be connected to: %w", err)
	}
	raw, err := conn.Dispense("plugin")
	if err != nil {
		return err
	}
	p.conn = raw.(*grpc.ClientConn)
	p.Client = pluginpb.NewPluginClient(p.conn)
	return nil
}

// Conn is the connection to the plugin, with its token.
func (p *Process) Conn() *grpc.ClientConn { return p.conn }

// Address is the plugin's gRPC address.
func (p *Process) Address() string {
	if c := p.client.ReattachConfig(); c != nil {
		return c.Addr.Network() + ":" + c.Addr.String()
	}
	return ""
}

// PID is the plugin's process, session and process group.
func (p *Process) PID() int { return p.runner.pid() }

// Done is closed when the process has ended and its output is read.
func (p *Process) Done() <-chan struct{} { return p.runner.done }

// Status says how the process ended; nil if with status 0, or while it runs.
func (p *Process) Status() error { return p.runner.status() }

// CutLifeLine ends the plugin's standard input, as the death of the master does.
func (p *Process) CutLifeLine() { p.runner.cut() }

// Kill ends the process and its group at once. Stop is still to be called.
func (p *Process) Kill() { p.runner.kill() }

// Stop asks the plugin to end, ends it if it does not within 3 s, and removes its sockets. It returns when that is done.
func (p *Process) Stop() {
	p.stop.Do(func() {
		if p.host != nil {
			defer p.host.Stop()
		}
		p.client.Kill()
		p.runner.kill() // children that are left; and the process where go-plugin had not got as far as to have it
		if p.runner.pid() != 0 {
			<-p.runner.done
		}
		os.RemoveAll(p.dir)
	})
}

type token string

func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{plugin.TokenKey: string(t)}, nil
}

func (token) RequireTransportSecurity() bool { return false }

// boundShutdown gives Shutdown a deadline: go-plugin gives it none, and a plugin need not answer.
func boundShutdown(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker,
	opts ...grpc.CallOption) error {
	if strings.HasPrefix(method, "/plugin.GRPCController/") {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, shutdownTime)
		defer cancel()
	}
	return next(ctx, method, req, reply, cc, opts...)
}

// noBroker keeps go-plugin from its broker: the Host service has a socket of its own.
func noBroker(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer,
	opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if strings.HasPrefix(method, "/plugin.GRPCBroker/") {
		return nil, status.Error(codes.Unimplemented, "there is no broker")
	}
	return next(ctx, desc, cc, method, opts...)
}

// dispensed takes the connection from go-plugin.
type dispensed struct {
	goplugin.NetRPCUnsupportedPlugin
}

func (*dispensed) GRPCServer(*goplugin.GRPCBroker, *grpc.Server) error {
	return errors.New("this is the master's side")
}

func (*dispensed) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return c, nil
}
