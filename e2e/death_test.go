//go:build linux

package e2e

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// holdings is what the master has in hand: what clients used must be back to this when they are gone.
type holdings struct{ clients, channels, goroutines, fds int }

func (w *world) holdings() holdings {
	s := w.mustStatus()
	return holdings{len(s.Clients), s.channels(), w.goroutines(), len(w.fds(s.PID))}
}

func (h holdings) within(most holdings) bool {
	return h.clients <= most.clients && h.channels <= most.channels && h.goroutines <= most.goroutines && h.fds <= most.fds
}

// settled is what the master holds with the clients that are there now, when it has come to rest.
func (w *world) settled(clients int) holdings {
	w.t.Helper()
	var now, before holdings
	eventually(w.t, fmt.Sprintf("the master rests with %d clients", clients), func() bool {
		before, now = now, w.holdings()
		return now == before && now.clients == clients
	})
	return now
}

// backTo waits until the master holds no more than it did.
func (w *world) backTo(most holdings) {
	w.t.Helper()
	var now holdings
	if !within(patience, func() bool { now = w.holdings(); return now.within(most) }) {
		w.t.Errorf("the master still holds %+v; before the others came %+v", now, most)
	}
}

func TestTheFirstClientLeavesAndOthersGoOn(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		first := w.hold()
		second, third := w.hold(), w.hold()
		first.release()
		second.echo("second")
		third.echo("third")
		want(t, w.ssh("box", "echo fourth"), 0, "fourth\n")
		second.release()
		third.echo("third again")
		third.release()
		w.connections(1)
	})
}

func TestAKilledSSHLeavesNothingInTheMaster(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		stays := w.hold()
		if w.mode == plain {
			other := w.hold()
			other.signal(syscall.SIGKILL)
			other.wait(patience)
			stays.echo("still here")
			stays.release()
			return
		}
		want(t, w.ssh("box", "true"), 0, "") // what is opened once and kept, a spare for instance, is open now
		before := w.settled(1)
		for round := range 3 {
			dead := []*proc{
				w.hold(),                            // idle
				w.hold("-R", "0:127.0.0.1:1"),       // owns something at the server
				w.sshStart("box", "yes;"),           // has output on the way
				w.sshStart("box", "cat >/dev/null"), // has input on the way
			}
			dead[2].expect("y\n")
			in := dead[3].in
			go func() { // fills the pipe until ssh is gone
				for {
					if _, err := in.Write(make([]byte, 32<<10)); err != nil {
						return
					}
				}
			}()
			if noTTY == "" {
				p := w.sshTTY("-tt", "box", "echo here; cat")
				p.expect("here")
				dead = append(dead, p)
			}
			for _, p := range dead {
				p.signal(syscall.SIGKILL)
				p.wait(patience)
			}
			stays.echo(fmt.Sprint("still here ", round))
			w.backTo(before)
		}
		want(t, w.ssh("box", "echo hi"), 0, "hi\n")
		stays.release()
		w.connections(1)
	})
}

func TestAKilledBridgeEndsItsClientAlone(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) { // with --fdpass no bridge is left to kill
		stays := w.hold()
		want(t, w.ssh("box", "true"), 0, "")
		before := w.settled(1)
		for round := range 3 {
			dead := w.hold()
			kill9(w.bridge(dead))
			if r := dead.wait(patience); r.status != 255 {
				t.Errorf("an ssh whose bridge was killed ended with %d: %s", r.status, r.err)
			}
			stays.echo(fmt.Sprint("still here ", round))
			w.backTo(before)
		}
		stays.release()
		w.connections(1)
	})
}

// A terminal that is closed sends SIGHUP to ssh and to its bridge.
func TestAHungUpTerminalEndsItsClientAlone(t *testing.T) {
	if !remoteTTY(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		stays := w.hold()
		p := w.sshTTY("-tt", "box", "echo here; cat")
		p.expect("here")
		p.tty.Close()
		p.wait(patience)
		stays.echo("still here")
		stays.release()
		w.connections(1)
	})
}

func TestTheConnectionDiesAndEverySessionSaysSo(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		all := []*proc{w.hold(), w.hold(), w.hold()}
		w.link.cut()
		for _, p := range all {
			r := p.wait(patience)
			if r.status != 255 {
				t.Errorf("status %d, stderr %q", r.status, r.err)
			}
			if lines := muxLines(r.err); w.mode != plain && len(lines) != 1 {
				t.Errorf("a session that was cut off says %q, which is not one line of ours", r.err)
			}
		}
		want(t, w.ssh("box", "echo again"), 0, "again\n")
		w.connections(2)
	})
}

// A copy that was cut off must not look complete: its ssh ends with 255.
func TestATruncatedCopyIsNotASuccess(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		p := w.sshStart("box", "echo begun; cat")
		p.expect("begun\n")
		in, _ := random(1 << 20)
		want(t, w.sshIn(in, "box", "cat >/dev/null"), 0, "")
		down := w.start(spec{args: []string{"sh", "-c", `"$@" >/dev/null`, "sh", "ssh", "-F", w.conf, "box", "echo begun >&2; yes"}, null: true})
		down.expectErr("begun\n")
		w.link.cut()
		if r := down.wait(patience); r.status != 255 {
			t.Errorf("a cut copy from the server ended with %d: %s", r.status, r.err)
		}
		if r := p.wait(patience); r.status != 255 {
			t.Errorf("a cut session ended with %d: %s", r.status, r.err)
		}
	})
}

// Bytes that the network no longer carries: the client's own keepalives notice, and nobody hangs.
func TestAStalledNetworkIsNoticedByTheClientsKeepalives(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		p := w.hold("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
		w.link.stall(true)
		r := p.wait(patience)
		w.link.stall(false)
		if r.status != 255 {
			t.Errorf("status %d: %s", r.status, r.err)
		}
	})
}

// twentyBeside runs twenty ssh one after another beside whatever goes wrong with another client, and gives each 5 s.
func (w *world) twentyBeside(t *testing.T) {
	t.Helper()
	for i := range 20 {
		p := w.start(spec{args: w.sshArgs("box", "true"), null: true})
		if r := p.wait(5 * time.Second); r.status != 0 {
			t.Fatalf("number %d ended with %d: %s", i, r.status, r.err)
		}
	}
}

func TestAStoppedClientWithOutputPendingHindersNobody(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		p := w.sshStart("box", "yes")
		p.expect("y\n")
		p.stop()
		w.twentyBeside(t)
		p.signal(syscall.SIGCONT)
		more := len(p.out.String())
		eventually(t, "the stopped client goes on", func() bool { return len(p.out.String()) > more+1<<20 })
		p.signal(syscall.SIGKILL)
		p.wait(patience)
		w.connections(1)
	})
}

// stop stops a process and waits until the kernel says so.
func (p *proc) stop() {
	p.t.Helper()
	p.signal(syscall.SIGSTOP)
	eventually(p.t, "the process is stopped", func() bool { return stat(p.pid()).state == 'T' })
}

// A reader that never reads, while ssh itself runs: the window is full and stays so.
func TestAClientThatDoesNotReadHindersNobody(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		r, stdout, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		p := w.start(spec{args: w.sshArgs("box", "yes"), stdout: stdout})
		stdout.Close()
		if _, err := io.ReadFull(r, make([]byte, 2)); err != nil {
			t.Fatal(err)
		}
		w.twentyBeside(t)
		p.signal(syscall.SIGKILL)
		w.connections(1)
	})
}

// A server that sends a stopped client a hundred channel requests and more output than any window takes. A relay whose
// connection stops being read at the 17th undelivered request would stop everyone.
func TestAStoppedClientWithRequestsPendingHindersNobody(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		srv := newServer(t)
		w.link.lead(srv.addr())
		p := w.sshStart("box", "storm")
		p.expect("begun\n")
		p.stop()
		srv.storm()
		w.twentyBeside(t)
		p.signal(syscall.SIGKILL)
		p.wait(patience)
		w.twentyBeside(t)
	})
}

// sshd asks for life on the first open channel, here one that a background job keeps open. A stopped client that has an
// exit status waiting must not leave that unanswered, or sshd ends the connection of all.
func TestAStoppedClientDoesNotCostTheOthersTheConnection(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	for _, m := range []mode{pipes, fdpass} {
		t.Run(string(m), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, m, func(s *setup) { s.sshd = []string{"ClientAliveInterval 1", "ClientAliveCountMax 3"} })
			done := w.path("done")
			stopped := w.sshStart("box", "sleep 20 & echo in; sleep 2; head -c 1000000 /dev/zero; touch "+done+"; exit 3")
			stopped.expect("in\n")
			stopped.stop()
			beside := w.sshStart("box", "echo in; cat")
			beside.expect("in\n")
			eventually(t, "the stopped client's command ends", func() bool { _, err := os.Stat(done); return err == nil })
			// Longer than sshd waits: nothing else would tell.
			w.silence(6*time.Second, beside)
			want(t, w.ssh("box", "echo still"), 0, "still\n")
			beside.release()
			stopped.signal(syscall.SIGKILL)
			stopped.wait(patience)
			w.connections(1)
		})
	}
}

// silence fails if a process ends within some time.
func (w *world) silence(d time.Duration, p *proc) {
	w.t.Helper()
	select {
	case <-p.done:
		w.t.Errorf("%q has ended: %s", p.cmd.Args, p.err.String())
	case <-time.After(d):
	}
}

// muxLines are the lines that muxproxy itself said.
func muxLines(stderr string) []string {
	var all []string
	for line := range strings.Lines(stderr) {
		if strings.HasPrefix(line, "muxproxy: ") {
			all = append(all, strings.TrimRight(line, "\r\n"))
		}
	}
	return all
}
