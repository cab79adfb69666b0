package use_test

import (
	"testing"

	"github.com/muxproxy/muxproxy/core/use"
)

type fixedPolicy struct {
	denied *use.Denied
	use.Effective
	asked []use.Use
}

func (p *fixedPolicy) For(t use.Target, c use.Caller) use.Effective {
	p.asked = append(p.asked, use.Use{Target: t, Caller: c})
	return p
}

func (p *fixedPolicy) Deny(use.Use) *use.Denied { return p.denied }

// The gate takes what the policy in force says of the use's own target and caller, and denies without one.
func TestByPolicy(t *testing.T) {
	u := someUse(use.Shell)
	strict, lax := &fixedPolicy{denied: &use.Denied{By: "policy", Reason: "closed"}}, &fixedPolicy{}
	var current use.Lookup
	g := use.NewGate(nil, use.ByPolicy(func() use.Lookup { return current }))
	if p, d := g.Decide(t.Context(), u, nil); p != nil || d.By != "policy" {
		t.Errorf("without a policy: %v", d)
	}
	current = strict
	if p, d := g.Decide(t.Context(), u, nil); p != nil || d.Reason != "closed" {
		t.Errorf("denied: %v", d)
	}
	if got := strict.asked; len(got) != 1 || got[0].Target != u.Target || got[0].Caller.UID != u.Caller.UID {
		t.Errorf("asked about %+v", got)
	}
	current = lax
	p, d := g.Decide(t.Context(), u, nil)
	if p == nil {
		t.Fatal(d)
	}
	p.End(use.Result{})
}
