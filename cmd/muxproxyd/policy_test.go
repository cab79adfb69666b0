package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/use"
)

func TestLockCommands(t *testing.T) {
	person := use.LockState{Locked: true, By: []string{"person"}}
	secret := person
	secret.Passphrase = true
	screen := use.LockState{Locked: true, By: []string{"screen"}}
	denied := &use.Denied{By: "policy", Reason: "not you"}
	for _, c := range []struct {
		args, stdin string
		before      use.LockState
		left        use.LockState
		err         error
		status      int
		calls       string
		stdout      string
		stderr      string
	}{
		{args: "lock", calls: "lock ", stdout: "locked until `muxproxy unlock`\n"},
		{args: "lock", before: screen, calls: "lock ", stdout: "locked until `muxproxy unlock`\n"},
		{args: "lock", before: person, status: exitNo, stderr: "it is locked already"},
		{args: "lock", err: denied, status: exitFailed, calls: "lock ", stderr: "denied by policy: not you"},
		{args: "lock --passphrase", stdin: "open sesame\r\nmore", calls: "lock open sesame", stdout: "locked until `muxproxy unlock`\n"},
		{args: "lock --passphrase", stdin: "\n", status: exitFailed, stderr: "an empty passphrase; without --passphrase none is needed"},
		{args: "lock x", status: exitUsage, stderr: "unknown command \"x\" for \"muxproxy lock\"; see `muxproxy lock --help`"},
		{args: "unlock", before: person, calls: "unlock ", stdout: "unlocked\n"},
		{args: "unlock", stdin: "unread", calls: "unlock ", stdout: "it was not locked\n"},
		{args: "unlock", before: screen, left: screen, calls: "unlock ", status: exitNo,
			stderr: "still locked by the session (screen): unlock that"},
		{args: "unlock", stdin: "right", before: secret, calls: "unlock right", stdout: "unlocked\n"},
		{args: "unlock", stdin: "wrong\n", before: secret, status: exitNo,
			stderr: "that is not the passphrase it was locked with"},
	} {
		w := newWorld(t)
		w.stdin = c.stdin
		m := &fakeMaster{err: c.err, left: c.left, status: control.Status{Lock: c.before}}
		w.serve(m)
		status, stdout, stderr := w.run(strings.Fields(c.args)...)
		if c.stderr != "" {
			c.stderr = "muxproxy: " + c.stderr + "\n"
		}
		if status != c.status || stdout != c.stdout || stderr != c.stderr || m.called() != c.calls {
			t.Errorf("%s: status %d, %q, %q, calls %q", c.args, status, stdout, stderr, m.called())
		}
	}
}

func TestReloadCommand(t *testing.T) {
	const text = "/c/config.hcl:1:1: no\n"
	for _, c := range []struct {
		args   string
		force  bool
		status int
		stdout string
		stderr string
	}{
		{"master reload", true, exitYes, "the policy of /c/config.hcl is in force\n", text},
		{"master reload", false, exitNo, "", text + "muxproxy: /c/config.hcl has errors: the policy that was in force still is\n"},
		{"master reload --json", false, exitNo, "{\n  \"file\": \"/c/config.hcl\",\n  \"in_force\": false,\n  \"diagnostics\": [\n    1\n  ]\n}\n", ""},
	} {
		w := newWorld(t)
		m := &fakeMaster{reloaded: control.Reloaded{File: "/c/config.hcl", InForce: c.force, Text: text, Diagnostics: []byte("[1]")}}
		w.serve(m)
		if status, stdout, stderr := w.run(strings.Fields(c.args)...); status != c.status || stdout != c.stdout || stderr != c.stderr {
			t.Errorf("%s: status %d, %q, %q", c.args, status, stdout, stderr)
		}
	}
}

// The file named by the user, one in its place, and none.
func TestConfigCommands(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // it has no paths as these
	}
	w := newWorld(t)
	path := filepath.Join(w.dirs.Config, "config.hcl")
	if status, stdout, _ := w.run("config", "path"); status != exitNo || stdout != path+"\n" {
		t.Errorf("status %d, %q", status, stdout)
	}
	if err := os.MkdirAll(w.dirs.Config, 0o700); err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("host \"*\" {\n  lane \"bulk\" {}\n  lane \"bulk\" {}\n}\n")
	if status, stdout, _ := w.run("config", "path"); status != exitYes || stdout != path+"\n" {
		t.Errorf("status %d, %q", status, stdout)
	}
	if status, stdout, stderr := w.run("config", "check"); status != exitYes || stderr != "" ||
		!strings.HasPrefix(stdout, path+":3:3: warning: lane never applies") {
		t.Errorf("warnings: status %d, %q, %q", status, stdout, stderr)
	}
	write("host \"*\" {\n  lane \"bluk\" {}\n}\n")
	status, stdout, stderr := w.run("config", "check", "--json")
	var got struct {
		File        string
		Diagnostics []struct{ Line int }
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || status != exitNo || stderr != "" || got.File != path ||
		len(got.Diagnostics) != 1 || got.Diagnostics[0].Line != 2 {
		t.Errorf("status %d, %q, %q", status, stdout, stderr)
	}
	if status, stdout, stderr := w.run("explain", "localhost"); status != exitNo || stdout != "" || !strings.Contains(stderr, "config.hcl:2:8") {
		t.Errorf("explain with a bad file: status %d, %q, %q", status, stdout, stderr)
	}
	write("host \"*\" {\n  confirm {}\n}\n")
	if status, stdout, stderr := w.run("explain", "localhost", "id"); status != exitYes || stderr != "" ||
		!strings.Contains(stdout, "these plugins have a block for it: confirm") {
		t.Errorf("explain with a plugin: status %d, %q, %q", status, stdout, stderr)
	}
	w.serveBackend(&pluginMaster{fakeMaster: &fakeMaster{}, plugins: []control.Plugin{{Name: "confirm", State: "failed", Error: "it crashed"}}})
	if status, stdout, stderr := w.run("explain", "localhost", "id"); status != exitNo || stderr != "" ||
		!strings.HasSuffix(stdout, "plugin: confirm does not run: it crashed\n") {
		t.Errorf("explain with a plugin that does not run: status %d, %q, %q", status, stdout, stderr)
	}
	write("plugin \"absent\" {}\n")
	if status, stdout, stderr := w.run("config", "check"); status != exitNo || stderr != "" ||
		!strings.HasPrefix(stdout, path+":1:1: absent: there is no muxproxy-plugin-absent in ") {
		t.Errorf("check with a plugin that is not there: status %d, %q, %q", status, stdout, stderr)
	}
	w.env["MUXPROXY_CONFIG"] = filepath.Join(w.dirs.Config, "other.hcl")
	if status, stdout, _ := w.run("config", "check"); status != exitNo || !strings.Contains(stdout, "other.hcl: no such file") {
		t.Errorf("a named file that is not there: status %d, %q", status, stdout)
	}
	if status, _, stderr := w.run("config"); status != exitUsage || !strings.Contains(stderr, "Usage:") {
		t.Errorf("status %d, %q", status, stderr)
	}
}
