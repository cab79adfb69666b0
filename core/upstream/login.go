package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// login chooses what to authenticate with (RFC 4252), and remembers what came of it. All of it runs in the goroutine of the
// handshake. It holds keys, and is gone after the handshake.
type login struct {
	*dialing
	ctx context.Context

	started    bool
	shown      bool // the algorithms were told
	identities []*identity
	loaded     []*identity // from files
	agentConn  net.Conn
	agent      agent.ExtendedAgent // on agentConn
	stopWatch  func() bool         // on ctx, for the agent

	method    string // that is under way, or has succeeded
	steps     int    // partial successes
	signed    *identity
	agentUsed bool // for a step that succeeded
	before    int  // answers when the attempt began that is under way
	proof     int  // answers up to the last one that a step which has succeeded was made with; 0: none was

	passwords    int  // asked for
	passwordOpen bool // the last one was sent, and nothing but FAILURE is expected
	passwordDone bool
	challenges   int  // keyboard-interactive attempts
	challenged   bool // the server has asked something
	asked        int  // how often
	challengeOff bool

	keys   []string // labels of those that were offered
	notes  []string // what else there would have been
	better bool     // ssh itself could do better
	denied *Error
}

// thinkTime is less than a person takes to confirm the use of a key, and more than an agent takes to sign.
const thinkTime = 700 * time.Millisecond

// identity is a key to log in with. As an ssh.Signer it notes that it was offered and that it signed.
type identity struct {
	login   *login
	label   string // for a person, escaped
	path    string // of the private key, "" if there is none in a file
	pub     ssh.PublicKey
	signer  ssh.AlgorithmSigner // nil: the private half is not here, or not yet
	base    *identity           // of a certificate: its key
	locked  bool                // a passphrase is needed
	spent   bool                // and was not to be had
	raw     any                 // the private key in path
	algos   []string
	agent   bool
	offered bool
	used    bool   // it made a step of the login
	added   bool   // AddKeysToAgent has been thought of
	answer  int    // answers up to the one that has unlocked it; 0: none has
	lacks   string // why there is no signer, if that is worth telling
}

var _ ssh.MultiAlgorithmSigner = (*identity)(nil)

// PublicKey is what x/crypto/ssh asks for when the key's turn has come.
func (i *identity) PublicKey() ssh.PublicKey {
	if !i.offered {
		i.offered = true
		i.login.debugf("Offering public key: %s %s%s", i.label, fingerprint(i.pub), map[bool]string{true: " agent"}[i.agent])
		if !slices.Contains(i.login.keys, i.label) {
			i.login.keys = append(i.login.keys, i.label)
		}
	}
	return i.pub
}

func (i *identity) Algorithms() []string { return i.algos }

func (i *identity) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	return i.SignWithAlgorithm(rand, data, plainAlgorithm(i.pub.Type()))
}

// SignWithAlgorithm is called when the server has said that it would take the key. A passphrase is asked for only now.
func (i *identity) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	l := i.login
	// An agent may ask a person, or wait for a touch.
	l.guard.pause()
	defer l.limitLogin()
	l.debugf("Server accepts key: %s %s", i.label, fingerprint(i.pub))
	signer, err := i.private()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	sig, err := signer.SignWithAlgorithm(rand, data, algorithm)
	if touched(i.pub) || time.Since(began) > thinkTime {
		l.personal = true // a touch, or a confirmation (ssh-add -c)
	}
	if err != nil {
		l.note("%s could not sign: %s", i.label, use.Printable(err.Error()))
		return nil, err
	}
	l.signed = i
	return sig, nil
}

// private is the signer, unlocked if need be.
func (i *identity) private() (ssh.AlgorithmSigner, error) {
	if i.signer != nil {
		if !i.agent {
			i.addToAgent()
		}
		return i.signer, nil
	}
	switch {
	case i.base != nil:
		key, err := i.base.private()
		if err != nil {
			return nil, err
		}
		i.signer, i.answer = certSigner(i.pub.(*ssh.Certificate), key), i.base.answer
	case i.locked:
		if err := i.unlock(); err != nil {
			return nil, err
		}
		i.addToAgent()
		i.answer = i.login.answers
	}
	if i.signer == nil {
		return nil, errors.New("no private key")
	}
	return i.signer, nil
}

func (l *login) note(format string, args ...any) {
	if n := fmt.Sprintf(format, args...); !slices.Contains(l.notes, n) {
		l.notes = append(l.notes, n)
	}
}

// noteBypass notes what ssh could do without us.
func (l *login) noteBypass(format string, args ...any) {
	l.note(format, args...)
	l.better = true
}

// end lets go of the agent and the keys.
func (l *login) end() {
	if l.stopWatch != nil {
		l.stopWatch()
	}
	if l.agentConn != nil {
		l.agentConn.Close()
	}
	for _, i := range l.loaded {
		i.wipe()
	}
	l.identities, l.loaded, l.signed = nil, nil, nil // x/crypto/ssh holds on to its configuration, and so to us
}

// negotiated tells the algorithms, once.
func (l *login) negotiated(a ssh.NegotiatedAlgorithms) {
	if l.shown {
		return
	}
	l.shown = true
	l.debugf("kex: algorithm: %s", a.KeyExchange)
	l.debugf("kex: host key algorithm: %s", a.HostKey)
	for _, d := range []struct {
		name string
		ssh.DirectionAlgorithms
	}{{"server->client", a.Read}, {"client->server", a.Write}} {
		mac := d.MAC
		if mac == "" {
			mac = "<implicit>"
		}
		l.debugf("kex: %s cipher: %s MAC: %s compression: none", d.name, d.Cipher, mac)
	}
}

// next is the ssh.ClientAuthCallback: the first method of PreferredAuthentications that the server takes and that has
// something left to try.
func (l *login) next(c *ssh.ClientAuthContext) (ssh.AuthMethod, error) {
	l.guard.pause()
	defer l.limitLogin()
	l.negotiated(c.Algorithms)
	l.debugf("Authentications that can continue: %s", strings.Join(c.AllowedMethods, ","))
	switch {
	case !l.started:
		l.started = true
		l.prepare()
	case len(c.PartialSuccessMethods) > l.steps:
		l.debugf("Authenticated using %q with partial success.", l.method)
		l.steps = len(c.PartialSuccessMethods)
		l.succeeded()
		// What the server refused as the first step it may take as the next (pubkey_reset of sshconnect2.c).
		for _, i := range l.identities {
			i.offered = i.used || i.spent
		}
	case l.method == "password" && l.passwordOpen && !l.guard.t.down.Load():
		// Neither SUCCESS nor FAILURE: x/crypto/ssh takes no SSH_MSG_USERAUTH_PASSWD_CHANGEREQ (RFC 4252 section 8). The
		// password was right, so that asking for it by another method would lead nowhere.
		l.debugf("The server has asked for a change of the password.")
		l.denied = &Error{
			Host: use.Printable(l.spec.Target.String()),
			Msg:  "the server wants the password to be changed, which can't be done here; change it without sharing: " + l.dialing.bypass,

			Refused: true,
		}
		return nil, l.denied
	}
	l.passwordOpen = false
	for _, method := range l.methods() {
		if !slices.Contains(c.AllowedMethods, method) {
			continue
		}
		if auth := l.attempt(method); auth != nil {
			if l.method != method {
				l.debugf("Next authentication method: %s", method)
			}
			l.method, l.before = method, l.answers
			return auth, nil
		}
	}
	l.debugf("No more authentication methods to try.")
	l.denied = l.refusal(c.AllowedMethods, l.steps > 0)
	return nil, l.denied
}

// succeeded records what the step that is over was made with.
func (l *login) succeeded() {
	switch {
	case l.method == "publickey":
		if l.signed == nil {
			return
		}
		l.signed.used = true
		l.agentUsed = l.agentUsed || l.signed.agent
		l.proof = max(l.proof, l.signed.answer)
	case l.method != "" && l.answers > l.before: // the others ask for each try
		l.proof = l.answers
	}
}

// attempt is the next try of a method, nil if there is none left.
func (l *login) attempt(method string) ssh.AuthMethod {
	switch method {
	case "publickey":
		if left := l.left(); len(left) > 0 {
			return ssh.PublicKeys(left...)
		}
	case "keyboard-interactive":
		// ssh stops after the first try of a server that asks nothing.
		if l.challengeOff || l.challenges >= l.prompts() || l.challenges > 0 && !l.challenged {
			return nil
		}
		l.challenges++
		return ssh.KeyboardInteractive(l.challenge)
	case "password":
		if l.passwordDone || l.passwords >= l.prompts() {
			return nil
		}
		// Retried in one go: so an end that is none of ours is not a FAILURE.
		return ssh.RetryableAuthMethod(ssh.PasswordCallback(l.password), 0)
	}
	return nil
}

func (l *login) prompts() int { return l.number("numberofpasswordprompts", 3) }

// left are the keys to offer next: those whose public half is known, up to one that has to be unlocked first to be offered.
func (l *login) left() []ssh.Signer {
	var left []ssh.Signer
	for _, i := range l.identities {
		if i.offered {
			continue
		}
		if i.pub == nil {
			if len(left) > 0 {
				break
			}
			l.debugf("Trying private key: %s", i.label)
			if _, err := i.private(); err != nil || !l.usable(i) {
				i.offered = true
				continue
			}
		}
		left = append(left, i)
	}
	return left
}

var errSpent = errors.New("no more tries")

// password answers one try of RFC 4252 section 8. The words of the question are ssh's own, not the server's.
func (l *login) password() (string, error) {
	l.passwordOpen = false
	l.guard.pause()
	defer l.limitLogin()
	if context.Cause(l.ctx) == errDown {
		return "", errDown // x/crypto asks again before it notices
	}
	if l.passwords >= l.prompts() {
		return "", errSpent
	}
	text := ""
	if l.passwords > 0 {
		text = "Permission denied, please try again."
	}
	l.passwords++
	answer, err := l.askLine(l.ctx, text, fmt.Sprintf("%s@%s's password: ", use.Printable(l.spec.Target.User),
		use.Printable(strings.Trim(l.spec.Target.Host, "[]"))), false)
	if err != nil {
		l.passwordDone = true
		l.needs("a password", err)
		return "", err
	}
	l.passwordOpen = true
	return answer, nil
}

// challenge answers one SSH_MSG_USERAUTH_INFO_REQUEST (RFC 4256 section 3.2): its words are the server's.
func (l *login) challenge(name, instruction string, questions []string, echos []bool) ([]string, error) {
	l.challenged = true
	l.guard.pause()
	defer l.limitLogin()
	title := "server " + use.Printable(strings.Trim(l.spec.Target.Host, "[]"))
	var text []string
	for _, t := range []string{name, instruction} {
		if t = lines(t); t != "" {
			text = append(text, t)
		}
	}
	if l.asked++; l.asked > maxChallenges {
		l.challengeOff = true
		l.note("the server does not stop asking")
		return nil, errSpent
	}
	if len(questions) == 0 { // nothing to answer: something to read
		for _, t := range text {
			for line := range strings.SplitSeq(t, "\n") {
				l.sayf("%s: %s", title, line)
			}
		}
		return nil, nil
	}
	if len(questions) > maxPrompts {
		l.challengeOff = true
		l.noteBypass("the server asks %d questions at once", len(questions))
		return nil, errSpent
	}
	q := pool.Question{Title: title}
	for n, question := range questions {
		// The line that is answered has to show whose question it is, so what goes before it is text.
		shown := lines(question)
		if cut := strings.LastIndexByte(shown, '\n'); cut >= 0 {
			text = append(text, shown[:cut])
			shown = shown[cut+1:]
		}
		q.Prompts = append(q.Prompts, pool.Prompt{Text: shown, Echo: echos[n]})
	}
	q.Text = strings.Join(text, "\n")
	answers, err := l.ask(l.ctx, q)
	if err != nil {
		l.challengeOff = true
		l.needs("an answer to the server's question", err)
		return nil, err
	}
	return answers, nil
}

const (
	maxPrompts    = 16 // of one question
	maxChallenges = 64 // of one login, those with nothing to answer included
)

// needs notes what a person would have been asked for.
func (l *login) needs(what string, err error) {
	if errors.Is(err, errBatch) { // as ssh itself would
		l.note("needs %s, and %s", what, unasked(err))
		return
	}
	l.noteBypass("needs %s, and %s", what, unasked(err))
}

// methods are those that the user allows, in the user's order.
func (l *login) methods() []string {
	list := l.option("preferredauthentications")
	if list == "" {
		list = "gssapi-with-mic,hostbased,publickey,keyboard-interactive,password" // ssh_config(5)
	}
	return slices.DeleteFunc(strings.Split(list, ","), func(method string) bool {
		switch method {
		case "publickey":
			return !l.on("pubkeyauthentication", true)
		case "password":
			return !l.on("passwordauthentication", true)
		case "keyboard-interactive":
			return !l.on("kbdinteractiveauthentication", true)
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
	e := &Error{Host: use.Printable(l.spec.Target.String()), Refused: true}
	names := use.Printable(strings.Join(allowed, ","))
	e.Msg = fmt.Sprintf("permission denied (%s)", names)
	if partial {
		e.Msg = fmt.Sprintf("permission denied, though a first step succeeded (%s is left)", names)
	}
	var never []string
	for _, method := range l.methods() {
		if slices.Contains(allowed, method) && (method == "gssapi-with-mic" || method == "hostbased") {
			never = append(never, method)
		}
	}
	if l.option("pkcs11provider") != "" {
		never = append(never, "PKCS11Provider")
	}
	if len(never) > 0 {
		l.noteBypass("%s can't be shared", strings.Join(never, ", "))
	}
	e.Msg += l.attempts()
	if l.better {
		e.Msg += "; connect without sharing: " + l.dialing.bypass
	}
	return e
}

// attempts is the tail of an error line that says what was tried.
func (l *login) attempts() string {
	tried := slices.Clone(l.keys)
	if len(tried) == 0 {
		tried = append(tried, "no key")
	}
	if l.challenged && !l.challengeOff {
		tried = append(tried, "keyboard-interactive")
	}
	if l.passwords > 0 && !l.passwordDone {
		tried = append(tried, "password")
	}
	return "; tried: " + strings.Join(append([]string{strings.Join(tried, ", ")}, l.notes...), "; ")
}

// result says how the login succeeded, and the agent's identity if one of its keys had a part in it.
func (l *login) result() (auth, agentID string) {
	l.succeeded()
	if l.agentUsed {
		agentID = l.spec.Agent.ID()
	}
	switch {
	case l.method == "":
		l.method = "none"
	case l.method == "publickey" && l.signed != nil:
		return "publickey " + fingerprint(l.signed.pub), agentID
	}
	return l.method, agentID
}

// prepare collects the keys in ssh's order (pubkey_prepare of sshconnect2.c): certificates named by CertificateFile, keys of
// the agent that are named by IdentityFile, other keys of the agent unless IdentitiesOnly, keys in files. A server that
// counts keys (MaxAuthTries) so sees the same as from ssh.
func (l *login) prepare() {
	if !slices.Contains(l.methods(), "publickey") {
		return
	}
	certs, files := l.files()
	held := l.agentKeys()
	only := l.on("identitiesonly", false)

	// The private half of a certificate is a key in a file or in the agent.
	for _, c := range slices.Concat(certs, files) {
		cert, ok := c.pub.(*ssh.Certificate)
		if !ok || c.signer != nil {
			continue
		}
		for _, a := range held {
			switch {
			case sameKey(cert, a.pub):
				c.signer, c.agent = a.signer, true
			case c.signer == nil && sameKey(cert.Key, a.pub):
				c.signer = certSigner(cert, a.signer)
				c.agent = c.signer != nil
			}
		}
		for _, f := range files {
			if c.signer == nil && f.pub != nil && (f.signer != nil || f.locked) && sameKey(cert.Key, f.pub) {
				c.base = f
			}
		}
	}
	var named, others []*identity
	for _, a := range held {
		at := slices.IndexFunc(files, func(f *identity) bool { return f.pub != nil && sameKey(f.pub, a.pub) })
		switch {
		case at >= 0:
			named = append(named, a)
			files = slices.Delete(files, at, at+1)
		case slices.ContainsFunc(certs, func(c *identity) bool { return sameKey(c.pub, a.pub) }):
		case !only:
			others = append(others, a)
		}
	}
	var seen []ssh.PublicKey
	for _, i := range slices.Concat(certs, named, others, files) {
		switch {
		case i.signer == nil && i.base == nil && !i.locked:
			if i.lacks != "" {
				l.noteBypass("%s", i.lacks)
			}
		case i.pub != nil && slices.ContainsFunc(seen, func(k ssh.PublicKey) bool { return sameKey(k, i.pub) }):
		case i.pub == nil || l.usable(i):
			l.identities = append(l.identities, i)
			if i.pub != nil {
				seen = append(seen, i.pub)
			}
		}
	}
}

// usable reports whether the user's rules allow a key, and notes it if they don't.
func (l *login) usable(i *identity) bool {
	i.algos = l.signatureAlgorithms(i.pub)
	if err := l.checkSize(plainKey(i.pub)); err != nil {
		l.note("%s: %s", i.label, err)
		return false
	}
	if len(i.algos) == 0 {
		l.note("%s: PubkeyAcceptedAlgorithms does not allow %s", i.label, use.Printable(i.pub.Type()))
		return false
	}
	return true
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
