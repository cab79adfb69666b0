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
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// judge is a plugin that does what its blocks say. The test binary plays it.
type judge struct{ host *plugin.Host }

type judgeBlock struct {
	Deny []string      `hcl:"deny,optional"` // kinds
	Ask  []string      `hcl:"ask,optional"`  // kinds that `muxproxy allow` has to allow
	Keep time.Duration `hcl:"keep,optional"`
}

func (*judge) Describe() plugin.Info {
	return plugin.Info{
		Name: "judge", Version: "1", AsksPerson: true, Host: judgeBlock{}, Wants: plugin.Capabilities(),
		Verbs: []plugin.Verb{{Usage: "dial HOST ADDRESS", Doc: "say ping there"}, {Usage: "listen HOST ADDRESS", Doc: "answer one"}},
	}
}

func (j *judge) Configure(_ context.Context, c *plugin.Config) (problems plugin.Diagnostics) {
	j.host = c.Host
	for _, b := range c.Hosts {
		for i, kind := range b.Value.(*judgeBlock).Deny {
			if kind == "nonsense" {
				problems = append(problems, b.Errorf(plugin.Path{"deny", i}, "there is no kind %q", kind))
			}
		}
	}
	return problems
}

func (j *judge) Authorize(ctx context.Context, r *plugin.Request) plugin.Decision {
	b := r.Block.(*judgeBlock)
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
			"host \"*\" {\n  confrim {}\n}\n":                    "config.hcl:2:3: confrim: there is no muxproxy-plugin-confrim in ",
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

// What plugins do through the master, with the capability and without.
func TestAPluginActs(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		echo := func(network, address string) net.Listener {
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
						io.Copy(struct{ io.Writer }{c}, c)
						c.Close()
					}()
				}
			}()
			return l
		}
		tcp, unix := echo("tcp", "127.0.0.1:0").Addr().String(), echo("unix", w.path("echo.sock")).Addr().String()
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

// A master that is killed takes its plugins along.
func TestAKilledMasterTakesItsPluginsAlong(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		w.policy(judged("[]", ""))
		want(t, w.ssh("box", "true"), 0, "")
		pid := w.plugins()[0].PID
		kill9(w.mustStatus().PID)
		eventually(t, "the plugin is gone", func() bool { return gone(pid) })
		want(t, w.ssh("box", "echo again"), 0, "again\n")
	})
}
