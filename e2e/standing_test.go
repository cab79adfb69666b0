//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// forward is what `muxproxy forward list` shows of one.
type forward struct {
	ID, Kind, Listen, State, Reason, Owner string
	Listening                              []string
	Connections, Total, In, Out            int
}

func (w *world) forwards() (list []forward) {
	w.t.Helper()
	r := w.mux("forward", "list", "--json")
	if err := json.Unmarshal([]byte(r.out), &list); r.status != 0 || err != nil {
		w.t.Fatalf("forward list: %+v, %v", r, err)
	}
	return list
}

// allOpen waits until so many forwards are there, and open.
func (w *world) allOpen(n int) []forward {
	w.t.Helper()
	var list []forward
	if !within(patience, func() bool {
		list = w.forwards()
		good := len(list) == n
		for _, f := range list {
			good = good && f.State == "open"
		}
		return good
	}) {
		w.t.Fatalf("not %d open forwards: %+v", n, list)
	}
	return list
}

// standing is a policy with forwards of box.
func (w *world) standing(blocks string, rest ...string) string {
	return fmt.Sprintf("master {\n  ssh_config = %q\n}\nhost \"box\" {\n  forward {\n%s\n  }\n%s\n}\n", w.conf, blocks, strings.Join(rest, "\n"))
}

// curl fetches the page, whose text and errors it returns.
func (w *world) curl(args ...string) string {
	w.t.Helper()
	r := w.run(spec{args: append([]string{"curl", "-sS", "-m", "30"}, args...), null: true})
	return r.out + r.err
}

// pages serves the words "the page".
func pages(t *testing.T) (port string) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "the page") }))
	t.Cleanup(s.Close)
	_, port, _ = net.SplitHostPort(s.Listener.Addr().String())
	return port
}

// echoes is a server that says back what it hears.
func echoes(t *testing.T, network, address string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
				c.Close()
			}()
		}
	}()
	return l
}

// Forwards of policy are open without any ssh; the first who comes makes the connection. What is denied is denied to the
// process that came, by each protocol.
func TestStandingForwards(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		port, echo := pages(t), echoes(t, "unix", w.path("echo"))
		socks, local := loopback(freePort(t)), loopback(freePort(t))
		w.policy(w.standing(fmt.Sprintf(`
			dynamic %q {}
			local %q { to = "127.0.0.1:%s" }
			local %q { to = %q }`, socks, local, port, w.path("sock"), echo.Addr()), `
			deny {
				when   = use.kind == "local-forward" && use.port == 81 && matches("/curl$", client.exe)
				reason = "no 81 for curl"
			}`))
		if r := w.mux("master", "start"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		w.allOpen(3)
		w.connections(0)
		url := "http://localhost:" + port + "/"
		for _, args := range [][]string{
			{"--socks4a", socks, url}, {"--socks5-hostname", socks, url}, {"-p", "-x", "http://" + socks, url}, {"http://" + local},
		} {
			if got := w.curl(args...); got != "the page" {
				t.Errorf("%q: %s", args, got)
			}
		}
		w.connections(1)
		c, err := net.Dial("unix", w.path("sock"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		fmt.Fprint(c, "hello")
		c.(*net.UnixConn).CloseWrite()
		if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
			t.Errorf("%q, %v", b, err)
		}

		for args, want := range map[string]string{
			"--socks5-hostname " + socks + " http://localhost:81/": "(2)",
			"-p -x http://" + socks + " http://localhost:81/":      "403",
			"--socks5-hostname " + socks + " http://localhost:1/":  "(5)",
			"-p -x http://" + socks + " http://localhost:1/":       "502",
			"-x http://" + socks + " http://localhost/":            "muxproxy: this proxy only has CONNECT",
		} {
			if got := w.curl(strings.Fields(args)...); !strings.Contains(got, want) {
				t.Errorf("%s: %s", args, got)
			}
		}
		audit := w.read(w.state + "/muxproxy/audit.log")
		for _, want := range []string{`"decision":"deny"`, ` <- curl <- `, `"localhost:81"`, `"event":"opened"`, "dynamic " + socks, `config.hcl:5"`} {
			if !strings.Contains(audit, want) {
				t.Errorf("audit.log lacks %s:\n%s", want, tail(audit))
			}
		}

		// A changed policy: what it still has goes on, with its streams, and so do the streams of what it has no more.
		kept, err := net.Dial("unix", w.path("sock"))
		if err != nil {
			t.Fatal(err)
		}
		defer kept.Close()
		kept.SetDeadline(time.Now().Add(patience))
		say := func(text string) {
			t.Helper()
			b := make([]byte, len(text))
			fmt.Fprint(kept, text)
			if _, err := io.ReadFull(kept, b); err != nil || string(b) != text {
				t.Errorf("%q, %v", b, err)
			}
		}
		say("before")
		ids := w.forwards()
		w.reload(w.standing(fmt.Sprintf("dynamic %q {}", socks)))
		list := w.allOpen(1)
		if list[0].ID != ids[0].ID {
			t.Errorf("opened anew: %+v, then %+v", ids[0], list[0])
		}
		say("after")
		if _, err := net.Dial("unix", w.path("sock")); err == nil || !os.IsNotExist(statError(w.path("sock"))) {
			t.Errorf("still there: %v", err)
		}
		if got := w.curl("--socks5-hostname", socks, url); got != "the page" {
			t.Error(got)
		}
		w.reload(w.standing(""))
		say("and after that")

		// A file that is wrong changes nothing, and the line is the plugin's. With gateway it is right.
		everywhere := fmt.Sprintf("0.0.0.0:%d", freePort(t))
		w.policy(w.standing(fmt.Sprintf("dynamic %q {}", everywhere)))
		if r := w.mux("master", "reload"); r.status != 1 || !strings.Contains(r.err, "config.hcl:6:1: forward: "+everywhere+" lets other machines in") {
			t.Errorf("%+v", r)
		}
		if r := w.mux("forward", "add", "-D", everywhere, "box"); r.status != 1 || !strings.Contains(r.err, "only policy can allow that") {
			t.Errorf("%+v", r)
		}
		w.reload(w.standing(fmt.Sprintf("dynamic %q { gateway = true }", everywhere)))
		w.allOpen(1)
		outside := net.JoinHostPort(ownAddress(t), strings.TrimPrefix(everywhere, "0.0.0.0:"))
		if got := w.curl("--socks5-hostname", outside, url); got != "the page" {
			t.Errorf("%s: %s", outside, got)
		}
	})
}

// ownAddress is an address of this machine that other machines see, or without a network one that no forward has by itself.
func ownAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	return "127.0.0.2"
}

func statError(path string) error {
	_, err := os.Lstat(path)
	return err
}

// What was lost comes back: the connection, the master with all that commands have added, a port of the server that
// somebody else had.
func TestForwardsComeBack(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		echo := echoes(t, "tcp", "127.0.0.1:0").Addr().String()
		far, near, taken := loopback(freePort(t)), loopback(freePort(t)), listenTCP(t)
		w.policy(w.standing(fmt.Sprintf("remote %q { to = %q }\nremote %q { to = %q }", far, echo, taken.Addr(), echo)))
		if r := w.mux("forward", "list"); r.status != 1 || !strings.Contains(r.err, "no master runs") {
			t.Errorf("without a master: %+v", r)
		}
		if r := w.mux("master", "start"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		var list []forward
		eventually(t, "one is open, one waits", func() bool {
			list = w.forwards()
			return list[0].State == "open" && list[1].State == "waiting"
		})
		if !strings.Contains(list[1].Reason, "the server refused the remote forward") {
			t.Errorf("%+v", list[1])
		}
		r := w.mux("forward", "add", "-L", near+":"+echo, "box", "--for", "1h")
		want(t, r, 0, "1: listening on "+near+"\n")
		check := func(what string) {
			t.Helper()
			for _, at := range []string{near, far} {
				eventually(t, what+": "+at, func() bool {
					c, err := net.Dial("tcp", at)
					if err != nil {
						return false
					}
					defer c.Close()
					c.SetDeadline(time.Now().Add(patience))
					fmt.Fprint(c, what)
					c.(*net.TCPConn).CloseWrite()
					b, _ := io.ReadAll(c)
					return string(b) == what
				})
			}
		}
		check("at first")
		w.link.cut()
		check("after the connection was lost")
		taken.Close()
		w.allOpen(3)
		pid := w.mustStatus().PID
		kill9(pid)
		// It may be reached for a moment yet: a process ends thread by thread.
		eventually(t, "another master starts", func() bool { return w.mux("master", "start").status == 0 && w.mustStatus().PID != pid })
		check("after the master was killed")
		var added forward
		for _, f := range w.allOpen(3) {
			if f.Owner == "command" {
				added = f
			}
		}
		if added.ID != "1" {
			t.Errorf("%+v", added)
		}
		pid = w.plugins()[0].PID
		kill9(pid)
		eventually(t, "the plugin is there again", func() bool { p := w.plugins()[0]; return p.PID != pid && p.State == "up" })
		check("after the plugin was killed")

		// A new master takes over: its plugin opens what the old one's has closed.
		pid = w.mustStatus().PID
		if r := w.mux("master", "restart"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		w.allOpen(3)
		check("after the master was restarted")
		eventually(t, "the old master ends", func() bool { return gone(pid) })

		want(t, w.mux("lock"), 0, "locked until `muxproxy unlock`\n")
		if c, err := net.Dial("tcp", near); err == nil {
			c.SetDeadline(time.Now().Add(patience))
			if b, _ := io.ReadAll(c); len(b) > 0 {
				t.Errorf("locked: %q", b)
			}
			c.Close()
		}
		if r := w.mux("forward", "add", "-D", fmt.Sprint(freePort(t)), "box"); r.status == 0 || !strings.Contains(r.err, "locked") {
			t.Errorf("locked: %+v", r)
		}
		want(t, w.mux("forward", "remove", "1"), 0, "") // what takes away is never stopped
		want(t, w.mux("unlock"), 0, "unlocked\n")
		if c, err := net.Dial("tcp", near); err == nil {
			c.Close()
			t.Error("removed, and open")
		}
	})
}

// --with-client ends with the last ssh, and not with other forwards.
func TestAForwardWithItsClient(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		echo := echoes(t, "tcp", "127.0.0.1:0").Addr().String()
		near := loopback(freePort(t))
		if r := w.mux("master", "start"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		if r := w.mux("forward", "list"); r.status != 1 || !strings.Contains(r.err, "no host block of the policy has forward { ... }") {
			t.Errorf("without a block: %+v", r)
		}
		w.reload(w.standing(""))
		add := []string{"forward", "add", "--with-client", "-L", near + ":" + echo, "box"}
		if r := w.mux(add...); r.status != 1 || !strings.Contains(r.err, "no client is connected to "+me+"@127.0.0.1:") {
			t.Errorf("%+v", r)
		}
		first, second := w.hold(), w.hold()
		want(t, w.mux(add...), 0, "1: listening on "+near+"\n")
		c, err := net.Dial("tcp", near)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		fmt.Fprint(c, "x")
		if b := make([]byte, 1); !full(c, b) {
			t.Error("no stream")
		}
		first.release()
		time.Sleep(3 * time.Second) // longer than the plugin takes to look: nothing tells that it did
		w.allOpen(1)
		second.release()
		eventually(t, "it ends", func() bool { return len(w.forwards()) == 0 })
		fmt.Fprint(c, "y")
		if b := make([]byte, 1); !full(c, b) {
			t.Error("the stream did not go on")
		}
		if r := w.mux("forward", "add", "-D", "1080", "elsewhere.invalid"); r.status != 1 ||
			!strings.Contains(r.err, `policy has no forward block for elsewhere.invalid: put host "elsewhere.invalid" { forward {} } into it`) {
			t.Errorf("%+v", r)
		}
	})
}

func full(c net.Conn, b []byte) bool {
	_, err := io.ReadFull(c, b)
	return err == nil
}

// Where a connection from the server leads is policy's to judge, to a fixed place and for each client of SOCKS, and is in the
// audit log with what it carried.
func TestForwardsFromTheServerAreJudged(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		good, bad := pages(t), pages(t)
		socks, fixed := loopback(freePort(t)), loopback(freePort(t))
		deny := fmt.Sprintf(`
			deny {
				when   = use.kind == "remote-forward" && use.name == "connect" && use.port == %s && matches("/muxproxyd$", client.exe)
				reason = "not there"
			}`, bad)
		w.policy(w.standing(fmt.Sprintf(`remote %q { to = "127.0.0.1:%s" }`, fixed, bad), deny))
		if r := w.mux("master", "start"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		want(t, w.mux("forward", "add", "-R", socks, "box"), 0, "1: listening on "+socks+"\n")
		w.allOpen(2)
		for _, c := range []struct{ args, want string }{
			{"--socks4a " + socks + " http://localhost:" + good, "the page"},
			{"--socks5-hostname " + socks + " http://localhost:" + good, "the page"},
			{"-p -x http://" + socks + " http://localhost:" + good, "the page"},
			{"--socks4a " + socks + " http://localhost:" + bad, "(91)"},
			{"--socks5-hostname " + socks + " http://localhost:" + bad, "(2)"},
			{"-p -x http://" + socks + " http://localhost:" + bad, "403"},
			{"http://" + fixed, "curl: "},
			{"--socks5-hostname " + socks + " http://localhost:" + fmt.Sprint(freePort(t)), "(5)"},
		} {
			if got := w.curl(strings.Fields(c.args)...); !strings.Contains(got, c.want) || strings.Contains(got, "the page") != (c.want == "the page") {
				t.Errorf("%s: %s", c.args, got)
			}
		}
		type record struct {
			Record, ID, Decision, Reason, Kind, Name, Addr, Status string
			In, Out                                                int
		}
		eventually(t, "the audit log has all of it", func() bool {
			denied, allowed, carried := 0, 0, 0
			connects := map[string]bool{}
			for line := range strings.Lines(w.read(w.state + "/muxproxy/audit.log")) {
				var r record
				if json.Unmarshal([]byte(line), &r) != nil {
					return false // it is being written
				}
				switch {
				case r.Record == "decision" && r.Kind == "remote-forward" && r.Name == "connect":
					connects[r.ID] = true
					if r.Decision == "deny" && r.Reason == "not there" && strings.HasSuffix(r.Addr, ":"+bad) {
						denied++
					} else if r.Decision == "allow" && !strings.HasSuffix(r.Addr, ":"+bad) {
						allowed++
					}
				case r.Record == "end" && connects[r.ID] && r.Status == "closed" && r.In > 0 && r.Out > 0:
					carried++
				}
			}
			return denied == 4 && allowed == 4 && carried == 4
		})

		// What stands is judged by the policy in force when somebody comes.
		w.reload(w.standing(fmt.Sprintf(`remote %q { to = "127.0.0.1:%s" }`, fixed, bad)))
		if got := w.curl("http://" + fixed); got != "the page" {
			t.Errorf("without the deny: %s", got)
		}
		w.reload(w.standing(fmt.Sprintf(`remote %q { to = "127.0.0.1:%s" }`, fixed, bad), deny))
		if got := w.curl("http://" + fixed); !strings.HasPrefix(got, "curl: ") {
			t.Errorf("with it again: %s", got)
		}
	})
}

// Each direction of a stream ends by itself, whichever is first, through every kind of forward, of policy and of a command.
func TestTheHalvesOfForwards(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		said := make(chan string, 1)
		ln := listenTCP(t)
		t.Cleanup(func() { ln.Close() })
		go func() { // ends with ln
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					c.SetDeadline(time.Now().Add(patience))
					if b := make([]byte, 1); !full(c, b) || b[0] == 'e' {
						io.Copy(c, c)
						return
					}
					fmt.Fprint(c, "bye")
					c.(*net.TCPConn).CloseWrite()
					b, _ := io.ReadAll(c)
					said <- string(b)
				}()
			}
		}()
		to := ln.Addr().String()
		var at [8]string
		for i := range at {
			at[i] = loopback(freePort(t))
		}
		at[1], at[5], at[6] = w.path("near"), w.path("socks"), w.path("far")
		w.policy(w.standing(fmt.Sprintf("local %q { to = %q }\nlocal %q { to = %q }\ndynamic %q {}\nremote %q { to = %q }\n",
			at[0], to, at[1], to, at[2], at[3], to)))
		if r := w.mux("master", "start"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		for _, add := range [][]string{
			{"-L", at[4] + ":" + to}, {"-D", at[5]}, {"-R", at[6] + ":" + to}, {"-R", at[7]},
		} {
			if r := w.mux(append([]string{"forward", "add", "box"}, add...)...); r.status != 0 {
				t.Fatalf("%q: %+v", add, r)
			}
		}
		w.allOpen(len(at))
		for i, at := range at {
			connect := func(first string) net.Conn {
				c := dial(t, at)
				if i == 2 || i == 5 || i == 7 {
					socks5(t, c, to)
				}
				c.SetDeadline(time.Now().Add(patience))
				fmt.Fprint(c, first)
				return c
			}
			c := connect("e")
			exchangeOn(t, c, fmt.Sprint("the near end of ", i, " first"))
			c.Close()
			c = connect("b")
			if b, err := io.ReadAll(c); string(b) != "bye" || err != nil {
				t.Errorf("forward %d: %q, %v", i, b, err)
			}
			fmt.Fprint(c, "one more thing")
			c.(interface{ CloseWrite() error }).CloseWrite()
			select {
			case b := <-said:
				if b != "one more thing" {
					t.Errorf("forward %d, after the far end: %q", i, b)
				}
			case <-time.After(patience):
				t.Errorf("forward %d, after the far end: nothing", i)
			}
			c.Close()
		}
		w.connections(1)
	})
}

// Five hundred at once through each kind of forward, over one connection, and one that says nothing for a while.
func TestManyThroughAForward(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		idle := 2 * time.Second
		if bigMode {
			idle = time.Minute
		}
		echo := echoes(t, "tcp", "127.0.0.1:0").Addr().String()
		near, socks, far := loopback(freePort(t)), loopback(freePort(t)), loopback(freePort(t))
		w.policy(w.standing(fmt.Sprintf("local %q { to = %q }\ndynamic %q {}\nremote %q { to = %q }", near, echo, socks, far, echo)))
		if r := w.mux("master", "start"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		w.allOpen(3)
		began := time.Now()
		var quiet []net.Conn
		const many = 500
		for _, at := range []string{near, socks, far} {
			connect := func() (net.Conn, error) {
				c, err := net.Dial("tcp", at)
				if err != nil {
					return nil, err
				}
				c.SetDeadline(time.Now().Add(2 * patience))
				if at == socks {
					err = socks5Connect(c, echo)
				}
				return c, err
			}
			silent, err := connect()
			if err != nil {
				t.Fatal(err)
			}
			defer silent.Close()
			quiet = append(quiet, silent)
			var coming sync.WaitGroup
			for i := range many {
				coming.Go(func() {
					c, err := connect()
					if err != nil {
						t.Errorf("%s: %v", at, err)
						return
					}
					defer c.Close()
					say := fmt.Sprintf("%06d", i)
					fmt.Fprint(c, say)
					if b := make([]byte, 6); !full(c, b) || string(b) != say {
						t.Errorf("%s, %s: %q", at, say, b)
					}
				})
			}
			coming.Wait()
		}
		w.connections(1)
		eventually(t, "all are counted", func() bool {
			good := true
			for _, f := range w.forwards() {
				good = good && f.Total == many+1 && f.Connections == 1 && f.In == 6*many && f.Out == 6*many
			}
			return good
		})
		time.Sleep(time.Until(began.Add(idle))) // saying nothing is what is tested
		for _, c := range quiet {
			c.SetDeadline(time.Now().Add(patience))
			fmt.Fprint(c, "still here")
			if b := make([]byte, 10); !full(c, b) || string(b) != "still here" {
				t.Errorf("%q", b)
			}
		}
	})
}
