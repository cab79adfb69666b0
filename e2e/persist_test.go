//go:build linux

package e2e

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// persists is a policy with a persist block for the host.
func (w *world) persists(lines string) string {
	return fmt.Sprintf("master {\n  ssh_config = %q\n}\nhost \"box\" {\n  persist {\n%s\n  }\n}\n", w.conf, lines)
}

// persisted are the audit log's records of persist, "keep ..." and the like.
func (w *world) persisted() []string {
	w.t.Helper()
	text, err := os.ReadFile(w.path(w.state + "/muxproxy/audit.log"))
	if err != nil {
		w.t.Fatal(err)
	}
	var all []string
	for line := range strings.Lines(string(text)) {
		var r struct{ Record, Plugin, Event, Target, Detail string }
		if json.Unmarshal([]byte(line), &r) == nil && r.Record == "plugin" && r.Plugin == "persist" {
			all = append(all, r.Event+" "+r.Detail)
		}
	}
	return all
}

// recorded waits for a record that begins like that and has the rest in it.
func (w *world) recorded(event, detail string) {
	w.t.Helper()
	eventually(w.t, "audit.log has "+event+" "+detail, func() bool {
		for _, r := range w.persisted() {
			if strings.HasPrefix(r, event+" ") && strings.Contains(r, detail) {
				return true
			}
		}
		return false
	})
}

// startMaster starts one without a client.
func (w *world) startMaster() {
	w.t.Helper()
	if r := w.mux("master", "start"); r.status != 0 {
		w.t.Fatalf("muxproxy master start: %+v", r)
	}
}

// kept waits until there is one connection, without clients.
func (w *world) kept() {
	w.t.Helper()
	eventually(w.t, "a connection without clients is kept", func() bool {
		s := w.mustStatus()
		return len(s.Upstreams) == 1 && s.Upstreams[0].Clients == 0 && !s.Upstreams[0].KeptUntil.IsZero()
	})
}

// The first client's exit waits for nothing, nothing of it stays open, and the next one finds the connection.
func TestAKeptConnectionHoldsNothingOfItsFirstClient(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy(w.persists(""))
		shell := func(line string) result { // whose pipe ends when nobody holds its stdin, stdout or stderr any more
			return w.start(spec{args: []string{"sh", "-c", line, "sh", "ssh", "-F", w.conf}, null: true}).wait(patience)
		}
		want(t, w.ssh("box", "true"), 0, "")
		w.kept()
		for _, c := range []struct{ line, out string }{
			{`"$@" box 'echo out; exit 3' 2>&1 | cat`, "out\n"},
			{`"$@" box 'echo err >&2' 2>&1 | cat`, "err\n"},
			{`echo in | "$@" box cat | cat`, "in\n"},
			{`"$@" -f box 'sleep 0.3; echo later' 2>&1 | cat`, "later\n"},
			{`"$@" -f box true 2>&1 | cat`, ""},
		} {
			if r := shell(c.line); r.status != 0 || r.out != c.out || r.took > 10*time.Second {
				t.Errorf("%s: %+v", c.line, r)
			}
		}
		for _, to := range w.fds(w.mustStatus().PID) {
			if strings.HasPrefix(to, "/dev/pts") {
				t.Errorf("the master holds %s", to)
			}
		}
		w.connections(1)
		w.kept()
		if r := w.mux("status"); !strings.Contains(r.out, "no clients for ") || !strings.Contains(r.out, ", kept until ") {
			t.Errorf("%s", r.out)
		}
		w.recorded("keep", " kept until ")
	})
}

// idle, and another policy for a connection that waits.
func TestAKeptConnectionEnds(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy(w.persists(`    idle = "200ms"`))
		want(t, w.ssh("box", "true"), 0, "")
		w.recorded("close", ": no client for 200ms")
		eventually(t, "it is closed", func() bool { return len(w.mustStatus().Upstreams) == 0 })

		w.reload(w.persists(`    idle = "forever"` + "\n" + `    max = "forever"`))
		want(t, w.ssh("box", "true"), 0, "")
		w.kept()
		w.recorded("keep", " kept for ever")
		w.reload(w.persists(`    idle = "0s"`))
		eventually(t, "it is closed", func() bool { return len(w.mustStatus().Upstreams) == 0 })

		w.reload(w.persists(`    idle = "1h"`))
		want(t, w.ssh("box", "true"), 0, "")
		w.kept()
		w.reload("")
		eventually(t, "without a persist block it is closed", func() bool { return len(w.mustStatus().Upstreams) == 0 })
		w.connections(3)
	})
}

// After max, a connection in use takes no new clients, and is not cut.
func TestMaxCutsNobody(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy(w.persists(`    max = "1s"`))
		held := w.hold()
		eventually(t, "it takes no new clients", func() bool { return w.mustStatus().Upstreams[0].State == "draining" })
		want(t, w.ssh("box", "echo another"), 0, "another\n")
		w.connections(2)
		held.echo("still there")
		held.release()
		w.recorded("close", ": 1s after its login")
		eventually(t, "both are closed", func() bool { return len(w.mustStatus().Upstreams) == 0 })
	})
}

// zone makes the plugins that are started from now on live in a time zone in which it is 18:00 then (RFC 9636).
func (w *world) zone(then time.Time) {
	const day = 24 * 60 * 60
	offset := (18*60*60-then.Unix()%day+day/2)%day - day/2
	b := append([]byte("TZif"), make([]byte, 16)...)
	for _, n := range []uint32{0, 0, 0, 0, 1, 4, uint32(int32(offset))} { // one type of local time, and no change of it
		b = binary.BigEndian.AppendUint32(b, n)
	}
	w.write("zone", string(b)+"\x00\x00E2E\x00")
}

// At a time of the day a connection takes no new clients; what is made after it ends with the next day's.
func TestUntil(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy("")
		held := w.hold()
		then := time.Now().Add(2 * time.Second).Truncate(time.Second)
		w.zone(then)
		w.reload(w.persists(`    until = "18:00"` + "\n" + `    idle = "forever"` + "\n" + `    max = "forever"`))
		eventually(t, "it takes no new clients", func() bool { return w.mustStatus().Upstreams[0].State == "draining" })
		if now := time.Now(); now.Before(then) {
			t.Errorf("closed at %v, %v before its time", now, then.Sub(now))
		}
		want(t, w.ssh("box", "echo another"), 0, "another\n")
		w.connections(2)
		held.echo("still there")
		held.release()
		w.recorded("close", ": it is 18:00")
		w.kept()
		if until := w.mustStatus().Upstreams[0].KeptUntil; !until.Equal(then.Add(24 * time.Hour)) {
			t.Errorf("the next one is kept until %v, not %v", until, then.Add(24*time.Hour))
		}
	}, func(s *setup) { s.env["TZ"] = s.dir + "/zone" })
}

func TestTheLockClosesKeptConnections(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy(w.persists(`    on_lock = "close"` + "\n    prewarm = true"))
		w.startMaster()
		w.recorded("connect", "made in advance")
		want(t, w.ssh("box", "true"), 0, "")
		held := w.hold()
		want(t, w.mux("lock"), 0, "locked until `muxproxy unlock`\n")
		eventually(t, "it takes no new clients", func() bool { return w.mustStatus().Upstreams[0].State == "draining" })
		held.echo("goes on")
		held.release()
		w.recorded("close", ": muxproxy was locked")
		want(t, w.mux("unlock"), 0, "unlocked\n")
		eventually(t, "it is made in advance again", func() bool {
			s := w.mustStatus()
			return len(s.Upstreams) == 1 && s.Upstreams[0].State == "up"
		})
		want(t, w.ssh("box", "true"), 0, "")
		w.connections(2)
	})
}

// What is made in advance is there before the first client, and nobody is asked for it.
func TestPrewarm(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy(w.persists("    prewarm = true"))
		w.startMaster()
		w.recorded("connect", "connection 1, made in advance after ")
		w.connections(1)
		want(t, w.ssh("box", "echo warm"), 0, "warm\n")
		w.connections(1)
		// A server that wants a password gets no second try.
		d, tried := w.passwordDoor("sesame")
		conf := w.interactive("password.conf", d.port(), "")
		text := strings.Replace(w.persists("    prewarm = true\n    reconnect = true"), w.conf, conf, 1)
		w.reload("")
		w.reload(text)
		w.recorded("give-up", "needs a password, and nobody can be asked for it here")
		if tried.Load() != 0 || d.count() != 1 {
			t.Errorf("%d connections, %d passwords", d.count(), tried.Load())
		}
	})
}

// A lost connection comes back without a client, unless the login is refused.
func TestReconnect(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy(w.persists("    reconnect = true"))
		want(t, w.ssh("box", "true"), 0, "")
		w.kept()
		w.link.cut()
		w.recorded("lost", "; connecting again")
		w.recorded("connect", "connection 2, made again after ")
		want(t, w.ssh("box", "echo back"), 0, "back\n")
		w.connections(2)

		// From a network that is gone for a while it comes back too.
		w.link.lead(loopback(freePort(t)))
		w.link.cut()
		w.recorded("fail", "; trying again")
		w.link.lead(loopback(w.sshd))
		w.recorded("connect", "connection ")
		eventually(t, "it is back", func() bool {
			s := w.mustStatus()
			return len(s.Upstreams) == 1 && s.Upstreams[0].State == "up"
		})

		w.write("authorized_keys", "")
		before := w.link.count()
		w.link.cut()
		w.recorded("give-up", "permission denied")
		if n := w.link.count(); n != before+1 {
			t.Errorf("%d tries", n-before)
		}
		// One that somebody closes stays closed.
		if r := w.mux("close", "box"); r.status != 1 {
			t.Errorf("%+v", r)
		}
	})
}

// `muxproxy connect` asks at the terminal, and says what becomes of the connection.
func TestConnect(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		connect := func(conf string, args ...string) result {
			return w.mux(append([]string{"connect", "box"}, append([]string{"--", "-F", conf}, args...)...)...)
		}
		w.policy("")
		to := fmt.Sprintf("connected to %s@127.0.0.1:%d; ", me, w.link.port())
		want(t, connect(w.conf), 0, to+"nothing keeps it without a client: policy has no persist block that would\n")
		held := w.hold()
		want(t, connect(w.conf), 0, "was "+to+"others use it\n")
		held.release()

		w.reload(w.persists(""))
		if r := connect(w.conf); r.status != 0 || !strings.HasPrefix(r.out, to+"kept until ") || r.err != "" {
			t.Errorf("%+v", r)
		}
		if r := connect(w.conf); r.status != 0 || !strings.HasPrefix(r.out, "was "+to+"kept until ") {
			t.Errorf("%+v", r)
		}
		w.kept()
		w.connections(3)
		// Nothing of what ssh_config has for sessions is made.
		forwards := w.write("forwards.conf", fmt.Sprintf("Host box\n    LocalForward 127.0.0.1:%d 127.0.0.1:1\n    LocalCommand exit 1\n"+
			"    ControlMaster auto\n    ControlPath %s\n    RemoteCommand exit 1\n"+
			"    ForkAfterAuthentication yes\n    StdinNull yes\nInclude %s\n", freePort(t), w.path("cm"), w.conf))
		if r := connect(forwards); r.status != 0 || r.err != "" {
			t.Errorf("%+v", r)
		}

		// A password is asked for at the terminal.
		d, _ := w.passwordDoor("sesame")
		conf := w.interactive("password.conf", d.port(), "")
		p := w.start(spec{args: []string{binDir + "/muxproxy", "connect", me + "@box", "--", "-F", conf}, tty: true})
		p.answer("'s password: ", "wrong")
		p.answer("'s password: ", "sesame")
		p.ended(0, fmt.Sprintf("connected to %s@127.0.0.1:%d; kept until ", me, d.port()))
		want(t, w.noTTY(conf, "box", "who").wait(patience), 0, "in as "+me+"\n")
		p = w.start(spec{args: []string{binDir + "/muxproxy", "close", me + "@127.0.0.1:" + fmt.Sprint(d.port())}, null: true})
		want(t, p.wait(patience), 0, "closed 1 connection\n")
		p = w.start(spec{args: []string{binDir + "/muxproxy", "connect", me + "@box", "--", "-F", conf}, tty: true})
		p.expect("'s password: ")
		p.send("\x03")
		if r := p.wait(patience); r.status == 0 {
			t.Errorf("after an interrupt: %+v", r)
		}

		// What fails says so once.
		w.link.lead(loopback(freePort(t)))
		w.link.cut()
		eventually(t, "the connection is gone", func() bool { return w.mux("exists", "box").status == 1 })
		if r := connect(w.conf); r.status != 255 || r.out != "" || strings.Count(r.err, "\n") < 1 {
			t.Errorf("%+v", r)
		}
		if r := connect(w.direct); r.status != 255 || !strings.Contains(r.err, "box was reached, but not through muxproxy: ") {
			t.Errorf("%+v", r)
		}
		if r := w.mux("connect", "-oProxyCommand=x"); r.status != 2 {
			t.Errorf("%+v", r)
		}
		for pid, args := range processes() {
			if line := strings.Join(args, " "); strings.Contains(line, "LocalCommand=") && strings.Contains(line, w.dir) {
				t.Errorf("left behind: %d %q", pid, args)
				kill9(pid)
			}
		}
	})
}

// 200 rounds of clients that come around the end of a kept connection: none fails, there are never more than two
// connections, and one second later one again.
func TestClientsAroundTheDeadline(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	const hosts, rounds, idle = 4, 50, 250 * time.Millisecond
	forPipes(t, func(t *testing.T, w *world) {
		var config strings.Builder
		var links []*link
		for i := range hosts {
			l := newLink(t, loopback(w.sshd))
			links = append(links, l)
			w.append("known_hosts", knownHosts(l.port()))
			fmt.Fprintf(&config, "Host race%d\n    HostName 127.0.0.1\n    Port %d\n", i, l.port())
		}
		w.append("ssh_config", config.String())
		w.policy(fmt.Sprintf("host \"*\" {\n  persist {\n    idle = %q\n  }\n}\n", idle))
		w.startMaster()
		var all sync.WaitGroup
		for i, l := range links {
			all.Go(func() {
				host := fmt.Sprintf("race%d", i)
				for round := range rounds {
					var clients sync.WaitGroup
					for range 1 + rand.N(3) {
						clients.Go(func() {
							if r := w.ssh(host, "echo", fmt.Sprint(round)); r.status != 0 || r.out != fmt.Sprintln(round) || r.err != "" {
								t.Errorf("round %d: %+v", round, r)
							}
						})
					}
					clients.Wait()
					if round%10 == 9 {
						p := w.sshStart(host, "cat")
						p.echo("held")
						<-time.After(time.Second)
						if now, _ := l.alive(); now != 1 {
							t.Errorf("round %d: %d connections a second later", round, now)
						}
						p.release()
					}
					// Somewhere around the end; an ssh takes some tens of milliseconds until it is there.
					<-time.After(idle - 120*time.Millisecond + rand.N(160*time.Millisecond))
				}
				if _, most := l.alive(); most > 2 {
					t.Errorf("%d connections at once", most)
				}
				t.Logf("%d clients' rounds, %d connections", rounds, l.count())
			})
		}
		all.Wait()
	})
}
