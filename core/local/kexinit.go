package local

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
)

// Identification is what the local side calls itself (RFC 4253 section 4.2). ssh sends eow@openssh.com only to a
// server whose name starts with OpenSSH; without it `ssh host yes | head -1` hangs. The version is past every
// old-bug pattern of OpenSSH's compat.c.
const Identification = "SSH-2.0-OpenSSH_9.9 muxproxy"

const (
	// maxIdentification bounds an identification line, CR LF included (RFC 4253 section 4.2).
	maxIdentification = 255
	// maxPacket is what RFC 4253 section 6.1 obliges everyone to take; OpenSSH's own KEXINIT is about 1.5 KiB.
	maxPacket = 35000
	// rekeyThreshold leaves it to the client to start a key exchange, by its own RekeyLimit or the like: one that x/crypto
	// starts can freeze the connection for ever. From its KEXINIT on x/crypto holds back what it is to send, at most 64
	// packets; then its reader, too, waits as soon as it has to answer a CLOSE, and never reads the client's KEXINIT. Of
	// one that the client starts, that is read by then. x/crypto's own limit of 2^31 packets for each direction
	// remains, which is what keeps packet sequence numbers from being used twice (RFC 4344 section 3.1).
	rekeyThreshold = 1 << 62
)

// kexInit is SSH_MSG_KEXINIT (RFC 4253 section 7.1).
type kexInit struct {
	Cookie                  [16]byte `sshtype:"20"`
	KexAlgos                []string
	HostKeyAlgos            []string
	CiphersClientServer     []string
	CiphersServerClient     []string
	MACsClientServer        []string
	MACsServerClient        []string
	CompressionClientServer []string
	CompressionServerClient []string
	LanguagesClientServer   []string
	LanguagesServerClient   []string
	FirstKexFollows         bool
	Reserved                uint32
}

// opening is what a client said before the key exchange.
type opening struct {
	raw     []byte // every byte read so far, to be replayed
	version string // identification string without CR LF
	kexInit kexInit
}

func (o *opening) openSSH() bool { return strings.HasPrefix(o.version, "SSH-2.0-OpenSSH") }

// readOpening reads a client's identification string and its KEXINIT. What r's buffer takes beyond them is replayed too.
func readOpening(r *bufio.Reader) (*opening, error) {
	o := &opening{}
	line, err := readLine(r)
	o.raw = append(o.raw, line...)
	if err != nil {
		return nil, err
	}
	o.version = strings.TrimRight(string(line), "\r\n")
	if !strings.HasPrefix(o.version, "SSH-2.0-") {
		return nil, fmt.Errorf("not an SSH client: it began with %q", firstBytes(o.version, 40))
	}

	// RFC 4253 section 6: packet_length, padding_length, payload, padding; no MAC yet.
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	length, padding := binary.BigEndian.Uint32(head[:4]), uint32(head[4])
	if length < 2 || length > maxPacket || padding+1 >= length {
		return nil, errors.New("malformed first packet")
	}
	body := make([]byte, length-1)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, err
	}
	o.raw = append(append(o.raw, head[:]...), body...)
	if err := ssh.Unmarshal(body[:length-1-padding], &o.kexInit); err != nil {
		return nil, errors.New("malformed KEXINIT")
	}
	return o, nil
}

func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for len(line) < maxIdentification {
		b, err := r.ReadByte()
		if err != nil {
			return line, err
		}
		line = append(line, b)
		if b == '\n' {
			return line, nil
		}
	}
	return line, errors.New("identification string is too long")
}

func firstBytes(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

// algorithms chooses the cheapest safe algorithms that the client can do. x/crypto follows the client's order, so the
// choice is made by naming one each; where the client has none of ours, x/crypto's defaults stand.
func (o *opening) algorithms() ssh.Config {
	var c ssh.Config
	kex := []string{ssh.KeyExchangeECDHP256, ssh.KeyExchangeCurve25519}
	if i := slices.Index(o.kexInit.KexAlgos, ssh.KeyExchangeMLKEM768X25519); i == 0 {
		// OpenSSH 10.1 and newer warn on the terminal about a key exchange that is not post-quantum.
		kex = []string{ssh.KeyExchangeMLKEM768X25519}
	}
	for _, k := range kex {
		if slices.Contains(o.kexInit.KexAlgos, k) {
			c.KeyExchanges = []string{k}
			break
		}
	}
	for _, k := range []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM} {
		if slices.Contains(o.kexInit.CiphersClientServer, k) && slices.Contains(o.kexInit.CiphersServerClient, k) {
			c.Ciphers = []string{k}
			break
		}
	}
	c.RekeyThreshold = rekeyThreshold
	return c
}

// replay is the reader that x/crypto sees: the opening again, what in has read beyond it, then the rest of conn.
func (o *opening) replay(in *bufio.Reader, conn io.Reader) io.Reader {
	beyond, _ := in.Peek(in.Buffered())
	return io.MultiReader(bytes.NewReader(append(o.raw, beyond...)), conn)
}
