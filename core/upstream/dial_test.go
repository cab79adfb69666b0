package upstream

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/muxproxy/muxproxy/core/pool"
)

func TestDialKeyTypes(t *testing.T) {
	ed, ec, r := newKey(t, "ed25519"), newKey(t, "ecdsa"), newKey(t, "rsa")
	for _, tc := range []struct {
		name       string
		host, user key
	}{{"ed25519", ed, ec}, {"ecdsa", ec, r}, {"rsa", r, ed}} {
		t.Run(tc.name, func(t *testing.T) {
			s := startSSHD(t, tc.host, []key{tc.user})
			connected := 0
			sp := spec(t, s.port, s.known(t), "identityfile "+tc.user.file(t, s.dir, "id", ""))
			sp.Connected = func() { connected++ }
			c := dial(t, sp)
			if connected != 1 {
				t.Errorf("Connected was called %d times", connected)
			}
			if got := run(t, c, "echo $SSH_CONNECTION", nil); !strings.HasPrefix(string(got), "127.0.0.1 ") {
				t.Errorf("got %q", got)
			}
			info := c.Server()
			if !info.OpenSSH || !strings.HasPrefix(info.Version, "SSH-2.0-OpenSSH_") || !sameKey(info.HostKey, tc.host.pub) ||
				info.Addr != fmt.Sprintf("127.0.0.1:%d", s.port) || info.Cipher != ssh.CipherAES128GCM || info.Kex == "" ||
				info.PostQuantum != strings.HasPrefix(info.Kex, "mlkem") ||
				info.Auth != "publickey "+fingerprint(tc.user.pub) || info.AgentID != "" {
				t.Errorf("got %+v", info)
			}
			if c.Down() || c.Cause() != nil || time.Since(c.LastHeard()) > time.Minute {
				t.Errorf("down %v, cause %v, heard %v", c.Down(), c.Cause(), c.LastHeard())
			}
			check(t, c.Probe(t.Context(), nil))
			// What stands for a keepalive that has to wait.
			var refused *ssh.OpenChannelError
			if _, _, err := c.OpenChannel(keepalive, nil); !errors.As(err, &refused) {
				t.Errorf("a channel of no type: %v", err)
			}
			check(t, c.Close())
			if err := c.Wait(); err != nil || c.Cause() != nil || !c.Down() {
				t.Errorf("after Close: wait %v, cause %v, down %v", err, c.Cause(), c.Down())
			}
			if err := c.Probe(t.Context(), nil); err == nil {
				t.Error("a closed connection shows life")
			}
			if err := c.(pool.HostKeyKeeper).HostKeyStillGood(sp); err != nil {
				t.Error(err)
			}
		})
	}
}

// sshd starts a key exchange after every MiB, while both sides send at full speed.
func TestRekey(t *testing.T) {
	user := newKey(t, "ed25519")
	s := startSSHD(t, newKey(t, "ecdsa"), []key{user}, "RekeyLimit 1M")
	c := dial(t, spec(t, s.port, s.known(t), "identityfile "+user.file(t, s.dir, "id", "")))
	data := make([]byte, 24<<20)
	rand.Read(data)
	if got := run(t, c, "cat", data); !bytes.Equal(got, data) {
		t.Fatalf("%d bytes came back of %d", len(got), len(data))
	}
}

func TestHostKeysOverTheWire(t *testing.T) {
	user, host, other := newKey(t, "ed25519"), newKey(t, "ed25519"), newKey(t, "ed25519")
	rsaKey := newKey(t, "rsa")
	dir := t.TempDir()
	s := startSSHD(t, host, []key{user}, "HostKey "+rsaKey.file(t, dir, "rsa", ""))
	id := "identityfile " + user.file(t, dir, "id", "")
	name := fmt.Sprintf("[127.0.0.1]:%d", s.port)
	known := func(t *testing.T, text string) string { return "userknownhostsfile " + write(t, dir, "known", text) }

	t.Run("known by its RSA key alone", func(t *testing.T) {
		c := dial(t, spec(t, s.port, id, known(t, name+" "+rsaKey.line())))
		if !sameKey(c.Server().HostKey, rsaKey.pub) {
			t.Error("the server was not asked for the key that is known")
		}
	})
	unknown := fmt.Sprintf("127.0.0.1:%d: host key is unknown (%s); check it, then add it with: MUXPROXY_BYPASS=1 ssh box", s.port,
		fingerprint(host.pub))
	strictly := strings.Replace(unknown, "; check", ", and StrictHostKeyChecking is yes; check", 1)
	for strict, want := range map[string]string{"ask": unknown, "true": strictly, "yes": strictly} {
		if got := dialErr(t, spec(t, s.port, id, known(t, ""), "stricthostkeychecking "+strict)); got.Error() != want ||
			!errors.Is(got, pool.ErrRefused) {
			t.Errorf("%s: got %q", strict, got)
		}
	}
	for _, strict := range []string{"false", "off", "accept-new"} {
		c := dial(t, spec(t, s.port, id, known(t, ""), "stricthostkeychecking "+strict))
		// A strict client does not ride along.
		if err := c.(pool.HostKeyKeeper).HostKeyStillGood(spec(t, s.port, known(t, ""))); err == nil || err.Error() != unknown {
			t.Errorf("%s: got %v", strict, err)
		}
	}
	for _, strict := range []string{"ask", "false", "accept-new", "true"} {
		sp := spec(t, s.port, id, known(t, "# comment\n"+name+" "+other.line()), "stricthostkeychecking "+strict)
		got := dialError(t, sp)
		for _, part := range []string{"HOST KEY HAS CHANGED", fingerprint(host.pub), fingerprint(other.pub), dir + "/known:2"} {
			if !strings.Contains(got, part) {
				t.Errorf("%s: %q is not in %q", strict, part, got)
			}
		}
	}
	if got := dialError(t, spec(t, s.port, id, known(t, name+" "+host.line()+"@revoked * "+host.line()), "stricthostkeychecking no")); !strings.Contains(got, "marked as revoked in "+dir+"/known:2") {
		t.Errorf("got %q", got)
	}
	// No key, and no agent, is asked before the host is known to be right.
	sp := spec(t, s.port, known(t, ""))
	sp.Agent = noAgent{t}
	dialError(t, sp)
}

type noAgent struct{ t *testing.T }

func (a noAgent) ID() string { return "" }
func (a noAgent) Dial() (net.Conn, error) {
	a.t.Error("the agent was asked")
	return nil, errors.New("no")
}

func TestHostCertificate(t *testing.T) {
	user, host, ca := newKey(t, "ed25519"), newKey(t, "ecdsa"), newKey(t, "ed25519")
	for _, tc := range []struct {
		name   string
		cert   *ssh.Certificate
		option string
		want   string
	}{
		{"by address", ca.certify(t, host.pub, ssh.HostCert, 0, "127.0.0.1"), "", ""},
		{"by alias", ca.certify(t, host.pub, ssh.HostCert, 0, "db.example.com"), "hostkeyalias DB.example.com", ""},
		{"other principal", ca.certify(t, host.pub, ssh.HostCert, 0, "elsewhere"), "", "principal"},
		{"expired", ca.certify(t, host.pub, ssh.HostCert, 1000, "127.0.0.1"), "", "expired"},
		{"a user's", ca.certify(t, host.pub, ssh.UserCert, 0, "127.0.0.1"), "", "not one for hosts"},
		{"signature algorithm", ca.certify(t, host.pub, ssh.HostCert, 0, "127.0.0.1"), "casignaturealgorithms rsa-sha2-512", "CASignatureAlgorithms"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			signer, err := ssh.NewCertSigner(tc.cert, host.signer)
			check(t, err)
			s := startFake(t, &ssh.ServerConfig{NoClientAuth: true}, signer)
			dir := t.TempDir()
			known := "userknownhostsfile " + write(t, dir, "known", "@cert-authority 127.*,[127.*]:*,db.example.com "+ca.line())
			sp := spec(t, s.port, known, "identityfile "+user.file(t, dir, "id", ""))
			if tc.option != "" {
				k, v, _ := strings.Cut(tc.option, " ")
				sp.Config.Options[k] = []string{v}
			}
			if tc.want == "" {
				c := dial(t, sp)
				if _, ok := c.Server().HostKey.(*ssh.Certificate); !ok {
					t.Error("no certificate was asked for")
				}
				return
			}
			if got := dialError(t, sp); !strings.Contains(got, tc.want) {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestLogin(t *testing.T) {
	good, bad := newKey(t, "ed25519"), newKey(t, "ecdsa")
	r := newKey(t, "rsa")
	ca := newKey(t, "ed25519")
	certified := newKey(t, "ed25519")
	cert := ca.certify(t, certified.pub, ssh.UserCert, 0, me(t))
	dir := t.TempDir()
	s := startSSHD(t, newKey(t, "ed25519"), []key{good, r}, "TrustedUserCAKeys "+write(t, dir, "ca.pub", ca.line()))
	known := s.known(t)
	goodFile, badFile := good.file(t, dir, "good", ""), bad.file(t, dir, "bad", "")
	locked := good.file(t, dir, "locked", "secret")
	lockedPEM := write(t, dir, "pem", "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n")
	open := good.file(t, dir, "open", "")
	check(t, os.Chmod(open, 0o644))
	pubOnly := write(t, dir, "public.pub", good.line())
	certFile := write(t, dir, "cert.pub", string(ssh.MarshalAuthorizedKey(cert)))
	pair := certified.file(t, dir, "pair", "")
	write(t, dir, "pair-cert.pub", string(ssh.MarshalAuthorizedKey(cert)))
	alone := certified.file(t, dir, "alone", "")
	notKey := write(t, dir, "not", "hello\n")
	rsaFile := r.file(t, dir, "rsa", "")
	t.Setenv("HOME", "/nonexistent") // or the temporary folder may be in it, and be called ~

	for _, tc := range []struct {
		name    string
		agent   []agent.AddedKey // nil: no agent
		options []string
		auth    string // what succeeds
		byAgent bool
		fails   []string // what the line says, with %d for the folder
		never   string   // and what not
	}{
		{name: "file", options: []string{"identityfile " + goodFile}, auth: fingerprint(good.pub)},
		{name: "second file", options: []string{"identityfile " + badFile, "identityfile " + dir + "/absent", "identityfile " + goodFile},
			auth: fingerprint(good.pub)},
		{name: "agent", agent: []agent.AddedKey{{PrivateKey: bad.private}, {PrivateKey: good.private}}, auth: fingerprint(good.pub), byAgent: true},
		{name: "agent with RSA", agent: []agent.AddedKey{{PrivateKey: r.private}}, auth: fingerprint(r.pub), byAgent: true},
		{name: "RSA with SHA-256", options: []string{"identityfile " + rsaFile, "pubkeyacceptedalgorithms rsa-sha2-256"}, auth: fingerprint(r.pub)},
		{name: "agent before files", agent: []agent.AddedKey{{PrivateKey: good.private}}, options: []string{"identityfile " + rsaFile},
			auth: fingerprint(good.pub), byAgent: true},
		{name: "agent has the locked key", agent: []agent.AddedKey{{PrivateKey: good.private}},
			options: []string{"identityfile " + locked, "identitiesonly yes"}, auth: fingerprint(good.pub), byAgent: true},
		{name: "agent has the public key's other half", agent: []agent.AddedKey{{PrivateKey: bad.private}, {PrivateKey: good.private}},
			options: []string{"identityfile " + pubOnly, "identitiesonly yes"}, auth: fingerprint(good.pub), byAgent: true},
		{name: "IdentitiesOnly", agent: []agent.AddedKey{{PrivateKey: good.private}},
			options: []string{"identityfile " + badFile, "identitiesonly yes"},
			fails:   []string{"permission denied (publickey); tried: " + dir + "/bad"}, never: "agent key"},
		{name: "IdentityAgent none", agent: []agent.AddedKey{{PrivateKey: good.private}}, options: []string{"identityagent none"},
			fails: []string{"tried: no key"}},
		{name: "CertificateFile", options: []string{"identityfile " + alone, "certificatefile " + certFile}, auth: "ED25519-CERT"},
		{name: "certificate beside the key", options: []string{"identityfile " + pair}, auth: "ED25519-CERT"},
		{name: "CertificateFile with the agent's key", agent: []agent.AddedKey{{PrivateKey: certified.private}},
			options: []string{"certificatefile " + certFile, "identitiesonly yes"}, auth: "ED25519-CERT", byAgent: true},
		{name: "CertificateFile that the agent has", agent: []agent.AddedKey{{PrivateKey: certified.private, Certificate: cert}},
			options: []string{"certificatefile " + certFile, "identitiesonly yes"}, auth: "ED25519-CERT", byAgent: true},
		{name: "certificate in the agent", agent: []agent.AddedKey{{PrivateKey: certified.private, Certificate: cert}}, auth: "ED25519-CERT", byAgent: true},
		{name: "no certificate", options: []string{"identityfile " + alone}, fails: []string{"tried: " + dir + "/alone"}},

		{name: "nothing", fails: []string{"permission denied (publickey); tried: no key"}, never: "MUXPROXY"},
		{name: "locked", options: []string{"identityfile " + locked, "identityfile " + lockedPEM},
			fails: []string{"needs a passphrase for " + dir + "/locked, and nobody can be asked", "needs a passphrase for " + dir + "/pem", "MUXPROXY_BYPASS=1 ssh box"}},
		{name: "open to others", options: []string{"identityfile " + open}, fails: []string{"key " + dir + "/open is ignored: others can read it"}},
		{name: "not a key", options: []string{"identityfile " + notKey, "identityfile " + dir}, fails: []string{dir + "/not can't be used", "not a regular file"}},
		{name: "not a certificate", options: []string{"identityfile " + badFile, "certificatefile " + pubOnly}, fails: []string{"not a user certificate"}},
		{name: "algorithms", options: []string{"identityfile " + goodFile, "pubkeyacceptedalgorithms rsa-sha2-512"},
			fails: []string{"PubkeyAcceptedAlgorithms does not allow ssh-ed25519"}},
		{name: "size", options: []string{"identityfile " + rsaFile, "requiredrsasize 3072"}, fails: []string{"RSA key of 2048 bits is too short"}},
		{name: "PubkeyAuthentication no", options: []string{"identityfile " + goodFile, "pubkeyauthentication no"}, fails: []string{"no key"}},
		{name: "PreferredAuthentications", options: []string{"identityfile " + goodFile, "preferredauthentications password"}, fails: []string{"no key"}},
		{name: "PKCS11Provider", options: []string{"pkcs11provider /x"}, fails: []string{"PKCS11Provider can't be shared"}},
		{name: "several", agent: []agent.AddedKey{{PrivateKey: bad.private}},
			fails: []string{fmt.Sprintf("%s@127.0.0.1:%d: permission denied (publickey); tried: agent key %s", me(t), s.port, ssh.FingerprintSHA256(bad.pub))}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sp := spec(t, s.port, append(tc.options, known)...)
			if tc.agent != nil {
				sp.Agent = newAgent(t, tc.agent...)
			}
			if tc.fails != nil {
				got := dialError(t, sp)
				for _, part := range tc.fails {
					if !strings.Contains(got, part) {
						t.Errorf("%q is not in %q", part, got)
					}
				}
				if tc.never != "" && strings.Contains(got, tc.never) {
					t.Errorf("%q is in %q", tc.never, got)
				}
				return
			}
			info := dial(t, sp).Server()
			if !strings.HasPrefix(info.Auth, "publickey "+tc.auth) || (info.AgentID == "agent-1") != tc.byAgent {
				t.Errorf("got %q, agent %q", info.Auth, info.AgentID)
			}
		})
	}
}

func TestLoginInSteps(t *testing.T) {
	one, two := newKey(t, "ed25519"), newKey(t, "ecdsa")
	s := startSSHD(t, newKey(t, "ed25519"), []key{one, two}, "AuthenticationMethods publickey,publickey")
	first, second := "identityfile "+one.file(t, s.dir, "one", ""), "identityfile "+two.file(t, s.dir, "two", "")
	dial(t, spec(t, s.port, s.known(t), first, second))
	t.Setenv("HOME", s.dir)
	if got := dialError(t, spec(t, s.port, s.known(t), first)); !strings.Contains(got, "a first step succeeded (publickey is left); tried: ~/one") {
		t.Errorf("got %q", got)
	}
}

func TestTooManyKeys(t *testing.T) {
	s := startSSHD(t, newKey(t, "ed25519"), nil, "MaxAuthTries 2")
	var keys []agent.AddedKey
	for range 5 {
		keys = append(keys, agent.AddedKey{PrivateKey: newKey(t, "ed25519").private})
	}
	sp := spec(t, s.port, s.known(t))
	sp.Agent = newAgent(t, keys...)
	if got := dialError(t, sp); !strings.Contains(got, "the server ended the connection: Too many authentication failures; tried: agent key SHA256:") {
		t.Errorf("got %q", got)
	}
}

func TestAgentTroubles(t *testing.T) {
	good, bad := newKey(t, "ed25519"), newKey(t, "ecdsa")
	s := startSSHD(t, newKey(t, "ed25519"), []key{good, bad})
	file := "identityfile " + good.file(t, s.dir, "id", "")
	// An agent that fails in any way leaves the files.
	for name, a := range map[string]pool.Agent{
		"unreachable":         failingAgent{},
		"hangs up":            hangingUp{},
		"refuses to sign":     &testAgent{t, noSigning{newAgent(t, agent.AddedKey{PrivateKey: bad.private}).keys}},
		"has no keys":         newAgent(t),
		"has only other keys": newAgent(t, agent.AddedKey{PrivateKey: newKey(t, "rsa").private}),
	} {
		sp := spec(t, s.port, s.known(t), file)
		sp.Agent = a
		c, err := (&Dialer{}).Dial(t.Context(), sp, nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		serve(t, c)
		if info := c.Server(); info.AgentID != "" || !strings.Contains(info.Auth, fingerprint(good.pub)) {
			t.Errorf("%s: %+v", name, info)
		}
	}
	sp := spec(t, s.port, s.known(t))
	sp.Agent = failingAgent{}
	if got := dialError(t, sp); !strings.Contains(got, "the agent can't be reached: no such agent") {
		t.Errorf("got %q", got)
	}
	sp.Agent = &testAgent{t, noSigning{newAgent(t, agent.AddedKey{PrivateKey: bad.private}).keys}}
	if got := dialError(t, sp); !strings.Contains(got, "could not sign") {
		t.Errorf("got %q", got)
	}
}

type failingAgent struct{}

func (failingAgent) ID() string              { return "x" }
func (failingAgent) Dial() (net.Conn, error) { return nil, errors.New("no such agent") }

type hangingUp struct{}

func (hangingUp) ID() string { return "x" }
func (hangingUp) Dial() (net.Conn, error) {
	near, far := net.Pipe()
	far.Close()
	return near, nil
}

type noSigning struct{ agent.Agent }

func (noSigning) Sign(ssh.PublicKey, []byte) (*ssh.Signature, error) { return nil, errors.New("no") }

func TestDialRefusals(t *testing.T) {
	silent := listen(t, func(c net.Conn) { io.Copy(io.Discard, c) })
	hangsUp := listen(t, func(c net.Conn) {})
	busy := listen(t, func(c net.Conn) { io.WriteString(c, "Exceeded \x1b[31mMaxStartups\r\n") })
	web := listen(t, func(c net.Conn) {
		io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n"+strings.Repeat("x", 300)+"\r\n")
		io.Copy(io.Discard, c)
	})
	half := listen(t, func(c net.Conn) { io.WriteString(c, "SSH-2.0-x\r\n") })
	halfSilent := listen(t, func(c net.Conn) { io.WriteString(c, "SSH-2.0-x\r\n"); io.Copy(io.Discard, c) })
	onlyNTRU := startFake(t, &ssh.ServerConfig{NoClientAuth: true, Config: ssh.Config{Ciphers: []string{ssh.InsecureCipherAES128CBC}}}, newKey(t, "ed25519").signer)
	passwords := startFake(t, &ssh.ServerConfig{
		PasswordCallback: func(ssh.ConnMetadata, []byte) (*ssh.Permissions, error) { return nil, errors.New("no") },
		KeyboardInteractiveCallback: func(ssh.ConnMetadata, ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
			return nil, errors.New("no")
		},
	}, newKey(t, "ed25519").signer)

	for _, tc := range []struct {
		name    string
		port    uint16
		host    string
		options []string
		want    string // a regular expression
		refused bool   // as another try would be
	}{
		{name: "refused", port: freePort(t), want: `^127\.0\.0\.1:\d+: connection refused$`},
		{name: "refused by name", port: freePort(t), host: "localhost", want: `^localhost:\d+: connection refused \((127\.0\.0\.1|::1)\)$`},
		{name: "silent", port: silent, options: []string{"connecttimeout 1"}, want: `no answer in 1s after the connection was made$`},
		{name: "silent after its name", port: halfSilent, options: []string{"connecttimeout 1"}, want: `no answer in 1s after the connection was made$`},
		{name: "hangs up", port: hangsUp, want: `: connection (closed by the remote host|reset by peer) before the server identified itself$`},
		{name: "hangs up with a word", port: busy, want: `before the server identified itself; it said "Exceeded .x1b\[31mMaxStartups"$`},
		{name: "hangs up in the key exchange", port: half, want: `: connection (closed by the remote host|reset by peer) during the key exchange$`},
		{name: "not SSH", port: web, want: `: what answers there is not an SSH server`},
		{name: "no common cipher", port: onlyNTRU.port, options: []string{"stricthostkeychecking no"},
			want: `: no common algorithm for client to server cipher: the server offers only aes128-cbc; connect without sharing: MUXPROXY_BYPASS=1 ssh box$`, refused: true},
		{name: "umac only", port: silent, options: []string{"macs umac-64@openssh.com,umac-128@openssh.com"}, want: `: MACs in ssh_config names nothing that can be shared \(umac`, refused: true},
		{name: "sntrup only", port: silent, options: []string{"kexalgorithms sntrup761x25519-sha512"}, want: `: KexAlgorithms in ssh_config names nothing`, refused: true},
		{name: "ProxyJump", port: silent, options: []string{"proxyjump a,b"}, want: `: ProxyJump a,b can't be shared; connect without sharing: MUXPROXY_BYPASS=1 ssh box$`, refused: true},
		{name: "ProxyCommand", options: []string{"proxycommand sh -c 'echo no %n >&2; exit 3'"}, port: silent,
			want: `: ProxyCommand ended before the server identified itself \(exit status 3\); it said "no box"$`},
		{name: "a person", port: passwords.port, options: []string{"stricthostkeychecking no"},
			want: `permission denied \(password,keyboard-interactive\); tried: no key; needs a password, and nobody can be asked for it here; .*MUXPROXY_BYPASS=1 ssh box$`, refused: true},
		{name: "a person, one method", port: passwords.port, options: []string{"stricthostkeychecking no", "passwordauthentication no"},
			want: `\(password,keyboard-interactive\); tried: no key`, refused: true},
		{name: "BatchMode", port: passwords.port, options: []string{"stricthostkeychecking no", "batchmode yes"}, want: `tried: no key; needs a password, and BatchMode=yes forbids asking$`, refused: true},
		{name: "BindAddress", port: silent, options: []string{"bindaddress ::1", "addressfamily inet"}, want: `: BindAddress ::1 has no address of the wanted family$`},
		{name: "BindInterface", port: silent, options: []string{"bindinterface nope0"}, want: `: BindInterface nope0: `},
		{name: "family", port: silent, options: []string{"addressfamily inet6"}, want: `^127\.0\.0\.1:\d+: `},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sp := spec(t, tc.port, tc.options...)
			if tc.host != "" {
				sp.Target.Host = tc.host
			}
			got := dialErr(t, sp)
			if !regexp.MustCompile(tc.want).MatchString(got.Error()) || errors.Is(got, pool.ErrRefused) != tc.refused {
				t.Errorf("got  %s\nwant %s, refused %v", got, tc.want, tc.refused)
			}
		})
	}
}

func TestDialChoices(t *testing.T) {
	user := newKey(t, "ed25519")
	s := startSSHD(t, newKey(t, "ed25519"), []key{user})
	id := "identityfile " + user.file(t, s.dir, "id", "")
	c := dial(t, spec(t, s.port, s.known(t), id, "ciphers aes128-cbc,chacha20-poly1305@openssh.com,aes128-gcm@openssh.com",
		"kexalgorithms sntrup761x25519-sha512@openssh.com,curve25519-sha256@libssh.org,ecdh-sha2-nistp256", "bindaddress 127.0.0.2",
		"addressfamily inet", "tcpkeepalive no", "connecttimeout 20"))
	if info := c.Server(); info.Cipher != ssh.CipherChaCha20Poly1305 || info.Kex != "curve25519-sha256@libssh.org" || info.PostQuantum {
		t.Errorf("got %+v", info)
	}
	if got := string(run(t, c, "echo $SSH_CLIENT", nil)); !strings.HasPrefix(got, "127.0.0.2 ") {
		t.Errorf("got %q", got)
	}
	dial(t, spec(t, s.port, s.known(t), id, "bindinterface lo"))
	// What ssh -G prints is not a choice.
	sp := spec(t, s.port, s.known(t), id, "ciphers chacha20-poly1305@openssh.com,aes128-ctr")
	sp.Config.Set = nil
	if info := dial(t, sp).Server(); info.Cipher != ssh.CipherAES128GCM {
		t.Errorf("got %+v", info)
	}
}

func TestDialGivesUp(t *testing.T) {
	accepted := make(chan struct{}, 1)
	silent := listen(t, func(c net.Conn) { accepted <- struct{}{}; io.Copy(io.Discard, c) })
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-accepted; cancel() }()
	_, err := (&Dialer{}).Dial(ctx, spec(t, silent), nil)
	if err == nil || !strings.Contains(err.Error(), "gave up connecting: context canceled") {
		t.Errorf("got %v", err)
	}
	_, err = (&Dialer{}).Dial(ctx, spec(t, silent), nil)
	if err == nil || !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "gave up connecting") {
		t.Errorf("got %v", err)
	}
}

func TestLookupFailures(t *testing.T) {
	d := newDialing(spec(t, 22))
	for want, err := range map[string]error{
		"127.0.0.1:22: host name not found; check the name and HostName in ssh_config": &net.DNSError{Err: "no such host", IsNotFound: true},
		"127.0.0.1:22: host name lookup failed: server misbehaving":                    &net.DNSError{Err: "server misbehaving", IsTemporary: true},
		"127.0.0.1:22: no route to host (192.0.2.1)": &net.OpError{Op: "dial",
			Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 22}, Err: os.NewSyscallError("connect", syscall.EHOSTUNREACH)},
		"127.0.0.1:22: connection timed out after 30s (192.0.2.1)": &net.OpError{Op: "dial",
			Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 22}, Err: os.ErrDeadlineExceeded},
	} {
		if got := d.explainDial(t.Context(), err); got.Error() != want || !errors.Is(got, err) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestConnectionAttempts(t *testing.T) {
	port := freePort(t)
	sp := spec(t, port, "connectionattempts 2")
	start := time.Now()
	if got := dialError(t, sp); !strings.Contains(got, "connection refused") {
		t.Errorf("got %q", got)
	}
	if time.Since(start) < time.Second {
		t.Error("no second attempt was made")
	}
}
