package forward

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// said plays a client that has said something, and keeps what it is told.
type said struct {
	io.Reader
	told      bytes.Buffer
	deadlines []time.Time
}

func (s *said) Write(b []byte) (int, error)      { return s.told.Write(b) }
func (s *said) SetDeadline(at time.Time) error   { s.deadlines = append(s.deadlines, at); return nil }
func (s *said) Close() error                     { return nil }
func (s *said) LocalAddr() net.Addr              { return nil }
func (s *said) RemoteAddr() net.Addr             { return nil }
func (s *said) SetReadDeadline(time.Time) error  { return nil }
func (s *said) SetWriteDeadline(time.Time) error { return nil }

const (
	hello5 = "\x05\x01\x00"
	ok5    = "\x05\x00"
)

func reply5(code byte) string { return string([]byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0}) }

func TestNegotiate(t *testing.T) {
	refused := func(reason uint32, message string) error {
		return &plugin.RefusedError{Reason: reason, Message: message}
	}
	for _, c := range []struct {
		name   string
		say    string
		to     string // "": refused
		data   string
		told   string // before the answer; a prefix of HTTP's
		failed error  // what became of it
		answer string // "": that it went well is told in the last column of the ones before
	}{
		{name: "socks 4", say: "\x04\x01\x00\x50\xc0\x00\x02\x01me\x00", to: "192.0.2.1:80", answer: "\x00\x5a\x00\x00\x00\x00\x00\x00"},
		{name: "socks 4, data", say: "\x04\x01\x00\x50\xc0\x00\x02\x01\x00GET", to: "192.0.2.1:80", data: "GET", answer: "\x00\x5a\x00\x00\x00\x00\x00\x00"},
		{name: "socks 4a", say: "\x04\x01\x01\xbb\x00\x00\x00\x01\x00host.example\x00x", to: "host.example:443", data: "x",
			failed: refused(2, "no"), answer: "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{name: "socks 4, bind", say: "\x04\x02\x00\x50\xc0\x00\x02\x01\x00", told: "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{name: "socks 4, no port", say: "\x04\x01\x00\x00\xc0\x00\x02\x01\x00", told: "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{name: "socks 4a, no name", say: "\x04\x01\x01\xbb\x00\x00\x00\x01\x00\x00", told: "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{name: "socks 4, cut", say: "\x04\x01\x00\x50\xc0"},
		{name: "socks 4, a user without end", say: "\x04\x01\x00\x50\xc0\x00\x02\x01" + strings.Repeat("u", 1<<20)},
		{name: "socks 5", say: hello5 + "\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x50", to: "192.0.2.1:80", told: ok5, answer: reply5(0)},
		{name: "socks 5, several methods", say: "\x05\x02\x02\x00" + "\x05\x01\x00\x03\x01h\x00\x50zz", to: "h:80", told: ok5, data: "zz", answer: reply5(0)},
		{name: "socks 5, v6", say: hello5 + "\x05\x01\x00\x04\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x01\x00\x50", to: "[2001:db8::1]:80", told: ok5, answer: reply5(0)},
		{name: "socks 5, a name that is an address", say: hello5 + "\x05\x01\x00\x03\x032::\x00\x50", to: "[2::]:80", told: ok5, answer: reply5(0)},
		{name: "socks 5, refused", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x50", to: "h:80", told: ok5, failed: refused(2, "Connection refused"), answer: reply5(5)},
		{name: "socks 5, prohibited", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x50", to: "h:80", told: ok5, failed: refused(1, "open failed"), answer: reply5(2)},
		{name: "socks 5, denied", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x50", to: "h:80", told: ok5, failed: fmt.Errorf("%w: no", plugin.ErrDenied), answer: reply5(2)},
		{name: "socks 5, no such host", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x50", to: "h:80", told: ok5, failed: refused(2, "Name or service not known"), answer: reply5(4)},
		{name: "socks 5, no route", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x50", to: "h:80", told: ok5, failed: refused(2, "No route to host"), answer: reply5(4)},
		{name: "socks 5, no network", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x50", to: "h:80", told: ok5, failed: refused(2, "Network is unreachable"), answer: reply5(3)},
		{name: "socks 5, late", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x50", to: "h:80", told: ok5, failed: context.DeadlineExceeded, answer: reply5(6)},
		{name: "socks 5, late there", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x50", to: "h:80", told: ok5, failed: refused(2, "Connection timed out"), answer: reply5(6)},
		{name: "socks 5, other", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x50", to: "h:80", told: ok5, failed: errors.New("?"), answer: reply5(1)},
		{name: "socks 5, password wanted", say: "\x05\x01\x02", told: "\x05\xff"},
		{name: "socks 5, udp", say: hello5 + "\x05\x03\x00\x03\x01h\x00\x50", told: ok5 + reply5(7)},
		{name: "socks 5, bind", say: hello5 + "\x05\x02\x00\x01\xc0\x00\x02\x01\x00\x50", told: ok5 + reply5(7)},
		{name: "socks 5, odd address", say: hello5 + "\x05\x01\x00\x05\x01h\x00\x50", told: ok5 + reply5(8)},
		{name: "socks 5, no name", say: hello5 + "\x05\x01\x00\x03\x00\x00\x50", told: ok5 + reply5(1)},
		{name: "socks 5, a path", say: hello5 + "\x05\x01\x00\x03\x04/etc\x00\x50", told: ok5 + reply5(1)},
		{name: "socks 5, no port", say: hello5 + "\x05\x01\x00\x03\x01h\x00\x00", told: ok5 + reply5(1)},
		{name: "socks 5, then 4", say: hello5 + "\x04\x01\x00\x03\x01h\x00\x50", told: ok5},
		{name: "socks 5, cut", say: "\x05"},
		{name: "connect", say: "CONNECT h.example:443 HTTP/1.1\r\nHost: h.example:443\r\n\r\n\x16\x03", to: "h.example:443", data: "\x16\x03",
			answer: "HTTP/1.1 200 Connection established\r\n\r\n"},
		{name: "connect, v6", say: "CONNECT [::1]:443 HTTP/1.0\r\n\r\n", to: "[::1]:443", answer: "HTTP/1.1 200 Connection established\r\n\r\n"},
		{name: "connect, refused", say: "CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", to: "h:443", failed: refused(2, "Connection refused\x1b"), answer: "HTTP/1.1 502 Bad Gateway\r\n"},
		{name: "connect, late", say: "CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", to: "h:443", failed: context.DeadlineExceeded, answer: "HTTP/1.1 504 Gateway Timeout\r\n"},
		{name: "connect, denied", say: "CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", to: "h:443", failed: fmt.Errorf("%w: no", plugin.ErrDenied), answer: "HTTP/1.1 403 Forbidden\r\n"},
		{name: "connect without a port", say: "CONNECT h HTTP/1.1\r\nHost: h\r\n\r\n", told: "HTTP/1.1 400 Bad Request\r\n"},
		{name: "connect to port 0", say: "CONNECT h:0 HTTP/1.1\r\nHost: h\r\n\r\n", told: "HTTP/1.1 400 Bad Request\r\n"},
		{name: "get", say: "GET http://h/ HTTP/1.1\r\nHost: h\r\n\r\n", told: "HTTP/1.1 405 Method Not Allowed\r\nAllow: CONNECT\r\n"},
		{name: "headers without end", say: "CONNECT h:443 HTTP/1.1\r\n" + strings.Repeat("A: b\r\n", 1<<18), told: "HTTP/1.1 400 Bad Request\r\n"},
		{name: "tls", say: "\x16\x03\x01"},
		{name: "nothing", say: ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &said{Reader: strings.NewReader(c.say)}
			r, err := negotiate(s)
			if ds := s.deadlines; len(ds) != 2 || time.Until(ds[0]) < handshakeTime-10*time.Second || time.Until(ds[0]) > handshakeTime || !ds[1].IsZero() {
				t.Errorf("deadlines %v", ds)
			}
			told := s.told.String()
			if (err == nil) != (c.to != "") || r.to != c.to || string(r.data) != c.data {
				t.Fatalf("to %q, data %q, %v", r.to, r.data, err)
			}
			if http := strings.HasPrefix(c.told, "HTTP"); http && !strings.HasPrefix(told, c.told) || !http && told != c.told {
				t.Errorf("told %q, want %q", told, c.told)
			}
			if strings.Contains(told+fmt.Sprint(err), "\x1b") {
				t.Errorf("unescaped: %q, %v", told, err)
			}
			if err != nil {
				return
			}
			s.told.Reset()
			if err := r.answer(s, c.failed); err != nil {
				t.Fatal(err)
			}
			if got := s.told.String(); c.failed != nil && strings.HasPrefix(c.answer, "HTTP") && !strings.HasPrefix(got, c.answer) ||
				(c.failed == nil || !strings.HasPrefix(c.answer, "HTTP")) && got != c.answer || strings.Contains(got, "\x1b") {
				t.Errorf("answer %q, want %q", got, c.answer)
			}
		})
	}
}

// Nothing that a client says makes it go on for ever, or reads more than it may.
func FuzzNegotiate(f *testing.F) {
	for _, s := range []string{"\x04\x01\x00\x50\x00\x00\x00\x01\x00h\x00x", hello5 + "\x05\x01\x00\x03\x01h\x00\x50zz", "CONNECT h:443 HTTP/1.1\r\n\r\nx"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &said{Reader: bytes.NewReader(b)}
		r, err := negotiate(s)
		if err != nil {
			return
		}
		host, port, err := net.SplitHostPort(r.to)
		if err != nil || host == "" || port == "0" {
			t.Errorf("to %q", r.to)
		}
		if !bytes.HasSuffix(b, r.data) && len(b) <= maxHandshake || len(r.data) > 64<<10 {
			t.Errorf("data %q", r.data)
		}
	})
}
