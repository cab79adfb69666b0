package upstream

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
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
	chosen  bool // HostKeyAlgorithms is the user's own
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
	h := &hostKeys{d: d, chosen: d.spec.Config.IsSet("hostkeyalgorithms")}
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
	for _, keyword := range []string{"userknownhostsfile", "globalknownhostsfile"} {
		for _, file := range d.spec.Config.All(keyword) {
			// What the master's own file vouches for is the master.
			if file == "" || strings.EqualFold(file, "none") || strings.HasSuffix(filepath.ToSlash(file), "/muxproxy/known_hosts") {
				continue
			}
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
	}
	if file := d.option("revokedhostkeys"); file != "" {
		var err error
		if h.revoked, err = readRevoked(file); err != nil {
			return nil, d.errorf("RevokedHostKeys: %s; connect without sharing: %s", use.Printable(err.Error()), d.bypass)
		}
	}
	return h, nil
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

// check decides about the key that the server has proved to hold. An error is a line for a person without the host.
func (h *hostKeys) check(key ssh.PublicKey, remote string) error {
	d := h.d
	cert, isCert := key.(*ssh.Certificate)
	plain := key
	if isCert {
		plain = cert.Key
	}
	if err := d.checkSize(plain); err != nil {
		return fmt.Errorf("host key: %w", err)
	}

	// Revoked keys first: nothing else counts for them.
	shown := []ssh.PublicKey{plain}
	if isCert {
		shown = append(shown, cert.SignatureKey)
	}
	for _, k := range shown {
		for _, bad := range slices.Concat(h.known, h.withOut) {
			if bad.marker == revoked && sameKey(bad.key, k) {
				return fmt.Errorf("host key %s is marked as revoked in %s:%d; do not connect, and ask who runs the host",
					fingerprint(k), use.Printable(bad.file), bad.line)
			}
		}
		for _, bad := range h.revoked {
			if sameKey(bad, k) {
				return fmt.Errorf("host key %s is revoked by RevokedHostKeys %s; do not connect, and ask who runs the host",
					fingerprint(k), use.Printable(d.option("revokedhostkeys")))
			}
		}
	}

	if isCert && slices.ContainsFunc(slices.Concat(h.known, h.withOut), func(k knownKey) bool {
		return k.marker == authority && sameKey(k.key, cert.SignatureKey)
	}) {
		return h.checkCert(cert)
	}

	var changed *knownKey
	others := false
	for i, k := range h.known {
		switch {
		case k.marker != noMarker:
		case sameKey(k.key, plain):
			return nil
		case k.key.Type() != plain.Type():
			others = true
		case changed == nil:
			changed = &h.known[i]
		}
	}
	if d.on("nohostauthenticationforlocalhost", false) && d.option("hostkeyalias") == "" && isLoopback(remote) {
		return nil
	}
	if changed != nil {
		return fmt.Errorf("HOST KEY HAS CHANGED: the server shows %s, but %s:%d has %s; somebody may be in the way. "+
			"If the change is right, remove the old key: ssh-keygen -R '%s' -f '%s'", fingerprint(plain),
			use.Printable(changed.file), changed.line, fingerprint(changed.key), use.Printable(h.name), use.Printable(changed.file))
	}
	for _, k := range h.withOut {
		if k.marker == noMarker && sameKey(k.key, plain) {
			return nil
		}
	}
	switch {
	case h.strict == strictNo, h.strict == strictNew:
		d.log.Info().Str("key", fingerprint(plain)).Msg("unknown host key accepted, as StrictHostKeyChecking says")
		return nil
	case d.option("knownhostscommand") != "":
		return fmt.Errorf("host key is unknown (%s), and KnownHostsCommand can't be asked; connect without sharing: %s",
			fingerprint(plain), d.bypass)
	case others:
		return fmt.Errorf("host key is unknown (%s), though keys of other types are known; check it, then add it with: %s",
			fingerprint(plain), d.bypass)
	}
	return fmt.Errorf("host key is unknown (%s); check it, then add it with: %s", fingerprint(plain), d.bypass)
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

// CheckHostKey asks the user's files as they are now whether a connection that turned out to be info may be trusted by
// the rules of spec. So a client whose rules are stricter, or that comes after the files have changed, does not ride a
// connection that it could not have made. The error is an *Error.
func CheckHostKey(spec pool.Spec, info pool.ServerInfo) error {
	d := newDialing(spec)
	h, err := d.hostKeys()
	if err != nil {
		return err
	}
	if err := h.check(info.HostKey, info.Addr); err != nil {
		return d.errorf("%s", err.Error())
	}
	return nil
}
