//go:build linux

package e2e

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
)

// otherServer is an SSH server that is not OpenSSH's.
type otherServer struct {
	name string
	// start starts it for the world's key and user and returns its address and host key.
	start func(w *world) (string, ssh.PublicKey)
	// single: it has one session for each connection.
	single bool
	// forwards: it opens direct-tcpip.
	forwards bool
}

var otherServers = []otherServer{
	{name: "dropbear", start: startDropbear, forwards: true},
	{name: "tinysshd", start: startTinySSH, single: true},
	{name: "x/crypto", start: startShellServer, forwards: true},
}

func TestOtherServers(t *testing.T) {
	for _, s := range otherServers {
		t.Run(s.name, func(t *testing.T) {
			forEach(t, func(t *testing.T, w *world) {
				addr, key := s.start(w)
				w.link.lead(addr)
				w.write("known_hosts", fmt.Sprintf("[127.0.0.1]:%d %s", w.link.port(), ssh.MarshalAuthorizedKey(key)))

				holder := w.hold()
				if s.single {
					want(t, w.ssh("box", "echo on another connection"), 0, "on another connection\n")
					holder.echo("still here")
					holder.release()
				}
				for _, status := range []int{0, 7, 255} {
					r := w.ssh("box", fmt.Sprintf("echo out; echo err >&2; exit %d", status))
					want(t, r, status, "out\n")
					if r.err != "err\n" {
						t.Errorf("stderr is %q", r.err)
					}
				}

				const size = 4 << 20
				data := make([]byte, size)
				if _, err := rand.Read(data); err != nil {
					t.Fatal(err)
				}
				file := w.path("copy")
				want(t, w.sshIn(bytes.NewReader(data), "box", "cat >"+file), 0, "")
				if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, data) {
					t.Errorf("up: %d bytes are not the %d that were sent (%v)", len(got), size, err)
				}
				if r := w.ssh("box", "cat "+file); r.status != 0 || r.out != string(data) {
					t.Errorf("down: status %d, %d bytes are not the %d that were sent: %s", r.status, len(r.out), size, tail(r.err))
				}
				if r := w.sshIn(bytes.NewReader(data), "box", "cat"); r.status != 0 || r.out != string(data) {
					t.Errorf("both ways: status %d, %d bytes are not the %d that were sent: %s", r.status, len(r.out), size, tail(r.err))
				}

				if s.forwards {
					// What -L leads to is the sshd itself: it speaks first.
					port := freePort(t)
					p := w.sshStart("-o", "ExitOnForwardFailure=yes", "-L", fmt.Sprintf("127.0.0.1:%d:127.0.0.1:%d", port, w.sshd), "box", "cat")
					p.echo("forwarding")
					if !speaksSSH(loopback(port)) {
						t.Error("nobody answers through -L")
					}
					p.release()
				}
				if !s.single {
					holder.echo("still here")
					holder.release()
					w.connections(1)
				}
			})
		})
	}
}

// wrapHome returns an environment in which the user's home, as getpwnam(3) has it, is another folder, with the world's key in
// it: dropbear and tinysshd look nowhere else.
func (w *world) wrapHome(home string) []string {
	t := w.t
	t.Helper()
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	g, err := user.LookupGroupId(u.Gid)
	if err != nil {
		t.Fatal(err)
	}
	keys := filepath.Join(home, ".ssh/authorized_keys")
	if err := os.MkdirAll(filepath.Dir(keys), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(keys, []byte(w.read("authorized_keys")), 0o600); err != nil {
		t.Fatal(err)
	}
	passwd := w.write("passwd", fmt.Sprintf("%s:x:%s:%s::%s:/bin/sh\n", u.Username, u.Uid, u.Gid, home))
	group := w.write("group", fmt.Sprintf("%s:x:%s:\n", g.Name, u.Gid))
	return append([]string{"LD_PRELOAD=libnss_wrapper.so", "NSS_WRAPPER_PASSWD=" + passwd, "NSS_WRAPPER_GROUP=" + group}, w.env...)
}

func startDropbear(w *world) (string, ssh.PublicKey) {
	t := w.t
	t.Helper()
	file := w.path("dropbear_key")
	made := w.run(spec{args: []string{"dropbearkey", "-t", "ed25519", "-f", file}, null: true})
	var key ssh.PublicKey
	for line := range strings.Lines(made.out) {
		if k, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line)); err == nil {
			key = k
		}
	}
	if key == nil {
		t.Fatalf("dropbearkey: status %d: %s%s", made.status, made.out, made.err)
	}
	for range 20 {
		addr := loopback(freePort(t))
		// In the foreground, errors on stderr, no passwords.
		p := w.start(spec{args: []string{"dropbear", "-F", "-E", "-s", "-r", file, "-p", addr, "-P", w.path("dropbear.pid")},
			env: w.wrapHome(w.path("home")), null: true})
		up := false
		within(patience, func() bool {
			select {
			case <-p.done:
				return true
			default:
				up = speaksSSH(addr)
				return up
			}
		})
		if up {
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("dropbear's log:\n%s", tail(p.err.String()))
				}
			})
			return addr, key
		}
		t.Logf("dropbear: %s", p.err.String()) // somebody took the port
	}
	t.Fatal("dropbear does not start")
	return "", nil
}

// startTinySSH runs tinysshd as inetd would: one for each connection.
func startTinySSH(w *world) (string, ssh.PublicKey) {
	t := w.t
	t.Helper()
	dir := w.path("tinyssh")
	if made := w.run(spec{args: []string{"tinysshd-makekey", dir}, null: true}); made.status != 0 {
		t.Fatalf("tinysshd-makekey: status %d: %s%s", made.status, made.out, made.err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "ed25519.pk"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Name string
		Key  []byte
	}{ssh.KeyAlgoED25519, raw}))
	if err != nil {
		t.Fatal(err)
	}
	// It insists that nobody else may write to any folder above the keys. In /tmp everybody may.
	cache, err := os.UserCacheDir()
	if err == nil {
		err = os.MkdirAll(cache, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	home, err := os.MkdirTemp(cache, "mx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	env := w.wrapHome(home)
	log := newBuffer()
	ln := serveEach(t, func(c net.Conn) {
		f, err := c.(*net.TCPConn).File()
		if err != nil {
			return
		}
		defer f.Close()
		c.Close()
		cmd := exec.Command("tinysshd", "-v", dir)
		cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, f, f, log
		cmd.Run()
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("tinysshd's log:\n%s", tail(log.String()))
		}
	})
	return ln.Addr().String(), key
}

// serveEach listens and serves each connection by a goroutine, until the test ends: then all of them are closed and waited for.
func serveEach(t testing.TB, serve func(net.Conn)) net.Listener {
	t.Helper()
	ln := listenTCP(t)
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
				defer c.Close()
				serve(c)
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
	return ln
}

// startShellServer runs x/crypto's server with a shell behind it, for the world's key.
func startShellServer(w *world) (string, ssh.PublicKey) {
	t := w.t
	t.Helper()
	allowed, _, _, _, err := ssh.ParseAuthorizedKey([]byte(w.read("authorized_keys")))
	if err != nil {
		t.Fatal(err)
	}
	return shellServer(t, &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if !bytes.Equal(key.Marshal(), allowed.Marshal()) {
				return nil, errors.New("unknown key")
			}
			return nil, nil
		},
	})
}

// shellServer runs x/crypto's server: sessions run commands by sh, direct-tcpip is connected.
func shellServer(t testing.TB, config *ssh.ServerConfig) (string, ssh.PublicKey) {
	t.Helper()
	signer, err := ssh.ParsePrivateKey(hostKeys[0].private)
	if err != nil {
		t.Fatal(err)
	}
	config.AddHostKey(signer)
	ln := serveEach(t, func(c net.Conn) {
		conn, channels, requests, err := ssh.NewServerConn(c, config)
		if err != nil {
			return
		}
		defer conn.Close()
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() { ssh.DiscardRequests(requests) })
		for nc := range channels {
			wg.Go(func() { shellChannel(nc) })
		}
	})
	return ln.Addr().String(), signer.PublicKey()
}

func shellChannel(nc ssh.NewChannel) {
	switch nc.ChannelType() {
	case "session":
		ch, requests, err := nc.Accept()
		if err == nil {
			runShell(ch, requests)
		}
	case "direct-tcpip":
		var d struct {
			Host       string
			Port       uint32
			Origin     string
			OriginPort uint32
		}
		if err := ssh.Unmarshal(nc.ExtraData(), &d); err != nil {
			nc.Reject(ssh.ConnectionFailed, err.Error())
			return
		}
		far, err := net.Dial("tcp", net.JoinHostPort(d.Host, fmt.Sprint(d.Port)))
		if err != nil {
			nc.Reject(ssh.ConnectionFailed, err.Error())
			return
		}
		defer far.Close()
		ch, requests, err := nc.Accept()
		if err != nil {
			return
		}
		var wg sync.WaitGroup
		wg.Go(func() { ssh.DiscardRequests(requests) })
		wg.Go(func() {
			io.Copy(far, ch)
			far.(*net.TCPConn).CloseWrite()
		})
		io.Copy(ch, far)
		ch.Close()
		wg.Wait()
	default:
		nc.Reject(ssh.UnknownChannelType, "sessions and direct-tcpip only")
	}
}

// runShell runs the session's one command and closes the session.
func runShell(ch ssh.Channel, requests <-chan *ssh.Request) {
	var running sync.WaitGroup
	started := false
	for r := range requests {
		var exec struct{ Command string }
		if r.Type != "exec" || started || ssh.Unmarshal(r.Payload, &exec) != nil {
			r.Reply(r.Type == "env", nil)
			continue
		}
		started = true
		r.Reply(true, nil)
		running.Go(func() { shell(ch, exec.Command) })
	}
	ch.Close()
	running.Wait()
}

func shell(ch ssh.Channel, command string) {
	defer ch.Close()
	cmd := exec.Command("/bin/sh", "-c", command)
	in, err := cmd.StdinPipe()
	if err != nil {
		return
	}
	cmd.Stdout, cmd.Stderr = ch, ch.Stderr()
	var status struct{ Status uint32 }
	if err := cmd.Start(); err != nil {
		status.Status = 127
	} else {
		go func() { // ends when the channel is closed below, or by its EOF
			io.Copy(in, ch)
			in.Close()
		}()
		cmd.Wait()
		status.Status = uint32(cmd.ProcessState.ExitCode())
	}
	ch.CloseWrite()
	ch.SendRequest("exit-status", false, ssh.Marshal(status))
}
