package upstream

import (
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// proofTimeout bounds the server's answer to hostkeys-prove-00@openssh.com; one that comes later changes nothing.
	proofTimeout = 30 * time.Second
	// maxServerKeys bounds the host keys that a server may have.
	maxServerKeys = 64
)

// updater brings the user's known_hosts up to date with the host keys that the server says it has (UpdateHostKeys in
// ssh_config(5); sections 2.5 of OpenSSH's PROTOCOL; client_input_hostkeys of clientloop.c). The server has logged us in with a
// key that the user's own file vouches for.
type updater struct {
	log     zerolog.Logger
	name    string
	files   []string
	hash    bool
	allowed []string // host key algorithms

	session []byte
}

// updater returns nil if nothing is to be updated.
func (h *hostKeys) updater(session []byte) *updater {
	d := h.d
	switch strings.ToLower(d.option("updatehostkeys")) {
	case "yes", "true":
	case "ask":
		// The list comes after the login, when the person's own ssh has nothing to ask with any more.
		d.debugf("UpdateHostKeys=ask is not supported; known_hosts stays as it is")
		return nil
	default:
		return nil
	}
	if !usableName(h.name) {
		return nil
	}
	u := &updater{
		log: d.log, name: h.name, files: h.user, hash: d.on("hashknownhosts", false),
		allowed: preferredHostKeys, session: session,
	}
	if list := d.option("hostkeyalgorithms"); list != "" {
		u.allowed = strings.Split(list, ",")
	}
	return u
}

// run acts on the payload of one hostkeys-00@openssh.com. It ends with the connection at the latest.
func (u *updater) run(c *conn, payload []byte) {
	offered, why := u.parse(payload)
	if why == "" {
		why = u.decide(c, offered)
	}
	u.log.Debug().Str("result", why).Msg("server told its host keys")
}

// parse returns the keys that may be learnt. What is odd in the list, but for its form, is passed over, as ssh does.
func (u *updater) parse(payload []byte) (keys []ssh.PublicKey, why string) {
	for len(payload) > 0 {
		var next struct {
			Blob []byte
			Rest []byte `ssh:"rest"`
		}
		if err := ssh.Unmarshal(payload, &next); err != nil {
			return nil, "the list is malformed"
		}
		payload = next.Rest
		key, err := ssh.ParsePublicKey(next.Blob)
		if err != nil {
			continue // of a type from the future
		}
		if _, ok := key.(*ssh.Certificate); ok || !u.permitted(key.Type()) {
			continue
		}
		if slices.ContainsFunc(keys, func(k ssh.PublicKey) bool { return sameKey(k, key) }) {
			return nil, "the list names a key twice"
		}
		if keys = append(keys, key); len(keys) > maxServerKeys {
			return nil, "the list is too long"
		}
	}
	if len(keys) == 0 {
		return nil, "no key in the list can be used"
	}
	return keys, ""
}

func (u *updater) permitted(format string) bool {
	if format == ssh.KeyAlgoRSA {
		return slices.ContainsFunc(u.allowed, func(a string) bool {
			return a == ssh.KeyAlgoRSASHA256 || a == ssh.KeyAlgoRSASHA512 || a == ssh.KeyAlgoRSA
		})
	}
	return slices.Contains(u.allowed, format)
}

// decide compares with the files, has new keys proved and changes the files. It returns what came of it.
func (u *updater) decide(c *conn, offered []ssh.PublicKey) string {
	known := make([]bool, len(offered))
	var old []ssh.PublicKey
	var foreign []knownKey // lines that are not about this host
	for _, file := range u.files {
		text, err := readHostFile(file)
		if err != nil {
			return "a known_hosts file can't be read"
		}
		for _, k := range parseHostFile(file, text, func(string) bool { return true }) {
			if !matchHosts(k.hosts, u.name) {
				foreign = append(foreign, k)
				continue
			}
			// What the user wrote with such care is not ours to rewrite.
			if k.marker != noMarker {
				return "known_hosts has a marker for this host"
			}
			if complexHosts(k.hosts) {
				return "known_hosts has a pattern for this host"
			}
			i := slices.IndexFunc(offered, func(o ssh.PublicKey) bool { return sameKey(o, k.key) })
			if i >= 0 {
				known[i] = true
			} else {
				old = append(old, k.key)
			}
		}
	}
	for _, k := range foreign {
		if slices.ContainsFunc(slices.Concat(offered, old), func(o ssh.PublicKey) bool { return sameKey(o, k.key) }) {
			return "a key is known under another name"
		}
	}
	var fresh []ssh.PublicKey
	for i, key := range offered {
		if !known[i] {
			fresh = append(fresh, key)
		}
	}
	switch {
	case len(fresh) == len(offered):
		return "no key in the list is known"
	case len(fresh) == 0 && len(old) == 0:
		return "nothing has changed"
	case len(fresh) > 0:
		if why := u.prove(c, fresh); why != "" {
			return why
		}
	}
	for i, file := range u.files {
		keep := offered
		if i > 0 { // all of them are in the first file now, as ssh has it
			keep = nil
		}
		changed, err := replaceHost(file, u.name, keep, u.hash)
		switch {
		case err != nil:
			u.log.Warn().Str("file", file).Err(err).Msg("known_hosts can't be updated")
			if i == 0 { // then the others' lines are still needed
				return "the first known_hosts file can't be updated"
			}
		case changed:
			u.log.Info().Str("file", file).Str("name", use.Printable(u.name)).Int("learnt", len(fresh)).Int("retired", len(old)).
				Msg("known_hosts updated with the server's host keys")
		}
	}
	return "done"
}

// complexHosts is hostspec_is_complex of OpenSSH's clientloop.c: patterns, or more names than one and its address.
func complexHosts(hosts string) bool {
	return strings.ContainsAny(hosts, "*?!") || strings.Count(hosts, ",") > 1
}

// prove has the server sign that it holds the private halves. It returns why it is not believed.
func (u *updater) prove(c *conn, keys []ssh.PublicKey) string {
	var ask []byte
	for _, k := range keys {
		ask = append(ask, ssh.Marshal(struct{ Blob []byte }{k.Marshal()})...)
	}
	started := time.Now()
	ok, reply, err := c.SendRequest("hostkeys-prove-00@openssh.com", true, ask)
	switch {
	case err != nil:
		return "the connection has ended"
	case !ok:
		return "the server proves nothing"
	case time.Since(started) > proofTimeout:
		return "the proof came too late"
	}
	for _, k := range keys {
		var next struct {
			Sig  []byte
			Rest []byte `ssh:"rest"`
		}
		var sig ssh.Signature
		if ssh.Unmarshal(reply, &next) != nil || ssh.Unmarshal(next.Sig, &sig) != nil {
			return "the proof is malformed"
		}
		reply = next.Rest
		// sshd signs with the algorithm of the key exchange where that is RSA; SHA-1 proves nothing.
		if sig.Format == ssh.KeyAlgoRSA {
			return "the proof is signed with SHA-1"
		}
		signed := ssh.Marshal(struct {
			Purpose string
			Session []byte
			Blob    []byte
		}{"hostkeys-prove-00@openssh.com", u.session, k.Marshal()})
		if err := k.Verify(signed, &sig); err != nil {
			return "the proof is wrong"
		}
	}
	if len(reply) != 0 {
		return "the proof is malformed"
	}
	return ""
}
