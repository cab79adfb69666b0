package policy

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
)

// Bounds of what is parsed: HCL's parser and evaluation call themselves for what stands within each other, and a stack
// that overflows ends the process.
const (
	maxDepth     = 64   // brackets within brackets
	maxOperators = 5000 // in one file
)

// Lanes.
const (
	Interactive = "interactive"
	Bulk        = "bulk"
)

// What the core's own blocks hold.
var (
	masterBlock = Block{Attributes: []Attribute{
		{Name: "log_level", Type: cty.String, Default: cty.StringVal("info"),
			Words: []string{"trace", "debug", "info", "warn", "error"}, Doc: "what master.log holds"},
		{Name: "exit_when_idle", Type: cty.String, Default: cty.StringVal("never"), Format: Duration, Words: []string{"never"},
			Doc: "the master ends after this long without clients and connections"},
		{Name: "ssh_config", Type: cty.String, Format: Path, Words: []string{""},
			Doc: "what `ssh -G` reads for uses without a client; empty: ssh's own files"},
		{Name: "foreign", Type: cty.String, Default: cty.StringVal("deny"), Words: []string{"deny", "allow"},
			Doc: "clients in other namespaces (containers, sandboxes)"},
		{Name: "audit", Type: cty.String, Default: cty.StringVal("on"), Words: []string{"on", "required"},
			Doc: "required: what can't be logged is denied"},
		{Name: "audit_commands", Type: cty.String, Default: cty.StringVal("program"), Words: []string{"program", "full"},
			Doc: "what audit.log holds of a command; full: secrets on command lines, too"},
		{Name: "lock_on", Type: cty.List(cty.String), Words: []string{"screen", "sleep"},
			Doc: "what locks as `muxproxy lock` does"},
	}}
	pluginBlock = Block{Labels: []string{"name"}, Attributes: []Attribute{
		{Name: "path", Type: cty.String, Format: Path, Words: []string{""},
			Doc: "its executable; empty: built in, or muxproxy-plugin-NAME in the plugin directories"},
		{Name: "sha256", Type: cty.String, Format: Digest, Words: []string{""},
			Doc: "what its executable has to be; empty: anything"},
		{Name: "on_failure", Type: cty.String, Default: cty.StringVal("deny"), Words: []string{"deny", "allow"},
			Doc: "what it means for a use if the plugin does not answer"},
		{Name: "may", Type: cty.List(cty.String), Doc: "capabilities",
			Words: []string{"observe", "list", "connect", "close", "dial", "listen", "decide", "notify", "keep"}},
	}}
	hostBody = Block{Attributes: []Attribute{
		{Name: "share", Type: cty.Bool, Default: cty.True, Doc: "false: clients connect by themselves, without the master"},
		{Name: "via", Type: cty.List(cty.String), Doc: "jump hosts, in the order in which they are passed; [] for none"},
	}}
	denyBlock = Block{Attributes: []Attribute{
		{Name: "reason", Type: cty.String, Doc: "what the person at the client reads"},
	}}
	laneBlock = Block{Labels: []string{"lane"}}
	fileBody  = Block{Blocks: []Nested{{Type: "master"}, {Type: "plugin", Block: pluginBlock}, {Type: "host"}}}
)

// Parse is Load of text that is there already; name is what diagnostics call it.
func Parse(name string, src []byte, o Options) (*Snapshot, Diagnostics) {
	p := &parser{
		report: report{file: name, src: src},
		s:      &Snapshot{file: name, src: src, opts: o},
		seen:   map[string]bool{},
	}
	p.run()
	diags := p.done()
	if diags.HasErrors() {
		return nil, diags
	}
	return p.s, diags
}

type parser struct {
	report
	s    *Snapshot
	seen map[string]bool // plugins that are mentioned
}

func (p *parser) run() {
	if len(p.src) > MaxSize {
		p.errorf(hcl.Range{}, "longer than %d bytes", MaxSize)
		return
	}
	if !p.bounded() {
		return
	}
	file, diags := hclsyntax.ParseConfig(p.src, p.file, hcl.InitialPos)
	p.foreign(diags)
	if diags.HasErrors() { // what was recovered of a broken file would only give errors that are none
		return
	}
	body := file.Body.(*hclsyntax.Body)
	schemas := p.s.opts.Schemas
	for _, name := range slices.Sorted(maps.Keys(schemas)) {
		if err := schemas[name].Check(); err != nil {
			p.errorf(hcl.Range{}, "plugin %s declares blocks that can't be: %s", name, strings.ReplaceAll(err.Error(), "\n", "; "))
		}
	}
	if p.list.HasErrors() {
		return
	}

	known := hclsyntax.Body{Attributes: body.Attributes}
	for _, block := range body.Blocks {
		_, plugin := schemas[block.Type]
		if plugin || slices.Contains([]string{"deny", "lane"}, block.Type) {
			p.errorf(block.TypeRange, "%s belongs into a host block: host \"*\" { %s { ... } }", block.Type, block.Type)
			continue
		}
		known.Blocks = append(known.Blocks, block)
	}
	fileBody.names(&p.report, &known, "a policy file", nil)

	var master *hclsyntax.Block
	for _, block := range body.Blocks {
		switch block.Type {
		case "master":
			if master != nil {
				p.errorf(block.TypeRange, "a second master block; the first is in line %d", master.TypeRange.Start.Line)
				continue
			}
			master = block
			p.parseMaster(block)
		case "plugin":
			p.parsePlugin(block)
		}
	}
	if master == nil {
		p.parseMaster(&hclsyntax.Block{Body: &hclsyntax.Body{}})
	}
	for _, block := range body.Blocks { // after all plugin blocks, since those name plugins
		if block.Type == "host" {
			p.parseHost(block)
		}
	}
	slices.SortFunc(p.s.plugins, func(a, b Plugin) int { return strings.Compare(a.Name, b.Name) })
	slices.Sort(p.s.envs)
	p.s.envs = slices.Compact(p.s.envs)
	p.warnHidden()
	p.warnKept()
}

// bounded reports whether the parser can be given the text.
func (p *parser) bounded() bool {
	tokens, _ := hclsyntax.LexConfig(p.src, p.file, hcl.InitialPos)
	depth, operators, signs := 0, 0, 0
	for _, t := range tokens {
		switch t.Type {
		case hclsyntax.TokenBang, hclsyntax.TokenMinus:
			signs++
		default:
			signs = 0
		}
		switch t.Type {
		case hclsyntax.TokenOBrace, hclsyntax.TokenOParen, hclsyntax.TokenOBrack, hclsyntax.TokenOQuote, hclsyntax.TokenOHeredoc,
			hclsyntax.TokenTemplateInterp, hclsyntax.TokenTemplateControl:
			depth++
		case hclsyntax.TokenCBrace, hclsyntax.TokenCParen, hclsyntax.TokenCBrack, hclsyntax.TokenCQuote, hclsyntax.TokenCHeredoc,
			hclsyntax.TokenTemplateSeqEnd:
			depth--
		}
		switch t.Type {
		case hclsyntax.TokenAnd, hclsyntax.TokenOr, hclsyntax.TokenEqualOp, hclsyntax.TokenNotEqual, hclsyntax.TokenLessThan,
			hclsyntax.TokenLessThanEq, hclsyntax.TokenGreaterThan, hclsyntax.TokenGreaterThanEq, hclsyntax.TokenPlus,
			hclsyntax.TokenMinus, hclsyntax.TokenStar, hclsyntax.TokenSlash, hclsyntax.TokenPercent, hclsyntax.TokenQuestion,
			hclsyntax.TokenBang, hclsyntax.TokenOBrack:
			operators++
		}
		switch {
		case depth > maxDepth || signs > maxDepth:
			p.errorf(t.Range, "more than %d brackets or signs within each other", maxDepth)
			return false
		case operators > maxOperators:
			p.errorf(t.Range, "more than %d operators in one file", maxOperators)
			return false
		}
	}
	return true
}

func (p *parser) pos(rng hcl.Range) string { return fmt.Sprintf("%s:%d", p.file, rng.Start.Line) }

// path expands ~/ of a path.
func (p *parser) path(v cty.Value) string {
	s := v.AsString()
	if rest, ok := strings.CutPrefix(s, "~/"); ok && p.s.opts.Home != "" {
		return filepath.Join(p.s.opts.Home, rest)
	}
	return s
}

func (p *parser) parseMaster(block *hclsyntax.Block) {
	labels(&p.report, block, nil)
	v := masterBlock.decode(&p.report, block.Body, "master")
	if v == cty.NilVal {
		return
	}
	get := func(name string) string { return v.GetAttr(name).AsString() }
	m := Master{
		LogLevel:      get("log_level"),
		SSHConfig:     p.path(v.GetAttr("ssh_config")),
		AllowForeign:  get("foreign") == "allow",
		AuditRequired: get("audit") == "required",
		AuditFull:     get("audit_commands") == "full",
		LockOn:        texts(v.GetAttr("lock_on")),
	}
	m.ExitWhenIdle = -1
	if d, err := time.ParseDuration(get("exit_when_idle")); err == nil {
		m.ExitWhenIdle = d
	}
	p.s.master = m
}

func texts(list cty.Value) []string {
	var out []string
	for _, v := range list.AsValueSlice() {
		out = append(out, v.AsString())
	}
	return out
}

func (p *parser) parsePlugin(block *hclsyntax.Block) {
	if !labels(&p.report, block, pluginBlock.Labels) {
		return
	}
	name := block.Labels[0]
	if !namePattern.MatchString(name) || reserved(name) {
		p.wrong(block.LabelRanges[0], "lower case letters, digits, - and _", "a plugin can't have the name %q", name)
		return
	}
	if p.seen[name] {
		p.errorf(block.LabelRanges[0], "a second plugin block for %q", name)
		return
	}
	p.seen[name] = true
	schema, known := p.s.opts.Schemas[name]
	own := pluginBlock
	own.Attributes = slices.Concat(own.Attributes, schema.Plugin.Attributes)
	own.Blocks = schema.Plugin.Blocks
	var skip []string
	body := block.Body
	if !known { // what it holds besides is the plugin's business
		skip = slices.Collect(maps.Keys(body.Attributes))
		body = &hclsyntax.Body{Attributes: body.Attributes, SrcRange: body.SrcRange, EndRange: body.EndRange}
	}
	v := own.decode(&p.report, body, "plugin", skip...)
	if v == cty.NilVal {
		return
	}
	plugin := Plugin{
		Name: name, Path: p.path(v.GetAttr("path")), SHA256: strings.ToLower(v.GetAttr("sha256").AsString()),
		AllowOnFailure: v.GetAttr("on_failure").AsString() == "allow", May: texts(v.GetAttr("may")),
		Pos: p.pos(block.TypeRange), block: block,
	}
	if known {
		plugin.Value = without(v, pluginBlock)
	}
	p.s.plugins = append(p.s.plugins, plugin)
}

// without leaves the attributes of b out of an object.
func without(v cty.Value, b Block) cty.Value {
	attrs := v.AsValueMap()
	for _, a := range b.Attributes {
		delete(attrs, a.Name)
	}
	return cty.ObjectVal(attrs)
}

func reserved(name string) bool {
	return slices.Contains([]string{"master", "plugin", "host", "deny", "lane", "share", "via", "when"}, name)
}

func (p *parser) parseHost(block *hclsyntax.Block) {
	h := &hostBlock{labels: block.Labels, pos: p.pos(block.TypeRange), rng: block.DefRange()}
	if len(block.Labels) == 0 {
		p.errorf(block.TypeRange, `host lacks its patterns: host "*.example.com" { ... }`)
	}
	for i, label := range block.Labels {
		pattern, not, err := parsePattern(label)
		switch {
		case err != nil:
			p.errorf(block.LabelRanges[i], "%q: %v", label, err)
		case not:
			h.no = append(h.no, pattern)
		default:
			h.yes = append(h.yes, pattern)
		}
	}
	if len(h.yes) == 0 && len(h.no) > 0 {
		p.warnf(block.LabelRanges[0], `this host block applies to nothing: "!" only takes away from what another pattern matches`)
	}

	names := []string{"deny", "lane"}
	names = append(names, slices.Sorted(maps.Keys(p.s.opts.Schemas))...)
	names = append(names, p.s.opts.Others...)
	for _, plugin := range p.s.plugins {
		if !slices.Contains(names, plugin.Name) {
			names = append(names, plugin.Name)
		}
	}
	body := Block{Attributes: hostBody.Attributes}
	for _, name := range names {
		body.Blocks = append(body.Blocks, Nested{Type: name})
	}
	if p.s.opts.Schemas == nil { // any other name may be a plugin's, but not one that denies nothing for a slip of the pen
		for _, b := range block.Body.Blocks {
			slip := Near(b.Type, []string{"deny", "lane"}) != ""
			if namePattern.MatchString(b.Type) && !reserved(b.Type) && !slices.Contains(names, b.Type) && !slip {
				body.Blocks = append(body.Blocks, Nested{Type: b.Type})
			}
		}
	}
	body.names(&p.report, block.Body, "host", nil)

	for _, a := range hostBody.Attributes {
		attr, ok := block.Body.Attributes[a.Name]
		if !ok {
			continue
		}
		e := compile(&p.report, attr.Expr, a.Type, seesHost, a.Name)
		if e == nil {
			continue
		}
		p.note(e)
		set := &hostAttr{e, p.pos(attr.NameRange)}
		if a.Name == "share" {
			h.share = set
		} else {
			h.via = set
			if e.fixed != cty.NilVal && slices.Contains(texts(e.fixed), "") {
				p.errorf(attr.Expr.Range(), "via holds an empty name")
			}
		}
	}
	for _, b := range block.Body.Blocks {
		known := slices.ContainsFunc(body.Blocks, func(n Nested) bool { return n.Type == b.Type })
		switch {
		case b.Type == "deny":
			p.parseDeny(h, b)
		case b.Type == "lane":
			p.parseLane(h, b)
		case known:
			p.parsePluginBlock(h, b)
		}
	}
	p.s.hosts = append(p.s.hosts, h)
}

// note keeps what the snapshot has to find out for an expression.
func (p *parser) note(e *expr) {
	p.s.envs = append(p.s.envs, e.env...)
	p.s.seesAlias = p.s.seesAlias || e.alias
}

// when compiles the condition of a block; nil: it has none. ok is false if it is wrong.
func (p *parser) when(block *hclsyntax.Block, s scope) (e *expr, ok bool) {
	attr, set := block.Body.Attributes["when"]
	if !set {
		return nil, true
	}
	e = compile(&p.report, attr.Expr, cty.Bool, s, "when in "+block.Type)
	if e == nil {
		return nil, false
	}
	p.note(e)
	if e.fixed != cty.NilVal && e.fixed.True() {
		return nil, true
	}
	return e, true
}

func (p *parser) parseDeny(h *hostBlock, block *hclsyntax.Block) {
	labels(&p.report, block, nil)
	when, _ := p.when(block, seesAll)
	v := denyBlock.decode(&p.report, block.Body, "deny", "when")
	d := &rule{when: when, pos: p.pos(block.TypeRange), rng: block.DefRange()}
	if v != cty.NilVal {
		d.text = v.GetAttr("reason").AsString()
	}
	if d.text == "" {
		d.text = "not allowed for " + strings.Join(h.labels, " ")
	}
	h.denies = append(h.denies, d)
}

func (p *parser) parseLane(h *hostBlock, block *hclsyntax.Block) {
	when, _ := p.when(block, seesAll)
	laneBlock.decode(&p.report, block.Body, "lane", "when")
	if !labels(&p.report, block, laneBlock.Labels) {
		return
	}
	lanes := []string{Interactive, Bulk}
	if !slices.Contains(lanes, block.Labels[0]) {
		p.unknown(block.LabelRanges[0], lanes, "unknown lane %q", block.Labels[0])
	}
	h.lanes = append(h.lanes, &rule{when: when, text: block.Labels[0], pos: p.pos(block.TypeRange), rng: block.DefRange()})
}

func (p *parser) parsePluginBlock(h *hostBlock, block *hclsyntax.Block) {
	b := &PluginBlock{
		ID: len(p.s.blocks), Plugin: block.Type, Hosts: slices.Clone(h.labels), Pos: p.pos(block.TypeRange),
	}
	schema, known := p.s.opts.Schemas[block.Type]
	sees := seesAll
	if known && schema.HostOnly {
		sees = seesHost
	}
	b.when, _ = p.when(block, sees)
	if known {
		labels(&p.report, block, nil)
		b.Value = schema.Host.decode(&p.report, block.Body, block.Type, "when")
	}
	p.s.blocks = append(p.s.blocks, b)
	p.s.bodies = append(p.s.bodies, block)
	h.blocks = append(h.blocks, b)
	if !p.seen[block.Type] {
		p.seen[block.Type] = true
		p.s.plugins = append(p.s.plugins, Plugin{Name: block.Type, Pos: b.Pos})
	}
}

// warnHidden warns of what never applies, since something before it always does.
func (p *parser) warnHidden() {
	type earlier struct {
		*hostBlock
		line int
	}
	first := map[string][]earlier{} // by kind: what always applies to its hosts
	hidden := func(kind string, h *hostBlock, rng hcl.Range, always bool) {
		for _, e := range first[kind] {
			if e.covers(h.patterns) {
				p.warnf(rng, "%s never applies: the one in line %d always does before it", kind, e.line)
				return
			}
		}
		if always {
			first[kind] = append(first[kind], earlier{h, rng.Start.Line})
		}
	}
	for _, h := range p.s.hosts {
		for name, attr := range map[string]*hostAttr{"share": h.share, "via": h.via} {
			if attr != nil {
				hidden(name, h, attr.rng, true)
			}
		}
		for _, l := range h.lanes {
			hidden("lane", h, l.rng, l.when == nil)
		}
		for _, b := range h.blocks {
			hidden(b.Plugin, h, p.s.bodies[b.ID].DefRange(), b.when == nil)
		}
	}
}

// warnKept warns of connections that are kept and can then be used without a question.
func (p *parser) warnKept() {
	for _, h := range p.s.hosts {
		for _, b := range h.blocks {
			if b.Plugin != "persist" {
				continue
			}
			asked := slices.ContainsFunc(p.s.hosts, func(o *hostBlock) bool {
				return (o == h || o.covers(h.patterns)) &&
					slices.ContainsFunc(o.blocks, func(c *PluginBlock) bool { return c.Plugin == "confirm" })
			})
			if !asked {
				p.warnf(p.s.bodies[b.ID].TypeRange, "persist without confirm: whatever runs as you can use the kept connection unasked")
			}
		}
	}
}
