//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{[]float64{7}, 0.5, 7},
		{[]float64{3, 1, 2}, 0.5, 2},
		{[]float64{4, 1, 2, 3}, 0.5, 2.5},
		{[]float64{10, 20}, 0.25, 12.5},
		{[]float64{1, 2, 3}, 1, 3},
		{[]float64{1, 2, 3}, 0, 1},
	} {
		if got := quantile(c.values, c.q); got != c.want {
			t.Errorf("quantile(%v, %v) = %v, want %v", c.values, c.q, got, c.want)
		}
	}
}

// Rounds are compared with their own: a machine that is busy in one of them changes both.
func TestRatio(t *testing.T) {
	for _, c := range []struct {
		a, b []float64
		want float64
	}{
		{[]float64{1, 10, 100}, []float64{2, 20, 200}, 0.5},
		{[]float64{10, 30, 500}, []float64{100, 100, 1000}, 0.3},
		{[]float64{10, 20, 30}, []float64{10}, 2},
		{[]float64{5, 5}, []float64{0, 10}, 1},
	} {
		if got := ratio(c.a, c.b); got != c.want {
			t.Errorf("ratio(%v, %v) = %v, want %v", c.a, c.b, got, c.want)
		}
	}
}

func TestGoals(t *testing.T) {
	cm := map[way][]float64{controlMaster: {100}, pipes: {60}, fdpass: {61}}
	none := map[way][]float64{pipes: {60}}
	idle := map[way][]float64{pipes: {50}, fdpass: {61}}
	for _, c := range []struct {
		name    string
		goal    *goal
		values  map[way][]float64
		verdict string
		met     bool
	}{
		{"at most, both sides of it", atMostOfControlMaster(0.6), cm, "met / not met", false},
		{"at most", atMostOfControlMaster(0.7), cm, "met", true},
		{"at least", atLeastOfControlMaster(0.6), cm, "met", true},
		{"at least, missed by one", atLeastOfControlMaster(0.61), cm, "not met / met", false},
		{"in its unit", atMost(60), cm, "met / not met", false},
		{"of what was not measured", atMostOfControlMaster(0.1), none, "", true},
		{"of something else", &goal{Op: "<=", Bound: 1.1, Of: "idle", Base: idle}, cm, "1.20 not met / 1.00 met", false},
		{"none", nil, cm, "", true},
	} {
		r := report{Measures: []*measure{{What: c.name, Values: c.values, Goal: c.goal}}}
		r.finish()
		if got := r.Measures[0].verdict(); got != c.verdict || r.met() != c.met {
			t.Errorf("%s: %q, %v; want %q, %v", c.name, got, r.met(), c.verdict, c.met)
		}
	}
	failed := report{Failed: []failure{{"x", "y"}}}
	if failed.met() {
		t.Error("a case that failed meets its goals")
	}
}

func TestPrint(t *testing.T) {
	r := report{
		Quick:   true,
		Date:    time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Machine: map[string]string{"processors": "2"},
		Measures: []*measure{{
			Case: "c", What: "thing", Unit: "ms", Goal: atMostOfControlMaster(0.6),
			Values: map[way][]float64{plain: {1000, 1000}, controlMaster: {200, 240}, pipes: {100, 120}, fdpass: {120, 144}},
		}},
		Failed: []failure{{"other", "no such luck"}},
	}
	r.finish()
	for _, c := range []struct {
		markdown bool
		want     []string
	}{
		{true, []string{"| what | unit | plain ssh |", "| thing | ms | 1000 ±0% | 220 ±9% | 110 ±9% | 132 ±9% | 0.50 / 0.60 | 0.11 / 0.13 | <= 0.6 of ControlMaster | met |"}},
		{false, []string{"thing  ms    1000 ±0%"}},
	} {
		var out bytes.Buffer
		if err := r.print(&out, c.markdown); err != nil {
			t.Fatal(err)
		}
		for _, want := range append(c.want, "2026-01-02 03:04 UTC, 2 processors", "With --quick: fewer rounds", "other could not be measured: no such luck") {
			if !strings.Contains(out.String(), want) {
				t.Errorf("no %q in\n%s", want, out.String())
			}
		}
	}
	name := filepath.Join(t.TempDir(), "new/bench.json")
	if err := r.write(name); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var back report
	if err := json.Unmarshal(text, &back); err != nil || len(back.Measures) != 1 || !back.Measures[0].Goal.Met[pipes] {
		t.Errorf("%+v, %v", back, err)
	}
}

func TestOnProcessor(t *testing.T) {
	if onProcessor(os.Getpid()) <= 0 {
		t.Error("this process has not run")
	}
	if got := onProcessor(1 << 30); got != 0 {
		t.Errorf("a process that is not there has run for %s", got)
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		patterns, name string
		want, bad      bool
	}{
		{"*", "bulk", true, false},
		{"bulk", "bulklink", false, false},
		{"bulk*", "bulklink", true, false},
		{"git, bulk", "bulk", true, false},
		{"[", "bulk", false, true},
	} {
		got, err := matches(c.patterns, c.name)
		if got != c.want || (err != nil) != c.bad {
			t.Errorf("matches(%q, %q) = %v, %v", c.patterns, c.name, got, err)
		}
	}
}

// What is read of /proc is plausible for this process.
func TestProc(t *testing.T) {
	s, err := readStat(os.Getpid())
	if err != nil || s.parent != os.Getppid() || s.start == "" {
		t.Errorf("%+v, %v", s, err)
	}
	m, err := readMem(os.Getpid())
	if err != nil || m.rss < 1000 || m.pss > m.rss {
		t.Errorf("%+v, %v", m, err)
	}
	if _, ok := descendants(os.Getppid())[os.Getpid()]; !ok {
		t.Error("this process is not below its parent")
	}
}
