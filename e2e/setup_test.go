//go:build linux

package e2e

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muxproxy/muxproxy/core/paths"
)

// tree is all that there is in a directory: kinds, modes, where links lead and what is in files.
func tree(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %v", strings.TrimPrefix(path, dir), info.Mode())
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", to)
		case info.Mode().IsRegular():
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %x", sha256.Sum256(text))
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// asInstalled has places where they are for somebody who has set no variable.
func asInstalled(s *setup) {
	s.state = "home/.local/state"
	s.env["XDG_STATE_HOME"], s.env["XDG_CONFIG_HOME"] = "", ""
}

// The way of somebody who has never seen it: set up, ssh twice, status, doctor, and away with all of it.
func TestNewcomersWay(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	t.Parallel()
	for name, home := range map[string]func(w *world, config string){
		"usual": func(w *world, config string) { w.write("home/.ssh/config", config) },
		"dotfiles": func(w *world, config string) { // a link, CRLF, and no line end
			if err := os.MkdirAll(w.path("home/dotfiles/ssh"), 0o755); err != nil {
				w.t.Fatal(err)
			}
			w.write("home/dotfiles/ssh/config", strings.ReplaceAll(strings.TrimSpace(config), "\n", "\r\n"))
			if err := os.Symlink("../dotfiles/ssh/config", w.path("home/.ssh/config")); err != nil {
				w.t.Fatal(err)
			}
		},
		"nothing": func(w *world, _ string) {
			if err := os.Remove(w.path("home/.ssh")); err != nil {
				w.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, fdpass, asInstalled)
			own := strings.ReplaceAll(w.read("direct_config"), fmt.Sprint("Port ", w.sshd), fmt.Sprint("Port ", w.link.port()))
			home(w, own+"    ControlMaster auto\n    ControlPath "+w.path("cm")+"\n")
			w.conf = w.path("home/.ssh/config")
			var options []string // where no file has them
			if name == "nothing" {
				for _, line := range strings.Split(strings.TrimSpace(own), "\n")[1:] {
					options = append(options, "-o", strings.TrimSpace(line))
				}
			}
			ssh := func(command string) result { return w.ssh(append(options, "box", command)...) }
			muxproxy := func(status int, want string, args ...string) {
				t.Helper()
				r := w.run(spec{args: append([]string{binDir + "/muxproxy"}, args...), null: true})
				if r.status != status || !strings.Contains(r.out, want) || r.err != "" {
					t.Errorf("muxproxy %q: status %d, %q\n%s", args, r.status, r.err, r.out)
				}
			}

			before := tree(t, w.path("home"))
			muxproxy(0, "This would be done:\n", "setup", "-F", w.conf, "--dry-run")
			if got := tree(t, w.path("home")); got != before {
				t.Fatalf("a dry run made of\n%s\nthis:\n%s", before, got)
			}
			muxproxy(0, "goes through muxproxy", "setup", "-F", w.conf, "--yes")
			muxproxy(0, "none runs; the next ssh starts one", "doctor", "-F", w.conf, "box")
			held := w.sshStart(append(options, "box", "cat")...)
			held.echo("held")
			want(t, ssh("echo two"), 0, "two\n")
			w.connections(1)
			muxproxy(0, "\n1    "+me+"@127.0.0.1:", "status")
			muxproxy(0, "ssh box goes through muxproxy", "doctor", "-F", w.conf, "box")
			muxproxy(0, "All is in place", "setup", "-F", w.conf)
			if _, err := os.Lstat(w.path("cm")); err == nil {
				t.Error("ssh has made a ControlMaster of its own")
			}
			held.release()
			st := w.mustStatus()

			muxproxy(0, "Done: ssh is as it was before muxproxy.\n", "setup", "--undo", "-F", w.conf, "--yes")
			if got := tree(t, w.path("home")); got != before {
				t.Errorf("left behind:\n%s\nwant:\n%s", got, before)
			}
			if got := tree(t, w.path("run")); strings.Count(got, "\n") != 1 {
				t.Errorf("left behind:\n%s", got)
			}
			if !gone(st.PID) {
				t.Error("the master lives")
			}
			muxproxy(0, "There is nothing to undo.\n", "setup", "--undo", "-F", w.conf)
			if name == "nothing" {
				return
			}
			want(t, w.ssh("-o", "ControlPath=none", "box", "echo three"), 0, "three\n")
			if _, ok := w.status(); ok {
				t.Error("a master lives again")
			}
		})
	}
}

// Where ssh turns the master's host key down, which it does without a word of muxproxy's if connections are passed to it,
// doctor names the line that is missing.
func TestDoctorNamesTheMissingLine(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	t.Parallel()
	w := newWorld(t, fdpass)
	line := ""
	for l := range strings.Lines(w.read("ssh_config")) {
		if strings.Contains(l, "GlobalKnownHostsFile") {
			line = l
		}
	}
	whole := w.read("ssh_config")
	w.write("ssh_config", strings.Replace(whole, line, "", 1))
	if r := w.ssh("box", "true"); r.status != 255 || !strings.Contains(r.err, "Host key verification failed") {
		t.Fatalf("status %d, %s", r.status, r.err)
	}
	r := w.run(spec{args: []string{binDir + "/muxproxy", "doctor", "-F", w.conf, "box"}, null: true})
	mend := "mend: GlobalKnownHostsFile " + w.path("state/muxproxy/known_hosts")
	if r.status != 1 || !strings.Contains(r.out, mend) {
		t.Fatalf("status %d, %s\nno %q in\n%s", r.status, r.err, mend, r.out)
	}
	_, rest, _ := strings.Cut(r.out, "mend: GlobalKnownHostsFile ")
	files, _, _ := strings.Cut(rest, "\n")
	w.write("ssh_config", strings.Replace(whole, line, "    GlobalKnownHostsFile "+files+"\n", 1))
	want(t, w.ssh("box", "echo mended"), 0, "mended\n")
	if r := w.run(spec{args: []string{binDir + "/muxproxy", "doctor", "-F", w.conf, "box"}, null: true}); r.status != 0 {
		t.Errorf("status %d\n%s", r.status, r.out)
	}
}

// What a killed master leaves is found, and the next one takes it away.
func TestDoctorAfterAKill(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	t.Parallel()
	w := newWorld(t, fdpass)
	want(t, w.ssh("box", "echo one"), 0, "one\n")
	pid := w.mustStatus().PID
	kill9(pid)
	eventually(t, "all of it is gone", func() bool { return !paths.Alive(pid) })
	doctor := func() result {
		t.Helper()
		r := w.run(spec{args: []string{binDir + "/muxproxy", "doctor", "-F", w.conf}, null: true})
		if r.status != 0 {
			t.Errorf("status %d\n%s", r.status, r.out)
		}
		return r
	}
	if r := doctor(); !strings.Contains(r.out, "\nwarning  leftovers ") || !strings.Contains(r.out, "mend: muxproxy master start\n") {
		t.Error(r.out)
	}
	want(t, w.ssh("box", "echo two"), 0, "two\n")
	if r := doctor(); !strings.Contains(r.out, "\nok       leftovers ") {
		t.Error(r.out)
	}
}
