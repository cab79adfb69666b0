//go:build linux

package e2e

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// fails runs an ssh that must end with 255, soon, and with one line of ours that has all of these in it.
func (w *world) fails(t *testing.T, has []string, args ...string) {
	t.Helper()
	r := w.ssh(args...)
	if r.status != 255 || r.out != "" {
		t.Errorf("status %d (want 255), stdout %q, stderr %q", r.status, r.out, r.err)
	}
	if r.took > 15*time.Second {
		t.Errorf("it took %v", r.took)
	}
	if w.mode == plain {
		return
	}
	lines := muxLines(r.err)
	if len(lines) != 1 {
		t.Fatalf("%d lines of ours, not 1, in stderr %q", len(lines), r.err)
	}
	for _, h := range has {
		if !strings.Contains(lines[0], h) {
			t.Errorf("%q does not name %q", lines[0], h)
		}
	}
	t.Log(lines[0])
}

func TestUnreachableHostsAreOneLineAnd255(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		closed, silent, full := freePort(t), silentPort(t), fullPort(t)
		// More than 63 bytes in one label: no resolver has to ask the network about it.
		unknown := strings.Repeat("x", 64) + ".invalid"
		for _, c := range []struct {
			name string
			args []string
			has  []string
		}{
			{"refused", []string{"-p", fmt.Sprint(closed)}, []string{fmt.Sprint("127.0.0.1:", closed), "refused"}},
			{"unknown name", []string{"-o", "HostName=" + unknown}, []string{unknown}},
			{"no identification string", []string{"-p", fmt.Sprint(silent), "-o", "ConnectTimeout=2"}, []string{fmt.Sprint("127.0.0.1:", silent)}},
			{"no TCP connection", []string{"-p", fmt.Sprint(full), "-o", "ConnectTimeout=2"}, []string{fmt.Sprint("127.0.0.1:", full)}},
		} {
			t.Run(c.name, func(t *testing.T) {
				w.fails(t, c.has, append(c.args, "box", "true")...)
			})
		}
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
	})
}

// silentPort accepts connections, by way of the kernel, and never says anything.
func silentPort(t testing.TB) int {
	ln := listenTCP(t)
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().(*net.TCPAddr).Port
}

// fullPort is a port whose queue is full, so that the kernel drops what wants to connect (listen(2), tcp(7)).
func fullPort(t testing.TB) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	port := freePort(t)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for range 8 {
		c, err := net.DialTimeout("tcp", loopback(port), 300*time.Millisecond)
		if err != nil {
			return port
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("a queue of length 0 does not fill up")
	return 0
}

func TestRefusedTrustIsOneLineAnd255(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		good := w.read("known_hosts")
		_, other, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		_, wrong, err := marshalKey(other)
		if err != nil {
			t.Fatal(err)
		}
		host := loopback(w.link.port())
		for _, c := range []struct {
			name, known string
			args        []string
			has         []string
		}{
			{"changed host key", fmt.Sprintf("[127.0.0.1]:%d %s", w.link.port(), ssh.MarshalAuthorizedKey(wrong)), nil,
				[]string{"127.0.0.1", w.path("known_hosts")}},
			{"unknown host key, nobody to ask", "", nil, []string{"127.0.0.1"}},
			{"unknown host key, strict", "", []string{"-o", "StrictHostKeyChecking=yes"}, []string{"127.0.0.1"}},
			{"revoked host key", good + "@revoked * " + string(ssh.MarshalAuthorizedKey(hostKeys[0].public)) +
				"@revoked * " + string(ssh.MarshalAuthorizedKey(hostKeys[1].public)) +
				"@revoked * " + string(ssh.MarshalAuthorizedKey(hostKeys[2].public)), nil, []string{"127.0.0.1"}},
		} {
			t.Run(c.name, func(t *testing.T) {
				w.write("known_hosts", c.known)
				w.fails(t, c.has, append(c.args, "box", "true")...)
			})
		}
		w.write("known_hosts", good)
		t.Run("key rejected", func(t *testing.T) {
			authorized := w.read("authorized_keys")
			w.write("authorized_keys", "")
			w.fails(t, []string{host}, "box", "true")
			w.write("authorized_keys", authorized)
		})
		// No failure is remembered.
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
	})
}

func TestAMasterThatCannotStartIsOneLineAnd255(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	cases := []struct {
		name   string
		change option
		has    []string
	}{
		{"a file where the state directory goes", func(s *setup) {
			s.env["XDG_STATE_HOME"] = filepath.Join(s.dir, "file")
			if err := os.WriteFile(filepath.Join(s.dir, "file"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"file"}},
		{"a state directory that is open to others", func(s *setup) {
			loose := filepath.Join(s.dir, "loose/muxproxy")
			s.env["XDG_STATE_HOME"] = filepath.Dir(loose)
			if err := os.MkdirAll(loose, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(loose, 0o755); err != nil { // whatever the umask
				t.Fatal(err)
			}
		}, []string{"loose/muxproxy", "0755"}},
		{"muxproxyd is missing", func(s *setup) {
			s.bin = filepath.Join(s.dir, "bin")
			program, err := os.ReadFile(binDir + "/muxproxy")
			if err == nil {
				err = os.Mkdir(s.bin, 0o755)
			}
			if err == nil {
				err = writeProgram(s.bin+"/muxproxy", program)
			}
			if err != nil {
				t.Fatal(err)
			}
		}, []string{"muxproxyd"}},
		{"the log can't be written", func(s *setup) {
			if err := os.MkdirAll(filepath.Join(s.dir, "own/muxproxy/master.log"), 0o700); err != nil {
				t.Fatal(err)
			}
			s.env["XDG_STATE_HOME"] = filepath.Join(s.dir, "own")
		}, []string{"master.log"}},
	}
	if os.Geteuid() != 0 { // root may write anywhere
		cases = append(cases, struct {
			name   string
			change option
			has    []string
		}{"a state directory that can't be written", func(s *setup) {
			s.env["XDG_STATE_HOME"] = filepath.Join(s.dir, "locked")
			if err := os.Mkdir(filepath.Join(s.dir, "locked"), 0o500); err != nil {
				t.Fatal(err)
			}
		}, []string{"locked"}})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			forEach(t, func(t *testing.T, w *world) {
				w.fails(t, c.has, "box", "true")
				// None of this locks anybody out.
				env := append([]string{"MUXPROXY_BYPASS=1"}, w.env...)
				want(t, w.run(spec{args: w.sshArgs("box", "echo past"), env: env, null: true}), 0, "past\n")
			}, c.change)
		})
	}
}
