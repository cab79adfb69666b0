//go:build linux

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// What known_hosts says about a host decides as in plain ssh, in all of its forms.
func TestKnownHostsDecideAsInPlainSSH(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		w.newKey("ca")
		_, other := w.newKey("other")
		other = strings.TrimSpace(other)
		w.tool("ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", w.path("other_rsa"))
		otherRSA := strings.TrimSpace(w.read("other_rsa.pub"))
		w.write("host_ed25519.pub", publicKey("ed25519")+"\n")
		certified := func(options ...string) int {
			name := fmt.Sprintf("host%d", freePort(t))
			w.write(name, w.read("host_ed25519"))
			w.write(name+".pub", publicKey("ed25519")+"\n")
			w.tool(append(append([]string{"ssh-keygen", "-q", "-s", w.path("ca"), "-I", "e2e", "-h"}, options...), w.path(name+".pub"))...)
			return w.sshdAlso("127.0.0.1", "HostKey "+w.path(name), "HostCertificate "+w.path(name+"-cert.pub"))
		}
		good := certified("-n", "127.0.0.1,box")
		elsewhere := certified("-n", "other.example")
		expired := certified("-n", "127.0.0.1", "-V", "20200101:20200102")
		one := w.sshdAlso("127.0.0.1", "HostKey "+w.path("host_ed25519"))
		ed, ec, rs := publicKey("ed25519"), publicKey("ecdsa"), publicKey("rsa")
		ca := strings.TrimSpace(w.read("ca.pub"))

		for n, c := range []struct {
			name   string
			port   int // 0: the sshd with three keys
			known  string
			lines  string
			hash   bool
			status int
		}{
			{name: "known", known: "{host} " + ed},
			{name: "known by its ECDSA key", known: "{host} " + ec},
			{name: "known by its RSA key", known: "{host} " + rs},
			{name: "nothing known", status: out},
			{name: "of another host", known: "[127.0.0.2]:{port} " + ed, status: out},
			{name: "changed", known: "{host} " + other, status: out},
			{name: "changed, of a type that the server has too", known: "{host} " + otherRSA, status: out},
			{name: "another type known", port: one, known: "{host} " + otherRSA, status: out},
			{name: "another type known, new ones welcome", port: one, known: "{host} " + otherRSA, lines: "StrictHostKeyChecking accept-new", status: out},
			{name: "changed, new ones welcome", known: "{host} " + other, lines: "StrictHostKeyChecking accept-new", status: out},
			{name: "one of two lines", known: "{host} " + other + "\n{host} " + ed},
			{name: "right in one type, changed in the other", known: "{host} " + otherRSA + "\n{host} " + ed},
			{name: "hashed", known: "{host} " + ed, hash: true},
			{name: "hashed, another host", known: "[127.0.0.2]:{port} " + ed, hash: true, status: out},
			{name: "hashed, changed", known: "{host} " + other, hash: true, status: out},
			{name: "without the port", known: "127.0.0.1 " + ed},
			{name: "changed without the port", known: "127.0.0.1 " + other, status: out},
			{name: "pattern", known: "[127.0.0.*]:{port} " + ed},
			{name: "pattern with ?", known: "[127.0.0.?]:* " + ed},
			{name: "negated", known: "[127.0.0.*]:{port},!{host} " + ed, status: out},
			{name: "list", known: "other.example,{host},third.example " + ed},
			{name: "for any", known: "* " + ed},
			{name: "broken lines first", known: "{host} ssh-ed25519 AAAAnonsense\nnonsense\n@what {host} " + ed + "\n\x00\xff\n\n# comment\n{host} " + ed + " and a comment"},
			{name: "only broken lines", known: "{host} ssh-ed25519 AAAAnonsense\n{host}", status: out},
			{name: "very long line first", known: "#" + strings.Repeat("x", 100_000) + "\n{host} " + ed},
			{name: "leading blanks", known: "  \t {host} " + ed},
			{name: "without a line end", known: "{host} " + ed + "{end}"},
			{name: "revoked", known: "@revoked {host} " + ed + "\n{host} " + ed, status: out},
			{name: "revoked after", known: "{host} " + ed + "\n@revoked * " + ed, status: out},
			{name: "revoked, new ones welcome", known: "@revoked * " + ed, port: one, lines: "StrictHostKeyChecking accept-new", status: out},
			{name: "revoked for another", known: "@revoked other.example " + ed + "\n{host} " + ed},
			{name: "another revoked", known: "@revoked * " + other + "\n{host} " + ed},
			{name: "certified", port: good, known: "@cert-authority 127.0.0.1 " + ca},
			{name: "certified with port", port: good, known: "@cert-authority {host} " + ca},
			{name: "certified for all", port: good, known: "@cert-authority * " + ca},
			{name: "certified for others", port: good, known: "@cert-authority *.example " + ca, status: out},
			{name: "by another authority", port: good, known: "@cert-authority * " + other, status: out},
			{name: "authority's line without marker", port: good, known: "{host} " + ca, status: out},
			{name: "certified, revoked authority", port: good, known: "@cert-authority * " + ca + "\n@revoked * " + ca, status: out},
			{name: "certified, revoked key", port: good, known: "@cert-authority * " + ca + "\n@revoked * " + ed, status: out},
			{name: "certified, key known", port: good, known: "{host} " + ed},
			{name: "certified, alias is a principal", port: good, known: "@cert-authority box " + ca, lines: "HostKeyAlias box"},
			{name: "certified, alias is none", port: good, known: "@cert-authority * " + ca, lines: "HostKeyAlias cox", status: out},
			{name: "certified elsewhere", port: elsewhere, known: "@cert-authority * " + ca, status: out},
			{name: "certificate expired", port: expired, known: "@cert-authority * " + ca, status: out},
			{name: "certificate expired, key known", port: expired, known: "{host} " + ed},
			{name: "authority's algorithm not wanted", port: good, known: "@cert-authority * " + ca,
				lines: "CASignatureAlgorithms ecdsa-sha2-nistp256,rsa-sha2-512", status: out},
		} {
			t.Run(c.name, func(t *testing.T) {
				if c.port == 0 {
					c.port = w.sshd
				}
				known := strings.NewReplacer("{host}", fmt.Sprintf("[127.0.0.1]:%d", c.port), "{port}", fmt.Sprint(c.port)).Replace(c.known) + "\n"
				if before, _, ok := strings.Cut(known, "{end}"); ok {
					known = before
				}
				for _, way := range []string{"mux", "plain"} {
					file := fmt.Sprintf("kh%d.%s", n, way)
					w.write(file, known)
					if c.hash {
						w.tool("ssh-keygen", "-q", "-H", "-f", w.path(file))
						if strings.Contains(w.read(file), "127.0.0") {
							t.Fatal("the names are not hashed")
						}
					}
				}
				files := w.both(fmt.Sprintf("hk%d", n), fmt.Sprintf("UserKnownHostsFile %s/kh%d.{way}\n%s", w.dir, n, c.lines), w.base(c.port))
				mux, plain := w.each(files, nil, "box", "echo in")
				stdout := "in\n"
				if c.status == out {
					stdout = ""
				}
				same(t, mux, plain, c.status, stdout)
			})
		}
	})
}

// A refusal names what a person needs to judge it.
func TestHostKeyRefusalsSayWhatIsKnown(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		w.newKey("other")
		print := func(file string) string { return strings.Fields(w.tool("ssh-keygen", "-l", "-f", w.path(file)))[1] }
		w.write("host_ed25519.pub", publicKey("ed25519"))
		shown, known := print("host_ed25519.pub"), print("other.pub")
		host := fmt.Sprintf("[127.0.0.1]:%d", w.sshd)
		w.write("changed", "# first line\n"+host+" "+w.read("other.pub"))
		w.write("empty", "")
		for _, k := range hostKeys {
			w.append("revoked", "@revoked "+host+" "+publicKey(k.kind)+"\n")
		}
		for _, c := range []struct {
			name, lines string
			want        []string
		}{
			{"changed", "UserKnownHostsFile {dir}/changed", []string{"CHANGED", shown, known, w.path("changed") + ":2"}},
			// ssh would go on without passwords and forwards; a shared connection would hand that to all.
			{"careless", "UserKnownHostsFile {dir}/changed\nStrictHostKeyChecking no", []string{"CHANGED", shown, known}},
			{"revoked", "UserKnownHostsFile {dir}/revoked\nStrictHostKeyChecking no", []string{"revoked", w.path("revoked") + ":"}},
			{"unknown", "UserKnownHostsFile {dir}/empty\nHostKeyAlgorithms ssh-ed25519,ecdsa-sha2-nistp256-cert-v01@openssh.com",
				[]string{"unknown", shown, "MUXPROXY_BYPASS=1 ssh box"}},
		} {
			files := w.both(c.name, strings.ReplaceAll(c.lines, "{dir}", w.dir), w.base(w.sshd))
			r := w.run(spec{args: []string{"ssh", "-F", files.mux, "box", "true"}, null: true})
			want(t, r, 255, "")
			line := oneLine(t, r)
			for _, part := range c.want {
				if !strings.Contains(line, part) {
					t.Errorf("%s: no %q in %q", c.name, part, line)
				}
			}
		}
	})
}

// New keys are written as ssh writes them.
func TestHostKeysAreLearntAsByPlainSSH(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		for n, c := range []struct {
			name, lines, before string
			hashed              bool
		}{
			{name: "accept-new", lines: "StrictHostKeyChecking accept-new"},
			{name: "no", lines: "StrictHostKeyChecking no"},
			{name: "behind others", lines: "StrictHostKeyChecking accept-new", before: "# mine\nother.example " + publicKey("rsa") + "\n"},
			{name: "alias", lines: "StrictHostKeyChecking accept-new\nHostKeyAlias some-Alias"},
			{name: "hashed", lines: "StrictHostKeyChecking accept-new\nHashKnownHosts yes", hashed: true},
			{name: "with updates", lines: "StrictHostKeyChecking accept-new\nUpdateHostKeys yes"},
		} {
			t.Run(c.name, func(t *testing.T) {
				for _, way := range []string{"mux", "plain"} {
					if c.before != "" {
						w.write(fmt.Sprintf("kh%d.%s", n, way), c.before)
					}
				}
				lines := fmt.Sprintf("UserKnownHostsFile %[1]s/kh%[2]d.{way} %[1]s/second%[2]d.{way}\n%[3]s", w.dir, n, c.lines)
				files := w.both(fmt.Sprintf("learn%d", n), lines, w.base(w.sshd))
				mux, plain := w.each(files, nil, "box", "echo in")
				same(t, mux, plain, in, "in\n")
				if plainMode {
					return
				}
				got, model := w.read(fmt.Sprintf("kh%d.mux", n)), w.read(fmt.Sprintf("kh%d.plain", n))
				if c.hashed {
					for _, text := range []string{got, model} {
						if f := strings.Fields(text); len(f) != 3 || !strings.HasPrefix(f[0], "|1|") {
							t.Errorf("not hashed: %q", text)
						}
					}
					name := fmt.Sprintf("[127.0.0.1]:%d", w.sshd)
					w.tool("ssh-keygen", "-F", name, "-f", w.path(fmt.Sprintf("kh%d.mux", n)))
					got, model = got[strings.Index(got, " "):], model[strings.Index(model, " "):]
				}
				if got != model {
					t.Errorf("muxproxy has written\n%s\nand ssh\n%s", got, model)
				}
				if _, err := os.Stat(w.path(fmt.Sprintf("second%d.mux", n))); err == nil {
					t.Error("the second file was written to")
				}
				// What was learnt is known.
				w.write("strict", strings.ReplaceAll(strings.ReplaceAll(w.read(fmt.Sprintf("learn%d.mux", n)),
					"StrictHostKeyChecking accept-new", "StrictHostKeyChecking yes"), "StrictHostKeyChecking no", "StrictHostKeyChecking yes"))
				want(t, w.run(spec{args: []string{"ssh", "-F", w.path("strict"), "box", "echo in"}, null: true}), in, "in\n")
			})
		}
	})
}

// UpdateHostKeys adds the server's other keys, and removes those that it has no more, as ssh itself does.
func TestHostKeysAreUpdatedAsByPlainSSH(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		_, stale := w.newKey("stale")
		two := w.sshdAlso("127.0.0.1", "HostKey "+w.path("host_ed25519"), "HostKey "+w.path("host_ecdsa"))
		host := fmt.Sprintf("[127.0.0.1]:%d ", two)
		ed, ec, rs := publicKey("ed25519"), publicKey("ecdsa"), publicKey("rsa")
		for n, c := range []struct {
			name, known, lines string
			changes, hashed    bool
		}{
			{name: "adds", known: host + ed + "\n", changes: true},
			{name: "removes", known: host + ed + "\n" + host + ec + "\n" + host + stale, changes: true},
			{name: "both", known: "# mine\nother.example " + stale + host + rs + "\n" + host + ec + " a comment\nthird.example " + stale, changes: true},
			{name: "known by another name", known: host + ec + "\nother.example " + ed + "\n"},
			{name: "hashed", known: host + ed + "\n", lines: "HashKnownHosts yes", changes: true, hashed: true},
			{name: "up to date", known: host + ec + "\n" + host + ed + "\n"},
			{name: "switched off", known: host + ed + "\n", lines: "UpdateHostKeys no"},
			{name: "pattern", known: fmt.Sprintf("[127.0.0.*]:%d %s\n", two, ed)},
			{name: "not the user's file", known: "", lines: "GlobalKnownHostsFile {global} {dir}/global"},
		} {
			t.Run(c.name, func(t *testing.T) {
				w.write("global", host+ed+"\n")
				for _, way := range []string{"mux", "plain"} {
					w.write(fmt.Sprintf("kh%d.%s", n, way), c.known)
				}
				if !strings.Contains(c.lines, "UpdateHostKeys") {
					c.lines = "UpdateHostKeys yes\n" + c.lines
				}
				lines := strings.ReplaceAll(fmt.Sprintf("UserKnownHostsFile {dir}/kh%d.{way}\n%s", n, c.lines), "{dir}", w.dir)
				files := w.both(fmt.Sprintf("update%d", n), lines, w.base(two))
				run := func(conf, way string) string {
					file := fmt.Sprintf("kh%d.%s", n, way)
					p := w.start(spec{args: []string{"ssh", "-F", conf, "box", "cat"}})
					p.echo("held")
					if c.changes {
						eventually(t, way+" changes known_hosts", func() bool { return w.read(file) != c.known })
					} else {
						p.echo("still held")
					}
					p.release()
					return w.read(file)
				}
				model := run(files.plain, "plain")
				if plainMode {
					return
				}
				got := run(files.mux, "mux")
				if c.hashed {
					unsalted := func(text string) string {
						hashed := 0
						var b strings.Builder
						for line := range strings.Lines(text) {
							if name, key, _ := strings.Cut(line, " "); strings.HasPrefix(name, "|1|") {
								line = "hashed " + key
								hashed++
							}
							b.WriteString(line)
						}
						if hashed != 1 {
							t.Errorf("%d hashed names in %q", hashed, text)
						}
						return b.String()
					}
					got, model = unsalted(got), unsalted(model)
				}
				if got != model {
					t.Errorf("muxproxy has written\n%s\nand ssh\n%s", got, model)
				}
			})
		}
	})
}

// A client that would not trust the host does not ride a connection that another one made without care.
func TestAStrictClientDoesNotRideACarelessOne(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		w.write("empty", "")
		careless := w.hold("-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null")
		r := w.ssh("-oStrictHostKeyChecking=yes", "-oUserKnownHostsFile="+w.path("empty"), "box", "echo in")
		want(t, r, 255, "")
		if w.mode == pipes {
			if line := oneLine(t, r); !strings.Contains(line, "host key is unknown") {
				t.Errorf("muxproxy says %q", line)
			}
		}
		before := w.link.count()
		want(t, w.ssh("-oStrictHostKeyChecking=yes", "box", "echo in"), 0, "in\n")
		if got := w.link.count(); got != before+1 {
			t.Errorf("the strict client made %d connections, not one of its own", got-before)
		}
		careless.echo("still here")
		careless.release()
	})
}

// A connection that is used again is judged by known_hosts as it is now.
func TestAChangedKnownHostsKeepsTheNextClientOut(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		known := w.read("known_hosts")
		first := w.hold()
		want(t, w.ssh("box", "echo in"), 0, "in\n")
		for _, k := range hostKeys {
			w.append("known_hosts", "@revoked * "+publicKey(k.kind)+"\n")
		}
		r := w.ssh("box", "echo in")
		want(t, r, 255, "")
		w.write("known_hosts", known)
		want(t, w.ssh("box", "echo in"), 0, "in\n")
		first.echo("still here")
		first.release()
	})
}
