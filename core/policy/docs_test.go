package policy

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
)

// documented are all blocks there are, by the heading of their table and their place in a file.
func documented() map[string]Block {
	s := schemas()
	out := map[string]Block{
		"master": masterBlock, "plugin": pluginBlock, "host": hostBody, "deny": denyBlock, "lane": laneBlock,
		"confirm": s["confirm"].Host, "persist": s["persist"].Host, "forward": s["forward"].Host,
	}
	for _, n := range s["forward"].Host.Blocks {
		out[n.Type] = n.Block
	}
	return out
}

// Every recipe is a policy without a fault, and everything there is has its line.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(text)
	parts := strings.Split(doc, "```hcl\n")
	if len(parts) < 6 {
		t.Errorf("%d recipes", len(parts)-1)
	}
	for _, part := range parts[1:] {
		recipe, _, ok := strings.Cut(part, "```")
		s, diags := Parse("recipe", []byte(recipe), Options{Schemas: schemas()})
		if !ok || s == nil || len(diags) > 0 {
			t.Errorf("%v\n%s", diags, recipe)
		}
	}
	for name, b := range documented() {
		for _, a := range b.Attributes {
			def := "required"
			switch {
			case a.Name == "via":
				def = "as ssh_config says"
			case !a.Required:
				def = "`" + strings.ReplaceAll(string(valueJSON(a.value())), ",", ", ") + "`"
			}
			kind := strings.TrimPrefix(strings.TrimPrefix(typeName(a.Type), "a "), "an ")
			if row := fmt.Sprintf("| `%s` | %s | %s |", a.Name, kind, def); !strings.Contains(doc, row) {
				t.Errorf("%s: no line %s", name, row)
			}
			for _, w := range a.Words {
				if w != "" && name != "confirm" && !strings.Contains(doc, fmt.Sprintf("%q", w)) {
					t.Errorf("%s, %s: no word on %q", name, a.Name, w)
				}
			}
			if a.Doc == "" && name != "persist" {
				t.Errorf("%s, %s has no doc", name, a.Name)
			}
		}
	}
	for name, typ := range seesAll {
		for attr, at := range typ.AttributeTypes() {
			if name == "client" && (attr == "env" || attr == "parents") {
				continue // their types are said in words
			}
			kind := strings.TrimPrefix(typeName(at), "a ")
			if row := fmt.Sprintf("| `%s.%s` | %s |", name, attr, kind); !strings.Contains(doc, row) {
				t.Errorf("no line %s", row)
			}
		}
	}
	words := strings.FieldsFunc(doc, func(r rune) bool { return strings.ContainsRune(" \n,().`", r) })
	for name := range functions {
		if !slices.Contains(words, name) {
			t.Errorf("the function %s is not there", name)
		}
	}
}

// config.hcl.example loads without a warning, and has everything, with its default.
func TestExample(t *testing.T) {
	const file = "../../config.hcl.example"
	src, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if s, diags := Parse(file, src, Options{Schemas: schemas()}); s == nil || len(diags) > 0 {
		t.Fatal(diags)
	}
	f, diags := hclsyntax.ParseConfig(src, file, hcl.InitialPos)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	have := map[string]map[string]hclsyntax.Expression{}
	var walk func(blocks hclsyntax.Blocks)
	walk = func(blocks hclsyntax.Blocks) {
		for _, b := range blocks {
			if have[b.Type] == nil {
				have[b.Type] = map[string]hclsyntax.Expression{}
			}
			for name, attr := range b.Body.Attributes {
				have[b.Type][name] = attr.Expr
			}
			walk(b.Body.Blocks)
		}
	}
	walk(f.Body.(*hclsyntax.Body).Blocks)
	all := documented()
	for name, b := range all {
		if have[name] == nil {
			t.Errorf("no %s block", name)
		}
		for _, a := range b.Attributes {
			e, ok := have[name][a.Name]
			if !ok {
				t.Errorf("%s lacks %s", name, a.Name)
				continue
			}
			if v, diags := e.Value(constants); !a.Required && (diags.HasErrors() || !sameJSON(v, a.value())) {
				t.Errorf("%s in %s is not at its default", a.Name, name)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if _, ok := all[name]; !ok {
			t.Errorf("%s is no block", name)
		}
		if !slices.Contains([]string{"master", "plugin", "host", "dynamic", "local", "remote"}, name) && have[name]["when"] == nil {
			t.Errorf("%s lacks when", name)
		}
	}
}

func sameJSON(a, b cty.Value) bool { return string(valueJSON(a)) == string(valueJSON(b)) }
