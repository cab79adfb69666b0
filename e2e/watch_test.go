//go:build linux

package e2e

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"
)

// pane is a shell in a terminal of tmux.
type pane struct {
	w *world
}

func newPane(w *world, columns, rows int) *pane {
	w.t.Helper()
	p := &pane{w}
	p.tmux("new-session", "-d", "-x", strconv.Itoa(columns), "-y", strconv.Itoa(rows), "env", "PS1=$ ", "sh")
	w.t.Cleanup(func() {
		pid, err := strconv.Atoi(strings.TrimSpace(p.tmux("display-message", "-p", "#{pid}")))
		p.tmux("kill-server")
		if err != nil || !within(patience, func() bool { return gone(pid) }) {
			w.t.Errorf("tmux, pid %d, did not end: %v", pid, err)
		}
	})
	return p
}

func (p *pane) tmux(args ...string) string {
	p.w.t.Helper()
	r := p.w.run(spec{args: append([]string{"tmux", "-u", "-f", "/dev/null", "-S", p.w.path("tmux.sock")}, args...), null: true})
	if r.status != 0 {
		p.w.t.Fatalf("tmux %q: status %d: %s", args, r.status, r.err)
	}
	return r.out
}

func (p *pane) keys(names ...string) { p.tmux(append([]string{"send-keys"}, names...)...) }

// line types a command.
func (p *pane) line(text string) {
	p.tmux("send-keys", "-l", text)
	p.keys("Enter")
}

// screen is what stands there; with colour, as escape sequences.
func (p *pane) screen(color bool) string {
	p.w.t.Helper()
	if color {
		return p.tmux("capture-pane", "-p", "-e")
	}
	return p.tmux("capture-pane", "-p")
}

func (p *pane) shows(pattern string) {
	p.w.t.Helper()
	re := regexp.MustCompile(`(?m)` + pattern)
	var last string
	if !within(patience, func() bool {
		last = p.screen(false)
		return re.MatchString(last)
	}) {
		p.w.t.Fatalf("the terminal never shows %s but\n%s", pattern, last)
	}
}

func TestStatusWatch(t *testing.T) {
	if plainMode {
		t.Log("plain ssh has no status")
		return
	}
	t.Parallel()
	w := newWorld(t, fdpass)
	p := newPane(w, 90, 24)
	muxproxy := binDir + "/muxproxy"
	p.line("clear; echo one''mark; stty -g >before")
	p.shows(`^onemark`)

	// It waits for a master, sees it come, a client come and move something, the master end and come again.
	p.line(muxproxy + " status --watch; echo ended $?")
	p.shows(`^no master runs; waiting for the next one`)
	p.shows(`^q: quit`)
	held := w.hold()
	p.shows(`^1 +` + me + `@127\.0\.0\.1:\d+ +interactive +up +\d+ +\S+ +\S+ +\S+$`)
	p.shows(`^ +exec cat +on 1 +0 +0 +\d+s$`)
	go held.in.Write(make([]byte, 8<<20)) // ends when the test closes it
	p.shows(`^ +exec cat +on 1 +[0-9.]+M +[0-9.]+M +\d+s$`)
	if strings.Contains(p.screen(false), "onemark") {
		t.Error("it does not have the screen to itself")
	}
	if s := p.screen(true); !strings.Contains(s, "\x1b[32mup") {
		t.Errorf("no colour:\n%q", s)
	}
	// One that is smaller shows a part, cut off at its right edge.
	p.tmux("resize-window", "-x", "50", "-y", "8")
	p.shows(`^q: quit   lines 1 to 7 of \d+: arrows`)
	for line := range strings.Lines(p.screen(false)) {
		if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > 50 {
			t.Errorf("%d columns: %q", n, line)
		}
	}
	p.keys("End")
	p.shows(`^q: quit   lines [^1]\d* to (\d+) of `)
	p.tmux("resize-window", "-x", "90", "-y", "24")
	held.in.Close()
	first := w.mustStatus().PID
	w.stopMaster()
	p.shows(`^no master runs; waiting for the next one`)
	want(t, w.ssh("box", "true"), 0, "")
	p.shows(`^muxproxy .*, pid \d+, up`)
	if second := w.mustStatus().PID; second == first {
		t.Fatal("the master has not ended")
	}
	p.shows(fmt.Sprintf(`, pid %d, up`, w.mustStatus().PID))

	// However it ends, the terminal is as it was.
	for _, end := range []struct {
		name   string
		end    func()
		status int
	}{
		{"q", func() { p.keys("q") }, 0},
		{"^C", func() { p.keys("C-c") }, 0},
		{"SIGTERM", func() { p.watcher(syscall.SIGTERM) }, 255},
		{"SIGINT", func() { p.watcher(syscall.SIGINT) }, 255},
	} {
		if end.name != "q" {
			p.line("clear; echo one''mark; " + muxproxy + " status --watch; echo ended $?")
			p.shows(`^q: quit`)
		}
		end.end()
		p.shows(fmt.Sprintf(`^ended %d\n`, end.status))
		if s := p.screen(false); !strings.Contains(s, "onemark") || strings.Contains(s, "q: quit") {
			t.Errorf("%s leaves\n%s", end.name, s)
		}
		if flags := p.tmux("display-message", "-p", "#{alternate_on} #{cursor_flag} #{mouse_any_flag} #{keypad_cursor_flag}"); flags != "0 1 0 0\n" {
			t.Errorf("%s leaves the terminal in %s", end.name, flags)
		}
		p.line("stty -g >after; echo ha''ve")
		p.shows(`^have`)
		if before, after := w.read("before"), w.read("after"); before != after {
			t.Errorf("%s: stty -g says %s, and before %s", end.name, after, before)
		}
	}

	// ^Z stops it, and it goes on with fg.
	p.line("clear; set -m; " + muxproxy + " status --watch")
	p.shows(`^q: quit`)
	p.keys("C-z")
	p.shows(`Stopped`)
	p.line("fg; echo retur''ned")
	p.shows(`^q: quit`)
	p.keys("q")
	p.shows(`^returned`)

	// No colour with NO_COLOR, and on a terminal only.
	colors := regexp.MustCompile("\x1b\\[[0-9;]*[1-9]m")
	p.line("clear; NO_COLOR=1 " + muxproxy + " status --watch; NO_COLOR=1 " + muxproxy + " status; echo ended $?")
	p.shows(`^q: quit`)
	p.shows(`^no clients`)
	if s := p.screen(true); colors.MatchString(s) {
		t.Errorf("a live view has colours in spite of NO_COLOR:\n%q", s)
	}
	p.keys("q")
	p.shows(`^ended 0`)
	if s := p.screen(true); colors.MatchString(s) {
		t.Errorf("colours in spite of NO_COLOR:\n%q", s)
	}
	p.line("clear; " + muxproxy + " status; echo over $?")
	p.shows(`^over 0`)
	if s := p.screen(true); !strings.Contains(s, "\x1b[1mmuxproxy") {
		t.Errorf("no colour:\n%q", s)
	}
	p.line("clear; " + muxproxy + " status --watch | cat; echo piped")
	p.shows(`^muxproxy: --watch needs a terminal`)
	if r := w.run(spec{args: []string{muxproxy, "status"}, null: true}); r.status != 0 || strings.Contains(r.out, "\x1b") {
		t.Errorf("to a pipe: status %d, %q", r.status, r.out)
	}
}

// watcher signals the live view that runs in the pane.
func (p *pane) watcher(sig syscall.Signal) {
	p.w.t.Helper()
	shell, err := strconv.Atoi(strings.TrimSpace(p.tmux("display-message", "-p", "#{pane_pid}")))
	if err != nil {
		p.w.t.Fatal(err)
	}
	for _, pid := range children(shell) {
		if err := syscall.Kill(pid, sig); err != nil {
			p.w.t.Fatal(os.NewSyscallError("kill", err))
		}
	}
}
