//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// policy writes the policy file as an editor does: a new file that is renamed.
func (w *world) policy(text string) {
	w.t.Helper()
	dir := w.path("config/muxproxy")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	w.write("config/muxproxy/config.hcl~", text)
	if err := os.Rename(filepath.Join(dir, "config.hcl~"), filepath.Join(dir, "config.hcl")); err != nil {
		w.t.Fatal(err)
	}
}

// mux runs a command of muxproxy.
func (w *world) mux(args ...string) result {
	w.t.Helper()
	return w.run(spec{args: append([]string{binDir + "/muxproxy"}, args...), null: true})
}

// reload puts another policy in force.
func (w *world) reload(text string) {
	w.t.Helper()
	w.policy(text)
	if r := w.mux("master", "reload"); r.status != 0 {
		w.t.Fatalf("muxproxy master reload: status %d: %s%s", r.status, r.out, r.err)
	}
}

// decisions are the audit log's, "allow exec" and the like, and who denied.
func (w *world) decisions() []string {
	w.t.Helper()
	var all []string
	for line := range strings.Lines(w.read(w.state + "/muxproxy/audit.log")) {
		var r struct{ Record, Decision, Kind, By, Name string }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			w.t.Fatalf("audit.log: %q: %v", line, err)
		}
		if r.Record == "decision" {
			all = append(all, strings.Join(strings.Fields(strings.Join([]string{r.Decision, r.Kind, r.Name, r.By}, " ")), " "))
		}
	}
	return all
}

func (w *world) audited(decision string) {
	w.t.Helper()
	eventually(w.t, "audit.log has "+decision, func() bool {
		for _, d := range w.decisions() {
			if d == decision {
				return true
			}
		}
		return false
	})
}

// denyAll denies these kinds, each with a reason of its own.
func denyAll(kinds ...string) string {
	text := "host \"*\" {\n"
	for _, k := range kinds {
		text += fmt.Sprintf("  deny {\n    when   = use.kind == %q\n    reason = \"no %s here\"\n  }\n", k, k)
	}
	return text + "}\n"
}

// Each denial is on the terminal of whoever asked, with its reason, and in the audit log.
func TestADenialSaysWhy(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy("")
		first := w.hold()
		w.reload(denyAll("shell", "exec", "subsystem", "local-forward", "remote-forward"))
		said := func(r result, status int, kind string) {
			t.Helper()
			line := "denied by policy: no " + kind + " here"
			if r.status != status || !strings.Contains(r.err, line) || r.out != "" {
				t.Errorf("%s: status %d (want %d), stdout %q, stderr %q", kind, r.status, status, r.out, r.err)
			}
			w.audited("deny " + kind + " policy")
		}
		said(w.ssh("box"), 255, "shell")
		said(w.ssh("box", "echo hi"), 255, "exec")
		said(w.run(spec{args: []string{"sftp", "-F", w.conf, "-b", "/dev/null", "box"}, null: true}), 255, "subsystem")
		said(w.ssh("-W", "127.0.0.1:1", "box"), 255, "local-forward")

		port := freePort(t)
		p := w.sshStart("-N", "-L", fmt.Sprintf("127.0.0.1:%d:127.0.0.1:1", port), "box")
		c := dial(t, loopback(port))
		c.SetDeadline(time.Now().Add(patience))
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
			t.Errorf("-L: %d bytes, %v", n, err)
		}
		c.Close()
		p.expectErr("denied by policy: no local-forward here")
		p.signal(syscall.SIGKILL) // a SIGTERM just before its poll(2) would wait for something to happen
		p.wait(patience)

		w.reload(denyAll("remote-forward", "agent", "x11"))
		r := w.ssh("-R", fmt.Sprintf("127.0.0.1:%d:127.0.0.1:1", port), "box", "echo on")
		if r.status != 0 || r.out != "on\n" || !strings.Contains(r.err, "denied by policy: no remote-forward here") ||
			!strings.Contains(r.err, "remote port forwarding failed") {
			t.Errorf("-R: %+v", r)
		}
		w.audited("deny remote-forward policy")
		w.newKey("key")
		env := append([]string{"SSH_AUTH_SOCK=" + w.agentWith("agent.sock", "key"), "DISPLAY=127.0.0.1:99"}, w.env...)
		for option, kind := range map[string]string{"-A": "agent", "-Y": "x11"} {
			args := w.sshArgs(option, "-o", "IdentityAgent=SSH_AUTH_SOCK", "-o", "IdentitiesOnly=yes", "box", "echo on")
			r := w.run(spec{args: args, env: env, null: true})
			if r.status != 0 || r.out != "on\n" || !strings.Contains(r.err, "denied by policy: no "+kind+" here") {
				t.Errorf("%s: %+v", option, r)
			}
			w.audited("deny " + kind + " policy")
		}

		w.reload(denyAll("attach"))
		said(w.ssh("box", "echo hi"), 255, "attach")
		first.echo("still here") // what was allowed goes on
		first.release()
	})
}

func TestADeniedJumpSaysWhy(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy(denyAll("jump"))
		h := newHops(w, 2)
		r := w.noTTY(h.config("jump.conf", map[string]string{"hop2": "ProxyJump hop1"}), "hop2", whichKey).wait(2 * patience)
		if r.status != 255 || !strings.Contains(r.err+r.out, "denied by policy: no jump here") {
			t.Errorf("%+v", r)
		}
		w.audited("deny jump policy")
		h.count(0, 0)
	})
}

// A host block named by an alias is for those who are led from it to the host by ssh_config, not for whoever says so.
func TestAnAliasMustLeadToTheHost(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy(fmt.Sprintf(`master {
  ssh_config = %q
}
host "box" {
  deny {
    when   = use.kind == "exec" && use.command != "echo box"
    reason = "box only"
  }
}
host "box2" {
  deny { reason = "box2 only" }
}
`, w.conf))
		// box2 is an alias of somewhere else, and one that is not in the file means a host of that name.
		w.write("ssh_config", w.read("ssh_config")+"\nHost box2\n    HostName elsewhere.invalid\n")
		first := w.start(spec{args: w.sshArgs("box", "echo box"), null: true})
		want(t, first.wait(2*patience), 0, "box\n")
		denied := w.ssh("box", "echo other")
		if denied.status != 255 || !strings.Contains(denied.err, "denied by policy: box only") {
			t.Errorf("%+v", denied)
		}
		// The same host under names that do not lead to it: neither block is about these clients.
		for _, alias := range []string{"box2", "nobox"} {
			args := w.sshArgs("-o", "HostName=127.0.0.1", "-o", fmt.Sprintf("Port=%d", w.link.port()), alias, "echo other")
			want(t, w.run(spec{args: args, null: true}), 0, "other\n")
		}
	})
}

// share = false: ssh speaks with the server itself.
func TestAHostThatIsNotShared(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy("host \"127.0.0.1\" {\n  share = false\n}\n")
		p := w.hold()
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
		w.connections(2)
		if s := w.mustStatus(); len(s.Upstreams)+len(s.Clients) != 0 {
			t.Errorf("%+v", s)
		}
		if r := w.mux("lock"); r.status != 0 { // guards the shared connections, not the host
			t.Errorf("%+v", r)
		}
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
		if r := w.mux("master", "reload"); r.status != 255 || !strings.Contains(r.err, "denied by lock") {
			t.Errorf("%+v", r)
		}
		if r := w.mux("unlock"); r.status != 0 {
			t.Errorf("%+v", r)
		}
		p.release()
	})
}

// via: policy's jump hosts instead of ssh_config's, looked up as that has them.
func TestViaIsAsProxyJump(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		h := newHops(w, 3)
		conf := h.config("via.conf", map[string]string{"hop3": "ProxyJump hop1"})
		port := strings.Fields(strings.SplitN(h.lines[2], "Port ", 2)[1])[0]
		policy := func(via string) string {
			return fmt.Sprintf("host \"127.0.0.1\" {\n  via = host.port == %s ? %s : []\n}\n", port, via)
		}
		w.policy(policy(`["hop1", "hop2"]`))
		first := w.start(spec{args: []string{"ssh", "-F", conf, "hop3", "cat"}})
		first.echo("held")
		h.count(1, 1, 1)
		if n := len(w.mustStatus().Upstreams); n != 3 {
			t.Errorf("%d upstreams: the jump hosts are not shared ones", n)
		}
		want(t, w.noTTY(conf, "hop3", whichKey).wait(2*patience), 0, "by hop3\n")
		h.count(1, 1, 1)
		w.reload("host \"127.0.0.1\" {\n  via = []\n}\n")
		want(t, w.noTTY(conf, "hop3", whichKey).wait(2*patience), 0, "by hop3\n")
		h.count(1, 1, 2) // without a jump host it is another connection
		w.reload("host \"127.0.0.1\" {\n  via = [\"a,b\"]\n}\n")
		r := w.noTTY(conf, "hop3", whichKey).wait(2 * patience)
		if r.status != 255 || !strings.Contains(r.out+r.err, `"a,b" is not one jump host`) {
			t.Errorf("%+v", r)
		}
		first.echo("still here")
		first.release()
	})
}

// A lane block decides before what is known of a program.
func TestALaneBlock(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		lane := func(want string) {
			t.Helper()
			s := w.mustStatus()
			if len(s.Upstreams) != 1 || s.Upstreams[0].Lane != want {
				t.Errorf("%+v, want lane %s", s.Upstreams, want)
			}
		}
		w.policy("host \"*\" {\n  lane \"bulk\" {\n    when = use.program == \"cat\"\n  }\n}\n")
		p := w.hold()
		lane("bulk")
		p.release()
		w.reload("")
		p = w.hold()
		lane("interactive")
		p.release()
	})
}

// client.env is the environment of the ssh, whatever the policy wants of it, also for clients that were there before.
func TestAConditionOnTheEnvironment(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		deny := func(name string) string {
			return fmt.Sprintf("host \"*\" {\n  deny {\n    when = use.kind == \"local-forward\" && client.env.%s == \"1\"\n  }\n}\n", name)
		}
		w.policy(deny("CI"))
		echo := echoServer(t)
		reaches := func(p *proc, port int) bool {
			c := dial(t, loopback(port))
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			if _, err := c.Write([]byte("x")); err != nil {
				return false
			}
			n, err := c.Read(make([]byte, 1))
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Fatal(err)
			}
			return n == 1
		}
		start := func(port int, env ...string) *proc {
			return w.start(spec{args: w.sshArgs("-N", "-L", fmt.Sprintf("127.0.0.1:%d:%s", port, echo), "box"), env: append(env, w.env...)})
		}
		a, b := freePort(t), freePort(t)
		ci, other := start(a, "CI=1"), start(b, "OTHER=1")
		if reaches(ci, a) || !reaches(other, b) {
			t.Error("CI=1 is not what decides")
		}
		w.reload(deny("OTHER"))
		if !reaches(ci, a) || reaches(other, b) {
			t.Error("after a reload OTHER=1 is not what decides")
		}
		for _, p := range []*proc{ci, other} {
			p.signal(syscall.SIGKILL)
			p.wait(patience)
		}
	})
}

func TestReload(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		const strict = "host \"*\" {\n  deny {\n    when   = use.kind == \"exec\"\n    reason = \"strict\"\n  }\n}\n"
		first := w.hold() // without a file, and without its directory
		pid := w.mustStatus().PID
		denied := func() bool {
			t.Helper()
			r := w.ssh("box", "echo hi")
			if r.status != 0 && !strings.Contains(r.err, "denied by policy: strict") {
				t.Fatalf("%+v", r)
			}
			return r.status != 0
		}
		// A file that comes, changes and goes is noticed.
		w.policy(strict)
		eventually(t, "a new file is noticed", denied)
		w.policy("")
		eventually(t, "a changed file is noticed", func() bool { return !denied() })
		w.audited("allow control reload")

		// One that is gone may be on its way to be replaced.
		w.reload(strict)
		since := time.Now()
		if err := os.Remove(w.path("config/muxproxy/config.hcl")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a removed file is noticed", func() bool { return !denied() })
		if after := time.Since(since); after < 2*time.Second {
			t.Errorf("the defaults hold %v after the file has gone", after)
		}

		// A bad one is reported where it was asked for, all of it, and changes nothing.
		w.reload(strict)
		w.policy("mastr {\n}\nhost \"*\" {\n  share = 1\n}\n")
		r := w.mux("master", "reload")
		if r.status != 1 || !strings.Contains(r.err, `config.hcl:1:1: unknown block "mastr" in a policy file; did you mean "master"?`) ||
			!strings.Contains(r.err, "config.hcl:4:11: share") || !strings.Contains(r.err, "^") || strings.Contains(r.err, "\x1b") {
			t.Errorf("%+v", r)
		}
		if !denied() {
			t.Error("a bad file took the place of a good one")
		}
		r = w.mux("master", "reload", "--json")
		var answer struct {
			InForce     bool `json:"in_force"`
			Diagnostics []struct {
				Line    int
				Message string
			}
		}
		if err := json.Unmarshal([]byte(r.out), &answer); err != nil || r.status != 1 || answer.InForce || len(answer.Diagnostics) != 2 {
			t.Errorf("%v, %+v", err, r)
		}
		if log := w.masterLog(); !strings.Contains(log, `unknown block \"mastr\"`) {
			t.Error("nothing in the log")
		}

		// SIGHUP, for a file that nobody could have noticed.
		w.policy("")
		if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		eventually(t, "SIGHUP reloads", func() bool { return !denied() })

		// The policy in force judges the reload.
		w.policy("host \"*\" {\n  deny {\n    when   = use.kind == \"control\" && use.name == \"reload\"\n    reason = \"as it is\"\n  }\n}\n")
		eventually(t, "reloads are denied", func() bool {
			r := w.mux("master", "reload")
			return r.status == 255 && strings.Contains(r.err, "denied by policy: as it is")
		})
		w.policy(strict)
		if r := w.mux("master", "reload"); r.status != 255 {
			t.Errorf("%+v", r)
		}
		if denied() {
			t.Error("reloaded all the same")
		}
		w.audited("deny control reload policy")
		first.echo("still here")
		first.release()
	})
}

// Where no master runs, lock starts one, for the next ssh would; and what is locked can be opened without one.
func TestLockWithoutAMaster(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		if r := w.mux("unlock"); r.status != 1 || !strings.Contains(r.err, "no master runs") {
			t.Errorf("%+v", r)
		}
		want(t, w.mux("lock"), 0, "locked until `muxproxy unlock`\n")
		w.fails(t, []string{"denied by lock"}, "box", "true")
		w.stopMaster()
		if r := w.mux("doctor", "-F", w.conf); r.status != 0 || !strings.Contains(r.out, "begins locked") {
			t.Errorf("%+v", r)
		}
		want(t, w.mux("unlock"), 0, "unlocked\n")
		want(t, w.ssh("box", "echo open"), 0, "open\n")
	})
}

// A master without a readable policy does not start, and says why to whoever needs it.
func TestABadPolicyKeepsTheMasterFromStarting(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy("host \"*\" {\n  deny\n}\n")
		r := w.ssh("box", "echo hi")
		if r.status != 255 || !strings.Contains(r.err, "config.hcl:2:") || !strings.Contains(r.err, "MUXPROXY_BYPASS=1") {
			t.Errorf("%+v", r)
		}
		want(t, w.run(spec{args: w.sshArgs("box", "echo hi"), env: append([]string{"MUXPROXY_BYPASS=1"}, w.env...), null: true}), 0, "hi\n")
		w.policy("")
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
	})
}

func TestTheLock(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.newKey("key")
		agent := append([]string{"SSH_AUTH_SOCK=" + w.agentWith("agent.sock", "key")}, w.env...)
		remoteShell := w.start(spec{args: w.sshArgs("-A", "-o", "IdentityAgent=SSH_AUTH_SOCK", "-o", "IdentitiesOnly=yes", "box", "sh"), env: agent})
		askAgent := func(status string) {
			t.Helper()
			// Refused, it ends with 1, or by SIGPIPE if it had not asked yet.
			remoteShell.send("if ssh-add -l >/dev/null 2>&1; then echo status 0.; else echo status 1.; fi\n")
			remoteShell.expect("status " + status + ".")
		}
		askAgent("0")

		port, remote := freePort(t), freePort(t)
		echo := echoServer(t)
		p := w.sshStart("-L", fmt.Sprintf("127.0.0.1:%d:%s", port, echo), "-R", fmt.Sprintf("127.0.0.1:%d:%s", remote, echo), "box", "cat")
		p.echo("held")
		exchange(t, loopback(remote), "before")
		if r := w.mux("lock"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		if r := w.mux("lock"); r.status != 1 || !strings.Contains(r.err, "locked already") {
			t.Errorf("%+v", r)
		}
		refused := func(what string, port int) {
			t.Helper()
			c := dial(t, loopback(port))
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
				t.Errorf("%s: %d bytes, %v", what, n, err)
			}
		}
		denied := func() {
			t.Helper()
			if r := w.ssh("box", "echo hi"); r.status != 255 || !strings.Contains(r.err, "denied by lock: locked by `muxproxy lock`; run `muxproxy unlock`") {
				t.Errorf("%+v", r)
			}
		}
		denied()
		refused("-L", port)
		refused("-R", remote)
		askAgent("1") // no connection to it, so it signs nothing
		w.audited("deny agent lock")
		w.audited("deny local-forward lock")
		w.audited("deny remote-forward lock")
		p.echo("goes on")
		if r := w.mux("explain", "127.0.0.1", "id"); r.status != 1 || !strings.Contains(r.out, "lock: stops it now (person)") {
			t.Errorf("%+v", r)
		}
		// An edited file waits for the lock to open.
		w.policy(denyAll("shell"))
		eventually(t, "the log says that the file was left alone", func() bool { return strings.Contains(w.masterLog(), "the policy file is not read") })
		if r := w.mux("unlock"); r.status != 0 || r.out != "unlocked\n" {
			t.Errorf("%+v", r)
		}
		exchange(t, loopback(remote), "after")
		askAgent("0")
		remoteShell.release()
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
		eventually(t, "the edited file is in force", func() bool { return w.ssh("box").status == 255 })

		// Over a restart, with a passphrase.
		lock := w.run(spec{args: []string{binDir + "/muxproxy", "lock", "--passphrase"}, stdin: strings.NewReader("open sesame\n")})
		if lock.status != 0 {
			t.Fatalf("%+v", lock)
		}
		denied()
		if r := w.mux("close", "--all"); r.status != 0 {
			t.Errorf("%+v", r)
		}
		p.wait(patience)
		w.stopMaster()
		denied()
		unlock := func(passphrase string) result {
			return w.run(spec{args: []string{binDir + "/muxproxy", "unlock"}, stdin: strings.NewReader(passphrase)})
		}
		if r := unlock("open barley\n"); r.status != 1 || !strings.Contains(r.err, "not the passphrase") {
			t.Errorf("%+v", r)
		}
		denied()
		if r := unlock("open sesame\n"); r.status != 0 {
			t.Errorf("%+v", r)
		}
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
		all := w.masterLog() + w.read("state/muxproxy/audit.log")
		if strings.Contains(all, "sesame") || strings.Contains(all, "barley") {
			t.Error("a passphrase is in a log")
		}
	})
}

// What must be logged and can't be is denied.
func TestAnAuditThatIsRequired(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy("master {\n  audit          = \"required\"\n  audit_commands = \"full\"\n}\n")
		first := w.hold()
		w.ssh("box", "echo secret; true")
		if log := w.read("state/muxproxy/audit.log"); !strings.Contains(log, `"command":"echo secret; true"`) {
			t.Error("the command is not in the log")
		}
		if err := os.Remove(w.path("state/muxproxy/audit.log")); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(w.path("state/muxproxy/audit.log"), 0o700); err != nil {
			t.Fatal(err)
		}
		r := w.ssh("box", "echo hi")
		if r.status != 255 || !strings.Contains(r.err, "denied by audit: ") {
			t.Errorf("%+v", r)
		}
		if err := os.Remove(w.path("state/muxproxy/audit.log")); err != nil {
			t.Fatal(err)
		}
		w.reload("")
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
		first.release()
	})
}

func TestAnIdleMasterEnds(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy("master {\n  exit_when_idle = \"2s\"\n}\n")
		p := w.hold()
		pid := w.mustStatus().PID
		time.Sleep(3 * time.Second) // not idle: longer than it would take
		p.echo("still here")
		p.release()
		eventually(t, "the master has ended", func() bool { return gone(pid) })
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
	})
}

func TestPolicyCommands(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		file := w.path("config/muxproxy/config.hcl")
		if r := w.mux("config", "path"); r.status != 1 || r.out != file+"\n" {
			t.Errorf("%+v", r)
		}
		if r := w.mux("config", "check"); r.status != 0 || !strings.Contains(r.out, "the defaults hold") {
			t.Errorf("%+v", r)
		}
		w.policy(fmt.Sprintf(`master {
  ssh_config = %q
}
host "box" {
  deny {
    when   = use.program == "rm"
    reason = "no rm"
  }
  lane "bulk" {
    when = use.program == "tar"
  }
}
`, w.conf))
		if r := w.mux("config", "check"); r.status != 0 || r.out != file+": no problems\n" {
			t.Errorf("%+v", r)
		}
		bad := w.write("bad.hcl", "host {\n}\n")
		if r := w.run(spec{args: []string{binDir + "/muxproxy", "config", "check", "bad.hcl"}, null: true}); r.status != 1 ||
			!strings.HasPrefix(r.out, bad+":1:1: host lacks its patterns") {
			t.Errorf("%+v", r)
		}
		if r := w.mux("config", "show", "box"); r.status != 0 || !strings.Contains(r.out, "deny") || !strings.Contains(r.out, file+":5") ||
			!strings.Contains(r.out, "no rm when use.program == \"rm\"") {
			t.Errorf("%+v", r)
		}
		for _, c := range []struct {
			args   []string
			status int
			says   []string
		}{
			{[]string{"box"}, 0, []string{"127.0.0.1 (box)", file + ":4", "does not hold", "interactive", "allowed"}},
			{[]string{"root@box", "tar c ."}, 0, []string{`"bulk" holds: use.program == "tar"`, "allowed"}},
			{[]string{"box", "--kind", "exec", "rm -rf /"}, 1, []string{"denied by policy: no rm; see " + file + ":5"}},
			{[]string{"127.0.0.1", "rm x"}, 0, []string{"matches no host block"}},
			{[]string{"box", "--kind", "exce"}, 2, nil},
			{[]string{"-x"}, 2, nil},
		} {
			r := w.mux(append([]string{"explain"}, c.args...)...)
			if r.status != c.status {
				t.Errorf("%q: %+v", c.args, r)
			}
			for _, s := range c.says {
				if !strings.Contains(r.out, s) {
					t.Errorf("%q: no %q in\n%s", c.args, s, r.out)
				}
			}
		}
		if _, ok := w.status(); ok {
			t.Error("a command has started a master")
		}
	})
}

// A sandbox of the same user gets nothing from the master, unless policy lets it.
func TestACallerFromAnotherNamespace(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		unshare := []string{"unshare", "--mount"}
		if os.Geteuid() != 0 {
			unshare = []string{"unshare", "--user", "--map-current-user", "--mount"}
		}
		if r := w.run(spec{args: append(unshare, "true"), null: true}); r.status != 0 {
			t.Logf("this system makes no namespaces: %s", r.err)
			return
		}
		first := w.hold()
		foreign := func(args ...string) result { return w.run(spec{args: append(unshare, args...), null: true}) }
		r := foreign(w.sshArgs("box", "echo hi")...)
		if r.status != 255 || !strings.Contains(r.err, "namespace") || !strings.Contains(r.err, `foreign = "allow"`) {
			t.Errorf("%+v", r)
		}
		if r := foreign(binDir+"/muxproxy", "lock"); r.status != 255 || !strings.Contains(r.err, "namespace") {
			t.Errorf("%+v", r)
		}
		w.reload("master {\n  foreign = \"allow\"\n}\n")
		want(t, foreign(w.sshArgs("box", "echo hi")...), 0, "hi\n")
		w.connections(1)
		first.release()
	})
}
