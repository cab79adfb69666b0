package sshconfig

import (
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// block is what setup writes, for a file of its own.
func block(t *testing.T, hosts ...string) string {
	t.Helper()
	lines, err := Own{Hosts: hosts, Program: "/opt/a b/muxproxy", KnownHosts: "/x y/muxproxy/known_hosts"}.Lines()
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestOwnLines(t *testing.T) {
	good := Own{Program: "/opt/a b/muxproxy", KnownHosts: "/x/state/muxproxy/known_hosts"}
	lines, err := good.Lines()
	if err != nil {
		t.Fatal(err)
	}
	const want = `Host *
    ProxyCommand "/opt/a b/muxproxy" --fdpass '%r@%h:%p' '%n'
    ProxyUseFdpass yes
    GlobalKnownHostsFile /x/state/muxproxy/known_hosts /etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2
    ControlPath none
`
	if lines != want {
		t.Errorf("%s", lines)
	}
	good.Hosts = []string{"*.corp", "!bastion.corp"}
	if lines, err := good.Lines(); err != nil || !strings.HasPrefix(lines, "Host *.corp !bastion.corp\n") {
		t.Errorf("%s, %v", lines, err)
	}
	for _, bad := range []Own{
		{Program: "muxproxy", KnownHosts: good.KnownHosts},
		{Program: "/a%b/muxproxy", KnownHosts: good.KnownHosts},
		{Program: "/a\"b/muxproxy", KnownHosts: good.KnownHosts},
		{Program: "/a'b/muxproxy", KnownHosts: good.KnownHosts},
		{Program: "/a$b/muxproxy", KnownHosts: good.KnownHosts},
		{Program: "/a\nb/muxproxy", KnownHosts: good.KnownHosts},
		{Program: "/bin/nc", KnownHosts: good.KnownHosts},
		{Program: good.Program, KnownHosts: "/x/known_hosts"},
		{Program: good.Program, KnownHosts: "/x*/muxproxy/known_hosts"},
		{Program: good.Program, KnownHosts: "~/muxproxy/known_hosts"},
		{Program: good.Program, KnownHosts: good.KnownHosts, Hosts: []string{"!a", "!b"}},
		{Program: good.Program, KnownHosts: good.KnownHosts, Hosts: []string{"a", "b c"}},
	} {
		if lines, err := bad.Lines(); err == nil {
			t.Errorf("%+v passed: %s", bad, lines)
		}
	}
}

func TestCheckPattern(t *testing.T) {
	for p, ok := range map[string]bool{
		"*": true, "*.example.com": true, "!bastion": true, "db-?": true, "2001:db8::*": true, "[::1]": true, "a_b": true, "münchen": true,
		"": false, "!": false, "a b": false, "a\tb": false, "a\nHost b": false, "a\r": false, `"a"`: false, "'a'": false, `a\b`: false,
		"#a": false, "=a": false, "a,b": false, "-a": false, "!-a": false, "!!a": false, "u@a": false, "a\x00": false, "a\xff": false,
		"a\u202eb": false, "a%h": false, "${A}": false,
	} {
		if err := CheckPattern(p); (err == nil) != ok {
			t.Errorf("%q: %v", p, err)
		}
	}
}

// What setup writes changes nothing in what the master is told, on top of whatever the user has, and leads real ssh to
// muxproxy.
func TestOwnIsInvisible(t *testing.T) {
	for name, config := range map[string]string{
		"empty":             "",
		"no last newline":   "User bob",
		"crlf":              "Host web\r\n  HostName web.example.com\r\n  Port 2200\r\nHost *\r\n  User bob\r\n",
		"ControlMaster":     "Host *\n  ControlMaster auto\n  ControlPath ~/.ssh/cm-%C\n  ControlPersist 10m\n",
		"own ProxyCommand":  "Host *\n  ProxyCommand nc -X 5 %h %p\n  ProxyUseFdpass yes\n",
		"ProxyJump":         "Host web\n  ProxyJump jump\nHost *\n  ServerAliveInterval 7\n",
		"known_hosts":       "GlobalKnownHostsFile /a/known /b\nUserKnownHostsFile /c\n",
		"in a Match":        "Match host web\n  User carol\n  ControlPath none\nMatch all\n  Port 23\n",
		"comments first":    "# managed by hand\n\nPort 24\nHost web\n  Port 25\n",
		"an Include of its": "Include absent\nHost web\nInclude also-absent\n",
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			included := filepath.Join(e.home, "with space", "muxproxy", "ssh_config")
			e.file("with space/muxproxy/ssh_config", block(t))
			path := e.file("config", config)
			for _, host := range []string{"web", "elsewhere"} {
				request := Request{Args: args(t, "-F", path, host)}
				if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
					t.Fatal(err)
				}
				seen, err := AsIs(t.Context(), "", request.Args)
				if err != nil {
					t.Fatal(err)
				}
				before := e.ok(request)
				if err := os.WriteFile(path, AddInclude([]byte(config), included), 0o600); err != nil {
					t.Fatal(err)
				}
				after := e.ok(request)
				if !reflect.DeepEqual(before.Options, after.Options) || before.Key() != after.Key() {
					t.Errorf("%s: before:\n%v\nafter:\n%v", host, before.Options, after.Options)
				}

				now, err := AsIs(t.Context(), "", request.Args)
				if err != nil {
					t.Fatal(err)
				}
				if program, ok := Leads(strings.Join(now["proxycommand"], "|")); !ok || program != "/opt/a b/muxproxy" {
					t.Errorf("%s leads to %q", host, now["proxycommand"])
				}
				if files := KnownHostsFiles(now["globalknownhostsfile"][0]); files[0] != "/x y/muxproxy/known_hosts" {
					t.Errorf("%q", files)
				}
				if now["proxyusefdpass"][0] != "yes" || now["controlpath"] != nil {
					t.Errorf("fdpass %q, ControlPath %q", now["proxyusefdpass"], now["controlpath"])
				}
				// For other hosts it is not there: the block ends with its file.
				e.file("with space/muxproxy/ssh_config", block(t, "not-this-one", "!"+host))
				other, err := AsIs(t.Context(), "", request.Args)
				if err != nil {
					t.Fatal(err)
				}
				if !maps.EqualFunc(seen, other, slices.Equal) {
					t.Errorf("%s, which is not led anywhere: before:\n%v\nafter:\n%v", host, seen, other)
				}
				e.file("with space/muxproxy/ssh_config", block(t))
				for _, options := range []map[string][]string{seen, now} {
					for _, k := range []string{"proxycommand", "proxyusefdpass", "globalknownhostsfile", "controlpath", "proxyjump"} {
						delete(options, k)
					}
				}
				if !maps.EqualFunc(seen, now, slices.Equal) {
					t.Errorf("%s: before:\n%v\nafter:\n%v", host, seen, now)
				}
			}
		})
	}
}

func TestInclude(t *testing.T) {
	const path = "/c/muxproxy/ssh_config"
	const line = "Include " + path
	for _, c := range []struct{ name, text, added string }{
		{"empty", "", line + "\n"},
		{"plain", "Host a\n", line + "\nHost a\n"},
		{"no last newline", "Host a", line + "\nHost a"},
		{"crlf", "Host a\r\nHost b\n", line + "\r\nHost a\r\nHost b\n"},
		{"there", line + "\nHost a\n", ""},
		{"there, in other words", "\n# x\n\tINCLUDE = \"" + path + "\"\r\nHost a", ""},
		{"further down", "Host a\n  " + line + "\nUser b\n", line + "\nHost a\nUser b\n"},
		{"last", "Host a\n" + line, line + "\nHost a\n"},
		{"twice", line + "\nHost a\n" + line + "\n", line + "\nHost a\n"},
		{"among others", "Include " + path + " other\n", line + "\nInclude " + path + " other\n"},
		{"another", "Include /d/muxproxy/ssh_config\n", line + "\nInclude /d/muxproxy/ssh_config\n"},
		{"a comment", "#" + line + "\n", line + "\n#" + line + "\n"},
		{"not text", "\xef\xbb\xbf\x00Host a\n", line + "\n\xef\xbb\xbf\x00Host a\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.added == "" {
				c.added = c.text
			}
			got := AddInclude([]byte(c.text), path)
			if string(got) != c.added {
				t.Errorf("added: %q, want %q", got, c.added)
			}
			if again := AddInclude(got, path); string(again) != string(got) {
				t.Errorf("added again: %q", again)
			}
			without, _ := RemoveInclude([]byte(c.text), path)
			if back, n := RemoveInclude(got, path); n != 1 || string(back) != string(without) {
				t.Errorf("removed %d: %q, want %q", n, back, without)
			}
		})
	}
}

func FuzzInclude(f *testing.F) {
	f.Add([]byte("Host a\r\n\tInclude \"/c/muxproxy/ssh_config\"\nx"))
	f.Fuzz(func(t *testing.T, text []byte) {
		const path = "/c/muxproxy/ssh_config"
		before, n := RemoveInclude(text, path)
		if n == 0 && string(before) != string(text) {
			t.Fatal("changed")
		}
		added := AddInclude(text, path)
		if !startsWith(added, path) || string(AddInclude(added, path)) != string(added) {
			t.Fatalf("%q: %q", text, added)
		}
		if back, n := RemoveInclude(added, path); n != 1 || string(back) != string(before) {
			t.Fatalf("%q: back to %q", text, back)
		}
	})
}

func TestLeads(t *testing.T) {
	for command, want := range map[string]string{
		"muxproxy %r@%h:%p":            "muxproxy",
		"exec '/a b/muxproxy' x":       "/a b/muxproxy",
		"~/bin/muxproxy x":             "",
		"%d/bin/muxproxy x":            "",
		`sh -c "muxproxy %r@%h:%p"`:    "",
		"env A=b /x/muxproxy %r@%h:%p": "/x/muxproxy",
	} {
		if got, ok := Leads(command); !ok || got != want {
			t.Errorf("%q: %q, %v", command, got, ok)
		}
	}
	if got, ok := Leads("/x/nc %h %p"); ok || got != "" {
		t.Errorf("nc: %q, %v", got, ok)
	}
}

func TestAsIsFails(t *testing.T) {
	e := newEnv(t)
	path := e.file("config", "NoSuchOption yes\n")
	if _, err := AsIs(t.Context(), "", args(t, "-F", path, "web")); err == nil || !strings.Contains(err.Error(), "line 1: Bad configuration option") {
		t.Errorf("%v", err)
	}
	if _, err := AsIs(t.Context(), "", Args{}); err == nil {
		t.Error("no destination passed")
	}
}
