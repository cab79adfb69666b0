//go:build linux

package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestATerminalOnlyWhereAskedFor(t *testing.T) {
	if !remoteTTY(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		isTTY := "test -t 0 && echo yes || echo no"
		for _, c := range []struct {
			args []string
			want string
		}{
			{[]string{"box", isTTY}, "no"},
			{[]string{"-t", "box", isTTY}, "yes"},
			{[]string{"-T", "box", isTTY}, "no"},
			{[]string{"-t", "-T", "box", isTTY}, "no"},
		} {
			p := w.sshTTY(c.args...)
			if r := p.wait(patience); r.status != 0 || !strings.Contains(r.out, c.want+"\r\n") {
				t.Errorf("ssh %q: status %d, %q has no %q", c.args, r.status, r.out, c.want)
			}
		}
		// A terminal by force, where ssh itself has none; its output has the terminal's line ends.
		want(t, w.ssh("-tt", "box", "echo $TERM"), 0, "xterm\r\n")
	})
}

func TestWindowSizeFollowsTheTerminal(t *testing.T) {
	if !remoteTTY(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		p := w.sshTTY("-tt", "box", `trap 'exit 4' INT; while stty size; do sleep 0.1; done`)
		p.expect("24 80\r\n")
		p.resize(33, 101)
		p.expect("33 101\r\n")
		p.resize(50, 200)
		p.expect("50 200\r\n")
		p.send("\x03")
		if r := p.wait(patience); r.status != 4 {
			t.Errorf("status %d", r.status)
		}
	})
}

func TestEnvironmentReachesTheCommand(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		env := append([]string{"E2E_SENT=sent 1", "E2E_KEPT=not sent"}, w.env...)
		args := w.sshArgs("-o", "SendEnv=E2E_SE*", "-o", "SetEnv=E2E_SET=set", "box", `echo "$E2E_SENT,$E2E_SET,$E2E_KEPT"`)
		want(t, w.run(spec{args: args, env: env, null: true}), 0, "sent 1,set,\n")
		// The next client on the same connection has its own.
		first := w.hold()
		want(t, w.ssh("box", `echo "$E2E_SENT,$E2E_SET"`), 0, ",\n")
		first.release()
	})
}

func TestInterruptAtTheTerminalReachesTheCommand(t *testing.T) {
	if !remoteTTY(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		beside := w.hold()
		// Not a shell that reads: it can miss a signal that comes just before it waits.
		p := w.sshTTY("-tt", "box", `trap 'echo interrupted; exit 7' INT; echo ready; while :; do sleep 0.1; done`)
		p.expect("ready\r\n")
		p.send("\x03")
		p.expect("interrupted")
		if r := p.wait(patience); r.status != 7 {
			t.Errorf("status %d", r.status)
		}
		beside.echo("still here")
		beside.release()
	})
}

func TestSuspendAndQuitKeysReachTheCommand(t *testing.T) {
	if !remoteTTY(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		p := w.sshTTY("-tt", "box", `trap 'echo quit; exit 8' QUIT; echo ready; while read line; do echo "got $line"; done`)
		p.expect("ready\r\n")
		p.send("hello\n")
		p.expect("got hello\r\n")
		p.send("\x1c")
		p.expect("quit")
		if r := p.wait(patience); r.status != 8 {
			t.Errorf("status %d", r.status)
		}
	})
}

// SIGINT in a terminal goes to the whole process group, and to the bridge with it; ssh without a remote terminal ends.
func TestInterruptOfSSHItselfEndsItAlone(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		beside := w.hold()
		p := w.sshTTY("-T", "box", "echo ready; cat")
		p.expect("ready")
		p.send("\x03")
		if r := p.wait(patience); r.sig != syscall.SIGINT && r.status != 255 {
			t.Errorf("status %d, signal %v", r.status, r.sig)
		}
		beside.echo("still here")
		beside.release()
		w.connections(1)
	})
}

func TestAKilledRemoteCommandEndsItsSession(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		p := w.sshStart("box", "echo $$; exec cat")
		pid := strings.TrimSpace(p.expect("\n"))
		beside := w.hold()
		if r := w.ssh("box", "kill -9 "+pid); r.status != 0 {
			t.Fatalf("status %d: %s", r.status, r.err)
		}
		if r := p.wait(patience); r.status != 255 {
			t.Errorf("status %d", r.status)
		}
		beside.echo("still here")
		beside.release()
		w.connections(1)
	})
}

func TestEscapeAddsAForwardToALiveSession(t *testing.T) {
	if !remoteTTY(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		port, echo := freePort(t), echoServer(t)
		p := w.sshTTY("-tt", "-o", "EnableEscapeCommandline=yes", "box", "stty -echo; echo ready; cat")
		p.expect("ready\r\n")
		p.send("\n~C")
		p.expect("ssh> ")
		p.send(fmt.Sprintf("-L 127.0.0.1:%d:%s\r", port, echo))
		p.expect("Forwarding port.")
		exchange(t, loopback(port), "through the escape")
		p.send("\n~C")
		p.expect("ssh> ")
		remote := freePort(t)
		p.send(fmt.Sprintf("-R 127.0.0.1:%d:%s\r", remote, echo))
		p.expect("Forwarding port.")
		exchange(t, loopback(remote), "and back")
		p.send("\nstill a session\n")
		p.expect("still a session")
		p.send("\n~.")
		if r := p.wait(patience); r.status != 255 {
			t.Errorf("~. ended with %d", r.status)
		}
	})
}

func TestEscapeDotEndsThisClientAlone(t *testing.T) {
	if !remoteTTY(t) {
		return
	}
	forEach(t, func(t *testing.T, w *world) {
		beside := w.hold()
		p := w.sshTTY("-tt", "box", "stty -echo; echo ready; cat")
		p.expect("ready\r\n")
		p.send("\n~.")
		if r := p.wait(patience); r.status != 255 {
			t.Errorf("status %d", r.status)
		}
		beside.echo("still here")
		beside.release()
		w.connections(1)
	})
}

func TestALoginShellRuns(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		r := w.sshIn(strings.NewReader("echo shell says $((40+2)); exit 9\n"), "box")
		if r.status != 9 || !strings.Contains(r.out, "shell says 42\n") {
			t.Errorf("status %d, stdout %q, stderr %q", r.status, r.out, r.err)
		}
	})
}

// What a session leaves behind must not be seen by the next one on the same connection.
func TestSessionsShareNoDirectoryAndNoUmask(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		first := w.hold()
		want(t, w.ssh("box", "cd /; umask 0; export E2E_LEFT=1"), 0, "")
		home, err := os.UserHomeDir()
		if err != nil {
			t.Fatal(err)
		}
		r := w.ssh("box", `pwd -P; echo "left:$E2E_LEFT"`)
		if r.status != 0 || !strings.HasSuffix(r.out, "left:\n") || strings.HasPrefix(r.out, "/\n") && home != "/" {
			t.Errorf("status %d, stdout %q", r.status, r.out)
		}
		first.release()
	})
}
