package policy

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hcldec"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
)

// Schema is what a plugin declares of its blocks.
type Schema struct {
	Plugin Block // what its `plugin "NAME"` block may hold besides the attributes that every plugin has
	Host   Block // the block named like the plugin, within host blocks
	// HostOnly says that the plugin is asked about connections, not about uses: the `when` of its blocks sees only host.
	HostOnly bool
}

// Block says what a block may hold. In a Block of a plugin, `when` is the core's and not declared.
type Block struct {
	Doc        string
	Labels     []string // names of the block's labels; in the decoded value of a nested block they are attributes
	Attributes []Attribute
	Blocks     []Nested
}

// Nested is a kind of block within a block. It may stand there any number of times, each with other labels. Its decoded
// value is a list of objects in the file's order.
type Nested struct {
	Type string
	Block
}

// Attribute is one `name = value` of a block. The value is a constant of exactly this type: nothing is converted but
// [...] to lists and sets and {...} to maps.
type Attribute struct {
	Name     string
	Type     cty.Type  // without dynamic parts
	Required bool      //
	Default  cty.Value // of Type; NilVal: "", 0, false or nothing in it, never null
	Doc      string
	Format   Format   // of a string, or of the strings in a list or set
	Words    []string // what it may be; with a Format, besides what that takes
}

// Format is what the text of a string attribute has to look like. It stays a string.
type Format string

// The formats.
const (
	Text     Format = ""
	Duration Format = "duration" // as time.ParseDuration reads it, not negative: "90s", "10m", "1h30m"
	Clock    Format = "clock"    // a time of the day: "18:00"
	Path     Format = "path"     // absolute, or under ~/
	Digest   Format = "sha256"   // 64 hexadecimal digits
)

var (
	clockPattern  = regexp.MustCompile(`^([01][0-9]|2[0-3]):[0-5][0-9]$`)
	digestPattern = regexp.MustCompile(`^[0-9a-fA-F]{64}$`)
	namePattern   = regexp.MustCompile(`^[a-z][a-z0-9_-]*$`)
)

// allowed says what the attribute may be.
func (a Attribute) allowed() string {
	var parts []string
	if len(a.Words) > 0 {
		parts = append(parts, quoted(a.Words))
	}
	switch a.Format {
	case Duration:
		parts = append(parts, `a duration such as "90s", "10m" or "8h"`)
	case Clock:
		parts = append(parts, `a time of the day such as "18:00"`)
	case Path:
		parts = append(parts, `a path that begins with / or ~/`)
	case Digest:
		parts = append(parts, `64 hexadecimal digits`)
	}
	if a.Type.IsListType() || a.Type.IsSetType() {
		if len(parts) > 0 {
			return "a list of: " + strings.Join(parts, ", or ")
		}
	}
	if len(parts) == 0 {
		return typeName(a.Type)
	}
	return strings.Join(parts, ", or ")
}

// fits reports whether one string is what the attribute takes.
func (a Attribute) fits(s string) bool {
	if slices.Contains(a.Words, s) {
		return true
	}
	switch a.Format {
	case Duration:
		d, err := time.ParseDuration(s)
		return err == nil && d >= 0
	case Clock:
		return clockPattern.MatchString(s)
	case Path:
		return (strings.HasPrefix(s, "/") || strings.HasPrefix(s, "~/")) && !strings.Contains(s, "\x00")
	case Digest:
		return digestPattern.MatchString(s)
	}
	return len(a.Words) == 0
}

// value is the default: never null.
func (a Attribute) value() cty.Value {
	if a.Default != cty.NilVal {
		return a.Default
	}
	return empty(a.Type)
}

func empty(t cty.Type) cty.Value {
	switch {
	case t == cty.String:
		return cty.StringVal("")
	case t == cty.Number:
		return cty.NumberIntVal(0)
	case t == cty.Bool:
		return cty.False
	case t.IsListType():
		return cty.ListValEmpty(t.ElementType())
	case t.IsSetType():
		return cty.SetValEmpty(t.ElementType())
	case t.IsMapType():
		return cty.MapValEmpty(t.ElementType())
	}
	attrs := map[string]cty.Value{}
	for name, at := range t.AttributeTypes() {
		attrs[name] = empty(at)
	}
	return cty.ObjectVal(attrs)
}

// Check reports what is wrong with a schema: that is its plugin's mistake, not the policy's.
func (s Schema) Check() error {
	var errs []error
	if len(s.Plugin.Labels)+len(s.Host.Labels) > 0 {
		errs = append(errs, errors.New("only nested blocks take labels"))
	}
	when := Block{Attributes: []Attribute{{Name: "when"}}}
	errs = append(errs, s.Plugin.check("the plugin block", pluginBlock), s.Host.check("the block in host", when))
	return errors.Join(errs...)
}

func (b Block) check(where string, taken Block) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(where+": "+format, args...)) }
	seen := map[string]bool{}
	for _, a := range taken.Attributes {
		seen[a.Name] = true
	}
	name := func(n string) {
		switch {
		case !namePattern.MatchString(n):
			bad("%q can't be a name", n)
		case seen[n]:
			bad("the name %q is taken", n)
		}
		seen[n] = true
	}
	for _, n := range b.Labels {
		name(n)
	}
	for _, a := range b.Attributes {
		name(a.Name)
		switch {
		case a.Type == cty.NilType || !usable(a.Type):
			bad("%s has a type that policy can't hold", a.Name)
		case a.Default != cty.NilVal && (!a.Default.IsWhollyKnown() || !a.Default.Type().Equals(a.Type) || a.Default.IsNull()):
			bad("the default of %s is not %s", a.Name, typeName(a.Type))
		case !slices.Contains([]Format{Text, Duration, Clock, Path, Digest}, a.Format):
			bad("%s has the unknown format %q", a.Name, a.Format)
		}
	}
	for _, n := range b.Blocks {
		name(n.Type)
		if err := n.Block.check(where+", "+n.Type, Block{}); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// usable leaves out what has no empty value, or no form in JSON.
func usable(t cty.Type) bool {
	switch {
	case t.IsPrimitiveType():
		return true
	case t.IsListType(), t.IsSetType(), t.IsMapType():
		return usable(t.ElementType())
	case t.IsObjectType():
		for _, at := range t.AttributeTypes() {
			if !usable(at) {
				return false
			}
		}
		return len(t.OptionalAttributes()) == 0
	}
	return false
}

// spec is the block in hcldec's terms.
func (b Block) spec(labels bool) hcldec.ObjectSpec {
	spec := hcldec.ObjectSpec{}
	for _, a := range b.Attributes {
		spec[a.Name] = &hcldec.DefaultSpec{
			Primary: &hcldec.AttrSpec{Name: a.Name, Type: a.Type}, // that a required one is there is checked before
			Default: &hcldec.LiteralSpec{Value: a.value()},
		}
	}
	for _, n := range b.Blocks {
		spec[n.Type] = &hcldec.BlockListSpec{TypeName: n.Type, Nested: n.Block.spec(true)}
	}
	if labels {
		for i, label := range b.Labels {
			spec[label] = &hcldec.BlockLabelSpec{Index: i, Name: label}
		}
	}
	return spec
}

// decode checks a body against b and returns its value; NilVal if there are errors. Names in skip are somebody else's.
// where names the block for a person.
func (b Block) decode(r *report, body *hclsyntax.Body, where string, skip ...string) cty.Value {
	before := len(r.list)
	b.names(r, body, where, skip)
	for _, a := range b.Attributes {
		if attr, ok := body.Attributes[a.Name]; ok {
			a.check(r, attr, where)
		} else if a.Required {
			r.wrong(head(body), a.allowed(), "%s lacks %s", where, a.Name)
		}
	}
	for _, n := range b.Blocks {
		first := map[string]*hclsyntax.Block{}
		for _, block := range body.Blocks {
			if block.Type != n.Type || !labels(r, block, n.Labels) {
				continue
			}
			key := strings.Join(block.Labels, "\x00")
			if earlier := first[key]; earlier != nil {
				r.errorf(block.DefRange(), "a second %s in %s; the first is in line %d", title(block), where,
					earlier.TypeRange.Start.Line)
			} else {
				first[key] = block
			}
			n.Block.decode(r, block.Body, n.Type)
		}
	}
	if r.list[before:].HasErrors() {
		return cty.NilVal
	}
	v, _, diags := hcldec.PartialDecode(body, b.spec(false), constants)
	r.foreign(diags)
	if diags.HasErrors() {
		return cty.NilVal
	}
	return v
}

// names reports the attributes and blocks that b does not know.
func (b Block) names(r *report, body *hclsyntax.Body, where string, skip []string) {
	var attrs, blocks []string
	for _, a := range b.Attributes {
		attrs = append(attrs, a.Name)
	}
	for _, n := range b.Blocks {
		blocks = append(blocks, n.Type)
	}
	attrs = append(attrs, skip...)
	for _, name := range slices.Sorted(maps.Keys(body.Attributes)) {
		attr := body.Attributes[name]
		switch {
		case slices.Contains(attrs, name):
		case slices.Contains(blocks, name):
			r.errorf(attr.NameRange, "%s in %s is a block: write %s { ... }", name, where, name)
		case len(attrs) == 0:
			r.errorf(attr.NameRange, "unknown attribute %q: %s has none", name, where)
		default:
			r.unknown(attr.NameRange, attrs, "unknown attribute %q in %s", name, where)
		}
	}
	for _, block := range body.Blocks {
		switch {
		case slices.Contains(blocks, block.Type):
		case slices.Contains(attrs, block.Type):
			r.errorf(block.TypeRange, "%s in %s is an attribute: write %s = ...", block.Type, where, block.Type)
		case len(blocks) == 0:
			r.errorf(block.TypeRange, "unknown block %q: %s holds none", block.Type, where)
		default:
			r.unknown(block.TypeRange, blocks, "unknown block %q in %s", block.Type, where)
		}
	}
}

// check reports what is wrong with an attribute's value.
func (a Attribute) check(r *report, attr *hclsyntax.Attribute, where string) {
	rng := attr.Expr.Range()
	if vars := attr.Expr.Variables(); len(vars) > 0 {
		r.wrong(vars[0].SourceRange(), a.allowed(), "%s in %s is fixed when the file is read: it can't refer to %s", a.Name,
			where, vars[0].RootName())
		return
	}
	if !plainExpr(r, attr.Expr) {
		return
	}
	v, diags := attr.Expr.Value(constants)
	r.foreign(diags)
	if diags.HasErrors() {
		return
	}
	ranges := []hcl.Range{rng}
	if list, ok := attr.Expr.(*hclsyntax.TupleConsExpr); ok {
		for _, e := range list.Exprs {
			ranges = append(ranges, e.Range())
		}
	}
	a.checkValue(r, ranges, v, where)
}

// checkValue is told where the value stands, and then, if that is known, where each of its elements does.
func (a Attribute) checkValue(r *report, ranges []hcl.Range, v cty.Value, where string) {
	rng := ranges[0]
	switch {
	case v.IsNull():
		r.wrong(rng, a.allowed(), "%s in %s can't be null; leave it out", a.Name, where)
		return
	case !conforms(v, a.Type):
		r.wrong(rng, a.allowed(), "%s in %s must be %s, not %s", a.Name, where, typeName(a.Type), typeName(v.Type()))
		return
	}
	v, err := convert.Convert(v, a.Type)
	if err != nil {
		r.wrong(rng, a.allowed(), "%s in %s: %v", a.Name, where, err)
		return
	}
	var texts []cty.Value
	switch {
	case a.Type == cty.String:
		texts = []cty.Value{v}
	case (a.Type.IsListType() || a.Type.IsSetType()) && a.Type.ElementType() == cty.String:
		texts = v.AsValueSlice()
	}
	for i, t := range texts {
		at := rng
		if a.Type.IsListType() && len(ranges) == len(texts)+1 {
			at = ranges[i+1]
		}
		if s := t.AsString(); !a.fits(s) {
			message := fmt.Sprintf("%s in %s can't be %q", a.Name, where, s)
			if name := Near(s, a.Words); name != "" {
				message += fmt.Sprintf("; did you mean %q?", name)
			}
			r.add(Error, at, a.allowed(), message)
		}
	}
}

// labels reports whether a block has as many labels as it should, and complains if not.
func labels(r *report, block *hclsyntax.Block, want []string) bool {
	switch {
	case len(block.Labels) > len(want):
		rng := block.LabelRanges[len(want)]
		if len(want) == 0 {
			r.errorf(rng, "%s takes no label", block.Type)
		} else {
			r.errorf(rng, "a label too many: %s takes only its %s", block.Type, strings.Join(want, " and "))
		}
		return false
	case len(block.Labels) < len(want):
		missing := strings.ToUpper(want[len(block.Labels)])
		r.errorf(block.TypeRange, "%s lacks a label: %s %q { ... }", block.Type, block.Type, missing)
		return false
	}
	return true
}

// title is a block as a person names it: confirm, lane "bulk".
func title(block *hclsyntax.Block) string {
	s := block.Type
	for _, l := range block.Labels {
		s += fmt.Sprintf(" %q", l)
	}
	return s
}

// head is the place of what is missing in a body: its opening brace.
func head(body *hclsyntax.Body) hcl.Range {
	rng := body.Range()
	rng.End = rng.Start
	rng.End.Byte++
	rng.End.Column++
	return rng
}

// conforms reports whether v is of type t but for what HCL has no syntax for: lists, sets and maps. Nothing in it may be
// null.
func conforms(v cty.Value, t cty.Type) bool {
	if v.IsNull() {
		return false
	}
	if !v.IsKnown() {
		return v.Type().Equals(t)
	}
	got := v.Type()
	each := func(elem func(key cty.Value) (cty.Type, bool)) bool {
		for it := v.ElementIterator(); it.Next(); {
			key, e := it.Element()
			et, ok := elem(key)
			if !ok || !conforms(e, et) {
				return false
			}
		}
		return true
	}
	switch {
	case t.IsListType() || t.IsSetType():
		return (got.IsTupleType() || got.Equals(t)) && each(func(cty.Value) (cty.Type, bool) { return t.ElementType(), true })
	case t.IsMapType():
		return (got.IsObjectType() || got.Equals(t)) && each(func(cty.Value) (cty.Type, bool) { return t.ElementType(), true })
	case t.IsObjectType():
		return got.IsObjectType() && len(got.AttributeTypes()) == len(t.AttributeTypes()) &&
			each(func(key cty.Value) (cty.Type, bool) {
				name := key.AsString()
				if !t.HasAttribute(name) {
					return cty.NilType, false
				}
				return t.AttributeType(name), true
			})
	}
	return got.Equals(t)
}

// typeName is a type for a person.
func typeName(t cty.Type) string {
	switch {
	case t == cty.String:
		return "a string"
	case t == cty.Number:
		return "a number"
	case t == cty.Bool:
		return "a bool"
	case t == cty.DynamicPseudoType:
		return "anything"
	case t.IsListType(), t.IsSetType():
		return "a list of " + plural(t.ElementType())
	case t.IsTupleType():
		ets := t.TupleElementTypes()
		for _, et := range ets {
			if !et.Equals(ets[0]) {
				return "a list of different things"
			}
		}
		if len(ets) == 0 {
			return "an empty list"
		}
		return "a list of " + plural(ets[0])
	case t.IsMapType():
		return "a map of " + plural(t.ElementType())
	case t.IsObjectType():
		return "an object"
	}
	return t.FriendlyName()
}

func plural(t cty.Type) string {
	switch {
	case t.IsPrimitiveType():
		return t.FriendlyName() + "s"
	case t.IsObjectType():
		return "objects"
	}
	return "lists"
}
