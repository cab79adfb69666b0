//go:build linux

package e2e

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// otherSSHD starts a second sshd, with these lines before the world's own: the first value of a keyword counts. It gives the
// server to the link.
func (w *world) otherSSHD(lines ...string) {
	t := w.t
	t.Helper()
	own := w.read("sshd_config")
	_, own, _ = strings.Cut(own, "\n") // Port
	log := newBuffer()
	for range 20 {
		port := freePort(t)
		conf := w.write("sshd_config2", fmt.Sprintf("%s\nPort %d\n%s", strings.Join(lines, "\n"), port, own))
		cmd := exec.Command(sshdPath, "-D", "-e", "-f", conf)
		cmd.Stderr = log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		up := false
		within(patience, func() bool {
			select {
			case <-ended:
				return true
			default:
				up = speaksSSH(loopback(port))
				return up
			}
		})
		if up {
			t.Cleanup(func() { cmd.Process.Kill(); <-ended })
			w.link.lead(loopback(port))
			return
		}
	}
	t.Fatalf("sshd does not start:\n%s", log)
}

const (
	sntrup = "sntrup761x25519-sha512@openssh.com"
	umac   = "umac-128-etm@openssh.com,umac-64-etm@openssh.com,umac-128@openssh.com,umac-64@openssh.com"
)

// What x/crypto can't do is one line, and MUXPROXY_BYPASS=1 does it as plain ssh does.
func TestWhatCantBeShared(t *testing.T) {
	for _, c := range []struct {
		name   string
		sshd   []string                // lines of sshd_config
		files  func(w *world)          // what else is needed
		config func(w *world) []string // lines of ssh_config
		has    []string                // what the line names
		plain  func(t *testing.T) bool // whether plain ssh can do it here; nil: it can
	}{
		{
			name: "server with sntrup only",
			sshd: []string{"KexAlgorithms " + sntrup},
			has:  []string{"key exchange", sntrup},
		},
		{
			name: "server with umac only",
			sshd: []string{"MACs " + umac, "Ciphers aes128-ctr"},
			has:  []string{"MAC", "umac"},
		},
		{
			name:   "KexAlgorithms sntrup",
			config: func(*world) []string { return []string{"KexAlgorithms " + sntrup} },
			has:    []string{"KexAlgorithms", sntrup},
		},
		{
			name:   "MACs umac",
			config: func(*world) []string { return []string{"MACs " + umac, "Ciphers aes128-ctr"} },
			has:    []string{"MACs", "umac"},
		},
		{
			name:   "HostKeyAlgorithms without certificates",
			config: func(*world) []string { return []string{"HostKeyAlgorithms ssh-ed25519"} },
			has:    []string{"HostKeyAlgorithms"},
		},
		{
			name: "GSSAPI only",
			sshd: []string{"PubkeyAuthentication no", "GSSAPIAuthentication yes"},
			config: func(*world) []string {
				return []string{"GSSAPIAuthentication yes", "PreferredAuthentications gssapi-with-mic"}
			},
			has:   []string{"gssapi-with-mic"},
			plain: never,
		},
		{
			name:   "hostbased only",
			sshd:   []string{"PubkeyAuthentication no", "HostbasedAuthentication yes"},
			config: func(*world) []string { return []string{"HostbasedAuthentication yes"} },
			has:    []string{"hostbased"},
			plain:  never,
		},
		{
			name: "PKCS11Provider",
			config: func(w *world) []string {
				return []string{"PKCS11Provider " + w.path("libtoken.so"), "IdentityFile none"}
			},
			has:   []string{"PKCS11Provider"},
			plain: never,
		},
		{
			name:   "security key in a file",
			files:  func(w *world) { w.write("id_sk", securityKey(w.t)) },
			config: func(w *world) []string { return []string{"IdentityFile " + w.path("id_sk")} },
			has:    []string{"id_sk", "security key"},
			plain:  never,
		},
		{
			name: "KnownHostsCommand",
			files: func(w *world) {
				w.write("commanded", w.read("known_hosts"))
				w.write("known_hosts", "")
			},
			config: func(w *world) []string { return []string{"KnownHostsCommand /bin/cat " + w.path("commanded")} },
			has:    []string{"KnownHostsCommand"},
		},
		{
			name: "RevokedHostKeys with a KRL",
			files: func(w *world) {
				// It revokes a key that nobody has.
				_, key, err := ed25519.GenerateKey(rand.Reader)
				if err != nil {
					w.t.Fatal(err)
				}
				_, public, err := marshalKey(key)
				if err != nil {
					w.t.Fatal(err)
				}
				krl := w.run(spec{args: []string{"ssh-keygen", "-kf", w.path("krl"),
					w.write("revoked.pub", string(ssh.MarshalAuthorizedKey(public)))}, null: true})
				if krl.status != 0 {
					w.t.Fatalf("ssh-keygen -k: %s", krl.err)
				}
			},
			config: func(w *world) []string { return []string{"RevokedHostKeys " + w.path("krl")} },
			has:    []string{"RevokedHostKeys", "key revocation list"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			forEach(t, func(t *testing.T, w *world) {
				if c.files != nil {
					c.files(w)
				}
				if c.sshd != nil {
					w.otherSSHD(c.sshd...)
				}
				if c.config != nil {
					lines := "Host box\n    " + strings.Join(c.config(w), "\n    ") + "\n"
					conf := w.read("ssh_config")
					for _, l := range c.config(w) {
						if strings.HasPrefix(l, "IdentityFile ") { // it would only add to the list
							conf = strings.Replace(conf, "    IdentityFile "+w.path("id")+"\n", "", 1)
						}
					}
					w.write("ssh_config", lines+conf)
				}
				if w.mode != plain {
					w.fails(t, append(c.has, "MUXPROXY_BYPASS=1"), "box", "true")
				}
				if c.plain != nil && !c.plain(t) {
					return
				}
				env := append([]string{"MUXPROXY_BYPASS=1"}, w.env...)
				want(t, w.run(spec{args: w.sshArgs("box", "echo bypassed"), env: env, null: true}), 0, "bypassed\n")
			})
		})
	}
}

// never is for what needs a realm, a token or a trusted host to succeed.
func never(t *testing.T) bool {
	t.Log("nothing here can show that plain ssh succeeds")
	return false
}

// securityKey is a file as `ssh-keygen -t ed25519-sk` writes it (PROTOCOL.u2f), of a token that does not exist.
func securityKey(t testing.TB) string {
	t.Helper()
	raw, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public := ssh.Marshal(struct {
		Type        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, raw, "ssh:"})
	private := ssh.Marshal(struct {
		Check1, Check2 uint32
		Type           string
		Key            []byte
		Application    string
		Flags          byte
		Handle         []byte
		Reserved       []byte
		Comment        string
	}{1, 1, ssh.KeyAlgoSKED25519, raw, "ssh:", 1, make([]byte, 64), nil, "token"})
	for pad := byte(1); len(private)%8 != 0; pad++ {
		private = append(private, pad)
	}
	body := append([]byte("openssh-key-v1\x00"), ssh.Marshal(struct {
		Cipher, KDF string
		Options     []byte
		Keys        uint32
		Public      []byte
		Private     []byte
	}{"none", "none", nil, 1, public, private})...)
	return string(pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: body}))
}
