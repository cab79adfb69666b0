//go:build linux

package e2e

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// frame is a frame of the wire: length, type, body.
func frame(kind byte, body string) string {
	return string(binary.BigEndian.AppendUint32(nil, uint32(1+len(body)))) + string([]byte{kind}) + body
}

// hello is a bridge's first frame, for a target that nobody listens at.
func hello(version int, mode string) string {
	return frame(1, fmt.Sprintf(`{"version":%d,"target":{"user":"nobody","host":"127.0.0.1","port":1},"mode":%q}`, version, mode))
}

func TestHostileHellosEndAlone(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		beside := w.hold()
		before := w.settled(1)
		path := filepath.Join(w.mustStatus().Sockets, "muxproxy.sock")
		connect := func() *net.UnixConn {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(patience))
			return c.(*net.UnixConn)
		}
		rnd, _ := random(1 << 16)
		noise, err := io.ReadAll(rnd)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ name, send string }{
			{"noise", string(noise)},
			{"a client of something else", "GET / HTTP/1.0\r\n\r\n"},
			{"the longest length", "\xff\xff\xff\xff\x01{}"},
			{"more than a frame may have", "\x00\x20\x00\x00\x01" + strings.Repeat(" ", 1<<16)},
			{"no length", "\x00\x00\x00\x00"},
			{"a frame of another type", frame(2, `{"kind":"served"}`)},
			{"a frame of no type", frame(200, `{}`)},
			{"no JSON", frame(1, "{")},
			{"no object", frame(1, "[1,2,3]")},
			{"nothing in it", frame(1, "{}")},
			{"deep JSON", frame(1, strings.Repeat("[", 500_000))},
			{"files that did not come", hello(1, "pipes")},
			{"an unknown mode", hello(1, "telepathy")},
		} {
			u := connect()
			u.Write([]byte(c.send))
			if _, err := io.Copy(io.Discard, u); os.IsTimeout(err) {
				t.Errorf("%s: the connection stays open", c.name)
			}
			u.Close()
			beside.echo("still here: " + c.name)
		}
		// Another version gets an answer that says so.
		u := connect()
		u.Write([]byte(hello(99, "copy")))
		if b, err := io.ReadAll(u); err != nil || !strings.Contains(string(b), "version") {
			t.Errorf("a hello of version 99 was answered with %q, %v", b, err)
		}
		u.Close()
		// Closed at every place in a hello.
		whole := hello(1, "copy")
		for i := range len(whole) {
			u := connect()
			u.Write([]byte(whole[:i]))
			u.Close()
		}
		// Slow ones: they stay open in mid-frame while others work.
		var slow []*net.UnixConn
		for i := range 64 {
			u := connect()
			u.Write([]byte(whole[:i%len(whole)]))
			slow = append(slow, u)
		}
		w.twentyBeside(t)
		beside.echo("still here: slow ones")
		for _, u := range slow {
			u.Close()
		}
		w.backTo(before)
		beside.release()
		w.connections(1)
	})
}

func TestHostileCommandsEndAlone(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		beside := w.hold()
		before := w.settled(1)
		path := filepath.Join(w.mustStatus().Sockets, "control.sock")
		rnd, _ := random(1 << 16)
		noise, err := io.ReadAll(rnd)
		if err != nil {
			t.Fatal(err)
		}
		const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" // RFC 9113 section 3.4
		for _, c := range []struct{ name, send string }{
			{"noise", string(noise)},
			{"HTTP/1", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"},
			{"noise after the preface", preface + "\xff" + string(noise)},
			{"the longest frame", preface + "\xff\xff\xff\x00\x00\x00\x00\x00\x01" + string(noise)},
		} {
			u, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			u.SetDeadline(time.Now().Add(patience))
			u.Write([]byte(c.send))
			if _, err := io.Copy(io.Discard, u); os.IsTimeout(err) {
				t.Errorf("%s: the connection stays open", c.name)
			}
			u.Close()
			beside.echo("still here: " + c.name)
			w.mustStatus()
		}
		w.backTo(before)
		beside.release()
	})
}

// What follows the hello is meant to be SSH. The bridge is real, and started by hand.
func TestHostileStreamsEndAlone(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		beside := w.hold()
		before := w.settled(1)
		bridge := func() *proc {
			return w.start(spec{args: []string{binDir + "/muxproxy", "-F", w.conf,
				fmt.Sprintf("%s@127.0.0.1:%d", me, w.link.port()), "box"}})
		}
		const ident = "SSH-2.0-e2e\r\n"
		rnd, _ := random(1 << 16)
		noise, err := io.ReadAll(rnd)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ name, send string }{
			{"no SSH", "GET / HTTP/1.0\r\n\r\n"},
			{"an endless first line", strings.Repeat("x", 1<<20)},
			{"lines without end", strings.Repeat("x\r\n", 1<<18)},
			{"SSH 1", "SSH-1.5-e2e\r\n"},
			{"noise", string(noise)},
			{"noise after the identification string", ident + string(noise)},
			{"the longest packet", ident + "\xff\xff\xff\xff\x04" + string(noise)},
			{"an empty packet", ident + "\x00\x00\x00\x00\x00"},
			{"more padding than packet", ident + "\x00\x00\x00\x0c\xff" + strings.Repeat("\x14", 11)},
			{"a KEXINIT without names", ident + "\x00\x00\x00\x1c\x0a\x14" + strings.Repeat("\x00", 26)},
		} {
			p := bridge()
			go io.WriteString(p.in, c.send) // nobody may read it all
			p.wait(patience)
			beside.echo("still here: " + c.name)
		}
		for _, send := range []string{"", "SSH-2.0", ident, ident + "\x00\x00\x01\x00\x04"} {
			p := bridge()
			p.send(send)
			p.in.Close()
			p.wait(patience)
			beside.echo(fmt.Sprintf("still here: closed after %d", len(send)))
		}
		// One that says nothing more, and one that reads nothing.
		quiet := bridge()
		quiet.send(ident)
		quiet.expect("SSH-2.0-OpenSSH")
		w.twentyBeside(t)
		kill9(quiet.pid())
		quiet.wait(patience)
		w.backTo(before)
		beside.release()
		w.connections(1)
	})
}
