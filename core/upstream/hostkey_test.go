package upstream

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/muxproxy/muxproxy/core/pool"
)

func contextFor(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), d)
}

func TestKnownHosts(t *testing.T) {
	good, bad, r := newKey(t, "ed25519"), newKey(t, "ed25519"), newKey(t, "rsa")
	short := newKey(t, "rsa1024")
	ca := newKey(t, "ecdsa")
	cert := ca.certify(t, good.pub, ssh.HostCert, 0, "db.example.com")
	line := func(hosts string, k key) string { return hosts + " " + k.line() }
	dir := t.TempDir()
	for i, tc := range []struct {
		name    string
		files   []string // of known_hosts
		port    uint16   // 0: 22
		key     ssh.PublicKey
		options []string
		want    string // "" for trusted
	}{
		{name: "plain", files: []string{line("db.example.com", good)}},
		{name: "in another case", files: []string{line("DB.Example.COM", good)}},
		{name: "list", files: []string{line("a,db.example.com,10.0.0.1", good)}},
		{name: "wildcard", files: []string{line("*.example.com", good)}},
		{name: "question mark", files: []string{line("d?.example.com", good)}},
		{name: "negated", files: []string{line("*.example.com,!db.example.com", good)}, want: "host key is unknown"},
		{name: "hashed", files: []string{line(knownhosts.HashHostname("db.example.com"), good)}},
		{name: "hashed, other host", files: []string{line(knownhosts.HashHostname("db2.example.com"), good)}, want: "host key is unknown"},
		{name: "port", port: 2222, files: []string{line("[db.example.com]:2222", good)}},
		{name: "hashed port", port: 2222, files: []string{line(knownhosts.HashHostname("[db.example.com]:2222"), good)}},
		{name: "wildcard port", port: 2222, files: []string{line("[*.example.com]:*", good)}},
		{name: "other port", port: 2222, files: []string{line("[db.example.com]:2223", good)}, want: "host key is unknown"},
		{name: "known without port", port: 2222, files: []string{line("db.example.com", good)}},
		{name: "other key without port", port: 2222, files: []string{line("db.example.com", bad)}, want: "host key is unknown"},
		{name: "port of a host for 22", files: []string{line("[db.example.com]:2222", good)}, want: "host key is unknown"},
		{name: "HostKeyAlias", port: 2222, files: []string{line("alias", good)}, options: []string{"hostkeyalias Alias"}},
		{name: "HostKeyAlias has no port", port: 2222, files: []string{line("[alias]:2222", good)}, options: []string{"hostkeyalias alias"}, want: "host key is unknown"},
		{name: "tabs, spaces, comment", files: []string{" \t" + strings.ReplaceAll(line("db.example.com", good), " ", "\t ")}},
		{name: "carriage return", files: []string{strings.TrimSpace(line("db.example.com", good)) + "\r\n"}},
		{name: "no newline at the end", files: []string{strings.TrimSpace(line("db.example.com", good))}},
		{name: "broken lines around", files: []string{
			"db.example.com\ndb.example.com ssh-ed25519\ndb.example.com ssh-ed25519 !!!!\n@what db.example.com ssh-ed25519 AAAA\n" +
				"|1|x db.example.com\n|2|AAAA|BBBB ssh-ed25519 AAAA\ndb.example.com future-type AAAAC2Z1dHVyZQ==\n\x00\xff\n,!, x y\n" +
				line("db.example.com", good) + "db.example.com ssh-ed25519 AAAA\n"}},
		{name: "declared as another type", files: []string{strings.Replace(line("db.example.com", good), "ssh-ed25519", "ssh-rsa", 1)}, want: "host key is unknown"},
		{name: "second file", files: []string{"", line("db.example.com", good)}},
		{name: "any equal key wins", files: []string{line("db.example.com", bad), line("*", good)}},
		{name: "changed", files: []string{"\n" + line("db.example.com", bad)}, want: "HOST KEY HAS CHANGED: the server shows " + fingerprint(good.pub)},
		{name: "changed, with no", files: []string{line("db.example.com", bad)}, options: []string{"stricthostkeychecking false"}, want: "HOST KEY HAS CHANGED"},
		{name: "changed, with accept-new", files: []string{line("db.example.com", bad)}, options: []string{"stricthostkeychecking accept-new"}, want: "HOST KEY HAS CHANGED"},
		{name: "another type is known", files: []string{line("db.example.com", r)}, want: "HOST KEY HAS CHANGED"},
		{name: "another type is known, accept-new", files: []string{line("db.example.com", r)}, options: []string{"stricthostkeychecking accept-new"}, want: "HOST KEY HAS CHANGED"},
		{name: "another type is known, no", files: []string{line("db.example.com", r)}, options: []string{"stricthostkeychecking no"}, want: "HOST KEY HAS CHANGED"},
		{name: "unknown, no", options: []string{"stricthostkeychecking no"}},
		{name: "unknown, off", options: []string{"stricthostkeychecking off"}},
		{name: "unknown, accept-new", options: []string{"stricthostkeychecking accept-new"}},
		{name: "unknown, what is that", options: []string{"stricthostkeychecking whatever"}, want: "host key is unknown"},
		{name: "revoked", files: []string{line("db.example.com", good) + line("@revoked *", good)}, want: "is marked as revoked"},
		{name: "revoked, with no", files: []string{line("@revoked *", good)}, options: []string{"stricthostkeychecking no"}, want: "is marked as revoked"},
		{name: "revoked for another host", files: []string{line("db.example.com", good) + line("@revoked other", good)}},
		{name: "revoked without port", port: 2222, files: []string{line("[db.example.com]:2222", good) + line("@revoked db.example.com", good)}, want: "is marked as revoked"},
		{name: "authority", files: []string{line("@cert-authority *.example.com", ca)}, key: cert},
		{name: "authority with a port", port: 2222, files: []string{line("@cert-authority [*.example.com]:2222", ca)}, key: cert},
		{name: "authority is not a key", files: []string{line("@cert-authority *", good)}, want: "host key is unknown"},
		{name: "authority of others", files: []string{line("@cert-authority *.example.org", ca)}, key: cert, want: "host key is unknown"},
		{name: "another authority", files: []string{line("@cert-authority *", bad)}, key: cert, want: "host key is unknown"},
		{name: "certificate whose key is known", files: []string{line("db.example.com", good)}, key: cert},
		{name: "certificate whose key has changed", files: []string{line("db.example.com", bad)}, key: cert, want: "HOST KEY HAS CHANGED"},
		{name: "revoked authority", files: []string{line("@cert-authority *", ca) + line("@revoked *", ca)}, key: cert, want: "is marked as revoked"},
		{name: "revoked certified key", files: []string{line("@cert-authority *", ca) + line("@revoked *", good)}, key: cert, want: "is marked as revoked"},
		{name: "short", files: []string{line("db.example.com", short)}, key: short.pub, options: []string{"requiredrsasize 2048"}, want: "too short"},
		{name: "KnownHostsCommand", options: []string{"knownhostscommand /bin/x"}, want: "KnownHostsCommand can't be asked"},
		{name: "localhost", options: []string{"nohostauthenticationforlocalhost yes"}},
		{name: "localhost with an alias", options: []string{"nohostauthenticationforlocalhost yes", "hostkeyalias x"}, want: "host key is unknown"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.key == nil {
				tc.key = good.pub
			}
			if tc.port == 0 {
				tc.port = 22
			}
			sp := spec(t, tc.port, tc.options...)
			sp.Target.Host = "db.example.com"
			for j, text := range tc.files {
				keyword := []string{"userknownhostsfile", "globalknownhostsfile"}[j]
				sp.Config.Options[keyword] = []string{write(t, dir, fmt.Sprintf("%d-%d", i, j), text)}
			}
			err := stillGood(sp, pool.ServerInfo{HostKey: tc.key, Addr: "127.0.0.1:22"}, false)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

func TestKnownHostsFiles(t *testing.T) {
	k := newKey(t, "ed25519")
	dir := t.TempDir()
	info := pool.ServerInfo{HostKey: k.pub, Addr: "192.0.2.1:22"}
	for name, file := range map[string]string{
		"absent":          filepath.Join(dir, "absent"),
		"a folder":        dir,
		"the null device": "/dev/null",
		"none":            "none",
	} {
		if err := stillGood(spec(t, 22, "userknownhostsfile "+file), info, false); err == nil || !strings.Contains(err.Error(), "unknown") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRevokedHostKeys(t *testing.T) {
	good, bad, ca := newKey(t, "ed25519"), newKey(t, "ed25519"), newKey(t, "ecdsa")
	dir := t.TempDir()
	known := "userknownhostsfile " + write(t, dir, "known", "* "+good.line()+"* "+bad.line()+"@cert-authority * "+ca.line())
	list := write(t, dir, "list", "# gone\n\n"+bad.line()+ca.line())
	krl := write(t, dir, "krl", "SSHKRL\n\x00rest")
	broken := write(t, dir, "broken", bad.line()+"nonsense\n")
	cert := ca.certify(t, good.pub, ssh.HostCert, 0)
	for _, tc := range []struct {
		name string
		file string
		key  ssh.PublicKey
		want string
	}{
		{"other key", list, good.pub, ""},
		{"revoked", list, bad.pub, "revoked by RevokedHostKeys " + list},
		{"revoked authority", list, cert, "revoked by RevokedHostKeys"},
		{"binary", krl, good.pub, "binary key revocation list"},
		{"broken", broken, good.pub, broken + ":2 is not a public key"},
		{"absent", dir + "/absent", good.pub, "no such file"},
	} {
		err := stillGood(spec(t, 22, known, "revokedhostkeys "+tc.file), pool.ServerInfo{HostKey: tc.key, Addr: "127.0.0.1:22"}, false)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestHostKeyOrder(t *testing.T) {
	ec, r, ca := newKey(t, "ecdsa"), newKey(t, "rsa"), newKey(t, "ed25519")
	dir := t.TempDir()
	for _, tc := range []struct {
		name   string
		known  string
		chosen string
		first  []string
		certs  bool
	}{
		{"nothing known", "", "", []string{"ssh-ed25519"}, false},
		{"two types", "h " + r.line() + "h " + ec.line(), "", []string{"ecdsa-sha2-nistp256", "rsa-sha2-512", "rsa-sha2-256", "ssh-ed25519"}, false},
		{"authority", "@cert-authority h " + ca.line() + "h " + r.line(), "", []string{"ssh-ed25519-cert-v01@openssh.com"}, true},
		{"revoked says nothing", "@revoked h " + r.line(), "", []string{"ssh-ed25519"}, false},
		{"chosen", "h " + r.line(), "ssh-ed25519,ssh-rsa,sk-ssh-ed25519@openssh.com,ecdsa-sha2-nistp256", []string{"ssh-rsa", "ssh-ed25519", "ecdsa-sha2-nistp256"}, false},
		{"only certificates", "", "ssh-ed25519-cert-v01@openssh.com", []string{"ssh-ed25519-cert-v01@openssh.com"}, true},
	} {
		options := []string{"userknownhostsfile " + write(t, dir, "known", tc.known)}
		if tc.chosen != "" {
			options = append(options, "hostkeyalgorithms "+tc.chosen)
		}
		sp := spec(t, 22, options...)
		sp.Target.Host = "h"
		d := newDialing(sp)
		config, err := d.algorithms()
		check(t, err)
		if config.RekeyThreshold < 1<<60 {
			t.Errorf("%s: a key exchange is started here after %d bytes", tc.name, config.RekeyThreshold)
		}
		keys, err := d.hostKeys()
		check(t, err)
		got, err := keys.algorithms(config.HostKeyAlgorithms)
		check(t, err)
		if len(got) < len(tc.first) || !slices.Equal(got[:len(tc.first)], tc.first) ||
			slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, "-cert-") }) != tc.certs {
			t.Errorf("%s: %q", tc.name, got)
		}
	}
}

func FuzzKnownHosts(f *testing.F) {
	k := newKey(f, "ed25519")
	f.Add([]byte("h "+k.line()), "h")
	f.Add([]byte("@revoked *,!x "+k.line()+"|1|AAAA|BBBB ssh-rsa AAAA\n"), "[h]:22")
	f.Fuzz(func(t *testing.T, text []byte, name string) {
		name = strings.ToLower(name)
		all := parseKnownHosts("f", text, name)
		// Each line stands for itself.
		n := 0
		for line := range strings.Lines(string(text)) {
			n += len(parseKnownHosts("f", []byte(line), name))
		}
		if n != len(all) {
			t.Fatalf("%d keys in the file, %d in its lines", len(all), n)
		}
	})
}

func TestMatchPattern(t *testing.T) {
	for _, tc := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true}, {"*", "", true}, {"?", "", false}, {"a*b*c", "aXbYbZc", true}, {"a*b*c", "aXbYbZ", false},
		{"**", "x", true}, {"a?c", "abc", true}, {"*.b", ".b", true}, {"a", "ab", false}, {"ab", "a", false},
		{strings.Repeat("a*", 50) + "b", strings.Repeat("a", 5000), false},
	} {
		if got := matchPattern(tc.pattern, tc.s); got != tc.want {
			t.Errorf("%q, %q: %v", tc.pattern, tc.s, got)
		}
	}
}
