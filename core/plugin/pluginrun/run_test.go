package pluginrun

import (
	"strings"
	"testing"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

func TestCheckDescription(t *testing.T) {
	attribute := func(name, kind, def string) *pluginpb.Schema {
		return &pluginpb.Schema{Attributes: []*pluginpb.Attribute{{Name: name, Type: kind, Default: def}}}
	}
	nest := func(inner *pluginpb.Schema, labels ...string) *pluginpb.Schema {
		return &pluginpb.Schema{Blocks: []*pluginpb.NestedBlock{{Name: "b", Labels: labels, Schema: inner}}}
	}
	many := &pluginpb.Schema{}
	for i := range maxNames + 1 {
		many.Attributes = append(many.Attributes, &pluginpb.Attribute{Name: "a" + strings.Repeat("x", i), Type: `"bool"`})
	}
	for _, c := range []struct {
		name         string
		plugin, host *pluginpb.Schema
		want         string
	}{
		{"fine", nil, nil, ""},
		{"fine", attribute("a", `"string"`, `"x"`), nest(attribute("a", `["map",["list","number"]]`, `{"k":[1]}`), "l"), ""},
		{"", nil, nil, `the name ""`},
		{"Fine", nil, nil, `the name "Fine"`},
		{strings.Repeat("x", 33), nil, nil, "the name"},
		{"x", attribute("path", `"string"`, ""), nil, `plugin block: the name "path" is taken`},
		{"x", nil, attribute("when", `"bool"`, ""), `host block: the name "when" is taken`},
		{"x", nil, attribute("a b", `"bool"`, ""), `"a b" can't be a name`},
		{"x", nil, attribute("a", `bool`, ""), "no type that policy can hold"},
		{"x", nil, attribute("a", `"dynamic"`, ""), "no type that policy can hold"},
		{"x", nil, attribute("a", `["tuple",["bool"]]`, ""), "no type that policy can hold"},
		{"x", nil, attribute("a", `["list",["list",["list",["list","bool"]]]]`, ""), "no type that policy can hold"},
		{"x", nil, attribute("a", `["list",`, ""), "no type that policy can hold"},
		{"x", nil, attribute("a", strings.Repeat(`["list",`, 10000), ""), "too long"},
		{"x", nil, attribute("a", `"number"`, `"x"`), "is not of its type"},
		{"x", nil, attribute("a", `"number"`, `null`), "is not of its type"},
		{"x", nil, attribute("a", `"number"`, `1e99999999`), "its default is no JSON, too long, or has a number"},
		{"x", nil, attribute("a", `["list","string"]`, `["a", -1.5E-00099999]`), "its default is no JSON, too long, or has a number"},
		{"x", nil, attribute("a", `"string"`, `"`+strings.Repeat("x", maxDefault)+`"`), "its default is no JSON, too long"},
		{"fine", nil, attribute("a", `"number"`, `1e099`), ""},
		{"x", nil, nest(attribute("l", `"bool"`, ""), "l"), `host block, b: the name "l" is taken`},
		{"x", nil, nest(nil, "l", "l"), `"l" can't be a label`},
		{"x", nil, nest(nest(nest(nest(nil)))), "more than 4 deep"},
		{"x", many, nil, "it declares 257 names, at most 256"},
	} {
		err := CheckDescription(&pluginpb.DescribeResponse{Name: c.name, Plugin: c.plugin, Host: c.host})
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.name, err, c.want)
		}
	}
}

// A type or default is taken or complained about, and the default of one that is taken is of the type and not null.
func FuzzAttributeType(f *testing.F) {
	f.Add(`"string"`, `"x"`)
	f.Add(`["list","number"]`, `[1,2]`)
	f.Add(`["map",["set","bool"]]`, ``)
	f.Add(`["object",{"a":"string"}]`, `{}`)
	f.Add(`"number"`, `1e99999999`)
	f.Add(`"dynamic"`, `{"type":"string","value":"x"}`)
	f.Fuzz(func(t *testing.T, kind, def string) {
		ty, v, err := AttributeType(&pluginpb.Attribute{Type: kind, Default: def})
		if err == nil && (v.IsNull() || !v.Type().Equals(ty)) {
			t.Errorf("%#v is no %#v", v, ty)
		}
	})
}

// The first line of output is a handshake, or the complaint about it is one line that can be shown.
func FuzzHandshake(f *testing.F) {
	f.Add("1|1|unix|/x|grpc")
	f.Add("1|99|unix|/x|grpc|")
	f.Add("\x1b]0;|")
	f.Fuzz(func(t *testing.T, line string) {
		err := (&process{}).check(line)
		if err == nil && !strings.HasPrefix(line, "1|1|") {
			t.Errorf("%q is taken", line)
		}
		if err != nil && plugin.Printable(err.Error()) != strings.ReplaceAll(err.Error(), `\`, `\\`) {
			t.Errorf("%q", err.Error())
		}
	})
}
