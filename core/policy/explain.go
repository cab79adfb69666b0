package policy

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/zclconf/go-cty/cty"
	ctyjson "github.com/zclconf/go-cty/cty/json"

	"github.com/muxproxy/muxproxy/core/use"
	"github.com/muxproxy/muxproxy/core/wire"
)

// Part is one thing that applies to a host.
type Part struct {
	What  string          `json:"what"`            // host, share, via, deny, lane, or a plugin's name
	Pos   string          `json:"pos,omitempty"`   // file:line; "": a default
	When  string          `json:"when,omitempty"`  // its condition, as it is in the file; "": always
	Value string          `json:"value,omitempty"` // patterns, the value, the reason, the lane
	Block json.RawMessage `json:"block,omitempty"` // a plugin's block as the plugin gets it
}

// Show returns what applies to a target, in the order in which it is looked at: for `config show`. Nothing is connected.
func (s *Snapshot) Show(t use.Target) []Part {
	e := s.effective(t, use.Caller{})
	var out []Part
	for _, h := range e.hosts {
		out = append(out, Part{What: "host", Pos: h.pos, Value: quoted(h.labels)})
	}
	share, via := Part{What: "share", Value: strconv.FormatBool(e.shared)}, Part{What: "via", Value: "as ssh_config says"}
	if e.share != nil {
		share.Pos = e.share.pos
	}
	if e.via != nil {
		via.Pos, via.Value = e.via.pos, "["+quoted(e.jumps)+"]"
	}
	if f := e.failed; f != nil {
		failed := &share
		if f.what == "via" {
			failed = &via
		}
		failed.Value = "can't be evaluated: " + f.err.Error()
	}
	out = append(out, share, via)
	for _, h := range e.hosts {
		for _, d := range h.denies {
			out = append(out, Part{What: "deny", Pos: d.pos, When: d.when.source(), Value: d.text})
		}
	}
	for _, h := range e.hosts {
		for _, l := range h.lanes {
			out = append(out, Part{What: "lane", Pos: l.pos, When: l.when.source(), Value: l.text})
		}
	}
	out = append(out, Part{What: "lane", When: "sftp, scp, rsync", Value: Bulk})
	for _, plugin := range s.plugins {
		for _, h := range e.hosts {
			for _, b := range h.blocks {
				if b.Plugin == plugin.Name {
					out = append(out, Part{What: b.Plugin, Pos: b.Pos, When: b.when.source(), Block: b.JSON()})
				}
			}
		}
	}
	return out
}

func (e *expr) source() string {
	if e == nil {
		return ""
	}
	return e.text
}

// JSON is the block's value as its plugin gets it; nil if the plugin's schema is not known.
func (b *PluginBlock) JSON() json.RawMessage { return valueJSON(b.Value) }

// JSON is the value of the plugin's own attributes as the plugin gets it; nil if its schema is not known.
func (p *Plugin) JSON() json.RawMessage { return valueJSON(p.Value) }

func valueJSON(v cty.Value) json.RawMessage {
	if v == cty.NilVal {
		return nil
	}
	text, err := ctyjson.Marshal(v, v.Type())
	if err != nil { // a schema's types have a form in JSON, and there are no unknown values
		return nil
	}
	return text
}

// WriteParts writes what Show returned for a person.
func (s *Snapshot) WriteParts(w io.Writer, parts []Part) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, p := range parts {
		pos := "default"
		if p.Pos != "" {
			pos = s.short(p.Pos)
		}
		value := p.Value
		if p.Block != nil {
			value = string(p.Block)
		}
		if p.When != "" {
			value = strings.TrimSpace(value + " when " + p.When)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\n", p.What, pos, wire.Printable(oneLine(value)))
	}
	return tw.Flush()
}

// Step is one block that was looked at for a use.
type Step struct {
	Part
	Result string `json:"result"` // "holds", "does not hold", "is not reached", or why it can't be evaluated
}

// Explanation says how policy decides about one use, and why.
type Explanation struct {
	Host    string            `json:"host"`              // canonical
	Alias   string            `json:"alias,omitempty"`   // canonical, if it counts
	Ignored string            `json:"ignored,omitempty"` // an alias that would make a difference, but does not lead to the host
	Hosts   []Part            `json:"hosts"`             // host blocks that apply
	Share   bool              `json:"share"`             //
	Via     []string          `json:"via,omitempty"`     //
	Steps   []Step            `json:"steps"`             // deny, lane and plugin blocks
	Allowed bool              `json:"allowed"`           // by policy; plugins that apply may still deny
	Denied  string            `json:"denied,omitempty"`  // the line that the client gets
	Lane    string            `json:"lane,omitempty"`    // of a session
	Program string            `json:"program,omitempty"`
	Plugins map[string]string `json:"plugins,omitempty"` // by name, file:line of the block that applies to this use

	s *Snapshot
}

// Explain says which blocks, lane and plugins apply to u, and what policy decides. Nothing is connected and no plugin is
// asked. It quotes the use.
func (s *Snapshot) Explain(u use.Use) *Explanation {
	e := s.effective(u.Target, u.Caller)
	ctx := e.context(u)
	out := &Explanation{
		s: s, Host: e.host, Alias: e.alias, Share: e.shared, Via: e.jumps, Program: use.Program(u.Command),
		Hosts: []Part{}, Steps: []Step{}, Plugins: map[string]string{},
	}
	if e.lied {
		out.Ignored = u.Target.Alias
	}
	step := func(p Part, reached bool, when *expr) bool {
		result := "is not reached"
		held := false
		if reached {
			var err *evalError
			held, err = when.holds(ctx)
			switch {
			case err != nil:
				result = "can't be evaluated: " + err.Error()
				held = true // it ends the search
			case held:
				result = "holds"
			default:
				result = "does not hold"
			}
		}
		out.Steps = append(out.Steps, Step{p, result})
		return held
	}
	for _, h := range e.hosts {
		out.Hosts = append(out.Hosts, Part{What: "host", Pos: h.pos, Value: quoted(h.labels)})
		for _, d := range h.denies {
			step(Part{What: "deny", Pos: d.pos, When: d.when.source(), Value: d.text}, true, d.when)
		}
	}
	if session(u.Kind) {
		out.Lane, _, _ = e.lane(u, ctx)
		reached := true
		for _, h := range e.hosts {
			for _, l := range h.lanes {
				held := step(Part{What: "lane", Pos: l.pos, When: l.when.source(), Value: l.text}, reached, l.when)
				reached = reached && !held
			}
		}
	}
	for _, plugin := range s.plugins {
		reached := true
		for _, h := range e.hosts {
			for _, b := range h.blocks {
				if b.Plugin == plugin.Name {
					part := Part{What: b.Plugin, Pos: b.Pos, When: b.when.source(), Block: b.JSON()}
					held := step(part, reached, b.when)
					reached = reached && !held
				}
			}
		}
		if b, _ := e.block(plugin.Name, ctx); b != nil {
			out.Plugins[plugin.Name] = b.Pos
		}
	}
	if d := e.Deny(u); d != nil {
		out.Denied = d.Error()
	} else {
		out.Allowed = true
	}
	return out
}

// Write writes the explanation for a person.
func (x *Explanation) Write(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(what, text, pos string) {
		if pos != "" {
			pos = x.s.short(pos)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\n", what, pos, wire.Printable(oneLine(text)))
	}
	name := x.Host
	if x.Alias != "" {
		name += " (" + x.Alias + ")"
	}
	line("host", name, "")
	if x.Ignored != "" {
		line("", fmt.Sprintf("%q does not count: your ssh_config does not lead from it to this host", x.Ignored), "")
	}
	for _, h := range x.Hosts {
		line("", "matches "+h.Value, h.Pos)
	}
	if len(x.Hosts) == 0 {
		line("", "matches no host block", "")
	}
	for _, s := range x.Steps {
		text := s.Result
		if s.When != "" {
			text += ": " + s.When
		}
		if s.What == "lane" {
			text = strconv.Quote(s.Value) + " " + text
		}
		line(s.What, text, s.Pos)
	}
	if x.Lane != "" {
		line("lane", x.Lane, "")
	}
	if !x.Share {
		line("share", "no: the client connects by itself", "")
	}
	switch {
	case !x.Allowed:
		line("decision", x.Denied, "")
	case len(x.Plugins) > 0:
		names := []string{}
		for name := range x.Plugins {
			names = append(names, name)
		}
		slices.Sort(names)
		line("decision", "allowed by policy; these plugins have a block for it: "+strings.Join(names, ", "), "")
	default:
		line("decision", "allowed", "")
	}
	return tw.Flush()
}
