//go:build linux

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// rekeyTime bounds a copy with many key exchanges in it.
const rekeyTime = 4 * time.Minute

// both is how many bytes go each way at the same time.
const both = 16 << 20

// sumOf hashes what a pipe brings until its other end is closed.
func sumOf(r io.Reader) <-chan string {
	sum := make(chan string, 1)
	go func() {
		h := sha256.New()
		n, err := io.Copy(h, r)
		if err != nil {
			sum <- fmt.Sprintf("%v after %d bytes", err, n)
			return
		}
		sum <- hex.EncodeToString(h.Sum(nil))
	}()
	return sum
}

// OpenSSH starts key exchanges under load in both directions, on either leg or both at once: nothing stops, no byte is lost.
func TestRekeyWithBulkBothWays(t *testing.T) {
	const limit = "RekeyLimit 1M"
	for _, c := range []struct {
		name        string
		sshd, local bool
		big         int64 // bytes each way with E2E_BIG=1
	}{
		{"sshd", true, false, 128 << 20},
		{"ssh", false, true, 128 << 20},
		{"both", true, true, 1 << 30}, // 2 GiB on each of one client's two connections
	} {
		t.Run(c.name, func(t *testing.T) {
			server := []string{"LogLevel DEBUG1"}
			if c.sshd {
				server = append(server, limit)
			}
			forEach(t, func(t *testing.T, w *world) {
				args := []string{"-v"}
				if c.local {
					args = append(args, "-o", limit)
				}
				size := int64(both)
				if bigMode {
					size = c.big
				}
				in, inSum := random(size)
				r, out, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				outSum := sumOf(r)
				p := w.start(spec{args: w.sshArgs(append(args, "box", "cat")...), stdin: in, stdout: out})
				out.Close()
				for range 3 { // channels come and go on the same connection
					want(t, w.ssh("box", "exit 7"), 7, "")
				}
				w.connections(1)
				res := p.wait(rekeyTime)
				if got := <-outSum; res.status != 0 || got != inSum {
					t.Errorf("status %d, the bytes are the same: %v; stderr:\n%s", res.status, got == inSum, tail(res.err))
				}
				// Each side counts the bytes of both directions apart, so one in 2 MiB is what there is at least.
				least := int(size >> 21)
				for _, leg := range []struct {
					name  string
					log   string
					rekey bool
				}{
					{"ssh", res.err, c.local},
					{"sshd", w.read("sshd.log"), c.sshd},
				} {
					n := strings.Count(leg.log, "SSH2_MSG_KEXINIT sent") - 1
					t.Logf("%s: %d key exchanges after the first in %v", leg.name, n, res.took)
					if leg.rekey && n < least || !leg.rekey && w.mode != plain && n > 1 {
						t.Errorf("%s: %d key exchanges after the first", leg.name, n)
					}
				}
			}, func(s *setup) { s.sshd = append(s.sshd, server...) })
		})
	}
}

// stdio is a process as a stream: its stdin and stdout.
type stdio struct {
	net.Conn // its deadlines and addresses: none are asked for
	in       io.WriteCloser
	out      io.ReadCloser
}

func (s *stdio) Read(b []byte) (int, error)  { return s.out.Read(b) }
func (s *stdio) Write(b []byte) (int, error) { return s.in.Write(b) }
func (s *stdio) Close() error {
	s.in.Close()
	return s.out.Close()
}
func (s *stdio) RemoteAddr() net.Addr { return &net.UnixAddr{} }
func (s *stdio) LocalAddr() net.Addr  { return &net.UnixAddr{} }

// A client of x/crypto/ssh starts its own key exchanges, and so may any client that is not OpenSSH.
func TestRekeyOfAnotherClientWithBulkBothWays(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		cmd := exec.Command(binDir+"/muxproxy", "-F", w.conf, fmt.Sprintf("%s@127.0.0.1:%d", me, w.link.port()), "box")
		cmd.Env, cmd.Dir = w.env, w.dir
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
		stuck := time.AfterFunc(rekeyTime, func() { cmd.Process.Kill() })
		defer stuck.Stop()
		exchanges := 0
		c, chans, reqs, err := ssh.NewClientConn(&stdio{in: in, out: out}, "box", &ssh.ClientConfig{
			Config:          ssh.Config{RekeyThreshold: 1 << 20},
			User:            me,
			HostKeyCallback: func(string, net.Addr, ssh.PublicKey) error { exchanges++; return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		client := ssh.NewClient(c, chans, reqs)
		session, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		sent, sum := random(both)
		r, back := io.Pipe()
		got := sumOf(r)
		session.Stdin, session.Stdout = sent, back
		began := time.Now()
		err = session.Run("cat")
		back.Close()
		if sums := <-got; err != nil || sums != sum {
			t.Errorf("%v; the bytes are the same: %v", err, sums == sum)
		}
		took := time.Since(began)
		client.Close()
		client.Wait()
		t.Logf("%d key exchanges in %v", exchanges, took)
		if exchanges < both>>21 {
			t.Errorf("%d key exchanges", exchanges)
		}
	})
}
