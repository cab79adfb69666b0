// Package policy turns the policy file (HCL) into decisions: host matching, conditions, diagnostics, explanations.
//
// Load reads a file and returns a Snapshot, which never changes and answers for every target and use, or what is wrong
// with the file. A program first loads without Schemas to learn which plugins are mentioned, asks those for the
// schemas of their blocks, and loads again with them.
package policy

import (
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/use"
)

// MaxSize is how many bytes a policy file may have. HCL takes time with the square of what it is given (many unended
// heredocs: 1 s for this much).
const MaxSize = 64 << 10

// FileName is the policy file's name in the configuration directory.
const FileName = "config.hcl"

// Options is what a policy can't know by itself.
type Options struct {
	// Schemas are what the plugins declare, by their names. A block of a plugin that is not in it is kept, and of what it
	// holds only the core's own part is checked. nil: any name may be a plugin's.
	Schemas map[string]Schema
	// Others are plugins whose schema is not known although Schemas is set: they could not be asked.
	Others []string
	// Alias reports whether t.Alias leads to t's host: whether our own `ssh -G -l USER -p PORT ALIAS`, without the caller's
	// options, says t.Host. A caller chooses the alias, and must not name itself into a laxer block. It is asked
	// by For, at most once per call and only where the answer matters, so it has to be quick. nil: no alias counts.
	Alias func(t use.Target) bool
	// Home is what ~/ in a path stands for. "": paths stay as they are written.
	Home string
}

// Where says which file holds the policy: $MUXPROXY_CONFIG, else config.hcl in the directory. Only one that was named
// must exist.
func Where(getenv func(string) string, dir string) (path string, named bool) {
	if path := getenv("MUXPROXY_CONFIG"); path != "" {
		return path, true
	}
	return filepath.Join(dir, FileName), false
}

// Load reads a policy file. It returns a snapshot unless there are errors; warnings come with it. The file has to be this
// user's or root's, and writable by nobody else. If it does not exist and mayMiss, the policy is Default.
func Load(path string, mayMiss bool, o Options) (*Snapshot, Diagnostics) {
	src, err := paths.ReadTrusted(path, MaxSize)
	switch {
	case err == nil:
		return Parse(path, src, o)
	case mayMiss && errors.Is(err, fs.ErrNotExist):
		return Default(o), nil
	}
	message := err.Error()
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		message = pe.Err.Error()
	}
	return nil, Diagnostics{{Severity: Error, File: path, Message: strings.TrimPrefix(message, path+" ")}}
}

// Default is the policy without a file: all is shared and allowed, nothing asks, and no plugin is mentioned.
func Default(o Options) *Snapshot {
	s, _ := Parse("", nil, o)
	return s
}

// WithSchemas reads the same text again, now with what the plugins declare. Of those that are not in schemas it knows no
// more than before.
func (s *Snapshot) WithSchemas(schemas map[string]Schema) (*Snapshot, Diagnostics) {
	o := s.opts
	o.Schemas, o.Others = schemas, nil
	for _, p := range s.plugins {
		if _, ok := schemas[p.Name]; !ok {
			o.Others = append(o.Others, p.Name)
		}
	}
	return Parse(s.file, s.src, o)
}

// Snapshot is a policy. It never changes, and may be used by many goroutines.
type Snapshot struct {
	file    string
	src     []byte
	opts    Options
	master  Master
	plugins []Plugin
	hosts   []*hostBlock
	blocks  []*PluginBlock // by ID
	bodies  []*hclsyntax.Block
	envs    []string
	// seesAlias says that an expression refers to host.alias.
	seesAlias bool
}

// Master is what the `master` block says, with its defaults.
type Master struct {
	LogLevel      string        // "trace", "debug", "info", "warn" or "error"
	ExitWhenIdle  time.Duration // without clients and connections; negative: never
	SSHConfig     string        // what `ssh -G` reads for uses without a client; "": ssh's own files
	AllowForeign  bool          // clients in other user, pid or mount namespaces are served
	AuditRequired bool          // a use that can't be logged is denied
	AuditFull     bool          // commands are logged whole
	LockOn        []string      // "screen", "sleep"
}

// Plugin is one that the policy mentions.
type Plugin struct {
	Name           string
	Path           string    // its executable; "": built in, or muxproxy-plugin-NAME in the plugin directories
	SHA256         string    // of the executable, in lower case; "": any
	AllowOnFailure bool      // what its failure means for a use: allowed instead of denied
	May            []string  // capabilities
	Value          cty.Value // its own attributes as its schema decodes them; NilVal if the schema is not known
	Pos            string    // file:line of its plugin block, or of where it is first mentioned

	block *hclsyntax.Block // nil: it has no plugin block
}

// PluginBlock is a block of a plugin within a host block.
type PluginBlock struct {
	ID     int // what use.Effective's Block returns; counts all such blocks of the file
	Plugin string
	Hosts  []string  // the labels of its host block
	Value  cty.Value // as the plugin's schema decodes it, without `when`; NilVal if the schema is not known
	Pos    string    // file:line

	when *expr // nil: always
}

type hostBlock struct {
	labels []string
	patterns
	pos    string
	rng    hcl.Range
	share  *hostAttr
	via    *hostAttr
	denies []*rule
	lanes  []*rule
	blocks []*PluginBlock
}

// hostAttr is `share` or `via`.
type hostAttr struct {
	*expr
	pos string
}

// rule is a deny or lane block.
type rule struct {
	when *expr  // nil: always
	text string // the reason, or the lane
	pos  string
	rng  hcl.Range
}

// File is the path that was loaded; "" for Default.
func (s *Snapshot) File() string { return s.file }

// Master returns the settings of the master.
func (s *Snapshot) Master() Master {
	m := s.master
	m.LockOn = slices.Clone(m.LockOn)
	return m
}

// Plugins returns the plugins that are mentioned, by name.
func (s *Snapshot) Plugins() []Plugin { return slices.Clone(s.plugins) }

// Blocks returns the blocks of a plugin in the file's order.
func (s *Snapshot) Blocks(plugin string) []PluginBlock {
	var out []PluginBlock
	for _, b := range s.blocks {
		if b.Plugin == plugin {
			out = append(out, *b)
		}
	}
	return out
}

// EnvNames are the variables of a client's environment that conditions refer to: use.Caller's Env needs no others.
func (s *Snapshot) EnvNames() []string { return slices.Clone(s.envs) }

// Problem places what a plugin has to say about its configuration: about its block of that ID, or about its plugin block
// if id is negative (without one, about where it is first mentioned). path leads to the place as in the decoded value; where it can't be followed any further, the problem
// is placed at what it leads to until there.
func (s *Snapshot) Problem(plugin string, id int, path cty.Path, severity Severity, message string) Diagnostic {
	var block *hclsyntax.Block
	if id >= 0 && id < len(s.bodies) {
		block = s.bodies[id]
	} else {
		for _, p := range s.plugins {
			if p.Name == plugin {
				block = p.block
			}
		}
		if i := slices.IndexFunc(s.blocks, func(b *PluginBlock) bool { return b.Plugin == plugin }); block == nil && i >= 0 {
			block, path = s.bodies[i], nil
		}
	}
	d := Diagnostic{Severity: severity, Message: plugin + ": " + oneLine(message)}
	if block != nil {
		d.rng = locate(block, path)
	}
	(&report{file: s.file, src: s.src}).place(&d)
	return d
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// locate finds the place that a path of a decoded block means.
func locate(block *hclsyntax.Block, path cty.Path) hcl.Range {
	rng := block.TypeRange
	var e hclsyntax.Expression
	for i := 0; i < len(path); i++ {
		switch step := path[i].(type) {
		case cty.GetAttrStep:
			if e != nil {
				e = item(e, cty.StringVal(step.Name))
				break
			}
			if attr, ok := block.Body.Attributes[step.Name]; ok {
				e = attr.Expr
				break
			}
			var nested []*hclsyntax.Block
			for _, b := range block.Body.Blocks {
				if b.Type == step.Name {
					nested = append(nested, b)
				}
			}
			i++
			n := -1
			if i < len(path) {
				if index, ok := path[i].(cty.IndexStep); ok {
					n = index0(index.Key)
				}
			}
			if n < 0 || n >= len(nested) {
				return rng
			}
			block, rng = nested[n], nested[n].TypeRange
			continue
		case cty.IndexStep:
			if e == nil {
				return rng
			}
			e = item(e, step.Key)
		}
		if e == nil {
			return rng
		}
		rng = e.Range()
	}
	return rng
}

// item is the part of [...] or {...} that a key means; nil if it can't be told.
func item(e hclsyntax.Expression, key cty.Value) hclsyntax.Expression {
	switch e := e.(type) {
	case *hclsyntax.TupleConsExpr:
		if n := index0(key); n >= 0 && n < len(e.Exprs) {
			return e.Exprs[n]
		}
	case *hclsyntax.ObjectConsExpr:
		for _, it := range e.Items {
			if v, diags := it.KeyExpr.Value(constants); !diags.HasErrors() && v.RawEquals(key) {
				return it.ValueExpr
			}
		}
	}
	return nil
}

// index0 is a list index, or -1.
func index0(v cty.Value) int {
	if v.IsNull() || !v.IsKnown() || v.Type() != cty.Number {
		return -1
	}
	n, accuracy := v.AsBigFloat().Int64()
	if accuracy != 0 || n < 0 || n > MaxSize {
		return -1
	}
	return int(n)
}
