package main

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

// What the built-in plugins declare is what docs/policy.md and config.hcl.example say, each attribute with its default.
func TestBuiltInsAreDocumented(t *testing.T) {
	read := func(path string) string {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	doc, example := read("../../docs/policy.md"), read("../../config.hcl.example")
	for _, name := range builtInNames() {
		info := builtIns[name]().Describe()
		if info.Name != name {
			t.Errorf("%s calls itself %s", name, info.Name)
		}
		schema, err := plugin.Schema(info.Host)
		if err != nil {
			t.Fatal(err)
		}
		_, table, ok := strings.Cut(doc, "\n### "+name+", in host\n")
		table, _, _ = strings.Cut(table, "\n### ")
		if !ok {
			t.Errorf("policy.md has nothing about %s", name)
		}
		_, block, ok := strings.Cut(example, "\n  "+name+" {\n")
		block, _, _ = strings.Cut(block, "\n  }\n")
		if !ok {
			t.Errorf("config.hcl.example has no %s block", name)
		}
		documented(t, name, schema, table, block)
		if readme := read("../../plugins/" + name + "/README.md"); !strings.HasPrefix(readme, "# "+name+"\n") {
			t.Errorf("%s: the README is another one's", name)
		}
	}
}

func documented(t *testing.T, where string, s *pluginpb.Schema, table, block string) {
	t.Helper()
	for _, a := range s.GetAttributes() {
		var kind any
		if err := json.Unmarshal([]byte(a.GetType()), &kind); err != nil {
			t.Fatal(err)
		}
		text, empty := "list of strings", "[]"
		switch kind {
		case "string":
			text, empty = "string", `""`
		case "bool":
			text, empty = "bool", "false"
		case "number":
			text, empty = "number", "0"
		}
		value := a.GetDefault()
		if value == "" {
			value = empty
		}
		value = strings.ReplaceAll(value, `","`, `", "`)
		shown := "`" + value + "`"
		if a.GetRequired() {
			shown = "required"
		}
		if row := fmt.Sprintf("| `%s` | %s | %s |", a.GetName(), text, shown); !strings.Contains(table, row) {
			t.Errorf("%s: policy.md has no line %s", where, row)
		}
		line := regexp.MustCompile(`(?m)^ *` + a.GetName() + ` *= ` + regexp.QuoteMeta(value) + `( +#.*)?$`)
		if !a.GetRequired() && !line.MatchString(block) {
			t.Errorf("%s: config.hcl.example lacks %s = %s", where, a.GetName(), value)
		}
		if a.GetDoc() == "" {
			t.Errorf("%s: %s has no doc", where, a.GetName())
		}
		for _, w := range a.GetWords() {
			// A kind of use is explained where all of them are.
			if w != "" && !strings.Contains(table, strconv.Quote(w)) && !strings.Contains(block, strconv.Quote(w)) && kind == "string" {
				t.Errorf("%s: nothing says what %s = %q is", where, a.GetName(), w)
			}
		}
	}
	for _, n := range s.GetBlocks() {
		documented(t, where+", "+n.GetName(), n.GetSchema(), table, block)
	}
}
