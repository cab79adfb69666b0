//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// way is how ssh reaches the server.
type way string

const (
	plain         way = "plain ssh"
	controlMaster way = "ControlMaster"
	pipes         way = "pipes"  // muxproxy
	fdpass        way = "fdpass" // muxproxy --fdpass
)

var (
	allWays = []way{plain, controlMaster, pipes, fdpass}
	// ours are those that goals are about.
	ours = []way{pipes, fdpass}
)

// measure is one line of the table: the same thing in several ways.
type measure struct {
	Case string `json:"case"`
	What string `json:"what"`
	Unit string `json:"unit"`
	// Values are one per round, of the same rounds in each way.
	Values map[way][]float64 `json:"values"`
	Goal   *goal             `json:"goal,omitempty"`
}

// goal is what muxproxy's ways are to reach.
type goal struct {
	Op    string  `json:"op"` // "<=" or ">="
	Bound float64 `json:"bound"`
	// Of names what the bound is a ratio of: ControlMaster in the same rounds, or what Base holds. Empty: the bound is
	// in the measure's own unit.
	Of   string            `json:"of,omitempty"`
	Base map[way][]float64 `json:"base,omitempty"`
	// Results and Met are what came out, by way.
	Results map[way]float64 `json:"results"`
	Met     map[way]bool    `json:"met"`
}

func atMostOfControlMaster(bound float64) *goal {
	return &goal{Op: "<=", Bound: bound, Of: string(controlMaster)}
}

func atLeastOfControlMaster(bound float64) *goal {
	return &goal{Op: ">=", Bound: bound, Of: string(controlMaster)}
}

func atMost(bound float64) *goal { return &goal{Op: "<=", Bound: bound} }

func (g *goal) String() string {
	s := fmt.Sprintf("%s %g", g.Op, g.Bound)
	if g.Of != "" {
		s += " of " + g.Of
	}
	return s
}

// judge compares a measure with its goal. A way with nothing to compare has no verdict.
func (g *goal) judge(m *measure) {
	g.Results, g.Met = map[way]float64{}, map[way]bool{}
	for _, w := range ours {
		v := m.Values[w]
		if len(v) == 0 {
			continue
		}
		r := median(v)
		switch {
		case g.Base != nil:
			if len(g.Base[w]) == 0 {
				continue
			}
			r = ratio(v, g.Base[w])
		case g.Of != "":
			if len(m.Values[controlMaster]) == 0 {
				continue
			}
			r = ratio(v, m.Values[controlMaster])
		}
		g.Results[w] = r
		g.Met[w] = g.Op == "<=" && r <= g.Bound || g.Op == ">=" && r >= g.Bound
	}
}

// median of some values; NaN-free: there is at least one.
func median(values []float64) float64 { return quantile(values, 0.5) }

// quantile is the value that q of all don't exceed, between two of them in proportion.
func quantile(values []float64, q float64) float64 {
	v := slices.Sorted(slices.Values(values))
	at := q * float64(len(v)-1)
	i := int(at)
	if i+1 >= len(v) {
		return v[len(v)-1]
	}
	return v[i] + (at-float64(i))*(v[i+1]-v[i])
}

// ratio is the median of the rounds' ratios, which other work on the machine sways less than the ratio of medians.
func ratio(a, b []float64) float64 {
	if len(a) != len(b) {
		return median(a) / median(b)
	}
	each := make([]float64, 0, len(a))
	for i := range a {
		if b[i] == 0 {
			return median(a) / median(b)
		}
		each = append(each, a[i]/b[i])
	}
	return median(each)
}

type failure struct {
	Case  string `json:"case"`
	Error string `json:"error"`
}

// report is all that a run found.
type report struct {
	Date     time.Time          `json:"date"`
	Machine  map[string]string  `json:"machine"`
	Quick    bool               `json:"quick"`
	Load     [2]string          `json:"load"` // /proc/loadavg before and after
	Took     map[string]float64 `json:"took"` // seconds, by case
	Measures []*measure         `json:"measures"`
	Failed   []failure          `json:"failed,omitempty"`
}

func (r *report) begin(b *bench) {
	r.Date, r.Quick, r.Took = time.Now().UTC().Truncate(time.Second), b.quick, map[string]float64{}
	r.Machine, r.Load[0] = b.machine(), loadAverage()
}

func (r *report) finish() {
	r.Load[1] = loadAverage()
	for _, m := range r.Measures {
		if m.Goal != nil {
			m.Goal.judge(m)
		}
	}
}

// add starts a line of the table for the current case.
func (b *bench) add(what, unit string, g *goal) *measure {
	m := &measure{Case: b.current, What: what, Unit: unit, Values: map[way][]float64{}, Goal: g}
	b.report.Measures = append(b.report.Measures, m)
	return m
}

func (m *measure) put(w way, v float64) { m.Values[w] = append(m.Values[w], v) }

// met reports whether every goal is met and every case ran.
func (r *report) met() bool {
	for _, m := range r.Measures {
		if m.Goal == nil {
			continue
		}
		for _, ok := range m.Goal.Met {
			if !ok {
				return false
			}
		}
	}
	return len(r.Failed) == 0
}

func (r *report) write(name string) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	out, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(out, '\n'), 0o644)
}

// number has three digits that count.
func number(v float64) string {
	switch {
	case v == float64(int64(v)) || v >= 100 || v <= -100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10 || v <= -10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// cell is a way's median, and how far the rounds lie apart: half of their range, in percent.
func (m *measure) cell(w way) string {
	v := m.Values[w]
	if len(v) == 0 {
		return ""
	}
	mid := median(v)
	s := number(mid)
	if len(v) > 1 && mid != 0 {
		s += fmt.Sprintf(" ±%.0f%%", (slices.Max(v)-slices.Min(v))/2/mid*100)
	}
	return s
}

// ratios of muxproxy's ways to another one.
func (m *measure) ratios(to way) string {
	base := m.Values[to]
	if len(base) == 0 || median(base) == 0 {
		return ""
	}
	return each(func(w way) string {
		if len(m.Values[w]) == 0 {
			return ""
		}
		return fmt.Sprintf("%.2f", ratio(m.Values[w], base))
	})
}

func (m *measure) verdict() string {
	if m.Goal == nil {
		return ""
	}
	return each(func(w way) string {
		met, ok := m.Goal.Met[w]
		if !ok {
			return ""
		}
		word := "not met"
		if met {
			word = "met"
		}
		if m.Goal.Base != nil {
			word = fmt.Sprintf("%.2f %s", m.Goal.Results[w], word)
		}
		return word
	})
}

// each is what f says of muxproxy's ways, once if it says the same of all.
func each(f func(way) string) string {
	var all []string
	for _, w := range ours {
		if s := f(w); s != "" {
			all = append(all, s)
		}
	}
	return strings.Join(slices.Compact(all), " / ")
}

var head = []string{"what", "unit", string(plain), string(controlMaster), string(pipes), string(fdpass), "of ControlMaster",
	"of plain ssh", "goal", "verdict"}

func (m *measure) row() []string {
	row := []string{m.What, m.Unit}
	for _, w := range allWays {
		row = append(row, m.cell(w))
	}
	g := ""
	if m.Goal != nil {
		g = m.Goal.String()
	}
	return append(row, m.ratios(controlMaster), m.ratios(plain), g, m.verdict())
}

// print writes the table. Where there are two ratios or verdicts, the first is of pipes, the second of fdpass.
func (r *report) print(out io.Writer, markdown bool) error {
	var err error
	p := func(format string, args ...any) {
		if _, e := fmt.Fprintf(out, format, args...); e != nil && err == nil {
			err = e
		}
	}
	m := r.Machine
	quick := ""
	if r.Quick {
		quick = " With --quick: fewer rounds, clients and bytes, so less to rely on."
	}
	p("%s, %s processors (%s), Linux %s, %s, sshd with %s; load average %s before, %s after.%s\n\n", r.Date.Format("2006-01-02 15:04 UTC"),
		m["processors"], m["processor"], m["kernel"], m["muxproxy"], m["ssh"], r.Load[0], r.Load[1], quick)
	if markdown {
		p("| %s |\n|%s\n", strings.Join(head, " | "), strings.Repeat(" --- |", len(head)))
		for _, m := range r.Measures {
			p("| %s |\n", strings.Join(m.row(), " | "))
		}
	} else {
		w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, strings.Join(head, "\t"))
		for _, m := range r.Measures {
			fmt.Fprintln(w, strings.Join(m.row(), "\t"))
		}
		if e := w.Flush(); err == nil {
			err = e
		}
	}
	for _, f := range r.Failed {
		p("\n%s could not be measured: %s\n", f.Case, f.Error)
	}
	return err
}
