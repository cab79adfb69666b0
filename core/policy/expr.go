package policy

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
	"github.com/zclconf/go-cty/cty/function"
	"github.com/zclconf/go-cty/cty/function/stdlib"

	"github.com/muxproxy/muxproxy/core/use"
)

// What expressions see. Nothing in it is ever null: what is absent is "", 0 or [].
var (
	useType = cty.Object(map[string]cty.Type{
		"kind": cty.String, "command": cty.String, "program": cty.String, "subsystem": cty.String,
		"destination": cty.String, "port": cty.Number, "name": cty.String,
	})
	processType = cty.Object(map[string]cty.Type{
		"exe": cty.String, "args": cty.List(cty.String), "cwd": cty.String, "tty": cty.String,
	})
	clientType = cty.Object(map[string]cty.Type{
		"exe": cty.String, "args": cty.List(cty.String), "cwd": cty.String, "tty": cty.String,
		"parents": cty.List(processType), "env": cty.Map(cty.String),
	})
	hostType = cty.Object(map[string]cty.Type{
		"name": cty.String, "alias": cty.String, "address": cty.String, "port": cty.Number, "user": cty.String,
	})
)

// scope is what an expression may refer to.
type scope map[string]cty.Type

var (
	seesHost = scope{"host": hostType}
	seesAll  = scope{"use": useType, "client": clientType, "host": hostType}
)

// unknowns is the scope with nothing known but its types.
func (s scope) unknowns() *hcl.EvalContext {
	vars := map[string]cty.Value{}
	for name, t := range s {
		attrs := map[string]cty.Value{}
		for a, at := range t.AttributeTypes() {
			attrs[a] = cty.UnknownVal(at).RefineNotNull()
		}
		vars[name] = cty.ObjectVal(attrs)
	}
	return &hcl.EvalContext{Variables: vars, Functions: functions}
}

// An expr is an expression that was found to be well typed.
type expr struct {
	hcl  hclsyntax.Expression
	rng  hcl.Range
	text string   // as it is in the file
	env  []string // variables of the client's environment that it refers to

	alias bool // it refers to host.alias

	fixed cty.Value // its value if it refers to nothing; else NilVal
}

// compile checks an expression of the wanted type over what s holds, and returns nil if there is something wrong.
//
// It is evaluated with unknown values. HCL leaves out of its report what stands right of an operator that was decided by
// the left, in the other branch of a conditional, and in a `for` over something unknown, and it converts operands: an
// error there would only come to light when a use is decided. So for this evaluation operators look at all of their
// operands, and branches report for themselves; after it, operators stay strict about types.
func compile(r *report, e hclsyntax.Expression, want cty.Type, s scope, where string) *expr {
	before := len(r.list)
	out := &expr{hcl: e, rng: e.Range(), text: strings.TrimSpace(string(e.Range().SliceBytes(r.src)))}
	out.variables(r, s, where)
	c := &checker{report: r, plain: plainExpr(r, e)}
	c.prepare(e)
	v, diags := value(e, s.unknowns())
	r.foreign(diags)
	c.restore()
	if r.list[before:].HasErrors() {
		return nil
	}
	switch got := v.Type(); {
	case v.IsNull():
		r.wrong(out.rng, typeName(want), "%s can't be null", where)
	case got == cty.DynamicPseudoType && !v.IsKnown(): // only a use will show
	case want == cty.Bool && got != cty.Bool:
		r.wrong(out.rng, "a bool; nothing is converted", "%s is %s, not a bool", where,
			typeName(got))
	case !want.Equals(got) && !(v.IsWhollyKnown() && conforms(v, want)) && !unifies(got, want):
		r.wrong(out.rng, typeName(want), "%s must be %s, not %s", where, typeName(want), typeName(got))
	}
	if r.list[before:].HasErrors() {
		return nil
	}
	if len(e.Variables()) == 0 {
		if fixed, err := out.eval(func() *hcl.EvalContext { return constants }, want); err == nil {
			out.fixed = fixed
		}
	}
	return out
}

// unifies is conforms for a type alone.
func unifies(got, want cty.Type) bool {
	switch {
	case got == cty.DynamicPseudoType || got.Equals(want):
		return true
	case (want.IsListType() || want.IsSetType()) && got.IsTupleType():
		return !slices.ContainsFunc(got.TupleElementTypes(), func(t cty.Type) bool { return !unifies(t, want.ElementType()) })
	case want.IsListType() && got.IsSetType():
		return unifies(got.ElementType(), want.ElementType())
	}
	return false
}

// value evaluates e. The libraries' panics become errors: a policy must not end everybody's sessions.
func value(e hclsyntax.Expression, ctx *hcl.EvalContext) (v cty.Value, diags hcl.Diagnostics) {
	defer func() {
		if p := recover(); p != nil {
			v = cty.DynamicVal
			diags = append(diags, &hcl.Diagnostic{
				Severity: hcl.DiagError, Summary: "Can't be evaluated", Detail: fmt.Sprint(p), Subject: e.Range().Ptr(),
			})
		}
	}()
	return e.Value(ctx)
}

// evalError says why an expression has no value for one use.
type evalError struct {
	summary string // holds nothing of the use
	detail  string // may quote it, so it is for the eyes of whoever asked `explain`
}

func (e *evalError) Error() string { return e.summary + e.detail }

// eval evaluates the expression for a use. ctx is called only if it refers to something.
func (e *expr) eval(ctx func() *hcl.EvalContext, want cty.Type) (cty.Value, *evalError) {
	if e.fixed != cty.NilVal {
		return e.fixed, nil
	}
	v, diags := value(e.hcl, ctx())
	for _, d := range diags {
		if d.Severity == hcl.DiagError {
			detail := strings.TrimSuffix(strings.Join(strings.Fields(d.Detail), " "), ".")
			return cty.NilVal, &evalError{lowerFirst(d.Summary), ": " + lowerFirst(detail)}
		}
	}
	switch {
	case v.IsNull():
		return cty.NilVal, &evalError{summary: "it is null"}
	case !v.IsWhollyKnown():
		return cty.NilVal, &evalError{summary: "its value can't be known"}
	case !conforms(v, want):
		return cty.NilVal, &evalError{summary: fmt.Sprintf("it is %s, not %s", typeName(v.Type()), typeName(want))}
	}
	v, err := convert.Convert(v, want)
	if err != nil {
		return cty.NilVal, &evalError{"it can't be converted", ": " + err.Error()}
	}
	return v, nil
}

// variables reports what e refers to and can't see, and notes what it needs.
func (e *expr) variables(r *report, s scope, where string) {
	for _, t := range e.hcl.Variables() {
		root := t.RootName()
		typ, ok := s[root]
		if !ok {
			if _, elsewhere := seesAll[root]; elsewhere {
				r.wrong(t[0].SourceRange(), strings.Join(slices.Sorted(maps.Keys(s)), ", "),
					"%s can't refer to %s: it is about the connection, not about one use of it", where, root)
			} else {
				r.unknown(t[0].SourceRange(), slices.Sorted(maps.Keys(s)), "unknown name %q in %s", root, where)
			}
			continue
		}
		name, rng, ok := step(t, 1)
		if !ok {
			e.alias = e.alias || root == "host"
			continue
		}
		if !typ.HasAttribute(name) {
			r.unknown(rng, slices.Sorted(maps.Keys(typ.AttributeTypes())), "%s has no attribute %q", root, name)
			continue
		}
		e.alias = e.alias || root == "host" && name == "alias"
		if root == "client" && name == "env" {
			v, _, ok := step(t, 2)
			if !ok {
				r.wrong(t.SourceRange(), "client.env.NAME", "client.env needs the name of one variable, written out")
				continue
			}
			e.env = append(e.env, v)
		}
	}
}

// step is the name that a traversal takes at its i-th step.
func step(t hcl.Traversal, i int) (string, hcl.Range, bool) {
	if i >= len(t) {
		return "", hcl.Range{}, false
	}
	switch s := t[i].(type) {
	case hcl.TraverseAttr:
		return s.Name, s.SrcRange, true
	case hcl.TraverseIndex:
		if s.Key.Type() == cty.String {
			return s.Key.AsString(), s.SrcRange, true
		}
	}
	return "", hcl.Range{}, false
}

// maxFor is how deep `for` may stand in `for`: each level multiplies the work.
const maxFor = 2

// plainExpr reports what no expression may hold: null, functions that do not exist, loops in loops in loops.
func plainExpr(r *report, e hclsyntax.Expression) bool {
	w := &plainWalker{report: r}
	hclsyntax.Walk(e, w)
	return !w.bad
}

type plainWalker struct {
	*report
	fors int
	bad  bool
}

// Enter implements hclsyntax.Walker.
func (w *plainWalker) Enter(n hclsyntax.Node) hcl.Diagnostics {
	before := len(w.list)
	switch n := n.(type) {
	case *hclsyntax.LiteralValueExpr:
		if n.Val.IsNull() {
			w.wrong(n.SrcRange, `"", 0 or []`, "there is no null here: what is absent is empty")
		}
	case *hclsyntax.FunctionCallExpr:
		if _, ok := functions[n.Name]; !ok {
			w.unknown(n.NameRange, slices.Sorted(maps.Keys(functions)), "there is no function %q", n.Name)
		}
		if n.Name == "contains" && len(n.Args) == 2 && isKind(n.Args[1]) {
			if list, ok := n.Args[0].(*hclsyntax.TupleConsExpr); ok {
				for _, e := range list.Exprs {
					w.kind(e)
				}
			}
		}
	case *hclsyntax.BinaryOpExpr:
		if n.Op == hclsyntax.OpEqual || n.Op == hclsyntax.OpNotEqual {
			if isKind(n.LHS) {
				w.kind(n.RHS)
			}
			if isKind(n.RHS) {
				w.kind(n.LHS)
			}
		}
	case *hclsyntax.ForExpr:
		if w.fors++; w.fors == maxFor+1 {
			w.errorf(n.OpenRange, "more than %d for within each other", maxFor)
		}
	}
	w.bad = w.bad || len(w.list) > before
	return nil
}

// Exit implements hclsyntax.Walker.
func (w *plainWalker) Exit(n hclsyntax.Node) hcl.Diagnostics {
	if _, ok := n.(*hclsyntax.ForExpr); ok {
		w.fors--
	}
	return nil
}

func isKind(e hclsyntax.Expression) bool {
	t, ok := e.(*hclsyntax.ScopeTraversalExpr)
	if !ok || t.Traversal.RootName() != "use" {
		return false
	}
	name, _, _ := step(t.Traversal, 1)
	return name == "kind" && len(t.Traversal) == 2
}

// kind reports a word that use.kind never is: a deny block with it would never deny.
func (w *plainWalker) kind(e hclsyntax.Expression) {
	if len(e.Variables()) > 0 {
		return
	}
	v, diags := value(e, constants)
	if diags.HasErrors() || v.IsNull() || !v.IsKnown() || v.Type() != cty.String {
		return
	}
	if slices.Contains(use.Kinds(), use.Kind(v.AsString())) {
		return
	}
	var names []string
	for _, k := range use.Kinds() {
		names = append(names, string(k))
	}
	w.unknown(e.Range(), names, "there is no kind of use %q", v.AsString())
}

// operator says what an operator takes and gives. take is cty.DynamicPseudoType for two of the same type.
type operator struct {
	sign string
	take cty.Type
	impl function.Function
	// decides is the left or right operand that decides for && and ||, whatever the other is.
	decides cty.Value
}

var operators = map[*hclsyntax.Operation]operator{
	hclsyntax.OpEqual:              {"==", cty.DynamicPseudoType, stdlib.EqualFunc, cty.NilVal},
	hclsyntax.OpNotEqual:           {"!=", cty.DynamicPseudoType, stdlib.NotEqualFunc, cty.NilVal},
	hclsyntax.OpGreaterThan:        {">", cty.Number, stdlib.GreaterThanFunc, cty.NilVal},
	hclsyntax.OpGreaterThanOrEqual: {">=", cty.Number, stdlib.GreaterThanOrEqualToFunc, cty.NilVal},
	hclsyntax.OpLessThan:           {"<", cty.Number, stdlib.LessThanFunc, cty.NilVal},
	hclsyntax.OpLessThanOrEqual:    {"<=", cty.Number, stdlib.LessThanOrEqualToFunc, cty.NilVal},
	hclsyntax.OpAdd:                {"+", cty.Number, stdlib.AddFunc, cty.NilVal},
	hclsyntax.OpSubtract:           {"-", cty.Number, stdlib.SubtractFunc, cty.NilVal},
	hclsyntax.OpMultiply:           {"*", cty.Number, stdlib.MultiplyFunc, cty.NilVal},
	hclsyntax.OpDivide:             {"/", cty.Number, stdlib.DivideFunc, cty.NilVal},
	hclsyntax.OpModulo:             {"%", cty.Number, stdlib.ModuloFunc, cty.NilVal},
	hclsyntax.OpLogicalAnd:         {"&&", cty.Bool, stdlib.AndFunc, cty.False},
	hclsyntax.OpLogicalOr:          {"||", cty.Bool, stdlib.OrFunc, cty.True},
	hclsyntax.OpLogicalNot:         {"!", cty.Bool, stdlib.NotFunc, cty.NilVal},
	hclsyntax.OpNegate:             {"-", cty.Number, stdlib.NegateFunc, cty.NilVal},
}

// strictOps are the operators of HCL without its conversions.
var strictOps = func() map[*hclsyntax.Operation]*hclsyntax.Operation {
	out := map[*hclsyntax.Operation]*hclsyntax.Operation{}
	for op, o := range operators {
		out[op] = o.operation(op, nil)
	}
	return out
}()

// operation is the operator as HCL calls it. report, which may be nil, is told what is wrong with the operands, and then
// nothing else is: all of them are looked at.
func (o operator) operation(op *hclsyntax.Operation, report func(error)) *hclsyntax.Operation {
	spec := &function.Spec{
		Type: func(args []cty.Value) (cty.Type, error) {
			err := o.mismatch(args)
			if err != nil && report != nil {
				report(err)
				err = nil
			}
			return op.Type, err
		},
		Impl: func(args []cty.Value, t cty.Type) (cty.Value, error) {
			if o.mismatch(args) != nil { // reported
				return cty.UnknownVal(t), nil
			}
			if o.take == cty.DynamicPseudoType {
				args = alike(args)
			}
			v, err := o.impl.Call(args)
			if err != nil && report != nil {
				report(err)
				return cty.UnknownVal(t), nil
			}
			return v, err
		},
	}
	for range o.impl.Params() {
		spec.Params = append(spec.Params, function.Parameter{
			Name: "operand", Type: cty.DynamicPseudoType, AllowNull: true, AllowDynamicType: true,
		})
	}
	out := &hclsyntax.Operation{Impl: function.New(spec), Type: op.Type}
	if o.decides != cty.NilVal && report == nil {
		out.ShortCircuit = func(lhs, rhs cty.Value, l, r hcl.Diagnostics) (cty.Value, hcl.Diagnostics) {
			for _, side := range []struct {
				v cty.Value
				d hcl.Diagnostics
			}{{lhs, l}, {rhs, r}} {
				if !side.d.HasErrors() && side.v.Type() == cty.Bool && side.v.IsKnown() && !side.v.IsNull() &&
					side.v.RawEquals(o.decides) {
					return o.decides, side.d
				}
			}
			return cty.NilVal, nil
		}
	}
	return out
}

var errNull = errors.New("an operand is null")

// mismatch says what is wrong with the operands.
func (o operator) mismatch(args []cty.Value) error {
	for _, a := range args {
		if a.IsNull() {
			return errNull
		}
	}
	if o.take != cty.DynamicPseudoType {
		for _, a := range args {
			if t := a.Type(); t != o.take && t != cty.DynamicPseudoType {
				return fmt.Errorf("%s takes %s, not %s", o.sign, typeName(o.take), typeName(t))
			}
		}
		return nil
	}
	a, b := args[0].Type(), args[1].Type()
	if comparable(a, b) || unifies(a, b) || unifies(b, a) || a.IsTupleType() && b.IsTupleType() {
		return nil
	}
	return fmt.Errorf("can't compare %s with %s", typeName(a), typeName(b))
}

// alike makes one type of a list and what is written as [...].
func alike(args []cty.Value) []cty.Value {
	a, b := args[0], args[1]
	if v, err := convert.Convert(b, a.Type()); err == nil && unifies(b.Type(), a.Type()) {
		return []cty.Value{a, v}
	}
	if v, err := convert.Convert(a, b.Type()); err == nil && unifies(a.Type(), b.Type()) {
		return []cty.Value{v, b}
	}
	return args
}

// checker prepares the tree of one expression for an evaluation with unknowns, and afterwards for all others.
type checker struct {
	*report
	plain bool // there is no null in the text, about which enough has been said then
	after []func()
}

func (c *checker) restore() {
	for _, f := range slices.Backward(c.after) {
		f()
	}
}

func (c *checker) prepare(e hclsyntax.Expression) {
	var nodes []hclsyntax.Node // all of them first: a witness hides what it stands before
	hclsyntax.VisitAll(e, func(n hclsyntax.Node) hcl.Diagnostics {
		nodes = append(nodes, n)
		return nil
	})
	for _, n := range nodes {
		switch n := n.(type) {
		case *hclsyntax.BinaryOpExpr:
			n.Op = c.operator(n.Op, n.SrcRange, func(op *hclsyntax.Operation) { n.Op = op })
		case *hclsyntax.UnaryOpExpr:
			n.Op = c.operator(n.Op, n.SrcRange, func(op *hclsyntax.Operation) { n.Op = op })
		case *hclsyntax.ConditionalExpr:
			cond, yes, no := n.Condition, n.TrueResult, n.FalseResult
			n.Condition = &witness{cond, func(v cty.Value, _ hcl.Diagnostics) cty.Value {
				if t := v.Type(); t != cty.Bool && t != cty.DynamicPseudoType {
					c.errorf(cond.Range(), "a condition is a bool, not %s", typeName(t))
				}
				return v
			}}
			n.TrueResult, n.FalseResult = &witness{yes, c.branch}, &witness{no, c.branch}
			c.after = append(c.after, func() { n.Condition, n.TrueResult, n.FalseResult = cond, yes, no })
		case *hclsyntax.ForExpr:
			coll := n.CollExpr
			n.CollExpr = &witness{coll, func(v cty.Value, _ hcl.Diagnostics) cty.Value {
				if v.IsKnown() || !v.Type().IsListType() {
					return v
				}
				return cty.ListVal([]cty.Value{cty.UnknownVal(v.Type().ElementType()).RefineNotNull()})
			}}
			c.after = append(c.after, func() { n.CollExpr = coll })
		}
	}
}

// operator returns what stands for op during the check; put is called after it with what does from then on.
func (c *checker) operator(op *hclsyntax.Operation, rng hcl.Range, put func(*hclsyntax.Operation)) *hclsyntax.Operation {
	o, ok := operators[op]
	if !ok {
		return op
	}
	c.after = append(c.after, func() { put(strictOps[op]) })
	return o.operation(op, func(err error) {
		if c.plain || err != errNull {
			c.errorf(rng, "%v", err)
		}
	})
}

func (c *checker) branch(v cty.Value, diags hcl.Diagnostics) cty.Value {
	c.foreign(diags)
	return v
}

// witness sees what an expression within another came to, and can put something else in its place.
type witness struct {
	hclsyntax.Expression
	see func(cty.Value, hcl.Diagnostics) cty.Value
}

// Value implements hcl.Expression.
func (w *witness) Value(ctx *hcl.EvalContext) (cty.Value, hcl.Diagnostics) {
	v, diags := w.Expression.Value(ctx)
	return w.see(v, diags), diags
}
