package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/use"
)

func newStatus(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [--json]",
		Short: "show connections, who uses them, and for what",
		Long: `Shows the upstream connections, and for each local client what started it and
its channels, with the connection that each is on. SESSIONS counts those that
are open, one kept in advance among them, against what the server was found to
allow. A connection is silent if its server gave no sign of life when asked;
one without clients says how long it is kept.
IN counts bytes towards the remote host, OUT bytes from it. Ends with 1 if no
master runs.`,
		Example: "  muxproxy status\n  muxproxy status --json | jq '.upstreams[].target'",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runStatus(cmd.Context(), a, asJSON) },
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON; pid is 0 if no master runs")
	return cmd
}

func runStatus(ctx context.Context, a *app, asJSON bool) error {
	m, err := a.connect(ctx)
	if errors.Is(err, bridge.ErrNoMaster) {
		if asJSON {
			err = a.printJSON(control.Status{Upstreams: []control.Upstream{}, Clients: []control.Client{}})
		} else {
			_, err = fmt.Fprintln(a.stdout, "no master runs; the next ssh starts one, or `muxproxy master start`")
		}
		if err != nil {
			return err
		}
		return &statusError{status: exitNo}
	}
	if err != nil {
		return err
	}
	defer m.Disconnect()
	s, err := m.Status(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		return a.printJSON(s)
	}
	return printStatus(a.stdout, s, a.now())
}

const columns = 80

// printStatus writes tables of at most 80 columns. Texts that are too long lose their middle.
func printStatus(w io.Writer, s control.Status, now time.Time) error {
	out := bufio.NewWriter(w)
	line := func(indent int, text string) {
		fmt.Fprintf(out, "%*s%s\n", indent, "", cut(text, columns-indent))
	}
	upstream := func(id, target, lane, state, sessions, in, outBytes, age string) {
		fmt.Fprintf(out, "%-4s %-24s %-11s %-9s %8s %5s %5s %6s\n", id, cut(target, 24), cut(lane, 11), cut(state, 9),
			sessions, in, outBytes, age)
	}
	row := func(id, name, a, b, in, outBytes, age string) {
		fmt.Fprintf(out, "%-4s %-29s  %-11s  %-9s %6s %6s %6s\n", id, cut(name, 29), cut(a, 11), cut(b, 9), in, outBytes, age)
	}
	head := fmt.Sprintf("muxproxy %s, pid %d, up %s", s.Version, s.PID, age(s.Since, now))
	if s.Draining {
		head += ", draining"
	}
	line(0, head)
	line(0, "sockets: "+s.Sockets)
	if s.Policy != "" {
		line(0, "policy: "+s.Policy)
	}
	if s.Lock.Locked {
		line(0, fmt.Sprintf("locked by %s for %s", strings.Join(s.Lock.By, ", "), age(s.Lock.Since, now)))
	}
	line(0, "")

	if len(s.Upstreams) == 0 {
		line(0, "no upstreams")
	} else {
		upstream("ID", "UPSTREAM", "LANE", "STATE", "SESSIONS", "IN", "OUT", "UP")
	}
	for _, u := range s.Upstreams {
		state, sessions := u.State, strconv.Itoa(u.Sessions)
		if u.Suspect {
			state = "silent"
		}
		if u.MaxSessions > 0 {
			sessions += "/" + strconv.Itoa(u.MaxSessions)
		}
		upstream(number(u.ID), u.Target, u.Lane, state, sessions, size(u.In), size(u.Out), age(u.Since, now))
		var about []string
		for _, text := range []string{u.Addr, u.Server, u.Auth} {
			if text != "" {
				about = append(about, text)
			}
		}
		if len(about) > 0 {
			line(5, strings.Join(about, ", "))
		}
		if u.Kex != "" {
			kex := u.Kex + ", " + u.Cipher
			if !u.PostQuantum {
				kex += ", not post-quantum"
			}
			line(5, kex)
		}
		if !u.KeptUntil.IsZero() {
			line(5, fmt.Sprintf("no clients for %s, %s", age(u.IdleSince, now), kept(u.KeptUntil, now)))
		}
	}
	line(0, "")

	if len(s.Clients) == 0 {
		line(0, "no clients")
	} else {
		row("ID", "CLIENT", "UPSTREAM", "CHANNELS", "IN", "OUT", "UP")
	}
	for _, c := range s.Clients {
		name, upstream := c.Target, "none yet"
		if c.Alias != "" {
			name += " (" + c.Alias + ")"
		}
		if c.Upstream != 0 {
			upstream = number(c.Upstream)
		}
		var in, outBytes int64
		for _, ch := range c.Channels {
			in += ch.In
			outBytes += ch.Out
		}
		row(number(c.ID), name, upstream, strconv.Itoa(len(c.Channels)), size(in), size(outBytes), age(c.Since, now))
		line(5, "by "+c.Caller.String())
		for _, ch := range c.Channels {
			what := ch.Kind
			if ch.Detail != "" {
				what += " " + ch.Detail
			}
			fmt.Fprintf(out, "     %-42s on %-7s %6s %6s %6s\n", cut(what, 42), number(ch.Upstream), size(ch.In),
				size(ch.Out), age(ch.Since, now))
		}
	}
	return out.Flush()
}

// kept says how long a connection without clients stays.
func kept(until, now time.Time) string {
	switch wait := until.Sub(now); {
	case wait > 100*365*24*time.Hour:
		return "kept for ever"
	case wait > 24*time.Hour:
		return "kept until " + until.In(now.Location()).Format("2006-01-02 15:04")
	}
	return "kept until " + until.In(now.Location()).Format("15:04:05")
}

func number(n uint64) string { return strconv.FormatUint(n, 10) }

// cut escapes text and makes it at most n characters long by leaving out its middle.
func cut(text string, n int) string {
	text = use.Printable(text)
	if utf8.RuneCountInString(text) <= n {
		return text
	}
	r := []rune(text)
	head := n / 2
	return string(r[:head]) + "…" + string(r[len(r)-(n-head-1):])
}

// size is a number of bytes in at most 5 characters.
func size(n int64) string {
	if n < 1024 {
		return strconv.FormatInt(n, 10)
	}
	v, unit := float64(n), ""
	for _, unit = range []string{"K", "M", "G", "T", "P", "E"} {
		if v /= 1024; v < 1023.5 {
			break
		}
	}
	if v < 9.95 {
		return strconv.FormatFloat(v, 'f', 1, 64) + unit
	}
	return strconv.FormatFloat(v, 'f', 0, 64) + unit
}

// age is the time since t in at most 6 characters.
func age(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	d := max(now.Sub(t), 0) // a clock that was set back
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}
