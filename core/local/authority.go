package local

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/crypto/ssh"
)

// keyType is one family of host keys that a client may insist on.
type keyType struct {
	name string // as in authorized_keys
	// algorithms are the host key algorithms that the family can serve, certificates and plain (RFC 4253 section 6.6,
	// RFC 8332, OpenSSH's PROTOCOL.certkeys).
	cert, plain []string
	generate    func() (crypto.Signer, error)
}

// keyTypes is in order of cost: OpenSSH computes P-256 in OpenSSL's assembly and Ed25519 in portable C.
var keyTypes = []keyType{
	{
		name: ssh.KeyAlgoECDSA256, cert: []string{ssh.CertAlgoECDSA256v01}, plain: []string{ssh.KeyAlgoECDSA256},
		generate: func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) },
	},
	{
		name: ssh.KeyAlgoED25519, cert: []string{ssh.CertAlgoED25519v01}, plain: []string{ssh.KeyAlgoED25519},
		generate: func() (crypto.Signer, error) {
			_, key, err := ed25519.GenerateKey(rand.Reader)
			return key, err
		},
	},
	{
		name:     ssh.KeyAlgoRSA,
		cert:     []string{ssh.CertAlgoRSASHA256v01, ssh.CertAlgoRSASHA512v01},
		plain:    []string{ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512},
		generate: func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 3072) },
	},
}

// pair is a CA and the host key that it certifies. Neither ever leaves memory.
type pair struct{ ca, host ssh.Signer }

// slot is one key type's pair, made when first needed.
type slot struct {
	keyType
	// making is the single flight of making and publishing a pair; readers go by made.
	making sync.Mutex
	made   atomic.Pointer[pair]
}

// Authority holds the host keys that local clients see, and the CAs that certify them. All of it lives in memory
// only, and is made anew with each master. Safe for use by many goroutines.
type Authority struct {
	publish func(ca string) error
	slots   []*slot
}

// NewAuthority makes the cheapest CA and host key. CAs of other types follow when the first client comes that needs
// one. publish is called with each CA's public half, in authorized_keys form, before any client is shown a
// certificate of it; it must put the key where ssh looks, and may be called from several goroutines at once.
func NewAuthority(publish func(ca string) error) (*Authority, error) {
	a := &Authority{publish: publish}
	for _, t := range keyTypes {
		a.slots = append(a.slots, &slot{keyType: t})
	}
	_, err := a.pair(a.slots[0])
	return a, err
}

func (a *Authority) pair(s *slot) (*pair, error) {
	if p := s.made.Load(); p != nil {
		return p, nil
	}
	s.making.Lock()
	defer s.making.Unlock()
	if p := s.made.Load(); p != nil {
		return p, nil
	}
	p := &pair{}
	for _, signer := range []*ssh.Signer{&p.ca, &p.host} {
		key, err := s.generate()
		if err != nil {
			return nil, fmt.Errorf("making a %s key: %w", s.name, err)
		}
		if *signer, err = ssh.NewSignerFromSigner(key); err != nil {
			return nil, fmt.Errorf("making a %s key: %w", s.name, err)
		}
	}
	if err := a.publish(authorizedKey(p.ca)); err != nil {
		return nil, err
	}
	s.made.Store(p)
	return p, nil
}

// Keys makes what is missing and returns the public halves of the plain host keys, which clients without
// certificates see, and of the CAs, in authorized_keys form without a comment.
func (a *Authority) Keys() (plain, cas []string, err error) {
	for _, s := range a.slots {
		p, err := a.pair(s)
		if err != nil {
			return nil, nil, err
		}
		plain, cas = append(plain, authorizedKey(p.host)), append(cas, authorizedKey(p.ca))
	}
	return plain, cas, nil
}

// Made is Keys for those that have been made: it makes none.
func (a *Authority) Made() (plain, cas []string) {
	for _, s := range a.slots {
		if p := s.made.Load(); p != nil {
			plain, cas = append(plain, authorizedKey(p.host)), append(cas, authorizedKey(p.ca))
		}
	}
	return plain, cas
}

func authorizedKey(s ssh.Signer) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.PublicKey())))
}

// errNoCertificate says that an OpenSSH client accepts no host certificate that the master can make.
var errNoCertificate = fmt.Errorf("this ssh accepts no host certificate (HostKeyAlgorithms); allow %s there, "+
	"or set MUXPROXY_BYPASS=1", keyTypes[0].cert[0])

// Check says why an OpenSSH client with this HostKeyAlgorithms (ssh_config(5), as ssh -G prints it; "": not known) can't be
// served, if that can be told before it speaks.
func Check(hostKeyAlgorithms string) error {
	if hostKeyAlgorithms == "" {
		return nil
	}
	list := strings.Split(hostKeyAlgorithms, ",")
	for _, t := range keyTypes {
		if slices.ContainsFunc(t.cert, func(c string) bool { return slices.Contains(list, c) }) {
			return nil
		}
	}
	return errNoCertificate
}

// signers returns what a client that listed these host key algorithms is shown: a certificate for principals if it
// takes one, else, if plain is allowed, plain keys.
func (a *Authority) signers(algorithms, principals []string, plain bool) ([]ssh.Signer, error) {
	offers := func(of []string) bool {
		return slices.ContainsFunc(of, func(s string) bool { return slices.Contains(algorithms, s) })
	}
	for _, t := range a.slots {
		if !offers(t.cert) {
			continue
		}
		p, err := a.pair(t)
		if err != nil {
			return nil, err
		}
		s, err := p.certificate(principals)
		if err != nil {
			return nil, err
		}
		return []ssh.Signer{s}, nil
	}
	if !plain {
		return nil, errNoCertificate
	}
	// One key at most: AddHostKey would let the client's order choose a dearer one.
	for _, t := range a.slots {
		if offers(t.plain) {
			p, err := a.pair(t)
			if err != nil {
				return nil, err
			}
			return []ssh.Signer{p.host}, nil
		}
	}
	return nil, fmt.Errorf("this client accepts none of the host key algorithms ecdsa-sha2-nistp256, ssh-ed25519, rsa-sha2-256")
}

// certificate makes a host certificate (PROTOCOL.certkeys) that never expires: its CA dies with the master.
func (p pair) certificate(principals []string) (ssh.Signer, error) {
	cert := &ssh.Certificate{
		Key:             p.host.PublicKey(),
		CertType:        ssh.HostCert,
		KeyId:           "muxproxy",
		ValidPrincipals: principals,
		ValidAfter:      0,
		ValidBefore:     ssh.CertTimeInfinity,
	}
	if len(principals) == 0 {
		// ssh takes a certificate without principals for any host.
		return nil, fmt.Errorf("a host certificate needs a name")
	}
	if err := cert.SignCert(rand.Reader, p.ca); err != nil {
		return nil, fmt.Errorf("signing a host certificate: %w", err)
	}
	return ssh.NewCertSigner(cert, p.host)
}

// KnownHostsLine is the known_hosts line that makes ssh trust certificates of a CA (authorized_keys form). Its comment
// is mark, which names the living master.
func KnownHostsLine(ca, mark string) string { return "@cert-authority * " + ca + " " + mark }
