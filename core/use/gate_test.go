package use_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muxproxy/muxproxy/core/use"
)

func openAudit(t testing.TB, opts use.AuditOptions) *use.Audit {
	t.Helper()
	if opts.Path == "" {
		opts.Path = filepath.Join(t.TempDir(), "audit.log")
	}
	a, err := use.OpenAudit(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// records reads a log, every line of which has to be JSON.
func records(t *testing.T, path string) []map[string]any {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []map[string]any
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var r map[string]any
		if err := json.Unmarshal(s.Bytes(), &r); err != nil {
			t.Fatalf("%s: %q: %v", path, s.Text(), err)
		}
		all = append(all, r)
	}
	return all
}

func someUse(kind use.Kind) use.Use {
	return use.Use{
		Kind: kind, Client: 7, Target: use.Target{User: "alice", Host: "::1", Port: 2200, Alias: "db"},
		Caller: use.Caller{UID: 1000, Processes: []use.Process{
			{PID: 4123, Exe: "/usr/bin/muxproxy"}, {PID: 4122, Exe: "/usr/bin/ssh", Args: []string{"ssh", "secret"}}}},
	}
}

func TestGateEveryKind(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	audit := openAudit(t, use.AuditOptions{Path: path})
	g := use.NewGate(audit)
	ids := map[string]bool{}
	for _, kind := range use.Kinds() {
		p, denied := g.Decide(t.Context(), someUse(kind), nil)
		if denied != nil || !p.Valid() || !p.Valid(use.Kind("x"), kind) || p.Valid(use.Kind("x")) || p.Use().Kind != kind {
			t.Fatalf("%s: permit %+v, denied %v", kind, p, denied)
		}
		ids[p.ID()] = true
		p.End(use.Result{Status: "ok"})
		p.End(use.Result{Status: "cut"})
		if p.Valid() || p.Valid(kind) {
			t.Errorf("%s: still valid after End", kind)
		}
	}
	p, denied := g.Decide(t.Context(), someUse("teleport\x1b"), nil)
	if p != nil || denied == nil || denied.Error() != `denied by gate: unknown kind of use "teleport\\x1b"` {
		t.Errorf("unknown kind: permit %v, denied %v", p, denied)
	}
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	if len(ids) != len(use.Kinds()) {
		t.Errorf("%d ids for %d uses", len(ids), len(use.Kinds()))
	}
	all := records(t, path)
	if want := 2*len(use.Kinds()) + 1; len(all) != want {
		t.Fatalf("%d records, want %d", len(all), want)
	}
	for i, kind := range use.Kinds() {
		d, e := all[2*i], all[2*i+1]
		if d["record"] != "decision" || d["decision"] != "allow" || d["kind"] != string(kind) ||
			e["record"] != "end" || e["status"] != "ok" || d["id"] != e["id"] || !ids[d["id"].(string)] {
			t.Errorf("%s: %v, %v", kind, d, e)
		}
	}
	if last := all[len(all)-1]; last["decision"] != "deny" || last["by"] != "gate" || last["kind"] != `teleport\x1b` {
		t.Errorf("denial: %v", last)
	}
}

func TestGateChecks(t *testing.T) {
	var asked []string
	check := func(name string, d *use.Denied) use.Check {
		return func(_ context.Context, _ use.Use, say func(string)) *use.Denied {
			asked = append(asked, name)
			say("waiting for " + name)
			return d
		}
	}
	no := &use.Denied{By: "b", Reason: "no", Hint: "ask b"}
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	late, cancel := context.WithTimeout(context.Background(), 0)
	defer cancel()
	leaves, leave := context.WithCancel(context.Background())
	for _, c := range []struct {
		name   string
		ctx    context.Context
		checks []use.Check
		asked  string
		denied string
	}{
		{"none", context.Background(), nil, "", ""},
		{"all allow", context.Background(), []use.Check{check("a", nil), check("b", nil)}, "a b", ""},
		{"first denial ends it", context.Background(), []use.Check{check("a", nil), check("b", no), check("c", nil)}, "a b",
			"denied by b: no; ask b"},
		{"gone before", cancelled, []use.Check{check("a", nil)}, "", "denied by gate: whoever asked left before the decision"},
		{"gone before, no checks", cancelled, nil, "", "denied by gate: whoever asked left before the decision"},
		{"too late", late, []use.Check{check("a", nil)}, "", "denied by gate: no decision in time; try again"},
		{"gone meanwhile", leaves, []use.Check{func(context.Context, use.Use, func(string)) *use.Denied {
			leave()
			return nil
		}, check("b", nil)}, "", "denied by gate: whoever asked left before the decision"},
	} {
		t.Run(c.name, func(t *testing.T) {
			asked = nil
			said := 0
			p, denied := use.NewGate(nil, c.checks...).Decide(c.ctx, someUse(use.Exec), func(string) { said++ })
			if got := strings.Join(asked, " "); got != c.asked || said != len(asked) {
				t.Errorf("asked %q, said %d; want %q", got, said, c.asked)
			}
			switch {
			case (p == nil) == (denied == nil):
				t.Errorf("permit %v and denial %v", p, denied)
			case denied == nil && c.denied != "":
				t.Errorf("allowed, want %q", c.denied)
			case denied != nil && denied.Error() != c.denied:
				t.Errorf("%q, want %q", denied.Error(), c.denied)
			}
		})
	}
}

func TestForeignPermits(t *testing.T) {
	for name, p := range map[string]*use.Permit{"nil": nil, "zero": {}} {
		p.End(use.Result{Status: "ok"})
		if p.Valid() || p.Valid(use.Kinds()...) || p.ID() != "" || p.Use().Kind != "" {
			t.Errorf("%s permit is good for something", name)
		}
	}
}

func TestPermitCopySharesItsEnd(t *testing.T) {
	p, denied := use.NewGate(nil).Decide(t.Context(), someUse(use.Shell), nil)
	if denied != nil {
		t.Fatal(denied)
	}
	twin := *p
	p.End(use.Result{Status: "ok"})
	if twin.Valid() {
		t.Error("a copy outlived its permit")
	}
}

func TestPermitEndsOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	audit := openAudit(t, use.AuditOptions{Path: path})
	p, _ := use.NewGate(audit).Decide(t.Context(), someUse(use.Shell), nil)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() { p.End(use.Result{Status: "ok"}) })
	}
	wg.Wait()
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	if n := len(records(t, path)); n != 2 {
		t.Errorf("%d records, want a decision and one end", n)
	}
}

// A decision may cost 20 µs at most: it is on the path of every shell, exec and forward.
func BenchmarkDecide(b *testing.B) {
	g := use.NewGate(openAudit(b, use.AuditOptions{}))
	u := someUse(use.Exec)
	u.Command = "git-upload-pack '/srv/x.git'"
	b.ReportAllocs()
	for b.Loop() {
		p, denied := g.Decide(context.Background(), u, nil)
		if denied != nil {
			b.Fatal(denied)
		}
		p.End(use.Result{Status: "exit"})
	}
}

func TestDecideIsQuick(t *testing.T) {
	g := use.NewGate(openAudit(t, use.AuditOptions{}))
	u := someUse(use.Exec)
	u.Command = "rsync --server -vlogDtpre.iLsfxC . " + strings.Repeat("x", 200)
	const n = 10000
	began := time.Now()
	for range n {
		if _, denied := g.Decide(context.Background(), u, nil); denied != nil {
			t.Fatal(denied)
		}
	}
	// Ten times the goal: the race detector and a busy machine count too.
	if each := time.Since(began) / n; each > 200*time.Microsecond {
		t.Errorf("a decision takes %v", each)
	}
}

// log is an Observer that writes down what it is told.
type log struct {
	mu    sync.Mutex // guards lines
	lines []string
}

func (l *log) note(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l *log) Decided(id string, u use.Use, d *use.Denied) {
	l.note("%s %s %v", id, u.Kind, d == nil)
}
func (l *log) Ended(id string, u use.Use, r use.Result) { l.note("%s %s %s", id, u.Kind, r.Status) }

// Who observes is told what the audit log says, with the same ids.
func TestGateObserver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	audit := openAudit(t, use.AuditOptions{Path: path})
	var told log
	lock, err := use.OpenLock(filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	g := lock.NewGate(audit, &told, func(_ context.Context, u use.Use, _ func(string)) *use.Denied {
		if u.Kind == use.Exec {
			return &use.Denied{By: "test", Reason: "no"}
		}
		return nil
	})
	shell, _ := g.Decide(t.Context(), someUse(use.RemoteForward), nil)
	g.Decide(t.Context(), someUse(use.Exec), nil)
	if err := lock.LockSession(use.LockedByScreen); err != nil {
		t.Fatal(err)
	}
	if shell.Connect() == nil {
		t.Error("a connection in spite of the lock")
	}
	shell.End(use.Result{Status: "ok"})
	shell.End(use.Result{Status: "cut"})
	audit.Record("forward", "listen", "a@h:22", "on\x1b 1080")
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	var logged []string
	all := records(t, path)
	for _, r := range all[:len(all)-1] {
		switch r["record"] {
		case "decision":
			logged = append(logged, fmt.Sprintf("%s %s %v", r["id"], r["kind"], r["decision"] == "allow"))
		case "end":
			logged = append(logged, fmt.Sprintf("%s %s %s", r["id"], use.RemoteForward, r["status"]))
		}
	}
	if len(logged) != 4 || !slices.Equal(logged, told.lines) {
		t.Errorf("told %q, logged %q", told.lines, logged)
	}
	last := all[len(all)-1]
	delete(last, "time")
	if got := fmt.Sprint(last); got != `map[detail:on\x1b 1080 event:listen plugin:forward record:plugin target:a@h:22]` {
		t.Error(got)
	}
}
