package master

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/pluginhost"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/session"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// prepareTime bounds the start of the plugins that a policy mentions.
	prepareTime = 20 * time.Second
	// firstTime does before the master is ready, and then their configuration: a bridge waits 10 s for all of it.
	firstTime = 4 * time.Second
	// Plugins that could not be started then are tried again after retryTime, and each time after twice as long.
	retryTime = 500 * time.Millisecond
	retryMost = time.Minute
)

// adopt reads the policy file and puts it in force, as put does.
func (m *Master) adopt(ctx context.Context, first bool) (policy.Diagnostics, error) {
	draft, diags := m.policy.read(m.noAlias)
	if draft == nil {
		return diags, diags.Errors()
	}
	return m.put(ctx, draft, first)
}

// put starts and configures the plugins that a policy mentions, and puts it in force. Nothing has changed if there is an
// error. first: there is no policy yet; then a plugin that can't be started or configured is one that fails, so that not
// all hosts wait for it, but one that does not take its blocks keeps the master from starting, as other errors in the file
// do. Without an error the diagnostics are warnings. Only one goroutine may be here.
func (m *Master) put(ctx context.Context, draft *policy.Snapshot, first bool) (policy.Diagnostics, error) {
	within := prepareTime
	if first {
		within = firstTime
	}
	starting, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	p := preparePlugins(starting, m.plugins, draft, m.opts.BuiltIn, pluginDirs(m.opts.Dirs))
	if p.snapshot == nil || p.diags.HasErrors() && !first {
		p.set.Discard()
		return p.diags, p.diags.Errors()
	}
	s := p.snapshot
	m.policy.generation++
	l := lookup{s, m.policy.generation}
	configuring, cancel := context.WithTimeout(ctx, within) // of its own: one that did not start has taken all of the other
	defer cancel()
	if first { // a configured plugin may act at once
		m.policy.now.Store(s)
	}
	problems := p.set.Apply(configuring, l.blocks(), l, p.specs, first, func() { m.policy.now.Store(s) })
	p.diags = append(p.diags, placed(s, problems, l.number)...)
	p.diags.Sort()
	if slices.ContainsFunc(problems, func(p pluginhost.Problem) bool { return !p.Warning && !(first && p.Broken) }) {
		return p.diags, p.diags.Errors()
	}
	for _, d := range p.diags.Errors() {
		m.log.Error().Msg(d.Error())
	}
	m.warn(p.diags)
	m.policy.incomplete.Store(!p.set.Complete())
	m.apply()
	m.plugins.InForce()
	m.pool.Reconsider()
	return p.diags, nil
}

// complete starts the plugins of the policy in force that could not be started with the master, unless a reload comes. It
// reports whether there is nothing left to do.
func (m *Master) complete(ctx context.Context) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	m.policy.trying.Store(&cancel)
	select {
	case m.policy.loading <- struct{}{}:
		defer func() { <-m.policy.loading }()
	case <-ctx.Done():
		return false
	}
	if !m.policy.incomplete.Load() {
		return true // a reload has
	}
	if _, err := m.put(ctx, m.policy.now.Load(), false); err != nil {
		m.log.Debug().Err(err).Msg("not all plugins can be started yet")
		return false
	}
	m.log.Info().Msg("all plugins that policy mentions run now")
	return true
}

// prepared is what a policy becomes with its plugins' schemas.
type prepared struct {
	set      *pluginhost.Set
	specs    []pluginhost.Plugin
	snapshot *policy.Snapshot // nil: the file has errors
	diags    policy.Diagnostics
}

// preparePlugins starts the plugins that a policy mentions and reads the policy again with what they declare.
func preparePlugins(ctx context.Context, m *pluginhost.Manager, draft *policy.Snapshot, builtIn, dirs []string) prepared {
	var p prepared
	var missing []pluginhost.Problem
	for _, plugin := range draft.Plugins() {
		spec := pluginhost.Plugin{
			Name: plugin.Name, Path: plugin.Path, SHA256: plugin.SHA256, AllowOnFailure: plugin.AllowOnFailure, May: plugin.May,
			Pos: plugin.Pos,
		}
		if spec.Path == "" && slices.Contains(builtIn, spec.Name) {
			spec.Path, spec.Args, spec.BuiltIn = self(), "plugin "+spec.Name, true
		}
		if spec.Path == "" {
			var err error
			if spec.Path, err = pluginhost.Find(spec.Name, dirs...); err != nil {
				text := err.Error()
				if near := policy.Near(spec.Name, append([]string{"deny", "lane"}, builtIn...)); near != "" {
					text = fmt.Sprintf("did you mean %q? %s", near, text)
				}
				missing = append(missing, pluginhost.Problem{Plugin: spec.Name, Pos: spec.Pos, Text: text})
			}
		}
		p.specs = append(p.specs, spec)
	}
	var problems []pluginhost.Problem
	p.set, problems = m.Prepare(ctx, slices.Clone(p.specs))
	problems = slices.DeleteFunc(problems, func(q pluginhost.Problem) bool {
		return slices.ContainsFunc(missing, func(o pluginhost.Problem) bool { return o.Plugin == q.Plugin })
	})
	schemas := map[string]policy.Schema{}
	for _, d := range p.set.Described() {
		schemas[d.Name] = policySchema(d)
	}
	p.snapshot, p.diags = draft.WithSchemas(schemas)
	p.diags = append(p.diags, placed(draft, append(missing, problems...), func(string) int { return -1 })...)
	p.diags.Sort()
	return p
}

// CheckPolicy reads a policy file as a master would: the plugins that it mentions are started, asked what their blocks may
// hold and what is wrong with them, and ended. scratch is a new directory for their sockets. The snapshot is nil if there are errors.
func CheckPolicy(ctx context.Context, draft *policy.Snapshot, o Options, scratch string) (*policy.Snapshot, policy.Diagnostics) {
	m := pluginhost.New(pluginhost.Options{
		Dir: func() string { return scratch }, State: scratch, Env: pluginhost.Environment(o.Getenv), Log: o.Log,
	})
	defer m.Close()
	ctx, cancel := context.WithTimeout(ctx, prepareTime)
	defer cancel()
	p := preparePlugins(ctx, m, draft, o.BuiltIn, pluginDirs(o.Dirs))
	if p.snapshot != nil {
		l := lookup{s: p.snapshot}
		p.diags = append(p.diags, placed(l.s, p.set.Check(ctx, l.blocks()), l.number)...)
		p.diags.Sort()
	}
	p.set.Discard()
	if p.diags.HasErrors() {
		p.snapshot = nil
	}
	return p.snapshot, p.diags
}

// pluginDirs are where plugins without a path are looked for: the user's own, and those that were installed with this
// program, in /usr/libexec/muxproxy if it is in /usr/bin.
func pluginDirs(dirs paths.Dirs) []string {
	list := []string{filepath.Join(dirs.Data, "plugins")}
	if exe, err := os.Executable(); err == nil {
		list = append(list, filepath.Join(filepath.Dir(exe), "..", "libexec", "muxproxy"))
	}
	return list
}

// self is this program, also after its file was replaced by another version.
func self() string {
	if runtime.GOOS == "linux" {
		return "/proc/self/exe"
	}
	exe, err := os.Executable()
	if err != nil {
		return os.Args[0]
	}
	return exe
}

// placed has problems of plugins point to the lines that they are about. number is what the policy calls a block's ID.
func placed(s *policy.Snapshot, problems []pluginhost.Problem, number func(id string) int) policy.Diagnostics {
	var out policy.Diagnostics
	for _, p := range problems {
		severity := policy.Error
		if p.Warning {
			severity = policy.Warning
		}
		n := -1
		if p.Block != "" {
			n = number(p.Block)
		}
		out = append(out, s.Problem(p.Plugin, n, p.Path, severity, p.Text))
	}
	return out
}

// policySchema is what a plugin declares, in policy's words. One that judges no uses is asked about connections alone.
func policySchema(d pluginhost.Described) policy.Schema {
	return policy.Schema{
		Plugin: policyBlock(d.Plugin, nil), Host: policyBlock(d.Host, nil), HostOnly: !slices.Contains(d.Hooks, "authorize"),
	}
}

func policyBlock(s *pluginhost.Schema, labels []string) policy.Block {
	b := policy.Block{Labels: labels}
	if s == nil {
		return b
	}
	b.Doc = s.Doc
	for _, a := range s.Attributes {
		attr := policy.Attribute{
			Name: a.Name, Type: a.Type, Required: a.Required, Doc: a.Doc, Format: policy.Format(a.Format), Words: a.Words,
		}
		if !a.Required {
			attr.Default = a.Default
		}
		b.Attributes = append(b.Attributes, attr)
	}
	for _, n := range s.Blocks {
		b.Blocks = append(b.Blocks, policy.Nested{Type: n.Type, Block: policyBlock(&n.Schema, n.Labels)})
	}
	return b
}

// lookup is one policy for the plugins, which know its blocks by IDs that no other policy of this master has.
type lookup struct {
	s          *policy.Snapshot
	generation uint64
}

// blocks are what the plugins are configured with.
func (l lookup) blocks() (blocks []pluginhost.Block) {
	for _, plugin := range l.s.Plugins() {
		blocks = append(blocks, pluginhost.Block{Plugin: plugin.Name, Value: plugin.Value})
		for _, b := range l.s.Blocks(plugin.Name) {
			blocks = append(blocks, pluginhost.Block{ID: l.id(b.ID), Plugin: b.Plugin, Hosts: b.Hosts, Pos: b.Pos, Value: b.Value})
		}
	}
	return blocks
}

func (l lookup) id(number int) string { return fmt.Sprintf("%d.%d", l.generation, number) }

func (l lookup) number(id string) int {
	_, number, _ := strings.Cut(id, ".")
	n, err := strconv.Atoi(number)
	if err != nil {
		return -1
	}
	return n
}

// Deny implements pluginhost.Lookup.
func (l lookup) Deny(u use.Use) *use.Denied { return l.s.For(u.Target, u.Caller).Deny(u) }

// Block implements pluginhost.Lookup.
func (l lookup) Block(plugin string, u use.Use) (string, *use.Denied) {
	n, denied := l.s.For(u.Target, u.Caller).Block(plugin, u)
	if denied != nil || n < 0 {
		return "", denied
	}
	return l.id(n), nil
}

// Covers implements pluginhost.Lookup.
func (l lookup) Covers(plugin string, t use.Target) bool { return l.s.Covers(plugin, t) }

// keeper is the pool's Retainer, and tells the plugins of connections.
type keeper struct{ *pluginhost.Manager }

var _ pool.Watcher = keeper{}

// Up implements pool.Watcher.
func (k keeper) Up(c pool.ConnInfo) {
	k.Observe(pluginhost.Event{Time: time.Now(), Kind: "up", Connection: connection(c)})
}

// Down implements pool.Watcher.
func (k keeper) Down(c pool.ConnInfo, lost bool, reason error) {
	e := pluginhost.Event{Time: time.Now(), Kind: "down", Connection: connection(c), Result: use.Result{Status: "closed"}}
	e.Connection.Up = false
	if lost {
		e.Result.Status = "lost"
	}
	if reason != nil {
		e.Result.Err = reason.Error()
	}
	k.Observe(e)
}

// observer tells the plugins what the gate decides.
type observer struct{ m *pluginhost.Manager }

// Decided implements use.Observer.
func (o observer) Decided(id string, u use.Use, d *use.Denied) {
	o.m.Observe(pluginhost.Event{Time: time.Now(), Kind: "decision", ID: id, Use: u, Denied: d})
}

// Ended implements use.Observer.
func (o observer) Ended(id string, u use.Use, r use.Result) {
	o.m.Observe(pluginhost.Event{Time: time.Now(), Kind: "end", ID: id, Use: u, Result: r})
}

// lockChanged is called after each change of the lock.
func (m *Master) lockChanged() {
	poke(m.policy.opened)
	m.telling.Lock()
	defer m.telling.Unlock()
	if locked := m.lock.State().Locked; m.locked != locked {
		m.locked = locked
		kind := "unlocked"
		if locked {
			kind = "locked"
		}
		m.plugins.Observe(pluginhost.Event{Time: time.Now(), Kind: kind})
	}
}

// sleep tells the plugins when the machine goes to sleep and wakes.
type sleep struct{ m *pluginhost.Manager }

var _ interface {
	session.Locker
	session.Waker
} = sleep{}

func (s sleep) LockSession(by string) error {
	if by == use.LockedBySleep {
		s.m.Observe(pluginhost.Event{Time: time.Now(), Kind: "sleep"})
	}
	return nil
}

func (s sleep) UnlockSession(...string) error { return nil }

func (s sleep) Awake() { s.m.Observe(pluginhost.Event{Time: time.Now(), Kind: "wake"}) }

var _ control.PluginBackend = (*Master)(nil)

// Plugins implements control.PluginBackend.
func (m *Master) Plugins() []control.Plugin {
	verbs := m.plugins.Verbs()
	var out []control.Plugin
	for _, s := range m.plugins.List() {
		p := control.Plugin{
			Name: s.Name, Version: s.Version, State: s.State, PID: s.PID, Since: s.Since, Restarts: s.Restarts, Path: s.Path,
			Hooks: s.Hooks, May: s.May, Lacks: s.Lacks, Dropped: s.Dropped, Error: s.Error,
		}
		for _, v := range verbs[s.Name] {
			p.Verbs = append(p.Verbs, control.Verb(v))
		}
		out = append(out, p)
	}
	return out
}

// Pending implements control.PluginBackend.
func (m *Master) Pending() []control.Pending {
	var out []control.Pending
	for _, p := range m.plugins.Pending() {
		out = append(out, control.Pending{
			ID: p.ID, Plugin: p.Plugin, Kind: string(p.Use.Kind), Target: use.Printable(p.Use.Target.String()), Detail: detail(p.Use),
			Caller: p.Use.Caller.String(), Message: p.Message, Since: p.Since, Answerable: p.Answerable,
		})
	}
	return out
}

// Decide implements control.PluginBackend.
func (m *Master) Decide(ctx context.Context, by use.Caller, id string, allow bool, reason string) error {
	verb := "deny"
	if allow {
		verb = "allow"
	}
	var about use.Target
	for _, p := range m.plugins.Pending() {
		if p.ID == id {
			about = p.Use.Target
		}
	}
	p, err := m.permit(ctx, by, verb, id, about)
	if err != nil {
		return err
	}
	return finish(p, m.plugins.Decide(id, allow, reason))
}

// verbPattern is what the first argument of a plugin's command looks like if it says what to do.
var verbPattern = regexp.MustCompile(`^[a-z][a-z-]{0,31}$`)

// RunPlugin implements control.PluginBackend.
func (m *Master) RunPlugin(ctx context.Context, by use.Caller, plugin string, args []string, stdout, stderr io.Writer) (int, error) {
	if _, ok := m.plugins.Verbs()[plugin]; !ok {
		return 0, control.ErrNoCommand
	}
	verb, rest := plugin, args
	if len(args) > 0 && verbPattern.MatchString(args[0]) {
		verb, rest = plugin+" "+args[0], args[1:]
	}
	p, err := m.permit(ctx, by, verb, strings.Join(rest, " "), use.Target{})
	if err != nil {
		return 0, err
	}
	status, err := m.plugins.Command(ctx, plugin, args, stdout, stderr)
	if errors.Is(err, pluginhost.ErrNoVerb) {
		err = control.ErrNoCommand
	}
	res := use.Result{Status: "exit", ExitCode: new(uint32(status))}
	if err != nil {
		res = use.Result{Status: "refused", Err: err.Error()}
	}
	p.End(res)
	return status, err
}
