//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

func TestPassphraseWrongThenRight(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		w.tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", w.path("locked"))
		w.allow(w.read("locked.pub"))
		conf := w.interactive("locked.conf", w.sshd, "IdentityFile "+w.path("locked"))
		const prompt = "Enter passphrase for key '"

		p := w.tty(conf, "box", "echo in")
		p.answer(prompt, "not this")
		p.answer(prompt, "open sesame")
		if r := p.ended(0, "in\r\n"); strings.Contains(r.out, "sesame") {
			t.Error("the passphrase was shown")
		}

		p = w.tty(conf, "box", "echo in")
		for range 3 {
			p.answer(prompt, "not this")
		}
		r := p.ended(255, "")
		if n := strings.Count(r.out, prompt); n != 3 {
			t.Errorf("asked %d times", n)
		}
		if w.mode != plain {
			oneLine(t, r)
		}
	})
}

func TestUnknownHostIsAskedAbout(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		w.write("host_ed25519.pub", publicKey("ed25519"))
		sum := strings.Fields(w.tool("ssh-keygen", "-l", "-f", w.path("host_ed25519.pub")))[1]
		const question, again = "(yes/no/[fingerprint])? ", "Please type 'yes', 'no' or the fingerprint: "
		name := fmt.Sprintf("[127.0.0.1]:%d", w.sshd)
		line := name + " " + publicKey("ed25519") + "\n"
		for n, c := range []struct {
			name    string
			answers []string
			status  int
			learnt  string
		}{
			{"yes", []string{"yes"}, 0, line},
			{"no", []string{"no"}, 255, ""},
			{"fingerprint", []string{sum}, 0, line},
			{"another fingerprint", []string{"SHA256:" + strings.Repeat("A", 43), "no"}, 255, ""},
			{"nonsense first", []string{"y", "YES"}, 0, line},
		} {
			known := fmt.Sprintf("asked%d", n)
			w.write(known, "")
			conf := w.interactive(known+".conf", w.sshd, "UserKnownHostsFile "+w.path(known)+"\nUpdateHostKeys no")
			p := w.tty(conf, "box", "echo in")
			shown := p.answer(question, c.answers[0])
			for _, part := range []string{"The authenticity of host '" + name, "can't be established", "ED25519 key fingerprint is " + sum} {
				if !strings.Contains(shown, part) {
					t.Errorf("%s: no %q in the question %q", c.name, part, shown)
				}
			}
			for _, a := range c.answers[1:] {
				p.answer(again, a)
			}
			shows := ""
			if c.status == 0 {
				shows = "in\r\n"
			}
			p.ended(c.status, shows)
			if got := w.read(known); got != c.learnt {
				t.Errorf("%s: known_hosts is %q", c.name, got)
			}
			if c.learnt != "" { // nobody is asked again
				want(t, w.noTTY(conf, "box", "echo in").wait(patience), 0, "in\n")
			}
		}
	})
}

func TestPasswordWrongThenRight(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		d, tried := w.passwordDoor("sesame")
		conf := w.interactive("password.conf", d.port(), "")
		prompt := me + "@127.0.0.1's password: "
		p := w.tty(conf, "box", "who")
		p.answer(prompt, "not this")
		p.answer(prompt, "sesame")
		if r := p.ended(0, "in as "+me); strings.Contains(r.out, "sesame") {
			t.Error("the password was shown")
		}
		if n := tried.Load(); n != 2 || d.count() != 1 {
			t.Errorf("%d tries in %d connections", n, d.count())
		}
		// As often as NumberOfPasswordPrompts says, and no more.
		for _, n := range []int{1, 2} {
			p := w.tty(w.interactive(fmt.Sprintf("prompts%d", n), d.port(), fmt.Sprintf("NumberOfPasswordPrompts %d", n)), "box", "who")
			for range n {
				p.answer(prompt, "not this")
			}
			if r := p.ended(255, ""); strings.Count(r.out, prompt) != n {
				t.Errorf("%d prompts, but NumberOfPasswordPrompts %d: %q", strings.Count(r.out, prompt), n, r.out)
			}
		}
		// Without a terminal nobody can be asked.
		r := w.noTTY(conf, "box", "who").wait(patience)
		want(t, r, 255, "")
		if w.mode != plain {
			oneLine(t, r)
		}
	})
}

func TestTwoStepCodeWithAndWithoutEcho(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		d := w.newDoor(&ssh.ServerConfig{
			KeyboardInteractiveCallback: func(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
				first, err := ask("", "Two steps", []string{"Account number: "}, []bool{true})
				if err != nil {
					return nil, err
				}
				second, err := ask("", "", []string{"Code A: ", "Code B: "}, []bool{false, true})
				if err != nil {
					return nil, err
				}
				if got := strings.Join(append(first, second...), ","); got != "visible 1,hidden,visible 2" {
					return nil, errors.New("wrong: " + got)
				}
				return nil, nil
			},
		})
		conf := w.interactive("steps.conf", d.port(), "")
		p := w.tty(conf, "box", "who")
		if shown := p.answer("Account number: ", "visible 1"); !strings.Contains(shown, "Two steps") {
			t.Errorf("no instruction in %q", shown)
		}
		p.answer("Code A: ", "hidden")
		p.answer("Code B: ", "visible 2")
		r := p.ended(0, "in as "+me)
		if !strings.Contains(r.out, "visible 1") || !strings.Contains(r.out, "visible 2") || strings.Contains(r.out, "hidden") {
			t.Errorf("echo is not as the server wants it: %q", r.out)
		}
		for _, words := range []string{"Two steps", "Account number: ", "Code A: ", "Code B: "} {
			if w.mode != plain && !strings.Contains(r.out, "server 127.0.0.1: "+words) {
				t.Errorf("%q is not said to be the server's: %q", words, r.out)
			}
		}
	})
}

func TestPartialSuccessKeyThenCode(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		signer, _ := w.newKey("step")
		d := w.newDoor(&ssh.ServerConfig{
			PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
				if string(key.Marshal()) != string(signer.PublicKey().Marshal()) {
					return nil, errors.New("wrong key")
				}
				return nil, &ssh.PartialSuccessError{Next: ssh.ServerAuthCallbacks{
					KeyboardInteractiveCallback: func(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
						answers, err := ask("", "", []string{"Code: "}, []bool{false})
						if err != nil || len(answers) != 1 || answers[0] != "123456" {
							return nil, errors.New("wrong code")
						}
						return nil, nil
					},
				}}
			},
		})
		p := w.tty(w.interactive("step.conf", d.port(), "IdentityFile "+w.path("step")), "box", "who")
		p.answer("Code: ", "000000")
		p.answer("Code: ", "123456")
		p.ended(0, "in as "+me)
		// The second step alone opens nothing.
		r := w.noTTY(w.interactive("nostep.conf", d.port(), ""), "box", "who").wait(patience)
		want(t, r, 255, "")
	})
}

// waiting waits until this many clients wait for logins.
func (w *world) waiting(n int) {
	w.t.Helper()
	eventually(w.t, fmt.Sprintf("%d clients wait", n), func() bool {
		s, _ := w.status()
		got := 0
		for _, u := range s.Upstreams {
			if u.State != "up" {
				got += u.Clients
			}
		}
		return got == n
	})
}

func TestTenClientsAskOnce(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		d, tried := w.passwordDoor("sesame")
		conf := w.interactive("ten.conf", d.port(), "")
		asked := w.tty(conf, "box", "who")
		asked.expect("password: ")
		var waiting []*proc
		for range 9 {
			waiting = append(waiting, w.noTTY(conf, "box", "who"))
		}
		w.waiting(10)
		for _, p := range waiting {
			select {
			case <-p.done:
				t.Fatalf("a client did not wait for the login: status %d, %s", p.res.status, p.res.err)
			default:
			}
		}
		asked.send("sesame\n")
		asked.ended(0, "in as "+me)
		for _, p := range waiting {
			want(t, p.wait(patience), 0, "in as "+me+"\n")
		}
		if d.count() != 1 || tried.Load() != 1 {
			t.Errorf("%d connections, %d passwords", d.count(), tried.Load())
		}
	})
}

func TestAQuestionGoesToTheNextIfTheAskedIsKilled(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		d, tried := w.passwordDoor("sesame")
		conf := w.interactive("killed.conf", d.port(), "")
		first := w.tty(conf, "box", "who")
		first.expect("password: ")
		dumb := w.noTTY(conf, "box", "who") // can't show it, but shares what comes of it
		w.waiting(2)
		second := w.tty(conf, "box", "who")
		w.waiting(3)
		if strings.Contains(second.out.String(), "password: ") {
			t.Error("two were asked at once")
		}
		kill9(first.pid())
		second.answer("password: ", "sesame")
		second.ended(0, "in as "+me)
		want(t, dumb.wait(patience), 0, "in as "+me+"\n")
		if d.count() != 1 || tried.Load() != 1 {
			t.Errorf("%d connections, %d passwords", d.count(), tried.Load())
		}
	})
}

func TestBatchModeIsNeverAsked(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		d, tried := w.passwordDoor("sesame")
		w.tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", w.path("locked"))
		w.allow(w.read("locked.pub"))
		w.write("empty", "")
		for name, conf := range map[string]string{
			"password":   w.interactive("batch1", d.port(), ""),
			"passphrase": w.interactive("batch2", w.sshd, "IdentityFile "+w.path("locked")),
			"host key":   w.interactive("batch3", w.sshd, "UserKnownHostsFile "+w.path("empty")),
		} {
			p := w.tty(conf, "-oBatchMode=yes", "box", "who")
			r := p.ended(255, "")
			for _, prompt := range []string{"password: ", "Enter passphrase", "(yes/no"} {
				if strings.Contains(r.out, prompt) {
					t.Errorf("%s: asked in %q", name, r.out)
				}
			}
			if w.mode != plain {
				oneLine(t, r)
			}
		}
		if tried.Load() != 0 {
			t.Error("a password was tried")
		}
	})
}

func TestVerboseShowsTheUpstreamsSteps(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		said := func(r result) string {
			var b strings.Builder
			for line := range strings.Lines(r.err) {
				if strings.HasPrefix(line, "muxproxy: ") {
					b.WriteString(line)
				}
			}
			return b.String()
		}
		r := w.ssh("-v", "box", "echo in")
		want(t, r, 0, "in\n")
		got := said(r)
		for _, step := range []string{"Connecting to 127.0.0.1", "Connection established", "Server host key: ", "kex: algorithm: ",
			"Offering public key: ", "Server accepts key: ", "Authenticated to 127.0.0.1"} {
			if strings.Count(got, step) != 1 {
				t.Errorf("%q is shown %d times in\n%s", step, strings.Count(got, step), got)
			}
		}
		if r := w.ssh("box", "echo in"); r.err != "" {
			t.Errorf("without -v: %q", r.err)
		}
	})
}

func TestBannerIsShownOnceAndEscaped(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		signer, _ := w.newKey("key")
		d := w.newDoor(&ssh.ServerConfig{
			BannerCallback: func(ssh.ConnMetadata) string { return "Welcome \x1b[31mred\nsecond line\r\n" },
			PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
				if string(key.Marshal()) != string(signer.PublicKey().Marshal()) {
					return nil, errors.New("wrong key")
				}
				return nil, nil
			},
		})
		conf := w.interactive("banner.conf", d.port(), "IdentityFile "+w.path("key"))
		r := w.noTTY(conf, "box", "who").wait(patience)
		want(t, r, 0, "in as "+me+"\n")
		if strings.Count(r.err, "Welcome ") != 1 || strings.Count(r.err, "second line") != 1 || strings.Contains(r.err, "\x1b") {
			t.Errorf("shown: %q", r.err)
		}
		for _, quiet := range []string{"-oLogLevel=ERROR", "-q"} {
			r = w.noTTY(conf, quiet, "box", "who").wait(patience)
			want(t, r, 0, "in as "+me+"\n")
			if r.err != "" {
				t.Errorf("with %s: %q", quiet, r.err)
			}
		}
	})
}

// The user name is the user's own business.
func TestUserNamesWithOddCharacters(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		d := w.newDoor(&ssh.ServerConfig{NoClientAuth: true})
		for _, user := range []string{"a@example.com", `DOMAIN\user`, "a:b", "a b", "%u"} {
			conf := w.interactive("user.conf", d.port(), "")
			want(t, w.noTTY(conf, "-l", user, "box", "who").wait(patience), 0, "in as "+user+"\n")
		}
		for _, user := range []string{"a@example.com", `DOMAIN\user`} {
			conf := w.interactive("user.conf", d.port(), "")
			want(t, w.noTTY(conf, user+"@box", "who").wait(patience), 0, "in as "+user+"\n")
		}
	})
}

// Who dials first need not be who is asked.
func TestAQuestionPassesByWhoCanNotAnswer(t *testing.T) {
	for name, options := range map[string][]string{"no terminal": nil, "BatchMode": {"-oBatchMode=yes"}} {
		t.Run(name, func(t *testing.T) {
			forPipes(t, func(t *testing.T, w *world) {
				if !muxproxyOnly(t) {
					return
				}
				d, tried := w.passwordDoor("sesame")
				front := newLink(t, d.ln.Addr().String())
				w.append("known_hosts", knownHosts(front.port()))
				conf := w.interactive("pass.conf", front.port(), "")
				front.stall(true)
				first := w.noTTY(conf, append(options, "box", "who")...)
				w.waiting(1)
				second := w.tty(conf, "box", "who")
				w.waiting(2)
				front.stall(false)
				second.answer("password: ", "sesame")
				second.ended(0, "in as "+me)
				want(t, first.wait(patience), 0, "in as "+me+"\n")
				if d.count() != 1 || tried.Load() != 1 {
					t.Errorf("%d connections, %d passwords", d.count(), tried.Load())
				}
			})
		})
	}
}

func TestAnUnlockedKeyIsAddedToTheAgent(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		w.tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", w.path("locked"))
		w.allow(w.read("locked.pub"))
		socket := w.agentWith("agent.sock")
		conf := w.interactive("add.conf", w.sshd, "IdentityFile "+w.path("locked")+"\nIdentityAgent "+socket+"\nAddKeysToAgent yes")
		p := w.tty(conf, "box", "echo in")
		p.answer("Enter passphrase for key '", "open sesame")
		p.ended(0, "in\r\n")
		list := w.run(spec{args: []string{"ssh-add", "-L"}, env: append([]string{"SSH_AUTH_SOCK=" + socket}, w.env...), null: true})
		if key := strings.Fields(w.read("locked.pub"))[1]; !strings.Contains(list.out, key) {
			t.Errorf("the agent has %q", list.out)
		}
		want(t, w.noTTY(conf, "box", "echo in").wait(patience), 0, "in\n")
	})
}
