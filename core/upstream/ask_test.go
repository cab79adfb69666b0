package upstream

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// person answers by script, and is nobody when that is at its end.
type person struct {
	mu      sync.Mutex // guards the rest
	answers []string
	asked   []pool.Question
}

func answering(answers ...string) *person { return &person{answers: answers} }

func (p *person) Ask(_ context.Context, q pool.Question) ([]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, q)
	if len(p.answers) < len(q.Prompts) {
		return nil, pool.ErrNobody
	}
	out := slices.Clone(p.answers[:len(q.Prompts)])
	p.answers = p.answers[len(q.Prompts):]
	return out, nil
}

// transcript is what was asked: TITLE|TEXT|PROMPT, with a * after a prompt that is echoed.
func (p *person) transcript() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for _, q := range p.asked {
		line := q.Title + "|" + q.Text
		for _, prompt := range q.Prompts {
			line += "|" + prompt.Text
			if prompt.Echo {
				line += "*"
			}
		}
		out = append(out, line)
	}
	return out
}

// told collects what a spec's callbacks get.
type told struct {
	mu     sync.Mutex // guards the rest
	banner []string
	say    []string
	debug  []string
}

func listening(sp *pool.Spec) *told {
	h := &told{}
	add := func(to *[]string) func(string) {
		return func(s string) {
			h.mu.Lock()
			*to = append(*to, s)
			h.mu.Unlock()
		}
	}
	sp.Banner, sp.Say, sp.Debug = add(&h.banner), add(&h.say), add(&h.debug)
	return h
}

func (h *told) get(what *[]string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(*what)
}

// dialAsking dials with somebody there; the connection is nil if it failed, and the line is why.
func dialAsking(t *testing.T, sp pool.Spec, ask pool.Asker) (pool.Conn, string) {
	t.Helper()
	c, err := (&Dialer{}).Dial(t.Context(), sp, ask)
	if err != nil {
		if strings.ContainsAny(err.Error(), "\n\r\x1b") {
			t.Errorf("not a line for a person: %q", err)
		}
		return nil, err.Error()
	}
	serve(t, c)
	return c, ""
}

func contains(t *testing.T, got string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(got, part) {
			t.Errorf("%q is not in %q", part, got)
		}
	}
}

func TestUnknownHost(t *testing.T) {
	user, host, other := newKey(t, "ed25519"), newKey(t, "ed25519"), newKey(t, "ecdsa")
	s := startSSHD(t, host, []key{user})
	id := "identityfile " + user.file(t, s.dir, "id", "")
	name := fmt.Sprintf("[127.0.0.1]:%d", s.port)
	sum := ssh.FingerprintSHA256(host.pub)
	const again = "muxproxy||Please type 'yes', 'no' or the fingerprint: *"
	authenticity := "muxproxy|The authenticity of host '" + name + fmt.Sprintf(" (127.0.0.1:%d)", s.port) + "' can't be established"
	for _, tc := range []struct {
		name    string
		answers []string
		options []string
		before  string
		asked   []string // the beginnings of the questions
		fails   string
		learnt  string // a regular expression for what the file gains
		said    string
	}{
		{name: "yes", answers: []string{"yes"}, asked: []string{authenticity + ".\nED25519 key fingerprint is " + sum +
			".\nThis key is not known by any other names.|Are you sure you want to continue connecting (yes/no/[fingerprint])? *"},
			learnt: regexp.QuoteMeta(name + " " + host.line()), said: "Permanently added '" + name + "' (ED25519) to the list of known hosts."},
		{name: "the fingerprint", answers: []string{sum}, asked: []string{authenticity}, learnt: regexp.QuoteMeta(name + " " + host.line())},
		{name: "after another word", answers: []string{"y", "SHA256:AAAA", " YES "}, asked: []string{authenticity, again, again},
			learnt: regexp.QuoteMeta(name + " " + host.line())},
		{name: "no", answers: []string{"No"}, asked: []string{authenticity}, fails: "host key ED25519 " + sum + " was not accepted"},
		{name: "empty", answers: []string{""}, asked: []string{authenticity}, fails: "was not accepted"},
		{name: "nobody", asked: []string{authenticity}, fails: "host key is unknown (ED25519 " + sum + "); check it, then add it with: MUXPROXY_BYPASS=1 ssh box"},
		{name: "BatchMode", options: []string{"batchmode yes"}, asked: []string{authenticity}, fails: "BatchMode=yes forbids asking"},
		{name: "StrictHostKeyChecking yes", answers: []string{"yes"}, options: []string{"stricthostkeychecking true"}, fails: "StrictHostKeyChecking is yes"},
		{name: "accept-new", options: []string{"stricthostkeychecking accept-new"}, learnt: regexp.QuoteMeta(name + " " + host.line())},
		{name: "KnownHostsCommand", options: []string{"stricthostkeychecking accept-new", "knownhostscommand /x"}, fails: "KnownHostsCommand can't be asked"},
		{name: "no checking", options: []string{"stricthostkeychecking false"}, learnt: regexp.QuoteMeta(name + " " + host.line())},
		{name: "hashed", options: []string{"stricthostkeychecking accept-new", "hashknownhosts yes"},
			learnt: `\|1\|[A-Za-z0-9+/]{27}=\|[A-Za-z0-9+/]{27}= ` + regexp.QuoteMeta(host.line())},
		{name: "HostKeyAlias", options: []string{"stricthostkeychecking accept-new", "hostkeyalias Other"}, learnt: "other " + regexp.QuoteMeta(host.line())},
		{name: "no newline at the end", before: "x", options: []string{"stricthostkeychecking accept-new"}, learnt: "\n" + regexp.QuoteMeta(name+" "+host.line())},
		{name: "another type is known", before: name + " " + other.line(), answers: []string{"yes"}, fails: "HOST KEY HAS CHANGED"},
		{name: "other names", before: "a,b " + host.line() + knownhosts.HashHostname("c") + " " + host.line(), answers: []string{"no"},
			asked: []string{authenticity + ".\nED25519 key fingerprint is " + sum + ".\nThis host key is known by the following other names/addresses:\n    FILE:1: a,b\n    FILE:2: [hashed name]|"},
			fails: "was not accepted"},
		{name: "name of an alias that can't be written", options: []string{"stricthostkeychecking accept-new", "hostkeyalias a*b"},
			said: `Failed to add the host to the list of known hosts (FILE): "a*b" can't be written as a host name`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), ".ssh")
			file := filepath.Join(dir, "known")
			if tc.before != "" {
				check(t, os.Mkdir(dir, 0o700))
				write(t, dir, "known", tc.before)
			}
			sp := spec(t, s.port, append(tc.options, id, "userknownhostsfile "+file)...)
			heard := listening(&sp)
			p := answering(tc.answers...)
			c, line := dialAsking(t, sp, p)
			if (tc.fails == "") != (c != nil) {
				t.Fatalf("got %v, %q", c, line)
			}
			contains(t, line, tc.fails)
			asked := p.transcript()
			for i := range asked {
				want := ""
				if i < len(tc.asked) {
					want = strings.ReplaceAll(tc.asked[i], "FILE", shortPath(file))
				}
				if want == "" || !strings.HasPrefix(asked[i], want) {
					t.Errorf("asked %q\nwant  %q", asked[i], want)
				}
			}
			if len(asked) != len(tc.asked) {
				t.Errorf("asked %d times", len(asked))
			}
			if c != nil && c.Server().Answered {
				t.Error("a yes to the host's key has logged in")
			}
			text, _ := os.ReadFile(file)
			if !regexp.MustCompile("^" + tc.learnt + "$").MatchString(strings.TrimPrefix(string(text), tc.before)) {
				t.Errorf("the file has %q", text)
			}
			if tc.said != "" {
				contains(t, strings.Join(heard.get(&heard.say), "\n"), strings.ReplaceAll(tc.said, "FILE", shortPath(file)))
			}
			if tc.learnt != "" {
				info, err := os.Stat(file)
				check(t, err)
				if info.Mode().Perm() != 0o600 {
					t.Errorf("mode %v", info.Mode())
				}
				// Now it is known to the strictest.
				sp.Config.Options["stricthostkeychecking"] = []string{"yes"}
				dial(t, sp)
				check(t, c.(pool.HostKeyKeeper).HostKeyStillGood(sp))
			}
		})
	}
}

// Where nobody has to log in, a yes to the host's key has not done so either.
func TestNobodyLogsIn(t *testing.T) {
	f := passwordServer(t, &ssh.ServerConfig{NoClientAuth: true})
	c, line := dialAsking(t, spec(t, f.port, "stricthostkeychecking ask", "userknownhostsfile "+filepath.Join(t.TempDir(), "known")), answering("yes"))
	if c == nil || c.Server().Auth != "none" || c.Server().Answered {
		t.Errorf("got %v, %q", c, line)
	}
}

// What can't be written is accepted all the same, for the clients of that connection.
func TestUnknownHostNotWritten(t *testing.T) {
	f := startFake(t, openServer(), newKey(t, "ed25519").signer)
	for _, file := range []string{"/dev/null", filepath.Join(t.TempDir(), "no", "folder")} {
		sp := spec(t, f.port, "userknownhostsfile "+file, "stricthostkeychecking ask")
		heard := listening(&sp)
		c, line := dialAsking(t, sp, answering("yes"))
		if c == nil {
			t.Fatal(line)
		}
		<-f.conns
		if said := strings.Join(heard.get(&heard.say), "\n"); file != "/dev/null" {
			contains(t, said, "Failed to add the host to the list of known hosts ("+shortPath(file)+"): no such file or directory")
		}
		check(t, c.(pool.HostKeyKeeper).HostKeyStillGood(sp))
		sp.Config.Options["stricthostkeychecking"] = []string{"yes"}
		if err := c.(pool.HostKeyKeeper).HostKeyStillGood(sp); err == nil {
			t.Error("a strict client may ride")
		}
	}
}

func TestHostKeyStillGood(t *testing.T) {
	host, other := newKey(t, "ed25519"), newKey(t, "ed25519")
	f := startFake(t, openServer(), host.signer)
	dir := t.TempDir()
	name := fmt.Sprintf("[127.0.0.1]:%d ", f.port)
	known := write(t, dir, "known", name+host.line())
	sp := spec(t, f.port, "userknownhostsfile "+known)
	c := dial(t, sp)
	<-f.conns
	keeper := c.(pool.HostKeyKeeper)
	check(t, keeper.HostKeyStillGood(sp))
	for _, tc := range []struct{ text, want string }{
		{name + other.line(), "HOST KEY HAS CHANGED"},
		{name + host.line() + "@revoked * " + host.line(), "marked as revoked"},
		{"", "host key is unknown"},
		{name + host.line(), ""},
	} {
		for range 2 { // the second time from memory
			check(t, os.WriteFile(known+"-new", []byte(tc.text), 0o600))
			check(t, os.Rename(known+"-new", known))
			err := keeper.HostKeyStillGood(sp)
			if (err == nil) != (tc.want == "") {
				t.Errorf("%q: %v", tc.want, err)
			} else if err != nil {
				contains(t, err.Error(), tc.want)
			}
		}
	}
}

func TestPassphrase(t *testing.T) {
	good, bad, certified, ca := newKey(t, "ed25519"), newKey(t, "ed25519"), newKey(t, "ed25519"), newKey(t, "ed25519")
	plain := newKey(t, "ed25519")
	old, err := rsa.GenerateKey(rand.Reader, 2048)
	check(t, err)
	unknown, err := rsa.GenerateKey(rand.Reader, 2048)
	check(t, err)
	oldSigner, err := ssh.NewSignerFromKey(old)
	check(t, err)
	dir := t.TempDir()
	s := startSSHD(t, newKey(t, "ed25519"), []key{good, plain, {pub: oldSigner.PublicKey()}}, "TrustedUserCAKeys "+write(t, dir, "ca.pub", ca.line()))
	locked := good.file(t, dir, "locked", "secret")
	useless := bad.file(t, dir, "useless", "secret")
	open := plain.file(t, dir, "open", "")
	pair := certified.file(t, dir, "pair", "secret")
	write(t, dir, "pair-cert.pub", string(ssh.MarshalAuthorizedKey(ca.certify(t, certified.pub, ssh.UserCert, 0, me(t)))))
	//lint:ignore SA1019 ssh still reads keys in this format, so they have to be read here
	block, err := x509.EncryptPEMBlock(rand.Reader, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(old), []byte("secret"), x509.PEMCipherAES128)
	check(t, err)
	oldFile := write(t, dir, "old", string(pem.EncodeToMemory(block)))
	//lint:ignore SA1019 as above; such a file does not say what its public half is
	block, err = x509.EncryptPEMBlock(rand.Reader, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(unknown), []byte("secret"), x509.PEMCipherAES128)
	check(t, err)
	bare := write(t, dir, "bare", string(pem.EncodeToMemory(block)))
	t.Setenv("HOME", "/nonexistent")
	prompt := func(path string) string { return "muxproxy||Enter passphrase for key '" + path + "': " }

	for _, tc := range []struct {
		name    string
		options []string
		answers []string
		asked   []string
		auth    string
		others  bool // what a person has answered was not what logged in
		fails   []string
	}{
		{name: "right", options: []string{"identityfile " + locked}, answers: []string{"secret"}, asked: []string{prompt(locked)}, auth: fingerprint(good.pub)},
		{name: "wrong, then right", options: []string{"identityfile " + locked}, answers: []string{"wrong", "secret"},
			asked: []string{prompt(locked), prompt(locked)}, auth: fingerprint(good.pub)},
		{name: "always wrong", options: []string{"identityfile " + locked}, answers: []string{"a", "b", "c", "secret"},
			asked: []string{prompt(locked), prompt(locked), prompt(locked)}, fails: []string{"wrong passphrase for " + locked}},
		{name: "one try", options: []string{"identityfile " + locked, "numberofpasswordprompts 1"}, answers: []string{"a", "secret"},
			asked: []string{prompt(locked)}, fails: []string{"wrong passphrase for " + locked}},
		{name: "empty", options: []string{"identityfile " + locked, "identityfile " + oldFile}, answers: []string{"", "secret"},
			asked: []string{prompt(locked), prompt(oldFile)}, auth: fingerprint(oldSigner.PublicKey())},
		{name: "nobody", options: []string{"identityfile " + locked}, asked: []string{prompt(locked)},
			fails: []string{"needs a passphrase for " + locked + ", and nobody can be asked for it here; connect without sharing: MUXPROXY_BYPASS=1 ssh box"}},
		{name: "BatchMode", options: []string{"identityfile " + locked, "batchmode yes"}, asked: []string{prompt(locked)},
			fails: []string{"needs a passphrase for " + locked + ", and BatchMode=yes forbids asking"}},
		{name: "not asked for a key that the server does not take", options: []string{"identityfile " + useless, "identityfile " + locked},
			answers: []string{"secret"}, asked: []string{prompt(locked)}, auth: fingerprint(good.pub)},
		{name: "old format", options: []string{"identityfile " + oldFile}, answers: []string{"wrong", "secret"},
			asked: []string{prompt(oldFile), prompt(oldFile)}, auth: fingerprint(oldSigner.PublicKey())},
		{name: "old format with its public half", options: []string{"identityfile " + oldFile, "identityfile " + locked, "pubkeyacceptedalgorithms ssh-ed25519"},
			answers: []string{"", "secret"}, asked: []string{prompt(oldFile), prompt(locked)}, auth: fingerprint(good.pub)},
		{name: "certificate", options: []string{"identityfile " + pair}, answers: []string{"secret"}, asked: []string{prompt(pair)}, auth: "ED25519-CERT"},
		{name: "a key that needs none, after one that could not be unlocked", options: []string{"identityfile " + locked, "identityfile " + open},
			answers: []string{"wrong", ""}, asked: []string{prompt(locked), prompt(locked)}, auth: fingerprint(plain.pub), others: true},
		{name: "after one that is unlocked and not taken", options: []string{"identityfile " + bare, "identityfile " + open},
			answers: []string{"secret"}, asked: []string{prompt(bare)}, auth: fingerprint(plain.pub), others: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := answering(tc.answers...)
			c, line := dialAsking(t, spec(t, s.port, append(tc.options, s.known(t))...), p)
			if (tc.fails == nil) != (c != nil) {
				t.Fatalf("got %v, %q", c, line)
			}
			contains(t, line, tc.fails...)
			if got := p.transcript(); !slices.Equal(got, tc.asked) {
				t.Errorf("asked %q", got)
			}
			if c != nil && !strings.HasPrefix(c.Server().Auth, "publickey "+tc.auth) {
				t.Errorf("got %q", c.Server().Auth)
			}
			if c != nil && c.Server().Answered == tc.others {
				t.Errorf("an answer has logged in: %v", c.Server().Answered)
			}
		})
	}
}

// recordingAgent keeps what was added with its limits.
type recordingAgent struct {
	agent.Agent
	mu    sync.Mutex // guards added
	added []agent.AddedKey
}

func (a *recordingAgent) Add(k agent.AddedKey) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.added = append(a.added, k)
	return nil
}

func TestAddKeysToAgent(t *testing.T) {
	user, useless := newKey(t, "ed25519"), newKey(t, "ed25519")
	s := startSSHD(t, newKey(t, "ed25519"), []key{user})
	locked, open := user.file(t, s.dir, "locked", "secret"), user.file(t, s.dir, "open", "")
	other := useless.file(t, s.dir, "useless", "")
	question := "muxproxy||Add key " + locked + " to agent? (yes/no) *"
	for _, tc := range []struct {
		value    string
		file     string
		answers  []string
		question bool
		added    bool
		lifetime uint32
		confirm  bool
	}{
		{value: "false", file: locked, answers: []string{"secret"}},
		{value: "true", file: locked, answers: []string{"secret"}, added: true},
		{value: "true", file: open, added: true},
		{value: "ask", file: locked, answers: []string{"secret", "yes"}, question: true, added: true},
		{value: "ask", file: locked, answers: []string{"secret", "no"}, question: true},
		{value: "ask", file: locked, answers: []string{"secret"}, question: true}, // nobody
		{value: "ask", file: open, answers: []string{"yes"}, added: true},
		{value: "confirm", file: locked, answers: []string{"secret"}, added: true, confirm: true},
		{value: "3600", file: locked, answers: []string{"secret"}, added: true, lifetime: 3600},
		{value: "confirm 60", file: locked, answers: []string{"secret"}, added: true, confirm: true, lifetime: 60},
		{value: "whatever", file: locked, answers: []string{"secret"}},
	} {
		ring := &recordingAgent{Agent: agent.NewKeyring()}
		sp := spec(t, s.port, s.known(t), "identityfile "+other, "identityfile "+tc.file, "addkeystoagent "+tc.value)
		sp.Agent = &testAgent{t, ring}
		p := answering(tc.answers...)
		c, line := dialAsking(t, sp, p)
		if c == nil {
			t.Errorf("%s: %s", tc.value, line)
			continue
		}
		if c.Server().AgentID != "" {
			t.Errorf("%s: the agent is said to have logged in", tc.value)
		}
		if c.Server().Answered != (tc.file == locked) {
			t.Errorf("%s: a passphrase has logged in: %v", tc.value, c.Server().Answered)
		}
		if got := slices.Contains(p.transcript(), question); got != tc.question {
			t.Errorf("%s: asked %q", tc.value, p.transcript())
		}
		if len(ring.added) > 1 || (len(ring.added) == 1) != tc.added {
			t.Errorf("%s: %d keys were added", tc.value, len(ring.added))
			continue
		}
		if tc.added {
			if k := ring.added[0]; k.LifetimeSecs != tc.lifetime || k.ConfirmBeforeUse != tc.confirm || k.Comment != tc.file {
				t.Errorf("%s: %+v", tc.value, k)
			}
		}
	}
	// Without an agent, and with one that refuses, the key is used all the same.
	for _, a := range []pool.Agent{nil, failingAgent{}} {
		sp := spec(t, s.port, s.known(t), "identityfile "+open, "addkeystoagent yes")
		sp.Agent = a
		dial(t, sp)
	}
}

// passwordServer takes a password, answers to challenges, a key first, or several of them.
func passwordServer(t *testing.T, config *ssh.ServerConfig) *fake {
	t.Helper()
	return startFake(t, config, newKey(t, "ed25519").signer)
}

var errNo = errors.New("no")

func takes(want string) func(ssh.ConnMetadata, []byte) (*ssh.Permissions, error) {
	return func(_ ssh.ConnMetadata, got []byte) (*ssh.Permissions, error) {
		if string(got) != want {
			return nil, errNo
		}
		return nil, nil
	}
}

// challenges asks for a password without echo, then for a code with echo.
func challenges(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
	answers, err := ask("Login\x1b", "Two steps.\r\nFirst:", []string{"1. this\n2. that\nPassword: "}, []bool{false})
	if err != nil || answers[0] != "secret" {
		return nil, errNo
	}
	if answers, err = ask("", "", []string{"Code: ", "Again\t\u202e: "}, []bool{true, true}); err != nil || answers[0] != "42" || answers[1] != "42" {
		return nil, errNo
	}
	if _, err = ask("", "Welcome\nback", nil, nil); err != nil {
		return nil, err
	}
	return nil, nil
}

func TestQuestionsOfTheLogin(t *testing.T) {
	password := fmt.Sprintf("%s@127.0.0.1's password: ", me(t))
	first, retry := "muxproxy||"+password, "muxproxy|Permission denied, please try again.|"+password
	step1 := "server 127.0.0.1|Login\\x1b\nTwo steps.\nFirst:\n1. this\n2. that|Password: "
	step2 := "server 127.0.0.1||Code: *|Again \\u202e: *"
	user := newKey(t, "ed25519")
	id := "identityfile " + user.file(t, t.TempDir(), "id", "")
	keyThen := func(next ssh.ServerAuthCallbacks) *ssh.ServerConfig {
		return &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
			if !sameKey(k, user.pub) {
				return nil, errNo
			}
			return nil, &ssh.PartialSuccessError{Next: next}
		}}
	}
	for _, tc := range []struct {
		name    string
		server  *ssh.ServerConfig
		options []string
		answers []string
		asked   []string
		auth    string
		others  bool // what a person has answered was not what logged in
		fails   []string
	}{
		{name: "password", server: &ssh.ServerConfig{PasswordCallback: takes("secret")}, answers: []string{"secret"}, asked: []string{first}, auth: "password"},
		{name: "password at the third try", server: &ssh.ServerConfig{PasswordCallback: takes("secret")}, answers: []string{"a", "", "secret"},
			asked: []string{first, retry, retry}, auth: "password"},
		{name: "password wrong", server: &ssh.ServerConfig{PasswordCallback: takes("secret")}, answers: []string{"a", "b", "c", "secret"},
			asked: []string{first, retry, retry}, fails: []string{"permission denied (password); tried: no key, password"}},
		{name: "NumberOfPasswordPrompts", server: &ssh.ServerConfig{PasswordCallback: takes("secret")}, answers: []string{"a", "secret"},
			options: []string{"numberofpasswordprompts 1"}, asked: []string{first}, fails: []string{"permission denied (password)"}},
		{name: "password, nobody", server: &ssh.ServerConfig{PasswordCallback: takes("secret")}, asked: []string{first},
			fails: []string{"needs a password, and nobody can be asked for it here; connect without sharing: MUXPROXY_BYPASS=1 ssh box"}},
		{name: "password, BatchMode", server: &ssh.ServerConfig{PasswordCallback: takes("secret")},
			options: []string{"batchmode yes"}, asked: []string{first}, fails: []string{"needs a password, and BatchMode=yes forbids asking"}},
		{name: "PasswordAuthentication no", server: &ssh.ServerConfig{PasswordCallback: takes("secret")}, answers: []string{"secret"},
			options: []string{"passwordauthentication no"}, fails: []string{"permission denied (password); tried: no key"}},
		{name: "two steps", server: &ssh.ServerConfig{KeyboardInteractiveCallback: challenges}, answers: []string{"secret", "42", "42"},
			asked: []string{step1, step2}, auth: "keyboard-interactive"},
		{name: "two steps, wrong first", server: &ssh.ServerConfig{KeyboardInteractiveCallback: challenges}, answers: []string{"x", "secret", "42", "42"},
			asked: []string{step1, step1, step2}, auth: "keyboard-interactive"},
		{name: "two steps, always wrong", server: &ssh.ServerConfig{KeyboardInteractiveCallback: challenges}, answers: []string{"x", "y", "z", "secret"},
			asked: []string{step1, step1, step1}, fails: []string{"permission denied (keyboard-interactive); tried: no key, keyboard-interactive"}},
		{name: "two steps, nobody for the second", server: &ssh.ServerConfig{KeyboardInteractiveCallback: challenges}, answers: []string{"secret"},
			asked: []string{step1, step2}, fails: []string{"needs an answer to the server's question, and nobody can be asked"}},
		{name: "keyboard-interactive before password", server: &ssh.ServerConfig{KeyboardInteractiveCallback: challenges, PasswordCallback: takes("p")},
			answers: []string{"x", "y", "z", "p"}, asked: []string{step1, step1, step1, first}, auth: "password"},
		{name: "PreferredAuthentications", server: &ssh.ServerConfig{KeyboardInteractiveCallback: challenges, PasswordCallback: takes("p")},
			options: []string{"preferredauthentications password,keyboard-interactive"}, answers: []string{"p"}, asked: []string{first}, auth: "password"},
		{name: "key, then code", server: keyThen(ssh.ServerAuthCallbacks{KeyboardInteractiveCallback: challenges}), options: []string{id},
			answers: []string{"secret", "42", "42"}, asked: []string{step1, step2}, auth: "keyboard-interactive"},
		{name: "key, then password", server: keyThen(ssh.ServerAuthCallbacks{PasswordCallback: takes("p")}), options: []string{id},
			answers: []string{"p"}, asked: []string{first}, auth: "password"},
		{name: "key, then nobody", server: keyThen(ssh.ServerAuthCallbacks{PasswordCallback: takes("p")}), options: []string{id},
			asked: []string{first}, fails: []string{"though a first step succeeded (password is left)", "needs a password"}},
		{name: "password, then key", server: &ssh.ServerConfig{PasswordCallback: func(ssh.ConnMetadata, []byte) (*ssh.Permissions, error) {
			return nil, &ssh.PartialSuccessError{Next: ssh.ServerAuthCallbacks{PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
				if !sameKey(k, user.pub) {
					return nil, errNo
				}
				return nil, nil
			}}}
		}}, options: []string{id}, answers: []string{"p"}, asked: []string{first}, auth: "publickey " + fingerprint(user.pub)},
		{name: "a wrong password, then nothing is asked", server: &ssh.ServerConfig{PasswordCallback: takes("p"),
			KeyboardInteractiveCallback: func(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
				_, err := ask("", "Welcome\nback", nil, nil)
				return nil, err
			}}, options: []string{"preferredauthentications password,keyboard-interactive", "numberofpasswordprompts 1"}, answers: []string{"x"},
			asked: []string{first}, auth: "keyboard-interactive", others: true},
		{name: "a wrong password, then key", server: &ssh.ServerConfig{PasswordCallback: takes("p"), PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
			if !sameKey(k, user.pub) {
				return nil, errNo
			}
			return nil, nil
		}}, options: []string{id, "preferredauthentications password,publickey", "numberofpasswordprompts 1"}, answers: []string{"x"}, asked: []string{first},
			auth: "publickey " + fingerprint(user.pub), others: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := passwordServer(t, tc.server)
			sp := spec(t, f.port, append(tc.options, "stricthostkeychecking no")...)
			heard := listening(&sp)
			p := answering(tc.answers...)
			c, line := dialAsking(t, sp, p)
			if (tc.fails == nil) != (c != nil) {
				t.Fatalf("got %v, %q; asked %q", c, line, p.transcript())
			}
			contains(t, line, tc.fails...)
			if got := p.transcript(); !slices.Equal(got, tc.asked) {
				t.Errorf("asked %q\nwant  %q", got, tc.asked)
			}
			if c != nil && c.Server().Auth != tc.auth {
				t.Errorf("got %q", c.Server().Auth)
			}
			if c != nil && c.Server().Answered == tc.others {
				t.Errorf("an answer has logged in: %v", c.Server().Answered)
			}
			if tc.auth == "keyboard-interactive" {
				if said := heard.get(&heard.say); !slices.Equal(said, []string{"server 127.0.0.1: Welcome", "server 127.0.0.1: back"}) {
					t.Errorf("said %q", said)
				}
			}
			for _, secret := range []string{"secret", "42"} {
				if said := strings.Join(append(heard.get(&heard.debug), heard.get(&heard.say)...), "\n"); strings.Contains(said, secret) && secret == "secret" {
					t.Errorf("a secret was told: %q", said)
				}
			}
		})
	}
}

// A server that wants the password changed answers with neither SUCCESS nor FAILURE.
func TestPasswordChangeWanted(t *testing.T) {
	sp := spec(t, 22, "preferredauthentications password")
	d := newDialing(sp)
	d.asker = answering("old", "old")
	near, far := listenPair(t)
	defer far.Close()
	tr := newTransport(near, d.host)
	d.guard = newGuard(t.Context(), tr)
	defer d.guard.end()
	defer tr.Close()
	l := &login{dialing: d, ctx: t.Context()}
	c := &ssh.ClientAuthContext{AllowedMethods: []string{"password"}}
	if auth, err := l.next(c); auth == nil || err != nil {
		t.Fatalf("got %v, %v", auth, err)
	}
	if _, err := l.password(); err != nil {
		t.Fatal(err)
	}
	auth, err := l.next(c)
	if auth != nil || err == nil {
		t.Fatalf("got %v, %v", auth, err)
	}
	contains(t, err.Error(), "the server wants the password to be changed, which can't be done here", "MUXPROXY_BYPASS=1 ssh box")
}

func TestBannerAndDebug(t *testing.T) {
	user, host := newKey(t, "ed25519"), newKey(t, "ed25519")
	dir := t.TempDir()
	s := startSSHD(t, host, []key{user}, "Banner "+write(t, dir, "banner", "Keep\tout!\x1b[31m\nSecond line\n\n"))
	sp := spec(t, s.port, s.known(t), "identityfile "+user.file(t, dir, "id", ""), "verifyhostkeydns true")
	heard := listening(&sp)
	dial(t, sp)
	if got := heard.get(&heard.banner); !slices.Equal(got, []string{"Keep out!\\x1b[31m\nSecond line"}) {
		t.Errorf("banner %q", got)
	}
	debug := strings.Join(heard.get(&heard.debug), "\n")
	sum := ssh.FingerprintSHA256(host.pub)
	for _, want := range []string{
		fmt.Sprintf("(?m)^Connecting to 127.0.0.1 port %d.$", s.port), "(?m)^Connection established.$", "(?m)^Remote identification: SSH-2.0-OpenSSH_",
		"(?m)^Server host key: ssh-ed25519 " + regexp.QuoteMeta(sum) + "$", "VerifyHostKeyDNS is not supported",
		fmt.Sprintf(`(?m)^Host '\[127.0.0.1\]:%d' is known and matches the ED25519 host key.\nFound key in .*:1$`, s.port),
		"(?m)^kex: algorithm: ", "(?m)^kex: host key algorithm: ssh-ed25519$", "(?m)^kex: client->server cipher: aes128-gcm@openssh.com MAC: <implicit>",
		"(?m)^Authentications that can continue: publickey$", "(?m)^Next authentication method: publickey$",
		"(?m)^Offering public key: .*id ED25519 SHA256:", "(?m)^Server accepts key: .*id ED25519 SHA256:",
		fmt.Sprintf(`(?m)^Authenticated to 127.0.0.1 \(127.0.0.1:%d\) using "publickey".$`, s.port),
	} {
		if !regexp.MustCompile(want).MatchString(debug) {
			t.Errorf("%s is not in\n%s", want, debug)
		}
	}
}

var offering = regexp.MustCompile(`(?m)Offering public key: .* ([A-Z0-9-]+) (SHA256:\S+)`)

// A server counts the keys that it is offered, so the order and number must be ssh's.
func TestOrderOfKeysIsSSHs(t *testing.T) {
	ssh1, err := exec.LookPath("ssh")
	check(t, err)
	s := startSSHD(t, newKey(t, "ed25519"), nil, "MaxAuthTries 20")
	dir := t.TempDir()
	a, b, c, d, ca := newKey(t, "ed25519"), newKey(t, "ecdsa"), newKey(t, "rsa"), newKey(t, "ed25519"), newKey(t, "ed25519")
	files := map[string]key{"a": a, "b": b, "c": c}
	for name, k := range files {
		k.file(t, dir, name, "")
		write(t, dir, name+".pub", k.line())
	}
	certA := write(t, dir, "a-cert.pub", string(ssh.MarshalAuthorizedKey(ca.certify(t, a.pub, ssh.UserCert, 0, me(t)))))
	certD := ca.certify(t, d.pub, ssh.UserCert, 0, me(t))
	certDFile := write(t, dir, "d-cert.pub", string(ssh.MarshalAuthorizedKey(certD)))
	id := func(names ...string) (o []string) {
		for _, n := range names {
			o = append(o, "identityfile "+filepath.Join(dir, n))
		}
		return o
	}
	for _, tc := range []struct {
		name    string
		agent   []agent.AddedKey
		options []string
	}{
		{"files", nil, id("b", "a", "c")},
		{"named certificate", nil, append(id("b", "a"), "certificatefile "+certA)},
		{"agent", []agent.AddedKey{{PrivateKey: d.private}, {PrivateKey: c.private}, {PrivateKey: a.private}}, id("a", "b", "c")},
		{"IdentitiesOnly", []agent.AddedKey{{PrivateKey: d.private}, {PrivateKey: c.private}}, append(id("b", "c"), "identitiesonly yes")},
		{"certificate of the agent's key", []agent.AddedKey{{PrivateKey: d.private}}, append(id("b"), "certificatefile "+certDFile)},
		{"certificate in the agent", []agent.AddedKey{{PrivateKey: d.private, Certificate: certD}, {PrivateKey: d.private}}, id("a")},
		{"algorithms", nil, append(id("b", "a", "c"), "pubkeyacceptedalgorithms rsa-sha2-256,ssh-ed25519")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			known := s.known(t)
			sp := spec(t, s.port, append(tc.options, known)...)
			args := []string{"-v", "-F", "none", "-o", "BatchMode=yes", "-p", fmt.Sprint(s.port), "-o", "IdentityAgent=none"}
			if tc.agent != nil {
				a := newAgent(t, tc.agent...)
				sp.Agent = a
				args[len(args)-1] = "IdentityAgent=" + a.listen(t)
			}
			for _, o := range append(tc.options, known) {
				k, v, _ := strings.Cut(o, " ")
				args = append(args, "-o", k+"="+v)
			}
			heard := listening(&sp)
			dialError(t, sp)
			var ours, theirs []string
			for _, line := range heard.get(&heard.debug) {
				if m := offering.FindStringSubmatch(line); m != nil {
					ours = append(ours, m[1]+" "+m[2])
				}
			}
			out, _ := exec.Command(ssh1, append(args, "127.0.0.1", "true")...).CombinedOutput()
			for _, m := range offering.FindAllStringSubmatch(string(out), -1) {
				theirs = append(theirs, m[1]+" "+m[2])
			}
			// ssh shows the key's fingerprint for a certificate, x/crypto/ssh that of the whole.
			for i, line := range ours {
				for _, cert := range []*ssh.Certificate{certD, parseCert(t, certA)} {
					line = strings.ReplaceAll(line, ssh.FingerprintSHA256(cert), ssh.FingerprintSHA256(cert.Key))
				}
				ours[i] = line
			}
			if len(theirs) == 0 || !slices.Equal(ours, theirs) {
				t.Errorf("we offer  %q\nssh offers %q", ours, theirs)
			}
		})
	}
}

func parseCert(t *testing.T, file string) *ssh.Certificate {
	t.Helper()
	pub, err := publicFile(file)
	check(t, err)
	return pub.(*ssh.Certificate)
}

func TestSecurityKeyFile(t *testing.T) {
	pub := ssh.Marshal(struct {
		Type string
		Key  []byte
		App  string
	}{ssh.KeyAlgoSKED25519, bytes.Repeat([]byte{1}, 32), "ssh:"})
	body := append([]byte("openssh-key-v1\x00"), ssh.Marshal(struct {
		Cipher, KDF, Options string
		Count                uint32
		Public, Private      []byte
	}{"none", "none", "", 1, pub, bytes.Repeat([]byte{0}, 64)})...)
	text := pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: body})
	s := startSSHD(t, newKey(t, "ed25519"), nil)
	t.Setenv("HOME", "/nonexistent")
	file := write(t, s.dir, "sk", string(text))
	contains(t, dialError(t, spec(t, s.port, s.known(t), "identityfile "+file)),
		"key "+file+" is a security key, which only an agent can use here; ssh-add it; connect without sharing: MUXPROXY_BYPASS=1 ssh box")
	if securityKey([]byte("-----BEGIN OPENSSH PRIVATE KEY-----\n"+base64.StdEncoding.EncodeToString([]byte("openssh-key-v1\x00xx"))+"\n-----END OPENSSH PRIVATE KEY-----\n")) != nil {
		t.Error("a broken file is a key")
	}
}

func TestKeysAreWiped(t *testing.T) {
	k := newKey(t, "ed25519")
	dir := t.TempDir()
	l := &login{dialing: newDialing(spec(t, 22, "identityfile "+k.file(t, dir, "a", ""), "identityfile "+k.file(t, dir, "b", "secret"))), ctx: t.Context()}
	l.asker = answering("secret")
	l.prepare()
	var raw []ed25519.PrivateKey
	for _, i := range l.loaded {
		if _, err := i.private(); err != nil {
			t.Fatal(err)
		}
		raw = append(raw, *i.raw.(*ed25519.PrivateKey))
	}
	l.end()
	if len(raw) != 2 {
		t.Fatalf("%d keys were loaded", len(raw))
	}
	for _, r := range raw {
		if !bytes.Equal(r, make([]byte, len(r))) {
			t.Error("a private key is left in memory")
		}
	}
}

// A server that never stops asking is left.
func TestEndlessChallenges(t *testing.T) {
	f := passwordServer(t, &ssh.ServerConfig{KeyboardInteractiveCallback: func(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
		for {
			if _, err := ask("", "Wait", nil, nil); err != nil {
				return nil, err
			}
		}
	}})
	contains(t, dialError(t, spec(t, f.port, "stricthostkeychecking no")), "the server does not stop asking")
}

func FuzzSecurityKey(f *testing.F) {
	f.Add([]byte("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n-----END OPENSSH PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if pub := securityKey(text); pub != nil && !strings.HasPrefix(pub.Type(), "sk-") {
			t.Errorf("got %s", pub.Type())
		}
	})
}

func FuzzLines(f *testing.F) {
	f.Add("a\r\nb\x1b\n\n\u202e")
	f.Fuzz(func(t *testing.T, text string) {
		for line := range strings.SplitSeq(lines(text), "\n") {
			if use.Printable(line) != line {
				t.Errorf("%q is not escaped", line)
			}
		}
	})
}

// The dial ends while a question is open.
func TestQuestionEndsWithTheDial(t *testing.T) {
	f := passwordServer(t, &ssh.ServerConfig{PasswordCallback: takes("x")})
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err := (&Dialer{}).Dial(ctx, spec(t, f.port, "stricthostkeychecking no"), askerFunc(func(ctx context.Context) error {
		cancel(errors.New("left"))
		<-ctx.Done()
		return ctx.Err()
	}))
	if err == nil || !strings.Contains(err.Error(), "gave up connecting: left") {
		t.Errorf("got %v", err)
	}
	ctx, cancel2 := context.WithTimeout(t.Context(), time.Minute)
	defer cancel2()
	_, err = (&Dialer{}).Dial(ctx, spec(t, f.port), askerFunc(func(context.Context) error { return errors.New("broken\x1b") }))
	if err == nil || !strings.Contains(err.Error(), `and broken\x1b; check it`) {
		t.Errorf("got %v", err)
	}
}

type askerFunc func(context.Context) error

func (f askerFunc) Ask(ctx context.Context, _ pool.Question) ([]string, error) { return nil, f(ctx) }
