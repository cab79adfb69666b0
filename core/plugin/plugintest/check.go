package plugintest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	ctyjson "github.com/zclconf/go-cty/cty/json"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/pluginrun"
)

const (
	answerTime = 3 * time.Second // plugins are told 2 s
	endTime    = 3 * time.Second // likewise
	manyEvents = 1000
)

// Options say what to check.
type Options struct {
	Path string
	Args []string
	Env  []string // NAME=VALUE besides PATH and HOME
	// Plugin and Host are JSON objects with what blocks need besides the schema's defaults. "": nothing.
	Plugin, Host string
	// Log gets the plugin's standard error, line by line; nil: nobody does.
	Log func(line string)
}

// Result is one thing that was checked.
type Result struct {
	Name string
	Err  error // nil: as it should be
}

// Check starts an executable as the master does, and returns what it does right and wrong, in the order of checking. What
// could not be checked after something went wrong is left out. The plugin is ended in any case.
func Check(ctx context.Context, o Options) []Result {
	s := &suite{o: o, ctx: ctx}
	dir, err := os.MkdirTemp("", "mp")
	if err != nil {
		return []Result{{"a place for sockets", err}}
	}
	defer os.RemoveAll(dir)
	s.dir = dir
	if s.master, err = NewMaster(dir); err != nil {
		return []Result{{"a place for sockets", err}}
	}
	s.master.Block = "check"
	defer s.master.Stop()
	s.run()
	return s.results
}

// Run is Check for a test.
func Run(t TB, o Options) {
	t.Helper()
	for _, r := range Check(t.Context(), o) {
		if r.Err != nil {
			t.Errorf("%s: %v", r.Name, r.Err)
		}
	}
}

type suite struct {
	o       Options
	ctx     context.Context
	dir     string
	master  *Master
	results []Result
}

// check runs one check and reports whether it went well.
func (s *suite) check(name string, do func() error) bool {
	err := do()
	s.results = append(s.results, Result{name, err})
	return err == nil
}

func (s *suite) env() []string {
	return append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}, s.o.Env...)
}

func (s *suite) start() (*pluginrun.Process, error) {
	return pluginrun.Start(s.ctx, pluginrun.Options{
		Name: "checked", Path: s.o.Path, Args: s.o.Args, Env: s.env(), Dir: s.dir, Stream: s.master.Stream(),
		Host: func(int) pluginpb.HostServer { return s.master },
		Stderr: func(line string) {
			if s.o.Log != nil {
				s.o.Log(line)
			}
		},
	})
}

func (s *suite) run() {
	s.check("without its cookie it says what it is and ends", s.withoutCookie)
	var p *pluginrun.Process
	if !s.check("starts: handshake, protocol version, socket in its directory", func() (err error) {
		p, err = s.start()
		return err
	}) {
		return
	}
	defer p.Stop()
	var d *pluginpb.DescribeResponse
	s.check("health: the service \"plugin\" is SERVING", func() error { return s.health(p) })
	if s.check("describes itself: name, schemas, hooks, capabilities", func() (err error) {
		d, err = s.describe(p)
		return err
	}) {
		s.check("refuses calls without its token", func() error { return s.strangers(p) })
		s.check("problems of the configuration are placed in it", func() error { return s.problems(p, d) })
		if s.check("takes a configuration, and ignores what it does not know in it", func() error { return s.configure(p, d) }) {
			s.hooks(p, d)
		}
	}
	s.check("ends on Shutdown within 2 s", func() error { return s.shutdown(p) })
	s.check("ends when its standard input does", s.lifeLine)
	s.check("two of it run at once", s.two)
}

func (s *suite) hooks(p *pluginrun.Process, d *pluginpb.DescribeResponse) {
	for _, h := range []struct {
		name, what string
		do         func(*pluginrun.Process) error
	}{
		{"authorize", "Authorize answers in time, for every kind of use and for kinds to come", s.authorize},
		{"authorize", "Authorize allows nothing under a block that it was not told of", s.unknownBlock},
		{"authorize", "Authorize can be cancelled", s.cancel},
		{"retain", "Retain answers in time", s.retain},
		{"observe", "Observe takes events, of kinds to come too", s.observe},
		{"command", "Command ends with a status, whatever the arguments", s.command},
	} {
		if slices.Contains(d.GetHooks(), h.name) {
			s.check(h.what, func() error { return h.do(p) })
		}
	}
	s.check("still runs", func() error {
		select {
		case <-p.Done():
			return errors.New("it has ended")
		default:
			_, err := p.Describe(s.ctx)
			return err
		}
	})
}

func (s *suite) withoutCookie() error {
	ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.o.Path, s.o.Args...)
	cmd.Env = s.env()
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	switch exit := (*exec.ExitError)(nil); {
	case ctx.Err() != nil:
		return errTime
	case err == nil:
		return errors.New("its exit status is 0")
	case !errors.As(err, &exit):
		return err
	case len(bytes.TrimSpace(out.Bytes())) == 0:
		return errors.New("it says nothing")
	}
	return nil
}

func (s *suite) health(p *pluginrun.Process) error {
	ctx, cancel := context.WithTimeout(s.ctx, pluginrun.CallTime)
	defer cancel()
	r, err := grpc_health_v1.NewHealthClient(p.Conn()).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "plugin"})
	if err != nil {
		return pluginrun.CallError(err)
	}
	if r.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("it is %v", r.GetStatus())
	}
	return nil
}

func (s *suite) describe(p *pluginrun.Process) (*pluginpb.DescribeResponse, error) {
	d, err := p.Describe(s.ctx)
	if err != nil {
		return nil, err
	}
	for _, h := range d.GetHooks() {
		if !slices.Contains([]string{"authorize", "retain", "observe", "command"}, h) {
			return nil, fmt.Errorf("there is no hook %q", h)
		}
	}
	for _, w := range d.GetWants() {
		if !slices.Contains(plugin.Capabilities(), plugin.Capability(w)) {
			return nil, fmt.Errorf("there is no capability %q", w)
		}
	}
	return d, nil
}

func (s *suite) strangers(p *pluginrun.Process) error {
	conn, err := grpc.NewClient(p.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer conn.Close()
	client := pluginpb.NewPluginClient(conn)
	for _, token := range []string{"", "guess", p.Hello.HostToken} {
		ctx, cancel := context.WithTimeout(s.ctx, pluginrun.CallTime)
		defer cancel()
		if token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, plugin.TokenKey, token)
		}
		for _, call := range []struct {
			name string
			do   func() error
		}{
			{"Describe", func() error { _, err := client.Describe(ctx, &pluginpb.DescribeRequest{}); return err }},
			{"Configure", func() error { _, err := client.Configure(ctx, &pluginpb.ConfigureRequest{}); return err }},
			{"Authorize", func() error {
				stream, err := client.Authorize(ctx, &pluginpb.AuthorizeRequest{})
				if err == nil {
					_, err = stream.Recv()
				}
				return err
			}},
			{"Command", func() error {
				stream, err := client.Command(ctx, &pluginpb.CommandRequest{})
				if err == nil {
					_, err = stream.Recv()
				}
				return err
			}},
			{"Shutdown", func() error { return shutdown(ctx, conn) }},
		} {
			if err := call.do(); status.Code(err) != codes.Unauthenticated {
				return fmt.Errorf("%s without the token gives %v, not UNAUTHENTICATED", call.name, status.Code(err))
			}
		}
	}
	return nil
}

// shutdown calls GRPCController, whose messages have no fields.
func shutdown(ctx context.Context, conn *grpc.ClientConn) error {
	return conn.Invoke(ctx, "/plugin.GRPCController/Shutdown", &pluginpb.DescribeRequest{}, &pluginpb.ObserveResponse{})
}

// value makes a block's value: defaults, and over them what the Options say.
func value(schema *pluginpb.Schema, more string) ([]byte, error) {
	v := map[string]json.RawMessage{}
	for _, a := range schema.GetAttributes() {
		t, d, err := pluginrun.AttributeType(a)
		if err != nil {
			return nil, err
		}
		if v[a.GetName()], err = ctyjson.Marshal(d, t); err != nil {
			return nil, err
		}
	}
	for _, b := range schema.GetBlocks() {
		v[b.GetName()] = json.RawMessage("[]")
	}
	if more != "" {
		if err := json.Unmarshal([]byte(more), &v); err != nil {
			return nil, fmt.Errorf("the value %q: %w", more, err)
		}
	}
	return json.Marshal(v)
}

func (s *suite) config(d *pluginpb.DescribeResponse) (*pluginpb.ConfigureRequest, error) {
	own, err := value(d.GetPlugin(), s.o.Plugin)
	if err != nil {
		return nil, err
	}
	host, err := value(d.GetHost(), s.o.Host)
	if err != nil {
		return nil, err
	}
	return &pluginpb.ConfigureRequest{Blocks: []*pluginpb.Block{
		{Kind: pluginpb.Block_KIND_PLUGIN, Value: own},
		{Id: "check", Kind: pluginpb.Block_KIND_HOST, Value: host, Hosts: []string{"*.example.com"}},
	}}, nil
}

func (s *suite) send(p *pluginrun.Process, r *pluginpb.ConfigureRequest) ([]*pluginpb.Diagnostic, error) {
	ctx, cancel := context.WithTimeout(s.ctx, pluginrun.CallTime)
	defer cancel()
	answer, err := p.Client.Configure(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("a problem is an answer, not a gRPC status: %w", pluginrun.CallError(err))
	}
	return answer.GetDiagnostics(), nil
}

// problems sends blocks that nobody wrote: everything required is missing.
func (s *suite) problems(p *pluginrun.Process, d *pluginpb.DescribeResponse) error {
	ds, err := s.send(p, &pluginpb.ConfigureRequest{Blocks: []*pluginpb.Block{
		{Kind: pluginpb.Block_KIND_PLUGIN, Value: []byte("{}")},
		{Id: "empty", Kind: pluginpb.Block_KIND_HOST, Value: []byte("{}")},
	}})
	if err != nil {
		return err
	}
	for _, diag := range ds {
		schema := d.GetPlugin()
		switch diag.GetBlock() {
		case "":
		case "empty":
			schema = d.GetHost()
		default:
			return fmt.Errorf("%q is about a block %q that there is not", diag.GetSummary(), diag.GetBlock())
		}
		if diag.GetSummary() == "" || strings.ContainsAny(diag.GetSummary(), "\n\r") {
			return fmt.Errorf("a summary has to be one line: %q", diag.GetSummary())
		}
		if err := leads(schema, diag.GetPath()); err != nil {
			return fmt.Errorf("%q: %w", diag.GetSummary(), err)
		}
	}
	return nil
}

// leads reports whether a path starts at something that the schema has.
func leads(schema *pluginpb.Schema, path []*pluginpb.Step) error {
	if len(path) == 0 {
		return nil
	}
	name := path[0].GetAttribute()
	for _, a := range schema.GetAttributes() {
		if a.GetName() == name {
			return nil
		}
	}
	for _, b := range schema.GetBlocks() {
		if b.GetName() == name {
			if len(path) < 3 {
				return nil
			}
			if _, ok := path[1].GetStep().(*pluginpb.Step_Index); !ok {
				return fmt.Errorf("after %q the path lacks the number of the block", name)
			}
			return leads(b.GetSchema(), path[2:])
		}
	}
	return fmt.Errorf("its path leads to %q, which is not in the schema", name)
}

func (s *suite) configure(p *pluginrun.Process, d *pluginpb.DescribeResponse) error {
	r, err := s.config(d)
	if err != nil {
		return err
	}
	for _, b := range r.Blocks {
		b.Value = append([]byte(`{"x-of-a-later-version":{"a":[1]},`), b.Value[1:]...)
		if string(b.Value[len(b.Value)-2:]) == ",}" {
			b.Value = append(b.Value[:len(b.Value)-2], '}')
		}
		b.ProtoReflect().SetUnknown(later())
	}
	r.ProtoReflect().SetUnknown(later())
	ds, err := s.send(p, r)
	if err != nil {
		return err
	}
	for _, diag := range ds {
		if diag.GetSeverity() != pluginpb.Diagnostic_SEVERITY_WARNING {
			return fmt.Errorf("it says %q of defaults: say what blocks need for the check", plugin.Printable(diag.GetSummary()))
		}
	}
	return nil
}

// later is a field of a later version.
func later() []byte {
	return protowire.AppendString(protowire.AppendTag(nil, 1999, protowire.BytesType), "later")
}

// ask puts a question and returns the first answer.
func (s *suite) ask(ctx context.Context, p *pluginrun.Process, block, kind string) (*pluginpb.AuthorizeResponse, error) {
	u := &pluginpb.Use{
		Kind: kind, Client: 1, Target: testConnection.GetTarget(), Command: []byte("ls \xff"), Program: "ls",
		Processes: []*pluginpb.Process{{Pid: 1, Exe: []byte("/usr/bin/ssh"), Args: [][]byte{[]byte("ssh"), []byte("\xff")}}},
	}
	u.ProtoReflect().SetUnknown(later())
	stream, err := p.Client.Authorize(ctx, &pluginpb.AuthorizeRequest{Id: "check", Block: block, Use: u})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

func (s *suite) authorize(p *pluginrun.Process) error {
	for _, kind := range []string{"attach", "shell", "exec", "subsystem", "local-forward", "remote-forward", "cancel-forward", "agent",
		"x11", "jump", "other", "control", "of-a-later-version"} {
		ctx, cancel := context.WithTimeout(s.ctx, answerTime)
		r, err := s.ask(ctx, p, "check", kind)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", kind, pluginrun.CallError(err))
		}
		if r.GetWaiting() == nil && r.GetDecision().GetVerdict() == pluginpb.Decision_VERDICT_UNSPECIFIED {
			return fmt.Errorf("%s: neither a decision nor waiting", kind)
		}
	}
	return nil
}

func (s *suite) unknownBlock(p *pluginrun.Process) error {
	ctx, cancel := context.WithTimeout(s.ctx, answerTime)
	defer cancel()
	r, err := s.ask(ctx, p, "never told", "exec")
	if err == nil && r.GetDecision().GetVerdict() != pluginpb.Decision_VERDICT_DENY {
		return fmt.Errorf("the answer is %v", r)
	}
	return nil
}

func (s *suite) cancel(p *pluginrun.Process) error {
	for range 20 {
		ctx, cancel := context.WithCancel(s.ctx)
		stream, err := p.Client.Authorize(ctx, &pluginpb.AuthorizeRequest{Id: "check", Block: "check", Use: &pluginpb.Use{Kind: "exec"}})
		cancel()
		if err == nil {
			_, err = stream.Recv()
		}
		if code := status.Code(err); err != nil && code != codes.Canceled {
			return pluginrun.CallError(err)
		}
	}
	return nil
}

func (s *suite) retain(p *pluginrun.Process) error {
	ctx, cancel := context.WithTimeout(s.ctx, answerTime)
	defer cancel()
	r, err := p.Client.Retain(ctx, &pluginpb.RetainRequest{Connection: s.master.Connection(), IdleSince: timestamppb.Now()})
	if err != nil {
		return pluginrun.CallError(err)
	}
	if r.GetUntil() != nil && r.GetUntil().CheckValid() != nil {
		return fmt.Errorf("%v is no time", r.GetUntil())
	}
	return nil
}

func (s *suite) observe(p *pluginrun.Process) error {
	ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
	defer cancel()
	stream, err := p.Client.Observe(ctx)
	for i := 0; i < manyEvents && err == nil; i++ {
		err = stream.Send(&pluginpb.Event{
			Time: timestamppb.Now(), Kind: []string{"decision", "end", "up", "down", "of-a-later-version"}[i%5], Id: fmt.Sprint(i),
			Use: &pluginpb.Use{Kind: "exec", Target: testConnection.GetTarget()}, Connection: s.master.Connection(),
		})
	}
	if err == nil || errors.Is(err, io.EOF) { // then CloseAndRecv says why
		_, err = stream.CloseAndRecv()
	}
	return pluginrun.CallError(err)
}

func (s *suite) command(p *pluginrun.Process) error {
	for _, args := range [][]string{nil, {"--of-a-later-version"}, {"\xff", ""}} {
		ctx, cancel := context.WithTimeout(s.ctx, pluginrun.CallTime)
		defer cancel()
		for i := range args {
			args[i] = strings.ToValidUTF8(args[i], "?")
		}
		stream, err := p.Client.Command(ctx, &pluginpb.CommandRequest{Args: args})
		done := false
		for err == nil {
			var r *pluginpb.CommandResponse
			if r, err = stream.Recv(); err == nil {
				_, done = r.GetOutput().(*pluginpb.CommandResponse_Status)
			}
		}
		if !errors.Is(err, io.EOF) {
			return fmt.Errorf("%q: %w", args, pluginrun.CallError(err))
		}
		if !done {
			return fmt.Errorf("%q: the last answer is no status", args)
		}
	}
	return nil
}

func (s *suite) shutdown(p *pluginrun.Process) error {
	ctx, cancel := context.WithTimeout(s.ctx, endTime)
	defer cancel()
	if err := shutdown(ctx, p.Conn()); status.Code(err) == codes.Unimplemented {
		return errors.New("it does not know plugin.GRPCController/Shutdown")
	}
	return within(s.ctx, endTime, p.Done())
}

func (s *suite) lifeLine() error {
	p, err := s.start()
	if err != nil {
		return err
	}
	defer p.Stop()
	p.CutLifeLine()
	return within(s.ctx, endTime, p.Done())
}

func (s *suite) two() error {
	var errs [2]error
	var both sync.WaitGroup
	for i := range errs {
		both.Go(func() {
			p, err := s.start()
			if err == nil {
				defer p.Stop()
				_, err = p.Describe(s.ctx)
			}
			errs[i] = err
		})
	}
	both.Wait()
	return errors.Join(errs[:]...)
}
