package upstream

import (
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/use"
)

// What we prefer where the user has not chosen. AES-GCM, since x/crypto/ssh is half as fast again with it as with
// ChaCha20-Poly1305. The hybrid key exchange first, as OpenSSH has it since 10.0.
var (
	preferredCiphers = []string{
		ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305,
		ssh.CipherAES128CTR, ssh.CipherAES192CTR, ssh.CipherAES256CTR,
	}
	preferredKex = []string{
		ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519,
		ssh.KeyExchangeECDHP256, ssh.KeyExchangeECDHP384, ssh.KeyExchangeECDHP521,
		ssh.KeyExchangeDHGEXSHA256, ssh.KeyExchangeDH16SHA512, ssh.KeyExchangeDH14SHA256,
	}
	preferredMACs = []string{
		ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512, ssh.HMACSHA1,
	}
	preferredHostKeys = []string{
		ssh.CertAlgoED25519v01, ssh.CertAlgoECDSA256v01, ssh.CertAlgoECDSA384v01, ssh.CertAlgoECDSA521v01,
		ssh.CertAlgoRSASHA512v01, ssh.CertAlgoRSASHA256v01,
		ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
		ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256,
	}
)

// algorithms is what to offer. What the user has chosen is kept, in the user's order, as far as x/crypto/ssh can do it,
// weak algorithms included: ssh would use them.
func (d *dialing) algorithms() (*ssh.ClientConfig, error) {
	safe, weak := ssh.SupportedAlgorithms(), ssh.InsecureAlgorithms()
	config := &ssh.ClientConfig{Config: ssh.Config{RekeyThreshold: rekeyThreshold}}
	for _, k := range []struct {
		name      string
		preferred []string
		supported []string
		to        *[]string
	}{
		{"Ciphers", preferredCiphers, slices.Concat(safe.Ciphers, weak.Ciphers), &config.Ciphers},
		{"KexAlgorithms", preferredKex,
			slices.Concat(safe.KeyExchanges, weak.KeyExchanges, []string{"curve25519-sha256@libssh.org"}), &config.KeyExchanges},
		{"MACs", preferredMACs, slices.Concat(safe.MACs, weak.MACs), &config.MACs},
		{"HostKeyAlgorithms", preferredHostKeys, slices.Concat(safe.HostKeys, weak.HostKeys), &config.HostKeyAlgorithms},
	} {
		keyword := strings.ToLower(k.name)
		list := d.spec.Config.Get(keyword)
		if list == "" || !d.spec.Config.IsSet(keyword) {
			*k.to = slices.Clone(k.preferred)
			continue
		}
		for _, name := range strings.Split(list, ",") {
			if slices.Contains(k.supported, name) {
				*k.to = append(*k.to, name)
			}
		}
		if len(*k.to) == 0 {
			return nil, d.refusedf("%s in ssh_config names nothing that can be shared (%s); connect without sharing: %s",
				k.name, use.Printable(list), d.bypass)
		}
	}
	return config, nil
}

func postQuantum(kex string) bool {
	return strings.HasPrefix(kex, "mlkem") || strings.HasPrefix(kex, "sntrup")
}

// plainAlgorithm is the signature algorithm below that of a certificate.
func plainAlgorithm(name string) string {
	plain, ok := strings.CutSuffix(name, "-cert-v01@openssh.com")
	if ok && strings.HasPrefix(name, "sk-") {
		return plain + "@openssh.com"
	}
	return plain
}

// keyName is what OpenSSH calls a type of key.
func keyName(key ssh.PublicKey) string {
	name := plainAlgorithm(key.Type())
	switch {
	case name == ssh.KeyAlgoED25519:
		name = "ED25519"
	case name == ssh.KeyAlgoSKED25519:
		name = "ED25519-SK"
	case name == ssh.KeyAlgoSKECDSA256:
		name = "ECDSA-SK"
	case strings.HasPrefix(name, "ecdsa-"):
		name = "ECDSA"
	case name == ssh.KeyAlgoRSA:
		name = "RSA"
	default:
		name = use.Printable(name)
	}
	if _, ok := key.(*ssh.Certificate); ok {
		name += "-CERT"
	}
	return name
}
