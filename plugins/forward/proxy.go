package forward

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

const (
	handshakeTime = 30 * time.Second // for what a client of a dynamic forward says before its stream, and for each answer
	maxHandshake  = 32 << 10         // bytes of that
	readAhead     = 16 << 10         // what may come after it in the same packets
)

// request is what a client of a dynamic forward asks for.
type request struct {
	to   string // host:port; text from the client
	data []byte // what has been read of its stream already
	// answer tells the client what became of it; nil: its stream begins.
	answer func(w io.Writer, err error) error
}

// negotiate reads a request in SOCKS 4, 4a or 5 or as HTTP CONNECT: the first byte says which. Whatever is asked for that
// is not offered is refused by the protocol, and an error.
func negotiate(c net.Conn) (request, error) {
	c.SetDeadline(time.Now().Add(handshakeTime))
	defer c.SetDeadline(time.Time{})
	b := bufio.NewReaderSize(io.LimitReader(c, maxHandshake), readAhead)
	first, err := b.Peek(1)
	if err != nil {
		return request{}, fmt.Errorf("it says nothing: %w", err)
	}
	var r request
	switch {
	case first[0] == 4:
		r, err = socks4(b, c)
	case first[0] == 5:
		r, err = socks5(b, c)
	case first[0] >= 'A' && first[0] <= 'Z':
		r, err = connectHTTP(b, c)
	default:
		err = fmt.Errorf("byte %#02x begins neither SOCKS nor HTTP", first[0])
	}
	if err != nil {
		return request{}, err
	}
	r.data, _ = b.Peek(b.Buffered()) // all of it is there
	return r, nil
}

var errRefused = errors.New("asks for something else than a connection")

// socks4 is SOCKS 4 and 4a, which has a name after the user's, and an address 0.0.0.x (Ying-Da Lee's SOCKS.Protocol and
// SOCKS 4A extension).
func socks4(b *bufio.Reader, w io.Writer) (request, error) {
	answer := func(w io.Writer, err error) error {
		reply := [8]byte{0, 90}
		if err != nil {
			reply[1] = 91 // rejected or failed: there is one code for both
		}
		_, e := w.Write(reply[:])
		return e
	}
	var head [8]byte
	if _, err := io.ReadFull(b, head[:]); err != nil {
		return request{}, fmt.Errorf("SOCKS 4: %w", err)
	}
	if _, err := text(b); err != nil { // the user's name, which says nothing
		return request{}, fmt.Errorf("SOCKS 4: %w", err)
	}
	host := netip.AddrFrom4([4]byte(head[4:])).String()
	if head[4] == 0 && head[5] == 0 && head[6] == 0 && head[7] != 0 {
		var err error
		if host, err = text(b); err != nil {
			return request{}, fmt.Errorf("SOCKS 4a: %w", err)
		}
	}
	if head[1] != 1 {
		_ = answer(w, errRefused)
		return request{}, fmt.Errorf("SOCKS 4, command %d: %w", head[1], errRefused)
	}
	to, err := destination(host, binary.BigEndian.Uint16(head[2:]))
	if err != nil {
		_ = answer(w, err)
		return request{}, fmt.Errorf("SOCKS 4: %w", err)
	}
	return request{to: to, answer: answer}, nil
}

// text reads up to a NUL.
func text(b *bufio.Reader) (string, error) {
	s, err := b.ReadSlice(0)
	if err != nil {
		return "", err
	}
	return string(s[:len(s)-1]), nil
}

// The replies of SOCKS 5 (RFC 1928 section 6).
const (
	socksOK             = 0
	socksFailure        = 1
	socksNotAllowed     = 2
	socksNetUnreachable = 3
	socksUnreachable    = 4
	socksRefused        = 5
	socksTimeout        = 6 // TTL expired
	socksCommand        = 7
	socksAddressType    = 8
)

func socks5Reply(w io.Writer, code byte) error {
	_, err := w.Write([]byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0}) // the address that the server connected from is not known
	return err
}

// socks5 is RFC 1928 without authentication: who may connect was decided before.
func socks5(b *bufio.Reader, w io.Writer) (request, error) {
	fail := func(err error) (request, error) { return request{}, fmt.Errorf("SOCKS 5: %w", err) }
	var head [2]byte
	if _, err := io.ReadFull(b, head[:]); err != nil {
		return fail(err)
	}
	methods := make([]byte, head[1])
	if _, err := io.ReadFull(b, methods); err != nil {
		return fail(err)
	}
	if !strings.Contains(string(methods), "\x00") {
		_, _ = w.Write([]byte{5, 0xff})
		return fail(errors.New("the client wants to log in, which is not needed here"))
	}
	if _, err := w.Write([]byte{5, 0}); err != nil {
		return fail(err)
	}
	var ask [4]byte
	if _, err := io.ReadFull(b, ask[:]); err != nil {
		return fail(err)
	}
	if ask[0] != 5 {
		return fail(fmt.Errorf("version %d in the second message", ask[0]))
	}
	var host string
	switch ask[3] {
	case 1, 4:
		address := make([]byte, map[byte]int{1: 4, 4: 16}[ask[3]])
		if _, err := io.ReadFull(b, address); err != nil {
			return fail(err)
		}
		ip, _ := netip.AddrFromSlice(address) // it has one of the two sizes
		host = ip.Unmap().String()
	case 3:
		n, err := b.ReadByte()
		if err != nil {
			return fail(err)
		}
		name := make([]byte, n)
		if _, err := io.ReadFull(b, name); err != nil {
			return fail(err)
		}
		host = string(name)
	default:
		_ = socks5Reply(w, socksAddressType)
		return fail(fmt.Errorf("there is no type %d of addresses", ask[3]))
	}
	var port [2]byte
	if _, err := io.ReadFull(b, port[:]); err != nil {
		return fail(err)
	}
	if ask[1] != 1 {
		_ = socks5Reply(w, socksCommand)
		return fail(fmt.Errorf("command %d: %w", ask[1], errRefused))
	}
	to, err := destination(host, binary.BigEndian.Uint16(port[:]))
	if err != nil {
		_ = socks5Reply(w, socksFailure)
		return fail(err)
	}
	return request{to: to, answer: func(w io.Writer, err error) error { return socks5Reply(w, socks5Code(err)) }}, nil
}

// socks5Code says why in a byte. Servers tell the reason in words, if at all: those of strerror(3) in sshd's case.
func socks5Code(err error) byte {
	refused, isRefused := errors.AsType[*plugin.RefusedError](err)
	switch {
	case err == nil:
		return socksOK
	case errors.Is(err, plugin.ErrDenied), isRefused && refused.Reason == 1: // RFC 4254 section 5.1: prohibited
		return socksNotAllowed
	case timedOut(err):
		return socksTimeout
	case !isRefused:
		return socksFailure
	}
	for _, c := range []struct {
		word string
		code byte
	}{
		{"refused", socksRefused}, {"network is unreachable", socksNetUnreachable}, {"no route", socksUnreachable},
		{"not known", socksUnreachable}, {"no such host", socksUnreachable},
	} {
		if strings.Contains(strings.ToLower(refused.Message), c.word) {
			return c.code
		}
	}
	return socksFailure
}

// destination checks what a client has named.
func destination(host string, port uint16) (string, error) {
	switch {
	case host == "" || len(host) > 255 || strings.ContainsAny(host, "\x00/ \r\n"):
		return "", fmt.Errorf("%q is no host", plugin.Printable(host))
	case port == 0:
		return "", errors.New("there is no port 0")
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port))), nil
}

// connectHTTP is the method CONNECT (RFC 9110 section 9.3.6).
func connectHTTP(b *bufio.Reader, w io.Writer) (request, error) {
	r, err := http.ReadRequest(b)
	if err != nil {
		_ = httpReply(w, http.StatusBadRequest, "", "this is no HTTP that can be read")
		return request{}, fmt.Errorf("HTTP: %w", err)
	}
	if r.Method != http.MethodConnect {
		_ = httpReply(w, http.StatusMethodNotAllowed, "Allow: CONNECT\r\n",
			"this proxy only has CONNECT, which browsers use for https; for http use it as a SOCKS proxy: curl --socks5-hostname")
		return request{}, fmt.Errorf("HTTP: the method %s is not CONNECT", plugin.Printable(r.Method))
	}
	host, portText, err := net.SplitHostPort(r.RequestURI)
	if err == nil {
		var port uint64
		if port, err = strconv.ParseUint(portText, 10, 16); err == nil {
			host, err = destination(host, uint16(port))
		}
	}
	if err != nil {
		_ = httpReply(w, http.StatusBadRequest, "", "CONNECT takes HOST:PORT")
		return request{}, fmt.Errorf("HTTP: CONNECT %s: %w", plugin.Printable(r.RequestURI), err)
	}
	return request{to: host, answer: httpAnswer}, nil
}

func httpAnswer(w io.Writer, err error) error {
	refused, isRefused := errors.AsType[*plugin.RefusedError](err)
	switch {
	case err == nil:
		_, err := io.WriteString(w, "HTTP/1.1 200 Connection established\r\n\r\n")
		return err
	case errors.Is(err, plugin.ErrDenied), isRefused && refused.Reason == 1:
		return httpReply(w, http.StatusForbidden, "", plugin.Printable(err.Error()))
	case timedOut(err):
		return httpReply(w, http.StatusGatewayTimeout, "", plugin.Printable(err.Error()))
	}
	return httpReply(w, http.StatusBadGateway, "", plugin.Printable(err.Error()))
}

// httpReply ends a client of HTTP. why is one line.
func httpReply(w io.Writer, status int, header, why string) error {
	body := "muxproxy: " + why + "\n"
	_, err := fmt.Fprintf(w, "HTTP/1.1 %d %s\r\n%sContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		status, http.StatusText(status), header, len(body), body)
	return err
}

// timedOut reports whether somebody waited in vain: the plugin, or the remote host that said so in strerror(3)'s words.
func timedOut(err error) bool {
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return true
	}
	refused, ok := errors.AsType[*plugin.RefusedError](err)
	return ok && strings.Contains(refused.Message, "timed out")
}
