package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/use"
)

// pluginMaster is a fake master that runs plugins.
type pluginMaster struct {
	*fakeMaster
	plugins []control.Plugin
	pending []control.Pending
}

func (m *pluginMaster) Plugins() []control.Plugin  { return m.plugins }
func (m *pluginMaster) Pending() []control.Pending { return m.pending }

func (m *pluginMaster) Decide(_ context.Context, by use.Caller, id string, allow bool, reason string) error {
	if id == "late" {
		return errors.New("no such use is waiting")
	}
	return m.call(fmt.Sprintf("decide %s %v %q by %v", id, allow, reason, by.UID == os.Getuid()))
}

func (m *pluginMaster) RunPlugin(_ context.Context, _ use.Caller, plugin string, args []string, stdout, stderr io.Writer) (int, error) {
	switch plugin {
	case "confirm":
		fmt.Fprintf(stdout, "%q", args)
		io.WriteString(stderr, "oh")
		return 7, m.err
	case "broken":
		return 0, errors.New("the plugin broken: it has ended")
	}
	return 0, fmt.Errorf("%s: %w", plugin, control.ErrNoCommand)
}

// serveBackend is serve for any master.
func (w *world) serveBackend(b control.Backend) (stop func()) {
	w.t.Helper()
	l, err := paths.Listen(w.dirs.Runtime, paths.ControlSocket)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- control.Serve(ctx, l, b) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(stop)
	return stop
}

func TestPluginCommands(t *testing.T) {
	w := newWorld(t)
	m := &pluginMaster{
		fakeMaster: &fakeMaster{},
		plugins: []control.Plugin{
			{Name: "confirm", Version: "1.2", State: "up", PID: 12, Verbs: []control.Verb{{Usage: "grants [--json]", Doc: "list"}}, Hooks: []string{"authorize", "command"}, May: []string{"decide", "keep"}},
			{Name: "mine", State: "failed", Path: "/x\xff", Error: "it crashed: exit status 3"},
		},
		pending: []control.Pending{
			{ID: "f3k2ab4c", Plugin: "confirm", Kind: "exec", Detail: "rm -rf /\x1b", Target: "u@db:22", Caller: "git (7)",
				Since: noon.Add(-3 * time.Second), Answerable: true},
			{ID: "aaaa", Plugin: "mine", Kind: "shell", Target: "u@db:22", Since: noon.Add(-time.Minute)},
		},
	}
	w.serveBackend(m)
	for _, c := range []struct {
		args           string
		status         int
		stdout, stderr string
		call           string
	}{
		{"plugin list", 0, "" +
			"NAME     VERSION  STATE   PID  HOOKS              MAY\n" +
			"confirm  1.2      up      12   authorize,command  decide,keep\n" +
			"mine     -        failed  -    -                  -\n" +
			"mine: it crashed: exit status 3\n", "", ""},
		{"pending", 0, "" +
			"ID        ASKED BY  FOR   USE                TARGET   CALLER   ALLOW/DENY\n" +
			`f3k2ab4c  confirm   3s    exec rm -rf /\x1b  u@db:22  git (7)  yes` + "\n" +
			"aaaa      mine      1m0s  shell              u@db:22  -        no\n", "", ""},
		{"allow f3k2ab4c", 0, "", "", `decide f3k2ab4c true "" by true`},
		{"deny f3k2ab4c not today", 0, "", "", `decide f3k2ab4c false "not today" by true`},
		{"allow late", 255, "", "muxproxy: no such use is waiting\n", ""},
		{"allow", 2, "", "muxproxy: accepts 1 arg(s), received 0; see `muxproxy allow --help`\n", ""},
		{"confirm grants --json -x", 7, `["grants" "--json" "-x"]`, "oh", ""},
		{"broken", 255, "", "muxproxy: the plugin broken: it has ended\n", ""},
		{"conform x", 2, "", "muxproxy: unknown command \"conform\"; did you mean \"confirm\"?; see `muxproxy help`\n", ""},
	} {
		t.Run(c.args, func(t *testing.T) {
			status, stdout, stderr := w.run(strings.Fields(c.args)...)
			if status != c.status || stdout != c.stdout || stderr != c.stderr {
				t.Errorf("status %d\n%s%s\nwant %d\n%s%s", status, stdout, stderr, c.status, c.stdout, c.stderr)
			}
			if c.call != "" && !strings.HasSuffix(m.called(), c.call) {
				t.Errorf("called: %s", m.called())
			}
		})
	}
	if status, stdout, _ := w.run("plugin", "list", "--json"); status != 0 || !strings.Contains(stdout, `"path": "/x`) {
		t.Errorf("status %d\n%s", status, stdout)
	}
	m.err = &use.Denied{By: "policy", Reason: "no"}
	if status, _, stderr := w.run("allow", "f3k2ab4c"); status != 255 || stderr != "muxproxy: denied by policy: no\n" {
		t.Errorf("denied: status %d, %q", status, stderr)
	}
}

// A master that runs no plugins has none.
func TestNoPlugins(t *testing.T) {
	w := newWorld(t)
	if status, _, stderr := w.run("pending"); status != exitNo || !strings.Contains(stderr, "no master runs") {
		t.Errorf("status %d, %q", status, stderr)
	}
	w.serve(&fakeMaster{})
	for _, args := range [][]string{{"plugin", "list"}, {"pending"}} {
		if status, stdout, stderr := w.run(args...); status != 0 || strings.Count(stdout, "\n") != 1 || stderr != "" {
			t.Errorf("%q: status %d, %q, %q", args, status, stdout, stderr)
		}
	}
	if status, _, stderr := w.run("judge"); status != exitUsage || !strings.Contains(stderr, "unknown command") {
		t.Errorf("status %d, %q", status, stderr)
	}
	if status, _, stderr := w.run("forward", "list"); status != exitNo || !strings.Contains(stderr, "the plugin forward does not run: no host block of the policy has forward { ... }") {
		t.Errorf("status %d, %q", status, stderr)
	}
}

func TestPluginCheck(t *testing.T) {
	w := newWorld(t)
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho hello\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	status, stdout, stderr := w.run("plugin", "check", script, "--its-own")
	want := "WRONG   without its cookie it says what it is and ends\n        its exit status is 0\n" +
		"WRONG   starts: handshake, protocol version, socket in its directory\n" +
		"        does not begin as a plugin does: its first line of output is \"hello\"\n"
	if status != exitNo || stdout != want || stderr != "muxproxy: 2 things are wrong with this plugin\n" {
		t.Errorf("status %d\n%s%s", status, stdout, stderr)
	}
	if status, _, _ := w.run("plugin", "check"); status != exitUsage {
		t.Errorf("without a path: status %d", status)
	}
}
