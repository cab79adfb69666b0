package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/zclconf/go-cty/cty"

	"github.com/muxproxy/muxproxy/core/use"
)

var _ use.Lookup = (*Snapshot)(nil)

var target = use.Target{User: "me", Host: "db.prod.example.com", Port: 22, Alias: "db"}

func check(s *Snapshot, u use.Use) *use.Denied { return s.For(u.Target, u.Caller).Deny(u) }

// Every kind of use is denied by a deny block about it, wherever it stands, and by no other.
func TestDenyEveryKind(t *testing.T) {
	for _, kind := range use.Kinds() {
		deny := fmt.Sprintf("deny {\nwhen = use.kind == %q\nreason = \"no %s\"\n}\n", kind, kind)
		another := "deny {\nwhen = use.kind == \"exec\" && use.command == \"never\"\n}\n"
		for name, c := range map[string]struct {
			src  string
			line int // of the deny block; 0: allowed
		}{
			"earlier":      {"host \"*.example.com\" {\n" + deny + "}\nhost \"*\" {\n" + another + "confirm { ask = \"never\" }\n}", 2},
			"later":        {"host \"db.*\" {\n" + another + "confirm { ask = \"never\" }\n}\nhost \"*\" {\n" + deny + "}", 8},
			"second":       {"host \"*\" {\n" + another + deny + "}", 5},
			"not matching": {"host \"web.*\" {\n" + deny + "}\nhost \"*\" \"!db.*\" {\n" + deny + "}", 0},
			"false":        {"host \"*\" {\n" + another + "}", 0},
			"without when": {"host \"*\" {\n" + another + "deny {}\n}", 5},
		} {
			s := load(t, c.src)
			d := check(s, use.Use{Kind: kind, Target: target})
			switch {
			case c.line == 0 && d != nil:
				t.Errorf("%s, %s: %v", kind, name, d)
			case c.line > 0 && (d == nil || d.By != "policy" || d.Hint != fmt.Sprintf("see config.hcl:%d", c.line)):
				t.Errorf("%s, %s: %+v, want line %d", kind, name, d, c.line)
			}
		}
	}
}

func TestConditions(t *testing.T) {
	caller := use.Caller{
		Processes: []use.Process{
			{Exe: "/usr/bin/muxproxy"},
			{Exe: "/usr/bin/ssh", Args: []string{"ssh", "-v", "db"}, Cwd: "/srv", TTY: "pts/3"},
			{Exe: "/usr/bin/git", Args: []string{"git", "fetch"}}, {Exe: "/usr/bin/zsh"},
		},
		Env: map[string]string{"CI": "1", "SECRET": "x"},
	}
	exec := func(command string) use.Use { return use.Use{Kind: use.Exec, Command: command} }
	addr := func(kind use.Kind, a string) use.Use { return use.Use{Kind: kind, Addr: a} }
	for _, c := range []struct {
		when string
		u    use.Use
		want bool
	}{
		{`use.program == "git-upload-pack"`, exec(`git-upload-pack '/srv/x.git'`), true},
		{`use.program == "git-upload-pack"`, exec(`git-upload-pack x; id`), false},
		{`use.program == "git-upload-pack"`, exec("git-upload-pack x\nid"), false},
		{`use.program == "git-upload-pack"`, exec("git-upload-pack $(id)"), false},
		{`use.program == "git-upload-pack"`, exec(`\git-upload-pack 'a b' c\ d`), true},
		{`use.program == "git-upload-pack"`, exec(`'git-upload-pack' x`), true},
		{`use.program == ""`, exec(`git-upload-pack "x"`), true},
		{`use.command == "a"`, exec("a"), true},
		{`use.command == "" && use.program == "" && use.subsystem == ""`, use.Use{Kind: use.Shell}, true},
		{`use.destination == "" && use.name == "" && use.port == 0`, use.Use{Kind: use.Shell}, true},
		{`use.subsystem == "sftp"`, use.Use{Kind: use.Subsystem, Subsystem: "sftp"}, true},
		{`use.name == "close" && use.destination == "x"`, use.Use{Kind: use.Control, Name: "close", Addr: "X."}, true},
		{`use.destination == "x" && use.port == 22`, use.Use{Kind: use.Control, Name: "close", Addr: "a@b@X:22"}, true},
		{`use.destination == "localhost" && use.port == 5432`, addr(use.LocalForward, "LOCALHOST.:5432"), true},
		{`cidr("127.0.0.0/8", use.destination)`, addr(use.LocalForward, "0x7f.1:80"), true},
		{`cidr("127.0.0.0/8", use.destination)`, addr(use.LocalForward, "[::ffff:127.0.0.1]:80"), true},
		{`cidr("2001:db8::/32", use.destination)`, addr(use.LocalForward, "[2001:db8::5%eth0]:80"), true},
		{`cidr("127.0.0.0/8", use.destination)`, addr(use.LocalForward, "localhost:80"), false},
		{`cidr("127.0.0.1", use.destination)`, addr(use.LocalForward, "127.0.0.1:80"), true},
		{`use.destination == "/run/x:y"`, addr(use.LocalForward, "/run/x:y"), true},
		{`use.destination == "" && use.port == 8080`, addr(use.RemoteForward, ":8080"), true},
		{`client.exe == "/usr/bin/ssh" && client.cwd == "/srv" && client.tty == "pts/3"`, use.Use{}, true},
		{`client.args == ["ssh", "-v", "db"] && client.args[2] != "x" && client.args != []`, use.Use{}, true},
		{`contains(client.parents[*].exe, "/usr/bin/git") && client.parents[0].args[1] == "fetch"`, use.Use{}, true},
		{`length([for p in client.parents : p if p.exe == "/usr/bin/zsh"]) == 1`, use.Use{}, true},
		{`client.env.CI == "1" && client.env["HOME"] == ""`, use.Use{}, true},
		{`host.name == "db.prod.example.com" && host.port == 22 && host.user == "me"`, use.Use{}, true},
		{`host.address == "" && host.alias == ""`, use.Use{}, true},
		{`matches("^sudo ", use.command)`, exec("sudo id"), true},
		{`matches("^sudo ", use.command)`, exec("x sudo id"), false},
		{`glob("sudo *", use.command)`, exec("sudo id/x"), true},
		{`glob("sudo", use.command)`, exec("sudo id"), false},
		{`use.port == 1 || use.kind == "shell" && !(use.command != "")`, use.Use{Kind: use.Shell}, true},
		{`(use.command == "" ? 1 : 2) == 2`, exec("x"), true},
		{`use.command != "" && parseint(use.command, 10) > 5`, use.Use{Kind: use.Exec}, false},
		{`use.command != "" && parseint(use.command, 10) > 5`, exec("6"), true},
	} {
		s := load(t, "host \"*\" {\ndeny {\nwhen = "+c.when+"\n}\n}")
		if got := s.EnvNames(); strings.Contains(c.when, "env") && !slices.Equal(got, []string{"CI", "HOME"}) {
			t.Errorf("%s: wants %q", c.when, got)
		}
		d := s.For(target, caller).Deny(c.u)
		if (d != nil) != c.want || d != nil && d.Hint != "see config.hcl:2" {
			t.Errorf("%s of %+v: %v", c.when, c.u, d)
		}
	}
}

// What can't be evaluated denies, says where, and tells nothing of the command to a log.
func TestErrorsDeny(t *testing.T) {
	const secret = "hunter2"
	u := use.Use{Kind: use.Exec, Command: secret, Target: target}
	for _, c := range []struct{ src, pos string }{
		{"host \"*\" {\n\ndeny {\nwhen = parseint(use.command, 10) > 5\n}\n}", "config.hcl:3"},
		{"host \"*\" {\nlane \"bulk\" {\nwhen = tonumber(use.command) > 5\n}\n}", "config.hcl:2"},
		{"host \"*\" {\ndeny {\nwhen = client.args[7] == \"x\"\n}\n}", "config.hcl:2"},
		{"host \"*\" {\ndeny {\nwhen = jsondecode(use.command)\n}\n}", "config.hcl:2"},
		{"host \"*\" {\ndeny {\nwhen = jsondecode(\"{\\\"a\\\":1}\")[use.command] == 1\n}\n}", "config.hcl:2"},
		{"host \"*\" {\nshare = parseint(host.name, 10) > 5\n}", "config.hcl:2"},
		{"host \"*\" {\nvia = [host.alias]\n}", "config.hcl:2"},
		{"host \"*\" {\nvia = split(\",\", host.alias)\n}", "config.hcl:2"},
	} {
		e := load(t, c.src).For(target, use.Caller{})
		d := e.Deny(u)
		if d == nil || !strings.Contains(d.Reason, c.pos) || strings.Contains(d.Error(), secret) || strings.Contains(d.Error(), "\n") {
			t.Errorf("%s: %v", c.src, d)
		}
		if !e.Share() {
			t.Errorf("%s: sends clients past the master", c.src)
		}
	}
	// jsondecode's type is only known at a use.
	s := load(t, "host \"*\" {\ndeny {\nwhen = jsondecode(use.command)\n}\n}")
	for command, want := range map[string]string{
		"true": "not allowed", "false": "", `"true"`: "it is a string, not a bool", "null": "it is null", "1": "it is a number", "x": "error",
	} {
		d := s.For(target, use.Caller{}).Deny(use.Use{Kind: use.Exec, Command: command})
		if (d == nil) != (want == "") || d != nil && !strings.Contains(d.Reason, want) {
			t.Errorf("%s: %v", command, d)
		}
	}
	// A deny block that holds is the better reason.
	s = load(t, "host \"*\" {\ndeny {\nwhen = client.args[7] == \"x\"\n}\ndeny {\nreason = \"closed\"\n}\n}")
	if d := s.For(target, use.Caller{}).Deny(u); d == nil || d.Reason != "closed" {
		t.Error(d)
	}
	// A plugin's block, too.
	s = load(t, "host \"*\" {\nconfirm {\nwhen = client.args[7] == \"x\"\n}\nconfirm {}\n}")
	if id, d := s.For(target, use.Caller{}).Block("confirm", u); d == nil || id != -1 || !strings.Contains(d.Reason, "config.hcl:2") {
		t.Error(id, d)
	}
}

// An alias counts only if it leads to the host.
func TestAlias(t *testing.T) {
	const src = `
host "lax" {
  share = false
}
host "*" "!lax" {
  deny { reason = "strict" }
}
`
	asked := 0
	o := Options{Schemas: schemas(), Alias: func(t use.Target) bool { asked++; return t.Host == "lax.example.com" }}
	for _, c := range []struct {
		host, alias string
		believe     bool // there is somebody to ask
		denied      bool
		asked       int
	}{
		{"db.example.com", "lax", true, true, 1},
		{"db.example.com", "lax", false, true, 0},
		{"db.example.com", "LAX.", true, true, 1},
		{"lax.example.com", "lax", true, false, 1},
		{"lax.example.com", "lax", false, true, 0},
		{"db.example.com", "other", true, true, 0}, // makes no difference
		{"lax", "lax", true, false, 0},
		{"lax", "", true, false, 0},
	} {
		asked = 0
		opts := o
		if !c.believe {
			opts.Alias = nil
		}
		e := loadWith(t, src, opts).For(use.Target{Host: c.host, Port: 22, User: "me", Alias: c.alias}, use.Caller{})
		if d := e.Deny(use.Use{Kind: use.Shell}); (d != nil) != c.denied || e.Share() != c.denied || asked != c.asked {
			t.Errorf("%+v: %v, share %v, asked %d times", c, d, e.Share(), asked)
		}
		u := use.Use{Kind: use.Shell, Target: use.Target{Host: c.host, Alias: c.alias}}
		if x := loadWith(t, src, opts).Explain(u); (x.Ignored != "") != (c.denied && c.asked > 0) {
			t.Errorf("%+v: explain ignores %q", c, x.Ignored)
		}
	}
	s := loadWith(t, "host \"*\" {\ndeny {\nwhen = host.alias == \"lax\"\n}\n}", o)
	for host, want := range map[string]bool{"lax.example.com": true, "db.example.com": false} {
		if d := s.For(use.Target{Host: host, Alias: "lax"}, use.Caller{}).Deny(use.Use{Kind: use.Shell}); (d != nil) != want {
			t.Error(host, d)
		}
	}
}

// Attributes: the first that is set. Blocks: the first whose condition holds, whole.
func TestPrecedence(t *testing.T) {
	s := load(t, `
host "db.*" {
  via = ["b1.${host.user}", "b2"]
  confirm {
    when = use.program == "git-upload-pack"
    ask  = "never"
  }
  persist {
    when = host.port == 2222
    idle = "1h"
  }
}
host "*.example.com" {
  share = false
  via   = []
  confirm {
    remember = "5m"
  }
  persist {
    idle = "2h"
  }
  lane "interactive" {
    when = use.subsystem == "sftp"
  }
  lane "bulk" {
    when = use.program == "cat"
  }
}
host "*" {
  share = true
  lane "bulk" {
    when = client.tty == ""
  }
}
`)
	e := s.For(target, use.Caller{Processes: []use.Process{{}, {TTY: "pts/1"}}})
	if via, set := e.Via(); e.Share() || !set || !slices.Equal(via, []string{"b1.me", "b2"}) {
		t.Error(e.Share(), via, set)
	}
	block := func(plugin string, u use.Use) map[string]any {
		t.Helper()
		id, d := e.Block(plugin, u)
		if d != nil || id < 0 {
			return nil
		}
		b := s.Blocks(plugin)
		i := slices.IndexFunc(b, func(b PluginBlock) bool { return b.ID == id })
		var out map[string]any
		if err := json.Unmarshal(b[i].JSON(), &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	git, shell := use.Use{Kind: use.Exec, Command: "git-upload-pack x"}, use.Use{Kind: use.Shell}
	if b := block("confirm", git); b["ask"] != "never" || b["remember"] != "0s" {
		t.Error(b) // not merged with the next
	}
	if b := block("confirm", shell); b["ask"] != "always" || b["remember"] != "5m" || len(b["on"].([]any)) != 9 {
		t.Error(b)
	}
	if b := block("persist", use.Use{}); b["idle"] != "2h" || b["prewarm"] != false || b["until"] != "" {
		t.Error(b)
	}
	if b := block("forward", shell); b != nil {
		t.Error(b)
	}
	for _, c := range []struct {
		u    use.Use
		want string
	}{
		{use.Use{Kind: use.Subsystem, Subsystem: "sftp"}, Interactive},
		{use.Use{Kind: use.Exec, Command: "cat x"}, Bulk},
		{use.Use{Kind: use.Exec, Command: "cat x | y"}, ""},
		{use.Use{Kind: use.Exec, Command: "scp -t x"}, ""},
		{use.Use{Kind: use.Exec, Command: "rsync --server . x"}, ""},
		{shell, ""},
	} {
		if got := e.Lane(c.u); got != c.want {
			t.Errorf("%+v: %s", c.u, got)
		}
	}
	other := s.For(use.Target{Host: "x"}, use.Caller{})
	if via, set := other.Via(); !other.Share() || set || via != nil || other.Lane(shell) != Bulk {
		t.Error(via, set)
	}
}

func TestDefault(t *testing.T) {
	s := Default(Options{})
	e := s.For(target, use.Caller{})
	for _, kind := range use.Kinds() {
		if d := e.Deny(use.Use{Kind: kind}); d != nil {
			t.Error(kind, d)
		}
	}
	if !e.Share() || e.Lane(use.Use{Subsystem: "sftp"}) != "" || len(s.Plugins()) != 0 || fmt.Sprint(s.Master()) != fmt.Sprint(Master{LogLevel: "info", ExitWhenIdle: -1}) {
		t.Error("not the defaults")
	}
}

func TestMasterAndPlugins(t *testing.T) {
	s := loadWith(t, `
master {
  log_level      = "debug"
  exit_when_idle = "1h"
  ssh_config     = "~/.ssh/config"
  foreign        = "allow"
  audit          = "required"
  audit_commands = "full"
  lock_on        = ["sleep"]
}
plugin "audit-mail" {
  path       = "~/bin/x"
  sha256     = "ABCDEF0123456789abcdef0123456789abcdef0123456789abcdef0123456789"
  on_failure = "allow"
  may        = ["observe"]
  to         = ["root"]
  limits     = { exec = 5 }
}
host "*" {
  confirm {}
}
`, Options{Schemas: schemas(), Home: "/home/me"})
	m := s.Master()
	want := Master{"debug", time.Hour, "/home/me/.ssh/config", true, true, true, []string{"sleep"}}
	if fmt.Sprint(m) != fmt.Sprint(want) {
		t.Errorf("%+v", m)
	}
	plugins := s.Plugins()
	if len(plugins) != 2 || plugins[1].Name != "confirm" || plugins[1].Pos != "config.hcl:20" {
		t.Fatalf("%+v", plugins)
	}
	p := plugins[0]
	if p.Path != "/home/me/bin/x" || !strings.HasPrefix(p.SHA256, "abcdef") || !p.AllowOnFailure || !slices.Equal(p.May, []string{"observe"}) ||
		string(p.JSON()) != `{"limits":{"exec":5},"to":["root"]}` {
		t.Errorf("%+v, %s", p, p.JSON())
	}
}

// Without schemas any block may be a plugin's; its condition is the core's all the same.
func TestUnknownSchemas(t *testing.T) {
	const src = `plugin "own" {
  colour = "red"
  sub {}
}
host "*" {
  own "x" {
    anything = use.foo
    when     = use.kind == "exec"
  }
}
`
	s := loadWith(t, src, Options{})
	if b := s.Blocks("own"); len(b) != 1 || b[0].Value != cty.NilVal || b[0].JSON() != nil || len(s.Plugins()) != 1 {
		t.Error(b)
	}
	e := s.For(target, use.Caller{})
	if id, d := e.Block("own", use.Use{Kind: use.Shell}); id != -1 || d != nil {
		t.Error(id, d)
	}
	if id, d := e.Block("own", use.Use{Kind: use.Exec}); id != 0 || d != nil {
		t.Error(id, d)
	}
	loadWith(t, src, Options{Schemas: schemas()}) // a plugin block names it
	for _, bad := range []string{
		"host \"*\" {\nown {\nwhen = use.foo\n}\n}", "host \"*\" {\nown {\nwhen = 1\n}\n}", "plugin \"own\" {\npath = 1\n}", "own {}",
	} {
		if s, _ := Parse("config.hcl", []byte(bad), Options{}); s != nil {
			t.Errorf("%s: loaded", bad)
		}
	}
	// A deny that is misspelt must not become a block that nobody looks at, unless there is a plugin of that name.
	for _, name := range []string{"dney", "denny", "Deny", "lan"} {
		s, d := Parse("config.hcl", []byte("host \"*\" {\n"+name+" {}\n}"), Options{})
		if s != nil || !strings.Contains(d.Errors().Error(), "did you mean") {
			t.Errorf("%s: %v", name, d)
		}
	}
	loadWith(t, "plugin \"dns\" {}\nhost \"*\" {\ndns {}\n}", Options{})
	if s, d := Parse("config.hcl", []byte("host \"*\" {\nown {}\n}"), Options{Schemas: schemas()}); s != nil {
		t.Error(d)
	}
}

// A policy is read again with the schemas of the plugins that it mentions; of one that could not be asked it knows no more
// than before.
func TestWithSchemas(t *testing.T) {
	src := `host "*.example.com" {
  persist {
    when = host.port == 22
    idle = "10m"
  }
  auditlog {
    anything = 1
  }
}
`
	draft, diags := Parse("config.hcl", []byte(src), Options{})
	if draft == nil {
		t.Fatal(diags)
	}
	s, diags := draft.WithSchemas(map[string]Schema{"persist": schemas()["persist"]})
	if s == nil {
		t.Fatal(diags)
	}
	if b := s.Blocks("persist"); b[0].Value == cty.NilVal || b[0].Value.GetAttr("idle").AsString() != "10m" {
		t.Errorf("%#v", b)
	}
	if b := s.Blocks("auditlog"); len(b) != 1 || b[0].Value != cty.NilVal {
		t.Errorf("%#v", b)
	}
	at := func(host string, port uint16) use.Target { return use.Target{User: "me", Host: host, Port: port} }
	for _, c := range []struct {
		plugin string
		t      use.Target
		want   bool
	}{
		{"persist", at("db.example.com", 22), true},
		{"persist", at("db.example.com", 23), true}, // whatever its when says
		{"persist", at("db.example.org", 22), false},
		{"auditlog", at("db.example.com", 22), true},
		{"confirm", at("db.example.com", 22), false},
	} {
		if got := s.Covers(c.plugin, c.t); got != c.want {
			t.Errorf("%s covers %s: %v", c.plugin, c.t, got)
		}
	}
	if s, diags := draft.WithSchemas(map[string]Schema{"auditlog": {}}); s != nil || !strings.Contains(diags.Errors().Error(), "anything") {
		t.Errorf("%v, %v", s, diags.Errors())
	}
}

func TestSchemaCheck(t *testing.T) {
	for name, s := range schemas() {
		if err := s.Check(); err != nil {
			t.Error(name, err)
		}
	}
	attr := func(a Attribute) Schema { return Schema{Host: Block{Attributes: []Attribute{a}}} }
	for want, s := range map[string]Schema{
		`the name "when" is taken`: attr(Attribute{Name: "when", Type: cty.Bool}),
		`"A b" can't be a name`:    attr(Attribute{Name: "A b", Type: cty.Bool}),
		"a type that policy":       attr(Attribute{Name: "a", Type: cty.DynamicPseudoType}),
		"a has a type":             attr(Attribute{Name: "a"}),
		"not a number":             attr(Attribute{Name: "a", Type: cty.Number, Default: cty.StringVal("x")}),
		"unknown format":           attr(Attribute{Name: "a", Type: cty.String, Format: "x"}),
		`the name "path" is taken`: {Plugin: Block{Attributes: []Attribute{{Name: "path", Type: cty.String}}}},
		`local: the name "to"`: {Host: Block{Blocks: []Nested{{"local", Block{
			Labels: []string{"to"}, Attributes: []Attribute{{Name: "to", Type: cty.String}},
		}}}}},
		"only nested blocks": {Host: Block{Labels: []string{"x"}}},
	} {
		if err := s.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		loaded, diags := Parse("config.hcl", nil, Options{Schemas: map[string]Schema{"x": s}})
		if loaded != nil || !strings.Contains(diags.Error(), "plugin x") {
			t.Errorf("%v: loaded", diags)
		}
	}
}

// A file that can't be used gives no snapshot.
func TestLoad(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, FileName)
	if s, d := Load(file, false, Options{}); s != nil || !d.HasErrors() {
		t.Error("a missing file was loaded")
	}
	if s, d := Load(file, true, Options{}); s == nil || len(d) > 0 || s.File() != "" {
		t.Error("no defaults:", d)
	}
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("host \"*\" {}\n", 0o644)
	if s, d := Load(file, true, Options{}); s == nil || s.File() != file {
		t.Error(d)
	}
	for _, c := range []struct {
		text string
		mode os.FileMode
		want string
	}{
		{"host \"*\" {}\n", 0o664, "writable by others"},
		{"host \"*\" {}\n", 0o606, "writable by others"},
		{strings.Repeat("#", MaxSize+1), 0o600, "longer than"},
		{"host \"*\" {\n", 0o600, "1:10"},
	} {
		write(c.text, c.mode)
		s, d := Load(file, true, Options{})
		if text := d.Error(); s != nil || !strings.Contains(text, c.want) || !strings.HasPrefix(text, file+":") ||
			strings.Count(text, file+":") != 1 {
			t.Errorf("%q: %v", c.want, d)
		}
	}
	if s, d := Parse("config.hcl", make([]byte, MaxSize+1), Options{}); s != nil || !d.HasErrors() {
		t.Error("too long a text was parsed")
	}
	if s, d := Load(dir, true, Options{}); s != nil {
		t.Error(d)
	}
	for env, want := range map[string]string{"": "/c/config.hcl", "/x/y.hcl": "/x/y.hcl"} {
		if got, named := Where(func(string) string { return env }, "/c"); got != want || named != (env != "") {
			t.Error(env, got, named)
		}
	}
}

const shown = `host "db.*" "!x" {
  via = ["b"]
  deny {
    when   = use.kind == "x11"
    reason = "no screens"
  }
  confirm {
    when = use.program == "git-upload-pack"
    ask  = "never"
  }
}
host "*" {
  confirm {}
  persist { idle = "1h" }
  lane "bulk" { when = use.program == "cat" }
}
host "web" {
  share = false
}
`

func TestShow(t *testing.T) {
	s := load(t, shown)
	var b bytes.Buffer
	if err := s.WriteParts(&b, s.Show(target)); err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/show.txt", b.Bytes())
}

func TestExplain(t *testing.T) {
	s := load(t, shown)
	var b bytes.Buffer
	for _, u := range []use.Use{
		{Kind: use.Exec, Command: "git-upload-pack 'x'"},
		{Kind: use.Exec, Command: "git-upload-pack x; id"},
		{Kind: use.X11},
		{Kind: use.Shell},
	} {
		u.Target = target
		fmt.Fprintf(&b, "--- %s %s\n", u.Kind, u.Command)
		if err := s.Explain(u).Write(&b); err != nil {
			t.Fatal(err)
		}
	}
	u := use.Use{Kind: use.Shell, Target: use.Target{Host: "\x1b[31mweb"}}
	fmt.Fprintln(&b, "--- hostile")
	s.Explain(u).Write(&b)
	golden(t, "testdata/explain.txt", b.Bytes())
	text, err := json.Marshal(s.Explain(use.Use{Kind: use.X11, Target: target}))
	if err != nil || !strings.Contains(string(text), `"allowed":false,"denied":"denied by policy: no screens; see config.hcl:3"`) {
		t.Errorf("%s, %v", text, err)
	}
	// It says what the gate does.
	for _, kind := range use.Kinds() {
		u := use.Use{Kind: kind, Target: target}
		if x := s.Explain(u); x.Allowed != (check(s, u) == nil) {
			t.Error(kind, x)
		}
	}
}

// One snapshot serves many at once.
func TestConcurrent(t *testing.T) {
	s := load(t, `host "*" {
  deny {
    when = contains(client.parents[*].exe, "/x") && length([for p in client.parents : p]) > 0
  }
  confirm {
    when = use.port != 5
  }
}
`)
	e := s.For(target, use.Caller{Processes: []use.Process{{}, {}, {Exe: "/x"}}})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				if e.Deny(use.Use{Kind: use.Shell}) == nil {
					t.Error("allowed")
				}
				if id, d := e.Block("confirm", use.Use{Kind: use.Shell}); id != 0 || d != nil {
					t.Error(id, d)
				}
			}
		})
	}
	wg.Wait()
}

// plainHosts is a policy of twenty host blocks without conditions and plugins.
func plainHosts(t testing.TB) use.Lookup {
	var b strings.Builder
	for i := range 20 {
		fmt.Fprintf(&b, "host \"*.n%d.example.com\" \"m%d*\" {\n  via = [\"b%d\"]\n}\n", i, i, i)
	}
	return load(t, b.String()+"host \"*.example.com\" {\n  share = true\n}\n")
}

// A use of a host without conditions and plugin blocks.
func BenchmarkPlainHost(b *testing.B) {
	lookup := plainHosts(b)
	u := use.Use{Kind: use.Exec, Command: "scp -t x", Target: target}
	b.ReportAllocs()
	for b.Loop() {
		if d := lookup.For(u.Target, u.Caller).Deny(u); d != nil {
			b.Fatal(d)
		}
	}
}

// One with a condition, to compare.
func BenchmarkCondition(b *testing.B) {
	s := load(b, "host \"*\" {\ndeny {\nwhen = use.program == \"git-upload-pack\" && client.tty == \"\"\n}\n}")
	u := use.Use{Kind: use.Exec, Command: "scp -t x", Target: target}
	b.ReportAllocs()
	for b.Loop() {
		if d := check(s, u); d != nil {
			b.Fatal(d)
		}
	}
}
