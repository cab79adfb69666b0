package upstream

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// agentTimeout bounds an agent's answer to what it needs no person for.
	agentTimeout = 10 * time.Second
	maxKeyFile   = 1 << 20
)

// agentKeys asks the agent. It is dialled for this login only, since an agent serves one connection at a time.
func (l *login) agentKeys() []*identity {
	if l.spec.Agent == nil || strings.EqualFold(l.spec.Config.Get("identityagent"), "none") {
		return nil
	}
	c, err := l.spec.Agent.Dial()
	if err != nil {
		l.note("the agent can't be reached: %s", systemText(err))
		return nil
	}
	l.agentConn = c
	l.stopWatch = context.AfterFunc(l.ctx, func() { c.Close() })
	// Not every stream knows deadlines; then ctx is the only bound.
	_ = c.SetDeadline(time.Now().Add(agentTimeout))
	l.agent = agent.NewClient(c)
	signers, err := l.agent.Signers()
	if err != nil {
		l.note("the agent does not answer: %s", use.Printable(err.Error()))
		return nil
	}
	_ = c.SetDeadline(time.Time{})
	var out []*identity
	for _, s := range signers {
		// The agent's own type of key knows neither certificates nor sizes.
		pub, err := ssh.ParsePublicKey(s.PublicKey().Marshal())
		signer, ok := s.(ssh.AlgorithmSigner)
		if err != nil || !ok {
			l.log.Debug().Str("type", use.Printable(s.PublicKey().Type())).Msg("agent's key skipped")
			continue
		}
		if l.spec.Silent && touched(pub) {
			l.debugf("Skipping %s key %s: it wants a touch.", pub.Type(), ssh.FingerprintSHA256(pub))
			continue
		}
		out = append(out, &identity{login: l, label: "agent key " + ssh.FingerprintSHA256(pub), pub: pub, signer: signer, agent: true})
	}
	return out
}

// touched tells whether a key is on a security key, which wants a touch for each signature (PROTOCOL.u2f).
func touched(key ssh.PublicKey) bool { return strings.HasPrefix(plainKey(key).Type(), "sk-") }

// files loads CertificateFile, and IdentityFile in its order. A certificate beside a key counts only if no CertificateFile is
// given (load_public_identity_files of OpenSSH's ssh.c); it comes after its key.
func (l *login) files() (certs, keys []*identity) {
	named := false
	for _, path := range l.spec.Config.All("certificatefile") {
		if path == "" || strings.EqualFold(path, "none") {
			continue
		}
		named = true
		if c := l.certificate(path, true); c != nil {
			certs = append(certs, c)
		}
	}
	for _, path := range l.spec.Config.All("identityfile") {
		if path == "" || strings.EqualFold(path, "none") {
			continue
		}
		if key := l.keyFile(path); key != nil {
			keys = append(keys, key)
		}
		if named {
			continue
		}
		if c := l.certificate(path+"-cert.pub", false); c != nil {
			keys = append(keys, c)
		}
	}
	return certs, keys
}

func (l *login) certificate(path string, wanted bool) *identity {
	pub, err := publicFile(path)
	cert, ok := pub.(*ssh.Certificate)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !wanted:
		return nil
	case err != nil:
		l.note("certificate %s: %s", shortPath(path), systemText(err))
		return nil
	case !ok || cert.CertType != ssh.UserCert:
		l.note("%s is not a user certificate", shortPath(path))
		return nil
	}
	return &identity{login: l, label: shortPath(path), pub: cert}
}

// keyFile loads an identity file: a private key, perhaps locked, or a public one whose private half the agent has. nil if
// there is nothing to use or to look for in the agent; what a person should know is noted.
func (l *login) keyFile(path string) *identity {
	id := &identity{login: l, label: shortPath(path), path: path}
	l.loaded = append(l.loaded, id)
	text, err := readKeyFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		l.debugf("identity file %s does not exist", path)
		return l.publicHalf(id)
	}
	if err != nil {
		id.lacks = fmt.Sprintf("key %s can't be read: %s", id.label, systemText(err))
		return l.publicHalf(id)
	}
	defer clear(text)
	if pub, _, _, _, err := ssh.ParseAuthorizedKey(text); err == nil {
		id.pub = pub
		return id
	}
	if err := checkKeyMode(path); err != nil {
		id.lacks = fmt.Sprintf("key %s is ignored: %s", id.label, systemText(err))
		return l.publicHalf(id)
	}
	id.raw, err = ssh.ParseRawPrivateKey(text)
	var missing *ssh.PassphraseMissingError
	switch {
	case errors.As(err, &missing):
		id.locked = true
		if id.pub = missing.PublicKey; id.pub == nil {
			id.pub, _ = publicFile(path + ".pub") // nil: it has to be unlocked to be offered
		}
		return id
	case err == nil:
		err = id.adopt()
	}
	if err != nil {
		id.lacks = fmt.Sprintf("key %s can't be used: %s", id.label, use.Printable(strings.TrimPrefix(err.Error(), "ssh: ")))
		if pub := securityKey(text); pub != nil {
			id.pub = pub
			id.lacks = fmt.Sprintf("key %s is a security key, which only an agent can use here; ssh-add it", id.label)
			return id
		}
		return l.publicHalf(id)
	}
	return id
}

// adopt makes a signer of raw.
func (i *identity) adopt() error {
	signer, err := ssh.NewSignerFromKey(i.raw)
	if err != nil {
		return err
	}
	i.signer, _ = signer.(ssh.AlgorithmSigner) // all of x/crypto/ssh's are
	if i.pub != nil && !sameKey(i.pub, signer.PublicKey()) {
		i.signer = nil
		return fmt.Errorf("%s.pub is not its public half", i.path)
	}
	i.pub = signer.PublicKey()
	return nil
}

// unlock asks for the passphrase, as often as NumberOfPasswordPrompts says. An empty answer gives the key up.
func (i *identity) unlock() (err error) {
	l := i.login
	i.spent = true
	defer func() { i.spent = err != nil }()
	text, err := readKeyFile(i.path)
	if err != nil {
		l.note("key %s can't be read: %s", i.label, systemText(err))
		return err
	}
	defer clear(text)
	for range l.prompts() {
		answer, err := l.askLine(l.ctx, "", fmt.Sprintf("Enter passphrase for key '%s': ", use.Printable(i.path)), false)
		if err != nil {
			l.needs("a passphrase for "+i.label, err)
			return err
		}
		if answer == "" {
			l.note("no passphrase was given for %s", i.label)
			return errSpent
		}
		passphrase := []byte(answer)
		i.raw, err = ssh.ParseRawPrivateKeyWithPassphrase(text, passphrase)
		clear(passphrase)
		if err == nil {
			err = i.adopt()
		}
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, x509.IncorrectPasswordError):
			l.note("key %s can't be used: %s", i.label, use.Printable(strings.TrimPrefix(err.Error(), "ssh: ")))
			return err
		}
	}
	l.note("wrong passphrase for %s", i.label)
	return errSpent
}

// wipe drops the private key, and overwrites it where it is bytes.
func (i *identity) wipe() {
	switch raw := i.raw.(type) {
	case *ed25519.PrivateKey:
		clear(*raw)
	case ed25519.PrivateKey:
		clear(raw)
	}
	i.raw, i.signer = nil, nil
}

// addToAgent does what AddKeysToAgent says with a key from a file, once. Failing to is no reason not to log in.
func (i *identity) addToAgent() {
	l := i.login
	words := strings.Fields(strings.ToLower(l.option("addkeystoagent")))
	if i.raw == nil || i.added || len(words) == 0 {
		return
	}
	i.added = true
	key := agent.AddedKey{PrivateKey: i.raw, Comment: i.path}
	ask := false
	for _, w := range words {
		switch seconds, err := strconv.ParseUint(w, 10, 32); {
		case err == nil: // ssh -G prints times so
			key.LifetimeSecs = uint32(seconds)
		case w == "confirm":
			key.ConfirmBeforeUse = true
		case w == "ask":
			ask = true
		case w != "yes" && w != "true":
			return // no
		}
	}
	if l.agent == nil {
		l.debugf("no authentication agent, key %s not added", i.label)
		return
	}
	if ask {
		answer, err := l.askLine(l.ctx, "", fmt.Sprintf("Add key %s to agent? (yes/no) ", use.Printable(i.path)), true)
		if err != nil || !strings.EqualFold(strings.TrimSpace(answer), "yes") {
			l.debugf("key %s not added to the agent", i.label)
			return
		}
	}
	if err := l.agent.Add(key); err != nil {
		l.sayf("could not add key %s to the agent: %s", i.label, err)
		return
	}
	l.debugf("identity added to agent: %s", i.label)
}

// securityKey returns the public half of a security key's file (PROTOCOL.key of OpenSSH), nil for any other.
func securityKey(text []byte) ssh.PublicKey {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "OPENSSH PRIVATE KEY" {
		return nil
	}
	rest, ok := bytes.CutPrefix(block.Bytes, []byte("openssh-key-v1\x00"))
	var file struct {
		Cipher, KDF, Options string
		Count                uint32
		Public               []byte
		Rest                 []byte `ssh:"rest"`
	}
	if !ok || ssh.Unmarshal(rest, &file) != nil {
		return nil
	}
	pub, err := ssh.ParsePublicKey(file.Public)
	if err != nil || pub.Type() != ssh.KeyAlgoSKED25519 && pub.Type() != ssh.KeyAlgoSKECDSA256 {
		return nil
	}
	return pub
}

// publicHalf makes do with PATH.pub, to find the key in the agent. Without it, what the key lacks is all there is to say.
func (l *login) publicHalf(id *identity) *identity {
	pub, err := publicFile(id.path + ".pub")
	if err != nil {
		if id.lacks != "" {
			l.noteBypass("%s", id.lacks)
		}
		return nil
	}
	id.pub = pub
	return id
}

func publicFile(path string) (ssh.PublicKey, error) {
	text, err := readKeyFile(path)
	if err != nil {
		return nil, err
	}
	pub, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil, errors.New("not a public key")
	}
	return pub, nil
}

func readKeyFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	if info.Size() > maxKeyFile {
		return nil, errors.New("too large for a key")
	}
	return os.ReadFile(path)
}

// shortPath shows a path as a person would write it.
func shortPath(path string) string {
	if home, err := os.UserHomeDir(); err == nil && home != "/" {
		if rest, ok := strings.CutPrefix(path, home+string(filepath.Separator)); ok {
			path = "~/" + filepath.ToSlash(rest)
		}
	}
	return use.Printable(path)
}
