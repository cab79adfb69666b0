package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/use"
)

func newStatus(a *app) *cobra.Command {
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:   "status [--json | --watch]",
		Short: "show connections, who uses them, and for what",
		Long: `Shows the upstream connections, and for each local client what started it and
its channels, with the connection that each is on. SESSIONS counts those that
are open, one kept in advance among them, against what the server was found to
allow. A connection is silent if its server gave no sign of life when asked;
one without clients says how long it is kept.
IN counts bytes towards the remote host, OUT bytes from it. Ends with 1 if no
master runs.

--watch shows the same once a second, with bytes per second, until q or ^C; it
waits for a master if none runs. Arrows, PgUp and PgDn move what does not fit.

docs/status.md says what the JSON holds. Colours are for terminals, and not with
NO_COLOR in the environment.`,
		Example: "  muxproxy status --watch\n  muxproxy status --json | jq '.upstreams[].target'",
		Args: func(cmd *cobra.Command, args []string) error {
			if asJSON && watch {
				return errors.New("give either --json or --watch")
			}
			return cobra.NoArgs(cmd, args)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch {
				return runWatch(cmd.Context(), a)
			}
			return runStatus(cmd.Context(), a, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON; pid is 0 if no master runs")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it as it changes, on a terminal")
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
	if asJSON {
		s, err := m.Status(ctx)
		if err != nil {
			return err
		}
		return a.printJSON(s)
	}
	l, err := a.look(ctx, m)
	if err != nil {
		return err
	}
	p := &page{width: minWidth, color: colors(a.stdout)}
	p.status(l)
	return p.writeTo(a.stdout)
}

func (a *app) look(ctx context.Context, m *control.Master) (look, error) {
	s, err := m.Status(ctx)
	if err != nil {
		return look{}, err
	}
	pending, err := m.Pending(ctx)
	return look{status: s, pending: pending, at: a.now()}, err
}

// look is a master at one moment.
type look struct {
	status  control.Status
	pending []control.Pending
	at      time.Time
	rates   rates // nil: totals are shown
}

// page is text for a person, in lines of at most width columns but where a number needs more.
type page struct {
	width int
	color bool
	lines []string
}

// minWidth is what the tables need; names get what a page has beyond it.
const minWidth = 80

// SGR parameters (ECMA-48, 8.3.117).
const (
	bold   = "1"
	faint  = "2"
	red    = "31"
	green  = "32"
	yellow = "33"
)

func (p *page) paint(code, text string) string {
	if !p.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// add ends a line of cells.
func (p *page) add(cells ...string) {
	p.lines = append(p.lines, strings.TrimRight(strings.Join(cells, " "), " "))
}

// text adds a line that loses its middle if it is too long. An empty code is no colour.
func (p *page) text(indent int, code, text string) {
	text = cut(text, p.width-indent)
	if code != "" {
		text = p.paint(code, text)
	}
	p.add(strings.Repeat(" ", indent) + text)
}

func (p *page) writeTo(w io.Writer) error {
	_, err := io.WriteString(w, strings.Join(p.lines, "\n")+"\n")
	return err
}

// status adds a master, its pending questions, upstreams and clients.
func (p *page) status(l look) {
	s := l.status
	head := fmt.Sprintf("muxproxy %s, pid %d, up %s", s.Version, s.PID, age(s.Since, l.at))
	if s.Draining {
		head += ", draining"
	}
	p.text(0, bold, head)
	p.text(0, "", "sockets: "+s.Sockets)
	if s.Policy != "" {
		p.text(0, "", "policy: "+s.Policy)
	}
	if s.Lock.Locked {
		p.text(0, red, fmt.Sprintf("locked by %s for %s", strings.Join(s.Lock.By, ", "), age(s.Lock.Since, l.at)))
	}
	p.questions(l)
	p.add()
	p.upstreams(l)
	p.add()
	p.clients(l)
}

func (p *page) questions(l look) {
	if len(l.pending) == 0 {
		return
	}
	p.add()
	p.text(0, yellow, "waiting for a person, who answers by `muxproxy allow ID` or `muxproxy deny ID`:")
	for _, q := range l.pending {
		id, what := q.ID, q.Kind
		if !q.Answerable {
			id = "-" // only the plugin takes the answer
		}
		if q.Detail != "" {
			what += " " + q.Detail
		}
		rest := use.Printable(fmt.Sprintf(" on %s, asked by %s for %s", q.Target, q.Plugin, age(q.Since, l.at)))
		p.text(0, "", fmt.Sprintf("%-8s %s%s", use.Printable(id), cut(what, max(20, p.width-9-use.Columns(rest))), rest))
		for _, more := range []string{q.Message, q.Caller} {
			if more != "" {
				p.text(9, "", more)
			}
		}
	}
}

func (p *page) upstreams(l look) {
	if len(l.status.Upstreams) == 0 {
		p.add("no upstreams")
		return
	}
	ids := 4
	for _, u := range l.status.Upstreams {
		ids = max(ids, len(number(u.ID)))
	}
	name := p.width - minWidth + 28 - ids
	in, out := l.rates.heads()
	p.add(p.paint(faint, strings.Join([]string{left("ID", ids), left("UPSTREAM", name), left("LANE", 11), left("STATE", 9),
		right("SESSIONS", 8), right(in, 5), right(out, 5), right("UP", 6)}, " ")))
	for _, u := range l.status.Upstreams {
		state, hue, sessions := u.State, yellow, strconv.Itoa(u.Sessions)
		switch {
		case u.Suspect:
			state, hue = "silent", red
		case u.State == "up":
			hue = green
		}
		if u.MaxSessions > 0 {
			sessions += "/" + strconv.Itoa(u.MaxSessions)
		}
		in, out := l.rates.of(upstreamKey(u), u.In, u.Out)
		p.add(left(number(u.ID), ids), left(u.Target, name), left(u.Lane, 11), p.paint(hue, left(state, 9)),
			right(sessions, 8), right(in, 5), right(out, 5), right(age(u.Since, l.at), 6))
		if l.rates != nil {
			continue // what stays the same is no live view's
		}
		var about []string
		for _, text := range []string{u.Addr, u.Server, u.Auth} {
			if text != "" {
				about = append(about, text)
			}
		}
		if len(about) > 0 {
			p.text(5, "", strings.Join(about, ", "))
		}
		switch kex := u.Kex + ", " + u.Cipher; {
		case u.Kex == "":
		case u.PostQuantum:
			p.text(5, "", kex)
		default:
			p.text(5, yellow, kex+", not post-quantum")
		}
		if !u.KeptUntil.IsZero() {
			p.text(5, "", fmt.Sprintf("no clients for %s, %s", age(u.IdleSince, l.at), kept(u.KeptUntil, l.at)))
		}
	}
}

func (p *page) clients(l look) {
	if len(l.status.Clients) == 0 {
		p.add("no clients")
		return
	}
	ids := 4
	for _, c := range l.status.Clients {
		ids = max(ids, len(number(c.ID)))
	}
	wide := p.width - minWidth + 34 - ids
	in, out := l.rates.heads()
	p.add(p.paint(faint, strings.Join([]string{left("ID", ids), left("CLIENT", wide), left("UPSTREAM", 12), left("CHANNELS", 9),
		right(in, 6), right(out, 6), right("UP", 6)}, " ")))
	for _, c := range l.status.Clients {
		name, upstream := c.Target, "none yet"
		if c.Alias != "" {
			name += " (" + c.Alias + ")"
		}
		if c.Upstream != 0 {
			upstream = number(c.Upstream)
		}
		var total moved
		for _, ch := range c.Channels {
			total.in += ch.In
			total.out += ch.Out
		}
		in, out := l.rates.of(clientKey(c), total.in, total.out)
		p.add(left(number(c.ID), ids), left(name, wide), left(upstream, 12), left(strconv.Itoa(len(c.Channels)), 9),
			right(in, 6), right(out, 6), right(age(c.Since, l.at), 6))
		p.text(5, "", "by "+c.Caller.String())
		for _, ch := range c.Channels {
			what := ch.Kind
			if ch.Detail != "" {
				what += " " + ch.Detail
			}
			in, out := l.rates.of(channelKey(c, ch), ch.In, ch.Out)
			p.add("    ", left(what, p.width-minWidth+42), "on", left(number(ch.Upstream), 7), right(in, 6), right(out, 6),
				right(age(ch.Since, l.at), 6))
		}
	}
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

// left and right make text exactly n columns wide; right leaves what is longer as it is, since it gets numbers.
func left(text string, n int) string {
	text = cut(text, n)
	return text + strings.Repeat(" ", n-use.Columns(text))
}

func right(text string, n int) string { return fmt.Sprintf("%*s", n, text) }

// cut escapes text and makes it at most n columns wide by leaving out its middle.
func cut(text string, n int) string {
	text = use.Printable(text)
	if use.Columns(text) <= n {
		return text
	}
	r := []rune(text)
	head, tail := 0, len(r)
	for head < len(r) && use.Columns(string(r[:head+1])) <= n/2 {
		head++
	}
	for tail > head && use.Columns(string(r[tail-1:])) <= n-n/2-1 {
		tail--
	}
	return string(r[:head]) + "…" + string(r[tail:])
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
