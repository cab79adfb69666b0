package sshconfig

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The tests ask the real ssh. home is a private one, which ssh itself, who goes by the password database, never sees:
// a configuration without lines of ours is tested through -F.
type env struct {
	t      *testing.T
	home   string
	system string
	tmp    string
}

func newEnv(t *testing.T) *env {
	t.Helper()
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, ".ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	e := &env{t: t, home: home, system: filepath.Join(t.TempDir(), "ssh_config"), tmp: t.TempDir()}
	t.Setenv("HOME", home)
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("TMPDIR", e.tmp)
	return e
}

// file writes a file below the home directory and returns its path.
func (e *env) file(name, text string) string {
	e.t.Helper()
	path := filepath.Join(e.home, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		e.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		e.t.Fatal(err)
	}
	return path
}

func (e *env) config(text string) { e.file(".ssh/config", text) }

func (e *env) run(req Request) (*Resolved, error) {
	e.t.Helper()
	names, err := LocalNames()
	if err != nil {
		e.t.Fatal(err)
	}
	names.Home = e.home
	r, err := resolve(e.t.Context(), req, names, e.system)
	if left, _ := os.ReadDir(e.tmp); len(left) != 0 {
		e.t.Errorf("left behind: %v", left)
	}
	return r, err
}

func (e *env) ok(req Request) *Resolved {
	e.t.Helper()
	r, err := e.run(req)
	if err != nil {
		e.t.Fatal(err)
	}
	return r
}

func want(t *testing.T, r *Resolved, keyword string, values ...string) {
	t.Helper()
	if got := r.All(keyword); !slices.Equal(got, values) {
		t.Errorf("%s: got %q, want %q", keyword, got, values)
	}
}

func args(t *testing.T, words ...string) Args {
	t.Helper()
	a, err := ParseArgs(words)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

const setup = `
Host *
  ProxyCommand "/opt/with space/muxproxy" --fdpass '%r@%h:%p' '%n'
  ProxyUseFdpass yes
  GlobalKnownHostsFile /x/state/muxproxy/known_hosts /etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2
  ControlPath none
`

func TestRunWithoutOurLines(t *testing.T) {
	e := newEnv(t)
	e.config(`
Host web
  HostName web.example.com
  Port 2200
  User alice
  IdentityFile ~/keys/%h key
  IdentityFile "~/my key"
  CertificateFile %d/c-%r-%p-%n.pub
  UserKnownHostsFile "~/a b/known" ~/.ssh/known2
Host *.corp
  ProxyCommand nc -X 5 %h %p
  ProxyUseFdpass yes
` + setup)
	if err := os.WriteFile(e.system, []byte("Host *\n  Ciphers aes256-ctr\n  ServerAliveInterval 7\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	home := e.home
	r, err := e.run(Request{User: "alice", Host: "web.example.com", Port: 2200, Alias: "web"})
	if err == nil {
		t.Fatalf("IdentityFile with a stray word passed: %v", r.Options)
	}
	if want := filepath.Join(home, ".ssh/config") + " line 6: keyword identityfile extra arguments at end of line"; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	text, err := os.ReadFile(filepath.Join(home, ".ssh/config"))
	if err != nil {
		t.Fatal(err)
	}
	e.config(strings.Replace(string(text), "%h key", "%h", 1))

	r = e.ok(Request{User: "alice", Host: "web.example.com", Port: 2200, Alias: "web"})
	want(t, r, "hostname", "web.example.com")
	want(t, r, "proxycommand")
	want(t, r, "proxyusefdpass", "no")
	want(t, r, "globalknownhostsfile", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
	want(t, r, "identityfile", home+"/keys/web.example.com", home+"/my key")
	want(t, r, "certificatefile", home+"/c-alice-2200-web.pub")
	want(t, r, "ciphers", "aes256-ctr")
	want(t, r, "serveraliveinterval", "7")
	if !r.IsSet("ciphers") || r.IsSet("macs") {
		t.Errorf("set: %q", r.Set)
	}
	if r.Volatile || !r.Fresh() {
		t.Errorf("volatile %v, fresh %v", r.Volatile, r.Fresh())
	}

	r = e.ok(Request{User: "bob", Host: "x.corp", Port: 22})
	want(t, r, "proxycommand", "nc -X 5 %h %p")
	want(t, r, "proxyusefdpass", "yes")
	names := Names{User: "bob", Host: "x.corp", Port: "22", Alias: "x.corp"}
	if got, err := r.ExpandProxyCommand(names); err != nil || got != "nc -X 5 x.corp 22" {
		t.Errorf("got %q, %v", got, err)
	}
	// How the host was named is part of the key, where it can matter.
	if k := e.ok(Request{User: "bob", Host: "x.corp", Port: 22, Alias: "y.corp"}).Key(); k != r.Key() {
		t.Error("another name of the same host is not shared")
	}
	text, err = os.ReadFile(filepath.Join(home, ".ssh/config"))
	if err != nil {
		t.Fatal(err)
	}
	e.config(strings.Replace(string(text), "-X 5 %h", "%%n %n %k %h", 1))
	named := e.ok(Request{User: "bob", Host: "x.corp", Port: 22, Alias: "a%h.corp"})
	want(t, named, "proxycommand", "nc %%n a%%h.corp a%%h.corp %h %p")
	if got, err := named.ExpandProxyCommand(names); err != nil || got != "nc %n a%h.corp a%h.corp x.corp 22" {
		t.Errorf("got %q, %v", got, err)
	}
	if k := e.ok(Request{User: "bob", Host: "x.corp", Port: 22, Alias: "b.corp"}).Key(); k == named.Key() {
		t.Error("two names share a connection, although the ProxyCommand goes by the name")
	}
	e.config(string(text))
	for _, bad := range []Names{
		{User: "bob", Host: "x;id", Alias: "x"}, {User: "a b", Host: "x", Alias: "x"}, {User: "$(id)", Host: "x", Alias: "x"},
		{User: "-x", Host: "x", Alias: "x"}, {User: `a\`, Host: "x", Alias: "x"}, {User: "a", Host: "x", Alias: "`id`"},
	} {
		if got, err := r.ExpandProxyCommand(bad); err == nil {
			t.Errorf("%+v: expanded to %q", bad, got)
		}
	}

	// The request wins over the answer, unless ssh has left the canonical name of its destination to us.
	const canonical = "CanonicalizeHostname=yes"
	for _, tc := range []struct {
		req  Request
		want string
	}{
		{Request{Args: args(t, "-o", canonical, "-o", "HostName=127.0.0.1", "web"), Alias: "web"}, "127.0.0.1"},
		{Request{Args: args(t, "-o", canonical, "-o", "HostName=127.0.0.1", "web"), Alias: "db"}, "elsewhere"},
		{Request{Args: Args{Options: []string{"-o", canonical, "-o", "HostName=127.0.0.1"}}, Alias: "web"}, "elsewhere"},
		{Request{Args: args(t, "-o", "HostName=127.0.0.1", "web"), Alias: "web"}, "elsewhere"},
	} {
		tc.req.User, tc.req.Host, tc.req.Port = "carol", "elsewhere", 99
		want(t, e.ok(tc.req), "hostname", tc.want)
	}
	r = e.ok(Request{User: "carol", Host: "elsewhere", Port: 99, Alias: "web"})
	want(t, r, "user", "carol")
	want(t, r, "hostname", "elsewhere")
	want(t, r, "port", "99")
}

func TestRunIncludes(t *testing.T) {
	e := newEnv(t)
	e.config(`
Host inside
  Include conf.d/*.conf ~/other
Include absent
Host *
  User outside
`)
	first := e.file(".ssh/conf.d/1 a.conf", "ProxyCommand muxproxy %r@%h:%p\nProxyUseFdpass yes\nHost in*\nServerAliveInterval 11\n")
	second := e.file(".ssh/conf.d/2.conf", "Host *\nConnectTimeout 12\n")
	other := e.file("other", "ServerAliveCountMax 13\nInclude "+e.home+"/nested\n")
	nested := e.file("nested", "ProxyCommand exec /x/muxproxy\nHost inside\nProxyJump jump.example.com\n")

	r := e.ok(Request{User: "u", Host: "inside", Port: 22})
	want(t, r, "serveraliveinterval", "11")
	want(t, r, "connecttimeout", "12")
	want(t, r, "serveralivecountmax", "13")
	want(t, r, "proxycommand")
	want(t, r, "proxyjump", "jump.example.com")

	r = e.ok(Request{User: "u", Host: "elsewhere", Port: 22})
	want(t, r, "serveraliveinterval", "0")
	want(t, r, "connecttimeout", "none")
	want(t, r, "serveralivecountmax", "3")
	want(t, r, "proxyjump")
	want(t, r, "proxycommand")

	var paths []string
	for _, f := range r.Files {
		paths = append(paths, f.Path)
	}
	for _, p := range []string{first, second, other, nested, e.system, filepath.Join(e.home, ".ssh/conf.d"),
		filepath.Join(e.home, ".ssh/absent")} {
		if !slices.Contains(paths, p) {
			t.Errorf("%s is not among the files: %q", p, paths)
		}
	}
	if !r.Fresh() {
		t.Fatal("stale at once")
	}
	// A new file in a folder that a pattern looks at, a change of one, the birth of one that was absent.
	e.file(".ssh/conf.d/3.conf", "")
	if r.Fresh() {
		t.Error("a new file went unnoticed")
	}
	r = e.ok(Request{User: "u", Host: "elsewhere", Port: 22})
	e.file("nested", "ProxyCommand exec /x/muxproxy\n")
	if r.Fresh() {
		t.Error("a changed file went unnoticed")
	}
	r = e.ok(Request{User: "u", Host: "elsewhere", Port: 22})
	e.file(".ssh/absent", "")
	if r.Fresh() {
		t.Error("a file that appeared went unnoticed")
	}

	// ssh refuses circles, and so do we without going round.
	e.file("nested", "ProxyCommand muxproxy\nInclude ~/other\n")
	if _, err := e.run(Request{User: "u", Host: "inside", Port: 22}); err == nil ||
		!strings.Contains(err.Error(), "nclude") {
		t.Errorf("a circle: %v", err)
	}
}

func TestRunSystemIncludes(t *testing.T) {
	e := newEnv(t)
	e.config(setup)
	dir := filepath.Dir(e.system)
	if err := os.WriteFile(e.system, []byte("Include ssh_config.d/*.conf\nHost *\nConnectTimeout 3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "ssh_config.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ssh_config.d/x.conf"), []byte("ServerAliveInterval 4\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := e.ok(Request{User: "u", Host: "h", Port: 22})
	want(t, r, "connecttimeout", "3")
	want(t, r, "serveraliveinterval", "4")
	// Lines of ours can stand there, too.
	if err := os.WriteFile(e.system, []byte("ProxyCommand muxproxy x\nConnectTimeout 3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r = e.ok(Request{User: "u", Host: "h", Port: 22})
	want(t, r, "proxycommand")
	want(t, r, "connecttimeout", "3")
}

func TestRunWithArguments(t *testing.T) {
	e := newEnv(t)
	e.config("Host web\n  Port 2200\n" + setup)
	other := e.file("other file", "Host *\n  User fromF\n  ServerAliveCountMax 9\n  IdentityFile rel\n"+setup)
	plain := e.file("plain", "Host web\n  ConnectTimeout 8\n")

	// -F replaces both files; -o and flags count; those that are not about the connection do no harm.
	e.file("k", "")
	a := args(t, "-vE", e.home+"/log", "-F", other, "-oServerAliveInterval=5", "-i", e.home+"/k", "-J", "none", "-N", "bob@web",
		"-p", "77", "true")
	r := e.ok(Request{Args: a, Alias: "web", Host: "web", User: "bob", Port: 77})
	want(t, r, "serveralivecountmax", "9")
	want(t, r, "serveraliveinterval", "5")
	want(t, r, "proxycommand")
	want(t, r, "user", "bob")
	want(t, r, "port", "77")
	if got := r.All("identityfile"); len(got) != 2 || got[0] != e.home+"/k" || !filepath.IsAbs(got[1]) || filepath.Base(got[1]) != "rel" {
		t.Errorf("identityfile: %q", got)
	}
	if !r.Volatile {
		t.Error("a relative path in a Resolved that is not volatile")
	}

	r = e.ok(Request{Args: args(t, "-F", plain, "web")})
	want(t, r, "connecttimeout", "8")
	want(t, r, "port", "22")
	if r.Volatile {
		t.Error("volatile without a reason")
	}
	r = e.ok(Request{Args: args(t, "-F", "none", "web")})
	want(t, r, "connecttimeout", "none")

	// Ours on the command line goes, everybody else's stays.
	r = e.ok(Request{Args: args(t, "-F", plain, "-oProxyCommand=muxproxy %r@%h:%p", "-o", "ProxyUseFdpass=yes",
		"-o", "GlobalKnownHostsFile /s/muxproxy/known_hosts /my/known", "web")})
	want(t, r, "proxycommand")
	want(t, r, "proxyusefdpass", "no")
	want(t, r, "globalknownhostsfile", "/my/known")
	r = e.ok(Request{Args: args(t, "-F", plain, "-oProxyCommand=nc %h %p", "-oProxyUseFdpass=yes", "web")})
	want(t, r, "proxycommand", "nc %h %p")
	want(t, r, "proxyusefdpass", "yes")

	for _, tc := range []struct{ dest, user, host, port string }{
		{"ssh://u@h:44", "u", "h", "44"},
		{`dom\u@x@h`, `dom\u@x`, "h", "22"},
		{"a@fe80::1", "a", "fe80::1", "22"},
	} {
		r := e.ok(Request{Args: args(t, "-F", plain, tc.dest)})
		want(t, r, "user", tc.user)
		want(t, r, "hostname", tc.host)
		want(t, r, "port", tc.port)
	}
	// Without a command line, the same from %r %h %p.
	r = e.ok(Request{User: `dom\u@x`, Host: "::1", Port: 44})
	want(t, r, "user", `dom\u@x`)
	want(t, r, "hostname", "::1")
	want(t, r, "port", "44")
}

func TestRunMatch(t *testing.T) {
	e := newEnv(t)
	config := e.file("config", `
Match originalhost alias user bob
  ServerAliveInterval 21
Host alias
  HostName %h.example.com
  User bob
Match host *.example.com !user bob
  ServerAliveInterval 22
`)
	// Match user sees what the ssh that asks saw: User comes after the line that looks at it.
	a := args(t, "-F", config, "alias")
	want(t, e.ok(Request{Args: a, User: "bob", Host: "alias.example.com", Port: 22}), "serveraliveinterval", "0")
	want(t, e.ok(Request{Args: args(t, "-F", config, "bob@alias")}), "serveraliveinterval", "21")
	want(t, e.ok(Request{Args: args(t, "-F", config, "-l", "eve", "alias")}), "serveraliveinterval", "22")

	for line, volatile := range map[string]bool{
		`Match exec "true"`:                    true,
		"Match host x exec true":               true,
		"Match !final !exec=false":             true,
		"Match localuser x originalhost y":     false,
		"Match final all":                      false,
		"Match canonical host=x !user y":       false,
		"CanonicalizeHostname no":              false,
		"CanonicalizeHostname always":          true,
		"KnownHostsCommand /bin/echo":          true,
		"KnownHostsCommand none":               false,
		"UserKnownHostsFile ${HOME}/x":         true,
		"IdentityAgent $FOO":                   true,
		"IdentityAgent none":                   false,
		"ProxyCommand nc ${HOME} %h":           false,
		"# Match exec true":                    false,
		"Host ${x}":                            true,
		"ServerAliveInterval 3 # Match exec x": false,
	} {
		path := e.file("volatile", line+"\n")
		if r := e.ok(Request{Args: args(t, "-F", path, "localhost")}); r.Volatile != volatile {
			t.Errorf("%s: volatile %v", line, r.Volatile)
		}
	}
}

func TestRunAgentAndKnownHosts(t *testing.T) {
	e := newEnv(t)
	t.Setenv("MY_AGENT", "/run/my agent")
	for value, wanted := range map[string]string{
		"$MY_AGENT": "/run/my agent", "$NOT_SET": "none", "none": "none", "SSH_AUTH_SOCK": "SSH_AUTH_SOCK",
		`"/a b/%h"`: "/a b/h", "${MY_AGENT}.sock": "/run/my agent.sock",
	} {
		path := e.file("agent", "IdentityAgent "+value+"\n")
		want(t, e.ok(Request{Args: args(t, "-F", path, "h")}), "identityagent", wanted)
	}
	path := e.file("known", "UserKnownHostsFile \"/a b/%h\" /c%%d\nGlobalKnownHostsFile ~/g /h\nRevokedHostKeys ~/r\n")
	r := e.ok(Request{Args: args(t, "-F", path, "h")})
	want(t, r, "userknownhostsfile", "/a b/h", "/c%d")
	want(t, r, "globalknownhostsfile", e.home+"/g", "/h")
	want(t, r, "revokedhostkeys", e.home+"/r")

	e.file("known", "IdentityFile ~/x%z\n")
	if _, err := e.run(Request{Args: args(t, "-F", path, "h")}); err == nil || !strings.Contains(err.Error(), `unknown token "%z"`) {
		t.Errorf("got %v", err)
	}
}

// %C must be what ssh makes of it.
func TestConnectionHash(t *testing.T) {
	e := newEnv(t)
	r := e.ok(Request{Args: args(t, "-F", "none", "-o", "ControlPath=/%C", "-o", "IdentityFile=/%C", "u@h", "-p", "99")})
	want(t, r, "identityfile", r.Get("controlpath"))
}

func TestRunRefusals(t *testing.T) {
	e := newEnv(t)
	e.config(setup)
	config := filepath.Join(e.home, ".ssh/config")
	if err := os.Chmod(config, 0o666); err != nil {
		t.Fatal(err)
	}
	req := Request{User: "u", Host: "h", Port: 22}
	if _, err := e.run(req); err == nil || err.Error() != config+": bad owner or permissions" {
		t.Errorf("a configuration that others can write to: %v", err)
	}
	if err := os.Chmod(config, 0o600); err != nil {
		t.Fatal(err)
	}
	e.config(setup + "NoSuchOption yes\n")
	if _, err := e.run(req); err == nil || err.Error() != config+": line 7: Bad configuration option: nosuchoption" {
		t.Errorf("a bad option: %v", err)
	}
	if _, err := e.run(Request{Args: args(t, "-F", e.home+"/absent", "h")}); err == nil ||
		!strings.HasPrefix(err.Error(), "Can't open user config file "+e.home+"/absent") {
		t.Errorf("an absent -F: %v", err)
	}
	// What ssh reads from must not be read again: it can be the very connection.
	fifo := e.home + "/fifo"
	if out, err := exec.Command("mkfifo", fifo).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := e.run(Request{Args: args(t, "-F", fifo, "h")}); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("-F with a pipe: %v", err)
	}
	if _, err := e.run(Request{}); err == nil {
		t.Error("no host passed")
	}
	if _, err := e.run(Request{Args: args(t, "-F", "none", "--", "-oProxyCommand=x")}); err == nil {
		t.Error("a destination that looks like an option passed")
	}
	if _, err := e.run(Request{Args: args(t, "-F", "none", "ssh://a@[::1")}); err == nil || err.Error() != "ssh does not take this command line" {
		t.Errorf("a broken destination: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(context.DeadlineExceeded)
	if _, err := Run(ctx, Request{Host: "h"}); err == nil {
		t.Error("a context that has ended passed")
	}
	if _, err := e.run(Request{Host: "h", SSH: e.home + "/no-ssh"}); err == nil || !strings.Contains(err.Error(), "no-ssh") {
		t.Errorf("no ssh: %v", err)
	}
}

// The copies must be readable by this user alone, also while ssh runs.
func TestCopiesArePrivate(t *testing.T) {
	e := newEnv(t)
	out := filepath.Join(e.home, "modes")
	e.config(setup + "Match exec \"stat -c %%a " + e.tmp + "/* " + e.tmp + "/*/* > " + out + "\"\n  ServerAliveInterval 5\n")
	r := e.ok(Request{User: "u", Host: "h", Port: 22})
	want(t, r, "serveraliveinterval", "5")
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Fields(string(text)); len(lines) < 2 || lines[0] != "700" || slices.ContainsFunc(lines[1:], func(s string) bool { return s != "600" }) {
		t.Errorf("modes: %q", lines)
	}
}

func TestKey(t *testing.T) {
	e := newEnv(t)
	key := func(words ...string) string {
		t.Helper()
		return e.ok(Request{Args: args(t, append([]string{"-F", "none"}, words...)...)}).Key()
	}
	k := e.file("k", "") // ssh drops a -i that it can't find
	base := key("h")
	for _, same := range [][]string{{"-v", "h"}, {"-L", "1:x:1", "h"}, {"-A", "h"}, {"-o", "SendEnv=X", "h", "true"}, {"ssh://h:22"},
		{"-o", "BatchMode=yes", "h"}, {"-o", "PasswordAuthentication=no", "-o", "PreferredAuthentications=hostbased,publickey", "h"},
		{"-o", "PubkeyAuthentication=unbound", "h"}} {
		if key(same...) != base {
			t.Errorf("%q has a key of its own", same)
		}
	}
	seen := map[string][]string{base: {"h"}}
	for _, other := range [][]string{
		{"h2"}, {"-p", "23", "h"}, {"somebody-else@h"}, {"-i", k, "h"}, {"-o", "IdentitiesOnly=yes", "h"}, {"-o", "IdentityAgent=none", "h"},
		{"-o", "StrictHostKeyChecking=no", "h"}, {"-o", "StrictHostKeyChecking=yes", "h"}, {"-o", "UserKnownHostsFile=/dev/null", "h"},
		{"-o", "HostKeyAlias=x", "h"}, {"-c", "aes128-ctr", "h"}, {"-4", "h"}, {"-J", "j", "h"}, {"-b", "127.0.0.1", "h"},
		{"-o", "ProxyCommand=nc %h %p", "h"}, {"-o", "RevokedHostKeys=/x", "h"}, {"-o", "PubkeyAuthentication=no", "h"},
	} {
		k := key(other...)
		if was := seen[k]; was != nil {
			t.Errorf("%q and %q share a key", other, was)
		}
		seen[k] = other
	}
	if key("-o", "PreferredAuthentications=password", "h") != key("-o", "PubkeyAuthentication=no", "h") {
		t.Error("two ways to offer no key are told apart")
	}
}
