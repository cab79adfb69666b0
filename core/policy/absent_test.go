package policy

import (
	"strings"
	"testing"

	"github.com/muxproxy/muxproxy/core/use"
)

// A block that asks for a plugin's consent denies as long as there is no plugin to give it.
func TestWithoutPlugins(t *testing.T) {
	s, diags := Parse("config.hcl", []byte(`
plugin "lenient" { on_failure = "allow" }
host "guarded" {
  confirm { when = use.kind == "exec" }
  persist { idle = "1h" }
}
host "kept" {
  persist { idle = "1h" }
  forward {}
  lenient {}
}
`), Options{})
	if s == nil {
		t.Fatal(diags)
	}
	for _, c := range []struct {
		host   string
		kind   use.Kind
		denied bool
	}{
		{"guarded", use.Exec, true},
		{"guarded", use.Shell, false}, // its when does not hold
		{"guarded", use.Attach, false},
		{"guarded", use.Control, false},
		{"kept", use.Exec, false},
		{"other", use.Exec, false},
	} {
		d := s.WithoutPlugins(use.Use{Kind: c.kind, Command: "x", Target: use.Target{User: "me", Host: c.host, Port: 22}})
		if (d != nil) != c.denied {
			t.Errorf("%s at %s: %v", c.kind, c.host, d)
		}
		if d != nil && (!strings.HasPrefix(d.Error(), "denied by confirm: this version starts no plugins; ") || !strings.Contains(d.Error(), "config.hcl:4")) {
			t.Errorf("%s at %s: %s", c.kind, c.host, d)
		}
	}
}
