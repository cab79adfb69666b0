package pluginhost

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/use"
)

// replace puts other plugins and blocks in force.
func (w *world) replace(specs []Plugin, lookup Lookup, blocks ...Block) {
	w.t.Helper()
	set, _ := w.m.Prepare(w.t.Context(), specs)
	if problems := set.Apply(w.t.Context(), blocks, lookup, specs, false, nil); len(problems) > 0 {
		w.t.Fatal(problems)
	}
}

// A use is judged by one policy and its plugins, never by the half of two of them: here each of two would deny it.
func TestReloadLeavesNoGap(t *testing.T) {
	w := newWorld(t, Timing{})
	judged := []Block{block("a", "h", "deny")}
	w.run([]Plugin{spec(t, "a", "")}, judged...)
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for range 4 {
		asking.Go(func() {
			for ctx.Err() == nil {
				if d := w.check(use.Exec, "h"); d == nil {
					t.Error("between two policies a use was allowed")
					return
				}
			}
		})
	}
	for range 5 {
		w.replace(nil, hosts{"deny/h": true})
		w.replace([]Plugin{spec(t, "a", "")}, lookupOf(judged), judged...)
	}
	cancel()
	asking.Wait()
}

// What waited for a person while another policy came is judged by that one: allowed by nobody who was not asked.
func TestReloadWhileAPersonIsAsked(t *testing.T) {
	for name, next := range map[string]func(*world){
		"the policy denies": func(w *world) {
			blocks := []Block{block("ask", "h", "wait")}
			l := lookupOf(blocks)
			l["deny/h"] = true
			w.replace([]Plugin{spec(t, "ask", "")}, l, blocks...)
		},
		"another plugin denies": func(w *world) {
			blocks := []Block{block("b", "h", "deny")}
			w.replace([]Plugin{spec(t, "b", "")}, lookupOf(blocks), blocks...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, Timing{})
			s := spec(t, "ask", "")
			s.AllowOnFailure = true
			w.run([]Plugin{s}, block("ask", "h", "wait"))
			said, done := make(chan string, 10), make(chan *use.Denied, 1)
			go func() {
				done <- w.m.Check(t.Context(), use.Use{Kind: use.Exec, Target: target("h")}, func(line string) { said <- line })
			}()
			<-said
			id := w.m.Pending()[0].ID
			next(w)
			if err := w.m.Decide(id, true, ""); err != nil && !errors.Is(err, ErrNotPending) {
				t.Fatal(err)
			}
			if d := <-done; d == nil {
				t.Error("allowed under a policy that is no more")
			}
		})
	}
}

// inForce is called in the moment in which the Set comes into force, and not when it does not.
func TestInForce(t *testing.T) {
	w := newWorld(t, Timing{})
	specs := []Plugin{spec(t, "a", "")}
	set, _ := w.m.Prepare(t.Context(), specs)
	if d := w.check(use.Exec, "h"); d == nil || d.By != "policy" {
		t.Errorf("before the first policy: %v", d)
	}
	called := false
	set.Apply(t.Context(), nil, hosts{}, specs, true, func() { called = w.m.current == set })
	if !called {
		t.Error("not called, or too early")
	}
	bad := []Plugin{spec(t, "bad", "crash-configure")}
	set, _ = w.m.Prepare(t.Context(), bad)
	if problems := set.Apply(t.Context(), nil, hosts{}, bad, false, func() { t.Error("called for what is discarded") }); len(problems) != 1 ||
		!problems[0].Broken {
		t.Errorf("%+v", problems)
	}
	// After Close nothing of a Set is left running.
	set, _ = w.m.Prepare(t.Context(), []Plugin{spec(t, "b", "")})
	inst := set.find("b").inst
	w.m.Close()
	set.Apply(t.Context(), nil, hosts{}, nil, false, nil)
	waitGone(t, inst.PID())
}

// The capability to observe comes and goes with the policy, not with the process.
func TestObserveByReload(t *testing.T) {
	w := newWorld(t, Timing{})
	mute, may := spec(t, "a", ""), spec(t, "a", "")
	may.May = []string{"observe"}
	blocks := []Block{block("a", "h", "allow")}
	event := func(kind string) { w.m.Observe(Event{Time: time.Now(), Kind: kind}) }
	w.run([]Plugin{mute}, blocks...)
	event("early")
	w.replace([]Plugin{may}, lookupOf(blocks), blocks...)
	if !w.m.Observed() {
		t.Error("nobody observes")
	}
	event("first")
	w.waitLog(`\"event\":\"first\"`)
	w.replace([]Plugin{mute}, lookupOf(blocks), blocks...)
	event("hidden")
	w.replace([]Plugin{may}, lookupOf(blocks), blocks...)
	event("last")
	w.waitLog(`\"event\":\"last\"`)
	if log := w.log.String(); strings.Contains(log, "early") || strings.Contains(log, "hidden") || strings.Count(log, "observed") != 2 {
		t.Error("it was told more than it may know, or twice")
	}
}

// The next policy starts a plugin anew whose file was replaced, as by an installation.
func TestReplacedFile(t *testing.T) {
	w := newWorld(t, Timing{})
	s := spec(t, "a", "")
	exe, err := os.ReadFile(s.Path)
	if err != nil {
		t.Fatal(err)
	}
	s.Path = filepath.Join(t.TempDir(), "muxproxy-plugin-a")
	install := func() {
		if err := writeProgram(s.Path+".new", exe); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(s.Path+".new", s.Path); err != nil {
			t.Fatal(err)
		}
	}
	install()
	w.run([]Plugin{s})
	was := w.m.List()[0].PID
	w.replace([]Plugin{s}, hosts{})
	if w.m.List()[0].PID != was {
		t.Error("the same file was started again")
	}
	install()
	w.replace([]Plugin{s}, hosts{})
	if w.m.List()[0].PID == was {
		t.Error("the old file runs on")
	}
	waitGone(t, was)
}

// logind takes the runtime directory away, and the master lives on.
func TestVanishedSockets(t *testing.T) {
	w := newWorld(t, Timing{})
	s := spec(t, "a", "")
	s.May = []string{"dial"}
	w.run([]Plugin{s}, block("a", "h", "allow"))
	was, _ := w.m.set().find("a").up()
	if err := os.RemoveAll(w.dir); err != nil {
		t.Fatal(err)
	}
	w.waitLog("can't be made again yet")
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w.upAgain("a", was)
	if status, out := w.command("a", "dial", "1", "echo:1"); status != 0 || out != "ping" {
		t.Errorf("%d, %q", status, out)
	}
}

// Two masters share a runtime directory while one drains. What a dead one left goes, what the other one has stays.
func TestTwoMasters(t *testing.T) {
	one, two := newWorld(t, Timing{}), newWorld(t, Timing{})
	two.m.o.Dir = one.m.o.Dir
	dead := filepath.Join(one.dir, "plugins1", "p1")
	if err := os.MkdirAll(dead, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, w := range []*world{one, two} {
		s := spec(t, "a", "")
		s.May = []string{"dial"}
		w.run([]Plugin{s}, block("a", "h", "deny"))
	}
	dial := func(w *world, when string) {
		t.Helper()
		if status, out := w.command("a", "dial", "1", "echo:1"); status != 0 || out != "ping" {
			t.Errorf("%s: %d, %q", when, status, out)
		}
	}
	dial(one, "the first of two")
	dial(two, "the second of two")
	one.m.Close()
	dial(two, "the second alone")
	was, _ := two.m.set().find("a").up()
	was.Kill()
	two.upAgain("a", was)
	dial(two, "started again")
	if _, err := os.Stat(dead); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", dead, err)
	}
}

// stalled is a stream whose server takes nothing until its connection ends.
type stalled struct {
	writing, ended chan struct{}
	once           sync.Once
}

func (s *stalled) Read([]byte) (int, error) { <-s.ended; return 0, errors.New("connection lost") }
func (s *stalled) Write([]byte) (int, error) {
	s.once.Do(func() { close(s.writing) })
	<-s.ended
	return 0, errors.New("connection lost")
}
func (s *stalled) CloseWrite() error { return nil }
func (s *stalled) Close() error      { <-s.ended; return nil }

// Close does not wait for a server that takes nothing: its connection ends after the plugins.
func TestCloseWithAStalledStream(t *testing.T) {
	w := newWorld(t, Timing{})
	w.run([]Plugin{spec(t, "a", "")})
	inst, _ := w.m.set().find("a").up()
	s := &stalled{writing: make(chan struct{}), ended: make(chan struct{})}
	id, err := w.m.streams.ticket(inst.PID(), 0, s, []byte("goes first"))
	if err != nil {
		t.Fatal(err)
	}
	var redeemed sync.WaitGroup
	redeemed.Go(func() {
		_, _ = w.m.Command(t.Context(), "a", []string{"spend", w.m.streams.place().listener.Path(), hex.EncodeToString(id)}, &syncBuffer{}, &syncBuffer{})
	})
	<-s.writing
	w.m.Close()
	close(s.ended)
	w.m.Wait()
	redeemed.Wait()
}

// A plugin that does not take its streams takes no other one's room.
func TestTicketsOfEachPlugin(t *testing.T) {
	w := newWorld(t, Timing{})
	w.run([]Plugin{spec(t, "a", "")})
	closed := &stalled{ended: make(chan struct{})}
	close(closed.ended)
	for range maxTickets {
		if _, err := w.m.streams.ticket(1, 0, closed, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.m.streams.ticket(1, 0, closed, nil); err == nil {
		t.Error("one more than there may be")
	}
	if _, err := w.m.streams.ticket(2, 0, closed, nil); err != nil {
		t.Errorf("another plugin's: %v", err)
	}
	if _, err := w.m.streams.ticket(1, 7, closed, nil); err != nil {
		t.Errorf("of what comes in from a host: %v", err)
	}
	for range maxTickets {
		w.m.streams.ticket(1, 7, closed, nil)
	}
	if _, err := w.m.streams.ticket(1, 8, closed, nil); err != nil {
		t.Errorf("of what comes in from another host: %v", err)
	}
}

// Without a master, as for `config check`, a plugin that acts by itself is told so.
func TestNoBackend(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, m: New(Options{Dir: func() string { return dir }, State: dir, Log: zerolog.Nop()})}
	defer w.m.Close()
	s := spec(t, "a", "")
	s.May = []string{"list", "connect", "close", "dial", "listen", "notify"}
	w.run([]Plugin{s}, block("a", "h", "allow"))
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"list"}, ""},
		{[]string{"record", "a", "b", "c"}, ""},
		{[]string{"connect", "h"}, "there is no master here\n"},
		{[]string{"dial", "1", "x:1"}, "there is no connection 1\n"},
	} {
		if _, out := w.command("a", c.args...); out != c.want {
			t.Errorf("%q: %q", c.args, out)
		}
	}
}

// Whoever runs `muxproxy allow` is not asked whether that is allowed by the plugin that waits for it.
func TestAnswersAreNoQuestions(t *testing.T) {
	w := newWorld(t, Timing{})
	w.run([]Plugin{spec(t, "ask", ""), spec(t, "b", "")}, block("ask", "h", "wait"), block("b", "denied", "deny"))
	for _, verb := range []string{"allow", "deny"} {
		if d := w.m.Check(t.Context(), use.Use{Kind: use.Control, Name: verb, Target: target("h")}, nil); d != nil {
			t.Errorf("%s: %v", verb, d)
		}
		if d := w.m.Check(t.Context(), use.Use{Kind: use.Control, Name: verb, Target: target("denied")}, nil); d == nil {
			t.Errorf("%s: a plugin that asks nobody was not asked", verb)
		}
	}
}

// A plugin that does not run takes no time from those that keep the connection.
func TestRetainBesideOneThatIsAway(t *testing.T) {
	w := newWorld(t, Timing{Backoff: time.Hour, First: 2 * time.Second})
	w.run([]Plugin{spec(t, "a", ""), spec(t, "b", "")}, block("a", "h", "keep"), block("b", "h", "keep"))
	p := w.m.set().find("a")
	inst, _ := p.up()
	inst.Kill()
	<-inst.Done()
	for p.isUp() {
		time.Sleep(time.Millisecond) // polling: supervise has no event for "not up"
	}
	if until := w.m.Retain(t.Context(), conn(1, "h")); until.Unix() != 2_000_000_000 {
		t.Errorf("kept until %v", until)
	}
}

// cutOff is a stream whose connection is lost once it has answered.
type cutOff struct{ Stream }

func (s *cutOff) Read(b []byte) (int, error) { return copy(b, "half"), io.ErrUnexpectedEOF }

// What was cut off does not look complete, where a socket can say so.
func TestACutStreamIsReset(t *testing.T) {
	w := newWorld(t, Timing{})
	s := spec(t, "a", "")
	s.May = []string{"dial"}
	w.run([]Plugin{s}, block("a", "h", "allow"))
	if status, out := w.command("a", "handover", "1", "echo:1"); status != 0 || !strings.HasPrefix(out, "open: first second") {
		t.Errorf("whole: %d, %q", status, out)
	}
	if status, out := w.command("a", "handover", "1", "cut:1"); status != 255 || !strings.Contains(out, "connection reset by peer") {
		t.Errorf("cut off: %d, %q", status, out)
	}
}

// A process that was sent another configuration while it got the one in force is not asked: it may have either.
func TestConfiguredTwice(t *testing.T) {
	w := newWorld(t, Timing{})
	w.run([]Plugin{spec(t, "a", "")}, block("a", "h", "allow"))
	p := w.m.set().find("a")
	was, _ := p.up()
	p.mu.Lock()
	p.next = p.blocks
	p.mu.Unlock()
	was.Kill()
	w.waitLog("its configuration changed while it was started")
	if p.isUp() {
		t.Error("it is asked all the same")
	}
	p.mu.Lock()
	p.next = nil
	p.mu.Unlock()
	w.upAgain("a", was)
}

// A plugin that has got the next policy already and forgotten this one has not failed: what it should have judged is denied
// also where its failures count for nothing.
func TestAForgottenBlockDenies(t *testing.T) {
	w := newWorld(t, Timing{})
	s := spec(t, "a", "")
	s.AllowOnFailure = true
	w.run([]Plugin{s}, block("a", "h", "none"))
	if d := w.check(use.Exec, "h"); d != nil {
		t.Errorf("a failure: %v", d)
	}
	w.replace([]Plugin{s}, hosts{"a/forgotten": true})
	if d := w.check(use.Exec, "forgotten"); d == nil || !strings.Contains(d.Error(), "it does not know its block") {
		t.Errorf("a block that it does not know: %v", d)
	}
}

// A plugin whose file was replaced by one with another schema can't have blocks that were read by the old one.
func TestAnotherSchemaAfterACrash(t *testing.T) {
	w := newWorld(t, Timing{})
	s := spec(t, "a", "")
	exe := s.Path
	script := filepath.Join(t.TempDir(), "muxproxy-plugin-a")
	play := func(mode string) {
		if err := writeProgram(script+".new", []byte("#!/bin/sh\nexec "+exe+" a "+mode+"\n")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(script+".new", script); err != nil {
			t.Fatal(err)
		}
	}
	play("judge")
	s.Path = script
	w.run([]Plugin{s}, block("a", "h", "allow"))
	if d := w.check(use.Exec, "h"); d != nil {
		t.Error(d)
	}
	was, _ := w.m.set().find("a").up()
	play("other")
	was.Kill()
	w.waitLog("it has another schema than before")
	if d := w.check(use.Exec, "h"); d == nil {
		t.Error("it judges by a block that is not its own")
	}
}

// writeProgram writes what will be run. Nothing forks meanwhile: the child would have the file open for writing until its
// execve(2), and the program could not be run.
func writeProgram(path string, content []byte) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, content, 0o700)
}
