package policy

import (
	"fmt"
	"net/netip"
	"regexp"

	"github.com/hashicorp/hcl/v2"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/function"
	"github.com/zclconf/go-cty/cty/function/stdlib"
)

// functions are what an expression may call: cty's standard library, under the names that Terraform made known, and
// three of our own. None of them reads anything but its arguments.
var functions = map[string]function.Function{
	"matches": matchesFunc,
	"glob":    globFunc,
	"cidr":    cidrFunc,

	"contains": containsFunc,

	"abs":                    stdlib.AbsoluteFunc,
	"ceil":                   stdlib.CeilFunc,
	"chomp":                  stdlib.ChompFunc,
	"chunklist":              stdlib.ChunklistFunc,
	"coalesce":               stdlib.CoalesceFunc,
	"coalescelist":           stdlib.CoalesceListFunc,
	"compact":                stdlib.CompactFunc,
	"concat":                 stdlib.ConcatFunc,
	"csvdecode":              stdlib.CSVDecodeFunc,
	"distinct":               stdlib.DistinctFunc,
	"element":                stdlib.ElementFunc,
	"flatten":                stdlib.FlattenFunc,
	"floor":                  stdlib.FloorFunc,
	"format":                 stdlib.FormatFunc,
	"formatdate":             stdlib.FormatDateFunc,
	"formatlist":             stdlib.FormatListFunc,
	"hasindex":               stdlib.HasIndexFunc,
	"indent":                 stdlib.IndentFunc,
	"int":                    stdlib.IntFunc,
	"join":                   stdlib.JoinFunc,
	"jsondecode":             stdlib.JSONDecodeFunc,
	"jsonencode":             stdlib.JSONEncodeFunc,
	"keys":                   stdlib.KeysFunc,
	"length":                 stdlib.LengthFunc,
	"log":                    stdlib.LogFunc,
	"lookup":                 stdlib.LookupFunc,
	"lower":                  stdlib.LowerFunc,
	"max":                    stdlib.MaxFunc,
	"merge":                  stdlib.MergeFunc,
	"min":                    stdlib.MinFunc,
	"parseint":               stdlib.ParseIntFunc,
	"pow":                    stdlib.PowFunc,
	"range":                  stdlib.RangeFunc,
	"regex":                  stdlib.RegexFunc,
	"regexall":               stdlib.RegexAllFunc,
	"regexreplace":           stdlib.RegexReplaceFunc,
	"replace":                stdlib.ReplaceFunc,
	"reverse":                stdlib.ReverseListFunc,
	"setintersection":        stdlib.SetIntersectionFunc,
	"setproduct":             stdlib.SetProductFunc,
	"setsubtract":            stdlib.SetSubtractFunc,
	"setsymmetricdifference": stdlib.SetSymmetricDifferenceFunc,
	"setunion":               stdlib.SetUnionFunc,
	"signum":                 stdlib.SignumFunc,
	"slice":                  stdlib.SliceFunc,
	"sort":                   stdlib.SortFunc,
	"split":                  stdlib.SplitFunc,
	"strlen":                 stdlib.StrlenFunc,
	"strrev":                 stdlib.ReverseFunc,
	"substr":                 stdlib.SubstrFunc,
	"timeadd":                stdlib.TimeAddFunc,
	"title":                  stdlib.TitleFunc,
	"tobool":                 stdlib.MakeToFunc(cty.Bool),
	"tonumber":               stdlib.MakeToFunc(cty.Number),
	"toset":                  stdlib.MakeToFunc(cty.Set(cty.DynamicPseudoType)),
	"tostring":               stdlib.MakeToFunc(cty.String),
	"trim":                   stdlib.TrimFunc,
	"trimprefix":             stdlib.TrimPrefixFunc,
	"trimspace":              stdlib.TrimSpaceFunc,
	"trimsuffix":             stdlib.TrimSuffixFunc,
	"upper":                  stdlib.UpperFunc,
	"values":                 stdlib.ValuesFunc,
	"zipmap":                 stdlib.ZipmapFunc,
}

// constants evaluates what is fixed when the file is read.
var constants = &hcl.EvalContext{Functions: functions}

// predicate makes a function of two strings. fixed, which may be nil, looks at the first one alone, as soon as it is
// known: so a bad constant is found when the file is read.
func predicate(first, second string, fixed func(string) error, impl func(a, b string) (bool, error)) function.Function {
	return function.New(&function.Spec{
		Params: []function.Parameter{{Name: first, Type: cty.String}, {Name: second, Type: cty.String}},
		Type: func(args []cty.Value) (cty.Type, error) {
			if fixed != nil && args[0].IsKnown() {
				if err := fixed(args[0].AsString()); err != nil {
					return cty.Bool, function.NewArgError(0, err)
				}
			}
			return cty.Bool, nil
		},
		RefineResult: func(b *cty.RefinementBuilder) *cty.RefinementBuilder { return b.NotNull() },
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			ok, err := impl(args[0].AsString(), args[1].AsString())
			return cty.BoolVal(ok), err
		},
	})
}

// matchesFunc is matches(REGEXP, TEXT): RE2 syntax, anywhere in the text.
var matchesFunc = predicate("regexp", "text", func(pattern string) error {
	_, err := regexp.Compile(pattern)
	return err
}, func(pattern, s string) (bool, error) {
	re, err := regexp.Compile(pattern)
	return err == nil && re.MatchString(s), err
})

// globFunc is glob(PATTERN, TEXT): * and ? (one byte) as in host patterns, the whole text.
var globFunc = predicate("pattern", "text", nil, func(pattern, s string) (bool, error) {
	return matchPattern(pattern, s), nil
})

// cidrFunc is cidr(NETWORK, ADDRESS): false for what is not an address.
var cidrFunc = predicate("network", "address", func(network string) error {
	_, err := parseNetwork(network)
	return err
}, func(network, s string) (bool, error) {
	prefix, err := parseNetwork(network)
	if err != nil {
		return false, err
	}
	ip, err := netip.ParseAddr(canonicalHost(s))
	return err == nil && prefix.Contains(ip.WithZone("")), nil
})

func parseNetwork(s string) (netip.Prefix, error) {
	if ip, err := netip.ParseAddr(s); err == nil {
		ip = ip.Unmap().WithZone("")
		return netip.PrefixFrom(ip, ip.BitLen()), nil
	}
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		return prefix, fmt.Errorf("%q is not a network such as 10.0.0.0/8", s)
	}
	if prefix != prefix.Masked() {
		return prefix, fmt.Errorf("%s has bits set beyond its length; did you mean %s?", s, prefix.Masked())
	}
	return prefix, nil
}

// containsFunc is cty's contains without its silent "no" where a list never holds anything of the value's type.
var containsFunc = function.New(&function.Spec{
	Params: []function.Parameter{
		{Name: "list", Type: cty.DynamicPseudoType, AllowDynamicType: true},
		{Name: "value", Type: cty.DynamicPseudoType, AllowDynamicType: true},
	},
	Type: func(args []cty.Value) (cty.Type, error) {
		list, value := args[0].Type(), args[1].Type()
		var elems []cty.Type
		switch {
		case list == cty.DynamicPseudoType:
			return cty.Bool, nil
		case list.IsListType(), list.IsSetType():
			elems = []cty.Type{list.ElementType()}
		case list.IsTupleType():
			elems = list.TupleElementTypes()
		default:
			return cty.Bool, function.NewArgErrorf(0, "must be a list, not %s", typeName(list))
		}
		for _, e := range elems {
			if !comparable(e, value) {
				return cty.Bool, function.NewArgErrorf(1, "is %s, but the list holds %s", typeName(value), typeName(e))
			}
		}
		return cty.Bool, nil
	},
	RefineResult: func(b *cty.RefinementBuilder) *cty.RefinementBuilder { return b.NotNull() },
	Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
		for it := args[0].ElementIterator(); it.Next(); {
			_, e := it.Element()
			if e.IsNull() {
				return cty.UnknownVal(cty.Bool), function.NewArgErrorf(0, "holds null")
			}
			if !comparable(e.Type(), args[1].Type()) {
				return cty.UnknownVal(cty.Bool), function.NewArgErrorf(0, "holds %s", typeName(e.Type()))
			}
			if e.RawEquals(args[1]) {
				return cty.True, nil
			}
		}
		return cty.False, nil
	},
})

// comparable reports whether two values can be equal at all.
func comparable(a, b cty.Type) bool {
	return a == cty.DynamicPseudoType || b == cty.DynamicPseudoType || a.Equals(b)
}
