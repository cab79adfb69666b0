package master

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/pluginhost"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/use"
)

// newGate is the gate as the master makes it.
func newGate(t testing.TB, audit *use.Audit, text string) (use.Gate, *use.Lock) {
	t.Helper()
	s, diags := policy.Parse("config.hcl", []byte(text), policy.Options{})
	if s == nil {
		t.Fatal(diags)
	}
	lock, err := use.OpenLock(filepath.Join(t.TempDir(), "lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	return lock.NewGate(audit, nil, inForce(t, s).Check), lock
}

// inForce has a policy without plugins in force.
func inForce(t testing.TB, s *policy.Snapshot) *pluginhost.Manager {
	t.Helper()
	m := pluginhost.New(pluginhost.Options{Log: zerolog.Nop()})
	set, problems := m.Prepare(t.Context(), nil)
	problems = append(problems, set.Apply(t.Context(), nil, lookup{s, 1}, nil, true, nil)...)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return m
}

// Every kind of use meets deny blocks in each place, an error, and the lock, and each decision is in the audit log.
func TestGateOfPolicyAndLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	audit, err := use.OpenAudit(use.AuditOptions{Path: path, Report: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	const allow, deny = "", "denied by policy: no; see config.hcl:"
	for _, c := range []struct {
		name   string
		policy string // KIND is the kind of use
		denied string
	}{
		{"no file", "", allow},
		{"another host", "host \"other\" {\n  deny {}\n}", allow},
		{"its own block", "host \"db\" {\n  deny { reason = \"no\" }\n}", deny + "2"},
		{"a condition that holds", `host "db" {
  deny {
    when   = use.kind == "KIND"
    reason = "no"
  }
}`, deny + "2"},
		{"a condition that does not", `host "db" {
  deny {
    when = use.kind != "KIND"
  }
}`, allow},
		{"an earlier block", `host "*" {
  deny { reason = "no" }
}
host "db" {
  deny {
    when = false
  }
}`, deny + "2"},
		{"a later block", `host "db" {
  deny {
    when = use.kind != "KIND"
  }
}
host "d*" {
  deny { reason = "no" }
}`, deny + "7"},
		{"a later block, behind an exception", `host "*" "!db" {
  deny { reason = "no" }
}`, allow},
		{"an error", `host "db" {
  deny {
    when = client.args[5] == "x"
  }
}`, "denied by policy: when in deny in config.hcl:2 can't be evaluated"},
		{"an error, and a deny that holds", `host "db" {
  deny {
    when = client.args[5] == "x"
  }
  deny { reason = "no" }
}`, deny + "5"},
		{"an error elsewhere", `host "other" {
  deny {
    when = client.args[5] == "x"
  }
}`, allow},
	} {
		for _, kind := range use.Kinds() {
			g, lock := newGate(t, audit, strings.ReplaceAll(c.policy, "KIND", string(kind)))
			u := use.Use{Kind: kind, Target: use.Target{User: "me", Host: "db", Port: 22}, Command: "x"}
			for _, locked := range []bool{false, true} {
				wanted := c.denied
				if locked {
					if err := lock.Lock(nil); err != nil {
						t.Fatal(err)
					}
					if kind != use.CancelForward { // which policy can deny, but not the lock
						wanted = "denied by lock: locked by `muxproxy lock`; run `muxproxy unlock`"
					}
				}
				p, denied := g.Decide(t.Context(), u, nil)
				switch {
				case denied == nil && wanted != "":
					t.Errorf("%s, %s, locked %v: allowed, want %q", c.name, kind, locked, wanted)
				case denied != nil && (wanted == "" || !strings.HasPrefix(denied.Error(), wanted)):
					t.Errorf("%s, %s, locked %v: %q, want %q", c.name, kind, locked, denied, wanted)
				}
				decision := "allow"
				if wanted != "" {
					decision = "deny"
				}
				want = append(want, decision+" "+string(kind))
				p.End(use.Result{})
			}
		}
	}
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		var r struct{ Record, Decision, Kind string }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		if r.Record == "decision" {
			got = append(got, r.Decision+" "+r.Kind)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("the audit log has %d decisions, want %d: %q", len(got), len(want), got)
	}
}

// What is appended to a command does not pass for the command.
func TestGateKnowsAProgramFromItsLikes(t *testing.T) {
	g, _ := newGate(t, nil, `host "*" {
  deny {
    when = use.kind == "exec" && use.program != "git-upload-pack"
  }
}`)
	for command, allowed := range map[string]bool{
		"git-upload-pack '/srv/x.git'": true, "git-upload-pack x; id": false, "git-upload-pack x\nid": false,
		"git-upload-pack $(id)": false, "git-upload-pack-x": false, "./git-upload-pack x": false, "": false,
	} {
		u := use.Use{Kind: use.Exec, Command: command, Target: use.Target{Host: "db"}}
		if _, denied := g.Decide(t.Context(), u, nil); (denied == nil) != allowed {
			t.Errorf("%q: %v", command, denied)
		}
	}
}

// A host without conditions and without plugins' blocks: at most 20 µs for the gate.
func BenchmarkGate(b *testing.B) {
	audit, err := use.OpenAudit(use.AuditOptions{Path: filepath.Join(b.TempDir(), "audit.log")})
	if err != nil {
		b.Fatal(err)
	}
	defer audit.Close()
	text := "master {\n  lock_on = [\"screen\"]\n}\n"
	for _, host := range []string{"*.prod.example.com", "bastion", "10.0.0.*", "build*", "git.example.com"} {
		text += "host \"" + host + "\" {\n  deny {\n    when = use.kind == \"x11\"\n  }\n}\n"
	}
	s, diags := policy.Parse("config.hcl", []byte(text), policy.Options{})
	if s == nil {
		b.Fatal(diags)
	}
	lock, err := use.OpenLock(filepath.Join(b.TempDir(), "lock.json"))
	if err != nil {
		b.Fatal(err)
	}
	g := lock.NewGate(audit, nil, inForce(b, s).Check)
	u := use.Use{Kind: use.Exec, Command: "git-upload-pack '/srv/x.git'", Target: use.Target{User: "me", Host: "db.example.com", Port: 22}}
	b.ReportAllocs()
	for b.Loop() {
		permit, denied := g.Decide(context.Background(), u, nil)
		if denied != nil {
			b.Fatal(denied)
		}
		permit.End(use.Result{})
	}
}
