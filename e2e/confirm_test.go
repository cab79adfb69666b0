//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// asked is a world whose askpass program is a script that writes down what it is asked and does what the file "answer"
// says.
func asked(s *setup) { s.env["DISPLAY"] = ":77" }

// confirms is a policy that asks by that script, on the display of whoever asks: no session here is graphical.
func (w *world) confirms(lines string) string {
	w.t.Helper()
	if _, err := os.Stat(w.path("askpass")); err != nil {
		w.script("askpass", fmt.Sprintf("#!/bin/sh\ncd %s\nenv >env\necho $$ >pid\nprintf '%%s\\n====\\n' \"$1\" >>asked\n. ./answer\n", w.dir))
		w.write("asked", "")
		w.answers("exit 0")
	}
	return fmt.Sprintf("plugin \"confirm\" {\n  askpass = %q\n}\nhost \"127.0.0.1\" {\n  confirm {\n    display = \"caller\"\n%s\n  }\n}\n",
		w.path("askpass"), lines)
}

// answers says what the person does next.
func (w *world) answers(script string) { w.write("answer", script) }

// prompts returns what the person was asked since the last time.
func (w *world) prompts() []string {
	w.t.Helper()
	text := w.read("asked")
	w.write("asked", "")
	all := strings.Split(text, "\n====\n")
	return all[:len(all)-1]
}

// dialog waits for a dialog that stays open, and returns its process.
func (w *world) dialog() int {
	w.t.Helper()
	pid := 0
	eventually(w.t, "a dialog is open", func() bool {
		b, _ := os.ReadFile(w.path("pid"))
		text, whole := strings.CutSuffix(string(b), "\n")
		n, err := strconv.Atoi(text)
		pid = n
		return whole && err == nil && !gone(pid)
	})
	return pid
}

// grants are what `muxproxy confirm grants` shows.
func (w *world) grants() (list []struct {
	ID, Host, Kind, Process, Lasts, Policy string
	PID                                    int
}) {
	w.t.Helper()
	r := w.mux("confirm", "grants", "--json")
	if err := json.Unmarshal([]byte(r.out), &list); r.status != 0 || err != nil {
		w.t.Fatalf("confirm grants: %+v, %v", r, err)
	}
	return list
}

func (w *world) refused(r result, status int, line string) {
	w.t.Helper()
	if r.status != status || r.out != "" || !strings.Contains(r.err, line) {
		w.t.Errorf("status %d (want %d), stdout %q, stderr %q has no %q", r.status, status, r.out, r.err, line)
	}
}

// A person is asked what it is exactly, by whom and where; the answer counts, and the line of a denial says which it was.
func TestConfirm(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy(w.confirms("    timeout = \"20s\""))
		r := w.ssh("box", "echo 'it is'")
		want(t, r, 0, "it is\n")
		if !strings.Contains(r.err, "confirm: asking you on your screen, at most 20s") {
			t.Errorf("the terminal does not say what is waited for: %q", r.err)
		}
		list := w.prompts()
		if len(list) != 1 {
			t.Fatalf("%q", list)
		}
		for _, line := range []string{
			"muxproxy: allow this use of a shared SSH connection?\n\nasked by: ", fmt.Sprintf("\nhost: %s@127.0.0.1:%d (box)\n", me, w.link.port()),
			"\nexec: echo 'it is'\n", "\nYes counts for this one",
		} {
			if !strings.Contains("\n"+list[0], line) {
				t.Errorf("%q is not in:\n%s", line, list[0])
			}
		}
		for _, v := range []string{"DISPLAY=:77", "SSH_ASKPASS_PROMPT=confirm"} {
			if env := w.read("env"); !strings.Contains("\n"+env, "\n"+v+"\n") {
				t.Errorf("no %s in %q", v, env)
			}
		}

		w.answers("echo 'cannot open display' >&2; exit 1")
		for _, c := range []struct {
			kind   string
			prompt string
			run    func() result
			status int
		}{
			{"exec", "exec: echo a\\n\\x1b[2Jhost: b", func() result { return w.ssh("box", "echo a\n\x1b[2Jhost: b") }, 255},
			{"shell", "shell: a shell", func() result { return w.ssh("box") }, 255},
			{"subsystem", "subsystem: sftp", func() result {
				return w.run(spec{args: []string{"sftp", "-F", w.conf, "-b", "/dev/null", "box"}, null: true})
			}, 255},
			{"local-forward", "local-forward: to 127.0.0.1:1", func() result { return w.ssh("-W", "127.0.0.1:1", "box") }, 255},
		} {
			w.reload(w.confirms("    timeout = \"20s\"\n    on = [\"" + c.kind + "\"]")) // and nobody rests
			r := c.run()
			w.refused(r, c.status, "denied by confirm: the answer was no (askpass: cannot open display); try again to be asked again")
			if list := w.prompts(); len(list) != 1 || !strings.Contains(list[0], "\n"+c.prompt+"\n") {
				t.Errorf("%s: %q", c.kind, list)
			}
			w.audited("deny " + c.kind + " confirm")
			w.restart()
		}
		w.reload(w.confirms("    on = [\"remote-forward\"]"))
		port := freePort(t)
		r = w.ssh("-R", fmt.Sprintf("127.0.0.1:%d:127.0.0.1:1", port), "box", "echo on")
		if r.status != 0 || r.out != "on\n" || !strings.Contains(r.err, "denied by confirm: the answer was no") {
			t.Errorf("-R: %+v", r)
		}
		if list := w.prompts(); len(list) != 1 || !strings.Contains(list[0], fmt.Sprintf("\nremote-forward: listen there on 127.0.0.1:%d\n", port)) {
			t.Errorf("-R: %q", list)
		}
	}, asked)
}

// restart ends the plugin; the master starts it again, and nobody has to rest.
func (w *world) restart() {
	w.t.Helper()
	before := w.plugins()[0]
	kill9(before.PID)
	eventually(w.t, "the plugin is up again", func() bool {
		p := w.plugins()
		return len(p) == 1 && p[0].State == "up" && p[0].PID != before.PID
	})
}

// A dialog ends with its time, with the client, and with the plugin.
func TestADialogEnds(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy(w.confirms("    timeout = \"1s\""))
		w.answers("sleep 1000; exit 0")
		r := w.ssh("box", "echo hi")
		w.refused(r, 255, "denied by confirm: no answer in 1s; try again, or raise timeout in ")
		if !strings.Contains(r.err, "config.hcl:5\n") {
			t.Errorf("%q does not say where", r.err)
		}
		pid := w.dialog0()
		eventually(t, "the dialog is gone", func() bool { return gone(pid) })

		w.restart()
		w.reload(w.confirms("    timeout = \"10m\""))
		for _, end := range []func(*proc){
			func(p *proc) { p.signal(syscall.SIGKILL) },
			func(*proc) { kill9(w.plugins()[0].PID) },
			func(*proc) { w.mux("lock") },
		} {
			os.Remove(w.path("pid"))
			p := w.sshStart("box", "echo hi")
			pid := w.dialog()
			kids := children(pid)
			end(p)
			if r := p.wait(patience); r.out != "" || r.status == 0 {
				t.Errorf("%+v", r)
			}
			eventually(t, "the dialog is gone", func() bool { return gone(pid) })
			for _, kid := range kids {
				kill9(kid) // of a plugin that was killed it may be left
			}
			eventually(t, "the plugin is up", func() bool {
				p := w.plugins()
				return len(p) == 1 && p[0].State == "up"
			})
		}
		w.refused(w.ssh("box", "echo hi"), 255, "denied by lock")
		w.mux("unlock")
		os.Remove(w.path("pid"))
		p := w.sshStart("box", "echo hi")
		pid = w.dialog()
		kids := children(pid)
		kill9(w.mustStatus().PID)
		p.wait(patience)
		eventually(t, "the dialog is gone, and what it has started", func() bool {
			return gone(pid) && !slices.ContainsFunc(kids, func(kid int) bool { return !gone(kid) })
		})
		w.answers("exit 0")
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
	}, asked)
}

// dialog0 is the process of the last dialog, open or not.
func (w *world) dialog0() int {
	w.t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(w.read("pid")))
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

// A burst is one question, a yes counts as long as policy says, and not over the lock or the plugin's end.
func TestAnswersThatCount(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy(w.confirms(""))
		if err := syscall.Mkfifo(w.path("fifo"), 0o600); err != nil {
			t.Fatal(err)
		}
		w.answers("read a <fifo; exit 0")
		var all sync.WaitGroup
		var waiting []*proc
		for i := range 8 {
			waiting = append(waiting, w.sshStart("box", fmt.Sprint("echo ", i)))
		}
		for _, p := range waiting {
			p.expectErr("confirm: asking you on your screen")
		}
		w.write("fifo", "go\n")
		for i, p := range waiting {
			all.Go(func() {
				p.in.Close()
				if r := p.wait(patience); r.status != 0 || r.out != fmt.Sprint(i, "\n") {
					t.Errorf("%+v", r)
				}
			})
		}
		all.Wait()
		if list := w.prompts(); len(list) != 1 || !strings.Contains(list[0], "and for every exec there from e2e.test (") {
			t.Errorf("%q", list)
		}

		w.answers("exit 0")
		w.reload(w.confirms("    remember = \"1h\""))
		exec := func(questions int) {
			t.Helper()
			want(t, w.ssh("box", "echo hi"), 0, "hi\n")
			if list := w.prompts(); len(list) != questions {
				t.Errorf("%d questions, not %d: %q", len(list), questions, list)
			}
		}
		exec(1)
		exec(0)
		list := w.grants()
		if len(list) != 1 || list[0].Host != fmt.Sprintf("%s@127.0.0.1:%d", me, w.link.port()) || list[0].Kind != "exec" || list[0].PID != os.Getpid() ||
			!strings.HasSuffix(list[0].Policy, "config.hcl:5") {
			t.Errorf("%+v", list)
		}
		want(t, w.mux("confirm", "forget", list[0].ID), 0, "")
		exec(1)
		w.mux("lock")
		w.mux("unlock")
		eventually(t, "the lock has ended what counted", func() bool { return len(w.grants()) == 0 })
		exec(1)
		w.restart()
		if list := w.grants(); len(list) != 0 {
			t.Errorf("after a crash: %+v", list)
		}
		exec(1)
		if r := w.mux("confirm", "grants"); r.status != 0 || !strings.Contains(r.out, " exec  e2e.test (") {
			t.Errorf("%+v", r)
		}
		want(t, w.mux("confirm", "forget"), 0, "1 forgotten\n")
		w.reload(w.confirms("    ask = \"first\""))
		held := w.hold()
		w.prompts()
		exec(0)
		held.release()
		eventually(t, "it has ended with the connection", func() bool { return len(w.grants()) == 0 })
		for _, bad := range []struct{ lines, want string }{
			{"    idle = \"1m\"", `config.hcl:7:12: confirm: idle is for ask = "after-idle", not for "always"`},
			{"    on = [\"exec\", \"shall\"]", `config.hcl:7:19: on in confirm can't be "shall"; did you mean "shell"?`},
		} {
			w.policy(w.confirms(bad.lines))
			if r := w.mux("master", "reload"); r.status != 1 || !strings.Contains(r.err, bad.want) {
				t.Errorf("%+v, want %s", r, bad.want)
			}
			if r := w.mux("config", "check"); r.status != 1 || !strings.Contains(r.out+r.err, bad.want) {
				t.Errorf("%+v, want %s", r, bad.want)
			}
		}
	}, asked)
}

// Without a display: one line, or `muxproxy allow` and `deny`, or the client's own terminal.
func TestNoDisplay(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy(w.confirms("    fallback = \"deny\""))
		w.refused(w.ssh("box", "echo hi"), 255, "denied by confirm: nobody can be asked: whoever asks has no display; sit down at a graphical session, "+
			"or set fallback = \"pending\" in ")

		w.reload(w.confirms("    fallback = \"pending\"\n    remember = \"1h\""))
		for _, answer := range []string{"allow", "deny"} {
			first, second := w.sshStart("box", "echo done"), w.sshStart("box", "echo done")
			first.expectErr("confirm: answer with `muxproxy allow ")
			second.expectErr("confirm: answer with `muxproxy allow ")
			var list []struct{ ID, Plugin, Kind string }
			if r := w.mux("pending", "--json"); json.Unmarshal([]byte(r.out), &list) != nil || len(list) != 2 || list[0].Plugin != "confirm" {
				t.Fatalf("pending: %+v", r)
			}
			if r := w.mux(answer, list[0].ID); r.status != 0 {
				t.Errorf("%s: %+v", answer, r)
			}
			for _, p := range []*proc{first, second} { // one question
				p.in.Close()
				if r := p.wait(patience); answer == "allow" {
					want(t, r, 0, "done\n")
				} else {
					w.refused(r, 255, "denied by confirm: ")
				}
			}
			if answer == "allow" {
				want(t, w.ssh("box", "echo counts"), 0, "counts\n")
				want(t, w.mux("confirm", "forget"), 0, "1 forgotten\n")
			}
		}

		w.restart()
		w.reload(w.confirms("    fallback = \"terminal\""))
		w.refused(w.ssh("box", "echo hi"), 255, "denied by confirm: nobody can be asked: whoever asks has no display; run ssh in a terminal, without BatchMode")
		args := w.sshArgs("-o", "BatchMode=no", "box", "echo hi; echo there")
		p := w.start(spec{args: args, tty: true})
		shown := p.answer("[yes/no] ", "perhaps")
		if !strings.Contains(shown, "muxproxy: confirm: allow ssh (") || !strings.Contains(shown, "It claims to be: ssh -F ") {
			t.Errorf("%q", shown)
		}
		p.answer("please type yes or no: ", "YES")
		p.ended(0, "hi\r\nthere\r\n")
		p = w.start(spec{args: args, tty: true})
		p.answer("[yes/no] ", "no")
		p.ended(255, "denied by confirm: the answer was no")

		// A yes there is no login, which would stand for what another block asks about.
		w.restart()
		w.reload(w.confirms("    on = [\"attach\"]\n    fallback = \"terminal\"\n    when = use.kind == \"attach\"\n  }\n" +
			"  confirm {\n    display = \"caller\""))
		p = w.start(spec{args: args, tty: true})
		p.answer("[yes/no] ", "yes")
		p.ended(255, "denied by confirm: nobody can be asked: whoever asks has no display")
	})
}

// Who has just typed the passphrase of a login is not asked for the use that it was for; everybody else is.
func TestWhoLogsInIsNotAsked(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", w.path("locked"))
		w.allow(w.read("locked.pub"))
		conf := w.interactive("locked.conf", w.sshd, "IdentityFile "+w.path("locked"))
		w.policy(w.confirms(""))
		p := w.tty(conf, "box", "echo in; read end")
		p.answer("Enter passphrase for key '", "open sesame")
		p.expect("in\r\n")
		if list := w.prompts(); len(list) != 0 {
			t.Errorf("%q", list)
		}
		want(t, w.noTTY(conf, "box", "echo next").wait(patience), 0, "next\n")
		if list := w.prompts(); len(list) != 1 {
			t.Errorf("%d questions for the next client", len(list))
		}
		p.send("\r")
		p.wait(patience)
	}, asked)
}

// What comes through a forward that stands is asked about, too.
func TestForwardedConnectionsAreAskedAbout(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy(w.confirms("    on = [\"local-forward\"]\n    timeout = \"10m\""))
		port := freePort(t)
		p := w.sshStart("-N", "-L", fmt.Sprintf("127.0.0.1:%d:127.0.0.1:%d", port, w.sshd), "box")
		eventually(t, "it listens", func() bool { c, err := net.Dial("tcp", loopback(port)); closeAll(c); return err == nil })
		eventually(t, "the first one was asked about", func() bool { return len(w.prompts()) > 0 })
		w.answers("exit 1")
		c := dial(t, loopback(port))
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		for b := make([]byte, 64); ; {
			if _, err := c.Read(b); err != nil {
				break
			}
		}
		p.expectErr("denied by confirm: the answer was no")
		p.signal(syscall.SIGKILL)
		p.wait(patience)
	}, asked)
}

func closeAll(c net.Conn) {
	if c != nil {
		c.Close()
	}
}
