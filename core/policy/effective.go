package policy

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/zclconf/go-cty/cty"

	"github.com/muxproxy/muxproxy/core/use"
	"github.com/muxproxy/muxproxy/core/wire"
)

// For implements use.Lookup.
func (s *Snapshot) For(t use.Target, c use.Caller) use.Effective { return s.effective(t, c) }

// effective is what applies to one target and caller. It does not change once it is made.
type effective struct {
	s      *Snapshot
	target use.Target
	caller use.Caller
	host   string       // canonical
	alias  string       // canonical; "": unknown, the same as host, not believed, or it makes no difference
	lied   bool         // the alias would make a difference, but does not lead to the host
	hosts  []*hostBlock // that apply, in the file's order

	share, via *hostAttr // the ones that apply; nil: none
	shared     bool
	jumps      []string
	failed     *failure // share or via could not be evaluated
}

// failure is an expression without a value.
type failure struct {
	what string
	pos  string
	err  *evalError
}

func (s *Snapshot) effective(t use.Target, c use.Caller) *effective {
	e := &effective{s: s, target: t, caller: c, host: canonicalHost(t.Host), shared: true}
	if t.Alias != "" && s.opts.Alias != nil {
		alias := canonicalName(t.Alias)
		matters := func(h *hostBlock) bool { return h.match(e.host) != h.match(e.host, alias) }
		if alias != e.host && (s.seesAlias || slices.ContainsFunc(s.hosts, matters)) {
			if s.opts.Alias(t) {
				e.alias = alias
			} else {
				e.lied = true
			}
		}
	}
	names := []string{e.host}
	if e.alias != "" {
		names = append(names, e.alias)
	}
	for _, h := range s.hosts {
		if h.match(names...) {
			e.hosts = append(e.hosts, h)
		}
	}
	for _, h := range e.hosts {
		if e.share == nil {
			e.share = h.share
		}
		if e.via == nil {
			e.via = h.via
		}
	}
	if e.share != nil {
		if v, err := e.share.eval(e.hostOnly, cty.Bool); err != nil {
			e.failed = &failure{"share", e.share.pos, err}
		} else {
			e.shared = v.True()
		}
	}
	if e.via != nil {
		v, err := e.via.eval(e.hostOnly, cty.List(cty.String))
		if err == nil {
			e.jumps = texts(v)
			if slices.Contains(e.jumps, "") {
				err = &evalError{summary: "it holds an empty name"}
			}
		}
		if err != nil && e.failed == nil {
			e.failed = &failure{"via", e.via.pos, err}
		}
	}
	return e
}

// Share implements use.Effective.
func (e *effective) Share() bool { return e.shared }

// Via implements use.Effective.
func (e *effective) Via() ([]string, bool) { return slices.Clone(e.jumps), e.via != nil }

// Deny implements use.Effective. All that could keep a use from being judged rightly denies, lanes included.
func (e *effective) Deny(u use.Use) *use.Denied {
	ctx := e.context(u)
	failed := e.failed
	for _, h := range e.hosts {
		for _, d := range h.denies {
			holds, err := d.when.holds(ctx)
			if holds {
				return &use.Denied{By: "policy", Reason: wire.Printable(d.text), Hint: "see " + e.s.short(d.pos)}
			}
			if err != nil && failed == nil {
				failed = &failure{"when in deny", d.pos, err}
			}
		}
	}
	if failed == nil && session(u.Kind) {
		_, _, failed = e.lane(u, ctx)
	}
	return e.s.denied(failed)
}

// denied says for a person that something could not be evaluated. What the libraries say of it may quote the use, which
// can hold secrets, and denials are logged.
func (s *Snapshot) denied(f *failure) *use.Denied {
	if f == nil {
		return nil
	}
	return &use.Denied{
		By:     "policy",
		Reason: fmt.Sprintf("%s in %s can't be evaluated: %s", f.what, s.short(f.pos), wire.Printable(f.err.summary)),
		Hint:   "`muxproxy explain` shows why",
	}
}

// Lane implements use.Effective.
func (e *effective) Lane(u use.Use) string {
	lane, block, _ := e.lane(u, e.context(u))
	if block == nil {
		return ""
	}
	return lane
}

// lane returns the block that decides, too; nil: none does.
func (e *effective) lane(u use.Use, ctx context) (string, *rule, *failure) {
	for _, h := range e.hosts {
		for _, l := range h.lanes {
			holds, err := l.when.holds(ctx)
			if err != nil {
				return Interactive, l, &failure{"when in lane", l.pos, err}
			}
			if holds {
				return l.text, l, nil
			}
		}
	}
	if u.Subsystem == "sftp" || slices.Contains([]string{"scp", "rsync"}, use.Program(u.Command)) {
		return Bulk, nil, nil
	}
	return Interactive, nil, nil
}

// Block implements use.Effective.
func (e *effective) Block(plugin string, u use.Use) (int, *use.Denied) {
	b, f := e.block(plugin, e.context(u))
	if b == nil {
		return -1, e.s.denied(f)
	}
	return b.ID, nil
}

// Covers reports whether a host has a block of the plugin, whatever its `when` says.
func (s *Snapshot) Covers(plugin string, t use.Target) bool {
	return slices.ContainsFunc(s.effective(t, use.Caller{}).hosts, func(h *hostBlock) bool {
		return slices.ContainsFunc(h.blocks, func(b *PluginBlock) bool { return b.Plugin == plugin })
	})
}

func (e *effective) block(plugin string, ctx context) (*PluginBlock, *failure) {
	for _, h := range e.hosts {
		for _, b := range h.blocks {
			if b.Plugin != plugin {
				continue
			}
			holds, err := b.when.holds(ctx)
			if err != nil {
				return nil, &failure{"when in " + plugin, b.Pos, err}
			}
			if holds {
				return b, nil
			}
		}
	}
	return nil, nil
}

// holds evaluates a condition; nil always holds.
func (e *expr) holds(ctx context) (bool, *evalError) {
	if e == nil {
		return true, nil
	}
	v, err := e.eval(ctx, cty.Bool)
	return err == nil && v.True(), err
}

// context returns what conditions see: whether one may look at all of it was decided when the file was read. It is made
// when the first condition needs it, and belongs to one goroutine: HCL does not allow one expression to be evaluated
// twice at a time in one context.
type context func() *hcl.EvalContext

func (e *effective) context(u use.Use) context {
	var ctx *hcl.EvalContext
	return func() *hcl.EvalContext {
		if ctx == nil {
			ctx = e.hostOnly()
			ctx.Variables["use"] = useValue(u)
			ctx.Variables["client"] = clientValue(e.caller, e.s.envs)
		}
		return ctx
	}
}

func (e *effective) hostOnly() *hcl.EvalContext {
	address := ""
	if ip, err := netip.ParseAddr(e.host); err == nil {
		address = ip.String()
	}
	return &hcl.EvalContext{Functions: functions, Variables: map[string]cty.Value{
		"host": cty.ObjectVal(map[string]cty.Value{
			"name":    cty.StringVal(e.host),
			"alias":   cty.StringVal(e.alias),
			"address": cty.StringVal(address),
			"port":    cty.NumberUIntVal(uint64(e.target.Port)),
			"user":    cty.StringVal(e.target.User),
		}),
	}}
}

func useValue(u use.Use) cty.Value {
	destination, port := destination(u)
	return cty.ObjectVal(map[string]cty.Value{
		"kind":        cty.StringVal(string(u.Kind)),
		"command":     cty.StringVal(u.Command),
		"program":     cty.StringVal(use.Program(u.Command)),
		"subsystem":   cty.StringVal(u.Subsystem),
		"destination": cty.StringVal(destination),
		"port":        cty.NumberUIntVal(uint64(port)),
		"name":        cty.StringVal(u.Name),
	})
}

// destination is the canonical host and the port of what a use is about, or a socket's path.
func destination(u use.Use) (string, uint16) {
	addr := u.Addr
	if u.Kind == use.Control { // of HOST, USER@HOST and USER@HOST:PORT, as typed
		addr = addr[strings.LastIndexByte(addr, '@')+1:]
	}
	if strings.HasPrefix(addr, "/") {
		return addr, 0
	}
	host, service, err := net.SplitHostPort(addr)
	if err != nil {
		return canonicalHost(addr), 0
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return addr, 0
	}
	return canonicalHost(host), uint16(port)
}

// clientValue describes the process that started muxproxy: the first of the caller's is muxproxy itself.
func clientValue(c use.Caller, envs []string) cty.Value {
	var chain []cty.Value
	for _, p := range c.Processes {
		args := []cty.Value{}
		for _, a := range p.Args {
			args = append(args, cty.StringVal(a))
		}
		chain = append(chain, cty.ObjectVal(map[string]cty.Value{
			"exe": cty.StringVal(p.Exe), "args": list(cty.String, args), "cwd": cty.StringVal(p.Cwd), "tty": cty.StringVal(p.TTY),
		}))
	}
	if len(chain) > 1 {
		chain = chain[1:]
	}
	client := empty(processType)
	if len(chain) > 0 {
		client, chain = chain[0], chain[1:]
	}
	attrs := client.AsValueMap()
	attrs["parents"] = list(processType, chain)
	env := map[string]cty.Value{}
	for _, name := range envs {
		env[name] = cty.StringVal(c.Env[name])
	}
	attrs["env"] = cty.MapValEmpty(cty.String)
	if len(env) > 0 {
		attrs["env"] = cty.MapVal(env)
	}
	return cty.ObjectVal(attrs)
}

func list(t cty.Type, elems []cty.Value) cty.Value {
	if len(elems) == 0 {
		return cty.ListValEmpty(t)
	}
	return cty.ListVal(elems)
}

// session reports whether a use of this kind runs on a lane.
func session(k use.Kind) bool { return k == use.Shell || k == use.Exec || k == use.Subsystem }

// short is a place with ~ for the home directory.
func (s *Snapshot) short(pos string) string {
	if home := s.opts.Home; home != "" && strings.HasPrefix(pos, home+"/") {
		pos = "~" + pos[len(home):]
	}
	return wire.Printable(pos)
}
