//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// same checks that a copy has the content with this SHA-256.
func (w *world) same(name, sum string) {
	w.t.Helper()
	if got := w.sumFile(w.path(name)); got != sum {
		w.t.Errorf("%s differs from what was sent", name)
	}
}

// ok runs a command that must end with 0.
func (w *world) ok(args ...string) result {
	w.t.Helper()
	r := w.run(spec{args: args, null: true})
	if r.status != 0 {
		w.t.Fatalf("%q: status %d\n%s%s", args, r.status, tail(r.out), tail(r.err))
	}
	return r
}

func TestSFTPPutAndGet(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		file, sum := w.randomFile("file", 8<<20)
		batch := fmt.Sprintf("put %s %s\nget %s %s\nls -l %s\n", file, w.path("there"), w.path("there"), w.path("back"), w.dir)
		r := w.run(spec{args: []string{"sftp", "-F", w.conf, "-b", "-", "box"}, stdin: strings.NewReader(batch)})
		if r.status != 0 {
			t.Fatalf("status %d: %s", r.status, r.err)
		}
		w.same("there", sum)
		w.same("back", sum)
		missing := w.run(spec{args: []string{"sftp", "-F", w.conf, "-b", "-", "box"},
			stdin: strings.NewReader("get " + w.path("missing") + "\n")})
		if missing.status != 1 {
			t.Errorf("sftp of a file that isn't there ended with %d: %s", missing.status, missing.err)
		}
	})
}

func TestSCPBothWaysInBothProtocols(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		file, sum := w.randomFile("file", 8<<20)
		protocols := [][]string{{}, {"-O"}}
		for i, protocol := range protocols {
			there, back := fmt.Sprint("there", i), fmt.Sprint("back", i)
			scp := append([]string{"scp", "-q", "-F", w.conf}, protocol...)
			w.ok(append(scp, file, "box:"+w.path(there))...)
			w.ok(append(scp, "box:"+w.path(there), w.path(back))...)
			w.same(there, sum)
			w.same(back, sum)
			if r := w.run(spec{args: append(scp, "box:"+w.path("missing"), w.path("x")), null: true}); r.status != 1 {
				t.Errorf("scp %q of a file that isn't there ended with %d: %s", protocol, r.status, r.err)
			}
		}
	})
}

// tree makes a folder with some files in it.
func (w *world) tree(name string) {
	w.t.Helper()
	for i := range 20 {
		dir := filepath.Join(name, fmt.Sprint("dir", i%4))
		if err := os.MkdirAll(w.path(dir), 0o755); err != nil {
			w.t.Fatal(err)
		}
		w.write(filepath.Join(dir, fmt.Sprint("file", i)), strings.Repeat(fmt.Sprintln("line", i), 1000*i))
	}
}

func TestRsyncBothWays(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		w.tree("tree")
		e := "ssh -F " + w.conf
		w.ok("rsync", "-a", "-e", e, w.path("tree")+"/", "box:"+w.path("there")+"/")
		w.ok("rsync", "-a", "-e", e, "box:"+w.path("there")+"/", w.path("back")+"/")
		w.ok("diff", "-r", w.path("tree"), w.path("back"))
		// A second run finds little to do: that takes many small messages both ways.
		w.write("tree/dir0/file0", "changed\n")
		w.ok("rsync", "-a", "-c", "-e", e, w.path("tree")+"/", "box:"+w.path("there")+"/")
		w.ok("diff", "-r", w.path("tree"), w.path("there"))
	})
}

func TestGitCloneAndPush(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		w.ok("git", "init", "-q", "--bare", w.path("repo.git"))
		w.tree("work")
		w.ok("git", "init", "-q", w.path("work"))
		w.ok("git", "-C", w.path("work"), "add", ".")
		w.ok("git", "-C", w.path("work"), "commit", "-q", "-m", "first")
		w.ok("git", "-C", w.path("work"), "push", "-q", "box:"+w.path("repo.git"), "HEAD:refs/heads/main")
		w.ok("git", "clone", "-q", "-b", "main", "box:"+w.path("repo.git"), w.path("clone"))
		w.ok("diff", "-r", "-x", ".git", w.path("work"), w.path("clone"))
		r := w.run(spec{args: []string{"git", "ls-remote", "box:" + w.path("nothing.git")}, null: true})
		if r.status != 128 {
			t.Errorf("git ls-remote of nothing ended with %d: %s", r.status, r.err)
		}
	})
}

// An ssh that is itself a ControlMaster asks for many sessions, and closes them before the exit status has come.
func TestAControlMasterOnTop(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		control := []string{"-o", "ControlMaster=auto", "-o", "ControlPath=" + w.path("cm")}
		first := w.sshStart(append(control, "box", "cat")...)
		first.echo("first")
		for i := range 20 {
			status := []int{0, 1, 77, 255}[i%4]
			want(t, w.ssh(append(control, "box", fmt.Sprintf("echo out; exit %d", status))...), status, "out\n")
			want(t, w.sshIn(strings.NewReader("in\n"), append(control, "box", fmt.Sprintf("cat; exit %d", status))...), status, "in\n")
		}
		in, inSum := random(4 << 20)
		if r := w.sshIn(in, append(control, "box", "cat")...); r.status != 0 || sum(r.out) != inSum {
			t.Errorf("status %d, %d bytes came back, stderr %q", r.status, len(r.out), r.err)
		}
		first.echo("still first")
		first.release()
		w.connections(1)
	})
}

// scp -3 runs two ssh at once and copies between them.
func TestSCPFromServerToServer(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		file, sum := w.randomFile("file", 1<<20)
		w.ok("scp", "-q", "-3", "-F", w.conf, "box:"+file, "box:"+w.path("copy"))
		w.same("copy", sum)
	})
}
