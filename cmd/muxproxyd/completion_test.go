package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
)

// completions are the words that `muxproxy __complete` offers, as the shells' scripts ask for them, and the directive.
func (w *world) completions(args ...string) string {
	w.t.Helper()
	status, stdout, _ := w.run(append([]string{"__complete"}, args...)...)
	if status != exitYes {
		w.t.Errorf("%q: status %d", args, status)
	}
	var words []string
	for line := range strings.Lines(stdout) {
		word, _, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

func TestCompletion(t *testing.T) {
	w := newWorld(t)
	config := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(config, []byte("Host alpha beta *.x\nHost al$(id)\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := busy()
	s.Upstreams = append(s.Upstreams, control.Upstream{ID: 20, Target: "$(id)@evil;id:22", State: "up"})
	s.Clients = append(s.Clients, control.Client{Target: "x@none:22", Alias: "unattached"})
	w.serveBackend(&pluginMaster{fakeMaster: &fakeMaster{status: s}, pending: waiting(), plugins: []control.Plugin{
		{Name: "confirm", Verbs: []control.Verb{{Usage: "grants [--json]", Doc: "a\nb"}, {Usage: "forget ID", Doc: ""}}},
		{Name: "forward", Verbs: []control.Verb{{Usage: "add HOST"}, {Usage: "list"}}},
		{Name: "mute"},
	}})
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"clo"}, "close :4"},
		{[]string{"confi"}, "config confirm :4"},
		{[]string{"mut"}, ":4"},
		{[]string{"close", ""}, "2001:db8::1 a-very-long-name.in.some.cluster.of.example.com db db.example.com ever h kept :4"},
		{[]string{"drain", "d"}, "db db.example.com :4"},
		{[]string{"exists", "alice@"}, "alice@db.example.com:22 :4"},
		{[]string{"exists", "$"}, ":4"},
		{[]string{"close", "db", ""}, ":4"},
		{[]string{"close", "--a"}, "--all :4"},
		{[]string{"doctor", "-F", config, ""},
			"2001:db8::1 a-very-long-name.in.some.cluster.of.example.com alpha beta db db.example.com ever h kept :4"},
		{[]string{"connect", "d"}, "db db.example.com :4"},
		{[]string{"connect", "db", "--", "-"}, ":4"},
		{[]string{"doctor", "-F", config, "root@al"}, "root@alpha :4"},
		{[]string{"setup", "-F", config, "--host", "alpha", "--host", "b"}, "beta :4"},
		{[]string{"setup", "-F", ""}, ":0"},
		{[]string{"allow", ""}, "f3k2ab4c :4"},
		{[]string{"deny", "f3k2ab4c", ""}, ":4"},
		{[]string{"explain", "--kind", "sub"}, "attach shell exec subsystem local-forward remote-forward cancel-forward agent x11 jump other control :4"},
		{[]string{"confirm", ""}, "forget grants :4"},
		{[]string{"confirm", "gr"}, "grants :4"},
		{[]string{"confirm", "grants", ""}, ":4"},
		{[]string{"forward", "add", ""}, ":4"},
		{[]string{"nothing", ""}, ":4"},
		{[]string{"status", ""}, ":4"},
		{[]string{"plugin", "check", ""}, ":0"},
		{[]string{"config", "check", ""}, "hcl :8"},
		{[]string{"completion", ""}, "bash fish powershell zsh :4"},
	} {
		if got := w.completions(c.args...); got != c.want {
			t.Errorf("%q: %q, want %q", c.args, got, c.want)
		}
	}
}

// Whoever presses Tab starts nothing, and waits for nothing for long.
func TestCompletionWithoutMaster(t *testing.T) {
	w := newWorld(t)
	for _, args := range [][]string{{"close", ""}, {"allow", ""}, {"confirm", ""}} {
		if got := w.completions(args...); got != ":4" {
			t.Errorf("%q: %q", args, got)
		}
	}
	if left, err := filepath.Glob(filepath.Join(w.dirs.Run, "*")); err != nil || len(left) > 0 {
		t.Errorf("%q, %v", left, err)
	}
	// One that takes connections and never answers.
	l, err := paths.Listen(w.dirs.Runtime, paths.ControlSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	began := time.Now()
	if got := w.completions("close", ""); got != ":4" {
		t.Errorf("%q", got)
	}
	if took := time.Since(began); took > 10*completeTime {
		t.Errorf("it took %v", took)
	}
}

// The scripts of the shells call what was tested above.
func TestCompletionScripts(t *testing.T) {
	w := newWorld(t)
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		status, stdout, stderr := w.run("completion", shell)
		if status != exitYes || stderr != "" || !strings.Contains(stdout, "__complete") {
			t.Errorf("%s: status %d, %q, %d bytes", shell, status, stderr, len(stdout))
		}
	}
}
