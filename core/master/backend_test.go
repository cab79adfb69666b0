package master

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muxproxy/muxproxy/core/pluginhost"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// Where a stream from the host leads is decided once, as long as it lasts, and its end is the permit's.
func TestPermitOfAnArrival(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	audit, err := use.OpenAudit(use.AuditOptions{Path: path, Report: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	gate, lock := newGate(t, audit, `host "db" {
  deny {
    when   = use.kind == "remote-forward" && use.name == "connect" && use.port == 81
    reason = "no"
  }
}`)
	snapshot, _ := policy.Parse("config.hcl", nil, policy.Options{})
	m := &Master{gate: gate}
	m.policy.now.Store(snapshot)
	listening, denied := gate.Decide(t.Context(), use.Use{
		Kind: use.RemoteForward, Target: use.Target{User: "me", Host: "db", Port: 22}, Addr: "localhost:81",
	}, nil)
	if denied != nil {
		t.Fatal(denied) // the deny is about connections
	}
	l := &listener{b: backend{m}, permit: listening}
	l.users.Add(2) // one more than the test ends, since there is no lease to give back
	a := &arrival{b: l.b, l: l}
	ask := func(network, address string) string {
		if err := a.Permit(t.Context(), pluginhost.Actor{Plugin: "forward"}, network, address); err != nil {
			return err.Error()
		}
		return "yes"
	}
	for _, c := range []struct{ network, address, want string }{
		{"tcp", "here", `"here": want host:port`},
		{"tcp", "h:81", "denied by policy: no"},
		{"tcp", "h:80", "yes"},
		{"unix", "/s", "a stream leads to one place"},
	} {
		if got := ask(c.network, c.address); !strings.HasPrefix(got, c.want) {
			t.Errorf("%s %s: %s, want %s", c.network, c.address, got, c.want)
		}
	}
	if err := lock.Lock(nil); err != nil {
		t.Fatal(err)
	}
	if got := ask("tcp", "h:80"); !strings.HasPrefix(got, "denied by lock") {
		t.Errorf("locked: %s", got)
	}
	if err := lock.Unlock(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	a.leave(use.Result{Status: "closed", In: 3, Out: 4})
	late := a.Permit(t.Context(), pluginhost.Actor{}, "tcp", "h:80")
	if !errors.Is(late, pool.ErrGone) {
		t.Errorf("after its end: %v", late)
	}
	audit.Close()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for text, n := range map[string]int{
		`"record":"decision"`: 6, `"name":"connect"`: 5, `"decision":"deny"`: 2, `"status":"closed","in":3,"out":4`: 1, `"record":"end"`: 3,
	} {
		if got := strings.Count(string(b), text); got != n {
			t.Errorf("%d times %s, not %d:\n%s", got, text, n, b)
		}
	}
}
