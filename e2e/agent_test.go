//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// withAgent is an environment with this agent. ssh has to be told to look there: the world's configuration has none.
func (w *world) withAgent(socket string) []string {
	return append([]string{"SSH_AUTH_SOCK=" + socket}, w.env...)
}

// sshWith starts an ssh whose agent is at this socket, with a pipe on stdin.
func (w *world) sshWith(socket string, args ...string) *proc {
	w.t.Helper()
	return w.start(spec{args: w.sshArgs(append([]string{"-o", "IdentityAgent=SSH_AUTH_SOCK"}, args...)...), env: w.withAgent(socket)})
}

// agents starts n agents with a key each and returns their sockets and what `ssh-add -l` must show.
func (w *world) agents(n int) (sockets, prints []string) {
	for i := range n {
		key := fmt.Sprint("agentkey", i)
		signer, _ := w.newKey(key)
		sockets = append(sockets, w.agentWith(fmt.Sprint("agent", i), key))
		prints = append(prints, ssh.FingerprintSHA256(signer.PublicKey()))
	}
	return sockets, prints
}

// sshd gives a forwarded agent to every session of a connection. Still each client's sessions have its own agent, and those
// that forward none have none.
func TestEachClientForwardsItsOwnAgent(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		sockets, prints := w.agents(2)
		const show = `echo "[$SSH_AUTH_SOCK]"; ssh-add -l; cat`
		// Each stays while the others come, and then each asks its agent again.
		none := w.sshWith(sockets[0], "box", show)
		none.expect("[]\n")
		var with []*proc
		for i, socket := range sockets {
			p := w.sshWith(socket, "-A", "box", "ssh-add -l; read line; ssh-add -l; cat")
			p.expect(prints[i])
			with = append(with, p)
		}
		late := w.sshWith(sockets[1], "box", show)
		late.expect("[]\n")
		again := w.sshWith(sockets[1], "-A", "box", "ssh-add -l; cat")
		again.expect(prints[1])
		for i, p := range with {
			p.send("\n")
			p.expect(prints[i])
		}
		if w.mode != plain {
			lanes := w.mustStatus().lanes()
			if len(lanes["agent"]) != 3 || len(lanes["interactive"]) != 2 || len(lanes) != 2 {
				t.Errorf("lanes %v", lanes)
			}
			w.connections(3)
		}
		// The newest client of an agent leaves: the older one serves it.
		again.release()
		want(t, w.sshWith(sockets[1], "-A", "box", "ssh-add -l | cut -d' ' -f2").wait(patience), 0, prints[1]+"\n")
		for _, p := range append(with, none, late) {
			p.release()
		}
	})
}

// Users of tmux have an agent whose socket moves. What counts is who listens there, not the name.
func TestAnAgentThatMoves(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		sockets, prints := w.agents(3)
		const show = "ssh-add -l | cut -d' ' -f2"
		link := w.path("link")
		if err := os.Symlink(sockets[0], link); err != nil {
			t.Fatal(err)
		}
		stays := w.sshWith(link, "-A", "box", "ssh-add -l; read line; ssh-add -l; cat")
		stays.expect(prints[0])
		// The link leads elsewhere.
		if err := os.Remove(link); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(sockets[1], link); err != nil {
			t.Fatal(err)
		}
		want(t, w.sshWith(link, "-A", "box", show).wait(patience), 0, prints[1]+"\n")
		// Another agent at the same place.
		if err := os.Rename(sockets[2], sockets[1]); err != nil {
			t.Fatal(err)
		}
		want(t, w.sshWith(link, "-A", "box", show).wait(patience), 0, prints[2]+"\n")
		// Nobody listens: nothing is forwarded, as in plain ssh.
		dead := w.path("dead")
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		ln.SetUnlinkOnClose(false)
		ln.Close()
		for _, socket := range []string{dead, w.path("missing")} {
			want(t, w.sshWith(socket, "-A", "box", `echo "[$SSH_AUTH_SOCK]"`).wait(patience), 0, "[]\n")
		}
		// ssh opens its agent anew by the name, so the first client's is now the one that is there.
		stays.send("\n")
		stays.expect(prints[2])
		stays.release()
	})
}

func TestAServerThatForwardsNoAgent(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		sockets, _ := w.agents(1)
		for range 2 {
			want(t, w.sshWith(sockets[0], "-A", "box", `echo "[$SSH_AUTH_SOCK]"`).wait(patience), 0, "[]\n")
		}
		held := w.sshWith(sockets[0], "-A", "box", "cat")
		held.echo("held")
		want(t, w.sshWith(sockets[0], "-A", "box", `echo "[$SSH_AUTH_SOCK]"`).wait(patience), 0, "[]\n")
		held.release()
	}, sshdLines("AllowAgentForwarding no"))
}

// screen is an X display of which nothing exists but its door: it says whose it is, and gives back what it gets.
type screen struct {
	ln     net.Listener
	number int
	cookie string // in hexadecimal
	came   chan string
}

// newScreen starts one, which ends with the test, and puts its cookie into an authority file.
func (w *world) newScreen(cookie byte, authority string) *screen {
	t := w.t
	t.Helper()
	s := &screen{ln: listenTCP(t), cookie: hex.EncodeToString(bytes.Repeat([]byte{cookie}, 16)), came: make(chan string, 16)}
	s.number = s.ln.Addr().(*net.TCPAddr).Port - 6000
	w.tool("xauth", "-q", "-f", authority, "add", s.display(), "MIT-MAGIC-COOKIE-1", s.cookie)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := s.ln.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(2 * patience))
			if got, err := readSetup(c); err == nil {
				s.came <- got
				fmt.Fprintf(c, "display of %s\n", got)
				io.Copy(c, c)
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { s.ln.Close(); <-done })
	return s
}

func (s *screen) display() string { return fmt.Sprint("localhost:", s.number) }

// x11Name is the authorization that ssh knows.
const x11Name = "MIT-MAGIC-COOKIE-1"

// x11Setup is what an X client says first (X Window System Protocol, section 8).
func x11Setup(cookie []byte) []byte {
	b := []byte{'l', 0}
	for _, n := range []int{11, 0, len(x11Name), len(cookie), 0} {
		b = binary.LittleEndian.AppendUint16(b, uint16(n))
	}
	return append(append(append(b, x11Name...), 0, 0), cookie...)
}

// readSetup reads it and returns the cookie in hexadecimal.
func readSetup(r io.Reader) (string, error) {
	b := make([]byte, len(x11Setup(make([]byte, 16))))
	if _, err := io.ReadFull(r, b); err != nil {
		return "", err
	}
	return hex.EncodeToString(b[len(b)-16:]), nil
}

// xclient is an X client for $DISPLAY, with the cookie that xauth has for it, or the one in its argument. It says something,
// and prints what comes back.
func xclient(args []string) int {
	_, number, _ := strings.Cut(strings.TrimSuffix(os.Getenv("DISPLAY"), ".0"), ":")
	n, err := strconv.Atoi(number)
	if err != nil {
		fmt.Println("no display")
		return 1
	}
	list, err := exec.Command("xauth", "-q", "list", os.Getenv("DISPLAY")).Output()
	words := strings.Fields(string(list))
	if err != nil || len(words) < 3 {
		fmt.Printf("no cookie: %v %q\n", err, list)
		return 1
	}
	if len(args) > 0 {
		words[2] = args[0]
	}
	cookie, err := hex.DecodeString(words[2])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	c, err := net.Dial("tcp", loopback(6000+n))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer c.Close()
	said := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	go func() {
		c.Write(x11Setup(cookie))
		c.Write(said) // no EOF behind it: plain ssh takes one for the end of both directions
	}()
	r := bufio.NewReader(c)
	line, _ := r.ReadString('\n')
	rest := make([]byte, len(said))
	_, err = io.ReadFull(r, rest)
	fmt.Printf("%s, %v, %v\n", strings.TrimSpace(line), bytes.Equal(rest, said), err)
	return 0
}

// Two clients forward X11 over one connection. Each one's programs reach its own display, with the cookie that this knows;
// what brings another cookie reaches none.
func TestEachClientForwardsItsOwnDisplay(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		program := "E2E_HELPER=xclient " + os.Args[0]
		var held []*proc
		var screens []*screen
		for i := range 2 {
			local, remote := w.path(fmt.Sprint("xlocal", i)), w.path(fmt.Sprint("xremote", i))
			s := w.newScreen(byte(0xa0+i), local)
			screens = append(screens, s)
			env := append([]string{"DISPLAY=" + s.display(), "XAUTHORITY=" + local}, w.env...)
			args := w.sshArgs("-Y", "-o", "SetEnv=XAUTHORITY="+remote, "box",
				"while read more; do "+program+" $more; done")
			held = append(held, w.start(spec{args: args, env: env}))
		}
		for round := range 2 {
			for i, p := range held {
				p.send("\n")
				p.expect(fmt.Sprintf("display of %s, true, <nil>\n", screens[i].cookie))
				if got := <-screens[i].came; got != screens[i].cookie {
					t.Errorf("round %d: display %d got the cookie %s", round, i, got)
				}
			}
		}
		for i, p := range held {
			p.send(strings.Repeat("5c", 16) + "\n") // nobody's
			if before := p.expect("\n"); strings.Contains(before, "display of") {
				t.Errorf("client %d: a wrong cookie reached a display: %q", i, before)
			}
			if len(screens[0].came)+len(screens[1].came) > 0 {
				t.Error("a wrong cookie reached a display")
			}
		}
		for _, p := range held {
			p.release()
		}
		w.connections(1)
	}, sshdLines("X11Forwarding yes"))
}
