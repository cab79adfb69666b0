//go:build linux

package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
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

		// The sockets' names are not systemd's: the last master takes them away.
		last := w.mustStatus()
		if r := w.mux("master", "stop", "--drain"); r.status != 0 {
			t.Errorf("stop --drain after a restart: %+v", r)
		}
		eventually(t, "the last master ends", func() bool { return gone(last.PID) })
		for _, name := range []string{"muxproxy.sock", "control.sock"} {
			if exists(filepath.Join(last.Sockets, name)) {
				t.Errorf("%s is left", name)
			}
		}
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

// A new master that can't live with what it finds has the sockets by then: whoever asked for it learns that, and so does
// the next ssh. Once it is mended, that starts another.
func TestRestartThatFailsLate(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		held := w.hold()
		old := w.mustStatus().PID
		audit := w.path("state/muxproxy/audit.log")
		if err := os.Rename(audit, audit+".kept"); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(audit, 0o700); err != nil {
			t.Fatal(err)
		}
		r := w.mux("master", "restart")
		if line := oneLine(t, r); r.status != 255 || !strings.Contains(line, "did not take over: ") || !strings.HasSuffix(line, "see `muxproxy log`") {
			t.Errorf("%+v", r)
		}
		if r := w.ssh("box", "true"); r.status != 255 || !strings.Contains(oneLine(t, r), "audit.log") {
			t.Errorf("%+v", r)
		}
		held.echo("the old one goes on")
		if err := os.Remove(audit); err != nil {
			t.Fatal(err)
		}
		want(t, w.ssh("box", "echo on"), 0, "on\n")
		held.release()
		eventually(t, "the old master ends", func() bool { return gone(old) })
		w.mustStatus()
	})
}

// Of restarts at once, each either leads to a new master or says that another one is under way. One master remains, and no
// ssh fails.
func TestRestartsAtOnce(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		held := w.hold()
		pids := map[int]bool{w.mustStatus().PID: true}
		var stop atomic.Bool
		var loop sync.WaitGroup
		loop.Go(func() {
			for !stop.Load() {
				if r := w.ssh("box", "echo on"); r.status != 0 || r.out != "on\n" || r.err != "" {
					t.Errorf("an ssh during restarts: %+v", r)
					return
				}
			}
		})
		for range 3 {
			var all sync.WaitGroup
			var done atomic.Int32
			for range 3 {
				all.Go(func() {
					r := w.mux("master", "restart")
					if r.status == 0 {
						done.Add(1)
						return
					}
					line := oneLine(t, r)
					if r.status != 255 || !strings.HasSuffix(line, "see `muxproxy status`") && !strings.Contains(line, "was restarted in its turn") {
						t.Errorf("%+v", r)
					}
				})
			}
			all.Wait()
			if done.Load() == 0 {
				t.Error("no restart came off")
			}
			pids[w.mustStatus().PID] = true
		}
		stop.Store(true)
		loop.Wait()
		if len(pids) != 4 {
			t.Errorf("masters: %v", pids)
		}
		held.release()
		now := w.mustStatus().PID
		started := regexp.MustCompile(`"pid":(\d+)[^\n]*"master is ready"`).FindAllStringSubmatch(w.masterLog(), -1)
		eventually(t, "one master remains", func() bool {
			for _, m := range started {
				if pid, err := strconv.Atoi(m[1]); err != nil || pid != now && !gone(pid) {
					return false
				}
			}
			return len(started) >= 4
		})
	})
}

// Where bridge and master do not speak the same version of their protocol, ssh shows one line that says which is the older
// and what to do. In between stands what makes a bridge of another version of this one; the master tells both.
func TestAnotherVersionOfTheProtocol(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		want(t, w.ssh("box", "echo one"), 0, "one\n")
		sockets := w.mustStatus().Sockets
		front := w.path("front")
		if err := os.Mkdir(front, 0o700); err != nil {
			t.Fatal(err)
		}
		ln, err := net.Listen("unix", filepath.Join(front, "muxproxy.sock"))
		if err != nil {
			t.Fatal(err)
		}
		var version atomic.Int32
		var served sync.WaitGroup
		served.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				served.Go(func() { tellVersion(t, c, filepath.Join(sockets, "muxproxy.sock"), int(version.Load())) })
			}
		})
		t.Cleanup(func() { ln.Close(); served.Wait() })
		links, err := filepath.Glob(w.path("state/muxproxy/run-*/sockets"))
		if err != nil || len(links) != 1 {
			t.Fatal(links, err)
		}
		must(t, os.Remove(links[0]))
		must(t, os.Symlink(front, links[0])) // bridges look there first
		for told, what := range map[int]string{
			0: ", version 1: ssh starts an older muxproxy, `muxproxy doctor` finds out which; or set MUXPROXY_BYPASS=1",
			2: ", version 1: run `muxproxy master restart`; or set MUXPROXY_BYPASS=1",
		} {
			version.Store(int32(told))
			w.fails(t, []string{fmt.Sprintf("this muxproxy speaks version %d of the protocol, the master, of muxproxy ", told), what}, "box", "true")
		}
		version.Store(1)
		if w.mode == fdpass { // this end of it passes no files on
			want(t, w.ssh("box", "echo same"), 0, "same\n")
		}
		must(t, os.Remove(links[0]))
		must(t, os.Symlink(sockets, links[0]))
		want(t, w.ssh("box", "echo two"), 0, "two\n")
	})
}

// tellVersion hands a bridge's connection on to the master, with another version in its hello.
func tellVersion(t *testing.T, c net.Conn, to string, version int) {
	defer c.Close()
	head := make([]byte, 5)
	if _, err := io.ReadFull(c, head); err != nil {
		return // a knock
	}
	body := make([]byte, binary.BigEndian.Uint32(head)-1)
	if _, err := io.ReadFull(c, body); err != nil {
		t.Errorf("hello: %v", err)
		return
	}
	m, err := net.Dial("unix", to)
	if err != nil {
		t.Error(err)
		return
	}
	defer m.Close()
	other := bytes.Replace(body, []byte(`"version":1,`), fmt.Appendf(nil, `"version":%d,`, version), 1)
	if _, err := m.Write(append(head, other...)); err != nil {
		t.Error(err)
		return
	}
	up := make(chan struct{})
	go func() {
		defer close(up)
		_, _ = io.Copy(m, c) // ends when either end has
	}()
	_, _ = io.Copy(c, m)
	c.Close()
	<-up
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
	// Where `make install PREFIX=~/.local`, or an archive that is unpacked there, puts them.
	paths := exec.Command("systemd-analyze", "--user", "unit-paths")
	paths.Env = []string{"HOME=" + dir, "PATH=" + os.Getenv("PATH"), "XDG_RUNTIME_DIR=" + dir}
	if out, err := paths.Output(); err != nil || !strings.Contains(string(out), "\n"+dir+"/.local/share/systemd/user\n") ||
		!strings.Contains(string(out), "\n/usr/local/share/systemd/user\n") {
		t.Errorf("systemd-analyze unit-paths: %v\n%s", err, out)
	}
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
