package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
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

// login chooses what to authenticate with (RFC 4252), and remembers what came of it. All of it runs in the goroutine of the
// handshake. It holds keys, and is gone after the handshake.
type login struct {
	*dialing
	ctx context.Context

	started    bool
	identities []*identity
	agentConn  net.Conn
	stopWatch  func() bool // on ctx, for the agent
	keys       []string    // labels of those that were offered
	notes      []string    // what else there would have been
	signed     *identity   // that signed last
	denied     *Error
}

// identity is a key to log in with. As an ssh.Signer it notes that it was offered and that it signed.
type identity struct {
	login   *login
	label   string // for a person, escaped
	pub     ssh.PublicKey
	signer  ssh.AlgorithmSigner // nil: only the public half is here
	algos   []string
	agent   bool
	offered bool
	lacks   string // why there is no signer, if that is worth telling
}

var _ ssh.MultiAlgorithmSigner = (*identity)(nil)

// PublicKey is what x/crypto/ssh asks for when the key's turn has come.
func (i *identity) PublicKey() ssh.PublicKey {
	if !i.offered {
		i.offered = true
		i.login.keys = append(i.login.keys, i.label)
	}
	return i.pub
}

func (i *identity) Algorithms() []string { return i.algos }

func (i *identity) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	return i.SignWithAlgorithm(rand, data, plainAlgorithm(i.pub.Type()))
}

func (i *identity) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	// An agent may ask a person, or wait for a touch.
	i.login.guard.pause()
	defer i.login.guard.limit(loginTimeout, "no answer in %s while logging in")
	sig, err := i.signer.SignWithAlgorithm(rand, data, algorithm)
	if err != nil {
		i.login.note("%s could not sign: %s", i.label, use.Printable(err.Error()))
		return nil, err
	}
	i.login.signed = i
	return sig, nil
}

func (l *login) note(format string, args ...any) {
	l.notes = append(l.notes, fmt.Sprintf(format, args...))
}

// end lets go of the agent and the keys.
func (l *login) end() {
	if l.stopWatch != nil {
		l.stopWatch()
	}
	if l.agentConn != nil {
		l.agentConn.Close()
	}
	l.identities, l.signed = nil, nil // x/crypto/ssh holds on to its configuration, and so to us
}

// next is the ssh.ClientAuthCallback: the first method of PreferredAuthentications that the server takes and that has
// something left to try.
func (l *login) next(c *ssh.ClientAuthContext) (ssh.AuthMethod, error) {
	if !l.started {
		l.started = true
		l.guard.pause()
		l.prepare()
		l.guard.limit(loginTimeout, "no answer in %s while logging in")
	}
	for _, method := range l.methods() {
		if method != "publickey" || !slices.Contains(c.AllowedMethods, method) {
			continue
		}
		var left []ssh.Signer
		for _, i := range l.identities {
			if !i.offered {
				left = append(left, i)
			}
		}
		if len(left) > 0 {
			return ssh.PublicKeys(left...), nil
		}
	}
	l.denied = l.refusal(c.AllowedMethods, len(c.PartialSuccessMethods) > 0)
	return nil, l.denied
}

// methods are those that the user allows, in the user's order.
func (l *login) methods() []string {
	list := l.option("preferredauthentications")
	if list == "" {
		list = "gssapi-with-mic,hostbased,publickey,keyboard-interactive,password" // ssh_config(5)
	}
	interactive := !l.on("batchmode", false)
	return slices.DeleteFunc(strings.Split(list, ","), func(method string) bool {
		switch method {
		case "publickey":
			return !l.on("pubkeyauthentication", true)
		case "password":
			return !interactive || !l.on("passwordauthentication", true)
		case "keyboard-interactive":
			return !interactive || !l.on("kbdinteractiveauthentication", true)
		case "gssapi-with-mic":
			return !l.on("gssapiauthentication", false)
		case "hostbased":
			return !l.on("hostbasedauthentication", false)
		}
		return true
	})
}

// refusal is the line for a login that failed.
func (l *login) refusal(allowed []string, partial bool) *Error {
	e := &Error{Host: use.Printable(l.spec.Target.String())}
	names := use.Printable(strings.Join(allowed, ","))
	e.Msg = fmt.Sprintf("permission denied (%s)", names)
	if partial {
		e.Msg = fmt.Sprintf("permission denied, though a first step succeeded (%s is left)", names)
	}
	var person, never []string
	for _, method := range l.methods() {
		if !slices.Contains(allowed, method) {
			continue
		}
		switch method {
		case "keyboard-interactive", "password":
			person = append(person, method)
		case "gssapi-with-mic", "hostbased":
			never = append(never, method)
		}
	}
	if l.option("pkcs11provider") != "" {
		never = append(never, "PKCS11Provider")
	}
	if len(person) > 0 {
		l.note("%s needs a person, who can't be asked for it here", strings.Join(person, " or "))
	}
	if len(never) > 0 {
		l.note("%s can't be shared", strings.Join(never, ", "))
	}
	e.Msg += l.attempts()
	if len(l.notes) > 0 {
		e.Msg += "; connect without sharing: " + l.bypass
	}
	return e
}

// attempts is the tail of an error line that says what was tried.
func (l *login) attempts() string {
	s := "; tried: "
	if len(l.keys) == 0 {
		s += "no key"
	}
	s += strings.Join(l.keys, ", ")
	for _, n := range l.notes {
		s += "; " + n
	}
	return s
}

// result says how the login succeeded, and the agent's identity if one of its keys did it.
func (l *login) result() (auth, agentID string) {
	if l.signed == nil {
		return "none", ""
	}
	if l.signed.agent {
		agentID = l.spec.Agent.ID()
	}
	return "publickey " + fingerprint(l.signed.pub), agentID
}

// prepare collects the keys in ssh's order (pubkey_prepare of sshconnect2.c): keys of the agent that are named by
// IdentityFile, other keys of the agent unless IdentitiesOnly, keys in files.
func (l *login) prepare() {
	if !slices.Contains(l.methods(), "publickey") {
		return
	}
	files := l.files()
	held := l.agentKeys()
	only := l.on("identitiesonly", false)

	var named, others, rest []*identity
	for _, a := range held {
		listed := false
		for _, f := range files {
			if cert, ok := f.pub.(*ssh.Certificate); ok && sameKey(cert.Key, a.pub) && f.signer == nil {
				// A certificate in a file, whose key the agent has.
				if f.signer = certSigner(cert, a.signer); f.signer != nil {
					f.agent = true
					named = append(named, f)
				}
			}
			listed = listed || sameKey(f.pub, a.pub)
		}
		switch {
		case listed:
			named = append(named, a)
		case !only:
			others = append(others, a)
		}
	}
	for _, f := range files {
		inAgent := slices.ContainsFunc(named, func(a *identity) bool { return sameKey(a.pub, f.pub) })
		switch {
		case inAgent:
		case f.signer != nil:
			rest = append(rest, f)
		case f.lacks != "":
			l.note("%s", f.lacks)
		}
	}
	for _, i := range slices.Concat(named, others, rest) {
		i.algos = l.signatureAlgorithms(i.pub)
		switch err := l.checkSize(plainKey(i.pub)); {
		case err != nil:
			l.note("%s: %s", i.label, err)
		case len(i.algos) == 0:
			l.note("%s: PubkeyAcceptedAlgorithms does not allow %s", i.label, use.Printable(i.pub.Type()))
		default:
			l.identities = append(l.identities, i)
		}
	}
}

// certSigner makes a certificate's signer of its key's, or returns nil if the two are not a pair.
func certSigner(cert *ssh.Certificate, key ssh.AlgorithmSigner) ssh.AlgorithmSigner {
	s, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		return nil
	}
	signer, _ := s.(ssh.AlgorithmSigner)
	return signer
}

func plainKey(key ssh.PublicKey) ssh.PublicKey {
	if cert, ok := key.(*ssh.Certificate); ok {
		return cert.Key
	}
	return key
}

// signatureAlgorithms are those that PubkeyAcceptedAlgorithms allows for a key, in its order. By default that is SHA-2 for RSA
// (RFC 8332), never ssh-rsa.
func (l *login) signatureAlgorithms(key ssh.PublicKey) []string {
	_, isCert := key.(*ssh.Certificate)
	plain := plainKey(key).Type()
	candidates := []string{plain}
	if plain == ssh.KeyAlgoRSA {
		candidates = []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSA}
	}
	list := l.option("pubkeyacceptedalgorithms")
	if list == "" {
		if plain == ssh.KeyAlgoRSA {
			candidates = candidates[:2]
		}
		return candidates
	}
	var out []string
	for _, name := range strings.Split(list, ",") {
		algo := plainAlgorithm(name)
		if (algo != name) == isCert && slices.Contains(candidates, algo) && !slices.Contains(out, algo) {
			out = append(out, algo)
		}
	}
	return out
}

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
	signers, err := agent.NewClient(c).Signers()
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
		out = append(out, &identity{login: l, label: "agent key " + ssh.FingerprintSHA256(pub), pub: pub, signer: signer, agent: true})
	}
	return out
}

// files loads IdentityFile and CertificateFile. A key comes after its certificates.
func (l *login) files() []*identity {
	var certs []*identity
	for _, path := range l.spec.Config.All("certificatefile") {
		if path == "" || strings.EqualFold(path, "none") {
			continue
		}
		if c := l.certificate(path, true); c != nil {
			certs = append(certs, c)
		}
	}
	var out []*identity
	for _, path := range l.spec.Config.All("identityfile") {
		if path == "" || strings.EqualFold(path, "none") {
			continue
		}
		key := l.keyFile(path)
		if key == nil {
			continue
		}
		mine := slices.Clone(certs)
		if c := l.certificate(path+"-cert.pub", false); c != nil {
			mine = append(mine, c)
		}
		for _, c := range mine {
			cert := c.pub.(*ssh.Certificate)
			if !sameKey(cert.Key, key.pub) || slices.ContainsFunc(out, func(o *identity) bool { return sameKey(o.pub, cert) }) {
				continue
			}
			if key.signer != nil {
				c.signer = certSigner(cert, key.signer)
			}
			out = append(out, c)
		}
		out = append(out, key)
	}
	for _, c := range certs { // whose key is in the agent alone
		if !slices.ContainsFunc(out, func(o *identity) bool { return sameKey(o.pub, c.pub) }) {
			out = append(out, c)
		}
	}
	return out
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

// keyFile loads an identity file: a private key, or a public one whose private half the agent has. nil if there is nothing to
// use or to look for in the agent; what a person should know is noted.
func (l *login) keyFile(path string) *identity {
	id := &identity{login: l, label: shortPath(path)}
	text, err := readKeyFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		l.log.Debug().Str("file", path).Msg("identity file does not exist")
		return l.publicHalf(id, path)
	}
	if err != nil {
		id.lacks = fmt.Sprintf("key %s can't be read: %s", id.label, systemText(err))
		return l.publicHalf(id, path)
	}
	defer clear(text)
	if pub, _, _, _, err := ssh.ParseAuthorizedKey(text); err == nil {
		id.pub = pub
		return id
	}
	if err := checkKeyMode(path); err != nil {
		id.lacks = fmt.Sprintf("key %s is ignored: %s", id.label, systemText(err))
		return l.publicHalf(id, path)
	}
	signer, err := ssh.ParsePrivateKey(text)
	var missing *ssh.PassphraseMissingError
	if errors.As(err, &missing) {
		id.lacks = fmt.Sprintf("key %s needs a passphrase (ssh-add it)", id.label)
		if id.pub = missing.PublicKey; id.pub != nil {
			return id
		}
		return l.publicHalf(id, path)
	}
	if err != nil {
		// Security keys, for one: x/crypto/ssh can't drive them outside an agent.
		id.lacks = fmt.Sprintf("key %s can't be used: %s", id.label, use.Printable(strings.TrimPrefix(err.Error(), "ssh: ")))
		return l.publicHalf(id, path)
	}
	id.signer, _ = signer.(ssh.AlgorithmSigner) // all of x/crypto/ssh's are
	id.pub = signer.PublicKey()
	return id
}

// publicHalf makes do with PATH.pub, to find the key in the agent. Without it, what the key lacks is all there is to say.
func (l *login) publicHalf(id *identity, path string) *identity {
	pub, err := publicFile(path + ".pub")
	if err != nil {
		if id.lacks != "" {
			l.note("%s", id.lacks)
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
