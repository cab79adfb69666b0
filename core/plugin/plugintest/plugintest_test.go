package plugintest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

// The test binary plays the plugins: good ones with Serve, sloppy ones without.
func TestMain(m *testing.M) {
	mode, playing := os.LookupEnv("PLAY_PLUGIN")
	switch {
	case !playing:
		os.Exit(m.Run())
	case mode == "":
		plugin.Serve(&good{})
	}
	playSloppy(mode)
}

// good has every hook, and uses the master in all of them.
type good struct{ c *plugin.Config }

type goodBlock struct {
	Name  string        `hcl:"name"`
	After time.Duration `hcl:"after,optional"`
	Rules []goodRule    `hcl:"rule,block"`
}

type goodRule struct {
	Label string         `hcl:"label,label"`
	Sizes map[string]int `hcl:"sizes,optional"`
}

func (*good) Describe() plugin.Info {
	return plugin.Info{Name: "good", Version: "1", Host: goodBlock{}, Wants: plugin.Capabilities()}
}

func (g *good) Configure(_ context.Context, c *plugin.Config) plugin.Diagnostics {
	g.c = c
	return nil
}

func (g *good) Authorize(ctx context.Context, r *plugin.Request) plugin.Decision {
	if r.Use.Kind == "shell" { // a person answers, later
		r.Waiting("thinking", false)
		<-ctx.Done()
	}
	return plugin.NoOpinion()
}

func (g *good) Retain(context.Context, *plugin.Idle) time.Time { return time.Now().Add(time.Minute) }
func (g *good) Observe(context.Context, plugin.Event)          {}

func (g *good) Command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) != 1 {
		fmt.Fprintln(stderr, "usage: good ADDRESS")
		return 2
	}
	h := g.c.Host
	cs, err := h.Connections(ctx)
	if err != nil || len(cs) != 1 {
		return 255
	}
	c, err := h.Dial(ctx, cs[0].ID, "tcp", args[0])
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 255
	}
	defer c.Close()
	fmt.Fprint(c, c.RemoteAddr())
	c.CloseWrite()
	if _, err := io.Copy(stdout, c); err != nil {
		return 255
	}
	l, err := h.Listen(ctx, cs[0].ID, "tcp", "127.0.0.1:1")
	if err != nil {
		return 255
	}
	defer l.Close()
	in, err := l.Accept()
	if err != nil {
		return 255
	}
	defer in.Close()
	if _, err := io.Copy(stdout, in); err != nil {
		return 255
	}
	if err := h.Notify(ctx, cs[0].ID, "done"); err != nil {
		return 255
	}
	if err := h.Keep(ctx, []byte("kept")); err != nil {
		return 255
	}
	kept, err := h.Kept(ctx)
	if err != nil {
		return 255
	}
	stdout.Write(kept)
	return 0
}

func TestInProcess(t *testing.T) {
	s := InProcess(t, &good{})
	checked, err := s.Client.Check(t.Context(), &pluginpb.ConfigureRequest{Blocks: []*pluginpb.Block{
		{Id: "0", Kind: pluginpb.Block_KIND_HOST, Value: []byte(`{"name":"n","after":"soon"}`)},
	}})
	if ds := checked.GetDiagnostics(); err != nil || len(ds) != 1 || ds[0].GetBlock() != "0" {
		t.Errorf("without Check: %v, %v", ds, err)
	}
	ds := s.Configure(t, `{}`, `{"after":"soon","rule":[{"label":"a","sizes":{"x":1.5}}]}`)
	var got []string
	for _, d := range ds {
		var path []string
		for _, step := range d.GetPath() {
			path = append(path, step.String())
		}
		got = append(got, d.GetBlock()+" "+strings.Join(path, " ")+" "+d.GetSummary())
	}
	// protobuf's text has spaces at random.
	for i := range got {
		got[i] = strings.ReplaceAll(got[i], ":  ", ":")
		got[i] = strings.ReplaceAll(got[i], ": ", ":")
	}
	want := []string{
		`0 attribute:"name" missing`,
		`0 attribute:"after" "soon" is not a duration such as "90s", "10m" or "8h"`,
		`0 attribute:"rule" index:0 attribute:"sizes" {"x":1.5} is not a map`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if ds := s.Configure(t, `{}`, `{"name":"n","after":"5s","rule":[]}`); len(ds) > 0 {
		t.Fatal(ds)
	}
	if d := s.Authorize(t, "0", &pluginpb.Use{Kind: "exec"}); d.GetVerdict() != pluginpb.Decision_VERDICT_NO_OPINION {
		t.Errorf("%v", d)
	}
	stream, err := s.Client.Command(t.Context(), &pluginpb.CommandRequest{Args: []string{"host:1"}})
	var out strings.Builder
	for err == nil {
		var r *pluginpb.CommandResponse
		if r, err = stream.Recv(); err == nil {
			out.Write(r.GetStdout())
			out.Write(r.GetStderr())
		}
	}
	if out.String() != "host:1hellokept" || len(s.Master.Notices()) != 1 {
		t.Errorf("%q, notices %q", out.String(), s.Master.Notices())
	}
}

// sloppy breaks one rule.
type sloppy struct {
	pluginpb.UnimplementedPluginServer
	mode string
}

func (s *sloppy) Describe(context.Context, *pluginpb.DescribeRequest) (*pluginpb.DescribeResponse, error) {
	d := &pluginpb.DescribeResponse{
		Name: "sloppy", Hooks: []string{"authorize", "retain", "observe", "command"},
		Host: &pluginpb.Schema{Attributes: []*pluginpb.Attribute{{Name: "a", Type: `"string"`, Required: true}}},
	}
	switch s.mode {
	case "name":
		d.Name = "Sloppy Plugin"
	case "hook":
		d.Hooks = []string{"hook"}
	case "capability":
		d.Wants = []string{"everything"}
	case "type":
		d.Host.Attributes[0].Type = `"object"`
	case "default":
		d.Host.Attributes[0].Default = `{}`
	}
	return d, nil
}

func (s *sloppy) Configure(_ context.Context, r *pluginpb.ConfigureRequest) (*pluginpb.ConfigureResponse, error) {
	answer := &pluginpb.ConfigureResponse{}
	for _, b := range r.GetBlocks() {
		var v map[string]any
		if json.Unmarshal(b.GetValue(), &v) != nil {
			return nil, status.Error(codes.Internal, "no JSON")
		}
		if _, ok := v["a"]; !ok && b.GetKind() == pluginpb.Block_KIND_HOST {
			d := &pluginpb.Diagnostic{Summary: "a is missing", Block: b.GetId()}
			switch s.mode {
			case "status":
				return nil, status.Error(codes.InvalidArgument, "a is missing")
			case "path":
				d.Path = []*pluginpb.Step{{Step: &pluginpb.Step_Attribute{Attribute: "b"}}}
			case "block":
				d.Block = "another"
			}
			answer.Diagnostics = append(answer.Diagnostics, d)
		}
		if _, ok := v["x-of-a-later-version"]; ok && s.mode == "strict" {
			return nil, status.Error(codes.InvalidArgument, "what is this?")
		}
	}
	return answer, nil
}

func (s *sloppy) Authorize(r *pluginpb.AuthorizeRequest, stream grpc.ServerStreamingServer[pluginpb.AuthorizeResponse]) error {
	d := &pluginpb.Decision{Verdict: pluginpb.Decision_VERDICT_NO_OPINION}
	switch {
	case s.mode == "kind" && r.GetUse().GetKind() == "of-a-later-version":
		return status.Error(codes.Internal, "what is this?")
	case s.mode == "verdict":
		d.Verdict = 0
	case s.mode == "late":
		select {}
	case s.mode == "anyblock":
	case s.mode == "cancel" && r.GetUse().GetTarget() == nil:
		os.Exit(3)
	case r.GetBlock() != "check":
		return status.Error(codes.NotFound, "no such block")
	}
	return stream.Send(&pluginpb.AuthorizeResponse{Answer: &pluginpb.AuthorizeResponse_Decision{Decision: d}})
}

func (s *sloppy) Retain(context.Context, *pluginpb.RetainRequest) (*pluginpb.RetainResponse, error) {
	if s.mode == "retain" {
		return nil, status.Error(codes.Internal, "no")
	}
	return &pluginpb.RetainResponse{}, nil
}

func (s *sloppy) Observe(stream grpc.ClientStreamingServer[pluginpb.Event, pluginpb.ObserveResponse]) error {
	for {
		e, err := stream.Recv()
		if err != nil {
			return stream.SendAndClose(&pluginpb.ObserveResponse{})
		}
		if s.mode == "observe" && e.GetKind() == "of-a-later-version" {
			return status.Error(codes.Internal, "what is this?")
		}
	}
}

func (s *sloppy) Command(_ *pluginpb.CommandRequest, stream grpc.ServerStreamingServer[pluginpb.CommandResponse]) error {
	if s.mode == "command" {
		return nil
	}
	return stream.Send(&pluginpb.CommandResponse{Output: &pluginpb.CommandResponse_Status{Status: 2}})
}

type controller interface{ shutdown() }

type shutdowner bool // whether it ends

func (s shutdowner) shutdown() {
	if s {
		time.AfterFunc(10*time.Millisecond, func() { os.Exit(0) }) // for the answer
	}
}

func playSloppy(mode string) {
	if os.Getenv(plugin.CookieKey) == "" && mode != "cookie" {
		fmt.Fprintln(os.Stderr, "this is a plugin")
		os.Exit(1)
	}
	if os.Getenv(plugin.CookieKey) == "" {
		os.Exit(0)
	}
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	var hello plugin.Hello
	if err != nil || json.Unmarshal(line, &hello) != nil {
		os.Exit(4)
	}
	path := filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		os.Exit(4)
	}
	opts := plugin.Authorized(hello.PluginToken)
	if mode == "token" {
		opts = nil
	}
	s := grpc.NewServer(opts...)
	pluginpb.RegisterPluginServer(s, &sloppy{mode: mode})
	h := health.NewServer()
	if mode != "health" {
		h.SetServingStatus("plugin", grpc_health_v1.HealthCheckResponse_SERVING)
	}
	grpc_health_v1.RegisterHealthServer(s, h)
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "plugin.GRPCController", HandlerType: (*controller)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Shutdown", Handler: func(srv any, ctx context.Context, dec func(any) error,
			interceptor grpc.UnaryServerInterceptor) (any, error) {
			do := func(context.Context, any) (any, error) {
				srv.(controller).shutdown()
				return &pluginpb.ObserveResponse{}, nil
			}
			if interceptor == nil {
				return do(ctx, nil)
			}
			return interceptor(ctx, nil, &grpc.UnaryServerInfo{}, do)
		}}},
	}, shutdowner(mode != "shutdown"))
	if mode != "stdin" {
		go func() {
			io.Copy(io.Discard, in)
			os.Exit(0)
		}()
	}
	fmt.Printf("1|1|unix|%s|grpc\n", path)
	s.Serve(l)
	os.Exit(0)
}

// Every check passes with a good plugin, in Go's SDK or not, and finds what it is there for.
func TestCheck(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[string]string{
		"":           "",
		"fine":       "",
		"cookie":     "without its cookie it says what it is and ends: its exit status is 0",
		"health":     "health",
		"name":       `describes itself: name, schemas, hooks, capabilities: the name "Sloppy Plugin"`,
		"hook":       `there is no hook "hook"`,
		"capability": `there is no capability "everything"`,
		"type":       "is no type that policy can hold",
		"default":    `its default "{}" is not of its type`,
		"token":      "refuses calls without its token: Describe without the token gives OK",
		"status":     "a problem is an answer, not a gRPC status",
		"path":       `its path leads to "b", which is not in the schema`,
		"block":      `is about a block "another"`,
		"strict":     "ignores what it does not know in it",
		"kind":       "Authorize answers in time, for every kind of use and for kinds to come: of-a-later-version",
		"verdict":    "neither a decision nor waiting",
		"late":       "it does not answer in time",
		"anyblock":   "Authorize allows nothing under a block that it was not told of: the answer",
		"cancel":     "still runs: ",
		"retain":     "Retain answers in time: it fails: no",
		"observe":    "Observe takes events",
		"command":    "the last answer is no status",
		"shutdown":   "ends on Shutdown within 2 s: it takes too long",
		"stdin":      "ends when its standard input does: it takes too long",
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			var wrong []string
			results := Check(t.Context(), Options{Path: exe, Env: []string{"PLAY_PLUGIN=" + mode}})
			for _, r := range results {
				if r.Err != nil {
					wrong = append(wrong, r.Name+": "+r.Err.Error())
				}
			}
			if (len(wrong) == 0) != (want == "") || !strings.Contains(strings.Join(wrong, "\n"), want) {
				t.Errorf("%q, want %q", wrong, want)
			}
			if want == "" && len(results) < 15 {
				t.Errorf("only %d things were checked", len(results))
			}
		})
	}
	if r := Check(t.Context(), Options{Path: "/nowhere/plugin"}); r[len(r)-1].Err == nil {
		t.Errorf("no such file: %v", r)
	}
}

// What is not given by a plugin's own Register is no error of a test.
func TestRegister(t *testing.T) {
	type bad struct {
		F func() `hcl:"f"`
	}
	err := plugin.Register(grpc.NewServer(), describes{plugin.Info{Name: "bad", Host: bad{}}}, nil, zerolog.Nop())
	if err == nil || !strings.Contains(err.Error(), "a func() can't be configured") {
		t.Errorf("%v", err)
	}
}

type describes struct{ info plugin.Info }

func (d describes) Describe() plugin.Info { return d.info }
func (describes) Configure(context.Context, *plugin.Config) plugin.Diagnostics {
	return nil
}

// A socket is handed over, in either direction, and the plugin hears what its stream carries while it does.
func TestHandOver(t *testing.T) {
	g := &good{}
	s := InProcess(t, g)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.Master.OnListen = func(context.Context, *pluginpb.ListenRequest) (net.Listener, error) { return l, nil }
	s.Master.OnDial = func(_ context.Context, r *pluginpb.DialRequest) (net.Conn, error) {
		if r.GetAddress() == "no:1" {
			return nil, &plugin.RefusedError{Reason: 2, Message: "no"}
		}
		return net.Dial("tcp", l.Addr().String())
	}
	if ds := s.Configure(t, `{}`, `{"name":"n"}`); len(ds) > 0 {
		t.Fatal(ds)
	}
	h := g.c.Host
	forward, err := h.Listen(t.Context(), 1, "tcp", "127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	defer forward.Close()
	pair := func() (near, far *net.TCPConn) {
		p, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		a, err := net.Dial("tcp", p.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		b, err := p.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { a.Close(); b.Close() })
		return a.(*net.TCPConn), b.(*net.TCPConn)
	}
	// What is dialled comes back as an offer.
	near1, far1 := pair()
	out, err := h.HandOver(t.Context(), plugin.Handover{Connection: 1, Network: "tcp", Address: "yes:1", Data: []byte("a")}, far1)
	if err != nil {
		t.Fatal(err)
	}
	far1.Close()
	offer, err := forward.AcceptOffer()
	if err != nil {
		t.Fatal(err)
	}
	s.Master.OnPermit = func(_ context.Context, r *pluginpb.PermitRequest) error {
		if r.GetAddress() == "no:1" {
			return status.Error(codes.PermissionDenied, "no")
		}
		return nil
	}
	if err := offer.Permit(t.Context(), "tcp", "no:1"); !errors.Is(err, plugin.ErrDenied) {
		t.Errorf("denied: %v", err)
	}
	if err := offer.Permit(t.Context(), "tcp", "yes:1"); err != nil {
		t.Error(err)
	}
	near2, far2 := pair()
	in, err := offer.HandOver(t.Context(), far2)
	if err != nil {
		t.Fatal(err)
	}
	far2.Close()
	var ended sync.WaitGroup
	ended.Go(out.Wait)
	ended.Go(in.Wait)
	counted := func(name string, x *plugin.Transfer, wantIn, wantOut uint64) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) { // polling: it comes when it comes
			in, out := x.Counts()
			if in == wantIn && out == wantOut {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: in %d, out %d, want %d and %d", name, in, out, wantIn, wantOut)
			}
		}
	}
	fmt.Fprint(near1, "bc")
	b := make([]byte, 3)
	if _, err := io.ReadFull(near2, b); err != nil || string(b) != "abc" {
		t.Errorf("%q, %v", b, err)
	}
	counted("dialled", out, 2, 0) // Master counts what it copies
	counted("accepted", in, 0, 3)
	near1.CloseWrite()
	if _, err := near2.Read(b); err != io.EOF {
		t.Errorf("instead of the half-close: %v", err)
	}
	fmt.Fprint(near2, "defg")
	near2.CloseWrite()
	if rest, err := io.ReadAll(near1); err != nil || string(rest) != "defg" {
		t.Errorf("%q, %v", rest, err)
	}
	ended.Wait()
	counted("dialled, at the end", out, 2, 4)
	counted("accepted, at the end", in, 4, 3)

	_, err = h.HandOver(t.Context(), plugin.Handover{Connection: 1, Network: "tcp", Address: "no:1"}, near1)
	if refused, ok := errors.AsType[*plugin.RefusedError](err); !ok || refused.Reason != 2 {
		t.Errorf("refused: %v", err)
	}
	s.Master.SetConnections()
	if _, err = h.Dial(t.Context(), 1, "tcp", "yes:1"); !errors.Is(err, plugin.ErrNotFound) {
		t.Errorf("without a connection: %v", err)
	}
}
