package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/mattn/go-isatty"

	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/use"
)

// watchInterval is how often a live view asks the master.
const watchInterval = time.Second

// moved counts bytes, or bytes per second.
type moved struct{ in, out int64 }

// rates are what upstreams, clients and channels move in a second. What is not in it has not been seen for long enough.
type rates map[string]moved

func upstreamKey(u control.Upstream) string { return "upstream " + number(u.ID) }
func clientKey(c control.Client) string     { return "client " + number(c.ID) }

// channelKey tells the channels of a client apart as far as Status does.
func channelKey(c control.Client, ch control.Channel) string {
	return fmt.Sprintf("%s %d %s %s", clientKey(c), ch.Since.UnixNano(), ch.Kind, ch.Detail)
}

func (r rates) heads() (in, out string) {
	if r == nil {
		return "IN", "OUT"
	}
	return "IN/S", "OUT/S"
}

// of is the rate of what has moved so much in all; without rates it is that.
func (r rates) of(key string, in, out int64) (string, string) {
	if r == nil {
		return size(in), size(out)
	}
	m, ok := r[key]
	if !ok {
		return "-", "-"
	}
	return size(m.in), size(m.out)
}

// newRates compares two looks at the same master. What is new has begun at zero.
func newRates(before, now look) rates {
	r := rates{}
	took := now.at.Sub(before.at).Seconds()
	if before.status.PID != now.status.PID || !before.status.Since.Equal(now.status.Since) || took <= 0 {
		return r
	}
	was := map[string]moved{}
	for _, u := range before.status.Upstreams {
		was[upstreamKey(u)] = moved{u.In, u.Out}
	}
	for _, c := range before.status.Clients {
		for _, ch := range c.Channels {
			was[channelKey(c, ch)] = moved{ch.In, ch.Out}
		}
	}
	rate := func(key string, in, out int64) moved {
		per := func(n int64) int64 { return int64(float64(max(n, 0)) / took) }
		m := moved{per(in - was[key].in), per(out - was[key].out)}
		r[key] = m
		return m
	}
	for _, u := range now.status.Upstreams {
		rate(upstreamKey(u), u.In, u.Out)
	}
	for _, c := range now.status.Clients {
		var sum moved // not the difference of sums: a channel that has ended would count against the others
		for _, ch := range c.Channels {
			m := rate(channelKey(c, ch), ch.In, ch.Out)
			sum.in += m.in
			sum.out += m.out
		}
		r[clientKey(c)] = sum
	}
	return r
}

// seen is what came of asking the master. It is the live view's message.
type seen struct {
	look look
	err  error
}

// runWatch shows a live view until it is told to end.
func runWatch(ctx context.Context, a *app) error {
	in, ok1 := a.stdin.(*os.File)
	out, ok2 := a.stdout.(*os.File)
	if !ok1 || !ok2 || !isatty.IsTerminal(in.Fd()) || !isatty.IsTerminal(out.Fd()) || a.getenv("TERM") == "dumb" {
		return &statusError{exitUsage, errors.New("--watch needs a terminal; `muxproxy status` prints once")}
	}
	asking, stop := context.WithCancel(ctx)
	// No signal handler: ctx ends with SIGINT and SIGTERM.
	p := tea.NewProgram(&watch{color: colors(out)}, tea.WithInput(in), tea.WithOutput(out), tea.WithoutSignalHandler())
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		a.ask(asking, watchInterval, func(s seen) { p.Send(s) })
		p.Quit() // does nothing once the program has ended
	}()
	_, err := p.Run()
	stop()
	<-asked
	if err != nil {
		return fmt.Errorf("the terminal: %w", err)
	}
	return ctx.Err()
}

// ask tells what the master holds, once in an interval, until ctx is done. A master that ends is waited for.
func (a *app) ask(ctx context.Context, interval time.Duration, tell func(seen)) {
	var m *control.Master
	defer func() {
		if m != nil {
			m.Disconnect()
		}
	}()
	var last look
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		var err error
		if m == nil {
			m, err = a.connect(ctx)
		}
		if err == nil {
			var now look
			if now, err = a.look(ctx, m); err == nil {
				now.rates = newRates(last, now)
				last = now
				tell(seen{look: now})
			}
			if err != nil || now.status.Draining { // then another may have its sockets
				m.Disconnect()
				m = nil
			}
		}
		if err != nil && ctx.Err() == nil {
			tell(seen{err: err})
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// watch is the live view: a tea.Model.
type watch struct {
	color         bool
	width, height int
	last          *seen
	top           int // the first line that is shown
}

func (*watch) Init() tea.Cmd { return nil }

func (w *watch) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		w.width, w.height = msg.Width, msg.Height
	case seen:
		w.last = &msg
	case tea.KeyPressMsg:
		switch msg.String() {
		case "q", "ctrl+c", "esc":
			return w, tea.Quit
		case "ctrl+z":
			return w, tea.Suspend
		case "up", "k":
			w.top--
		case "down", "j":
			w.top++
		case "pgup", "b":
			w.top -= w.room()
		case "pgdown", "space":
			w.top += w.room()
		case "home", "g":
			w.top = 0
		case "end", "G":
			w.top = len(w.page())
		}
	}
	w.top = max(0, min(w.top, len(w.page())-w.room()))
	return w, nil
}

// room is for how many lines there is room above the last, which is the view's own.
func (w *watch) room() int { return max(w.height-1, 1) }

func (w *watch) View() tea.View {
	lines := w.page()
	foot := "q: quit"
	if end := min(w.top+w.room(), len(lines)); end-w.top < len(lines) {
		foot += fmt.Sprintf("   lines %d to %d of %d: arrows, PgUp, PgDn", w.top+1, end, len(lines))
		lines = lines[w.top:end]
	}
	p := &page{color: w.color}
	lines = append(slices.Clone(lines), slices.Repeat([]string{""}, w.room()-len(lines))...)
	v := tea.NewView(strings.Join(append(lines, p.paint(faint, foot)), "\n"))
	v.AltScreen = true
	v.DisableBracketedPasteMode = true
	return v
}

// page is the whole view; what is too wide for the terminal is cut off by the renderer.
func (w *watch) page() []string {
	p := &page{width: max(w.width, minWidth), color: w.color}
	switch {
	case w.last == nil:
	case errors.Is(w.last.err, bridge.ErrNoMaster), errors.Is(w.last.err, control.ErrLost):
		p.add("no master runs; waiting for the next one")
	case w.last.err != nil:
		p.text(0, red, use.Printable(w.last.err.Error()))
	default:
		p.status(w.last.look)
	}
	return p.lines
}
