//go:build linux

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// judge is a plugin that does what its blocks say. The test binary plays it.
type judge struct {
	first sync.Once // Configure, for host: a later one runs beside the hooks
	host  *plugin.Host
}

type judgeBlock struct {
	Deny []string      `hcl:"deny,optional"` // kinds
	Ask  []string      `hcl:"ask,optional"`  // kinds that `muxproxy allow` has to allow
	Keep time.Duration `hcl:"keep,optional"`
}

// name is the judge's, or that of one that misbehaves, as its executable is called.
func (*judge) name() string {
	if name := os.Getenv("E2E_PLUGIN"); name != "" {
		return name
	}
	return "judge"
}

func (j *judge) Describe() plugin.Info {
	return plugin.Info{
		Name: j.name(), Version: "1", AsksPerson: true, Host: judgeBlock{}, Wants: plugin.Capabilities(),
		Verbs: []plugin.Verb{{Usage: "dial HOST ADDRESS", Doc: "say ping there"}, {Usage: "listen HOST ADDRESS", Doc: "answer one"}},
	}
}

func (j *judge) Configure(_ context.Context, c *plugin.Config) (problems plugin.Diagnostics) {
	j.first.Do(func() { j.host = c.Host })
	for _, b := range c.Hosts {
		for i, kind := range b.Value.(*judgeBlock).Deny {
			switch kind {
			case "crash":
				os.Exit(3)
			case "nonsense":
				problems = append(problems, b.Errorf(plugin.Path{"deny", i}, "there is no kind %q", kind))
			}
		}
	}
	return problems
}

func (j *judge) Authorize(ctx context.Context, r *plugin.Request) plugin.Decision {
	b := r.Block.(*judgeBlock)
	if j.name() == "silent" {
		<-ctx.Done()
	}
	switch {
	case slices.Contains(b.Deny, r.Use.Kind):
		return plugin.Deny("no "+r.Use.Kind+" for "+r.Use.Target.String(), "ask the judge")
	case slices.Contains(b.Ask, r.Use.Kind):
		r.Waiting("run `muxproxy allow "+r.ID+"`", true)
		<-ctx.Done()
	}
	return plugin.NoOpinion()
}

func (j *judge) Retain(_ context.Context, i *plugin.Idle) time.Time {
	return time.Now().Add(i.Connection.Block.(*judgeBlock).Keep)
}

func (j *judge) Observe(ctx context.Context, e plugin.Event) {
	if j.name() == "stalled" {
		select {}
	}
	target := ""
	if e.Connection.ID != 0 {
		target = e.Connection.Target.String()
	}
	_ = j.host.Record(ctx, "saw", target, strings.Join(strings.Fields(e.Kind+" "+e.Use.Kind+" "+e.Result), " "))
}

func (j *judge) Command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) != 3 {
		fmt.Fprintln(stderr, "usage: judge dial|listen|notify HOST WHAT")
		return 2
	}
	if err := j.act(ctx, args[0], args[1], args[2], stdout); err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

func (j *judge) act(ctx context.Context, verb, host, what string, stdout io.Writer) error {
	c, err := j.host.Connect(ctx, host)
	if err != nil {
		return err
	}
	network := "tcp"
	if strings.HasPrefix(what, "/") {
		network = "unix"
	}
	switch verb {
	case "dial":
		s, err := j.host.Dial(ctx, c.ID, network, what)
		if err != nil {
			return err
		}
		defer s.Close()
		fmt.Fprint(s, "ping")
		s.CloseWrite()
		_, err = io.Copy(stdout, s)
		return err
	case "handover":
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer l.Close()
		near, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return err
		}
		defer near.Close()
		far, err := l.Accept()
		if err != nil {
			return err
		}
		carried, err := j.host.HandOver(ctx, plugin.Handover{
			Connection: c.ID, Network: network, Address: what, Data: []byte("ping "), PID: os.Getpid(), Origin: near.LocalAddr().String(),
		}, far.(*net.TCPConn))
		far.Close()
		if err != nil {
			return err
		}
		fmt.Fprint(near, "pong")
		near.(*net.TCPConn).CloseWrite()
		_, err = io.Copy(stdout, near)
		carried.Wait()
		return err
	case "listen":
		l, err := j.host.Listen(ctx, c.ID, network, what)
		if err != nil {
			return err
		}
		defer l.Close()
		fmt.Fprintln(stdout, l.Addr())
		s, err := l.Accept()
		if err != nil {
			return err
		}
		defer s.Close()
		_, err = io.Copy(struct{ io.Writer }{s}, s)
		return err
	case "notify":
		return j.host.Notify(ctx, c.ID, what)
	case "close":
		return j.host.Close(ctx, c.ID)
	}
	return fmt.Errorf("no verb %q", verb)
}

// judgedFor is judged for other hosts.
func judgedFor(hosts, may, block string) string {
	return strings.Replace(judged(may, block), `"127.0.0.1"`, hosts, 1)
}

// judged is a policy with the judge, whose capabilities and block are given.
func judged(may, block string) string {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf("plugin \"judge\" {\n  path = %q\n  may = %s\n}\nhost \"127.0.0.1\" {\n  judge {\n%s\n  }\n}\n", exe, may, block)
}

// plugins returns what `muxproxy plugin list` shows.
func (w *world) plugins() (list []struct {
	Name, State, Error string
	PID                int
}) {
	w.t.Helper()
	r := w.mux("plugin", "list", "--json")
	if err := json.Unmarshal([]byte(r.out), &list); r.status != 0 || err != nil {
		w.t.Fatalf("plugin list: %+v, %v", r, err)
	}
	return list
}

func TestAPluginJudges(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy("")
		want(t, w.ssh("box", "true"), 0, "")
		if kids := children(w.mustStatus().PID); len(kids) > 0 {
			t.Errorf("no plugin is mentioned, and %v runs", kids)
		}
		w.reload(judged("[]", `    deny = ["shell", "local-forward"]`))
		want(t, w.ssh("box", "echo yes"), 0, "yes\n")
		r := w.ssh("box")
		if want(t, r, 255, ""); !strings.Contains(r.err, "denied by judge: no shell for "+me+"@127.0.0.1:") ||
			!strings.Contains(r.err, "; ask the judge") {
			t.Errorf("stderr %q", r.err)
		}
		w.audited("deny shell judge")
		if r := w.ssh("-W", "127.0.0.1:1", "box"); r.status != 255 || !strings.Contains(r.err, "denied by judge") {
			t.Errorf("-W: %+v", r)
		}

		// A crash denies until the plugin is back.
		p := w.plugins()[0]
		if p.State != "up" {
			t.Fatalf("%+v", p)
		}
		kill9(p.PID)
		eventually(t, "the crash is noticed", func() bool { return w.plugins()[0].PID != p.PID })
		eventually(t, "the plugin is back, and judges", func() bool {
			r := w.ssh("box", "echo back")
			if r.status != 0 && !strings.Contains(r.err, "denied by judge: the plugin failed") {
				t.Errorf("%+v", r)
			}
			return r.out == "back\n"
		})
		if r := w.ssh("box"); !strings.Contains(r.err, "denied by judge: no shell") {
			t.Errorf("after the crash: %+v", r)
		}

		// What a bad file says changes nothing, and is said with its place.
		for text, line := range map[string]string{
			judged("[]", `    dney = ["exec"]`):                  `config.hcl:7:5: unknown attribute "dney" in judge; did you mean "deny"?`,
			judged("[]", `    deny = ["nonsense"]`):              `config.hcl:7:13: judge: there is no kind "nonsense"`,
			"plugin \"gone\" {\n  path = \"/no/such/file\"\n}\n": "config.hcl:1:1: gone: ",
			"host \"*\" {\n  confrim {}\n}\n":                    `config.hcl:2:3: confrim: did you mean "confirm"? there is no muxproxy-plugin-confrim in `,
		} {
			w.policy(text)
			if r := w.mux("master", "reload"); r.status != 1 || !strings.Contains(r.err, line) {
				t.Errorf("%s\nstatus %d: %q", text, r.status, r.err)
			}
		}
		if r := w.ssh("box"); !strings.Contains(r.err, "denied by judge: no shell") {
			t.Errorf("after bad files: %+v", r)
		}
		w.reload("")
		want(t, w.ssh("box", "true"), 0, "")
		eventually(t, "the plugin ends when the policy does not mention it", func() bool {
			return len(children(w.mustStatus().PID)) == 0
		})
	})
}

// A file that is not the one that policy has the checksum of is not run, and a plugin that can't run denies what its
// block covers and nothing else.
func TestAPluginThatIsNotTheRightFile(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		text := judged("[]", "    when = use.kind == \"shell\"")
		w.policy(strings.Replace(text, "  may", fmt.Sprintf("  sha256 = \"%064x\"\n  may", 1), 1))
		r := w.ssh("box")
		if want(t, r, 255, ""); !strings.Contains(r.err, "denied by judge: the plugin failed: ") {
			t.Errorf("stderr %q", r.err)
		}
		want(t, w.ssh("box", "echo others"), 0, "others\n")
		if log := w.masterLog(); !strings.Contains(log, "config.hcl:1:1: judge: ") {
			t.Error("the log does not say where")
		}
		if r := w.mux("explain", "127.0.0.1"); r.status == 0 {
			t.Errorf("explain: %+v", r)
		}
		f, err := os.Open(exe)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			t.Fatal(err)
		}
		w.reload(strings.Replace(text, "  may", fmt.Sprintf("  sha256 = \"%x\"\n  may", h.Sum(nil)), 1))
		if p := w.plugins(); len(p) != 1 || p[0].State != "up" {
			t.Errorf("%+v", p)
		}
	})
}

// What waits for a person is on the terminal of whoever asked, and in `muxproxy pending`.
func TestAPluginWaits(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		w.policy(judged("[]", `    ask = ["exec"]`))
		for _, answer := range []string{"allow", "deny"} {
			p := w.sshStart("box", "echo done")
			p.expectErr("judge: run `muxproxy allow ")
			var list []struct{ ID, Plugin, Kind, Message string }
			if r := w.mux("pending", "--json"); json.Unmarshal([]byte(r.out), &list) != nil || len(list) != 1 {
				t.Fatalf("pending: %+v", r)
			}
			if list[0].Plugin != "judge" || list[0].Kind != "exec" || !strings.Contains(list[0].Message, list[0].ID) {
				t.Errorf("%+v", list[0])
			}
			if r := w.mux(answer, list[0].ID); r.status != 0 {
				t.Errorf("%s: %+v", answer, r)
			}
			p.in.Close()
			r := p.wait(patience)
			if answer == "allow" {
				want(t, r, 0, "done\n")
			} else if want(t, r, 255, ""); !strings.Contains(r.err, "denied by judge: denied by `muxproxy deny`") {
				t.Errorf("stderr %q", r.err)
			}
		}
		// The answer is a use, too.
		w.reload(judged("[]", `    ask = ["exec"]`) + "host \"127.0.0.1\" {\n  deny {\n    when   = use.name == \"allow\"\n    reason = \"not by you\"\n  }\n}\n")
		q := w.sshStart("box", "echo done")
		q.expectErr("judge: run `muxproxy allow ")
		var list []struct{ ID string }
		if r := w.mux("pending", "--json"); json.Unmarshal([]byte(r.out), &list) != nil || len(list) != 1 {
			t.Fatalf("pending: %+v", r)
		}
		if r := w.mux("allow", list[0].ID); r.status != 255 || !strings.Contains(r.err, "denied by policy: not by you") {
			t.Errorf("allow: %+v", r)
		}
		if r := w.mux("deny", list[0].ID); r.status != 0 {
			t.Errorf("deny: %+v", r)
		}
		q.in.Close()
		want(t, q.wait(patience), 255, "")
		w.reload(judged("[]", `    ask = ["exec"]`))
		// Who leaves is waited for no more.
		p := w.sshStart("box", "true")
		p.expectErr("judge: run `muxproxy allow ")
		p.signal(syscall.SIGKILL)
		p.wait(patience)
		eventually(t, "nothing waits", func() bool { return strings.TrimSpace(w.mux("pending", "--json").out) == "[]" })
	})
}

// Connections stay as a plugin says, and a new policy counts for those that stay already.
func TestAPluginKeepsConnections(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy(judged(`["observe"]`, `    keep = "1h"`))
		for range 3 {
			want(t, w.ssh("box", "true"), 0, "")
		}
		w.connections(1)
		if s := w.mustStatus(); len(s.Upstreams) != 1 {
			t.Fatalf("%+v", s)
		}
		w.reload(judged(`["observe"]`, `    keep = "0s"`))
		eventually(t, "the connection has ended", func() bool { return len(w.mustStatus().Upstreams) == 0 })
		want(t, w.ssh("box", "true"), 0, "")
		w.connections(2)
		saw := []string{"up", "decision attach", "decision exec", "end exec exit", "end attach closed", "down closed"}
		if !within(5*time.Second, func() bool {
			log := w.read(w.state + "/muxproxy/audit.log")
			return !slices.ContainsFunc(saw, func(s string) bool {
				return !strings.Contains(log, fmt.Sprintf(`"plugin":"judge","event":"saw","target":"%s@127.0.0.1:%d","detail":%q`, me, w.link.port(), s)) &&
					!strings.Contains(log, fmt.Sprintf(`"plugin":"judge","event":"saw","detail":%q`, s))
			})
		}) {
			t.Errorf("%s", w.read(w.state+"/muxproxy/audit.log"))
		}
		if r := w.mux("lock"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		eventually(t, "it sees the lock", func() bool {
			return strings.Contains(w.read(w.state+"/muxproxy/audit.log"), `"event":"saw","detail":"locked"`)
		})
	})
}

// echo is the address of a server that sends back what it gets. It ends with the test.
func (w *world) echo(network, address string) string {
	w.t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(struct{ io.Writer }{c}, c)
				c.Close()
			}()
		}
	}()
	return l.Addr().String()
}

// half is the address of a server that sends half of an answer and no more.
func (w *world) half() string {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	w.t.Cleanup(func() {
		close(done)
		l.Close()
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				fmt.Fprint(c, "half")
				<-done
				c.Close()
			}()
		}
	}()
	return l.Addr().String()
}

// What plugins do through the master, with the capability and without.
func TestAPluginActs(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		tcp, unix := w.echo("tcp", "127.0.0.1:0"), w.echo("unix", w.path("echo.sock"))
		config := "master {\n  ssh_config = \"" + w.conf + "\"\n}\n"
		w.policy(config + judged(`["connect", "dial", "listen", "notify", "close"]`, ""))
		if r := w.mux("master", "start"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		want(t, w.mux("judge", "dial", "box", tcp), 0, "ping")
		want(t, w.mux("judge", "dial", "box", unix), 0, "ping")
		w.audited("allow local-forward")
		if r := w.mux("judge", "dial", "box", "127.0.0.1:1"); r.status != 1 || !strings.Contains(r.err, "refused by the server: ") {
			t.Errorf("%+v", r)
		}
		if r := w.mux("judge", "dial", "elsewhere.invalid", tcp); r.status != 1 || !strings.Contains(r.err, "has no block of judge") {
			t.Errorf("%+v", r)
		}
		if r := w.mux("judge"); r.status != 2 || !strings.HasPrefix(r.err, "usage: ") {
			t.Errorf("%+v", r)
		}
		w.connections(1)

		p := w.start(spec{args: []string{binDir + "/muxproxy", "judge", "listen", "box", "127.0.0.1:0"}})
		address, ok := p.out.expect("\n", patience)
		if !ok {
			t.Fatalf("no address: %s", p.err)
		}
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		fmt.Fprint(c, "from over there")
		c.(*net.TCPConn).CloseWrite()
		if got, err := io.ReadAll(c); err != nil || string(got) != "from over there" {
			t.Errorf("%q, %v", got, err)
		}
		c.Close()
		if r := p.wait(patience); r.status != 0 {
			t.Errorf("%+v", r)
		}
		w.audited("allow remote-forward")

		held := w.hold()
		want(t, w.mux("judge", "notify", "box", "mind\x1b the gap"), 0, "")
		held.expectErr(`muxproxy: judge: mind\x1b the gap`)
		want(t, w.mux("judge", "close", "box", "now"), 0, "")
		held.expectErr("closed by the plugin judge")
		held.wait(patience)

		w.reload(config + judged("[]", ""))
		if r := w.mux("judge", "dial", "box", tcp); r.status != 1 || !strings.Contains(r.err, `policy has to say may = ["connect"]`) {
			t.Errorf("%+v", r)
		}
		w.reload(config + judged(`["connect", "dial"]`, `    deny = ["local-forward"]`))
		if r := w.mux("judge", "dial", "box", tcp); r.status != 1 || !strings.Contains(r.err, "denied: denied by judge: no local-forward") {
			t.Errorf("%+v", r)
		}
	})
}

// What a plugin has the master do is judged as the plugin's, and goes the way that a client's would.
func TestWhatAPluginDoesIsJudged(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		h := newHops(w, 3)
		port := strings.Fields(strings.SplitN(h.lines[2], "Port ", 2)[1])[0]
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		echo := w.echo("tcp", "127.0.0.1:0")
		config := func(more string) string {
			return "master {\n  ssh_config = \"" + h.config("via.conf", nil) + "\"\n}\n" +
				judged(`["connect", "dial", "listen", "close"]`, "") + fmt.Sprintf(
				"host \"127.0.0.1\" {\n  via = host.port == %s ? [\"hop1\", \"hop2\"] : []\n%s\n}\n", port, more)
		}
		w.policy(config(""))
		if r := w.mux("master", "start"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		want(t, w.mux("judge", "dial", "hop3", echo), 0, "ping")
		h.count(1, 1, 1) // not around the jump hosts
		for what, c := range map[string]struct{ lines, why string }{
			"not shared": {"share = host.port != " + port, "connections to 127.0.0.1:" + port + " are not shared"},
			"a jump": {"deny {\n when = use.kind == \"jump\" && use.port == " + port + "\n reason = \"no way\"\n}",
				"denied by policy: no way"},
			"the caller": {fmt.Sprintf("deny {\n when = client.exe == %q && use.kind == \"attach\"\n reason = \"no plugins\"\n}", exe),
				"denied by policy: no plugins"},
		} {
			w.reload(config(""))
			want(t, w.mux("judge", "close", "hop3", "now"), 0, "")
			w.reload(config(c.lines))
			if r := w.mux("judge", "dial", "hop3", echo); r.status != 1 || !strings.Contains(r.err, c.why) {
				t.Errorf("%s: %+v", what, r)
			}
		}
		w.reload(config(""))

		// What is cut off does not look complete.
		want(t, w.mux("judge", "handover", "hop1", echo), 0, "ping pong")
		half := w.half()
		cut := w.start(spec{args: []string{binDir + "/muxproxy", "judge", "handover", "hop1", half}})
		if _, ok := cut.out.expect("half", patience); !ok {
			t.Fatalf("nothing comes: %s", cut.err)
		}
		h.links[0].cut()
		if r := cut.wait(patience); r.status != 1 || !strings.Contains(r.err, "connection reset by peer") {
			t.Errorf("cut off: %+v", r)
		}

		// The lock stops new connections of a standing forward.
		p := w.start(spec{args: []string{binDir + "/muxproxy", "judge", "listen", "hop1", "127.0.0.1:0"}})
		address, ok := p.out.expect("\n", patience)
		if !ok {
			t.Fatalf("no address: %s", p.err)
		}
		say := func() string {
			t.Helper()
			c, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			fmt.Fprint(c, "hello")
			c.(*net.TCPConn).CloseWrite()
			got, _ := io.ReadAll(c) // the lock's refusal can be a reset
			return string(got)
		}
		if r := w.mux("lock"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		if got := say(); got != "" {
			t.Errorf("locked: %q", got)
		}
		if r := w.mux("judge", "dial", "hop1", echo); r.status == 0 || !strings.Contains(r.err, "denied by lock") {
			t.Errorf("locked: %+v", r)
		}
		if r := w.mux("judge"); r.status != 255 || !strings.Contains(r.err, "denied by lock") {
			t.Errorf("a plugin's command, locked: %+v", r)
		}
		if r := w.mux("unlock"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		if got := say(); got != "hello" {
			t.Errorf("unlocked: %q", got)
		}
		if r := p.wait(patience); r.status != 0 {
			t.Errorf("%+v", r)
		}
		want(t, w.mux("judge", "dial", "hop2", echo), 0, "ping")
		eventually(t, "nothing holds the connections any more", func() bool { return len(w.mustStatus().Upstreams) == 0 })
	})
}

// A master that is killed takes its plugins along.
func TestAKilledMasterTakesItsPluginsAlong(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		// One that is being started has no life line that it looks at.
		script := w.script("mute", "#!/bin/sh\nexec sleep 3600\n")
		w.policy("plugin \"mute\" {\n  path = \"" + script + "\"\n}\n" + judged("[]", ""))
		want(t, w.ssh("box", "true"), 0, "")
		pid, master := 0, w.mustStatus().PID
		for _, p := range w.plugins() {
			if p.Name == "judge" {
				pid = p.PID
			}
		}
		mute := 0
		eventually(t, "the mute one is tried again", func() bool {
			mute = w.sleeper(master)
			return mute != 0
		})
		kill9(master)
		eventually(t, "the plugins are gone", func() bool { return pid != 0 && gone(pid) && gone(mute) })
		w.policy("")
		want(t, w.ssh("box", "echo again"), 0, "again\n")
	})
}

// The examples do their job.
func TestTheExamples(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		dir := w.path("home/.local/share/muxproxy/plugins")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{
			{"go", "build", "-buildvcs=false", "-o", dir + "/muxproxy-plugin-officehours", "../examples/officehours"},
			{"../examples/auditlog/generate", dir},
			{"install", "-m", "755", "../examples/auditlog/muxproxy-plugin-auditlog", dir},
		} {
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%q: %v\n%s", args, err, out)
			}
		}
		from, to := "13:00", "14:00"
		if time.Now().Hour() >= 12 {
			from, to = "01:00", "02:00"
		}
		w.policy(fmt.Sprintf(`
plugin "auditlog" {
  may  = ["observe"]
  file = %q
}
host "127.0.0.1" {
  officehours {
    from  = %q
    to    = %q
    kinds = ["shell"]
  }
  auditlog {}
}
`, w.path("uses.jsonl"), from, to))
		if r := w.mux("config", "check"); r.status != 0 {
			t.Errorf("config check: %+v", r)
		}
		want(t, w.ssh("box", "echo a command"), 0, "a command\n")
		r := w.ssh("box")
		if want(t, r, 255, ""); !strings.Contains(r.err, "denied by officehours: it is ") ||
			!strings.Contains(r.err, "; come back between "+from+" and "+to) {
			t.Errorf("stderr %q", r.err)
		}
		for _, p := range w.plugins() {
			if p.State != "up" {
				t.Errorf("%+v", p)
			}
		}
		type line struct {
			Event, Use, Host, User, Program, By, Result string
			Allowed                                     bool
		}
		wanted := []line{
			{Event: "decision", Use: "exec", Host: "127.0.0.1", User: me, Program: "echo", Allowed: true},
			{Event: "end", Use: "exec", Host: "127.0.0.1", User: me, Program: "echo", Result: "exit"},
			{Event: "decision", Use: "shell", Host: "127.0.0.1", User: me, By: "officehours"},
		}
		eventually(t, "the uses are in the file", func() bool {
			b, err := os.ReadFile(w.path("uses.jsonl"))
			if err != nil {
				t.Fatal(err)
			}
			missing := slices.Clone(wanted)
			for text := range strings.Lines(string(b)) {
				var l line
				if json.Unmarshal([]byte(text), &l) != nil {
					return false // it is still being written
				}
				missing = slices.DeleteFunc(missing, func(o line) bool { return o == l })
			}
			return len(missing) == 0
		})
		if r := w.mux("auditlog", "1"); r.status != 0 || strings.Count(r.out, "\n") != 1 || !strings.HasPrefix(r.out, `{"time": "`) {
			t.Errorf("muxproxy auditlog: %+v", r)
		}
		want(t, w.mux("auditlog", "many"), 2, "")
		w.policy(strings.Replace(w.read("config/muxproxy/config.hcl"), `to    = "`+to, `to    = "00:30`, 1))
		if r := w.mux("master", "reload"); r.status != 1 ||
			!strings.Contains(r.err, `config.hcl:9:13: officehours: the day is over at 00:30, before it begins at `+from) {
			t.Errorf("reload: %+v", r)
		}
	})
}

// A master that drains and the one after it have plugins each, and neither is in the other's way.
func TestTwoMastersHavePlugins(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		config := "master {\n  ssh_config = \"" + w.conf + "\"\n}\n" + judged(`["connect", "dial"]`, `    deny = ["shell"]`)
		w.policy(config)
		echo := w.echo("tcp", "127.0.0.1:0")
		held := w.hold()
		old := w.mustStatus().PID
		if r := w.mux("master", "stop", "--drain"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		want(t, w.ssh("box", "echo next"), 0, "next\n")
		if w.mustStatus().PID == old {
			t.Fatal("no other master has come")
		}
		judges := func(when string) {
			t.Helper()
			if r := w.ssh("box"); r.status != 255 || !strings.Contains(r.err, "denied by judge: no shell") {
				t.Errorf("%s: %+v", when, r)
			}
			want(t, w.mux("judge", "dial", "box", echo), 0, "ping")
		}
		judges("beside the old master")
		held.release()
		eventually(t, "the old master has ended", func() bool { return gone(old) })
		judges("after the old master")
		p := w.plugins()[0]
		if p.State != "up" {
			t.Fatalf("%+v", p)
		}
		kill9(p.PID)
		eventually(t, "the plugin is started again", func() bool { q := w.plugins()[0]; return q.State == "up" && q.PID != p.PID })
		judges("after a crash")
	})
}

// sleeper is a sleep(1) that a master has started; 0: none.
func (w *world) sleeper(master int) int {
	for _, child := range children(master) {
		if args := processes()[child]; len(args) > 0 && args[0] == "sleep" {
			return child
		}
	}
	return 0
}

// A plugin that can't be started, or does not take its configuration, denies what its blocks cover. It keeps no master
// from starting, nor from being told what to do, and is tried again.
func TestAPluginThatDoesNotStart(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		script := w.script("mute", "#!/bin/sh\nexec sleep 3600\n")
		policy := judgedFor(`"127.0.0.1"`, "[]", `    when = use.kind == "shell"`)
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		unanswered := strings.Replace(policy, exe, script, 1)
		// Another one has its job, and goes on with it.
		w.policy("plugin \"mute\" {\n  path = \"" + script + "\"\n}\n" + judged("[]", `    deny = ["shell"]`))
		if r := w.ssh("box"); r.status != 255 || !strings.Contains(r.err, "denied by judge: no shell") {
			t.Errorf("beside one that does not answer: %+v", r)
		}
		if r := w.mux("master", "stop"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		for what, text := range map[string]string{
			"no answer": unanswered, "a crash in Configure": strings.Replace(policy, "when", `deny = ["crash"]`+"\n when", 1),
		} {
			w.policy(text)
			if r := w.ssh("box", "echo others"); r.status != 0 || r.out != "others\n" {
				t.Errorf("%s: others: %+v", what, r)
			}
			if r := w.ssh("box"); r.status != 255 || !strings.Contains(r.err, "denied by judge: the plugin failed") {
				t.Errorf("%s: %+v", what, r)
			}
			if r := w.mux("master", "stop"); r.status != 0 {
				t.Fatalf("%s: %+v", what, r)
			}
		}
		// It covers all hosts, also the one that commands without a host are about.
		w.policy(strings.Replace(judgedFor(`"*"`, "[]", ""), exe, script, 1))
		if r := w.ssh("box", "true"); r.status != 255 || !strings.Contains(r.err, "denied by judge: the plugin failed") {
			t.Errorf("%+v", r)
		}
		mute, master := 0, w.mustStatus().PID
		eventually(t, "it is tried again", func() bool {
			mute = w.sleeper(master)
			return mute != 0
		})
		w.policy(judgedFor(`"*"`, "[]", ""))
		if r := w.mux("master", "reload"); r.status != 0 || r.took > 5*time.Second {
			t.Errorf("a reload waits for a plugin that does not answer: %+v", r)
		}
		if !gone(mute) {
			t.Error("it is still being tried")
		}
		want(t, w.ssh("box", "echo better"), 0, "better\n")
		if r := w.mux("master", "stop"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		// The executable comes later; nobody has to say so.
		late := w.path("late")
		w.policy(strings.Replace(judgedFor(`"*"`, "[]", ""), exe, late, 1))
		if r := w.ssh("box", "true"); r.status != 255 {
			t.Errorf("%+v", r)
		}
		if err := os.Symlink(exe, late); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the plugin is there, and judges", func() bool { return w.ssh("box", "true").status == 0 })
	})
}

// Plugins that misbehave, each in its way, harm nobody but the uses that they judge, and nothing is left of them.
func TestMisbehavedPlugins(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		dir := w.path("home/.local/share/muxproxy/plugins")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		play := func(name, before string) {
			script := fmt.Sprintf("#!/bin/sh\n%s\nE2E_PLUGIN=%s exec %s\n", before, name, exe)
			if err := writeProgram(dir+"/muxproxy-plugin-"+name, []byte(script)); err != nil {
				t.Fatal(err)
			}
		}
		play("silent", "")
		play("stalled", "")
		play("junk", `printf '{"@message": 1}\n{"level":"panic","message":"bye"}\n\000\377\n' >&2; head -c 100000 /dev/zero >&2`)
		play("forks", "sleep 3600 & sleep 3600 &")
		play("crashes", "")
		play("mute", "exec sleep 3600")
		play("garbage", "echo hello; exec sleep 3600")
		play("wrong", "echo '1|99|unix|/nowhere|grpc'; exec sleep 3600")
		play("stubborn", "trap '' TERM INT HUP; sh -c 'trap \"\" TERM INT HUP; sleep 3600' &")
		w.policy(`plugin "stalled" {
  may = ["observe"]
}
host "127.0.0.1" {
  silent { when = use.kind == "shell" }
  stalled {}
  junk {}
  forks {}
  stubborn {}
  crashes {
    deny = ["crash"]
    when = use.kind == "subsystem"
  }
  mute { when = use.kind == "local-forward" }
  garbage { when = use.kind == "local-forward" }
  wrong { when = use.kind == "local-forward" }
}
`)
		held := w.hold()
		master := w.mustStatus().PID
		group := map[int]bool{}
		for _, p := range w.plugins() {
			if p.PID > 0 {
				group[p.PID] = true
			}
		}
		fds := len(w.fds(master))
		for range 3 {
			want(t, w.ssh("box", "echo others"), 0, "others\n")
		}
		for use, by := range map[string]string{"": "silent", "-W127.0.0.1:1": "garbage", "-s": "crashes"} {
			args := []string{"box"}
			switch use {
			case "-s":
				args = []string{"-s", "box", "sftp"}
			case "":
			default:
				args = []string{use, "box"}
			}
			if r := w.ssh(args...); r.status != 255 || !strings.Contains(r.err, "denied by ") || !strings.Contains(r.err, "the plugin failed") {
				t.Errorf("%s: %+v", by, r)
			}
		}
		held.echo("lives on")
		held.release()
		for _, line := range []string{"config.hcl:16:3: wrong: ", "speaks version 99 of the plugin protocol"} {
			if !strings.Contains(w.masterLog(), line) {
				t.Errorf("the log has no %q", line)
			}
		}
		eventually(t, "between two tries to start some of them the master has no more descriptors than before", func() bool {
			return len(w.fds(master)) <= fds
		})
		if r := w.mux("master", "stop"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		eventually(t, "the master has ended", func() bool { return gone(master) })
		eventually(t, "no process of a plugin is left", func() bool {
			for pid := range processes() {
				if id, err := unix.Getsid(pid); err == nil && group[id] {
					return false
				}
			}
			return true
		})
		if left, _ := filepath.Glob(w.path("run/muxproxy/plugins*")); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}
