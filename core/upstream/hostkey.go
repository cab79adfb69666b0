package upstream

import (
	"bytes"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// hostKeys is what the user's files say about the key of one host, and how strict the user is about it.
type hostKeys struct {
	d       *dialing
	name    string // as looked up
	strict  strictness
	known   []knownKey
	withOut []knownKey // about the host without its port: ssh takes those for a host it does not know with its port
	revoked []ssh.PublicKey
	user    []string // the user's files; the first takes new keys
	global  []string
}

type strictness int

const (
	strictAsk strictness = iota
	strictYes
	strictNew // accept-new
	strictNo
)

// hostKeys reads the files. A file that can't be read counts as empty, as in ssh: its hosts are unknown then.
func (d *dialing) hostKeys() (*hostKeys, error) {
	h := &hostKeys{d: d}
	switch strings.ToLower(d.option("stricthostkeychecking")) {
	case "yes", "true":
		h.strict = strictYes
	case "no", "off", "false":
		h.strict = strictNo
	case "accept-new":
		h.strict = strictNew
	}
	host, port := strings.Trim(d.spec.Target.Host, "[]"), d.spec.Target.Port
	h.name = lookupName(host, port)
	bare := strings.ToLower(host)
	if alias := d.option("hostkeyalias"); alias != "" {
		h.name = strings.ToLower(alias)
		bare = h.name
	}
	h.user, h.global = d.hostFiles("userknownhostsfile"), d.hostFiles("globalknownhostsfile")
	for _, file := range slices.Concat(h.user, h.global) {
		for _, q := range []struct {
			name string
			to   *[]knownKey
		}{{h.name, &h.known}, {bare, &h.withOut}} {
			if q.name == h.name && q.to == &h.withOut {
				continue
			}
			keys, err := readKnownHosts(file, q.name)
			if err != nil {
				d.log.Warn().Str("file", file).Err(err).Msg("known_hosts file can't be read")
			}
			*q.to = append(*q.to, keys...)
		}
	}
	if file := d.option("revokedhostkeys"); file != "" {
		var err error
		if h.revoked, err = readRevoked(file); err != nil {
			return nil, d.refusedf("RevokedHostKeys: %s; connect without sharing: %s", use.Printable(err.Error()), d.bypass)
		}
	}
	return h, nil
}

// hostFiles are the known_hosts files that a keyword names. The master's own, which sshconfig leaves out of the answer,
// would do no harm: it vouches for keys that only a master has.
func (d *dialing) hostFiles(keyword string) []string {
	return slices.DeleteFunc(slices.Clone(d.spec.Config.All(keyword)), func(file string) bool {
		return file == "" || strings.EqualFold(file, "none")
	})
}

// readRevoked reads RevokedHostKeys where it is a list of public keys. Of a file that says what must not be trusted nothing
// may be overlooked, so whatever is not understood is an error.
func readRevoked(file string) ([]ssh.PublicKey, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(text, []byte("SSHKRL\n\x00")) {
		return nil, fmt.Errorf("%s is a binary key revocation list, which can't be read here", file)
	}
	var keys []ssh.PublicKey
	n := 0
	for line := range bytes.Lines(text) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		key, _, _, _, err := ssh.ParseAuthorizedKey(line)
		if err != nil {
			return nil, fmt.Errorf("%s:%d is not a public key", file, n)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// algorithms orders the algorithms to offer so that the server shows a key that can be checked: certificates if an
// authority for the host is known, then types of which a key is known, then the rest.
func (h *hostKeys) algorithms(base []string) ([]string, error) {
	known := h.known
	if !slices.ContainsFunc(known, func(k knownKey) bool { return k.marker != revoked }) {
		known = h.withOut
	}
	authorities := false
	types := make(map[string]bool)
	for _, k := range known {
		switch k.marker {
		case authority:
			authorities = true
		case noMarker:
			types[k.key.Type()] = true
		}
	}
	var certs, first, rest []string
	for _, name := range base {
		plain := plainAlgorithm(name)
		format := plain
		if plain == ssh.KeyAlgoRSASHA256 || plain == ssh.KeyAlgoRSASHA512 {
			format = ssh.KeyAlgoRSA
		}
		switch {
		case plain != name:
			certs = append(certs, name)
		case types[format]:
			first = append(first, name)
		default:
			rest = append(rest, name)
		}
	}
	switch {
	case authorities:
		return slices.Concat(certs, first, rest), nil
	case len(first)+len(rest) == 0: // certificates are all that the user wants
		return certs, nil
	}
	// A certificate of an unknown authority is no more than its key.
	return slices.Concat(first, rest), nil
}

// judgement is what the files say about a key.
type judgement struct {
	err    error     // it must not be used: a line for a person without the host
	known  *knownKey // the line that vouches for it
	cert   bool      // known is an authority's
	port   bool      // known is about the host without its port
	exempt bool      // nothing vouches for it, and nothing has to
}

func (j judgement) unknown() bool { return j.err == nil && j.known == nil && !j.exempt }

func refused(format string, args ...any) judgement {
	return judgement{err: fmt.Errorf(format, args...)}
}

// judge looks up the key that the server has proved to hold. remote is its address and port.
func (h *hostKeys) judge(key ssh.PublicKey, remote string) judgement {
	d := h.d
	cert, isCert := key.(*ssh.Certificate)
	plain := key
	if isCert {
		plain = cert.Key
	}
	if err := d.checkSize(plain); err != nil {
		return refused("host key: %w", err)
	}

	// Revoked keys first: nothing else counts for them.
	shown := []ssh.PublicKey{plain}
	if isCert {
		shown = append(shown, cert.SignatureKey)
	}
	for _, k := range shown {
		for _, bad := range slices.Concat(h.known, h.withOut) {
			if bad.marker == revoked && sameKey(bad.key, k) {
				return refused("host key %s is marked as revoked in %s:%d; do not connect, and ask who runs the host",
					fingerprint(k), use.Printable(bad.file), bad.line)
			}
		}
		for _, bad := range h.revoked {
			if sameKey(bad, k) {
				return refused("host key %s is revoked by RevokedHostKeys %s; do not connect, and ask who runs the host",
					fingerprint(k), use.Printable(d.option("revokedhostkeys")))
			}
		}
	}

	// As in ssh, a certificate that is not good makes its key a plain one, which may be known by itself.
	var certErr error
	if isCert {
		for _, k := range slices.Concat(h.known, h.withOut) {
			if k.marker != authority || !sameKey(k.key, cert.SignatureKey) {
				continue
			}
			if certErr = h.checkCert(cert); certErr == nil {
				return judgement{known: &k, cert: true}
			}
			break
		}
	}

	// As in ssh (check_hostkeys_by_key_or_type of hostfile.c), another key is a changed one whatever its type: a man in
	// the middle would only have to show another type.
	var changed *knownKey
	for i, k := range h.known {
		switch {
		case k.marker != noMarker:
		case sameKey(k.key, plain):
			return judgement{known: &h.known[i]}
		case changed == nil, changed.key.Type() != plain.Type() && k.key.Type() == plain.Type():
			changed = &h.known[i]
		}
	}
	if d.on("nohostauthenticationforlocalhost", false) && d.option("hostkeyalias") == "" && isLoopback(remote) {
		return judgement{exempt: true}
	}
	// StrictHostKeyChecking=no makes no difference here. ssh would go on with passwords and forwards switched off, for one
	// session; a shared connection would hand it to all.
	if changed != nil {
		return refused("HOST KEY HAS CHANGED: the server shows %s, but %s:%d has %s; somebody may be in the way. "+
			"If the change is right, remove the old key: ssh-keygen -R '%s' -f '%s'", fingerprint(plain),
			use.Printable(changed.file), changed.line, fingerprint(changed.key), use.Printable(h.name), use.Printable(changed.file))
	}
	for i, k := range h.withOut {
		if k.marker == noMarker && sameKey(k.key, plain) {
			return judgement{known: &h.withOut[i], port: true}
		}
	}
	return judgement{err: certErr}
}

// refuseUnknown is the line for a key that is unknown; why says why the person was not asked.
func (h *hostKeys) refuseUnknown(plain ssh.PublicKey, why string) error {
	if h.wantsDNS() {
		why += ", and " + noDNS
	}
	if h.d.option("knownhostscommand") != "" {
		return fmt.Errorf("host key is unknown (%s), and KnownHostsCommand can't be asked; connect without sharing: %s",
			fingerprint(plain), h.d.bypass)
	}
	return fmt.Errorf("host key is unknown (%s)%s; check it, then add it with: %s", fingerprint(plain), why, h.d.bypass)
}

// noDNS is told where ssh would have gone by what the DNS says of a key that is unknown.
const noDNS = "VerifyHostKeyDNS is not supported: no SSHFP record was looked up"

// wantsDNS reports whether ssh would have asked the DNS for a fingerprint (RFC 4255).
func (h *hostKeys) wantsDNS() bool {
	switch strings.ToLower(h.d.option("verifyhostkeydns")) {
	case "yes", "true", "ask":
		return true
	}
	return false
}

// trust is how a host key came to be accepted.
type trust struct {
	stored bool // the files vouch for it
	update bool // and the user's own: UpdateHostKeys may follow
}

// accept decides about the server's key, asking the person if need be. An error is a line for a person without the host.
func (h *hostKeys) accept(ctx context.Context, key ssh.PublicKey, remote string) (trust, error) {
	d := h.d
	plain := plainKey(key)
	d.debugf("Server host key: %s %s", key.Type(), ssh.FingerprintSHA256(plain))
	j := h.judge(key, remote)
	switch {
	case j.err != nil:
		return trust{}, j.err
	case j.known != nil:
		what, found := "host key", "key"
		if j.cert {
			what, found = "host certificate", "CA key"
		}
		d.debugf("Host '%s' is known and matches the %s %s.", h.name, keyName(key), what)
		d.debugf("Found %s in %s:%d", found, j.known.file, j.known.line)
		if h.wantsDNS() {
			d.debugf(noDNS)
		}
		return trust{stored: true, update: !j.cert && !j.port && slices.Contains(h.user, j.known.file)}, nil
	case j.exempt:
		d.debugf("Forcing accepting of host key for loopback/localhost.")
		return trust{}, nil
	}
	asked := false
	switch {
	case h.strict == strictYes:
		return trust{}, h.refuseUnknown(plain, ", and StrictHostKeyChecking is yes")
	case d.option("knownhostscommand") != "":
		return trust{}, h.refuseUnknown(plain, "") // what that would have said is not ours to guess
	case h.strict == strictAsk:
		yes, err := h.ask(ctx, plain, remote)
		switch {
		case errors.Is(err, pool.ErrNobody):
			return trust{}, h.refuseUnknown(plain, "")
		case err != nil:
			return trust{}, h.refuseUnknown(plain, ", and "+unasked(err))
		}
		if !yes {
			return trust{}, fmt.Errorf("host key %s was not accepted", fingerprint(plain))
		}
		asked = true
	case h.wantsDNS():
		d.sayf(noDNS)
	}
	stored := h.learn(plain)
	return trust{stored: stored, update: asked && stored}, nil
}

// ask puts ssh's question about an unknown key (check_host_key of sshconnect.c), again until the answer is one.
func (h *hostKeys) ask(ctx context.Context, plain ssh.PublicKey, remote string) (bool, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "The authenticity of host '%s", use.Printable(h.name))
	if remote != "" {
		fmt.Fprintf(&b, " (%s)", use.Printable(remote))
	}
	b.WriteString("' can't be established.")
	sum := ssh.FingerprintSHA256(plain)
	fmt.Fprintf(&b, "\n%s key fingerprint is %s.\n", keyName(plain), sum)
	if h.wantsDNS() {
		b.WriteString(noDNS + ".\n") // where ssh says whether it has found one
	}
	b.WriteString(h.otherNames(plain))
	text, prompt := b.String(), "Are you sure you want to continue connecting (yes/no/[fingerprint])? "
	for range maxAnswers {
		answer, err := h.d.askLine(ctx, text, prompt, true)
		if err != nil {
			return false, err
		}
		switch answer = strings.TrimSpace(answer); {
		case answer == "", strings.EqualFold(answer, "no"):
			return false, nil
		case strings.EqualFold(answer, "yes"), answer == sum:
			return true, nil
		}
		text, prompt = "", "Please type 'yes', 'no' or the fingerprint: "
	}
	return false, nil
}

// maxAnswers is how often the question about a host key is put: a program that answers every prompt with a password
// never gives one of the answers that count.
const maxAnswers = 6

// maxOtherNames is how many other names of a key are shown, as in ssh.
const maxOtherNames = 8

// otherNames says under which other names a key is known.
func (h *hostKeys) otherNames(plain ssh.PublicKey) string {
	var names []string
	for _, file := range slices.Concat(h.user, h.global) {
		text, err := readHostFile(file)
		if err != nil {
			continue
		}
		for _, k := range parseHostFile(file, text, func(string) bool { return true }) {
			if k.marker != noMarker || !sameKey(k.key, plain) {
				continue
			}
			shown := k.hosts
			if strings.HasPrefix(shown, "|") {
				shown = "[hashed name]"
			}
			names = append(names, fmt.Sprintf("    %s:%d: %s", shortPath(file), k.line, use.Printable(shown)))
		}
	}
	if len(names) == 0 {
		return "This key is not known by any other names."
	}
	more := ""
	if n := len(names) - maxOtherNames; n > 0 {
		names, more = names[:maxOtherNames], fmt.Sprintf("\n    (%d additional names omitted)", n)
	}
	return "This host key is known by the following other names/addresses:\n" + strings.Join(names, "\n") + more
}

// learn adds a key to the first of the user's files, and reports whether it is there. As in ssh, failing to is no reason not
// to connect.
func (h *hostKeys) learn(plain ssh.PublicKey) bool {
	d := h.d
	if len(h.user) == 0 {
		d.debugf("no UserKnownHostsFile to add the host to")
		return false
	}
	file := h.user[0]
	if err := appendHost(file, h.name, plain, d.on("hashknownhosts", false)); err != nil {
		d.sayf("Failed to add the host to the list of known hosts (%s): %s", shortPath(file), systemText(err))
		return false
	}
	d.sayf("Permanently added '%s' (%s) to the list of known hosts.", h.name, keyName(plain))
	info, err := os.Stat(file)
	return err == nil && info.Mode().IsRegular() // not of /dev/null
}

// checkCert checks a host certificate of an authority that is known for the host. Its principals are names without a port.
func (h *hostKeys) checkCert(cert *ssh.Certificate) error {
	d := h.d
	if cert.CertType != ssh.HostCert {
		return errors.New("the server shows a certificate that is not one for hosts")
	}
	if list := d.option("casignaturealgorithms"); list != "" && !slices.Contains(strings.Split(list, ","), cert.Signature.Format) {
		return fmt.Errorf("host certificate is signed with %s, which CASignatureAlgorithms does not allow",
			use.Printable(cert.Signature.Format))
	}
	if err := d.checkSize(cert.SignatureKey); err != nil {
		return fmt.Errorf("host certificate's authority: %w", err)
	}
	principal := strings.ToLower(strings.Trim(d.spec.Target.Host, "[]"))
	if alias := d.option("hostkeyalias"); alias != "" {
		principal = strings.ToLower(alias)
	}
	var checker ssh.CertChecker
	if err := checker.CheckCert(principal, cert); err != nil {
		return fmt.Errorf("host certificate of %s is not valid: %s", fingerprint(cert.SignatureKey),
			use.Printable(strings.TrimPrefix(err.Error(), "ssh: ")))
	}
	return nil
}

// checkSize applies RequiredRSASize.
func (d *dialing) checkSize(key ssh.PublicKey) error {
	ck, ok := key.(ssh.CryptoPublicKey)
	if !ok {
		return nil
	}
	pub, ok := ck.CryptoPublicKey().(*rsa.PublicKey)
	if want := d.number("requiredrsasize", 1024); ok && pub.N.BitLen() < want {
		return fmt.Errorf("RSA key of %d bits is too short, RequiredRSASize is %d", pub.N.BitLen(), want)
	}
	return nil
}

func fingerprint(key ssh.PublicKey) string { return keyName(key) + " " + ssh.FingerprintSHA256(key) }

func isLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	return err == nil && net.ParseIP(host).IsLoopback()
}

// stillGood asks the user's files as they are now whether a connection that turned out to be info may be used by the rules of
// spec. accepted says that the key is not in the files because it could not be put there. The error is an *Error.
func stillGood(spec pool.Spec, info pool.ServerInfo, accepted bool) error {
	d := newDialing(spec)
	h, err := d.hostKeys()
	if err != nil {
		return err
	}
	j := h.judge(info.HostKey, info.Addr)
	switch {
	case j.err != nil:
		return d.errorf("%s", j.err.Error())
	case !j.unknown(), h.strict == strictNo, h.strict == strictNew, h.strict == strictAsk && accepted:
		return nil
	}
	return d.errorf("%s", h.refuseUnknown(plainKey(info.HostKey), "").Error())
}
