//go:build unix

package main

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/muxproxy/muxproxy/core/control"
)

// setupWorld is a world with an ssh_config and a muxproxy to lead to. Real ssh is asked, so -F has to name the file.
func setupWorld(t *testing.T) (w *world, config string) {
	t.Helper()
	w = newWorld(t)
	w.exe = filepath.Join(w.env["HOME"], "bin", "muxproxyd")
	for name, mode := range map[string]os.FileMode{"bin/muxproxy": 0o755, "bin/muxproxyd": 0o755, "config": 0o600} {
		path := filepath.Join(w.env["HOME"], name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("# nothing\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	return w, filepath.Join(w.env["HOME"], "config")
}

func TestSetup(t *testing.T) {
	w, config := setupWorld(t)
	want := func(wantStatus int, wantOut, wantErr string, args ...string) {
		t.Helper()
		status, stdout, stderr := w.run(append([]string{"setup"}, args...)...)
		if status != wantStatus || !strings.Contains(stdout, wantOut) || !strings.Contains(stderr, wantErr) ||
			(wantErr == "") != (stderr == "") || strings.Count(stderr, "\n") > 1 {
			t.Errorf("%q: status %d\n%s%s", args, status, stdout, stderr)
		}
	}
	text := func() string {
		t.Helper()
		b, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	program := filepath.Join(filepath.Dir(w.exe), "muxproxy")
	want(exitUsage, "", "nothing was done; give --yes or --dry-run", "-F", config)
	want(exitYes, "ProxyCommand "+program+" --fdpass '%r@%h:%p' '%n'\n", "", "-F", config, "--dry-run")
	if text() != "# nothing\n" {
		t.Errorf("%q", text())
	}
	want(exitYes, "muxproxy doctor -F "+config+" HOST", "", "-F", config, "--yes")
	if text() != "Include "+w.dirs.Config+"/ssh_config\n# nothing\n" {
		t.Errorf("%q", text())
	}
	want(exitYes, "All is in place: ssh -G says that example goes through muxproxy.", "", "-F", config, "--host", "*")
	want(exitYes, "Host a !b\n", "", "-F", config, "--yes", "--host", "a", "--host", "!b")

	m := &fakeMaster{status: control.Status{PID: 1 << 30, Clients: make([]control.Client, 2)}}
	w.serve(m)
	want(exitYes, "- stop the master, pid 1073741824, which ends 2 clients\n", "", "-F", config, "--undo", "--dry-run")
	if m.called() != "" {
		t.Errorf("a dry run called %s", m.called())
	}
	want(exitYes, "Done: ssh is as it was before muxproxy.\n", "", "-F", config, "--undo", "-y")
	if m.called() != "stop" || text() != "# nothing\n" {
		t.Errorf("calls %s, %q", m.called(), text())
	}
	want(exitYes, "There is nothing to undo.\n", "", "-F", config, "--undo")

	// A line of the user's own that leads to muxproxy is none of setup's.
	if err := os.WriteFile(config, []byte("ProxyCommand muxproxy %r@%h:%p\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	want(exitYes, "Done", "", "-F", config, "-y")
	want(exitYes, "ssh still goes to muxproxy, by lines of your own", "", "-F", config, "--undo", "-y")

	want(exitUsage, "", `--host "a b": a host pattern has no spaces`, "--host", "a b")
	want(exitUsage, "", "--undo is for all hosts", "--undo", "--host", "a")
	want(exitUsage, "", "-F: want a file", "-F", "none")
	want(exitUsage, "", "unknown command \"x\"", "x")
	want(exitFailed, "", "HOME is "+w.env["HOME"]+", but ssh reads the configuration in ", "--dry-run")
	w.env["SUDO_USER"] = "alice\x1b"
	want(exitYes, `for alice\x1b, leave sudo away.`, "", "-F", config, "--dry-run")
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	want(exitFailed, "", program+": it is not there; install muxproxy beside muxproxyd", "-F", config)
	w.env["HOME"] = "/proc/1"
	if os.Geteuid() == 0 {
		w.env["HOME"] = filepath.Join(filepath.Dir(w.exe), "..", "other")
		if err := os.Mkdir(w.env["HOME"], 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(w.env["HOME"], 54321, -1); err != nil {
			t.Fatal(err)
		}
	}
	want(exitFailed, "", "; do it as that user, without sudo", "--dry-run")
}

// With systemd's sockets, whoever asked for the master would start it again.
func TestUndoWithSystemd(t *testing.T) {
	w, config := setupWorld(t)
	dir := filepath.Join(w.env["HOME"], "path")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\n[ \"$*\" = '--user --quiet is-active muxproxy.socket' ]\n"
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	m := &fakeMaster{}
	w.serve(m)
	status, _, stderr := w.run("setup", "--undo", "-F", config, "-y")
	if status != exitFailed || !strings.Contains(stderr, "first `systemctl --user disable --now muxproxy.socket`") || m.called() != "" {
		t.Errorf("status %d, %s, calls %s", status, stderr, m.called())
	}
}

// What would keep ssh from working altogether is taken back.
func TestSetupTakesBack(t *testing.T) {
	w, config := setupWorld(t)
	dir := filepath.Join(w.env["HOME"], "path")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// An ssh that reads no included files.
	script := "#!/bin/sh\ncase \"$(cat \"$3\")\" in Include*) echo 'no, thanks' >&2; exit 255 ;; esac\necho host x\n"
	if err := os.WriteFile(filepath.Join(dir, "ssh"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	status, _, stderr := w.run("setup", "-F", config, "-y")
	if status != exitFailed || !strings.HasSuffix(stderr, "no, thanks; all is as it was before\n") {
		t.Errorf("status %d, %s", status, stderr)
	}
	if b, err := os.ReadFile(config); err != nil || string(b) != "# nothing\n" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := os.Lstat(w.dirs.Config); !os.IsNotExist(err) {
		t.Errorf("%s: %v", w.dirs.Config, err)
	}
}

// A package manager's link on PATH outlives the version that it leads to.
func TestSetupProgram(t *testing.T) {
	w, _ := setupWorld(t)
	bin := filepath.Join(w.env["HOME"], "links")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	real := filepath.Join(filepath.Dir(w.exe), "muxproxy")
	if err := os.Symlink(real, filepath.Join(bin, "muxproxy")); err != nil {
		t.Fatal(err)
	}
	a := &app{exe: w.exe}
	t.Setenv("PATH", "/nowhere")
	if got, err := a.program(); err != nil || got != real {
		t.Errorf("%s, %v", got, err)
	}
	t.Setenv("PATH", bin)
	if got, err := a.program(); err != nil || got != filepath.Join(bin, "muxproxy") {
		t.Errorf("%s, %v", got, err)
	}
	if err := os.Remove(filepath.Join(bin, "muxproxy")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "muxproxy"), nil, 0o700); err != nil {
		t.Fatal(err)
	}
	if got, err := a.program(); err != nil || got != real {
		t.Errorf("another program: %s, %v", got, err)
	}
}

// On a terminal it asks; everything but a yes is a no.
func TestSetupAsks(t *testing.T) {
	for answer, wantStatus := range map[string]int{
		"y\n": exitYes, "YES\n": exitYes, "n\n": exitNo, "\n": exitNo, "yesterday\n": exitNo, "y\x04\x04": exitYes, "\x04": exitNo,
	} {
		w, config := setupWorld(t)
		master, slave, err := pty.Open()
		if err != nil {
			t.Fatal(err)
		}
		asked := make(chan string, 1)
		go func() {
			line, _ := bufio.NewReader(master).ReadString('?')
			master.WriteString(answer)
			asked <- line
		}()
		var out bytes.Buffer
		a := &app{stdin: slave, stdout: &out, stderr: slave, getenv: w.getenv, now: time.Now, exe: w.exe}
		status := run(t.Context(), a, []string{"setup", "-F", config})
		if line := <-asked; line != "Do it?" {
			t.Errorf("asked %q", line)
		}
		b, err := os.ReadFile(config)
		if done := strings.HasPrefix(string(b), "Include "); status != wantStatus || done != (wantStatus == exitYes) || err != nil {
			t.Errorf("%q: status %d, %q, %v\n%s", answer, status, b, err, &out)
		}
		slave.Close()
		master.Close()
	}
}
