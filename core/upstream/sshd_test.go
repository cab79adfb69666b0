package upstream

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

// asProxy is the test binary as a ProxyCommand, where there is one.
var asProxy func(mode string)

func TestMain(m *testing.M) {
	if mode := os.Getenv("MUXPROXY_TEST_PROXY"); mode != "" {
		asProxy(mode)
		return
	}
	goleak.VerifyTestMain(m)
}

// key is a key pair in every form that a test wants.
type key struct {
	private crypto.Signer
	signer  ssh.Signer
	pub     ssh.PublicKey
}

func newKey(t testing.TB, kind string) key {
	t.Helper()
	var private crypto.Signer
	var err error
	switch kind {
	case "rsa":
		private, err = rsa.GenerateKey(rand.Reader, 2048)
	case "rsa1024":
		private, err = rsa.GenerateKey(rand.Reader, 1024)
	case "ecdsa":
		private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ecdsa521":
		private, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	default:
		_, private, err = ed25519.GenerateKey(rand.Reader)
	}
	check(t, err)
	signer, err := ssh.NewSignerFromSigner(private)
	check(t, err)
	return key{private, signer, signer.PublicKey()}
}

func (k key) line() string { return string(ssh.MarshalAuthorizedKey(k.pub)) }

// file writes the private key, with a passphrase if one is given.
func (k key) file(t testing.TB, dir, name, passphrase string) string {
	t.Helper()
	block, err := ssh.MarshalPrivateKey(k.private, "")
	check(t, err)
	path := write(t, dir, name, string(pem.EncodeToMemory(block)))
	if passphrase != "" { // x/crypto/ssh takes 16 rounds of bcrypt, and as long as those take
		out, err := exec.Command("ssh-keygen", "-q", "-p", "-a", "1", "-P", "", "-N", passphrase, "-f", path).CombinedOutput()
		if err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	return path
}

// certify signs a certificate for other. ValidBefore 0 is for ever.
func (k key) certify(t testing.TB, other ssh.PublicKey, kind uint32, before uint64, principals ...string) *ssh.Certificate {
	t.Helper()
	if before == 0 {
		before = ssh.CertTimeInfinity
	}
	cert := &ssh.Certificate{Key: other, CertType: kind, ValidPrincipals: principals, ValidBefore: before, KeyId: "test"}
	check(t, cert.SignCert(rand.Reader, k.signer))
	return cert
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	check(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func me(t testing.TB) string {
	t.Helper()
	u, err := user.Current()
	check(t, err)
	return u.Username
}

// server is a real sshd.
type server struct {
	port uint16
	host key
	dir  string
}

// startSSHD runs sshd until the test ends. users are the keys that may log in.
func startSSHD(t *testing.T, host key, users []key, config ...string) *server {
	t.Helper()
	sshd, err := exec.LookPath("/usr/sbin/sshd")
	check(t, err)
	if os.Getuid() == 0 {
		check(t, os.MkdirAll("/run/sshd", 0o755)) // sshd wants it as root
	}
	dir := t.TempDir()
	s := &server{host: host, dir: dir}
	authorized := ""
	for _, u := range users {
		authorized += u.line()
	}
	lines := append(config,
		"HostKey "+host.file(t, dir, "hostkey", ""),
		"AuthorizedKeysFile "+write(t, dir, "authorized_keys", authorized),
		"PidFile none", "UsePAM no", "StrictModes no", "LogLevel VERBOSE", "PermitRootLogin yes",
		"PasswordAuthentication no", "KbdInteractiveAuthentication no", "ListenAddress 127.0.0.1")
	path := write(t, dir, "sshd_config", strings.Join(lines, "\n")+"\n")
	for try := 0; ; try++ {
		s.port = freePort(t)
		if s.start(t, sshd, path) {
			return s
		}
		if try == 4 {
			t.Fatal("sshd does not start")
		}
	}
}

// start reports whether sshd got its port; another process can have taken it.
func (s *server) start(t *testing.T, sshd, config string) bool {
	t.Helper()
	cmd := exec.Command(sshd, "-D", "-e", "-f", config, "-p", strconv.Itoa(int(s.port)))
	stderr, err := cmd.StderrPipe()
	check(t, err)
	check(t, cmd.Start())
	log := bufio.NewReader(stderr)
	listening := false
	var said strings.Builder
	for !listening {
		line, err := log.ReadString('\n')
		said.WriteString(line)
		if err != nil {
			break
		}
		listening = strings.HasPrefix(line, "Server listening on")
	}
	if !listening {
		cmd.Wait()
		t.Logf("sshd: %s", said.String())
		return false
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		io.Copy(io.Discard, log)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-drained
		cmd.Wait()
	})
	return true
}

func freePort(t testing.TB) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// spec is what to dial: options are "keyword value" as ssh -G prints them, and count as set by the user.
func spec(t testing.TB, port uint16, options ...string) pool.Spec {
	t.Helper()
	r := &sshconfig.Resolved{Options: map[string][]string{"userknownhostsfile": nil}}
	for _, o := range options {
		k, v, _ := strings.Cut(o, " ")
		r.Options[k] = append(r.Options[k], v)
		r.Set = append(r.Set, k)
	}
	return pool.Spec{Target: use.Target{User: me(t), Host: "127.0.0.1", Port: port, Alias: "box"}, Config: r}
}

func (s *server) known(t testing.TB) string {
	t.Helper()
	return "userknownhostsfile " + write(t, s.dir, "known_hosts", fmt.Sprintf("[127.0.0.1]:%d %s", s.port, s.host.line()))
}

// dial dials, drains what nobody wants and closes at the end of the test.
func dial(t *testing.T, s pool.Spec) pool.Conn {
	t.Helper()
	c, err := (&Dialer{}).Dial(t.Context(), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, c)
	return c
}

func serve(t *testing.T, c pool.Conn) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { ssh.DiscardRequests(c.Requests()) })
	wg.Go(func() {
		for n := range c.Channels() {
			n.Reject(ssh.Prohibited, "no")
		}
	})
	t.Cleanup(func() {
		c.Close()
		c.Wait()
		wg.Wait()
	})
}

// dialError dials what must fail, and returns the line for the person.
func dialError(t *testing.T, s pool.Spec) string {
	t.Helper()
	return dialErr(t, s).Error()
}

func dialErr(t *testing.T, s pool.Spec) error {
	t.Helper()
	c, err := (&Dialer{}).Dial(t.Context(), s, nil)
	if err == nil {
		serve(t, c)
		t.Fatal("the dial succeeded")
	}
	var e *Error
	if !errors.As(err, &e) || strings.ContainsAny(err.Error(), "\n\r\x1b") {
		t.Errorf("not a line for a person: %q", err)
	}
	return err
}

// run executes a command and returns its output.
func run(t *testing.T, c pool.Conn, command string, stdin []byte) []byte {
	t.Helper()
	ch, requests, err := c.OpenChannel("session", nil)
	check(t, err)
	var wg sync.WaitGroup
	wg.Go(func() { ssh.DiscardRequests(requests) })
	defer wg.Wait()
	defer ch.Close()
	ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{command}))
	if err != nil || !ok {
		t.Fatalf("exec: %v, %v", ok, err)
	}
	wg.Go(func() {
		io.Copy(ch, bytes.NewReader(stdin))
		ch.CloseWrite()
	})
	out, err := io.ReadAll(ch)
	check(t, err)
	return out
}

// testAgent is an agent that speaks over pipes in memory.
type testAgent struct {
	t    *testing.T
	keys agent.Agent
}

func newAgent(t *testing.T, keys ...agent.AddedKey) *testAgent {
	t.Helper()
	ring := agent.NewKeyring()
	for _, k := range keys {
		check(t, ring.Add(k))
	}
	return &testAgent{t, ring}
}

func (a *testAgent) ID() string { return "agent-1" }

func (a *testAgent) Dial() (net.Conn, error) {
	near, far := net.Pipe()
	served := make(chan struct{})
	go func() {
		defer close(served)
		agent.ServeAgent(a.keys, far)
		far.Close()
	}()
	a.t.Cleanup(func() { near.Close(); <-served })
	return near, nil
}

// listen serves the agent on a socket, for programs.
func (a *testAgent) listen(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ag") // short enough for a socket
	check(t, err)
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	check(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				agent.ServeAgent(a.keys, c)
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
		os.RemoveAll(dir)
	})
	return path
}

// listenPair is a pair of connected sockets.
func listenPair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	near, err = net.Dial("tcp", l.Addr().String())
	check(t, err)
	far, err = l.Accept()
	check(t, err)
	return near, far
}
