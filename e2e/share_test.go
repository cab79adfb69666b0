//go:build linux

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestFiveClientsOneAfterAnotherUseOneConnection(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		first := w.hold()
		for i := range 5 {
			want(t, w.ssh("box", fmt.Sprint("echo ", i)), 0, fmt.Sprintln(i))
		}
		first.echo("still here")
		first.release()
		w.connections(1)
	})
}

func TestFiveClientsAtOnceUseOneConnection(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		first := w.hold()
		var all []*proc
		for i := range 5 {
			all = append(all, w.start(spec{args: w.sshArgs("box", fmt.Sprint("echo ", i)), null: true}))
		}
		for i, p := range all {
			want(t, p.wait(2*patience), 0, fmt.Sprintln(i))
		}
		first.echo("still here")
		first.release()
		w.connections(1)
	})
}

// With nobody left and no policy that keeps it, the connection ends; the next client gets a new one and no error.
func TestTheConnectionEndsWithItsLastClient(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		for range 5 {
			want(t, w.ssh("box", "echo hi"), 0, "hi\n")
		}
		eventually(t, "the server has no connection left", func() bool { return w.link.open() == 0 })
	})
}

func TestExitStatusIsTheCommands(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		first := w.hold()
		for _, status := range []int{0, 1, 77, 255} {
			want(t, w.ssh("box", fmt.Sprint("exit ", status)), status, "")
		}
		first.release()
		w.connections(1)
	})
}

func TestDeathByASignalLooksAsWithPlainSSH(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		for _, sig := range []string{"TERM", "KILL", "HUP"} {
			command := "echo out; kill -" + sig + " $$"
			theirs, ours := w.plainSSH("box", command), w.ssh("box", command)
			if theirs.status != ours.status || theirs.out != ours.out || theirs.err != ours.err {
				t.Errorf("SIG%s: plain ssh: %d %q %q; here: %d %q %q", sig,
					theirs.status, theirs.out, theirs.err, ours.status, ours.out, ours.err)
			}
		}
	})
}

// random returns a source of n bytes that are always the same, and their SHA-256.
func random(n int64) (io.Reader, string) {
	h := sha256.New()
	io.Copy(h, io.LimitReader(rand.NewChaCha8([32]byte{1}), n))
	return io.LimitReader(rand.NewChaCha8([32]byte{1}), n), hex.EncodeToString(h.Sum(nil))
}

// randomFile writes n random bytes to a file and returns its path and the SHA-256.
func (w *world) randomFile(name string, n int64) (string, string) {
	w.t.Helper()
	f, err := os.Create(w.path(name))
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	r, sum := random(n)
	if _, err := io.Copy(f, r); err != nil {
		w.t.Fatal(err)
	}
	return f.Name(), sum
}

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func (w *world) sumFile(path string) string {
	w.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		w.t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func bulk() int64 {
	if bigMode {
		return 256 << 20
	}
	return 64 << 20
}

func TestBulkToTheServerIsByteExact(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		in, sum := random(bulk())
		r := w.start(spec{args: w.sshArgs("box", "sha256sum"), stdin: in}).wait(2 * time.Minute)
		want(t, r, 0, sum+"  -\n")
	})
}

func TestBulkFromTheServerIsByteExact(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		file, sum := w.randomFile("bulk", bulk())
		// The shell's sha256sum reads the pipe, so that a quarter of a gigabyte need not fit into the test's memory.
		r := w.start(spec{args: []string{"sh", "-c", `"$@" | sha256sum`, "sh", "ssh", "-F", w.conf, "box", "cat " + file},
			null: true}).wait(2 * time.Minute)
		want(t, r, 0, sum+"  -\n")
	})
}

func TestStdoutAndStderrStayApart(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		out, outSum := w.randomFile("out", 4<<20)
		errs, errSum := w.randomFile("err", 1<<20)
		r := w.ssh("box", fmt.Sprintf("cat %s >&2 & cat %s; wait; exit 3", errs, out))
		if r.status != 3 || sum(r.out) != outSum || sum(r.err) != errSum {
			t.Errorf("status %d (want 3), %d bytes on stdout (same: %v), %d on stderr (same: %v)", r.status,
				len(r.out), sum(r.out) == outSum, len(r.err), sum(r.err) == errSum)
		}
	})
}

// Both directions are full at once, and nobody may wait for the other.
func TestBulkBothWaysAtOnce(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		in, inSum := random(16 << 20)
		r := w.sshIn(in, "box", "cat")
		if r.status != 0 || sum(r.out) != inSum {
			t.Errorf("status %d, %d bytes came back, the same: %v, stderr %q", r.status, len(r.out), sum(r.out) == inSum, r.err)
		}
	})
}

func TestEndOfStdinReachesTheCommand(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		want(t, w.sshIn(strings.NewReader("hi\n"), "box", "cat"), 0, "hi\n")
		want(t, w.ssh("box", "cat"), 0, "")
		want(t, w.ssh("-n", "box", "cat; echo after"), 0, "after\n")
	})
}

func TestHalfCloseIsNotClose(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		// Our side ends first; the command still speaks.
		want(t, w.sshIn(strings.NewReader("in\n"), "box", "cat; echo after; echo too >&2; exit 5"), 5, "in\nafter\n")
		// The command's side ends first; it still listens.
		in, inSum := random(4 << 20)
		r := w.sshIn(in, "box", "exec >&- 2>&-; cat > "+w.path("got"))
		want(t, r, 0, "")
		if got := w.sumFile(w.path("got")); got != inSum {
			t.Error("what the command read after it had closed its output is not what was sent")
		}
	})
}

// sshd sends the exit status when the command is done, before the output that its child still holds open.
func TestOutputAfterTheExitStatusArrives(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		fifo := w.path("fifo")
		if err := syscall.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
		p := w.sshStart("box", fmt.Sprintf("(cat %s) & echo started; exit 3", fifo))
		p.expect("started\n")
		if err := os.WriteFile(fifo, []byte("late\n"), 0o600); err != nil { // opens when the child reads
			t.Fatal(err)
		}
		want(t, p.wait(patience), 3, "started\nlate\n")
	})
}

// A reader that has enough ends the writer at the other end: eow@openssh.com.
func TestYesPipedToHeadEnds(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		p := w.start(spec{args: []string{"sh", "-c", `"$@" | head -n 1`, "sh", "ssh", "-F", w.conf, "box", "yes"}, null: true})
		want(t, p.wait(15*time.Second), 0, "y\n")
	})
}

// A bridge that held on to ssh's stderr would keep these pipes open for ever.
func TestBackgroundSSHLetsGoOfThePipeAsPlainSSHDoes(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		for _, args := range []string{"-f box 'sleep 1; echo x'", "-f box 'echo e >&2; sleep 1; echo x'", "-fN box"} {
			pipe := func(conf string) result {
				return w.start(spec{args: []string{"sh", "-c", "ssh -F " + conf + " " + args + " 2>&1 | cat"}, null: true}).wait(patience)
			}
			theirs, ours := pipe(w.direct), pipe(w.conf)
			if theirs.out != ours.out || ours.err != "" {
				t.Errorf("ssh %s: plain ssh says %q, here %q (stderr %q)", args, theirs.out, ours.out, ours.err)
			}
			if ours.took > theirs.took+5*time.Second {
				t.Errorf("ssh %s: plain ssh's pipe ends after %v, here after %v", args, theirs.took, ours.took)
			}
		}
		for pid, a := range processes() {
			if strings.Contains(strings.Join(a, " "), w.direct) {
				kill9(pid) // plain ssh -fN; the other one is the world's to end
			}
		}
	})
}

// ssh -E leaves its log open in the ProxyCommand. Nothing of that may reach the master, which outlives both.
func TestALogFileOfSSHIsNotHeldByTheMaster(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		log := w.path("ssh.log")
		want(t, w.ssh("-v", "-E", log, "box", "echo hi"), 0, "hi\n")
		if !strings.Contains(w.read("ssh.log"), "debug1: ") {
			t.Error("ssh -v -E wrote no log")
		}
		if w.mode == plain {
			return
		}
		pid := w.mustStatus().PID
		for _, to := range w.fds(pid) {
			if to == log {
				t.Error("the master holds ssh's log open")
			}
		}
		if os.Geteuid() == 0 {
			if to, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err != nil || to != "/" {
				t.Errorf("the master's working directory is %q (%v)", to, err)
			}
		}
	})
}

// The client's terminal and session are not the master's: what ends them does not end it.
func TestTheMasterIsInASessionOfItsOwn(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		// A terminal of its own: when ssh ends, the terminal's session is hung up.
		p := w.sshTTY("box", "echo hi")
		p.expect("hi")
		if r := p.wait(patience); r.status != 0 {
			t.Fatalf("status %d: %s", r.status, r.out)
		}
		p.tty.Close()
		pid := w.mustStatus().PID
		if st := stat(pid); st.session != pid {
			t.Errorf("master %d is in session %d", pid, st.session)
		}
	})
}
