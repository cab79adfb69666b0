//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// hops is a chain of hosts: each has an sshd of its own behind a proxy that counts, and takes one key only.
type hops struct {
	w     *world
	links []*link
	lines []string // of ssh_config for each
}

// newHops starts n of them, named hop1 to hopN. Each trusts a key of its own, and says which was used.
func newHops(w *world, n int) *hops {
	w.t.Helper()
	h := &hops{w: w}
	for i := 1; i <= n; i++ {
		name := fmt.Sprintf("hop%d", i)
		_, public := w.newKey(name)
		w.write(name+".keys", `environment="E2E_KEY=`+name+`" `+public)
		port := w.sshdAlso("127.0.0.1", "AuthorizedKeysFile "+w.path(name+".keys"), "PermitUserEnvironment yes", "AllowTcpForwarding yes")
		l := newLink(w.t, loopback(port))
		w.append("known_hosts", knownHosts(l.port()))
		h.links = append(h.links, l)
		h.lines = append(h.lines, fmt.Sprintf("  HostName 127.0.0.1\n  Port %d\n  IdentityFile %s\n", l.port(), w.path(name)))
	}
	return h
}

// config is an ssh_config with more lines for some of the hosts.
func (h *hops) config(name string, more map[string]string) string {
	var lines strings.Builder
	for i, l := range h.lines {
		host := fmt.Sprintf("hop%d", i+1)
		fmt.Fprintf(&lines, "Host %s\n  %s\n%s", host, more[host], l) // the first value counts
	}
	files := h.w.both(name, lines.String(), h.w.base(0))
	if h.w.mode == plain {
		return files.plain
	}
	return files.mux
}

// count checks how many TCP connections each host has accepted. Plain ssh needs more.
func (h *hops) count(want ...int) {
	h.w.t.Helper()
	if h.w.mode == plain {
		return
	}
	for i, l := range h.links {
		if got := l.count(); got != want[i] {
			h.w.t.Errorf("hop%d accepted %d TCP connections, not %d", i+1, got, want[i])
		}
	}
}

const whichKey = `echo "by $E2E_KEY"`

func TestJumpThroughOneAndTwoHosts(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		h := newHops(w, 3)
		conf := h.config("jump.conf", map[string]string{"hop2": "ProxyJump hop1", "hop3": "ProxyJump hop2"})
		run := func(host string) result { return w.noTTY(conf, host, whichKey).wait(2 * patience) }

		first := w.start(spec{args: []string{"ssh", "-F", conf, "hop2", "cat"}})
		first.echo("held")
		h.count(1, 1, 0)
		want(t, run("hop2"), 0, "by hop2\n")
		h.count(1, 1, 0)
		want(t, run("hop3"), 0, "by hop3\n") // over the pooled connections to both
		h.count(1, 1, 1)
		want(t, run("hop1"), 0, "by hop1\n") // the jump host's own connection serves too
		h.count(1, 1, 1)
		first.echo("still here")
		first.release()
		if w.mode != plain {
			eventually(t, "nothing is left of the way", func() bool {
				s, _ := w.status()
				return len(s.Upstreams) == 0
			})
		}
	})
}

func TestJumpHostsInOneLine(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		h := newHops(w, 3)
		conf := h.config("line.conf", map[string]string{"hop3": fmt.Sprintf("ProxyJump %s@hop1,ssh://%s@hop2", me, me)})
		want(t, w.noTTY(conf, "hop3", whichKey).wait(2*patience), 0, "by hop3\n")
		h.count(1, 1, 1)
		// An option on the command line is for the destination alone.
		want(t, w.noTTY(conf, "-i", w.path("id"), "-o", "ServerAliveInterval=7", "hop3", whichKey).wait(2*patience), 0, "by hop3\n")
		h.count(2, 2, 2)
	})
}

func TestAJumpThatFailsSaysWhere(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		h := newHops(w, 2)
		for name, c := range map[string]struct {
			more  map[string]string
			names string
		}{
			"port":    {map[string]string{"hop2": "ProxyJump 127.0.0.1:1"}, "127.0.0.1:1"},
			"user":    {map[string]string{"hop2": "ProxyJump e2e-nobody@hop1"}, "e2e-nobody"},
			"circle":  {map[string]string{"hop1": "ProxyJump hop2", "hop2": "ProxyJump hop1"}, "ProxyJump"},
			"onwards": {map[string]string{"hop2": "ProxyJump hop1\n  HostName 127.0.0.2"}, "127.0.0.2"},
		} {
			if name == "circle" && plainMode {
				continue // plain ssh runs into its own limit of processes
			}
			r := w.noTTY(h.config(name+".conf", c.more), "hop2", whichKey).wait(2 * patience)
			want(t, r, 255, "")
			if w.mode == plain {
				continue
			}
			if line := oneLine(t, r); !strings.Contains(line, c.names) {
				t.Errorf("%s: no %q in %q", name, c.names, line)
			}
		}
	})
}

// A jump host that only its own ProxyCommand reaches is reached by that, once.
func TestAJumpHostBehindAProxyCommand(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		h := newHops(w, 3)
		way := w.script("way", fmt.Sprintf("#!/bin/sh\necho \"$@\" >> %s\nexec nc 127.0.0.1 %d\n", w.path("ways"), h.links[0].port()))
		w.append("known_hosts", fmt.Sprintf("[hop1.invalid]:%d %s\n", h.links[0].port(), publicKey("ed25519")))
		h.lines[0] = strings.Replace(h.lines[0], "HostName 127.0.0.1", "HostName hop1.invalid", 1)
		more := map[string]string{"hop1": "ProxyCommand " + way + " %r %h %n", "hop2": "ProxyJump hop1", "hop3": "ProxyJump hop2"}
		conf := h.config("way.conf", more)
		first := w.start(spec{args: []string{"ssh", "-F", conf, "hop2", "cat"}})
		first.echo("held")
		want(t, w.noTTY(conf, "hop2", whichKey).wait(patience), 0, "by hop2\n")
		want(t, w.noTTY(conf, "hop3", whichKey).wait(2*patience), 0, "by hop3\n")
		want(t, w.noTTY(conf, "hop1", whichKey).wait(patience), 0, "by hop1\n")
		line := me + " hop1.invalid hop1\n"
		if got := w.read("ways"); w.mode != plain && got != line || !strings.HasPrefix(got, line) {
			t.Errorf("it was called as %q", got)
		}
		h.count(1, 1, 1)
		first.release()

		// One that fails is named.
		more["hop1"] = "ProxyCommand false"
		r := w.noTTY(h.config("noway.conf", more), "hop2", whichKey).wait(patience)
		want(t, r, 255, "")
		if w.mode == plain {
			return
		}
		if line := oneLine(t, r); !strings.Contains(line, "hop1.invalid") || !strings.Contains(line, "ProxyCommand") {
			t.Errorf("muxproxy says %q", line)
		}
	})
}

// Each host of the way is judged by its own lines, and its questions reach the person.
func TestAHostKeyQuestionOnTheSecondHop(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		h := newHops(w, 3)
		w.write("empty", "")
		conf := h.config("ask.conf", map[string]string{
			"hop2": "ProxyJump hop1\n  BatchMode no\n  UserKnownHostsFile " + w.path("empty"),
			"hop3": "ProxyJump hop2\n  BatchMode no\n  UserKnownHostsFile " + w.path("known_hosts"),
			"hop1": "BatchMode no\n  UserKnownHostsFile " + w.path("known_hosts"),
		})
		p := w.tty(conf, "hop3", whichKey)
		shown := p.answer("(yes/no/[fingerprint])? ", "yes")
		if name := fmt.Sprintf("[127.0.0.1]:%d", h.links[1].port()); !strings.Contains(shown, name) {
			t.Errorf("no %q in %q", name, shown)
		}
		p.ended(0, "by hop3")
		if !strings.HasPrefix(w.read("empty"), fmt.Sprintf("[127.0.0.1]:%d ssh-ed25519 ", h.links[1].port())) {
			t.Errorf("known_hosts is %q", w.read("empty"))
		}
		// With nobody to ask, the line says which host it is about.
		w.write("empty", "")
		r := w.noTTY(conf, "-oBatchMode=yes", "hop3", whichKey).wait(patience)
		want(t, r, 255, "")
		if w.mode != plain {
			if line := oneLine(t, r); !strings.Contains(line, fmt.Sprintf("127.0.0.1:%d: host key is unknown", h.links[1].port())) {
				t.Errorf("muxproxy says %q", line)
			}
		}
	})
}

// What known_hosts says now of a jump host decides whether the next client rides through it.
func TestARevokedJumpHostKeepsTheNextClientOut(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		h := newHops(w, 2)
		conf := h.config("revoked.conf", map[string]string{"hop2": "ProxyJump hop1"})
		run := func(host string) result { return w.noTTY(conf, host, whichKey).wait(2 * patience) }
		first := w.start(spec{args: []string{"ssh", "-F", conf, "hop2", "cat"}})
		first.echo("held")
		want(t, run("hop2"), 0, "by hop2\n")
		known := w.read("known_hosts")
		for _, k := range hostKeys {
			w.append("known_hosts", fmt.Sprintf("@revoked [127.0.0.1]:%d %s\n", h.links[0].port(), publicKey(k.kind)))
		}
		for _, host := range []string{"hop2", "hop1", "hop2"} { // the second ends the jump host's part in it
			r := run(host)
			want(t, r, 255, "")
			if w.mode == pipes {
				if line := oneLine(t, r); !strings.Contains(line, fmt.Sprintf("127.0.0.1:%d: ", h.links[0].port())) ||
					!strings.Contains(line, "revoked") {
					t.Errorf("%s: muxproxy says %q", host, line)
				}
			}
		}
		w.write("known_hosts", known)
		want(t, run("hop2"), 0, "by hop2\n")
		first.echo("still here")
		first.release()
	})
}

// Two aliases of one host with keys of their own are two users to the server, whose rights are not mixed.
func TestTwoAliasesHaveTheRightsOfTheirKeys(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		_, reader := w.newKey("reader")
		_, admin := w.newKey("admin")
		port := w.sshdAlso("127.0.0.1", "AuthorizedKeysFile "+w.path("rights"))
		l := newLink(t, loopback(port))
		w.append("known_hosts", knownHosts(l.port()))
		w.write("rights", `command="echo read only; cat",no-port-forwarding `+reader+admin)
		lines := fmt.Sprintf("Host reader\n  IdentityFile %s\nHost admin\n  IdentityFile %s\n", w.path("reader"), w.path("admin"))
		conf := w.interactive("aliases.conf", l.port(), lines)
		first := w.start(spec{args: []string{"ssh", "-F", conf, "reader", "echo anything"}})
		first.expect("read only\n")
		second := w.start(spec{args: []string{"ssh", "-F", conf, "admin", "echo admin; cat"}})
		second.expect("admin\n")
		want(t, w.noTTY(conf, "reader", "echo anything").wait(patience), 0, "read only\n")
		want(t, w.noTTY(conf, "admin", "echo anything").wait(patience), 0, "anything\n")
		if w.mode != plain && l.count() != 2 {
			t.Errorf("%d TCP connections for two aliases", l.count())
		}
		first.release()
		second.release()
	})
}

// Who offers no key has not the rights of one: they are often restricted where a password's are not.
func TestAClientWithoutKeysDoesNotRideAKeysConnection(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		first := w.hold()
		for _, option := range []string{"PubkeyAuthentication=no", "PreferredAuthentications=password,keyboard-interactive"} {
			want(t, w.ssh("-o", option, "box", "echo in"), 255, "")
		}
		// Ansible's defaults ride on what a person has logged in.
		want(t, w.ssh("-oPasswordAuthentication=no", "-oKbdInteractiveAuthentication=no",
			"-oPreferredAuthentications=gssapi-with-mic,gssapi-keyex,hostbased,publickey", "box", "echo in"), 0, "in\n")
		if first.echo("still here"); w.mode != plain {
			w.connections(3) // two of them were turned down
		}
		first.release()
	})
}

func TestIPv6(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		port := w.sshdAlso("::1")
		w.write("of_six", fmt.Sprintf("[::1]:%d %s\n", port, publicKey("ed25519")))
		base := "UserKnownHostsFile " + w.path("of_six") + "\n"
		conf := w.interactive("six.conf", port, base+"Host six\n  HostName ::1\nHost ::1\n  HostName ::1\n")
		for _, args := range [][]string{
			{"six"}, {"::1"}, {me + "@::1"}, {"-6", "six"}, {"-p", fmt.Sprint(port), "six"},
		} {
			want(t, w.noTTY(conf, append(args, "echo in")...).wait(patience), 0, "in\n")
		}
		want(t, w.noTTY(conf, "-4", "six", "echo in").wait(patience), 255, "")
	})
}

// The user's own ProxyCommand leads to the host, once for all clients that share.
func TestAProxyCommandOfTheUsersOwn(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		nc := w.script("way", fmt.Sprintf("#!/bin/sh\necho \"$@\" >> %s\nexec nc 127.0.0.1 %d\n", w.path("ways"), w.sshd))
		w.write("of_box", "box.invalid "+publicKey("ed25519")+"\n")
		conf := w.interactive("way.conf", 22, fmt.Sprintf("HostName box.invalid\nUserKnownHostsFile %s\nProxyCommand %s %%r %%h %%p %%n\n",
			w.path("of_box"), nc))
		first := w.start(spec{args: []string{"ssh", "-F", conf, "box", "cat"}})
		first.echo("held")
		want(t, w.noTTY(conf, "box", "echo in").wait(patience), 0, "in\n")
		line := me + " box.invalid 22 box\n"
		if got := w.read("ways"); w.mode != plain && got != line || !strings.HasPrefix(got, line) {
			t.Errorf("it was called as %q", got)
		}
		first.release()
	})
}

// A ProxyCommand that goes by the name as typed can lead two names of one address to two machines.
func TestAProxyCommandThatGoesByTheNameAsTyped(t *testing.T) {
	for _, token := range []string{"%n", "%k"} {
		t.Run(token[1:], func(t *testing.T) {
			forEach(t, func(t *testing.T, w *world) {
				for _, name := range []string{"one", "two"} {
					key, _ := ssh.ParsePrivateKey([]byte(w.read("id")))
					d := w.newDoor(&ssh.ServerConfig{
						BannerCallback: func(ssh.ConnMetadata) string { return "this is " + name + "\n" },
						PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
							if string(k.Marshal()) != string(key.PublicKey().Marshal()) {
								return nil, errors.New("wrong key")
							}
							return nil, nil
						},
					})
					w.write("port_of_"+name, fmt.Sprint(d.port()))
				}
				way := w.script("way", fmt.Sprintf("#!/bin/sh\nexec nc 127.0.0.1 `cat %s$1`\n", w.path("port_of_")))
				w.write("of_box", "box.invalid "+publicKey("ed25519")+"\n")
				conf := w.interactive("names.conf", 22, fmt.Sprintf("HostName box.invalid\nUserKnownHostsFile %s\nProxyCommand %s %s\n",
					w.path("of_box"), way, token))
				first := w.start(spec{args: []string{"ssh", "-F", conf, "one", "hold"}})
				first.expect("held\n")
				r := w.noTTY(conf, "two", "who").wait(patience)
				want(t, r, 0, "in as "+me+"\n")
				if !strings.Contains(r.err, "this is two") {
					t.Errorf("it came to another machine: %q", r.err)
				}
				first.release()
			})
		})
	}
}
