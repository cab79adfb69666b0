package pluginhost

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/peercreds"
	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/pluginrun"
	"github.com/muxproxy/muxproxy/core/use"
)

const maxBackoff = time.Minute

// supervised is one plugin of the policy: its process, and the next one when that has crashed.
type supervised struct {
	m    *Manager
	log  zerolog.Logger
	spec Plugin // as it was started: May, AllowOnFailure and Pos are in policy

	stop    context.CancelFunc
	ctx     context.Context // ends with stop
	running sync.WaitGroup  // supervise

	mu       sync.Mutex // guards what follows
	policy   Plugin     // what the policy in force says
	desc     *Described // nil: never got so far
	inst     *instance  // nil: none that is described
	ready    bool       // inst has its configuration
	changed  chan struct{}
	blocks   []*pluginpb.Block // in force; nil: not configured yet
	next     []*pluginpb.Block // of a configuration that may come into force
	took     *instance         // which took next
	restarts int
	failure  string // why it does not run, or did not the last time
	events   *events
	observer *instance // that events go to, or went to
}

// instance is one process of a plugin.
type instance struct {
	*pluginrun.Process
	since time.Time
	host  *hostService
	file  fs.FileInfo // that was started; nil: built in
}

func newSupervised(m *Manager, p Plugin) *supervised {
	s := &supervised{m: m, spec: p, policy: p, log: m.o.Log.With().Str("plugin", p.Name).Logger(), changed: make(chan struct{}), events: newEvents()}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.failure = "it was not started"
	return s
}

// first starts the plugin for the first time.
func (s *supervised) first(ctx context.Context) []Problem {
	inst, desc, err := s.start(ctx)
	if err != nil {
		s.failed(err)
		var out []Problem
		for line := range strings.Lines(err.Error()) {
			out = append(out, s.broken(errors.New(strings.TrimSpace(line))))
		}
		return out
	}
	d, err := describedFromPB(desc)
	if err != nil {
		panic(err) // it is checked
	}
	s.mu.Lock()
	s.inst, s.desc, s.failure = inst, d, ""
	s.mu.Unlock()
	s.running.Go(s.supervise)
	var out []Problem
	if lacks := s.status().Lacks; len(lacks) > 0 {
		p := s.problem("it would like to %s: add that to may, if it shall", strings.Join(lacks, ", "))
		p.Warning = true
		out = append(out, p)
	}
	return out
}

func (s *supervised) problem(format string, args ...any) Problem {
	s.mu.Lock()
	pos := s.policy.Pos
	s.mu.Unlock()
	return Problem{Plugin: s.spec.Name, Pos: pos, Text: fmt.Sprintf(format, args...)}
}

func (s *supervised) broken(err error) Problem {
	p := s.problem("%s", use.Printable(err.Error()))
	p.Broken = true
	return p
}

// start starts a process and asks it what it is.
func (s *supervised) start(ctx context.Context) (*instance, *pluginpb.DescribeResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	s.mu.Lock()
	spec := s.spec
	s.mu.Unlock()
	file, err := checkFile(spec)
	if err != nil {
		return nil, nil, err
	}
	inst := &instance{since: time.Now(), host: &hostService{p: s}, file: file}
	lines := &lineLog{log: s.log}
	at := s.m.streams.place()
	p, err := pluginrun.Start(ctx, pluginrun.Options{
		Name: spec.Name, Path: spec.Path, Args: strings.Fields(spec.Args), Env: s.m.o.Env, Dir: at.dir,
		Stream: at.listener.Path(), StartTimeout: s.m.o.Timing.Start, Stderr: lines.line,
		Host: func(pid int) pluginpb.HostServer {
			inst.host.pid = pid
			return inst.host
		},
		HostOptions: []grpc.ServerOption{grpc.Creds(peercreds.New())},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("%s %w", s.spec.Path, err)
	}
	inst.Process = p
	d, err := p.Describe(ctx)
	if err == nil && d.GetName() != s.spec.Name {
		err = fmt.Errorf("calls itself %q: policy must do so too", use.Printable(d.GetName()))
	}
	if err != nil {
		s.m.streams.revoke(p.PID())
		p.Stop()
		return nil, nil, err
	}
	s.log.Info().Int("pid", p.PID()).Str("version", use.Printable(d.GetVersion())).Msg("plugin started")
	return inst, d, nil
}

// checkFile sees whether an executable is there, is the right one, and whether others could change it. Between this and
// exec(2) only those who may write to it can. The file is nil for a built-in plugin.
func checkFile(p Plugin) (fs.FileInfo, error) {
	if p.BuiltIn {
		return nil, nil
	}
	if p.Path == "" {
		return nil, fmt.Errorf("there is no muxproxy-plugin-%s where plugins are looked for", p.Name)
	}
	fi, err := os.Stat(p.Path)
	if err != nil {
		if pe, ok := errors.AsType[*os.PathError](err); ok {
			err = pe.Err
		}
		return nil, fmt.Errorf("%s: %w", p.Path, err)
	}
	if err := paths.CheckFile(p.Path); err != nil {
		return nil, err
	}
	if p.SHA256 == "" {
		return fi, nil
	}
	f, err := os.Open(p.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, fmt.Errorf("%s: %w", p.Path, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); !strings.EqualFold(got, p.SHA256) {
		return nil, fmt.Errorf("%s has the sha256 %s, policy says %s: if the change is wanted, change the policy", p.Path, got,
			strings.ToLower(p.SHA256))
	}
	return fi, nil
}

// replaced reports whether the plugin's file is another one than that which runs.
func (s *supervised) replaced() bool {
	inst, _ := s.up()
	if inst == nil || inst.file == nil {
		return false
	}
	fi, err := os.Stat(s.spec.Path)
	return err != nil || !os.SameFile(fi, inst.file) || fi.Size() != inst.file.Size() || !fi.ModTime().Equal(inst.file.ModTime())
}

// supervise waits for the process to end and starts the next one, until stop.
func (s *supervised) supervise() {
	wait := s.m.o.Timing.Backoff
	for {
		s.mu.Lock()
		inst := s.inst
		s.mu.Unlock()
		select {
		case <-inst.Done():
		case <-s.ctx.Done():
		}
		s.mu.Lock()
		s.inst, s.ready = nil, false
		s.mu.Unlock()
		inst.Stop()
		s.m.streams.revoke(inst.PID())
		if s.ctx.Err() != nil {
			return
		}
		err := errors.New("it ended with exit status 0")
		if e := inst.Status(); e != nil {
			err = fmt.Errorf("it crashed: %w", e)
		}
		s.failed(err)
		if time.Since(inst.since) >= s.m.o.Timing.Stable {
			wait = s.m.o.Timing.Backoff
		}
		for {
			select {
			case <-time.After(wait):
			case <-s.ctx.Done():
				return
			}
			wait = min(2*wait, maxBackoff)
			if err = s.again(); err == nil {
				break
			}
			if s.ctx.Err() != nil {
				return
			}
			s.failed(err)
		}
	}
}

// again starts a crashed plugin and configures it as before.
func (s *supervised) again() error {
	inst, desc, err := s.start(s.ctx)
	if err != nil {
		return err
	}
	d, err := describedFromPB(desc)
	if err != nil {
		panic(err) // it is checked
	}
	s.mu.Lock()
	s.restarts++
	if !sameSchemas(s.desc, d) {
		err = errors.New("it has another schema than before: run `muxproxy master reload`")
	}
	s.inst = inst
	blocks := s.blocks
	s.mu.Unlock()
	if err == nil && blocks != nil {
		var ds []*pluginpb.Diagnostic
		if ds, err = s.send(s.ctx, inst, blocks); err == nil {
			if i := slices.IndexFunc(ds, isError); i >= 0 {
				err = fmt.Errorf("it does not take its configuration any more: %s", ds[i].GetSummary())
			} else if s.setReadyAlone(inst) {
				s.tellPolicy()
			} else {
				err = errors.New("its configuration changed while it was started")
			}
		}
	}
	if err != nil {
		s.mu.Lock()
		s.inst = nil
		s.mu.Unlock()
		inst.Stop()
		s.m.streams.revoke(inst.PID())
		return err
	}
	return nil
}

// failed remembers and logs why the plugin does not run.
func (s *supervised) failed(err error) {
	text := use.Printable(err.Error())
	s.mu.Lock()
	s.failure = text
	s.mu.Unlock()
	s.log.Warn().Str("error", text).Msg("plugin failed")
}

// send configures a process.
func (s *supervised) send(ctx context.Context, inst *instance, blocks []*pluginpb.Block) ([]*pluginpb.Diagnostic, error) {
	ctx, cancel := context.WithTimeout(ctx, pluginrun.CallTime)
	defer cancel()
	r, err := inst.Client.Configure(ctx, &pluginpb.ConfigureRequest{Blocks: blocks})
	if err != nil {
		return nil, fmt.Errorf("it can't be configured: %w", pluginrun.CallError(err))
	}
	return r.GetDiagnostics(), nil
}

// check asks for the problems of a configuration that is not to be taken. A plugin that can't say finds none.
func (s *supervised) check(ctx context.Context, blocks []Block) []Problem {
	s.mu.Lock()
	inst, desc := s.inst, s.desc
	s.mu.Unlock()
	if desc == nil || inst == nil {
		return nil // its problem was told
	}
	next, err := blocksToPB(desc, blocks)
	if err != nil {
		return []Problem{s.broken(err)}
	}
	ctx, cancel := context.WithTimeout(ctx, pluginrun.CallTime)
	defer cancel()
	r, err := inst.Client.Check(ctx, &pluginpb.ConfigureRequest{Blocks: next})
	if status.Code(err) == codes.Unimplemented {
		return nil
	}
	if err != nil {
		return []Problem{s.broken(fmt.Errorf("its configuration can't be checked: %w", pluginrun.CallError(err)))}
	}
	var out []Problem
	for _, d := range r.GetDiagnostics() {
		out = append(out, s.diagnosed(d))
	}
	return out
}

func isError(d *pluginpb.Diagnostic) bool {
	return d.GetSeverity() != pluginpb.Diagnostic_SEVERITY_WARNING
}

// configure brings a configuration that commit or restore follows.
func (s *supervised) configure(ctx context.Context, blocks []Block) []Problem {
	s.mu.Lock()
	inst, desc := s.inst, s.desc
	s.mu.Unlock()
	if desc == nil {
		return nil // its problem was told
	}
	next, err := blocksToPB(desc, blocks)
	if err == nil {
		s.mu.Lock()
		s.next = next
		s.mu.Unlock()
		if inst == nil {
			return []Problem{s.broken(errors.New("it has ended"))}
		}
		var ds []*pluginpb.Diagnostic
		if ds, err = s.send(ctx, inst, next); err == nil {
			var out []Problem
			for _, d := range ds {
				out = append(out, s.diagnosed(d))
			}
			s.mu.Lock()
			if s.took = inst; slices.ContainsFunc(ds, isError) {
				s.next, s.failure = nil, "it does not take its configuration"
			}
			s.mu.Unlock()
			return out
		}
	}
	s.failed(err)
	return []Problem{s.broken(err)}
}

// commit puts what configure brought in force.
func (s *supervised) commit(specs []Plugin) {
	s.mu.Lock()
	for _, p := range specs {
		if p.Name == s.spec.Name {
			s.policy = p
		}
	}
	s.blocks, s.next = s.next, nil
	inst, ok := s.inst, s.blocks != nil
	took := s.took == inst
	if !ok || !took {
		s.ready = false
	}
	observes := s.hasLocked(plugin.CanObserve)
	s.mu.Unlock()
	if !observes {
		s.events.clear()
	}
	switch {
	case inst == nil || !ok:
	case took:
		s.setReady(inst)
	default:
		inst.Kill() // and the next one is configured
	}
}

// restore gives a plugin back what it had.
func (s *supervised) restore(ctx context.Context) {
	s.mu.Lock()
	s.next = nil
	inst, blocks := s.inst, s.blocks
	s.mu.Unlock()
	if inst == nil || blocks == nil {
		return
	}
	if ds, err := s.send(ctx, inst, blocks); err != nil || slices.ContainsFunc(ds, isError) {
		s.log.Warn().Msg("the plugin does not take its earlier configuration back; it is started again")
		inst.Kill()
	}
}

// setReady lets the plugin be asked.
func (s *supervised) setReady(inst *instance) {
	s.mu.Lock()
	first := !s.ready
	s.ready, s.failure = true, ""
	if first {
		close(s.changed)
		s.changed = make(chan struct{})
	}
	observes := s.desc.hook("observe") && s.hasLocked(plugin.CanObserve) && s.observer != inst
	if observes {
		s.observer = inst
	}
	s.mu.Unlock()
	if observes {
		s.running.Go(func() { s.events.deliver(s.ctx, inst, s.log) })
	}
}

// setReadyAlone is setReady for a process that has got the configuration in force, unless another one was sent to it
// meanwhile: which of the two came last can't be told.
func (s *supervised) setReadyAlone(inst *instance) bool {
	s.mu.Lock()
	mixed := s.next != nil || s.took == inst
	s.mu.Unlock()
	if !mixed {
		s.setReady(inst)
	}
	return !mixed
}

// up returns the process if it can be asked, else why not.
func (s *supervised) up() (*instance, string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ready {
		return s.inst, ""
	}
	return nil, s.failure
}

func (s *supervised) isUp() bool {
	inst, _ := s.up()
	return inst != nil
}

// await is up that waits for a plugin which is about to run, until ctx ends. except has crashed, and is not meant.
func (s *supervised) await(ctx context.Context, except *instance) *instance {
	for {
		s.mu.Lock()
		inst, ready, changed := s.inst, s.ready, s.changed
		s.mu.Unlock()
		if ready && inst != except {
			return inst
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		case <-s.ctx.Done():
			return nil
		}
	}
}

// end stops the plugin for good.
func (s *supervised) end() {
	s.stop()
	s.running.Wait()
	s.mu.Lock()
	s.inst, s.ready, s.failure = nil, false, "it was stopped"
	s.mu.Unlock()
}

func (s *supervised) description() *Described {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.desc
}

// hook reports whether the plugin has a hook. One that was never described may have any.
func (d *Described) hook(name string) bool { return d == nil || slices.Contains(d.Hooks, name) }

func (s *supervised) has(c plugin.Capability) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hasLocked(c)
}

func (s *supervised) hasLocked(c plugin.Capability) bool {
	if s.spec.BuiltIn {
		return s.desc != nil && slices.Contains(s.desc.Wants, string(c))
	}
	return slices.Contains(s.policy.May, string(c))
}

func (s *supervised) status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{
		Name: s.spec.Name, State: "failed", Restarts: s.restarts, Path: s.spec.Path, Hooks: []string{}, May: []string{},
		Dropped: s.events.dropped(), Error: s.failure,
	}
	if s.desc != nil {
		st.Version, st.Hooks = s.desc.Version, append(st.Hooks, s.desc.Hooks...)
		for _, w := range s.desc.Wants {
			if !s.hasLocked(plugin.Capability(w)) {
				st.Lacks = append(st.Lacks, w)
			}
		}
		if s.blocks != nil {
			st.State = "restarting"
		}
	}
	for _, c := range plugin.Capabilities() {
		if s.hasLocked(c) {
			st.May = append(st.May, string(c))
		}
	}
	if s.ready {
		st.State, st.PID, st.Since = "up", s.inst.PID(), s.inst.since
	}
	return st
}

// command runs a plugin's command.
func (s *supervised) command(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error) {
	if !s.description().hook("command") {
		return 0, ErrNoVerb
	}
	inst, why := s.up()
	if inst == nil {
		return 0, fmt.Errorf("the plugin %s does not run: %s", s.spec.Name, why)
	}
	fail := func(err error) (int, error) {
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		return 0, fmt.Errorf("the plugin %s: %w", s.spec.Name, pluginrun.CallError(err))
	}
	calling, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := inst.Client.Command(calling, &pluginpb.CommandRequest{Args: args})
	if err != nil {
		return fail(err)
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, fmt.Errorf("the plugin %s: its command ended without a status", s.spec.Name)
		}
		if err != nil {
			return fail(err)
		}
		switch o := r.GetOutput().(type) {
		case *pluginpb.CommandResponse_Stdout:
			_, err = stdout.Write(o.Stdout)
		case *pluginpb.CommandResponse_Stderr:
			_, err = stderr.Write(o.Stderr)
		case *pluginpb.CommandResponse_Status:
			return int(min(o.Status, 255)), nil
		}
		if err != nil {
			return 0, err
		}
	}
}

// sameSchemas reports whether blocks decoded for one fit the other.
func sameSchemas(a, b *Described) bool {
	return proto.Equal(a.wire.GetPlugin(), b.wire.GetPlugin()) && proto.Equal(a.wire.GetHost(), b.wire.GetHost())
}
