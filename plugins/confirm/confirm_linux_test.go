package confirm

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/plugintest"
)

// The test binary plays the plugin.
func TestMain(m *testing.M) {
	if os.Getenv(plugin.CookieKey) != "" || os.Getenv("PLAY_PLUGIN") != "" {
		plugin.Serve(New())
	}
	goleak.VerifyTestMain(m, // but for the threads that start processes, here and in the suite
		goleak.IgnoreAnyFunction("github.com/muxproxy/muxproxy/plugins/confirm.init.func1.1"),
		goleak.IgnoreAnyFunction("github.com/muxproxy/muxproxy/core/plugin/pluginrun.init.func1.1"))
}

func TestConformance(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Nobody can be asked in a test: what would be is denied.
	plugintest.Run(t, plugintest.Options{Path: exe, Env: []string{"PLAY_PLUGIN=1"}, Host: `{"askpass":"/nonexistent/askpass"}`})
}

// defaults are those of the schema.
func defaults(t testing.TB) block {
	t.Helper()
	s, err := plugin.Schema(block{})
	if err != nil {
		t.Fatal(err)
	}
	b := block{}
	for _, a := range s.GetAttributes() {
		var v any
		if err := json.Unmarshal([]byte(cmp.Or(a.GetDefault(), `""`)), &v); err != nil {
			t.Fatal(err)
		}
		switch a.GetName() {
		case "ask":
			b.Ask = v.(string)
		case "idle":
			b.Idle, _ = time.ParseDuration(v.(string))
		case "remember":
			b.Remember = v.(string)
		case "timeout":
			b.Timeout, _ = time.ParseDuration(v.(string))
		case "on":
			for _, kind := range v.([]any) {
				b.On = append(b.On, kind.(string))
			}
		case "fallback":
			b.Fallback = v.(string)
		case "display":
			b.Display = v.(string)
		}
	}
	return b
}

// self is a process that lives as long as the test.
func self(t testing.TB) plugin.Process {
	t.Helper()
	_, start, err := stat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return plugin.Process{PID: os.Getpid(), Start: start, Exe: "/usr/bin/zsh", Args: []string{"zsh"}}
}

// world is a plugin with a person who answers.
type world struct {
	*confirm
	t      *testing.T
	person func(ctx context.Context, prompt string) answer // nil: yes
	noWay  error                                           // there is no display

	mu    sync.Mutex // guards what follows
	asked []string
	last  int
}

func newWorld(t *testing.T) *world {
	w := &world{confirm: newConfirm(), t: t}
	w.program = func(string) (string, error) { return "/askpass", nil }
	w.display = func(context.Context, *block, plugin.Use) ([]string, error) { return nil, w.noWay }
	w.run = func(ctx context.Context, _ string, _ []string, prompt string) answer {
		w.mu.Lock()
		w.asked = append(w.asked, prompt)
		w.mu.Unlock()
		if w.person == nil {
			return answer{verdict: yes}
		}
		return w.person(ctx, prompt)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

// said is a person who always says the same, and takes her time.
func said(v verdict, after time.Duration) func(context.Context, string) answer {
	return func(ctx context.Context, _ string) answer {
		select {
		case <-time.After(after):
			return answer{verdict: v}
		case <-ctx.Done():
			return answer{verdict: unanswered}
		}
	}
}

// questions is how often the person was asked since the last time.
func (w *world) questions() int {
	w.confirm.mu.Lock()
	defer w.confirm.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.asked) - w.last
	w.last = len(w.asked)
	return n
}

// use is one of a kind by a client of a shell.
func (w *world) use(kind string, shell plugin.Process) plugin.Use {
	u := plugin.Use{
		Kind: kind, Client: 1, Target: plugin.Target{User: "u", Host: "h", Port: 22}, Command: "date",
		Processes: []plugin.Process{proc(1<<30, "/usr/bin/muxproxy"), proc(1<<30-1, "/usr/bin/ssh", "ssh", "h"), shell},
	}
	if shell.PID == 0 {
		u.Processes = u.Processes[:2]
	}
	return u
}

func (w *world) authorize(ctx context.Context, b *block, u plugin.Use) plugin.Decision {
	w.confirm.mu.Lock()
	w.rules[b.rule("p:1")] = true
	w.confirm.mu.Unlock()
	return w.Authorize(ctx, &plugin.Request{ID: "id" + fmt.Sprint(u.Client), Use: u, Block: b, Pos: "p:1"})
}

// ok reports what a use comes to.
func (w *world) ok(b *block, u plugin.Use) bool {
	w.t.Helper()
	switch d := w.authorize(context.Background(), b, u); d {
	case plugin.Allow(), plugin.NoOpinion():
		return true
	case plugin.Decision{}:
		w.t.Error("no decision")
	}
	return false
}

// Every kind of use, under every kind of block.
func TestKinds(t *testing.T) {
	inOn := defaults(t).On
	for _, kind := range append(slices.Clone(kinds), "of-a-later-version") {
		covered := slices.Contains(inOn, kind) || kind == "of-a-later-version"
		if covered == slices.Contains([]string{"attach", "cancel-forward", "control"}, kind) {
			t.Errorf("%s is covered by default: %v", kind, covered)
		}
		for _, c := range []struct {
			name   string
			change func(*block)
			person verdict
			noWay  error
			want   plugin.Decision
			asked  int
		}{
			{"yes", nil, yes, nil, plugin.Allow(), 1},
			{"no", nil, no, nil, plugin.Deny("the answer was no", "try again to be asked again"), 1},
			{"no answer", nil, unanswered, nil, plugin.Deny("no answer in 30s", "try again, or raise timeout in p:1"), 1},
			{"no display", nil, yes, errors.New("no graphical session"),
				plugin.Deny("nobody can be asked: no graphical session", `sit down at a graphical session, or set fallback = "pending" in p:1`), 0},
			{"no askpass", nil, yes, errNoAskpass,
				plugin.Deny("nobody can be asked: no askpass program is installed", "install ssh-askpass, or name a program by askpass in p:1"), 0},
			{"a broken askpass", nil, noWay, nil,
				plugin.Deny("nobody can be asked: ", `sit down at a graphical session, or set fallback = "pending" in p:1`), 1},
			{"first", func(b *block) { b.Ask = first }, no, nil, plugin.Deny("the answer was no", "try again to be asked again"), 1},
			{"after-idle", func(b *block) { b.Ask = afterIdle }, no, nil, plugin.Deny("the answer was no", "try again to be asked again"), 1},
			{"never", func(b *block) { b.Ask = never }, no, nil, plugin.Allow(), 0},
			{"deny", func(b *block) { b.Ask = deny }, yes, nil, plugin.Deny("policy says no to "+kind+" without asking", "see p:1"), 0},
		} {
			b := defaults(t)
			if c.change != nil {
				c.change(&b)
			}
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.person, w.noWay = said(c.person, 0), c.noWay
				if c.person == unanswered {
					w.person = said(yes, time.Hour)
				}
				for _, all := range []bool{false, true} {
					want, asked := c.want, c.asked
					if all {
						b.On = kinds
					} else if !covered && b.Ask != never {
						want, asked = plugin.NoOpinion(), 0
					}
					if got := w.authorize(t.Context(), &b, w.use(kind, self(t))); got != want {
						t.Errorf("%s of %s: %+v, want %+v", c.name, kind, got, want)
					}
					if n := w.questions(); n != asked {
						t.Errorf("%s of %s: asked %d times, want %d", c.name, kind, n, asked)
					}
					time.Sleep(restTime)
				}
				w.Close()
			})
		}
	}
}

// How long a yes counts.
func TestRemember(t *testing.T) {
	shell := self(t)
	for _, c := range []struct {
		name  string
		block func(*block)
		after map[time.Duration]int // questions when the same comes so long after the one before, in this order
		order []time.Duration
	}{
		{"always", nil, map[time.Duration]int{0: 1, 1: 1}, []time.Duration{0, 1}},
		{"always, remembered", func(b *block) { b.Remember = "5m" },
			map[time.Duration]int{0: 1, 4 * time.Minute: 0, 59 * time.Second: 0, time.Second: 1}, []time.Duration{0, 4 * time.Minute, 59 * time.Second, time.Second}},
		{"always, for ever", func(b *block) { b.Remember = forever },
			map[time.Duration]int{0: 1, 10000 * time.Hour: 0}, []time.Duration{0, 10000 * time.Hour}},
		{"first", func(b *block) { b.Ask = first }, map[time.Duration]int{0: 1, 10000 * time.Hour: 0}, []time.Duration{0, 10000 * time.Hour}},
		{"after-idle", func(b *block) { b.Ask = afterIdle },
			map[time.Duration]int{0: 1, 14 * time.Minute: 0, 14*time.Minute + 1: 0, 15 * time.Minute: 1},
			[]time.Duration{0, 14 * time.Minute, 14*time.Minute + 1, 15 * time.Minute}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := defaults(t)
			if c.block != nil {
				c.block(&b)
			}
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.Close()
				for _, d := range c.order {
					time.Sleep(d)
					if !w.ok(&b, w.use("exec", shell)) {
						t.Fatal("denied")
					}
					if n := w.questions(); n != c.after[d] {
						t.Errorf("after %v: %d questions, want %d", d, n, c.after[d])
					}
				}
			})
		})
	}
}

// What a yes does not count for.
func TestScope(t *testing.T) {
	shell := self(t)
	b := defaults(t)
	b.Remember = forever
	another := shell
	another.PID = os.Getppid()
	var err error
	if _, another.Start, err = stat(another.PID); err != nil {
		t.Fatal(err)
	}
	stricter := b
	stricter.Timeout++
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.Close()
		w.ok(&b, w.use("exec", shell))
		w.questions()
		elsewhere, other, alias, asRoot := w.use("exec", shell), w.use("exec", shell), w.use("exec", shell), w.use("exec", shell)
		elsewhere.Target.Host, other.Command, alias.Target.Alias, asRoot.Target.User = "i", "rm -rf /", "x", "root"
		orphan := w.use("exec", plugin.Process{})
		renamed := w.use("exec", plugin.Process{PID: shell.PID, Start: shell.Start + 1, Exe: shell.Exe})
		for _, c := range []struct {
			name  string
			b     *block
			u     plugin.Use
			asked int
		}{
			{"another command", &b, other, 0},
			{"another alias of the host", &b, alias, 0},
			{"another kind", &b, w.use("shell", shell), 1},
			{"another shell", &b, w.use("exec", another), 1},
			{"another process with the pid", &b, renamed, 1},
			{"another host", &b, elsewhere, 1},
			{"another user there", &b, asRoot, 1},
			{"another block", &stricter, w.use("exec", shell), 1},
			{"nobody in particular", &b, orphan, 1},
			{"nobody in particular, again", &b, orphan, 1},
			{"what has ended, again", &b, renamed, 1},
		} {
			if !w.ok(c.b, c.u) || w.questions() != c.asked {
				t.Errorf("%s", c.name)
			}
		}
	})
}

// scopeOf binds to what belongs to one person's work, and to nothing that outlives it.
func TestScopeOf(t *testing.T) {
	cmd := exec.Command("sleep", "1000") // leads a session
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	leader := func(exe string) plugin.Process {
		return plugin.Process{PID: cmd.Process.Pid, Start: 5, Exe: exe, TTY: "/dev/pts/1"}
	}
	mux, ssh, git := proc(1<<30, "/usr/bin/muxproxy"), proc(1<<30-1, "/usr/bin/ssh"), proc(1<<30-2, "/usr/bin/git")
	git.TTY = "/dev/pts/1"
	noTTY := leader("/bin/zsh")
	noTTY.TTY = ""
	for _, c := range []struct {
		name  string
		chain []plugin.Process
		want  string // exe; "": none
	}{
		{"a shell in a terminal", []plugin.Process{mux, ssh, git, leader("/bin/zsh")}, "/bin/zsh"},
		{"ssh leads", []plugin.Process{mux, leader("/usr/bin/ssh")}, "/usr/bin/ssh"},
		{"no terminal", []plugin.Process{mux, ssh, git, noTTY}, "/usr/bin/git"},
		{"the chain ends early", []plugin.Process{mux, ssh, git}, "/usr/bin/git"},
		{"ssh without parent", []plugin.Process{mux, ssh}, ""},
		{"no ssh", []plugin.Process{mux, git}, ""},
		{"nothing is known", nil, ""},
		{"init", []plugin.Process{mux, ssh, {PID: 1, Start: 1, Exe: "/bin/something"}}, ""},
		{"no start", []plugin.Process{mux, ssh, {PID: 77, Exe: "/bin/zsh"}}, ""},
		{"no name", []plugin.Process{mux, ssh, proc(77, "")}, ""},
		{"systemd --user", []plugin.Process{mux, ssh, proc(77, "/usr/lib/systemd/systemd")}, ""},
		{"sshd, whose file can't be seen", []plugin.Process{mux, ssh, proc(77, "[sshd-session]")}, ""},
		{"tmux", []plugin.Process{mux, ssh, proc(77, "/usr/bin/tmux")}, ""},
		{"tmux after an upgrade", []plugin.Process{mux, ssh, proc(77, "/usr/bin/tmux (deleted)")}, ""},
		{"tmux of Nix", []plugin.Process{mux, ssh, proc(77, "/nix/store/x/bin/.tmux-wrapped")}, ""},
		{"tmux in brackets", []plugin.Process{mux, ssh, proc(77, "[tmux: server]")}, ""},
		{"screen", []plugin.Process{mux, ssh, proc(77, "/usr/bin/SCREEN")}, ""},
		{"zellij", []plugin.Process{mux, ssh, proc(77, "/usr/bin/zellij")}, ""},
		{"dtach", []plugin.Process{mux, ssh, proc(77, "/usr/bin/dtach")}, ""},
		{"abduco", []plugin.Process{mux, ssh, proc(77, "/usr/bin/abduco")}, ""},
		{"a multiplexer that leads", []plugin.Process{mux, ssh, leader("/usr/bin/screen")}, ""},
		{"a multiplexer that leads, above git", []plugin.Process{mux, ssh, git, leader("/usr/bin/screen")}, "/usr/bin/git"},
	} {
		p, ok := scopeOf(c.chain)
		if ok != (c.want != "") || ok && p.Exe != c.want {
			t.Errorf("%s: %+v, %v", c.name, p, ok)
		}
	}
	// What a person typed into a shell is ssh's doing.
	if got := chainText(asking([]plugin.Process{mux, ssh, leader("/bin/zsh")}), 0); got != fmt.Sprintf("ssh (%d) <- zsh", ssh.PID) {
		t.Error(got)
	}
}

// A yes ends with the process that it is bound to.
func TestProcessEnds(t *testing.T) {
	for _, kernel := range []string{"with pidfd", "without"} {
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_, start, err := stat(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		shell := plugin.Process{PID: cmd.Process.Pid, Start: start, Exe: "/bin/zsh"}
		w := newWorld(t)
		if kernel == "without" {
			w.hold = func(p plugin.Process) (*held, error) { return &held{-1, p}, nil }
		}
		b := defaults(t)
		b.Remember = forever
		for _, want := range []int{1, 0} {
			if !w.ok(&b, w.use("exec", shell)) || w.questions() != want {
				t.Errorf("%s: want %d questions", kernel, want)
			}
		}
		cmd.Process.Kill()
		for w.grants.list() != nil { // a zombie has ended, too
			time.Sleep(time.Millisecond) // polling: the kernel ends it soon
		}
		for range 2 {
			if !w.ok(&b, w.use("exec", shell)) || w.questions() != 1 {
				t.Errorf("%s: an answer counts for a process that has ended", kernel)
			}
		}
		cmd.Wait()
		if _, err := hold(shell); err == nil {
			t.Error("bound to a process that has ended")
		}
	}
}

// The lock, a change of policy, lost events and the plugin's end leave nothing that counts.
func TestForgetting(t *testing.T) {
	shell := self(t)
	for _, c := range []struct {
		name string
		do   func(*world)
	}{
		{"lock", func(w *world) { w.Observe(t.Context(), plugin.Event{Kind: "locked"}) }},
		{"lost events", func(w *world) { w.Observe(t.Context(), plugin.Event{Kind: "wake", Dropped: 1}) }},
		{"another policy", func(w *world) { w.Configure(t.Context(), &plugin.Config{Plugin: plugin.Block{Value: &own{}}}) }},
		{"the end", func(w *world) { w.Close() }},
	} {
		w := newWorld(t)
		b := defaults(t)
		b.Ask = first
		w.ok(&b, w.use("exec", shell))
		if len(w.grants.list()) != 1 {
			t.Fatal("nothing to forget")
		}
		w.Observe(t.Context(), plugin.Event{Kind: "unlocked"})
		if len(w.grants.list()) != 1 {
			t.Error("forgotten by the way")
		}
		if c.do(w); len(w.grants.list()) != 0 {
			t.Errorf("%s: it counts on", c.name)
		}
	}
	// An answer to a question of an earlier policy counts for what was asked.
	w := newWorld(t)
	b := defaults(t)
	b.Ask = first
	w.person = func(context.Context, string) answer {
		w.Configure(t.Context(), &plugin.Config{Plugin: plugin.Block{Value: &own{}}})
		return answer{verdict: yes}
	}
	if !w.ok(&b, w.use("exec", shell)) || len(w.grants.list()) != 0 {
		t.Error("an answer counts on under a policy that it was not given for")
	}
	// A policy that has the block as it was forgets nothing.
	w = newWorld(t)
	w.ok(&b, w.use("exec", shell))
	same := b
	cfg := &plugin.Config{Plugin: plugin.Block{Value: &own{}}, Hosts: []plugin.Block{{Value: &same, Pos: "p:1"}}}
	if ds := w.Configure(t.Context(), cfg); len(ds) > 0 || len(w.grants.list()) != 1 {
		t.Errorf("%v, %d", ds, len(w.grants.list()))
	}
}

// What comes while a question of the same asker is open shares its answer, and other questions wait for it.
func TestOneQuestion(t *testing.T) {
	shell := self(t)
	synctest.Test(t, func(t *testing.T) {
		for _, v := range []verdict{yes, no} {
			w := newWorld(t)
			open, most := 0, 0
			var mu sync.Mutex
			w.person = func(ctx context.Context, _ string) answer {
				mu.Lock()
				open++
				most = max(most, open)
				mu.Unlock()
				a := said(v, 10*time.Second)(ctx, "")
				mu.Lock()
				open--
				mu.Unlock()
				return a
			}
			b := defaults(t)
			var all sync.WaitGroup
			for i := range 20 {
				all.Go(func() { // a burst, in several steps
					time.Sleep(time.Duration(i%3) * time.Second)
					if w.ok(&b, w.use("exec", shell)) != (v == yes) {
						t.Error("the answer is not shared")
					}
				})
			}
			synctest.Wait()
			all.Go(func() { // another host: the next question
				u := w.use("exec", shell)
				u.Target.Host = "i"
				began := time.Now()
				w.ok(&b, u)
				want := 20 * time.Second
				if v == no {
					want += restTime
				}
				if took := time.Since(began); took != want {
					t.Errorf("answered after %v, want %v", took, want)
				}
			})
			all.Wait()
			if n := w.questions(); n != 2 || most != 1 {
				t.Errorf("%d questions, %d at a time", n, most)
			}
			time.Sleep(restTime)
			w.person = nil
			if !w.ok(&b, w.use("exec", shell)) || w.questions() != 1 {
				t.Error("a shared answer counts on")
			}
			w.Close()
		}
	})
}

// A burst that waits for its turn is shown as what it is.
func TestBurstIsShown(t *testing.T) {
	shell := self(t)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.Close()
		w.person = said(yes, 10*time.Second)
		b := defaults(t)
		first := w.use("shell", shell)
		go w.ok(&b, first)
		synctest.Wait()
		for i := range 3 {
			u := w.use("exec", shell)
			u.Command = fmt.Sprint("echo ", i)
			go w.ok(&b, u)
			synctest.Wait()
		}
		time.Sleep(15 * time.Second)
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.asked) != 2 || !strings.Contains(w.asked[1], "\nexec: echo 0\nand exec: echo 1\nand exec: echo 2\n") ||
			!strings.Contains(w.asked[1], fmt.Sprintf("Yes counts for this one, and for every exec there from zsh (%d) that comes meanwhile.", os.Getpid())) {
			t.Errorf("%q", w.asked)
		}
	})
}

// After a no the same asker waits; others don't, and don't wait for it.
func TestRest(t *testing.T) {
	shell := self(t)
	other := proc(os.Getppid(), "/bin/bash")
	synctest.Test(t, func(t *testing.T) {
		for _, v := range []verdict{no, unanswered} {
			w := newWorld(t)
			w.person = said(v, 0)
			b := defaults(t)
			w.ok(&b, w.use("exec", shell))
			w.person = nil
			var all sync.WaitGroup
			for _, c := range []struct {
				u    plugin.Use
				want time.Duration
			}{{w.use("shell", shell), restTime}, {w.use("exec", shell), restTime}, {w.use("exec", other), 0}, {w.use("exec", plugin.Process{}), 0}} {
				all.Go(func() {
					began := time.Now()
					if !w.ok(&b, c.u) {
						t.Error("denied")
					}
					if took := time.Since(began); took != c.want {
						t.Errorf("asked after %v, want %v", took, c.want)
					}
				})
				synctest.Wait()
			}
			all.Wait()
			w.Close()
		}
	})
}

// A question ends with the last who wants to know, with the lock, and with the plugin; the next one goes on.
func TestEnds(t *testing.T) {
	shell := self(t)
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []struct {
			name string
			end  func(w *world, first, second context.CancelFunc)
			want plugin.Decision // of the third
		}{
			{"both leave", func(_ *world, a, b context.CancelFunc) { a(); b() }, plugin.Allow()},
			{"the lock", func(w *world, _, _ context.CancelFunc) { w.Observe(t.Context(), plugin.Event{Kind: "locked"}) },
				plugin.Deny("muxproxy is locked", "try again")},
			{"the end", func(w *world, _, _ context.CancelFunc) { w.Close() }, plugin.Deny("the plugin ends", "try again")},
		} {
			w := newWorld(t)
			w.person = said(yes, 10*time.Second)
			b := defaults(t)
			b.Remember = forever
			ctx1, leave1 := context.WithCancel(t.Context())
			ctx2, leave2 := context.WithCancel(t.Context())
			var all sync.WaitGroup
			for _, ctx := range []context.Context{ctx1, ctx2} {
				all.Go(func() {
					d := w.authorize(ctx, &b, w.use("exec", shell))
					if d == plugin.Allow() || c.want != plugin.Allow() && d != c.want {
						t.Errorf("%s: %+v", c.name, d)
					}
				})
			}
			synctest.Wait()
			elsewhere := w.use("exec", shell)
			elsewhere.Target.Host = "i"
			all.Go(func() {
				began := time.Now()
				if d := w.authorize(t.Context(), &b, elsewhere); d != c.want {
					t.Errorf("%s: %+v, want %+v", c.name, d, c.want)
				}
				if took := time.Since(began); took > 10*time.Second {
					t.Errorf("%s: the next question came only after %v", c.name, took)
				}
			})
			synctest.Wait()
			c.end(w, leave1, leave2)
			all.Wait()
			leave1()
			leave2()
			w.Close()
		}
		// One leaves, the other gets the answer.
		w := newWorld(t)
		defer w.Close()
		w.person = said(yes, 10*time.Second)
		b := defaults(t)
		ctx, leave := context.WithCancel(t.Context())
		go w.authorize(ctx, &b, w.use("exec", shell))
		synctest.Wait()
		time.AfterFunc(time.Second, leave)
		if !w.ok(&b, w.use("exec", shell)) || w.questions() != 1 {
			t.Error("the question ended with who brought it")
		}
	})
}

// The queue is bounded.
func TestManyQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.person = said(yes, time.Second)
		b := defaults(t)
		denied := 0
		var mu sync.Mutex
		var all sync.WaitGroup
		for range maxQueue + 11 {
			all.Go(func() {
				d := w.authorize(t.Context(), &b, w.use("exec", plugin.Process{}))
				mu.Lock()
				defer mu.Unlock()
				switch d {
				case plugin.Allow():
				case plugin.Deny(errQueue.Error(), "try again"):
					denied++
				default:
					t.Errorf("%+v", d)
				}
			})
		}
		all.Wait()
		if denied != 10 {
			t.Errorf("%d denied", denied)
		}
		w.Close()
	})
}

// So are those that wait for `muxproxy allow`.
func TestManyPending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.noWay = errors.New("no display")
		b := defaults(t)
		b.Fallback = pending
		for range maxOpen {
			go w.authorize(t.Context(), &b, w.use("exec", plugin.Process{}))
			synctest.Wait()
		}
		if d := w.authorize(t.Context(), &b, w.use("exec", plugin.Process{})); d != plugin.Deny(errQueue.Error(), "try again") {
			t.Errorf("%+v", d)
		}
		w.Close()
	})
}

// Grants are bounded, too; the oldest goes.
func TestManyGrants(t *testing.T) {
	s := newGrants()
	p := self(t)
	for i := range maxGrants + 3 {
		h, err := hold(p)
		if err != nil {
			t.Fatal(err)
		}
		s.add(grant{key: key{host: fmt.Sprint(i % (maxGrants + 2))}, held: h})
	}
	list := s.list()
	if len(list) != maxGrants || list[0].id != 4 {
		t.Errorf("%d, the first is %d", len(list), list[0].id)
	}
	s.forget(func(*grant) bool { return true })
	s = newGrants()
	for s.last < maxClients-1 { // those of clients hold nothing
		s.last++
		g := &grant{id: s.last, key: key{client: s.last}}
		s.all[g.key] = g
	}
	for first := range uint64(2) {
		s.add(grant{key: key{client: maxClients + first}})
		if list := s.list(); len(list) != maxClients || list[0].key.client != 1+first {
			t.Errorf("%d, the first is of client %d", len(list), list[0].key.client)
		}
	}
}

// Who leaves the queue keeps nobody waiting who stood behind.
func TestWhoLeavesTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 100 { // in either order
			q := newTurns()
			if err := q.take(t.Context(), scope{}, nil); err != nil {
				t.Fatal(err)
			}
			ctx, leave := context.WithCancel(t.Context())
			last, end := context.WithCancel(t.Context())
			results := make(chan error, 2)
			for i, ctx := range []context.Context{ctx, last} {
				go func() { results <- q.take(ctx, scope{pid: i + 1}, func(string) {}) }()
				synctest.Wait()
			}
			leave()
			q.leave()
			synctest.Wait()
			if len(results) != 2 {
				t.Error("who stood behind waits on")
			}
			end()
			synctest.Wait()
		}
	})
}

// Who has just answered the login's question is not asked again for the same: but for nothing else, and nobody else isn't.
func TestLoggedIn(t *testing.T) {
	shell := self(t)
	w := newWorld(t)
	b := defaults(t)
	b.On = kinds
	one, two := w.use("shell", shell), w.use("shell", shell)
	one.LoggedIn, two.Client = true, 2
	forward := one
	forward.Kind = "remote-forward"
	nobody := one
	nobody.Client = 0
	for _, c := range []struct {
		name  string
		u     plugin.Use
		asked int
	}{
		{"its own", one, 0},
		{"its next one, which may be another's", one, 1},
		{"another kind", forward, 0},
		{"another client", two, 1},
		{"no client", nobody, 1},
	} {
		if !w.ok(&b, c.u) || w.questions() != c.asked {
			t.Errorf("%s", c.name)
		}
	}
	w.Observe(t.Context(), plugin.Event{Kind: "end", Use: plugin.Use{Kind: "attach", Client: 1}})
	if len(w.clients) != 0 {
		t.Error("a client is remembered for ever")
	}
	for id := range uint64(maxClients + 10) {
		u := one
		u.Client = 10 + id
		w.ok(&b, u)
	}
	if n := w.questions(); n != 0 || len(w.clients) > maxClients {
		t.Errorf("%d questions, %d clients", n, len(w.clients))
	}
	forgotten := one
	forgotten.Client = 10
	for range 2 {
		if w.ok(&b, forgotten); w.questions() != 1 {
			t.Error("a client that was forgotten counts as new")
		}
		w.Observe(t.Context(), plugin.Event{Kind: "end", Use: plugin.Use{Kind: "attach", Client: maxClients}}) // room for it
	}
	never := b
	never.Ask = deny
	if w.ok(&never, forward) {
		t.Error("a login overrides deny")
	}
}

// `muxproxy allow` and `deny` answer for a whole question, and the plugin learns of it.
func TestPending(t *testing.T) {
	shell := self(t)
	b := defaults(t)
	b.Fallback, b.Remember = pending, forever
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []struct {
			allowed bool
			left    bool // nobody has answered
			want    verdict
		}{{true, false, yes}, {false, false, no}, {false, true, unanswered}} {
			w := newWorld(t)
			w.noWay = errors.New("no display")
			ctx, answeredByHost := context.WithCancel(t.Context())
			var all sync.WaitGroup
			all.Go(func() { w.authorize(ctx, &b, w.use("exec", shell)) }) // the master has its answer
			second := w.use("exec", shell)
			second.Client = 2
			var d plugin.Decision
			all.Go(func() { d = w.authorize(t.Context(), &b, second) })
			elsewhere := w.use("exec", shell) // not kept waiting by what may take long
			elsewhere.Target.Host, elsewhere.Client = "i", 3
			all.Go(func() { w.authorize(t.Context(), &b, elsewhere) })
			synctest.Wait()
			w.confirm.mu.Lock()
			for q := range w.open {
				if !q.pending {
					t.Errorf("%s waits for a turn", q.key.host)
				}
			}
			w.confirm.mu.Unlock()
			answeredByHost()
			if !c.left {
				time.Sleep(answeredTime / 2)
				w.Observe(t.Context(), plugin.Event{Kind: "answered", ID: "of another", Allowed: !c.allowed})
				w.Observe(t.Context(), plugin.Event{Kind: "answered", ID: "id1", Allowed: c.allowed})
				w.Observe(t.Context(), plugin.Event{Kind: "answered", ID: "id2", Allowed: !c.allowed}) // too late
			}
			all.Wait()
			if want := (answer{verdict: c.want}).decision(&b, "p:1"); d != want {
				t.Errorf("%+v: %+v, want %+v", c, d, want)
			}
			if n := len(w.grants.list()); (n == 1) != (c.want == yes) {
				t.Errorf("%+v: %d answers count on", c, n)
			}
			w.Close()
		}
	})
}

// Everything that can be wrong with a block, and where.
func TestConfigure(t *testing.T) {
	trusted := func(string) (string, error) { return "", errors.New("askpass \x1b is missing") }
	for want, change := range map[string]func(*block){
		"": func(*block) {},
		`[ask] ask can't be "often"; allowed: always, first, after-idle, never, deny`:                     func(b *block) { b.Ask = "often" },
		`[ask] ask can't be ""; allowed: always, first, after-idle, never, deny`:                          func(b *block) { b.Ask = "" },
		`[on 1] there is no kind of use "shall"; allowed: ` + strings.Join(kinds, ", "):                   func(b *block) { b.On = []string{"exec", "shall"} },
		`warning [on] nothing is asked about: ask = "never" says so more plainly`:                         func(b *block) { b.On = nil },
		"[timeout] nobody can answer within 0s":                                                           func(b *block) { b.Timeout = 0 },
		`[idle] idle has to be more than 0s; ask = "always" asks each time`:                               func(b *block) { b.Ask, b.Idle = afterIdle, 0 },
		`[idle] idle is for ask = "after-idle", not for "always"`:                                         func(b *block) { b.Idle = time.Minute },
		`[remember] remember can't be "soon": it is a duration such as "5m", or "forever"`:                func(b *block) { b.Remember = "soon" },
		`[remember] remember can't be "-1s": it is a duration such as "5m", or "forever"`:                 func(b *block) { b.Remember = "-1s" },
		`[remember] remember is for ask = "always": with "first" a yes counts as long as the connection`:  func(b *block) { b.Ask, b.Remember = first, forever },
		`[remember] remember is for ask = "always": with "after-idle" a yes counts until idle has passed`: func(b *block) { b.Ask, b.Remember = afterIdle, "1s" },
		`[remember] remember is for ask = "always": with "never" nobody is asked`:                         func(b *block) { b.Ask, b.Remember = never, "1s" },
		`[fallback] fallback can't be "tty"; allowed: deny, terminal, pending`:                            func(b *block) { b.Fallback = "tty" },
		`[display] display can't be ":0"; allowed: session, caller`:                                       func(b *block) { b.Display = ":0" },
		`[askpass] askpass can't be "zenity": it is a path that begins with / or ~/`:                      func(b *block) { b.Askpass = "zenity" },
		`warning [askpass] askpass \x1b is missing`:                                                       func(b *block) { b.Askpass = "/opt/askpass" },
	} {
		w := newWorld(t)
		w.program = trusted
		b := defaults(t)
		change(&b)
		cfg := &plugin.Config{Plugin: plugin.Block{Value: &own{}}, Hosts: []plugin.Block{{Value: &b, Pos: "p:1"}}}
		checked := w.Check(t.Context(), cfg)
		if len(w.rules) > 0 {
			t.Error("checked, and taken")
		}
		ds := w.Configure(t.Context(), cfg)
		if fmt.Sprint(checked) != fmt.Sprint(ds) {
			t.Errorf("checked: %v, configured: %v", checked, ds)
		}
		var got []string
		for _, d := range ds {
			warning := ""
			if d.Warning {
				warning = "warning "
			}
			got = append(got, warning+fmt.Sprint(d.Path)+" "+d.Summary)
		}
		if text := strings.Join(got, "\n"); text != want {
			t.Errorf("%s\nwant %s", text, want)
		}
		if taken := w.rules[b.rule("p:1")]; taken == ds.HasErrors() {
			t.Errorf("%q: in force: %v", want, taken)
		}
	}
	w := newWorld(t)
	ds := w.Configure(t.Context(), &plugin.Config{Plugin: plugin.Block{Value: &own{"askpass"}}})
	if len(ds) != 1 || !ds.HasErrors() {
		t.Errorf("%v", ds)
	}
}

func TestCommand(t *testing.T) {
	w := newWorld(t)
	b := defaults(t)
	run := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := w.Command(t.Context(), args, &out, &errs)
		return code, out.String(), errs.String()
	}
	if code, out, _ := run("grants"); code != 0 || out != "no answer counts on\n" {
		t.Errorf("%d, %q", code, out)
	}
	if code, out, _ := run("grants", "--json"); code != 0 || out != "[]\n" {
		t.Errorf("%d, %q", code, out)
	}
	shell := self(t)
	shell.Exe = "/tmp/z\x1bsh"
	b.Remember = "5m"
	w.ok(&b, w.use("exec", shell))
	b.Remember = forever
	w.ok(&b, w.use("shell", shell))
	b.Remember, b.Ask = "0s", first
	w.ok(&b, w.use("agent", shell))
	b.Ask = afterIdle
	w.ok(&b, w.use("x11", shell))
	code, out, _ := run("grants")
	lines := strings.Split(out, "\n")
	for i, want := range []string{"ID HOST KIND FROM SINCE LEFT POLICY", "1 u@h:22 exec PROC CLOCK 5m0s p:1", "2 u@h:22 shell PROC CLOCK as long as that runs p:1",
		"3 u@h:22 agent PROC CLOCK as long as the connection is up p:1", "4 u@h:22 x11 PROC CLOCK 15m0s p:1", ""} {
		got := strings.Join(strings.Fields(lines[i]), " ")
		got = strings.ReplaceAll(got, fmt.Sprintf(`z\x1bsh (%d)`, shell.PID), "PROC")
		if f := strings.Fields(got); len(f) > 4 && i > 0 {
			if _, err := time.Parse(time.TimeOnly, f[4]); err == nil {
				got = strings.Replace(got, f[4], "CLOCK", 1)
			}
		}
		got = strings.Replace(got, "4m59s", "5m0s", 1) // the machine may be busy
		got = strings.Replace(got, "14m59s", "15m0s", 1)
		if got != want || code != 0 {
			t.Errorf("%d, %q, want %q", code, got, want)
		}
	}
	code, out, _ = run("grants", "--json")
	var list []map[string]any
	if err := json.Unmarshal([]byte(out), &list); err != nil || code != 0 || len(list) != 4 {
		t.Fatalf("%d, %v: %s", code, err, out)
	}
	if g := list[0]; g["id"] != "1" || g["host"] != "u@h:22" || g["kind"] != "exec" || g["process"] != "z\x1bsh" || g["until"] == nil ||
		g["policy"] != "p:1" || list[1]["until"] != nil || list[3]["until"] == nil {
		t.Errorf("%s", out)
	}
	if code, _, errs := run("forget", "7\x1b"); code != 1 || errs != "no answer 7\\x1b counts; see `muxproxy confirm grants`\n" {
		t.Errorf("%d, %q", code, errs)
	}
	if code, _, _ := run("forget", "2"); code != 0 || len(w.grants.list()) != 3 {
		t.Errorf("%d, %d left", code, len(w.grants.list()))
	}
	if code, out, _ := run("forget"); code != 0 || out != "3 forgotten\n" || len(w.grants.list()) != 0 {
		t.Errorf("%d, %q", code, out)
	}
	for _, args := range [][]string{nil, {"grant"}, {"grants", "x"}, {"forget", "--all"}, {"forget", "1", "2"}} {
		if code, _, errs := run(args...); code != 2 || !strings.HasPrefix(errs, "usage: ") {
			t.Errorf("%q: %d, %q", args, code, errs)
		}
	}
	if code, out, _ := run("--help"); code != 0 || !strings.HasPrefix(out, "usage: ") {
		t.Errorf("%d, %q", code, out)
	}
}
