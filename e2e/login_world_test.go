//go:build linux

package e2e

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// sshdAlso starts one more sshd in this world, beside its own, and returns its port. The lines come before what every
// sshd here has, so the first value counts; without a HostKey among them it shows all of the world's keys. It ends with
// the test.
func (w *world) sshdAlso(address string, lines ...string) int {
	t := w.t
	t.Helper()
	text := strings.Join(lines, "\n") + "\n"
	if !strings.Contains(text, "HostKey ") {
		for _, k := range hostKeys {
			text += "HostKey " + w.path("host_"+k.kind) + "\n"
		}
	}
	for range 20 {
		port := freePort(t)
		log := w.path(fmt.Sprintf("sshd-%d.log", port))
		conf := w.write(fmt.Sprintf("sshd_config-%d", port), fmt.Sprintf(`Port %d
ListenAddress %s
%s
AuthorizedKeysFile %s
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 200
UseDNS no
PrintMotd no
LogLevel VERBOSE
Subsystem sftp internal-sftp
%s
`, port, address, text, w.path("authorized_keys"), strings.Join(sshdExtra, "\n")))
		cmd := exec.Command(sshdPath, "-D", "-e", "-f", conf, "-E", log)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		ready := within(patience, func() bool {
			select {
			case <-ended:
				return true
			default:
				return speaksSSH(net.JoinHostPort(address, strconv.Itoa(port)))
			}
		})
		said, _ := os.ReadFile(log)
		select {
		case <-ended:
			if strings.Contains(string(said), "Bad configuration") {
				t.Fatalf("sshd says: %s", said)
			}
			continue // somebody took the port
		default:
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			<-ended
			if t.Failed() {
				b, _ := os.ReadFile(log)
				t.Logf("log of sshd at port %d:\n%s", port, tail(string(b)))
			}
		})
		if !ready {
			t.Fatalf("sshd does not answer:\n%s", said)
		}
		return port
	}
	t.Fatal("sshd does not start")
	return 0
}

// newKey puts an Ed25519 key into the world's folder, its public half beside it, and returns the signer and the public
// half's line.
func (w *world) newKey(name string) (ssh.Signer, string) {
	w.t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	private, public, err := marshalKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	line := string(ssh.MarshalAuthorizedKey(public))
	w.write(name, string(private))
	w.write(name+".pub", line)
	return signer, line
}

// allow adds a line to what every sshd of this world takes as authorized_keys.
func (w *world) allow(line string) { w.append("authorized_keys", line) }

func (w *world) append(name, text string) {
	w.t.Helper()
	f, err := os.OpenFile(w.path(name), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = f.WriteString(text)
		if e := f.Close(); err == nil {
			err = e
		}
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// publicKey is the public half of a kind of host key, as known_hosts and authorized_keys have it.
func publicKey(kind string) string {
	for _, k := range hostKeys {
		if k.kind == kind {
			return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k.public)))
		}
	}
	panic("no host key of kind " + kind)
}

// tool runs a program that has to succeed, in the world's folder, and returns its output.
func (w *world) tool(args ...string) string {
	w.t.Helper()
	r := w.run(spec{args: args, null: true})
	if r.status != 0 {
		w.t.Fatalf("%q: status %d: %s%s", args, r.status, r.out, r.err)
	}
	return r.out
}

// agentWith starts an ssh-agent with these private keys and returns its socket. It ends with the test.
func (w *world) agentWith(name string, keys ...string) string {
	t := w.t
	t.Helper()
	socket := w.path(name)
	cmd := exec.Command("ssh-agent", "-D", "-a", socket)
	cmd.Env = w.env
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	eventually(t, "ssh-agent listens", func() bool { return listens(socket) })
	for _, k := range keys {
		w.run(spec{args: []string{"ssh-add", "-q", w.path(k)}, env: append([]string{"SSH_AUTH_SOCK=" + socket}, w.env...), null: true})
	}
	return socket
}

// ways are an ssh_config with muxproxy and the same one without.
type ways struct{ mux, plain string }

// both writes two files that hold the same lines, which name any host, except for what muxproxy needs. Lines in base
// whose keyword is among the lines are left out: keywords like IdentityFile would add up. In the lines, {global} stands
// for what has to be first in a GlobalKnownHostsFile.
func (w *world) both(name, lines, base string) ways {
	w.t.Helper()
	set := map[string]bool{}
	for line := range strings.Lines(lines) {
		if f := strings.Fields(line); len(f) > 0 {
			set[strings.ToLower(f[0])] = true
		}
	}
	var kept strings.Builder
	for line := range strings.Lines(base) {
		if f := strings.Fields(line); len(f) > 0 && !set[strings.ToLower(f[0])] {
			kept.WriteString("    " + strings.TrimSpace(line) + "\n")
		}
	}
	write := func(way, first, global string) string {
		text := strings.NewReplacer("{global}", global, "{way}", way).Replace(lines)
		return w.write(name+"."+way, first+text+"\nMatch all\n"+kept.String())
	}
	own := w.path(w.state + "/muxproxy/known_hosts")
	var first string
	switch w.mode {
	case pipes:
		first = fmt.Sprintf("ProxyCommand %s/muxproxy '%%r@%%h:%%p' '%%n'\n", binDir)
	case fdpass:
		first = fmt.Sprintf("ProxyCommand %s/muxproxy --fdpass '%%r@%%h:%%p' '%%n'\nProxyUseFdpass yes\n", binDir)
	}
	if !set["globalknownhostsfile"] {
		first += "GlobalKnownHostsFile " + own + "\n"
	}
	plainFirst := ""
	if !set["globalknownhostsfile"] {
		plainFirst = "GlobalKnownHostsFile /dev/null\n"
	}
	return ways{write("mux", first, own), write("plain", plainFirst, "")}
}

// base are lines that lead to the sshd at this port of 127.0.0.1 and let nobody be asked.
func (w *world) base(port int) string {
	return fmt.Sprintf(`HostName 127.0.0.1
Port %d
User %s
IdentityFile %s
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile %s
BatchMode yes
`, port, me, w.path("id"), w.path("known_hosts"))
}

// each runs ssh with the same arguments both ways, or only without muxproxy where that is not under test.
func (w *world) each(c ways, env []string, args ...string) (mux, plain result) {
	w.t.Helper()
	run := func(conf string) *proc {
		return w.start(spec{args: append([]string{"ssh", "-F", conf}, args...), env: append(env[:len(env):len(env)], w.env...), null: true})
	}
	without := run(c.plain)
	if plainMode {
		plain = without.wait(2 * patience)
		return plain, plain
	}
	mux = run(c.mux).wait(2 * patience)
	return mux, without.wait(2 * patience)
}

// same checks that both ways ended as they should; where they fail, muxproxy says why in one line.
func same(t testing.TB, mux, plain result, status int, stdout string) {
	t.Helper()
	want(t, plain, status, stdout)
	want(t, mux, status, stdout)
	if t.Failed() {
		t.Logf("plain ssh said %q", tail(plain.err))
	}
	if status == 255 && !plainMode {
		oneLine(t, mux)
	}
}

// oneLine checks that a client that was not let in got one line from muxproxy, and returns it.
func oneLine(t testing.TB, r result) string {
	t.Helper()
	var ours []string
	for line := range strings.Lines(r.err + r.out) {
		if strings.HasPrefix(line, "muxproxy: ") {
			ours = append(ours, strings.TrimSpace(line))
		}
	}
	if len(ours) != 1 {
		t.Errorf("not one line of muxproxy but %d in %q", len(ours), tail(r.err+r.out))
		return strings.Join(ours, "\n")
	}
	return ours[0]
}

// lateServer hands connections on to an address after a while each. It ends with the test.
func lateServer(t testing.TB, to string, after time.Duration) int {
	t.Helper()
	front := newLink(t, to)
	front.slow(0)
	ln := listenTCP(t)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			time.AfterFunc(after, func() { // the lateness itself
				far, err := net.Dial("tcp", loopback(front.port()))
				if err != nil {
					c.Close()
					return
				}
				splice(c, far)
			})
		}
	}()
	t.Cleanup(func() { ln.Close(); <-ended })
	return ln.Addr().(*net.TCPAddr).Port
}

// splice copies both ways in the background until one side ends.
func splice(a, b net.Conn) {
	copyAndClose := func(dst, src net.Conn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			if n > 0 {
				if _, werr := dst.Write(buf[:n]); werr != nil {
					err = werr
				}
			}
			if err != nil {
				a.Close()
				b.Close()
				return
			}
		}
	}
	go copyAndClose(a, b)
	go copyAndClose(b, a)
}

// script puts an executable file into the world's folder.
func (w *world) script(name, text string) string {
	w.t.Helper()
	path := w.path(name)
	if err := writeProgram(path, []byte(text)); err != nil {
		w.t.Fatal(err)
	}
	return filepath.Clean(path)
}

// door is an SSH server whose ways in are the test's own. It shows the host keys of every sshd here. A command "hold"
// lasts until its stdin ends; any other says who has come in.
type door struct {
	ln net.Listener
	wg sync.WaitGroup
	// sessions is how many one connection may have at a time, set before the first comes; 0: any number.
	sessions int64

	mu    sync.Mutex // guards conns
	conns []net.Conn
}

// newDoor starts one with this configuration, whose host keys are known in the world. It ends with the test.
func (w *world) newDoor(config *ssh.ServerConfig) *door {
	t := w.t
	t.Helper()
	d := &door{ln: listenTCP(t)}
	for _, k := range hostKeys {
		signer, err := ssh.ParsePrivateKey(k.private)
		if err != nil {
			t.Fatal(err)
		}
		config.AddHostKey(signer)
	}
	w.append("known_hosts", knownHosts(d.port()))
	d.wg.Go(func() {
		for {
			c, err := d.ln.Accept()
			if err != nil {
				return
			}
			d.mu.Lock()
			d.conns = append(d.conns, c)
			d.mu.Unlock()
			d.wg.Go(func() { d.serve(c, config) })
		}
	})
	t.Cleanup(func() {
		d.ln.Close()
		d.mu.Lock()
		for _, c := range d.conns {
			c.Close()
		}
		d.mu.Unlock()
		d.wg.Wait()
	})
	return d
}

func (d *door) port() int { return d.ln.Addr().(*net.TCPAddr).Port }

// count is how many TCP connections were accepted so far.
func (d *door) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.conns)
}

func (d *door) serve(c net.Conn, config *ssh.ServerConfig) {
	defer c.Close()
	conn, channels, requests, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	defer conn.Close()
	d.wg.Go(func() { ssh.DiscardRequests(requests) })
	var open atomic.Int64
	for ch := range channels {
		if ch.ChannelType() != "session" {
			ch.Reject(ssh.UnknownChannelType, "sessions only")
			continue
		}
		if open.Add(1) > d.sessions && d.sessions > 0 {
			open.Add(-1)
			ch.Reject(ssh.ConnectionFailed, "open failed")
			continue
		}
		channel, requests, err := ch.Accept()
		if err != nil {
			return
		}
		d.wg.Go(func() {
			defer open.Add(-1)
			for r := range requests {
				r.Reply(r.Type == "exec" || r.Type == "env", nil)
				if r.Type != "exec" {
					continue
				}
				d.wg.Go(func() {
					var exec struct{ Command string }
					if ssh.Unmarshal(r.Payload, &exec) == nil && exec.Command == "hold" {
						fmt.Fprintln(channel, "held")
						io.Copy(io.Discard, channel)
					} else {
						fmt.Fprintf(channel, "in as %s\n", conn.User())
					}
					channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{0}))
					channel.Close()
				})
			}
		})
	}
}

// passwordDoor is a door for this password. asked counts how often one was tried.
func (w *world) passwordDoor(password string) (d *door, asked *atomic.Int32) {
	asked = new(atomic.Int32)
	return w.newDoor(&ssh.ServerConfig{
		PasswordCallback: func(_ ssh.ConnMetadata, p []byte) (*ssh.Permissions, error) {
			asked.Add(1)
			if string(p) != password {
				return nil, errors.New("wrong")
			}
			return nil, nil
		},
	}), asked
}

// interactive writes an ssh_config for this mode that leads to a port and may ask the person.
func (w *world) interactive(name string, port int, lines string) string {
	w.t.Helper()
	files := w.both(name, lines+"\nBatchMode no\n", w.base(port))
	if w.mode == plain {
		return files.plain
	}
	return files.mux
}

// tty starts ssh on a terminal of its own.
func (w *world) tty(conf string, args ...string) *proc {
	w.t.Helper()
	return w.start(spec{args: append([]string{"ssh", "-F", conf}, args...), tty: true})
}

// noTTY starts ssh without any terminal, not even the one that the tests run at.
func (w *world) noTTY(conf string, args ...string) *proc {
	w.t.Helper()
	return w.start(spec{args: append([]string{"setsid", "ssh", "-F", conf}, args...), null: true})
}

// answer waits for a prompt on the terminal and types an answer. It returns what was shown before the prompt.
func (p *proc) answer(prompt, answer string) string {
	p.t.Helper()
	before := p.expect(prompt)
	p.send(answer + "\n")
	return before
}

// ended checks how an ssh on a terminal ended, and that its output has what it should.
func (p *proc) ended(status int, shows string) result {
	p.t.Helper()
	r := p.wait(patience)
	if r.status != status || !strings.Contains(r.out, shows) {
		p.t.Errorf("%q: status %d (want %d), %q in %q", p.cmd.Args, r.status, status, shows, tail(r.out))
	}
	return r
}
