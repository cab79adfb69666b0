package policy

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muxproxy/muxproxy/core/use"
)

// FuzzParse gives any text to the parser: a snapshot or errors come out, never both, and a snapshot answers.
func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/bad/*.hcl")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range append(files, "../../config.hcl.example") {
		src, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(src)
	}
	f.Add([]byte(shown))
	f.Add([]byte("\ufeffhost \"*\" {}\r\n"))
	f.Add([]byte("host \"*\" {\ndeny {\nreason = <<EOT\nx\nEOT\n}\n}"))
	f.Fuzz(func(t *testing.T, src []byte) {
		if len(src) > 4096 || costly(string(src)) {
			return
		}
		for _, o := range []Options{{}, {Schemas: schemas()}} {
			s, diags := Parse("f", src, o)
			if (s == nil) != diags.HasErrors() {
				t.Fatalf("snapshot %v with %v", s != nil, diags)
			}
			var b bytes.Buffer
			if err := diags.Write(&b, true); err != nil {
				t.Fatal(err)
			}
			if text := strings.NewReplacer("\x1b[0m", "", "\x1b[1m", "", "\x1b[31m", "", "\x1b[33m", "").Replace(b.String()); strings.ContainsFunc(text,
				func(r rune) bool { return r != '\n' && r < 0x20 || r == 0x7f }) {
				t.Errorf("control characters in %q", text)
			}
			if s == nil {
				continue
			}
			u := use.Use{Kind: use.Exec, Command: "x y", Target: target}
			s.Show(target)
			if x := s.Explain(u); x.Allowed != (s.For(target, use.Caller{}).Deny(u) == nil) {
				t.Error("explain and the gate differ")
			}
		}
	})
}

// costly is text that may ask for a lot of memory or time by itself: the owner of a policy can do that to nobody else.
func costly(src string) bool {
	for _, word := range []string{"range", "setproduct", "pow", "format", "indent", "replace", "for"} {
		if strings.Contains(src, word) {
			return true
		}
	}
	return false
}

// FuzzWhen gives any condition and any command to a deny block: it holds, does not, or can't be evaluated.
func FuzzWhen(f *testing.F) {
	for _, when := range []string{
		`use.kind == "exec"`, `use.port > 1 ? use.command == "x" : client.args == []`, `contains(client.parents[*].exe, use.command)`,
		`length([for p in client.parents : p if p.exe != ""]) == 0`, `matches(use.command, use.program)`, `cidr(use.command, host.address)`,
		`jsondecode(use.command).a`, `jsondecode(use.command) == null`, `!jsondecode(use.command)`, `-1 == use.port`, `"${use.port}" == "0"`,
		`client.args[use.port]`, `element(client.args, 3) == ""`, `true || tonumber(use.command) == 1`, `glob("*?", use.command)`,
		`lookup({a = true}, use.command, false)`, `{ for k, v in {a = 1} : k => v == 1 }["a"]`, `"%{ if use.port == 0 }x%{ else }y%{ endif }" == "x"`,
		`split(",", use.command)[0] == "a"`, `substr(use.command, 1, 2) == "x"`, `client.env.HOME != ""`, `[true][use.port]`, `use["kind"] == "exec"`,
	} {
		f.Add(when, "x")
		f.Add(when, `{"a": null}`)
	}
	f.Fuzz(func(t *testing.T, when, command string) {
		if len(when) > 300 || len(command) > 300 || strings.Contains(when, "\n") || costly(strings.ReplaceAll(when, "for p in client.parents", "")) {
			return
		}
		s, diags := Parse("f", []byte("host \"*\" {\n  deny {\n    when = "+when+"\n  }\n}\n"), Options{Schemas: schemas()})
		if s == nil {
			if !diags.HasErrors() {
				t.Fatal("nothing came out")
			}
			return
		}
		u := use.Use{Kind: use.Exec, Command: command, Target: target}
		first, second := s.For(target, use.Caller{}).Deny(u), s.For(target, use.Caller{}).Deny(u)
		if (first == nil) != (second == nil) || first != nil && first.Error() != second.Error() {
			t.Errorf("%v, then %v", first, second)
		}
	})
}

// FuzzMatch compares the matcher with the plainest one there is, and its time stays bounded.
func FuzzMatch(f *testing.F) {
	f.Add("*a*b?", "xaxxbx")
	f.Add("**", "")
	f.Add("?", "0..")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > 12 || len(s) > 30 {
			return
		}
		var plain func(p, s string) bool
		plain = func(p, s string) bool {
			switch {
			case p == "":
				return s == ""
			case p[0] == '*':
				return plain(p[1:], s) || s != "" && plain(p, s[1:])
			}
			return s != "" && (p[0] == '?' || p[0] == s[0]) && plain(p[1:], s[1:])
		}
		if got := matchPattern(pattern, s); got != plain(pattern, s) {
			t.Errorf("%q, %q: %v", pattern, s, got)
		}
		if name := canonicalHost(s); canonicalHost(name) != name {
			t.Errorf("%q, %q, %q: not canonical", s, name, canonicalHost(name))
		}
	})
}
