package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
)

func TestRates(t *testing.T) {
	at := func(d time.Duration, channels ...control.Channel) look {
		l := look{at: noon.Add(d), status: control.Status{PID: 1, Since: noon}}
		u := control.Upstream{ID: 3}
		for _, ch := range channels {
			u.In, u.Out = u.In+ch.In, u.Out+ch.Out
		}
		l.status.Upstreams = []control.Upstream{u}
		l.status.Clients = []control.Client{{ID: 7, Channels: channels}}
		return l
	}
	ch := func(kind string, in, out int64) control.Channel { return control.Channel{Kind: kind, In: in, Out: out} }
	other := at(0, ch("exec", 1, 1))
	other.status.PID = 2
	for _, c := range []struct {
		name        string
		before, now look
		want        string
	}{
		{"first", look{}, at(0, ch("exec", 5, 5)), ""},
		{"another master", other, at(time.Second, ch("exec", 5, 5)), ""},
		{"no time has passed", at(0, ch("exec", 1, 1)), at(0, ch("exec", 5, 5)), ""},
		{"two seconds", at(0, ch("exec", 1, 1)), at(2*time.Second, ch("exec", 5, 2001)),
			"channel 2/1000, client 7 2/1000, upstream 3 2/1000"},
		{"a new channel", at(0, ch("exec", 1, 1)), at(time.Second, ch("exec", 2, 1), ch("shell", 10, 20)),
			"channel 1/0, channel 10/20, client 7 11/20, upstream 3 11/20"},
		{"one ended", at(0, ch("exec", 1000, 0), ch("shell", 1, 1)), at(time.Second, ch("shell", 3, 1)),
			"channel 2/0, client 7 2/0, upstream 3 0/0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			r := newRates(c.before, c.now)
			for _, key := range slices.Sorted(maps.Keys(r)) {
				name := key
				if strings.HasPrefix(key, "client 7 ") {
					name = "channel"
				}
				got = append(got, fmt.Sprintf("%s %d/%d", name, r[key].in, r[key].out))
			}
			slices.Sort(got)
			if text := strings.Join(got, ", "); text != c.want {
				t.Errorf("%s, want %s", text, c.want)
			}
		})
	}
}

// frame is what a view shows, without colours and the spaces at the ends of its lines.
func frame(w *watch) string {
	return sgr.ReplaceAllString(w.View().Content, "")
}

func TestWatchView(t *testing.T) {
	before := look{status: busy(), at: noon.Add(-time.Second)}
	now := look{status: busy(), at: noon, pending: waiting()}
	for i := range before.status.Upstreams {
		before.status.Upstreams[i].Out /= 2
	}
	now.rates = newRates(before, now)
	w := &watch{color: true}
	w.Update(tea.WindowSizeMsg{Width: 100, Height: 40})
	if got := strings.TrimSpace(frame(w)); got != "q: quit" {
		t.Errorf("before anything is known: %q", got)
	}
	w.Update(seen{look: now})
	golden(t, "watch", frame(w)+"\n")
	if n := strings.Count(frame(w), "\n") + 1; n != 40 {
		t.Errorf("%d lines", n)
	}

	w.Update(tea.WindowSizeMsg{Width: 60, Height: 10})
	all := w.page()
	shows := func(first, last int) {
		t.Helper()
		lines := strings.Split(frame(w), "\n")
		if len(lines) != 10 || !strings.HasSuffix(lines[9], fmt.Sprintf("lines %d to %d of %d: arrows, PgUp, PgDn", first, last, len(all))) {
			t.Errorf("%d lines, the last is %q; want %d to %d", len(lines), lines[len(lines)-1], first, last)
		}
		if want := sgr.ReplaceAllString(all[first-1], ""); lines[0] != want {
			t.Errorf("the first line is %q, want %q", lines[0], want)
		}
	}
	press := func(code rune) tea.Cmd {
		_, cmd := w.Update(tea.KeyPressMsg{Code: code})
		return cmd
	}
	n := len(all)
	shows(1, 9)
	for _, step := range []struct {
		key   rune
		first int
	}{
		{tea.KeyUp, 1}, {tea.KeyDown, 2}, {tea.KeyPgDown, 11}, {tea.KeyPgUp, 2}, {tea.KeyEnd, n - 8}, {tea.KeyDown, n - 8},
		{tea.KeyUp, n - 9}, {tea.KeyHome, 1}, {tea.KeySpace, 10}, {'k', 9}, {'j', 10}, {'x', 10},
	} {
		if cmd := press(step.key); cmd != nil {
			t.Errorf("key %v does something", step.key)
		}
		shows(step.first, step.first+8)
	}
	// What has become shorter leaves no gap.
	press(tea.KeyEnd)
	w.Update(seen{look: look{status: control.Status{Version: "1", Since: noon}, at: noon, rates: rates{}}})
	if lines := strings.Split(frame(w), "\n"); len(lines) != 10 || !strings.HasPrefix(lines[0], "muxproxy 1") || lines[9] != "q: quit" {
		t.Errorf("%q", lines)
	}
	for err, want := range map[error]string{
		bridge.ErrNoMaster:     "no master runs; waiting for the next one",
		control.ErrLost:        "no master runs; waiting for the next one",
		errors.New("a\x1b[2J"): `a\x1b[2J`,
	} {
		w.Update(seen{err: err})
		if line, _, _ := strings.Cut(frame(w), "\n"); line != want {
			t.Errorf("%v: %q", err, line)
		}
	}
	for _, key := range []tea.KeyPressMsg{{Code: 'q'}, {Code: 'c', Mod: tea.ModCtrl}, {Code: tea.KeyEscape}} {
		if _, cmd := w.Update(key); cmd == nil || cmd() != tea.Quit() {
			t.Errorf("%v does not quit", key)
		}
	}
	if v := w.View(); !v.AltScreen {
		t.Error("it overwrites what is on the terminal")
	}
	// A terminal of no size is no reason to crash.
	w.Update(tea.WindowSizeMsg{})
	w.Update(seen{look: now})
	frame(w)
}

func TestWatchNeedsTerminal(t *testing.T) {
	w := newWorld(t)
	w.serve(&fakeMaster{})
	status, stdout, stderr := w.run("status", "--watch")
	if status != exitUsage || stdout != "" || stderr != "muxproxy: --watch needs a terminal; `muxproxy status` prints once\n" {
		t.Errorf("status %d, %q, %q", status, stdout, stderr)
	}
	if status, _, stderr = w.run("status", "--watch", "--json"); status != exitUsage || !strings.Contains(stderr, "give either --json or --watch") {
		t.Errorf("with --json: status %d, %q", status, stderr)
	}
}

// A live view asks again and again, sees that the master has gone, and finds the next one.
func TestAsk(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	a := &app{getenv: w.getenv, now: time.Now}
	told := make(chan seen)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		a.ask(ctx, time.Millisecond, func(s seen) {
			select {
			case told <- s:
			case <-ctx.Done():
			}
		})
	}()
	until := func(what string, cond func(seen) bool) {
		t.Helper()
		late := time.After(20 * time.Second)
		for {
			select {
			case s := <-told:
				if cond(s) {
					return
				}
			case <-late:
				t.Fatalf("never %s", what)
			}
		}
	}
	until("without a master", func(s seen) bool { return errors.Is(s.err, bridge.ErrNoMaster) })
	stop := w.serve(&fakeMaster{status: busy()})
	until("with one", func(s seen) bool { return s.err == nil && len(s.look.status.Upstreams) > 0 })
	until("with rates", func(s seen) bool { return len(s.look.rates) > 0 })
	stop()
	until("without it", func(s seen) bool { return errors.Is(s.err, bridge.ErrNoMaster) })
	stop3 := w.serveBackend(&pluginMaster{fakeMaster: &fakeMaster{}, pending: waiting()})
	until("with the next", func(s seen) bool { return s.err == nil && len(s.look.pending) == 2 })
	// One that drains still answers on its old connections, but its successor has the sockets.
	remove := func() {
		if err := os.Remove(filepath.Join(w.dirs.Runtime, paths.ControlSocket)); err != nil {
			t.Fatal(err)
		}
	}
	remove()
	w.serve(&fakeMaster{status: control.Status{PID: 2, Draining: true}})
	stop3()
	until("with one that drains", func(s seen) bool { return s.look.status.PID == 2 })
	remove()
	w.serve(&fakeMaster{status: control.Status{PID: 3}})
	until("with its successor", func(s seen) bool { return s.look.status.PID == 3 })
	cancel()
	<-ended
}
