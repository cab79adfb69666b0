//go:build linux

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A restart loses nothing: sessions go on in the old master, each ssh that comes meanwhile works, the lock carries over,
// and the old master ends with its last session.
func TestRestartLosesNothing(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		held := w.hold()
		old := w.mustStatus().PID
		var stop atomic.Bool
		var loops sync.WaitGroup
		var served atomic.Int64
		for range 3 {
			loops.Go(func() {
				for !stop.Load() {
					if r := w.ssh("box", "echo on"); r.status != 0 || r.out != "on\n" || r.err != "" {
						t.Errorf("an ssh during a restart: %+v", r)
						return
					}
					served.Add(1)
				}
			})
		}
		more := func(n int64) {
			t.Helper()
			from := served.Load()
			eventually(t, "some more are served", func() bool { return served.Load() >= from+n || t.Failed() })
		}
		pids := map[int]bool{old: true}
		for range 3 {
			more(3)
			r := w.mux("master", "restart")
			if r.status != 0 || !strings.Contains(r.out, " has taken over") {
				t.Fatalf("restart: %+v", r)
			}
			pids[w.mustStatus().PID] = true
		}
		more(3)
		stop.Store(true)
		loops.Wait()
		if len(pids) != 4 {
			t.Errorf("masters: %v", pids)
		}
		held.echo("still there")
		if gone(old) {
			t.Error("the old master left its session")
		}
		held.release()
		for pid := range pids {
			if pid != w.mustStatus().PID {
				eventually(t, "an old master ends with its last session", func() bool { return gone(pid) })
			}
		}
		want(t, w.ssh("box", "echo on"), 0, "on\n")

		if r := w.mux("lock"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		if r := w.mux("master", "restart"); r.status != 0 {
			t.Fatalf("restart while locked: %+v", r)
		}
		if r := w.ssh("box", "true"); r.status != 255 || !strings.Contains(r.err, "locked") {
			t.Errorf("the lock did not carry over: %+v", r)
		}
		if r := w.mux("unlock"); r.status != 0 {
			t.Errorf("%+v", r)
		}
		want(t, w.ssh("box", "echo open"), 0, "open\n")
	})
}

// A program that can't take over leaves all as it is.
func TestRestartThatCannotBe(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		held := w.hold()
		pid := w.mustStatus().PID
		if err := os.MkdirAll(w.path("config/muxproxy"), 0o700); err != nil {
			t.Fatal(err)
		}
		w.write("config/muxproxy/config.hcl", "host {")
		if r := w.mux("master", "restart"); r.status != 255 || !strings.Contains(r.err, "can't take over") ||
			!strings.Contains(r.err, "config.hcl:1:") {
			t.Errorf("%+v", r)
		}
		if now := w.mustStatus(); now.PID != pid || now.Draining {
			t.Errorf("%+v", now)
		}
		held.release()
		want(t, w.ssh("box", "echo on"), 0, "on\n")
	})
}

// systemd's sockets start a master, which leaves their names alone, and restarts keep them.
func TestSocketActivation(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	if _, err := exec.LookPath("systemd-socket-activate"); err != nil {
		t.Fatal("this test needs systemd-socket-activate (package systemd)")
	}
	forEach(t, func(t *testing.T, w *world) {
		dir := w.path("run/muxproxy")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		mux, control := filepath.Join(dir, "muxproxy.sock"), filepath.Join(dir, "control.sock")
		p := w.start(spec{args: []string{"systemd-socket-activate", "-l", mux, "-l", control,
			"-E", "HOME", "-E", "XDG_STATE_HOME", "-E", "XDG_RUNTIME_DIR", "-E", "XDG_CONFIG_HOME", "-E", "PATH", "-E", "GORACE",
			filepath.Join(binDir, "muxproxyd"), "master"}, null: true})
		p.expectErr("Listening on " + control)
		want(t, w.ssh("box", "echo activated"), 0, "activated\n")
		if got := w.mustStatus().PID; got != p.pid() { // it has become the master by execve(2)
			t.Errorf("the master is %d, not the one that was activated", got)
		}
		if r := w.mux("master", "stop", "--drain"); r.status == 0 || !strings.Contains(r.err, "muxproxy master restart") {
			t.Errorf("%+v", r)
		}
		held := w.hold()
		if r := w.mux("master", "restart"); r.status != 0 {
			t.Fatalf("%+v", r)
		}
		want(t, w.ssh("box", "echo again"), 0, "again\n")
		held.release()
		eventually(t, "the first master ends with its last session", func() bool { return gone(p.pid()) })
		w.stopMaster()
		p.wait(patience)
		for _, path := range []string{mux, control} {
			if _, err := os.Stat(path); err != nil {
				t.Errorf("systemd's socket: %v", err)
			}
		}
	})
}

// Units that systemd would not take are found before they are installed.
func TestUnits(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Fatal("this test needs systemd-analyze (package systemd)")
	}
	dir := t.TempDir()
	for _, name := range []string{"muxproxy.service", "muxproxy.socket"} {
		text, err := os.ReadFile(filepath.Join("..", "packaging", "systemd", name))
		if err != nil {
			t.Fatal(err)
		}
		// The program is not installed here.
		s := strings.ReplaceAll(string(text), "/usr/bin/muxproxyd", "/bin/true")
		if err := os.WriteFile(filepath.Join(dir, name), []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("systemd-analyze", "--user", "--man=no", "verify", filepath.Join(dir, "muxproxy.service"), filepath.Join(dir, "muxproxy.socket"))
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir)
	start := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify, after %v: %v\n%s", time.Since(start), err, out)
	}
}
