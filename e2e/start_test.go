//go:build linux

package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// masters are those that this run's programs started and that live.
func masters() []int {
	return slices.DeleteFunc(ours(), func(pid int) bool {
		args := processes()[pid]
		return len(args) < 2 || args[1] != "master" || gone(pid)
	})
}

func TestFiftyAtOnceFromColdStartOneMasterAndOneConnection(t *testing.T) {
	// Not beside other tests: it counts masters, and needs the processors.
	modes := []mode{pipes, fdpass}
	if plainMode {
		modes = []mode{plain}
	}
	for _, m := range modes {
		t.Run(string(m), func(t *testing.T) {
			w := newWorld(t, m)
			var all []*proc
			for i := range 50 {
				all = append(all, w.start(spec{args: w.sshArgs("box", fmt.Sprintf("echo %d; cat", i))}))
			}
			for i, p := range all {
				p.expect(fmt.Sprintln(i))
			}
			// All are there at once; now they may go.
			if m != plain {
				if masters := masters(); len(masters) != 1 {
					t.Errorf("%d masters live: %v", len(masters), masters)
				}
				if s := w.mustStatus(); len(s.Clients) != 50 {
					t.Errorf("the master has %d clients", len(s.Clients))
				}
			}
			for _, p := range all {
				p.release()
			}
			w.connections(1)
		})
	}
}

// Without XDG_RUNTIME_DIR, as in cron, and with it, as in a login shell: whoever comes first starts the master, and the
// other one finds it.
func TestCronAndLoginMeetTheSameMaster(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	orders := [][]string{{"login", "cron"}, {"cron", "login"}}
	// Without the variable, /run/user/UID is asked, and that is the developer's own place, where a master of his may
	// have its sockets. Then the second order would start ours beside it.
	if real := fmt.Sprintf("/run/user/%d/muxproxy", os.Getuid()); exists(real) {
		t.Logf("%s exists: no master is started where its sockets would go there", real)
		orders = orders[:1]
	}
	for _, order := range orders {
		t.Run(strings.Join(order, " first, then "), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, pipes, func(s *setup) {
				s.env["XDG_STATE_HOME"] = ""
				s.state = "home/.local/state"
			})
			env := map[string][]string{}
			for _, e := range w.env {
				env["login"] = append(env["login"], e)
				if !strings.HasPrefix(e, "XDG_") {
					env["cron"] = append(env["cron"], e)
				}
			}
			first := w.start(spec{args: w.sshArgs("box", "cat"), env: env[order[0]]})
			first.echo("first")
			second := w.start(spec{args: w.sshArgs("box", "cat"), env: env[order[1]]})
			second.echo("second")
			one, ok1 := w.statusIn(env[order[0]])
			two, ok2 := w.statusIn(env[order[1]])
			if !ok1 || !ok2 || one.PID != two.PID {
				t.Errorf("%s sees master %d (%v), %s sees master %d (%v)", order[0], one.PID, ok1, order[1], two.PID, ok2)
			}
			first.release()
			second.release()
			w.connections(1)
		})
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// listens reports whether somebody accepts at a socket: its file is there a moment before.
func listens(path string) bool {
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// A master that was killed leaves its sockets, its link and its line in known_hosts. The next client starts another.
func TestAKilledMasterIsReplaced(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		p := w.hold()
		old := w.mustStatus().PID
		kill9(old)
		if r := p.wait(patience); r.status != 255 {
			t.Errorf("a client of a killed master ended with %d", r.status)
		}
		eventually(t, "the killed master is gone", func() bool { return gone(old) })
		want(t, w.ssh("box", "echo again"), 0, "again\n")
		if now := w.mustStatus().PID; now == old {
			t.Errorf("status still names the killed master %d", old)
		}
		if n := strings.Count(w.read("state/muxproxy/known_hosts"), "@cert-authority"); n == 0 {
			t.Error("known_hosts has no line of the living master")
		}
	})
}

func TestTwoTargetsHaveAConnectionEach(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		first := w.hold()
		other := newLink(t, loopback(w.sshd))
		port := fmt.Sprint(other.port())
		w.write("known_hosts", w.read("known_hosts")+knownHosts(other.port()))
		second := w.sshStart("-p", port, "box", "cat")
		second.echo("second")
		want(t, w.ssh("-p", port, "box", "echo third"), 0, "third\n")
		if w.mode != plain && (w.link.count() != 1 || other.count() != 1) {
			t.Errorf("%d and %d TCP connections", w.link.count(), other.count())
		}
		first.release()
		second.release()
	})
}

func TestStopEndsAllAndTheNextClientStartsAnew(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		p := w.hold()
		w.stopMaster()
		if r := p.wait(patience); r.status != 255 {
			t.Errorf("a client of a stopped master ended with %d", r.status)
		}
		eventually(t, "the server has no connection left", func() bool { return w.link.open() == 0 })
		want(t, w.ssh("box", "echo again"), 0, "again\n")
	})
}

func TestBypassNeedsNoMaster(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		env := append([]string{"MUXPROXY_BYPASS=1"}, w.env...)
		in, inSum := random(4 << 20)
		r := w.run(spec{args: w.sshArgs("box", "cat"), env: env, stdin: in})
		if r.status != 0 || sum(r.out) != inSum {
			t.Errorf("status %d, %d bytes, stderr %q", r.status, len(r.out), r.err)
		}
		if _, ok := w.status(); ok {
			t.Error("a bypassed client started a master")
		}
	})
}

// A ProxyCommand that leads to muxproxy in a way that nobody can see must not lead a bypass back to itself.
func TestBypassDoesNotGoInCircles(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	w := newWorld(t, pipes)
	hidden := w.path("hidden")
	if err := os.Symlink(filepath.Join(binDir, "muxproxy"), hidden); err != nil {
		t.Fatal(err)
	}
	config, err := os.ReadFile(w.conf)
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{hidden + " '%r@%h:%p'", "nice " + hidden + " '%r@%h:%p'"} {
		lines := "ProxyCommand " + command + "\n" + string(config)
		if err := os.WriteFile(w.path("circle"), []byte(lines), 0o600); err != nil {
			t.Fatal(err)
		}
		env := append([]string{"MUXPROXY_BYPASS=1"}, w.env...)
		r := w.run(spec{args: []string{"ssh", "-F", w.path("circle"), "box", "echo hi"}, env: env, null: true})
		if r.status != 0 || r.out != "hi\n" {
			t.Errorf("%s: status %d, stdout %q, stderr %q", command, r.status, r.out, r.err)
		}
	}
}

// Many worlds' paths are longer than a socket's address may be.
func TestSocketsInADeepDirectory(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	t.Parallel()
	for _, m := range []mode{pipes, fdpass} {
		t.Run(string(m), func(t *testing.T) {
			t.Parallel()
			var deep string
			w := newWorld(t, m, func(s *setup) {
				deep = filepath.Join(s.dir, strings.Repeat("a-long-name-of-a-directory/", 6))
				if err := os.MkdirAll(deep, 0o700); err != nil {
					t.Fatal(err)
				}
				s.env["XDG_RUNTIME_DIR"] = deep
			})
			first := w.hold()
			want(t, w.ssh("box", "echo hi"), 0, "hi\n")
			first.release()
			if s := w.mustStatus(); !strings.HasPrefix(s.Sockets, deep) {
				t.Errorf("the sockets are in %s", s.Sockets)
			}
			w.connections(1)
		})
	}
}
