package pluginhost

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/zclconf/go-cty/cty"
	"go.uber.org/goleak"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// syncBuffer is a log that many write to.
type syncBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// world is a Manager with a fake master.
type world struct {
	t       testing.TB
	m       *Manager
	log     *syncBuffer
	backend *fakeBackend
	dir     string
}

// newWorld makes a Manager, and looks after its end that nothing is left of it: no goroutine, descriptor or file.
func newWorld(t testing.TB, timing Timing) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "mp") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, log: &syncBuffer{}, backend: &fakeBackend{}, dir: dir}
	if timing.Backoff == 0 {
		timing.Backoff, timing.Stable = 10*time.Millisecond, 1
	}
	if timing.First == 0 {
		timing.First = 20 * time.Second // the machine may be busy
	}
	before := fds(t)
	w.m = New(Options{
		Dir: func() string { return dir }, State: filepath.Join(dir, "state"), Backend: w.backend, Timing: timing, Env: []string{"PATH=" + os.Getenv("PATH")},
		Log: zerolog.New(w.log),
	})
	t.Cleanup(func() {
		w.m.Close()
		w.backend.closeAll()
		w.m.Wait()
		if t.Failed() {
			t.Logf("log:\n%s", w.log)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 && !(len(left) == 1 && filepath.Base(left[0]) == "state") {
			t.Errorf("left behind: %q", left)
		}
		goleak.VerifyNone(t, goleak.IgnoreAnyFunction("github.com/muxproxy/muxproxy/core/plugin/pluginrun.init.func1.1"),
			goleak.IgnoreCurrent())
		if after := fds(t); after > before+1 { // the runtime's own may come with the first wait
			t.Errorf("%d descriptors, %d before", after, before)
		}
	})
	return w
}

func fds(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// spec is a plugin that this binary plays.
func spec(t testing.TB, name, mode string) Plugin {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(exe, 0o755); err != nil { // whatever the umask was
		t.Fatal(err)
	}
	return Plugin{Name: name, Path: exe, Args: strings.TrimSpace(name + " " + mode), Pos: "config.hcl:3"}
}

// block is a host block of a plugin for a host of that name.
func block(plugin, host, do string) Block {
	return Block{ID: plugin + "/" + host, Plugin: plugin, Value: cty.ObjectVal(map[string]cty.Value{"do": cty.StringVal(do)})}
}

// hosts looks blocks up by the target's host.
type hosts map[string]bool

func (h hosts) Block(plugin string, u use.Use) (string, *use.Denied) {
	if id := plugin + "/" + u.Target.Host; h[id] {
		return id, nil
	}
	return "", nil
}

func (h hosts) Deny(u use.Use) *use.Denied {
	if h["deny/"+u.Target.Host] {
		return &use.Denied{By: "policy", Reason: "no"}
	}
	return nil
}

func (h hosts) Covers(plugin string, t use.Target) bool { return h[plugin+"/"+t.Host] }

func lookupOf(blocks []Block) hosts {
	h := hosts{}
	for _, b := range blocks {
		h[b.ID] = true
	}
	return h
}

// run puts plugins and blocks in force.
func (w *world) run(specs []Plugin, blocks ...Block) {
	w.t.Helper()
	set, problems := w.m.Prepare(w.t.Context(), specs)
	for _, p := range problems {
		if !p.Warning {
			w.t.Fatal(p.Error())
		}
	}
	if problems := set.Apply(w.t.Context(), blocks, lookupOf(blocks), specs, false, nil); len(problems) > 0 {
		w.t.Fatal(problems)
	}
	w.m.InForce()
}

func target(host string) use.Target { return use.Target{User: "u", Host: host, Port: 22} }

func (w *world) check(kind use.Kind, host string) *use.Denied {
	return w.m.Check(w.t.Context(), use.Use{Kind: kind, Target: target(host), Command: "ls -l"}, nil)
}

// Every kind of use, with every way in which plugins can answer or not.
func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name     string
		do       map[string]string // by plugin
		timing   Timing
		allow    bool   // on_failure = "allow"
		want     string // in the denial; "": allowed
		restarts bool
	}{
		{name: "allow", do: map[string]string{"a": "allow"}},
		{name: "no opinion", do: map[string]string{"a": "pass"}},
		{name: "deny", do: map[string]string{"a": "deny"}, want: `denied by a: not KIND\x1b[2J; ask later`},
		{name: "two disagree", do: map[string]string{"a": "allow", "b": "deny"}, want: "denied by b: not KIND"},
		{name: "two disagree, the other way round", do: map[string]string{"a": "deny", "b": "allow"}, want: "denied by a"},
		{name: "a person's no after a plugin's yes", do: map[string]string{"a": "allow", "ask": "deny"}, want: "denied by ask"},
		{name: "a plugin's no before a person is asked", do: map[string]string{"ask": "wait", "b": "deny"}, want: "denied by b"},
		{name: "no block", do: map[string]string{}},
		{name: "an answer that is none", do: map[string]string{"a": "none"}, want: "the plugin failed: it gives an answer that is none"},
		{name: "no answer in time", do: map[string]string{"a": "silent"}, timing: Timing{First: 100 * time.Millisecond},
			want: "the plugin failed: it does not answer in time"},
		{name: "no answer in time, allowed", do: map[string]string{"a": "silent"}, timing: Timing{First: 100 * time.Millisecond}, allow: true},
		{name: "no heartbeat", do: map[string]string{"ask": "wait"}, timing: Timing{Heartbeat: 100 * time.Millisecond},
			want: "the plugin failed: it does not answer in time"},
		{name: "crash", do: map[string]string{"a": "crash"}, want: "the plugin failed: it ", restarts: true},
		{name: "crash, allowed", do: map[string]string{"a": "crash"}, allow: true, restarts: true},
		{name: "one fails, another allows", do: map[string]string{"a": "none", "b": "allow"}, want: "denied by a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.timing)
			var specs []Plugin
			var blocks []Block
			for _, name := range []string{"a", "b", "ask"} {
				if do, ok := c.do[name]; ok || len(c.do) == 0 && name == "a" {
					s := spec(t, name, "")
					s.AllowOnFailure = c.allow
					specs = append(specs, s)
					if ok {
						blocks = append(blocks, block(name, "h", do))
					}
				}
			}
			w.run(specs, blocks...)
			for _, kind := range use.Kinds() {
				var was *instance
				if c.restarts {
					was, _ = w.m.set().find("a").up()
				}
				d := w.check(kind, "h")
				want := strings.ReplaceAll(c.want, "KIND", string(kind))
				if kind == use.CancelForward && (strings.Contains(want, "the plugin failed") || c.name == "one fails, another allows") {
					want = "" // it only takes away
				}
				if (d == nil) != (want == "") || d != nil && !strings.Contains(d.Error(), want) {
					t.Errorf("%s: %v, want %q", kind, d, want)
				}
				if c.restarts {
					w.upAgain("a", was)
				}
			}
			if d := w.check(use.Exec, "other"); d != nil {
				t.Errorf("a host without a block: %v", d)
			}
		})
	}
}

// upAgain waits until a plugin that crashed can be asked again.
func (w *world) upAgain(name string, crashed *instance) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	p := w.m.set().find(name)
	if p.await(ctx, crashed) == nil {
		w.t.Fatalf("%s does not come up again", name)
	}
}

// A plugin that does not run: what policy says counts, and a plugin that was never described counts as one that judges.
func TestAway(t *testing.T) {
	w := newWorld(t, Timing{Backoff: time.Hour})
	away, missing := spec(t, "a", ""), spec(t, "gone", "")
	missing.Path = filepath.Join(w.dir, "nothing")
	specs := []Plugin{away, missing}
	set, problems := w.m.Prepare(t.Context(), specs)
	if len(problems) != 2 || problems[0].Warning == problems[1].Warning {
		t.Fatalf("%v", problems)
	}
	blocks := []Block{block("a", "h", "allow"), block("gone", "g", "allow")}
	if problems := set.Apply(t.Context(), blocks, lookupOf(blocks), specs, true, nil); len(problems) > 0 {
		t.Fatal(problems)
	}
	p := set.find("a")
	inst, _ := p.up()
	inst.Kill()
	<-inst.Done()
	for {
		if _, why := p.up(); why != "" {
			break
		}
		time.Sleep(time.Millisecond) // polling: supervise has no event for "not up"
	}
	for _, kind := range use.Kinds() {
		if kind == use.CancelForward {
			continue
		}
		if d := w.check(kind, "h"); d == nil || !strings.Contains(d.Error(), "denied by a: the plugin failed: it does not run: it crashed: signal: killed") {
			t.Errorf("%s: %v", kind, d)
		}
		if d := w.check(kind, "g"); d == nil || !strings.Contains(d.Error(), "denied by gone") {
			t.Errorf("%s: %v", kind, d)
		}
	}
	// What a person does about it, or what only takes away, waits for no plugin.
	for _, verb := range []string{"reload", "unlock", "close", "stop", "forward remove"} {
		if d := w.m.Check(t.Context(), use.Use{Kind: use.Control, Name: verb, Target: target("h")}, nil); d != nil {
			t.Errorf("%s: %v", verb, d)
		}
	}
	if d := w.m.Check(t.Context(), use.Use{Kind: use.CancelForward, Target: target("h")}, nil); d != nil {
		t.Error(d)
	}
	if until := w.m.Retain(shortly(t), conn(1, "h")); !until.IsZero() {
		t.Errorf("kept until %v without the plugin", until)
	}
	var states []string
	for _, s := range w.m.List() {
		states = append(states, s.Name+" "+s.State)
	}
	if got := strings.Join(states, ", "); got != "a restarting, gone failed" {
		t.Errorf("plugin list: %s", got)
	}
}

func shortly(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func conn(id uint64, host string) pool.ConnInfo {
	return pool.ConnInfo{ID: id, Target: target(host), State: pool.Up}
}

// A person is asked: heartbeats keep the question open for longer than both deadlines, muxproxy allow and deny answer it
// where the plugin lets them, and its end is the client's.
func TestWaiting(t *testing.T) {
	w := newWorld(t, Timing{First: 20 * time.Second, Heartbeat: 20 * time.Second})
	s := spec(t, "ask", "")
	s.May = []string{"decide", "observe"}
	mute := spec(t, "ask2", "")
	w.run([]Plugin{s, mute}, block("ask", "h", "wait"), block("ask", "closed", "wait-closed"), block("ask", "own", "decide-own"),
		block("ask2", "own2", "decide-own"))
	begin := func(ctx context.Context, host string) (Pending, chan *use.Denied) {
		said := make(chan string, 10)
		done := make(chan *use.Denied, 1)
		go func() {
			done <- w.m.Check(ctx, use.Use{Kind: use.Exec, Target: target(host)}, func(line string) { said <- line })
		}()
		line := <-said
		list := w.m.Pending()
		if len(list) != 1 || line != "ask: "+list[0].Message {
			t.Fatalf("said %q, pending %+v", line, list)
		}
		return list[0], done
	}
	for _, allow := range []bool{true, false} {
		p, done := begin(t.Context(), "h")
		if err := w.m.Decide(p.ID, allow, "no\x1b"); err != nil {
			t.Fatal(err)
		}
		d := <-done
		if (d == nil) != allow || d != nil && d.Error() != `denied by ask: no\x1b` {
			t.Errorf("allow %v: %v", allow, d)
		}
		if err := w.m.Decide(p.ID, true, ""); !errors.Is(err, ErrNotPending) {
			t.Errorf("a second answer: %v", err)
		}
		w.waitLog(fmt.Sprintf(`observed {\"allowed\":%v,\"dropped\":0,\"event\":\"answered%s\"`, allow, p.ID))
	}
	// Every kind of use waits.
	for _, kind := range use.Kinds() {
		done := make(chan *use.Denied, 1)
		go func() {
			done <- w.m.Check(t.Context(), use.Use{Kind: kind, Target: target("h"), Name: "forward add"}, nil)
		}()
		var list []Pending
		for len(list) == 0 {
			list = w.m.Pending()
			time.Sleep(time.Millisecond) // polling: no event for a question that is said to nobody
		}
		if err := w.m.Decide(list[0].ID, false, "no"); err != nil {
			t.Fatal(err)
		}
		if d := <-done; d == nil || d.Error() != "denied by ask: no" {
			t.Errorf("%s: %v", kind, d)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	p, done := begin(ctx, "closed")
	if p.Message != `touch the key\x1b` {
		t.Errorf("the message is %q", p.Message)
	}
	if err := w.m.decideOwn("ask2", p.ID, nil); !errors.Is(err, ErrNotPending) {
		t.Errorf("decided by another plugin: %v", err)
	}
	if _, err := w.m.askOwn(ctx, "ask2", p.ID, "really?"); !errors.Is(err, ErrNotPending) {
		t.Errorf("asked by another plugin: %v", err)
	}
	if err := w.m.Decide(p.ID, true, ""); err == nil || !strings.Contains(err.Error(), "touch the key") {
		t.Errorf("answered what only the plugin can: %v", err)
	}
	cancel()
	if d := <-done; d == nil || !strings.Contains(d.Error(), "left before the decision") {
		t.Errorf("the client left: %v", d)
	}
	if d := w.check(use.Exec, "own"); d == nil || d.Error() != "denied by ask: decided by itself" {
		t.Errorf("decided by the plugin's own call: %v", d)
	}
	if d := w.check(use.Exec, "own2"); d == nil || !strings.Contains(d.Error(), "may not decide") {
		t.Errorf("decided without the capability: %v", d)
	}
	if list := w.m.Pending(); len(list) != 0 {
		t.Errorf("left: %+v", list)
	}
}

func TestRetain(t *testing.T) {
	w := newWorld(t, Timing{})
	w.run([]Plugin{spec(t, "a", ""), spec(t, "b", "")}, block("a", "keep", "keep"), block("b", "keep", "close"),
		block("a", "close", "close"), block("a", "crash", "crash"), block("a", "silent", "silent"))
	for host, want := range map[string]int64{"keep": 2_000_000_000, "close": 0, "none": 0, "crash": 0} {
		got := w.m.Retain(t.Context(), conn(1, host))
		if want == 0 && !got.IsZero() || want != 0 && got.Unix() != want {
			t.Errorf("%s: until %v", host, got)
		}
	}
	// A connection that loses its last client while the plugin comes up again is kept all the same.
	if got := w.m.Retain(t.Context(), conn(1, "keep")); got.Unix() != 2_000_000_000 {
		t.Errorf("just after a crash: until %v", got)
	}
	if got := w.m.Retain(shortly(t), conn(1, "silent")); !got.IsZero() {
		t.Errorf("silent: until %v", got)
	}
}

func TestCommand(t *testing.T) {
	w := newWorld(t, Timing{})
	w.run([]Plugin{spec(t, "a", "")})
	for _, c := range []struct {
		args           []string
		status         int
		stdout, stderr string
	}{
		{[]string{"echo", "xy"}, 7, strings.Repeat("xy", 50000), ""},
		{nil, 2, "", "what?\n"},
	} {
		var stdout, stderr bytes.Buffer
		status, err := w.m.Command(t.Context(), "a", c.args, &stdout, &stderr)
		if err != nil || status != c.status || stdout.String() != c.stdout || stderr.String() != c.stderr {
			t.Errorf("%q: status %d, %d bytes, stderr %q, %v", c.args, status, stdout.Len(), stderr.String(), err)
		}
	}
	if _, err := w.m.Command(t.Context(), "nobody", nil, io.Discard, io.Discard); !errors.Is(err, ErrNoVerb) {
		t.Errorf("an unknown plugin: %v", err)
	}
	if _, err := w.m.Command(t.Context(), "a", []string{"crash"}, io.Discard, io.Discard); err == nil {
		t.Error("a crash is no error")
	}
	if verbs := w.m.Verbs(); len(verbs["a"]) != 1 || verbs["a"][0].Usage != "echo TEXT" {
		t.Errorf("verbs: %v", verbs)
	}
}

// waitLog waits until the log has text.
func (w *world) waitLog(text string) {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); !strings.Contains(w.log.String(), text); {
		if time.Now().After(end) {
			w.t.Fatalf("no %q in the log:\n%s", text, w.log)
		}
		time.Sleep(time.Millisecond) // polling a log
	}
}

// A plugin asks the person at the client of its own use, where there is one.
func TestAskClient(t *testing.T) {
	w := newWorld(t, Timing{})
	b := block("ask", "h", "ask-client")
	b.Pos = "config.hcl:7"
	w.run([]Plugin{spec(t, "ask", "")}, b)
	var asked string
	ask := func(answer bool, err error) context.Context {
		return use.WithPerson(t.Context(), func(_ context.Context, question string) (bool, error) {
			asked = question
			return answer, err
		})
	}
	for _, c := range []struct {
		ctx  context.Context
		want string
	}{
		{t.Context(), "false the client can't ask its person"},
		{ask(true, nil), "true <nil>"},
		{ask(false, nil), "false <nil>"},
		{ask(false, use.ErrNobody), "false the client can't ask its person"},
		{ask(false, errors.New("broken")), "false broken"},
	} {
		d := w.m.Check(c.ctx, use.Use{Kind: use.Attach, Target: target("h")}, nil)
		if d == nil || d.Error() != "denied by ask: "+c.want+"; config.hcl:7" {
			t.Errorf("%v, want %s", d, c.want)
		}
	}
	if asked != `ask: shall I?\x1b` {
		t.Errorf("asked %q", asked)
	}
}

func TestObserve(t *testing.T) {
	w := newWorld(t, Timing{})
	a, b := spec(t, "a", ""), spec(t, "b", "")
	a.May = []string{"observe"}
	w.run([]Plugin{a, b}, block("a", "h", "allow"), block("b", "h", "allow"))
	event := func(kind, host string) Event {
		return Event{Time: time.Now(), Kind: kind, Use: use.Use{Kind: use.Exec, Target: target(host)}}
	}
	w.m.Observe(event("first", "h"))
	w.m.Observe(Event{Time: time.Now(), Kind: "up", Connection: Connection{ID: 1, Target: target("h")}})
	w.m.Observe(event("hidden", "foreign"))
	w.m.Observe(Event{Time: time.Now(), Kind: "hidden-up", Connection: Connection{ID: 2, Target: target("foreign"), Up: true}})
	w.m.Observe(Event{Time: time.Now(), Kind: "locked"}) // of no host: for all
	w.m.Observe(event("last", "h"))
	w.waitLog(`observed {\"allowed\":true,\"dropped\":0,\"event\":\"last\",\"host\":\"h\"}`)
	if log := w.log.String(); strings.Contains(log, "hidden") || strings.Contains(log, `"plugin":"b","message":"observed`) ||
		!strings.Contains(log, `\"event\":\"locked\"`) || !strings.Contains(log, `\"event\":\"up\",\"host\":\"h allow\"`) ||
		strings.Count(log, "observed") != 5 || !(strings.Index(log, "policy") < strings.Index(log, "first")) {
		t.Error("events went to whom they should not, or in another order")
	}
	// A plugin that reads no more costs memory within bounds, and nobody waits.
	w.m.Observe(event("stall", "h"))
	e := event("flood", "h")
	e.Use.Kind, e.Use.Addr = use.Other, strings.Repeat("x", 4096)
	for range 1500 {
		w.m.Observe(e)
	}
	if got := w.m.List()[0].Dropped; got < 1000 {
		t.Errorf("%d events dropped", got)
	}
	if d := w.check(use.Exec, "h"); d != nil {
		t.Errorf("meanwhile: %v", d)
	}
}

// fakeBackend is a master with connections 1 (to h), 2 (to foreign). Dialling "echo" gives a stream that echoes.
type fakeBackend struct {
	mu    sync.Mutex // guards what follows
	calls []string
	ends  []io.Closer
	gone  chan struct{} // closed when a stream of dial was closed
}

func (b *fakeBackend) call(by Actor, format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	pid := 0
	if len(by.Caller.Processes) > 0 {
		pid = by.Caller.Processes[0].PID
	}
	b.calls = append(b.calls, fmt.Sprintf(format, args...)+fmt.Sprintf(" by %s %v", by.Plugin, pid != 0))
}

func (b *fakeBackend) closeAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.ends {
		c.Close()
	}
}

func (b *fakeBackend) Connections() []Connection {
	return []Connection{{ID: 1, Target: target("h"), Up: true}, {ID: 2, Target: target("foreign"), Up: true}}
}

func (b *fakeBackend) Resolve(_ context.Context, t string) (use.Target, error) {
	if t == "unknown" {
		return use.Target{}, errors.New("no such host")
	}
	return target(t), nil
}

// refusal is a driver's error of a login that was refused.
type refusal struct{ error }

func (refusal) Is(target error) bool { return target == pool.ErrRefused }

func (b *fakeBackend) Connect(_ context.Context, by Actor, t use.Target) (Connection, error) {
	if t.Host == "refused" {
		return Connection{}, refusal{fmt.Errorf("%s: permission denied", t)}
	}
	b.call(by, "connect %s", t)
	return Connection{ID: 1, Target: t}, nil
}

func (b *fakeBackend) Close(_ context.Context, by Actor, id uint64) error {
	b.call(by, "close %d", id)
	return nil
}

func (b *fakeBackend) Drain(_ context.Context, by Actor, id uint64) error {
	b.call(by, "drain %d", id)
	return nil
}

func (b *fakeBackend) pair() (near, far *net.UnixConn) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: "", Net: "unix"})
	if err != nil {
		panic(err)
	}
	defer l.Close()
	near, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		panic(err)
	}
	far, err = l.AcceptUnix()
	if err != nil {
		panic(err)
	}
	return near, far
}

func (b *fakeBackend) Dial(_ context.Context, by Actor, d Dial) (Stream, error) {
	b.call(by, "dial %d %s %s", d.Connection, d.Network, d.Address)
	switch d.Address {
	case "refused:1":
		return nil, &Refused{Reason: 2, Message: "connect failed\x1b"}
	case "denied:1":
		return nil, &use.Denied{By: "policy", Reason: "no"}
	}
	near, far := b.pair()
	b.mu.Lock()
	b.ends = append(b.ends, far)
	gone := b.gone
	b.mu.Unlock()
	if d.Address == "cut:1" {
		return &cutOff{Stream: near}, nil
	}
	go func() {
		io.Copy(struct{ io.Writer }{far}, struct{ io.Reader }{far})
		far.Close()
		if gone != nil {
			close(gone)
		}
	}()
	return near, nil
}

// fakeArrival is a stream that has come to a listener.
type fakeArrival struct {
	*net.UnixConn
	b *fakeBackend
}

func (a fakeArrival) Permit(_ context.Context, by Actor, network, address string) error {
	a.b.call(by, "permit %s %s", network, address)
	if address == "denied:1" {
		return &use.Denied{By: "policy", Reason: "no"}
	}
	return nil
}

type fakeListener struct {
	accept chan Incoming
	closed chan struct{}
	once   sync.Once
}

func (l *fakeListener) Accept() (Incoming, string, error) {
	select {
	case s := <-l.accept:
		return s, "192.0.2.1:99", nil
	case <-l.closed:
		return nil, "", net.ErrClosed
	}
}
func (l *fakeListener) Addr() string { return "127.0.0.1:4444" }
func (l *fakeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (b *fakeBackend) Listen(_ context.Context, by Actor, id uint64, network, address string) (Listener, error) {
	b.call(by, "listen %d %s %s", id, network, address)
	l := &fakeListener{accept: make(chan Incoming, 1), closed: make(chan struct{})}
	near, far := b.pair()
	fmt.Fprint(far, "over there")
	far.CloseWrite()
	b.mu.Lock()
	b.ends = append(b.ends, far)
	b.mu.Unlock()
	l.accept <- fakeArrival{near, b}
	return l, nil
}

func (b *fakeBackend) Notify(_ context.Context, by Actor, id uint64, line string) error {
	b.call(by, "notify %d %s", id, line)
	return nil
}

func (b *fakeBackend) Record(by Actor, event, target, detail string) {
	b.call(by, "record %s %s %s", event, target, detail)
}

// What one plugin adds to a use: asked one time after another, and after a rest in which both processes went to sleep.
func BenchmarkCheck(b *testing.B) {
	for _, rest := range []time.Duration{0, 20 * time.Millisecond} {
		b.Run("rest="+rest.String(), func(b *testing.B) {
			w := newWorld(b, Timing{})
			w.run([]Plugin{spec(b, "a", "")}, block("a", "h", "allow"))
			u := use.Use{Kind: use.Exec, Target: target("h"), Command: "true"}
			var took []time.Duration
			for range b.N {
				time.Sleep(rest)
				began := time.Now()
				if d := w.m.Check(b.Context(), u, nil); d != nil {
					b.Fatal(d)
				}
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "µs/median")
		})
	}
}
