package local

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

func newAuthority(t *testing.T) (*Authority, *[]string) {
	t.Helper()
	var published []string
	a, err := NewAuthority(func(ca string) error {
		published = append(published, ca)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return a, &published
}

func connPair(t *testing.T) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

type result struct {
	conn *Conn
	err  error
}

func accept(a *Authority, c net.Conn, login func(context.Context) error, h *Handshake) <-chan result {
	done := make(chan result, 1)
	go func() {
		conn, err := a.Accept(context.Background(), c, Config{
			User: "alice", Principals: Principals("DB.example.com", "db", "db.example.com", "", "[::1]", "[127.0.0.1]:2299"), Login: login,
		}, h)
		done <- result{conn, err}
	}()
	return done
}

func take[T any](t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: not within %v", what, patience)
	}
	panic("unreachable")
}

func letIn(context.Context) error { return nil }

const openSSH92 = "SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u6"

// What a client lists decides what it is offered, and its host key is one that the published CA vouches for.
func TestAlgorithmsFollowTheClient(t *testing.T) {
	for name, x := range map[string]struct {
		version         string
		kex, hostKeys   []string
		ciphers         []string
		wantKex         string
		wantCipher      string
		wantCert, plain string
	}{
		"OpenSSH 9.2": {
			version: openSSH92, kex: []string{ssh.KeyExchangeCurve25519, ssh.KeyExchangeECDHP256},
			hostKeys: []string{ssh.CertAlgoED25519v01, ssh.CertAlgoECDSA256v01, ssh.KeyAlgoED25519},
			ciphers:  []string{ssh.CipherChaCha20Poly1305, ssh.CipherAES256GCM, ssh.CipherAES128GCM},
			wantKex:  ssh.KeyExchangeECDHP256, wantCipher: ssh.CipherAES128GCM, wantCert: ssh.CertAlgoECDSA256v01,
		},
		"OpenSSH 10.1": {
			version: "SSH-2.0-OpenSSH_10.1", kex: []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeECDHP256},
			hostKeys: []string{ssh.CertAlgoECDSA256v01}, ciphers: []string{ssh.CipherChaCha20Poly1305, ssh.CipherAES128GCM},
			wantKex: ssh.KeyExchangeMLKEM768X25519, wantCipher: ssh.CipherAES128GCM, wantCert: ssh.CertAlgoECDSA256v01,
		},
		"no ECDSA": {
			version: openSSH92, kex: []string{ssh.KeyExchangeCurve25519}, hostKeys: []string{ssh.CertAlgoED25519v01},
			ciphers: []string{ssh.CipherChaCha20Poly1305}, wantKex: ssh.KeyExchangeCurve25519,
			wantCipher: ssh.CipherChaCha20Poly1305, wantCert: ssh.CertAlgoED25519v01,
		},
		"RSA certificates only": {
			version: openSSH92, kex: []string{ssh.KeyExchangeECDHP256}, hostKeys: []string{ssh.CertAlgoRSASHA512v01},
			ciphers: []string{ssh.CipherAES256CTR}, wantKex: ssh.KeyExchangeECDHP256, wantCipher: ssh.CipherAES256CTR,
			wantCert: ssh.CertAlgoRSAv01,
		},
		"without certificates": {
			version: "SSH-2.0-PuTTY_Release_0.78", kex: []string{ssh.KeyExchangeCurve25519},
			hostKeys: []string{ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256}, ciphers: []string{ssh.CipherAES256CTR, ssh.CipherAES256GCM},
			wantKex: ssh.KeyExchangeCurve25519, wantCipher: ssh.CipherAES256GCM, plain: ssh.KeyAlgoECDSA256,
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, published := newAuthority(t)
			near, far := connPair(t)
			done := accept(a, far, letIn, NewHandshake())
			var shown ssh.PublicKey
			c, chans, reqs, err := ssh.NewClientConn(near, "db.example.com:22", &ssh.ClientConfig{
				Config:            ssh.Config{KeyExchanges: x.kex, Ciphers: x.ciphers},
				ClientVersion:     x.version,
				User:              "alice",
				HostKeyAlgorithms: x.hostKeys,
				HostKeyCallback:   func(_ string, _ net.Addr, key ssh.PublicKey) error { shown = key; return nil },
			})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			go ssh.DiscardRequests(reqs)
			go func() {
				for range chans {
				}
			}()
			in := take(t, "let in", done)
			if in.err != nil {
				t.Fatal(in.err)
			}
			defer in.conn.Wait()
			defer in.conn.Close()
			if got := string(c.ServerVersion()); got != Identification || !strings.HasPrefix(got, "SSH-2.0-OpenSSH") {
				t.Errorf("identification %q", got)
			}
			if in.conn.OpenSSH() != strings.HasPrefix(x.version, "SSH-2.0-OpenSSH") {
				t.Error("taken for the wrong client")
			}
			got := c.(ssh.AlgorithmsConnMetadata).Algorithms()
			if got.KeyExchange != x.wantKex || got.Write.Cipher != x.wantCipher || got.Read.Cipher != x.wantCipher {
				t.Errorf("got %s and %s, want %s and %s", got.KeyExchange, got.Write.Cipher, x.wantKex, x.wantCipher)
			}
			if x.plain != "" {
				if shown.Type() != x.plain {
					t.Errorf("shown a %s key, want %s", shown.Type(), x.plain)
				}
				plain, _, err := a.Keys()
				if err != nil || !slices.Contains(plain, authorized(shown)) {
					t.Errorf("host-key does not list %s (%v)", authorized(shown), err)
				}
				return
			}
			cert, ok := shown.(*ssh.Certificate)
			if !ok || cert.Type() != x.wantCert {
				t.Fatalf("shown %s, want a certificate %s", shown.Type(), x.wantCert)
			}
			if want := []string{"db.example.com", "db", "::1", "[127.0.0.1]:2299"}; !slices.Equal(cert.ValidPrincipals, want) {
				t.Errorf("principals %q, want %q", cert.ValidPrincipals, want)
			}
			if !slices.Contains(*published, authorized(cert.SignatureKey)) {
				t.Error("the certificate's CA was not published")
			}
			checker := &ssh.CertChecker{IsHostAuthority: func(key ssh.PublicKey, _ string) bool {
				return slices.Contains(*published, authorized(key))
			}}
			if err := checker.CheckHostKey("db:22", near.RemoteAddr(), cert); err != nil {
				t.Error(err)
			}
		})
	}
}

func authorized(k ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k)))
}

// Clients of every make start the key exchanges after the first.
func TestNoLaterKeyExchangeIsStartedHere(t *testing.T) {
	for _, version := range []string{"SSH-2.0-OpenSSH_9.2", "SSH-2.0-PuTTY_Release_0.78", "SSH-2.0-Go", ""} {
		o := &opening{version: version}
		if c := o.algorithms(); c.RekeyThreshold < 1<<60 {
			t.Errorf("%q: after %d bytes", version, c.RekeyThreshold)
		}
	}
}

func TestAnOpenSSHWithoutCertificatesIsToldSo(t *testing.T) {
	a, _ := newAuthority(t)
	near, far := connPair(t)
	done := accept(a, far, letIn, NewHandshake())
	_, _, _, err := ssh.NewClientConn(near, "x", &ssh.ClientConfig{
		ClientVersion: openSSH92, User: "alice", HostKeyAlgorithms: []string{ssh.KeyAlgoECDSA256},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err == nil {
		t.Error("let in")
	}
	if err := take(t, "refusal", done).err; !errors.Is(err, errNoCertificate) || !strings.Contains(err.Error(), "MUXPROXY_BYPASS") {
		t.Errorf("got %v", err)
	}
}

func TestTheIdentificationGoesOutAtOnce(t *testing.T) {
	a, _ := newAuthority(t)
	near, far := connPair(t)
	done := accept(a, far, letIn, NewHandshake())
	line, err := bufio.NewReader(near).ReadString('\n')
	if err != nil || line != Identification+"\r\n" {
		t.Errorf("got %q, %v", line, err)
	}
	near.Close()
	take(t, "the end", done)
}

func dial(near net.Conn, cfg ssh.ClientConfig) (ssh.Conn, error) {
	if cfg.HostKeyCallback == nil {
		cfg.HostKeyCallback = ssh.InsecureIgnoreHostKey()
	}
	c, chans, reqs, err := ssh.NewClientConn(near, "db:22", &cfg)
	if err != nil {
		return nil, err
	}
	go ssh.DiscardRequests(reqs)
	go func() {
		for range chans {
		}
	}()
	return c, nil
}

// paramiko never tries none; any public key and any password do, once the upstream is there.
func TestWhoIsLetIn(t *testing.T) {
	signer := func() ssh.Signer {
		k, err := keyTypes[1].generate()
		if err != nil {
			t.Fatal(err)
		}
		s, err := ssh.NewSignerFromSigner(k)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}()
	refused := errors.New("db.example.com:22: connection refused")
	for name, x := range map[string]struct {
		user  string
		auth  []ssh.AuthMethod
		login error
		ok    bool
	}{
		"none":          {user: "alice", ok: true},
		"any key":       {user: "alice", auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, ok: true},
		"another user":  {user: "mallory"},
		"no upstream":   {user: "alice", login: refused},
		"key and no up": {user: "alice", auth: []ssh.AuthMethod{ssh.PublicKeys(signer), ssh.Password("x")}, login: refused},
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := newAuthority(t)
			near, far := connPair(t)
			logins := 0
			h := NewHandshake()
			done := accept(a, far, func(context.Context) error {
				logins++
				if x.login != nil {
					h.Say("muxproxy: " + x.login.Error())
				}
				return x.login
			}, h)
			var banner strings.Builder
			c, err := dial(near, ssh.ClientConfig{
				User: x.user, Auth: x.auth, BannerCallback: func(m string) error { banner.WriteString(m); return nil },
			})
			in := take(t, "decision", done)
			if x.ok != (err == nil) || x.ok != (in.err == nil) {
				t.Fatalf("client: %v, server: %v", err, in.err)
			}
			if x.ok {
				c.Close()
				in.conn.Close()
				in.conn.Wait()
			}
			if x.login != nil && (!errors.Is(in.err, x.login) || banner.String() != "muxproxy: "+x.login.Error()+"\r\n") {
				t.Errorf("error %v, banner %q", in.err, banner.String())
			}
			if want := 1; x.user == "alice" && logins != want {
				t.Errorf("asked %d times", logins)
			}
		})
	}
}

// interactive answers as a person at an ssh would, and notes what was shown.
type interactive struct {
	shown   []string
	answers map[string]string
	fail    bool
}

func (i *interactive) challenge(name, instruction string, prompts []string, echos []bool) ([]string, error) {
	if i.fail {
		return nil, errors.New("no tty")
	}
	var out []string
	for n, p := range prompts {
		echo := "hidden"
		if echos[n] {
			echo = "echo"
		}
		i.shown = append(i.shown, name+"|"+instruction+"|"+p+"|"+echo)
		out = append(out, i.answers[p])
	}
	return out, nil
}

func TestQuestions(t *testing.T) {
	wrong := errors.New("permission denied")
	// The login asks for a secret, and, if that is right, for a code.
	login := func(h *Handshake) func(context.Context) error {
		return func(ctx context.Context) error {
			for _, q := range []struct {
				q    Question
				want string
			}{
				{Question{"muxproxy", "", []string{"Password: "}, []bool{false}}, "secret"},
				{Question{"server db", "two steps", []string{"Code: "}, []bool{true}}, "123"},
			} {
				for tries := 0; ; tries++ {
					answers, err := h.Ask(ctx, q.q)
					if err != nil {
						return err
					}
					if answers[0] == q.want {
						break
					}
					if tries == 2 {
						return wrong
					}
				}
			}
			return nil
		}
	}
	codeOnly := func(h *Handshake) func(context.Context) error {
		return func(ctx context.Context) error {
			answers, err := h.Ask(ctx, Question{Prompts: []string{"Password: "}, Echos: []bool{false}})
			if err == nil && answers[0] != "secret" {
				err = wrong
			}
			return err
		}
	}
	good := map[string]string{"Password: ": "secret", "Code: ": "123"}
	for name, x := range map[string]struct {
		login  func(*Handshake) func(context.Context) error
		person interactive
		auth   func(*interactive) []ssh.AuthMethod
		err    error
		shown  []string
	}{
		"two steps": {
			login: login, person: interactive{answers: good},
			auth: func(i *interactive) []ssh.AuthMethod {
				return []ssh.AuthMethod{ssh.KeyboardInteractive(i.challenge)}
			},
			shown: []string{"muxproxy||Password: |hidden", "server db|two steps|Code: |echo"},
		},
		"wrong": {
			login: login, person: interactive{answers: map[string]string{}},
			auth: func(i *interactive) []ssh.AuthMethod {
				return []ssh.AuthMethod{ssh.KeyboardInteractive(i.challenge)}
			},
			err:   wrong,
			shown: []string{"muxproxy||Password: |hidden", "muxproxy||Password: |hidden", "muxproxy||Password: |hidden"},
		},
		"only password": {
			login: codeOnly, auth: func(*interactive) []ssh.AuthMethod { return []ssh.AuthMethod{ssh.Password("secret")} },
		},
		"only a wrong password": {
			login: codeOnly, auth: func(*interactive) []ssh.AuthMethod { return []ssh.AuthMethod{ssh.Password("no")} }, err: wrong,
		},
		"password, then a code that nobody can be asked for": {
			login: login, auth: func(*interactive) []ssh.AuthMethod { return []ssh.AuthMethod{ssh.Password("secret")} },
			err: ErrUnanswered,
		},
		"no method that asks": {login: login, auth: func(*interactive) []ssh.AuthMethod { return nil }, err: ErrUnanswered},
		"asks, but can't show": {
			login: login, person: interactive{fail: true},
			auth: func(i *interactive) []ssh.AuthMethod {
				return []ssh.AuthMethod{ssh.KeyboardInteractive(i.challenge)}
			},
			err: ErrUnanswered,
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := newAuthority(t)
			near, far := connPair(t)
			h := NewHandshake()
			ended := make(chan error, 1)
			done := accept(a, far, func(ctx context.Context) error {
				err := x.login(h)(ctx)
				ended <- err
				return err
			}, h)
			person := x.person
			c, err := dial(near, ssh.ClientConfig{User: "alice", Auth: x.auth(&person)})
			if (err == nil) != (x.err == nil) {
				t.Errorf("the client got %v", err)
			}
			if err != nil {
				near.Close()
			}
			// A client that left is noticed by its transport, or by the question that it did not answer.
			if err := take(t, "the login's end", ended); !errors.Is(err, x.err) && !errors.Is(err, context.Canceled) {
				t.Errorf("the login ended with %v, want %v", err, x.err)
			}
			if in := take(t, "decision", done); in.err == nil {
				c.Close()
				in.conn.Close()
				in.conn.Wait()
			}
			if !slices.Equal(person.shown, x.shown) {
				t.Errorf("shown %q, want %q", person.shown, x.shown)
			}
		})
	}
}

func TestAClientThatLeavesEndsItsLogin(t *testing.T) {
	a, _ := newAuthority(t)
	near, far := connPair(t)
	waiting, ended := make(chan struct{}), make(chan struct{})
	done := accept(a, far, func(ctx context.Context) error {
		close(waiting)
		<-ctx.Done()
		close(ended)
		return ctx.Err()
	}, NewHandshake())
	go dial(near, ssh.ClientConfig{User: "alice"})
	<-waiting
	near.Close()
	take(t, "the login's end", ended)
	if in := take(t, "the end", done); in.err == nil {
		t.Error("let in after it had left")
	}
}

func TestARefusedHostKeyIsRecognised(t *testing.T) {
	a, _ := newAuthority(t)
	near, far := connPair(t)
	done := accept(a, far, letIn, NewHandshake())
	_, err := dial(near, ssh.ClientConfig{
		User: "alice", HostKeyCallback: func(string, net.Addr, ssh.PublicKey) error { return errors.New("unknown") },
	})
	if err == nil {
		t.Error("let in")
	}
	near.Close()
	if err := take(t, "the end", done).err; !errors.Is(err, ErrHostKeyRefused) {
		t.Errorf("got %v", err)
	}
}

func TestAFailedPublishShowsNoKey(t *testing.T) {
	full := errors.New("no space left on device")
	if _, err := NewAuthority(func(string) error { return full }); !errors.Is(err, full) {
		t.Errorf("got %v", err)
	}
}

func TestKnownHostsLine(t *testing.T) {
	a, published := newAuthority(t)
	if plain, cas := a.Made(); len(plain) != 1 || !slices.Equal(cas, *published) {
		t.Errorf("made at the start: %q, %q, published %q", plain, cas, *published)
	}
	plain, cas, err := a.Keys()
	if err != nil {
		t.Fatal(err)
	}
	if p, c := a.Made(); !slices.Equal(p, plain) || !slices.Equal(c, cas) {
		t.Errorf("made %q, %q, not %q, %q", p, c, plain, cas)
	}
	if len(*published) != len(keyTypes) {
		t.Fatalf("%d CAs published", len(*published))
	}
	for _, ca := range *published {
		marker, hosts, _, comment, rest, err := ssh.ParseKnownHosts([]byte(KnownHostsLine(ca, "host+1")))
		if marker != "cert-authority" || !slices.Equal(hosts, []string{"*"}) || comment != "host+1" || len(rest) > 0 || err != nil {
			t.Errorf("%q %q %q %q %v", marker, hosts, comment, rest, err)
		}
	}
}

func TestBadOpeningsEndAlone(t *testing.T) {
	for name, bytes := range map[string]string{
		"early end":        "SSH-2.0-OpenSSH_9.2\r\n",
		"nothing":          "",
		"not ssh":          "GET / HTTP/1.1\r\n\r\n",
		"endless line":     "SSH-2.0-" + strings.Repeat("x", 300),
		"huge packet":      "SSH-2.0-x\r\n\xff\xff\xff\xff\x04\x14",
		"empty packet":     "SSH-2.0-x\r\n\x00\x00\x00\x01\x00",
		"only padding":     "SSH-2.0-x\r\n\x00\x00\x00\x05\x04\x00\x00\x00\x00",
		"truncated packet": "SSH-2.0-x\r\n\x00\x00\x01\x00\x04\x14abc",
		"not a KEXINIT":    "SSH-2.0-x\r\n\x00\x00\x00\x0c\x04\x05\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := newAuthority(t)
			near, far := connPair(t)
			done := accept(a, far, letIn, NewHandshake())
			io.WriteString(near, bytes)
			near.(*net.TCPConn).CloseWrite()
			if in := take(t, "the end", done); in.err == nil {
				t.Error("let in")
			}
			near.SetReadDeadline(time.Now().Add(patience))
			if _, err := io.Copy(io.Discard, near); errors.Is(err, context.DeadlineExceeded) {
				t.Error("not closed")
			}
		})
	}
}

func FuzzReadOpening(f *testing.F) {
	f.Add([]byte(openSSH92 + "\r\n\x00\x00\x00\x0c\x04\x14\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00rest"))
	f.Add([]byte("SSH-2.0-\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		conn := bytes.NewReader(data)
		in := bufio.NewReader(conn)
		o, err := readOpening(in)
		if err != nil {
			return
		}
		o.algorithms()
		all, err := io.ReadAll(o.replay(in, conn)) // x/crypto sees every byte once, in order
		if err != nil || !bytes.Equal(all, data) {
			t.Errorf("replayed %q of %q, %v", all, data, err)
		}
	})
}
