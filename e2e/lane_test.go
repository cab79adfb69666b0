//go:build linux

package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sshdLines has an option before the usual ones of sshd_config.
func sshdLines(lines ...string) option { return func(s *setup) { s.sshd = append(s.sshd, lines...) } }

// lanes says which connection carries what: for each of a lane, the channels on it.
func (s status) lanes() map[string][]string {
	lanes := map[string][]string{}
	on := map[uint64]string{}
	for _, u := range s.Upstreams {
		on[u.ID] = u.Lane
		if _, ok := lanes[u.Lane]; !ok {
			lanes[u.Lane] = []string{}
		}
	}
	for _, c := range s.Clients {
		for _, ch := range c.Channels {
			lanes[on[ch.Upstream]] = append(lanes[on[ch.Upstream]], strings.TrimSpace(ch.Kind+" "+ch.Detail))
		}
	}
	return lanes
}

// Forty sessions at once, on a server that allows fewer on one connection. All are there at the same time.
func TestMoreSessionsThanTheServerAllows(t *testing.T) {
	t.Parallel()
	modes := []mode{pipes, fdpass}
	if plainMode {
		modes = []mode{plain}
	}
	for _, m := range modes {
		for _, most := range []int{10, 1} { // one after the other: eighty ssh at once are too much for a small machine
			t.Run(fmt.Sprint(m, "/", most), func(t *testing.T) {
				fortySessions(t, newWorld(t, m, sshdLines(fmt.Sprint("MaxSessions ", most))), most)
			})
		}
	}
}

func fortySessions(t *testing.T, w *world, most int) {
	const n = 40
	var held []*proc
	for i := range n {
		held = append(held, w.sshStart("box", fmt.Sprintf("echo in %d; cat", i)))
	}
	for i, p := range held {
		if _, ok := p.out.expect(fmt.Sprintf("in %d\n", i), 3*patience); !ok {
			t.Fatalf("session %d does not start: %q", i, p.err)
		}
	}
	if w.mode != plain {
		s := w.mustStatus()
		sessions := 0
		for _, u := range s.Upstreams {
			if u.Most > most || u.Sessions > most {
				t.Errorf("connection %d has %d sessions, and a limit of %d was learned", u.ID, u.Sessions, u.Most)
			}
			sessions += u.Sessions
		}
		if up := len(s.Upstreams); up < n/most || sessions < n {
			t.Errorf("%d connections, %d sessions", up, sessions)
		}
		t.Logf("%d connections for %d sessions, %d allowed on each", len(s.Upstreams), n, most)
	}
	for _, p := range held {
		p.echo("still")
		p.in.Close()
	}
	for _, p := range held {
		want(t, p.wait(patience), 0, p.out.String())
	}
}

// Where each login needs a password, sessions wait for one another instead.
func TestSessionsWaitWhereALoginNeedsAPerson(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		d, tried := w.passwordDoor("sesame")
		d.sessions = 1
		conf := w.interactive("slots.conf", d.port(), "")
		var all []*proc
		asked := w.tty(conf, "box", "who")
		asked.expect("password: ")
		for range 9 {
			all = append(all, w.noTTY(conf, "box", "who"))
		}
		w.waiting(10)
		asked.send("sesame\n")
		asked.ended(0, "in as "+me)
		for _, p := range all {
			want(t, p.wait(2*patience), 0, "in as "+me+"\n")
		}
		if d.count() != 1 || tried.Load() != 1 {
			t.Errorf("%d connections, %d passwords", d.count(), tried.Load())
		}
	})
}

// A session that has to wait says so on its own stderr, once.
func TestAWaitingSessionSaysSo(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		d, _ := w.passwordDoor("sesame")
		d.sessions = 1
		conf := w.interactive("slots.conf", d.port(), "")
		first := w.tty(conf, "-T", "box", "hold")
		first.expect("password: ")
		first.send("sesame\n")
		first.expect("held")
		second := w.noTTY(conf, "box", "who")
		line := "muxproxy: waiting for a free session of the connection to 127.0.0.1:" + fmt.Sprint(d.port()) + "\n"
		second.expectErr(line)
		first.send("\x04")
		r := second.wait(patience)
		want(t, r, 0, "in as "+me+"\n")
		if r.err != line {
			t.Errorf("stderr %q", r.err)
		}
	})
}

// Copies go by a connection of their own while somebody works beside them, and need no second login alone.
func TestCopiesHaveTheirOwnConnection(t *testing.T) {
	copies := map[string]func(w *world, file string) []string{
		"scp": func(w *world, file string) []string {
			return []string{"scp", "-q", "-F", w.conf, file, "box:" + w.path("there")}
		},
		"scp -O": func(w *world, file string) []string {
			return []string{"scp", "-O", "-q", "-F", w.conf, file, "box:" + w.path("there")}
		},
		"rsync": func(w *world, file string) []string {
			return []string{"rsync", "-e", "ssh -F " + w.conf, file, "box:" + w.path("there")}
		},
	}
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		const size = 4 << 20
		file, sum := w.randomFile("file", size)
		for name, args := range copies {
			before := w.link.count()
			w.ok(args(w, file)...)
			w.same("there", sum)
			if n := w.link.count() - before; n != 1 {
				t.Errorf("%s alone: %d connections", name, n)
			}
			eventually(t, "the connection ends", func() bool { return len(w.mustStatus().Upstreams) == 0 })
		}
		for name, args := range copies {
			if err := os.Remove(w.path("there")); err != nil { // rsync sends what differs
				t.Fatal(err)
			}
			shell := w.hold()
			before := w.link.count()
			w.ok(args(w, file)...)
			w.same("there", sum)
			in := map[string]int64{}
			for _, u := range w.mustStatus().Upstreams {
				in[u.Lane] += u.In
			}
			if n := w.link.count() - before; n != 1 || in["bulk"] < size || in["interactive"] >= size {
				t.Errorf("%s beside a shell: %d more connections, bytes by lane %v", name, n, in)
			}
			shell.echo("still")
			shell.release()
			eventually(t, "all connections end with the last client", func() bool { return len(w.mustStatus().Upstreams) == 0 })
		}
		// A session of sftp that stays can be seen where it is.
		shell := w.hold()
		sftp := w.start(spec{args: []string{"sftp", "-q", "-F", w.conf, "-b", "-", "box"}})
		sftp.send("pwd\n")
		sftp.expect("working directory")
		lanes := w.mustStatus().lanes()
		if got := fmt.Sprint(lanes["interactive"], lanes["bulk"]); got != "[exec cat] [subsystem sftp]" {
			t.Errorf("lanes %v", lanes)
		}
		sftp.release()
		shell.release()
	})
}

// A command without a terminal that turns out to move much sends those after it to a connection of their own, until one
// moves little again. On a terminal it is somebody who types.
func TestACommandThatTurnsOutToBeBulkMovesItsSuccessors(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		const command = "tee /dev/null"
		shell := w.hold()
		runs := func(lane string, connections int) *proc {
			t.Helper()
			p := w.sshStart("box", command)
			p.echo("here")
			if got := w.mustStatus().lanes()[lane]; !slices.Contains(got, "exec tee") {
				t.Errorf("the lane %s has %q", lane, got)
			}
			w.connections(connections)
			return p
		}
		runs("interactive", 1).release()
		in, inSum := random(9 << 20)
		if r := w.sshIn(in, "box", command); r.status != 0 || sum(r.out) != inSum {
			t.Errorf("status %d, stderr %q; what came back is the same: %v", r.status, r.err, sum(r.out) == inSum)
		}
		w.connections(1)
		second := runs("bulk", 2)
		if remoteTTY(t) {
			p := w.sshTTY("-tt", "box", command)
			eventually(t, "it is on the lane interactive", func() bool {
				return slices.Contains(w.mustStatus().lanes()["interactive"], "exec tee")
			})
			p.tty.Close()
			p.wait(patience)
		}
		second.release()
		runs("interactive", 2).release()
		shell.release()
	})
}

// If the server lets in no second connection, a copy shares the one that there is, soon.
func TestCopiesShareIfTheyMust(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		file, sum := w.randomFile("file", 1<<20)
		shell := w.hold()
		w.link.lead(loopback(freePort(t)))
		for range 3 {
			r := w.ok("scp", "-q", "-F", w.conf, file, "box:"+w.path("there"))
			w.same("there", sum)
			if r.err != "" {
				t.Errorf("stderr %q", r.err)
			}
		}
		if n := w.link.count(); n > 2 {
			t.Errorf("%d connections were tried", n)
		}
		if s := w.mustStatus(); len(s.Upstreams) != 1 || s.Upstreams[0].In < 3<<20 {
			t.Errorf("upstreams %+v", s.Upstreams)
		}
		shell.echo("still")
		shell.release()
	})
}

// A session on a shared connection costs one round trip until its first output: a session channel is open in advance.
func TestASharedSessionTakesOneRoundTrip(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		shell := w.hold()
		want(t, w.ssh("box", "true"), 0, "")
		w.link.slow(100 * time.Millisecond)
		for range 3 {
			eventually(t, "the spare is open", func() bool {
				s := w.mustStatus()
				return len(s.Upstreams) == 1 && s.Upstreams[0].Sessions == 2
			})
			w.link.roundTrips()
			p := w.sshStart("box", "echo first; cat")
			p.expect("first\n")
			if n := w.link.roundTrips(); n != 1 {
				t.Errorf("%d round trips until the first output", n)
			}
			p.release()
		}
		w.link.slow(0)
		shell.release()
		w.connections(1)
	})
}

// pause stops a process for as long as a clock needs to show a jump.
func pause(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Second) // that it lasts is what is tested
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
}

// backWithin is how soon after the network has come back the next ssh has to work.
const backWithin = 3 * time.Second

// backIn runs the next ssh, which has to work in time.
func (w *world) backIn() {
	w.t.Helper()
	r := w.ssh("box", "echo next")
	want(w.t, r, 0, "next\n")
	w.t.Logf("the next ssh took %s", r.took)
	if r.took > backWithin {
		w.t.Errorf("it had %s", backWithin)
	}
}

// silentTime is longer than a connection may be silent before it is asked for a sign of life.
const silentTime = 6 * time.Second

// The network carries nothing for a while, in either direction, and nobody is told. What is on the connection goes on when it
// is back, and so do those who come then, or have come meanwhile.
func TestALinkThatIsCutAndRestored(t *testing.T) {
	for name, meanwhile := range map[string]bool{"nobody comes meanwhile": false, "somebody does": true} {
		t.Run(name, func(t *testing.T) {
			forPipes(t, func(t *testing.T, w *world) {
				if !muxproxyOnly(t) {
					return
				}
				shell := w.hold()
				in, inSum := random(8 << 20)
				copied := w.sshStart("box", "sha256sum")
				w.link.stall(true)
				sent := make(chan error, 1)
				go func() { // more than fits on the way
					_, err := io.Copy(copied.in, in)
					copied.in.Close()
					sent <- err
				}()
				time.Sleep(silentTime) // that it lasts is what is tested
				logins := 1
				var waits *proc
				if meanwhile {
					waits = w.sshStart("box", "echo meanwhile")
					eventually(t, "who comes now dials anew", func() bool { return w.link.count() > logins })
					logins++
				}
				w.link.stall(false)
				w.backIn()
				if waits != nil {
					want(t, waits.wait(patience), 0, "meanwhile\n")
				}
				shell.echo("the shell goes on")
				want(t, copied.wait(patience), 0, inSum+"  -\n")
				if err := <-sent; err != nil {
					t.Error(err)
				}
				shell.release()
				w.connections(logins)
			})
		})
	}
}

// The machine slept, and the network is not back yet. Nobody new uses the connection until it gives a sign of life, and
// what is on it goes on then.
func TestASuspendedMachineAndADeadLink(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		shell := w.hold()
		content := make([]byte, 4<<20)
		for i := range content {
			content[i] = byte(i * i >> 8)
		}
		copied := w.sshStart("box", "echo ready; sha256sum")
		copied.expect("ready\n")
		half := make(chan error, 1)
		w.link.stall(true)
		go func() { // more than fits on the way
			_, err := copied.in.Write(content)
			half <- err
		}()
		master := w.mustStatus().PID
		pause(t, master)
		eventually(t, "the connection is suspect", func() bool {
			s := w.mustStatus()
			for _, u := range s.Upstreams {
				if u.Suspect {
					return true
				}
			}
			return false
		})
		before := w.link.count()
		meanwhile := w.sshStart("box", "echo meanwhile")
		eventually(t, "who comes now dials anew", func() bool { return w.link.count() > before })
		w.link.stall(false)
		w.backIn()
		want(t, meanwhile.wait(patience), 0, "meanwhile\n")
		shell.echo("the shell goes on")
		if err := <-half; err != nil {
			t.Error(err)
		}
		copied.in.Close()
		want(t, copied.wait(patience), 0, fmt.Sprintf("ready\n%x  -\n", sha256.Sum256(content)))
		shell.release()
	})
}

// The connection broke while the machine slept: its clients hear why, and the next ssh dials anew at once.
func TestASuspendedMachineAndAResetConnection(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		shell := w.hold()
		master := w.mustStatus().PID
		if err := syscall.Kill(master, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		w.link.cut()
		if err := syscall.Kill(master, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		w.backIn()
		if r := shell.wait(patience); r.status != 255 || !strings.Contains(r.err, "connection reset by peer") {
			t.Errorf("the shell ended with %d: %q", r.status, r.err)
		}
		w.connections(2)
	})
}

// A connection that dies hurts only what is on it: the copy goes on when the shell's connection breaks.
func TestACopyOutlivesTheShellsConnection(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		shell := w.hold()
		first := w.link.snapshot()
		sftp := w.start(spec{args: []string{"sftp", "-q", "-F", w.conf, "-b", "-", "box"}})
		sftp.send("pwd\n")
		sftp.expect("working directory")
		if n := len(w.mustStatus().Upstreams); n != 2 {
			t.Fatalf("%d connections", n)
		}
		for _, p := range first {
			p.end()
		}
		if r := shell.wait(patience); r.status != 255 {
			t.Errorf("the shell ended with %d: %s", r.status, r.err)
		}
		file, sum := w.randomFile("file", 1<<20)
		io.WriteString(sftp.in, "put "+file+" "+w.path("there")+"\n")
		sftp.release()
		w.same("there", sum)
		want(t, w.ssh("box", "echo next"), 0, "next\n")
	})
}

// The other way round, the copy is cut, and never looks complete; the shell goes on.
func TestTheShellOutlivesTheCopysConnection(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		shell := w.hold()
		first := w.link.snapshot()[0]
		sftp := w.sshStart("-s", "box", "sftp")
		sftp.send("\x00\x00\x00\x05\x01\x00\x00\x00\x03") // SSH_FXP_INIT
		sftp.expect("\x02\x00\x00\x00\x03")               // SSH_FXP_VERSION
		for _, p := range w.link.snapshot() {
			if p != first {
				p.end()
			}
		}
		if r := sftp.wait(patience); r.status != 255 || !strings.Contains(r.err, "connection reset by peer") {
			t.Errorf("sftp ended with %d: %q", r.status, r.err)
		}
		shell.echo("still")
		shell.release()
	})
}
