package confirm

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// shown is an answer that counts on, in JSON.
type shown struct {
	ID      string     `json:"id"`
	Host    string     `json:"host"`
	Kind    string     `json:"kind"`
	Process string     `json:"process"`
	PID     int        `json:"pid"`
	Since   time.Time  `json:"since"`
	Until   *time.Time `json:"until,omitempty"`
	Lasts   string     `json:"lasts"`
	Policy  string     `json:"policy"`
}

const usage = "usage: muxproxy confirm grants [--json]\n       muxproxy confirm forget [ID]\n"

// Command implements plugin.Commander.
func (c *confirm) Command(_ context.Context, args []string, stdout, stderr io.Writer) int {
	switch verb := strings.Join(args, " "); {
	case verb == "grants":
		return c.table(stdout)
	case verb == "grants --json":
		list := []shown{}
		for _, g := range c.grants.list() {
			list = append(list, g.shown())
		}
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		if e.Encode(list) != nil {
			return 255
		}
		return 0
	case verb == "forget":
		list := c.grants.forget(func(*grant) bool { return true })
		c.forgotten(list, "told so")
		fmt.Fprintf(stdout, "%d forgotten\n", len(list))
		return 0
	case len(args) == 2 && args[0] == "forget" && !strings.HasPrefix(args[1], "-"):
		list := c.grants.forget(func(g *grant) bool { return g.name() == args[1] })
		if len(list) == 0 {
			fmt.Fprintf(stderr, "no answer %s counts; see `muxproxy confirm grants`\n", brief(args[1], maxName))
			return 1
		}
		c.forgotten(list, "told so")
		return 0
	case verb == "--help" || verb == "-h" || verb == "help":
		fmt.Fprint(stdout, usage)
		return 0
	}
	fmt.Fprint(stderr, usage)
	return 2
}

func (g *grant) shown() shown {
	s := shown{
		ID: g.name(), Host: g.host, Kind: cmp.Or(g.key.kind, "all"), Process: base(g.who), PID: g.who.PID, Since: g.since, Lasts: g.lasts(),
		Policy: g.pos,
	}
	if end := g.ends(); !end.IsZero() {
		s.Until = &end
	}
	return s
}

func (c *confirm) table(out io.Writer) int {
	list := c.grants.list()
	if len(list) == 0 {
		fmt.Fprintln(out, "no answer counts on")
		return 0
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tHOST\tKIND\tFROM\tSINCE\tLEFT\tPOLICY")
	for _, g := range list {
		left := g.lasts()
		if end := g.ends(); !end.IsZero() {
			left = time.Until(end).Round(time.Second).String()
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", g.name(), plugin.Printable(g.host), g.what(), processName(g.who),
			g.since.Format(time.TimeOnly), left, place(g.pos))
	}
	if w.Flush() != nil {
		return 255
	}
	return 0
}
