//go:build linux

package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// echoServer answers everything with itself and keeps half-closed connections open for that. It ends with the test.
func echoServer(t testing.TB) string {
	ln := listenTCP(t)
	serveEcho(t, ln)
	return ln.Addr().String()
}

func serveEcho(t testing.TB, ln net.Listener) {
	var wg sync.WaitGroup
	var mu sync.Mutex // guards conns
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() {
				io.Copy(c, c)
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

// exchange connects, sends a text and a MiB, ends its half and wants all of it back.
func exchange(t testing.TB, addr, text string) {
	t.Helper()
	c := dial(t, addr)
	defer c.Close()
	exchangeOn(t, c, text)
}

func exchangeOn(t testing.TB, c net.Conn, text string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	all := append([]byte(text), bytes.Repeat([]byte("0123456789abcdef"), 1<<16)...)
	var writer sync.WaitGroup
	defer writer.Wait()
	writer.Go(func() {
		c.Write(all)
		c.(interface{ CloseWrite() error }).CloseWrite()
	})
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, all) {
		t.Errorf("%s: %d bytes of %d came back, error %v", text, len(got), len(all), err)
		c.Close()
	}
}

// dial connects as soon as somebody listens.
func dial(t testing.TB, addr string) net.Conn {
	t.Helper()
	network := "tcp"
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	var c net.Conn
	eventually(t, "somebody listens at "+addr, func() bool {
		var err error
		c, err = net.Dial(network, addr)
		return err == nil
	})
	return c
}

func TestLocalForward(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		port := freePort(t)
		p := w.sshStart("-N", "-L", fmt.Sprintf("127.0.0.1:%d:%s", port, echoServer(t)), "box")
		exchange(t, loopback(port), "one")
		exchange(t, loopback(port), "two")
		want(t, w.ssh("box", "echo beside"), 0, "beside\n")
		p.signal(syscall.SIGTERM)
		p.wait(patience)
		w.connections(1)
	})
}

// A destination that nobody listens at is this connection's failure and no more.
func TestLocalForwardToNobody(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		port, nobody := freePort(t), freePort(t)
		p := w.sshStart("-L", fmt.Sprintf("127.0.0.1:%d:%s", port, loopback(nobody)), "box", "cat")
		p.echo("before")
		c := dial(t, loopback(port))
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
			t.Errorf("read %d bytes, %v", n, err)
		}
		p.expectErr("open failed: connect failed: Connection refused")
		p.echo("after")
		p.release()
	})
}

func TestRemoteForward(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		port := freePort(t)
		p := w.sshStart("-N", "-R", fmt.Sprintf("127.0.0.1:%d:%s", port, echoServer(t)), "box")
		exchange(t, loopback(port), "one")
		exchange(t, loopback(port), "two")
		p.signal(syscall.SIGTERM)
		p.wait(patience)
		bindable(t, port)
	})
}

// bindable waits until nobody listens on the port.
func bindable(t testing.TB, port int) {
	t.Helper()
	eventually(t, fmt.Sprintf("port %d is free again", port), func() bool {
		ln, err := net.Listen("tcp", loopback(port))
		if err != nil {
			return false
		}
		ln.Close()
		return true
	})
}

func TestRemoteForwardOnAnyPortSaysWhich(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		echo := echoServer(t)
		var owners []*proc
		for i := range 3 {
			p := w.sshStart("-N", "-R", "127.0.0.1:0:"+echo, "box")
			p.expectErr("Allocated port ")
			port := p.expectErr(" for remote forward to " + echo)
			exchange(t, "127.0.0.1:"+port, fmt.Sprint("owner ", i))
			owners = append(owners, p)
		}
		for _, p := range owners {
			p.signal(syscall.SIGTERM)
			p.wait(patience)
		}
		w.connections(1)
	})
}

func TestDynamicForward(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		port, echo := freePort(t), echoServer(t)
		p := w.sshStart("-N", "-D", loopback(port), "box")
		for _, text := range []string{"one", "two"} {
			c := dial(t, loopback(port))
			socks5(t, c, echo)
			exchangeOn(t, c, text)
			c.Close()
		}
		p.signal(syscall.SIGTERM)
		p.wait(patience)
	})
}

// socks5 asks for a connection to an IPv4 address, RFC 1928.
func socks5(t testing.TB, c net.Conn, addr string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	if err := socks5Connect(c, addr); err != nil {
		t.Fatal(err)
	}
}

// socks5Connect does, until c's deadline.
func socks5Connect(c net.Conn, addr string) error {
	to, err := net.ResolveTCPAddr("tcp4", addr)
	if err != nil {
		return err
	}
	request := append([]byte{5, 1, 0, 5, 1, 0, 1}, to.IP.To4()...)
	c.Write(binary.BigEndian.AppendUint16(request, uint16(to.Port)))
	reply := make([]byte, 2+10)
	if _, err := io.ReadFull(c, reply); err != nil || reply[1] != 0 || reply[3] != 0 {
		return fmt.Errorf("SOCKS reply % x, %v", reply, err)
	}
	return nil
}

func TestStdioForward(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		in, inSum := random(4 << 20)
		r := w.sshIn(in, "-W", echoServer(t), "box")
		if r.status != 0 || sum(r.out) != inSum {
			t.Errorf("status %d, %d bytes came back, the same: %v, stderr %q", r.status, len(r.out), sum(r.out) == inSum, r.err)
		}
	})
}

func TestUnixSocketForwardsBothWays(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		far, near, back := w.path("far.sock"), w.path("near.sock"), w.path("back.sock")
		ln, err := net.Listen("unix", far)
		if err != nil {
			t.Fatal(err)
		}
		serveEcho(t, ln)
		p := w.sshStart("-N", "-L", near+":"+far, "-R", back+":"+far, "box")
		exchange(t, near, "local")
		exchange(t, back, "remote")
		p.signal(syscall.SIGTERM)
		p.wait(patience)
	})
}

// A socket file at the server that somebody else's forward owns is not taken over.
func TestTwoClientsWithTheSameRemoteSocket(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		far, back := w.path("far.sock"), w.path("back.sock")
		ln, err := net.Listen("unix", far)
		if err != nil {
			t.Fatal(err)
		}
		serveEcho(t, ln)
		owner := w.sshStart("-N", "-R", back+":"+far, "box")
		exchange(t, back, "owner")
		r := w.ssh("-o", "ExitOnForwardFailure=yes", "-R", back+":"+far, "box", "true")
		if r.status != 255 {
			t.Errorf("the second owner of one socket ended with %d: %s", r.status, r.err)
		}
		exchange(t, back, "owner still")
		owner.signal(syscall.SIGTERM)
		owner.wait(patience)
	})
}

func TestRefusedRemoteForwardEndsWith255EveryTime(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		taken := listenTCP(t)
		defer taken.Close()
		beside := w.hold()
		// On a slow link an answer that overtakes another shows.
		w.link.slow(5 * time.Millisecond)
		for i := range 10 {
			r := w.ssh("-o", "ExitOnForwardFailure=yes", "-R", taken.Addr().String()+":127.0.0.1:1", "box", "echo ran")
			if r.status != 255 || r.out != "" || !strings.Contains(r.err, "remote port forwarding failed") {
				t.Errorf("run %d: status %d, stdout %q, stderr %q", i, r.status, r.out, r.err)
			}
		}
		beside.echo("still here")
		beside.release()
		w.connections(1)
	})
}

func TestARemotePortBelongsToOneClientUntilItEnds(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		port, echo := freePort(t), echoServer(t)
		forward := fmt.Sprintf("127.0.0.1:%d:%s", port, echo)
		stays := w.hold() // so that the connection, whose end would free the port, outlives the owner
		owner := w.sshStart("-N", "-R", forward, "box")
		exchange(t, loopback(port), "first owner")
		r := w.ssh("-o", "ExitOnForwardFailure=yes", "-R", forward, "box", "true")
		if r.status != 255 || !strings.Contains(r.err, "remote port forwarding failed") {
			t.Errorf("the second owner of one port ended with %d: %s", r.status, r.err)
		}
		exchange(t, loopback(port), "first owner still")
		owner.signal(syscall.SIGKILL)
		owner.wait(patience)
		bindable(t, port)
		second := w.sshStart("-o", "ExitOnForwardFailure=yes", "-R", forward, "box", "cat")
		second.echo("listening")
		exchange(t, loopback(port), "second owner")
		second.release()
		bindable(t, port)
		stays.echo("still here")
		stays.release()
		w.connections(1)
	})
}

// A channel that is open when its client is killed ends at the far side, too.
func TestAKilledOwnersConnectionsEnd(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		port, echo := freePort(t), echoServer(t)
		stays := w.hold()
		owner := w.sshStart("-N", "-R", fmt.Sprintf("127.0.0.1:%d:%s", port, echo), "box")
		c := dial(t, loopback(port))
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		c.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		owner.signal(syscall.SIGKILL)
		owner.wait(patience)
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
			t.Errorf("read %d bytes, %v", n, err)
		}
		stays.echo("still here")
		stays.release()
	})
}

func TestBackgroundForwardStaysAfterSSHReturns(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		port := freePort(t)
		r := w.ssh("-f", "-N", "-o", "ExitOnForwardFailure=yes", "-L", fmt.Sprintf("127.0.0.1:%d:%s", port, echoServer(t)), "box")
		if r.status != 0 {
			t.Fatalf("status %d: %s", r.status, r.err)
		}
		exchange(t, loopback(port), "behind")
		var left []int
		for pid, args := range processes() {
			if args[0] == "ssh" && strings.Contains(strings.Join(args, " "), w.conf) {
				left = append(left, pid)
			}
		}
		if len(left) != 1 {
			t.Fatalf("%d ssh in the background", len(left))
		}
		kill9(left[0])
		bindable(t, port)
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
	})
}

// Many short connections through one client: none is lost, none is mixed up with another.
func TestManyForwardedConnectionsAtOnce(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		port := freePort(t)
		p := w.sshStart("-N", "-L", fmt.Sprintf("127.0.0.1:%d:%s", port, echoServer(t)), "box")
		dial(t, loopback(port)).Close()
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() {
				c, err := net.Dial("tcp", loopback(port))
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				exchangeOn(t, c, fmt.Sprint("number ", i))
			})
		}
		all.Wait()
		p.signal(syscall.SIGTERM)
		p.wait(patience)
	})
}
