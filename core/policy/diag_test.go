package policy

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// Each bad file gives all of its problems, in order, and no snapshot.
func TestBadFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.hcl")
	if err != nil || len(files) < 30 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".hcl"), func(t *testing.T) {
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var first []byte
			for range 20 { // hcldec's order is random, ours is not
				s, diags := Parse("config.hcl", src, Options{Schemas: schemas()})
				if s != nil || !diags.HasErrors() {
					t.Fatal("it was loaded")
				}
				var b bytes.Buffer
				diags.Write(&b, false)
				if first == nil {
					first = b.Bytes()
				} else if !bytes.Equal(first, b.Bytes()) {
					t.Fatalf("two runs differ:\n%s\n%s", first, b.Bytes())
				}
				for _, d := range diags {
					if strings.ContainsAny(d.Error(), "\n\t\x1b") || d.Line == 0 {
						t.Errorf("%q in line %d", d.Error(), d.Line)
					}
				}
			}
			golden(t, strings.TrimSuffix(file, ".hcl")+".txt", first)
		})
	}
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s:\n%s\nwant:\n%s", file, got, want)
	}
}

func TestDiagnosticsAsJSON(t *testing.T) {
	_, diags := Parse("config.hcl", []byte("master {\n  foreign = \"alow\"\n}\n"), Options{})
	text, err := json.Marshal(diags)
	if err != nil {
		t.Fatal(err)
	}
	want := `[{"severity":"error","file":"config.hcl","line":2,"column":13,"end_line":2,"end_column":19,` +
		`"message":"foreign in master can't be \"alow\"; did you mean \"allow\"?","allowed":"\"deny\", \"allow\"",` +
		`"source":"  foreign = \"alow\""}]`
	if string(text) != want {
		t.Errorf("%s\nwant %s", text, want)
	}
	if text, _ := json.Marshal(Diagnostics(nil)); string(text) != "[]" {
		t.Errorf("none: %s", text)
	}
}

func TestDiagnosticsInColour(t *testing.T) {
	_, diags := Parse("config.hcl", []byte("x {\n}\n"), Options{})
	var plain, colour bytes.Buffer
	diags.Write(&plain, false)
	diags.Write(&colour, true)
	if strings.Contains(plain.String(), "\x1b") || !strings.Contains(colour.String(), "\x1b[31m") {
		t.Errorf("%q, %q", plain.String(), colour.String())
	}
}

func TestWarnings(t *testing.T) {
	const confirm, persist = "confirm {}\n", "persist {}\n"
	for name, c := range map[string]struct {
		src  string
		want []string // parts of the warnings, in order
	}{
		"none": {`host "a" {
			confirm { when = use.kind == "exec" }
			confirm {}
		}`, nil},
		"same block":         {"host \"a\" {\nconfirm {}\nconfirm { ask = \"never\" }\n}", []string{":3:1: warning: confirm never applies: the one in line 2"}},
		"when is true":       {"host \"a\" {\nconfirm { when = true }\nconfirm {}\n}", []string{":3:1: warning: confirm never applies"}},
		"wider before":       {"host \"*\" {\nconfirm {}\n}\nhost \"a\" {\nconfirm {}\n}", []string{":5:1: warning: confirm never applies: the one in line 2"}},
		"wider after":        {"host \"a\" {\nconfirm {}\n}\nhost \"*\" {\nconfirm {}\n}", nil},
		"wider by pattern":   {"host \"*.x\" \"b\" {\nconfirm {}\n}\nhost \"a?.x\" {\nconfirm {}\n}", []string{":5:1"}},
		"wider, but not":     {"host \"*\" \"!a\" {\nconfirm {}\n}\nhost \"a\" {\nconfirm {}\n}", nil},
		"both but not":       {"host \"*\" \"!a.x\" {\nconfirm {}\n}\nhost \"*\" \"!a*\" {\nconfirm {}\n}", []string{":5:1"}},
		"? is no *":          {"host \"?\" {\nconfirm {}\n}\nhost \"*\" {\nconfirm {}\n}", nil},
		"deny accumulates":   {"host \"*\" {\ndeny { when = use.port == 1 }\ndeny {}\ndeny {}\n}", nil},
		"lanes":              {"host \"*\" {\nlane \"interactive\" {}\nlane \"bulk\" {}\n}", []string{":3:1: warning: lane never applies"}},
		"attribute":          {"host \"*\" {\nshare = true\n}\nhost \"a\" {\nshare = false\n}", []string{":5:9: warning: share never applies: the one in line 2"}},
		"persist":            {"host \"a\" {\n" + persist + "}", []string{":2:1: warning: persist without confirm"}},
		"persist, asked":     {"host \"a\" {\n" + confirm + persist + "}", nil},
		"persist, later":     {"host \"a\" {\n" + persist + "}\nhost \"*\" {\n" + confirm + "}", nil},
		"persist, elsewhere": {"host \"a\" {\n" + persist + "}\nhost \"b\" {\n" + confirm + "}", []string{"persist without confirm"}},
		"only negative":      {"host \"!a\" {\n}", []string{":1:6: warning: this host block applies to nothing"}},
	} {
		t.Run(name, func(t *testing.T) {
			s, diags := Parse("config.hcl", []byte(c.src), Options{Schemas: schemas()})
			if s == nil || len(diags.Errors()) > 0 || len(diags.Warnings()) != len(c.want) {
				t.Fatalf("%v, want %q", diags, c.want)
			}
			for i, w := range c.want {
				if !strings.Contains(diags[i].Error(), w) {
					t.Errorf("%q, want %q", diags[i].Error(), w)
				}
			}
		})
	}
}

// A plugin's own complaint is put where the value stands.
func TestProblem(t *testing.T) {
	s := load(t, `plugin "audit-mail" {
  to = ["a", "b"]
}
host "*" {
  confirm {}
  forward {
    local "1" { to = "x" }
    local "2" {
      to = "y"
    }
  }
}
`)
	blocks := s.Blocks("forward")
	if len(blocks) != 1 {
		t.Fatal(blocks)
	}
	for _, c := range []struct {
		plugin string
		id     int
		path   string
		want   string
	}{
		{"forward", blocks[0].ID, "", "config.hcl:6:3: forward: bad"},
		{"forward", blocks[0].ID, "local 1 to", "config.hcl:9:12: forward: bad"},
		{"forward", blocks[0].ID, "local 0 to", "config.hcl:7:22: forward: bad"},
		{"forward", blocks[0].ID, "local 0 address", "config.hcl:7:5: forward: bad"},
		{"forward", blocks[0].ID, "local 7 to", "config.hcl:6:3: forward: bad"},
		{"forward", blocks[0].ID, "users", "config.hcl:6:3: forward: bad"},
		{"audit-mail", -1, "to 1", "config.hcl:2:14: audit-mail: bad"},
		{"audit-mail", -1, "to 2", "config.hcl:2:8: audit-mail: bad"},
		{"audit-mail", -1, "limits", "config.hcl:1:1: audit-mail: bad"},
		{"forward", -1, "to", "config.hcl:6:3: forward: bad"},
		{"nobody", 99, "", "config.hcl: nobody: bad"},
	} {
		if d := s.Problem(c.plugin, c.id, path(c.path), Error, " bad\n"); d.Error() != c.want {
			t.Errorf("%v: %q", c, d.Error())
		}
	}
}

// The longest file there may be, made of one thing over and over, ends neither the process nor anybody's patience.
func TestBounds(t *testing.T) {
	const when = "host \"*\" {\ndeny {\nwhen = client.args"
	for head, parts := range map[string][]string{
		"": {"x \"y\" {\n", "x=1\n", "/*", "#\n", "\"", "}\n", "a b ", "confirm{}\n"},
		when: {
			"(", "[", "{", "!", "-", `"${`, "1+", "&&true", "?1:", "[0]", ".b", "f(", "<<A\n", "[for x in ", "[*]", ".*", `"%{if `, "\\", "\x00", "\xff",
		},
	} {
		for _, part := range parts {
			src := head + strings.Repeat(part, (MaxSize-len(head))/len(part))
			s, diags := Parse("config.hcl", []byte(src), Options{Schemas: schemas()})
			if s == nil && !diags.HasErrors() || len(diags) > maxProblems+1 {
				t.Errorf("%q, %q: %d problems", head, part, len(diags))
			}
		}
	}
	if s, diags := Parse("config.hcl", []byte("host \"*\" {\n"+strings.Repeat("x {}\n", 500)+"}"), Options{Schemas: schemas()}); s != nil ||
		diags[0].Error() != "config.hcl: 400 more problems, which are not listed" {
		t.Errorf("%v", diags[0])
	}
}
