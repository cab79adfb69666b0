package pluginhost

import (
	"errors"
	"fmt"
	"time"

	"github.com/zclconf/go-cty/cty"
	ctyjson "github.com/zclconf/go-cty/cty/json"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/pluginrun"
	"github.com/muxproxy/muxproxy/core/use"
)

// What goes over the wire and back.

func describedFromPB(d *pluginpb.DescribeResponse) (*Described, error) {
	out := &Described{
		Name: d.GetName(), Version: use.Printable(clip(d.GetVersion(), 64)), AsksPerson: d.GetAsksPerson(), wire: d,
	}
	for _, h := range d.GetHooks() {
		out.Hooks = append(out.Hooks, use.Printable(h))
	}
	for _, w := range d.GetWants() {
		out.Wants = append(out.Wants, use.Printable(w))
	}
	for _, v := range d.GetVerbs() {
		out.Verbs = append(out.Verbs, Verb{use.Printable(v.GetUsage()), use.Printable(v.GetDoc())})
	}
	var err1, err2 error
	out.Plugin, err1 = schemaFromPB(d.GetPlugin())
	out.Host, err2 = schemaFromPB(d.GetHost())
	return out, errors.Join(err1, err2)
}

func schemaFromPB(s *pluginpb.Schema) (*Schema, error) {
	if s == nil {
		return nil, nil
	}
	out := &Schema{Doc: use.Printable(s.GetDoc())}
	for _, a := range s.GetAttributes() {
		t, v, err := pluginrun.AttributeType(a)
		if err != nil {
			return nil, err
		}
		b := Attribute{
			Name: a.GetName(), Type: t, Required: a.GetRequired(), Default: v, Doc: use.Printable(a.GetDoc()),
			Sensitive: a.GetSensitive(), Format: a.GetFormat(),
		}
		for _, w := range a.GetWords() {
			b.Words = append(b.Words, use.Printable(w))
		}
		out.Attributes = append(out.Attributes, b)
	}
	for _, b := range s.GetBlocks() {
		inner := &Schema{}
		if b.GetSchema() != nil {
			var err error
			if inner, err = schemaFromPB(b.GetSchema()); err != nil {
				return nil, err
			}
		}
		out.Blocks = append(out.Blocks, Nested{Type: b.GetName(), Labels: b.GetLabels(), Schema: *inner})
	}
	return out, nil
}

// zero is a block's value if it has nothing but defaults.
func (s *Schema) zero() cty.Value {
	attrs := map[string]cty.Value{}
	if s != nil {
		for _, a := range s.Attributes {
			attrs[a.Name] = a.Default
		}
		for _, b := range s.Blocks {
			attrs[b.Type] = cty.EmptyTupleVal
		}
	}
	return cty.ObjectVal(attrs)
}

func blocksToPB(d *Described, blocks []Block) ([]*pluginpb.Block, error) {
	var out []*pluginpb.Block
	own := false
	add := func(kind pluginpb.Block_Kind, b Block) error {
		value, err := ctyjson.Marshal(b.Value, b.Value.Type())
		if err != nil {
			return fmt.Errorf("its block can't be sent: %w", err)
		}
		out = append(out, &pluginpb.Block{Id: b.ID, Kind: kind, Value: value, Hosts: b.Hosts, Pos: utf8(b.Pos)})
		return nil
	}
	for _, b := range blocks {
		kind := pluginpb.Block_KIND_HOST
		if b.ID == "" {
			kind, own = pluginpb.Block_KIND_PLUGIN, true
		}
		if b.Value == cty.NilVal {
			schema := d.Host
			if b.ID == "" {
				schema = d.Plugin
			}
			b.Value = schema.zero()
		}
		if err := add(kind, b); err != nil {
			return nil, err
		}
	}
	if !own {
		if err := add(pluginpb.Block_KIND_PLUGIN, Block{Value: d.Plugin.zero()}); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// diagnosed is what a plugin says about its configuration.
func (s *supervised) diagnosed(d *pluginpb.Diagnostic) Problem {
	p := s.problem("%s", use.Printable(clip(d.GetSummary(), 500)))
	if d.GetDetail() != "" {
		p.Text += ": " + use.Printable(clip(d.GetDetail(), 1000))
	}
	p.Warning, p.Block = !isError(d), d.GetBlock()
	for _, step := range d.GetPath() {
		switch step := step.GetStep().(type) {
		case *pluginpb.Step_Attribute:
			p.Path = p.Path.GetAttr(step.Attribute)
		case *pluginpb.Step_Key:
			p.Path = p.Path.IndexString(step.Key)
		case *pluginpb.Step_Index:
			p.Path = p.Path.IndexInt(int(step.Index))
		}
	}
	return p
}

func targetToPB(t use.Target) *pluginpb.Target {
	return &pluginpb.Target{User: utf8(t.User), Host: utf8(t.Host), Port: uint32(t.Port), Alias: utf8(t.Alias)}
}

func useToPB(u use.Use) *pluginpb.Use {
	out := &pluginpb.Use{
		Kind: string(u.Kind), Client: u.Client, Target: targetToPB(u.Target), Command: []byte(u.Command),
		Subsystem: []byte(u.Subsystem), Addr: []byte(u.Addr), Name: []byte(u.Name), Uid: int64(u.Caller.UID),
		LoggedIn: !u.Caller.LoggedIn.IsZero(),
	}
	if u.Kind == use.Exec {
		out.Program = utf8(use.Program(u.Command))
	}
	for _, p := range u.Caller.Processes {
		q := &pluginpb.Process{Pid: int64(p.PID), Start: p.Start, Exe: []byte(p.Exe), Cwd: []byte(p.Cwd), Tty: utf8(p.TTY)}
		for _, a := range p.Args {
			q.Args = append(q.Args, []byte(a))
		}
		out.Processes = append(out.Processes, q)
	}
	return out
}

// connectionToPB is told the block of the plugin that it is for.
func connectionToPB(c Connection, block string) *pluginpb.Connection {
	return &pluginpb.Connection{
		Id: c.ID, Target: targetToPB(c.Target), Lane: utf8(c.Lane), Up: c.Up, Clients: uint32(c.Clients), Since: timeToPB(c.Since),
		Block: block,
	}
}

func eventToPB(e Event) *pluginpb.Event {
	out := &pluginpb.Event{
		Time: timeToPB(e.Time), Kind: e.Kind, Id: e.ID, Allowed: e.Denied == nil, Result: e.Result.Status, In: e.Result.In,
		Out: e.Result.Out, Reason: utf8(use.Printable(e.Result.Err)),
	}
	if e.Denied != nil {
		out.By, out.Reason = utf8(e.Denied.By), utf8(e.Denied.Reason)
	}
	if e.Result.ExitCode != nil {
		out.ExitCode = *e.Result.ExitCode
	}
	switch {
	case e.Connection.ID != 0:
		out.Connection = connectionToPB(e.Connection, "")
	case e.Use.Kind != "":
		out.Use = useToPB(e.Use)
	}
	return out
}

func withDropped(e *pluginpb.Event, n uint64) *pluginpb.Event {
	e = proto.CloneOf(e)
	e.Dropped = n
	return e
}

func withBlock(e *pluginpb.Event, block string) *pluginpb.Event {
	e = proto.CloneOf(e)
	e.Connection.Block = block
	return e
}

// onWallClock is when something began that has lasted since t (of time.Now), as the wall clock has it by now: time asleep
// counts, and a clock that was set back since does not make it younger.
func onWallClock(t, now time.Time) time.Time {
	return now.Add(-max(now.Sub(t), now.Round(0).Sub(t.Round(0)))).Round(0)
}

func timeToPB(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
