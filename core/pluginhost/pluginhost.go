// Package pluginhost starts, supervises and calls plugin processes, and serves what they may ask of the master.
package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"github.com/zclconf/go-cty/cty"

	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/pluginrun"
	"github.com/muxproxy/muxproxy/core/use"
)

// Plugin is one plugin that the policy mentions. Two that are equal are the same process over a reload, unless the file
// has changed.
type Plugin struct {
	Name    string
	Path    string // the executable
	Args    string // what it is started with, separated by spaces; for built-in ones
	BuiltIn bool   // holds the capabilities that it declares without May, and its file is not checked
	SHA256  string // of the executable, in hexadecimal; "": any
	// AllowOnFailure says that uses are not denied when the plugin fails.
	AllowOnFailure bool
	May            []string
	Pos            string // file:line of its block, or of where it is first mentioned
}

func (p Plugin) same(q Plugin) bool {
	return p.Name == q.Name && p.Path == q.Path && p.Args == q.Args && p.BuiltIn == q.BuiltIn && p.SHA256 == q.SHA256
}

// Block is one block of a plugin as its schema decodes it.
type Block struct {
	ID     string // never used again for another one while the master lives; "": the `plugin` block
	Plugin string
	Hosts  []string  // the labels of the host block that it is in
	Pos    string    // file:line
	Value  cty.Value // an object
}

// Schema says what a block may hold. nil: nothing of the plugin's own.
type Schema struct {
	Doc        string
	Attributes []Attribute
	Blocks     []Nested
}

// Attribute is one `name = value`.
type Attribute struct {
	Name      string
	Type      cty.Type
	Required  bool
	Default   cty.Value // never null; the type's empty value if none is declared
	Doc       string
	Sensitive bool     // not to be shown or logged
	Format    string   // of a string: "", "duration", "clock", "path", "sha256"
	Words     []string // what a string may be, besides what Format takes
}

// Nested is a kind of block within a block. Its decoded value is a list of objects that have the labels as strings.
type Nested struct {
	Type   string
	Labels []string
	Schema
}

// Described is what a plugin said of itself.
type Described struct {
	Name, Version string
	Hooks         []string // "authorize", "retain", "observe", "command"
	AsksPerson    bool
	Wants         []string
	Plugin, Host  *Schema // of its `plugin` block, of its blocks in host blocks
	Verbs         []Verb

	wire *pluginpb.DescribeResponse
}

// Verb is a form of a plugin's command line.
type Verb struct{ Usage, Doc string }

// Problem is one with a plugin or its configuration. Text is escaped, one line.
type Problem struct {
	Plugin  string
	Warning bool
	Block   string   // its ID; "": the `plugin` block
	Path    cty.Path // into the block's value
	Pos     string   // file:line of the plugin's block, for what no path leads to
	Broken  bool     // the plugin fails, whatever its configuration is
	Text    string
}

// Error is the line for a person if nothing better is known about the place.
func (p Problem) Error() string {
	s := "plugin " + p.Plugin + ": " + p.Text
	if p.Pos != "" {
		s = p.Pos + ": " + s
	}
	return s
}

// Lookup is what the policy in force says. It must not block.
type Lookup interface {
	// Deny is what the policy itself has against a use; nil: nothing.
	Deny(u use.Use) *use.Denied
	// Block returns the ID of the plugin's block that holds for a use; "" if there is none. One that can't be evaluated is
	// a denial. For connections, u has a target and nothing else.
	Block(plugin string, u use.Use) (id string, d *use.Denied)
	// Covers reports whether a host has a block of the plugin, whatever its `when` says.
	Covers(plugin string, t use.Target) bool
}

// Timing are times that tests change. The zero value means what is said.
type Timing struct {
	First     time.Duration // until the first answer of Authorize, and for Retain; 3 s: plugins are told 2 s
	Heartbeat time.Duration // between two signs of life; 12 s: plugins are told 5 s
	Backoff   time.Duration // before the first restart; 0.5 s, doubled up to 1 min
	Stable    time.Duration // a plugin that ran for so long starts again with the first back-off; 1 min
	Ticket    time.Duration // 10 s
	Start     time.Duration // until the handshake; 10 s
}

// Options are what a Manager needs.
type Options struct {
	Dir     func() string // where the directory of sockets is made: the master's runtime directory at that moment, checked
	State   string        // what plugins keep: a directory that is checked, in which "plugins" is made
	Env     []string
	Backend Backend // nil: plugins can't do anything
	Locked  bool    // the lock holds already; what changes that is told by Observe
	Log     zerolog.Logger
	Timing  Timing
}

// Manager runs the plugins of one master. All of it may be used by many goroutines, but Prepare, Apply and Discard by one
// at a time.
type Manager struct {
	o       Options
	streams *streams // nil until a plugin is first mentioned

	telling sync.Mutex // keeps what plugins are told of the lock in order; guards locked
	locked  bool

	mu      sync.Mutex // guards what follows
	current *Set       // in force
	closed  bool
	pending map[string]*pending
}

// New returns a Manager that runs nothing yet.
func New(o Options) *Manager {
	t := &o.Timing
	for _, d := range []struct {
		p     *time.Duration
		value time.Duration
	}{{&t.First, 3 * time.Second}, {&t.Heartbeat, 12 * time.Second}, {&t.Backoff, 500 * time.Millisecond},
		{&t.Stable, time.Minute}, {&t.Ticket, 10 * time.Second}, {&t.Start, 10 * time.Second}} {
		if *d.p == 0 {
			*d.p = d.value
		}
	}
	if o.Backend == nil {
		o.Backend = nowhere{}
	}
	m := &Manager{o: o, locked: o.Locked, pending: map[string]*pending{}}
	m.current = &Set{m: m}
	return m
}

// Set is a policy and its plugins.
type Set struct {
	m       *Manager
	plugins []*supervised // in the policy's order
	lookup  Lookup        // nil: not in force yet
}

// Prepare starts the plugins that do not run yet, all at once, and asks them what they are. The problems are of those that
// could not be started or declare nonsense: they are in the Set all the same, and count as failed. The Set is then given
// to Apply or Discard.
func (m *Manager) Prepare(ctx context.Context, list []Plugin) (*Set, []Problem) {
	s := &Set{m: m}
	var problems []Problem
	if len(list) > 0 {
		if err := m.open(); err != nil {
			for _, p := range list {
				sup := newSupervised(m, p)
				sup.failed(err)
				problems = append(problems, sup.broken(err))
				s.plugins = append(s.plugins, sup)
			}
			return s, problems
		}
	}
	old := m.set()
	results := make([][]Problem, len(list))
	var starting sync.WaitGroup
	for i, p := range list {
		if had := old.find(p.Name); had != nil && had.spec.same(p) && had.isUp() && !had.replaced() {
			s.plugins = append(s.plugins, had)
			continue
		}
		sup := newSupervised(m, p)
		s.plugins = append(s.plugins, sup)
		starting.Go(func() { results[i] = sup.first(ctx) })
	}
	starting.Wait()
	for _, r := range results {
		problems = append(problems, r...)
	}
	return s, problems
}

// find returns the plugin of that name, or nil.
func (s *Set) find(name string) *supervised {
	for _, p := range s.plugins {
		if p.spec.Name == name {
			return p
		}
	}
	return nil
}

// Complete reports whether all plugins could be started.
func (s *Set) Complete() bool {
	return !slices.ContainsFunc(s.plugins, func(p *supervised) bool { return p.description() == nil })
}

// Described returns what the plugins said of themselves, without those that failed.
func (s *Set) Described() []Described {
	var out []Described
	for _, p := range s.plugins {
		if d := p.description(); d != nil {
			out = append(out, *d)
		}
	}
	return out
}

// Discard ends what Prepare has started.
func (s *Set) Discard() {
	stopAll(s.plugins, s.m.set())
}

// Apply configures the plugins, each with its blocks, and puts the Set and lookup in force, both at once; inForce, which
// may be nil and must not block, is called in that moment. A plugin whose `plugin` block is not among blocks gets the
// defaults. If a problem is no warning, all stays as it was, the plugins that ran get back what they had, and the Set is
// discarded; unless first says that there is nothing to go back to: then plugins that are broken count as failed. InForce is
// called next.
func (s *Set) Apply(ctx context.Context, blocks []Block, lookup Lookup, specs []Plugin, first bool, inForce func()) []Problem {
	problems := s.each(blocks, func(p *supervised, own []Block) []Problem { return p.configure(ctx, own) })
	bad := slices.ContainsFunc(problems, func(p Problem) bool { return !p.Warning && !(first && p.Broken) })
	old := s.m.set()
	if bad {
		for _, p := range s.plugins {
			if old.find(p.spec.Name) == p {
				p.restore(ctx)
			}
		}
		stopAll(s.plugins, old)
		return problems
	}
	s.lookup = lookup
	for _, p := range s.plugins {
		p.commit(specs)
	}
	s.m.mu.Lock()
	closed := s.m.closed
	s.m.current = s
	if inForce != nil {
		inForce()
	}
	s.m.mu.Unlock()
	stopAll(old.plugins, s)
	if closed { // which has ended those of the Set before
		stopAll(s.plugins, &Set{})
	}
	return problems
}

// Retire ends the plugins that judge no uses, for good: what they do by themselves another master does now. Streams go on.
func (m *Manager) Retire() {
	var retiring sync.WaitGroup
	for _, p := range m.set().plugins {
		if d := p.description(); d != nil && !d.hook("authorize") {
			retiring.Go(p.end)
		}
	}
	retiring.Wait()
}

// InForce tells the plugins that what Apply has brought counts wherever they may act.
func (m *Manager) InForce() {
	for _, p := range m.set().plugins {
		p.tellPolicy()
	}
}

// Check asks the plugins what is wrong with their blocks, and changes nothing.
func (s *Set) Check(ctx context.Context, blocks []Block) []Problem {
	return s.each(blocks, func(p *supervised, own []Block) []Problem { return p.check(ctx, own) })
}

// each has all plugins do something with their blocks, at once, and returns the problems in the plugins' order.
func (s *Set) each(blocks []Block, do func(p *supervised, own []Block) []Problem) []Problem {
	results := make([][]Problem, len(s.plugins))
	var doing sync.WaitGroup
	for i, p := range s.plugins {
		var own []Block
		for _, b := range blocks {
			if b.Plugin == p.spec.Name {
				own = append(own, b)
			}
		}
		doing.Go(func() { results[i] = do(p, own) })
	}
	doing.Wait()
	return slices.Concat(results...)
}

// stopAll ends plugins that are not also in keep.
func stopAll(list []*supervised, keep *Set) {
	var stopping sync.WaitGroup
	for _, p := range list {
		if keep.find(p.spec.Name) != p {
			stopping.Go(p.end)
		}
	}
	stopping.Wait()
}

// Close ends all plugins, and begins to end their streams. Checks deny from then on as for plugins that have failed.
func (m *Manager) Close() {
	m.mu.Lock()
	m.closed = true
	s, streams := m.current, m.streams
	m.mu.Unlock()
	stopAll(s.plugins, &Set{})
	if streams != nil {
		streams.close()
	}
}

// Wait returns when the streams have ended, after Close. One whose server takes nothing lasts as long as its connection.
func (m *Manager) Wait() {
	m.mu.Lock()
	streams := m.streams
	m.mu.Unlock()
	if streams != nil {
		streams.wait()
	}
}

// open makes the sockets' directory and the stream socket, when a plugin is first mentioned.
func (m *Manager) open() error {
	m.mu.Lock()
	have, closed := m.streams != nil, m.closed
	m.mu.Unlock()
	switch {
	case closed:
		return errors.New("the master ends")
	case have:
		return nil
	}
	streams, err := listenStreams(m)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.streams, closed = streams, m.closed
	m.mu.Unlock()
	if closed {
		streams.close()
	}
	return nil
}

// again has all plugins started again.
func (m *Manager) again() {
	for _, p := range m.set().plugins {
		if inst, _ := p.up(); inst != nil {
			inst.Kill()
		}
	}
}

// Environment is what plugins get of the environment: nothing that belongs to one login of several.
func Environment(getenv func(string) string) []string {
	var out []string
	for _, name := range []string{"HOME", "USER", "LOGNAME", "PATH", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "LC_MESSAGES", "TZ",
		"TMPDIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"} {
		if v := getenv(name); v != "" {
			out = append(out, name+"="+v)
		}
	}
	return out
}

// Find returns the executable of a plugin without a path: muxproxy-plugin-NAME in the first of dirs that has it.
func Find(name string, dirs ...string) (string, error) {
	if !pluginrun.ValidName(name) {
		return "", fmt.Errorf("%q can't be a plugin's name", use.Printable(name))
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, "muxproxy-plugin-"+name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no muxproxy-plugin-%s in %s: install it, or give its path", name, joinOr(dirs))
}

func joinOr(list []string) string {
	out := ""
	for i, s := range list {
		if i > 0 {
			out += " or "
		}
		out += s
	}
	return out
}

// Status is a plugin for `muxproxy plugin list`.
type Status struct {
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
	Dropped  uint64    `json:"dropped,omitempty"` // events
	Error    string    `json:"error,omitempty"`   // the last one, escaped
}

// List returns the plugins in force.
func (m *Manager) List() []Status {
	var out []Status
	for _, p := range m.set().plugins {
		out = append(out, p.status())
	}
	return out
}

// set is what is in force.
func (m *Manager) set() *Set {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current
}

// ErrNoVerb is the error of Command for a name that no plugin has.
var ErrNoVerb = errors.New("no plugin has this command")

// Verbs returns the commands that plugins bring, by the plugin's name.
func (m *Manager) Verbs() map[string][]Verb {
	out := map[string][]Verb{}
	for _, p := range m.set().plugins {
		if d := p.description(); d != nil && slices.Contains(d.Hooks, "command") {
			out[d.Name] = d.Verbs
		}
	}
	return out
}

// Command runs a plugin's command for a person and returns its exit status. What it writes is as the plugin wrote it.
func (m *Manager) Command(ctx context.Context, plugin string, args []string, stdout, stderr io.Writer) (int, error) {
	p := m.set().find(plugin)
	if p == nil {
		return 0, ErrNoVerb
	}
	return p.command(ctx, args, stdout, stderr)
}
