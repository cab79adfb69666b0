//go:build unix

package setup

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/muxproxy/muxproxy/core/paths"
)

// world is a home directory with a real ssh that takes it for its own.
type world struct {
	t    *testing.T
	home string
	o    Options
}

func newWorld(t *testing.T) *world {
	t.Helper()
	real, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	w := &world{t: t, home: filepath.Join(dir, "home dir")}
	w.mkdir(w.home)
	w.mkdir(filepath.Join(dir, "run"))
	// ssh goes by the password database, so it has to be told.
	ssh := filepath.Join(dir, "ssh")
	script := fmt.Sprintf("#!/bin/sh\ncase \" $* \" in\n*' -F '*) exec %s \"$@\" ;;\nesac\nconfig=none\n"+
		"[ -e '%[2]s' ] && config='%[2]s'\nexec %[1]s -F \"$config\" \"$@\"\n", real, w.path(".ssh/config"))
	if err := os.WriteFile(ssh, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	dirs, err := paths.Find(func(name string) string {
		return map[string]string{"HOME": w.home, "XDG_RUNTIME_DIR": filepath.Join(dir, "run")}[name]
	})
	if err != nil {
		t.Fatal(err)
	}
	w.o = Options{Dirs: dirs, Home: w.home, Program: "/opt/a b/muxproxy", SSH: ssh}
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.home, name) }

func (w *world) mkdir(dir string) {
	w.t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) write(name, text string, mode fs.FileMode) string {
	w.t.Helper()
	path := w.path(name)
	w.mkdir(filepath.Dir(path))
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		w.t.Fatal(err)
	}
	return path
}

func (w *world) link(to, name string) {
	w.t.Helper()
	w.mkdir(filepath.Dir(w.path(name)))
	if err := os.Symlink(to, w.path(name)); err != nil {
		w.t.Fatal(err)
	}
}

// tree is all that there is below the home directory: kinds, modes, owners, where links lead and what is in files.
func (w *world) tree() string {
	w.t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(w.home, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&b, "%s %v %d:%d", strings.TrimPrefix(path, w.home), info.Mode(), st.Uid, st.Gid)
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
			fmt.Fprintf(&b, " %d %x", st.Nlink, sha256.Sum256(text))
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return b.String()
}

func (w *world) do(p *Plan, err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
	var shown bytes.Buffer
	if err := p.Write(&shown); err != nil || (shown.Len() == 0) != p.Empty() {
		w.t.Errorf("empty %v, %v:\n%s", p.Empty(), err, &shown)
	}
	if err := p.Do(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) setup(hosts ...string) {
	w.t.Helper()
	w.o.Hosts = hosts
	w.do(Make(w.t.Context(), w.o))
	if _, err := Verify(w.t.Context(), w.o); err != nil {
		w.t.Error(err)
	}
}

func (w *world) undo() {
	w.t.Helper()
	w.do(Undo(w.o))
}

func (w *world) read(name string) string {
	w.t.Helper()
	b, err := os.ReadFile(w.path(name))
	if err != nil {
		w.t.Fatal(err)
	}
	return string(b)
}

// leads asks ssh whether a host leads to muxproxy.
func (w *world) leads(host string) bool {
	w.t.Helper()
	out, err := exec.Command(w.o.SSH, "-G", host).CombinedOutput()
	if err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	return strings.Contains(string(out), `proxycommand "/opt/a b/muxproxy" --fdpass '%r@%h:%p' '%n'`) &&
		strings.Contains(string(out), "\nproxyusefdpass yes\n")
}

// What a home can be like, and what an ssh_config is then: there and back changes nothing.
var homes = map[string]func(w *world){
	"nothing":    func(*world) {},
	"empty .ssh": func(w *world) { w.mkdir(w.path(".ssh")) },
	"empty file": func(w *world) { w.write(".ssh/config", "", 0o600) },
	"usual":      func(w *world) { w.write(".ssh/config", "Host a\n    Port 2200\n", 0o600) },
	"other mode": func(w *world) { w.write(".ssh/config", "Host a\n", 0o644) },
	"other group": func(w *world) {
		path := w.write(".ssh/config", "Host a\n", 0o640)
		if os.Geteuid() == 0 { // others can give a file only to a group of theirs
			if err := os.Chown(path, 0, 54321); err != nil {
				w.t.Fatal(err)
			}
		}
	},
	"no newline":    func(w *world) { w.write(".ssh/config", "Host a\n    Port 2200", 0o600) },
	"crlf":          func(w *world) { w.write(".ssh/config", "Host a\r\n    Port 2200\r\nHost b\r\n", 0o600) },
	"only comments": func(w *world) { w.write(".ssh/config", "# x\n\n", 0o600) },
	"own Include": func(w *world) {
		w.write(".ssh/config", "Include conf.d/*\nMatch host a\n  User b\n", 0o600)
		w.write(".ssh/conf.d/one", "Host c\n  Port 1\n", 0o600)
	},
	"own ProxyCommand": func(w *world) {
		w.write(".ssh/config", "Host *\n  ProxyCommand nc %h %p\n  ControlMaster auto\n  ControlPath ~/.ssh/cm-%C\n", 0o600)
	},
	"symlink": func(w *world) {
		w.write("dotfiles/ssh/config", "Host a\n  Port 2200\n", 0o640)
		w.link("../dotfiles/ssh/config", ".ssh/config")
	},
	"symlinks": func(w *world) {
		w.write("store/config", "Host a\n", 0o600)
		w.link(w.path("store"), "dotfiles")
		w.link("../dotfiles/config", ".ssh/config")
	},
	"symlinked .ssh": func(w *world) {
		w.write("dotfiles/ssh/config", "Host a\n", 0o600)
		w.link("dotfiles/ssh", ".ssh")
	},
	"symlinked .ssh without file": func(w *world) {
		w.mkdir(w.path("dotfiles/ssh"))
		w.link("dotfiles/ssh", ".ssh")
	},
	"policy": func(w *world) { w.write(".config/muxproxy/config.hcl", "# mine\n", 0o600) },
	"places": func(w *world) { w.mkdir(w.path(".local/state")); w.mkdir(w.path(".config")) },
}

func TestThereAndBack(t *testing.T) {
	for name, home := range homes {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			home(w)
			before := w.tree()
			w.setup()
			if !w.leads("a") || !w.leads("anything") {
				t.Errorf("does not lead there:\n%s", w.read(".ssh/config"))
			}
			after := w.tree()
			if p, err := Make(t.Context(), w.o); err != nil || !p.Empty() {
				t.Errorf("a second time there is something to do: %v", err)
			}

			// Other hosts, and the first again.
			w.setup("*.corp", "!x.corp", "db-?")
			if !w.leads("a.corp") || !w.leads("db-1") || w.leads("a") || w.leads("x.corp") {
				t.Errorf("leads where it should not, or not where it should:\n%s", w.read(".config/muxproxy/ssh_config"))
			}
			if got, ok := Hosts(w.o.Dirs); !ok || !slices.Equal(got, []string{"*.corp", "!x.corp", "db-?"}) {
				t.Errorf("%q, %v", got, ok)
			}
			w.setup()
			if again := w.tree(); again != after {
				t.Errorf("not the same:\n%s\nwant:\n%s", again, after)
			}

			// What a master leaves.
			if err := w.o.Dirs.Make(); err != nil {
				t.Fatal(err)
			}
			w.write(".local/state/muxproxy/known_hosts", "x", 0o600)
			w.write(".local/state/muxproxy/audit.log", "x", 0o600)
			if err := os.WriteFile(filepath.Join(w.o.Dirs.Runtime, paths.MuxSocket), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := w.o.Dirs.Publish(w.o.Dirs.Runtime); err != nil {
				t.Fatal(err)
			}
			w.undo()
			if got := w.tree(); got != before {
				t.Errorf("left behind:\n%s\nwant:\n%s", got, before)
			}
			if _, err := os.Lstat(w.o.Dirs.Runtime); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %v", w.o.Dirs.Runtime, err)
			}
			if p, err := Undo(w.o); err != nil || !p.Empty() {
				t.Errorf("there is still something to undo: %v", err)
			}
		})
	}
}

// What the user does after setup stays.
func TestUndoKeepsEdits(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"more lines":     {"Include %s\nHost a\nHost b\n", "Host a\nHost b\n"},
		"moved":          {"Host a\n  Include \"%s\"\nHost b", "Host a\nHost b"},
		"now crlf":       {"Include %s\r\nHost a\r\n", "Host a\r\n"},
		"among others":   {"Include %s other\n", "Include %s other\n"},
		"gone":           {"Host a\n", "Host a\n"},
		"twice":          {"Include %s\n\n# x\nInclude %s\n", "\n# x\n"},
		"only a comment": {"# Include %s\n", "# Include %s\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.o.Home = filepath.Join(filepath.Dir(w.home), "plain") // without a space, which would need quotes
			w.home = w.o.Home
			w.o.Dirs.Config = w.path(".config/muxproxy")
			w.mkdir(w.home)
			w.do(Make(t.Context(), w.o)) // the file is new
			edit := func(s string) string { return strings.ReplaceAll(s, "%s", w.o.included()) }
			w.write(".ssh/config", edit(c.text), 0o600)
			w.undo()
			if got := w.read(".ssh/config"); got != edit(c.want) {
				t.Errorf("%q, want %q", got, edit(c.want))
			}
			if _, err := os.Lstat(w.o.included()); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the included file: %v", err)
			}
		})
	}
}

// foreign gives a file to another user, or, for who can't, puts a file of root's there.
func (w *world) foreign(name string) {
	w.t.Helper()
	path := w.path(name)
	if os.Geteuid() == 0 {
		if err := os.Chown(path, 54321, 54321); err != nil {
			w.t.Fatal(err)
		}
		return
	}
	if err := os.RemoveAll(path); err != nil {
		w.t.Fatal(err)
	}
	to := "/etc/hosts"
	if strings.HasSuffix(name, ".ssh") {
		to = "/etc/ssh"
	}
	w.link(to, name)
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		home func(w *world)
		want string
		hint bool // says which line a person can add
	}{
		"read-only":           {func(w *world) { w.write(".ssh/config", "Host a\n", 0o400) }, "is read-only (mode 0400): chmod u+w ", true},
		"another's":           {func(w *world) { w.write(".ssh/config", "", 0o644); w.foreign(".ssh/config") }, "belongs to uid ", true},
		"another's directory": {func(w *world) { w.mkdir(w.path(".ssh")); w.foreign(".ssh") }, "belongs to uid ", true},
		"no link target":      {func(w *world) { w.link("../nowhere", ".ssh/config") }, "is a symbolic link to ../nowhere, which does not exist", false},
		"directory":           {func(w *world) { w.mkdir(w.path(".ssh/config")) }, "is not a regular file", false},
		"hard links": {func(w *world) {
			if err := os.Link(w.write(".ssh/config", "Host a\n", 0o600), w.path("other")); err != nil {
				w.t.Fatal(err)
			}
		}, "has 2 names (hard links)", true},
		"too large":         {func(w *world) { w.write(".ssh/config", strings.Repeat("# x\n", 1<<20+1), 0o600) }, "is larger than 4 MiB", false},
		"broken":            {func(w *world) { w.write(".ssh/config", "Hosst a\n", 0o600) }, "line 1: Bad configuration option: hosst; mend that first", false},
		"byte order mark":   {func(w *world) { w.write(".ssh/config", "\xef\xbb\xbfHost a\n", 0o600) }, "line 1: Bad configuration option", false},
		"bad pattern":       {func(w *world) { w.o.Hosts = []string{"a\nHost b"} }, `"a\nHost b": a host pattern has no`, false},
		"no host":           {func(w *world) { w.o.Hosts = []string{"!a"} }, "!a: matches no host", false},
		"program":           {func(w *world) { w.o.Program = "/opt/$x/muxproxy" }, `"/opt/$x/muxproxy": can't be written`, false},
		"place":             {func(w *world) { w.o.Dirs.Config = "/x/%h/muxproxy" }, `"/x/%h/muxproxy/ssh_config": can't be written`, false},
		"system-wide file":  {func(w *world) { w.o.Config = "/etc/ssh/ssh_config" }, "/etc/ssh/ssh_config is for all users", false},
		"loop":              {func(w *world) { w.link("config", ".ssh/config") }, "too many links", false},
		"no place for it":   {func(w *world) { w.write(".config", "", 0o600) }, ".config/muxproxy", false},
		"a pipe":            {func(w *world) { w.link("/dev/null", ".ssh/config") }, "is not a regular file", false},
		"included is a dir": {func(w *world) { w.mkdir(w.path(".config/muxproxy/ssh_config")) }, "ssh_config is not a regular file", false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c.home(w)
			before := w.tree()
			_, err := Make(t.Context(), w.o)
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %q", err, c.want)
			}
			if err != nil && c.hint != strings.Contains(err.Error(), "yourself, and run it again: Include ") {
				t.Errorf("hint wanted: %v: %v", c.hint, err)
			}
			if got := w.tree(); got != before {
				t.Errorf("changed:\n%s\nbefore:\n%s", got, before)
			}
		})
	}
}

// Where the file can't be written, a person adds the line, and setup goes on from there; so does what is read-only later.
func TestLineAddedByHand(t *testing.T) {
	w := newWorld(t)
	w.write(".ssh/config", "Include \""+w.o.included()+"\"\n", 0o400)
	before := w.tree()
	w.setup()
	if !w.leads("a") {
		t.Error("does not lead there")
	}
	if _, err := Undo(w.o); err == nil || !strings.Contains(err.Error(), "is read-only") {
		t.Errorf("%v", err)
	}
	if err := os.Chmod(w.path(".ssh/config"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.undo()
	w.write(".ssh/config", "Include \""+w.o.included()+"\"\n", 0o400)
	if got := w.tree(); got != before {
		t.Errorf("%s\nwant:\n%s", got, before)
	}
}

func TestOtherFile(t *testing.T) {
	w := newWorld(t)
	w.write(".ssh/config", "Host a\n", 0o600)
	w.write("other", "Host b\n", 0o600)
	before := w.tree()
	w.setup()
	first := w.o
	w.o.Config = w.path("other")
	w.setup()
	w.o.Config = w.path("new/third")
	w.setup()
	w.o = first // what it has no word of, the included file knows
	w.undo()
	if got := w.tree(); got != before {
		t.Errorf("%s\nwant:\n%s", got, before)
	}
}

// A step that fails takes the others back, until state is gone.
func TestFailure(t *testing.T) {
	w := newWorld(t)
	w.write(".ssh/config", "Host a\n", 0o600)
	before := w.tree()
	p, err := Make(t.Context(), w.o)
	if err != nil {
		t.Fatal(err)
	}
	edited := w.write(".ssh/config", "Host b\n", 0o600)
	if err := p.Do(t.Context()); err == nil || !strings.Contains(err.Error(), "config has changed meanwhile") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(edited, []byte("Host a\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := w.tree(); got != before {
		t.Errorf("setup left behind:\n%s\nwant:\n%s", got, before)
	}

	w.setup()
	if err := w.o.Dirs.Make(); err != nil {
		t.Fatal(err)
	}
	after := w.tree()
	w.o.Running = &Running{PID: 7, Clients: 1, Stop: func(context.Context) error { return errors.New("denied") }}
	p, err = Undo(w.o)
	if err != nil {
		t.Fatal(err)
	}
	var shown strings.Builder
	if err := p.Write(&shown); err != nil || !strings.Contains(shown.String(), "- stop the master, pid 7, which ends 1 client\n") {
		t.Errorf("%s, %v", shown.String(), err)
	}
	if err := p.Do(t.Context()); err == nil || err.Error() != "denied" {
		t.Errorf("%v", err)
	}
	if got := w.tree(); got != after {
		t.Errorf("undo changed:\n%s\nwant:\n%s", got, after)
	}

	// A master that has come meanwhile.
	w.o.Running = nil
	lock, err := paths.TryLock(filepath.Join(w.o.Dirs.Run, paths.MasterLock))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if p, err = Undo(w.o); err != nil {
		t.Fatal(err)
	}
	if err := p.Do(t.Context()); err == nil || !strings.Contains(err.Error(), "a master lives that did not before") {
		t.Errorf("%v", err)
	}
	if !w.leads("a") {
		t.Error("undone in part")
	}

	// The point of no return.
	lock.Close()
	if p, err = Undo(w.o); err != nil {
		t.Fatal(err)
	}
	w.write(".config/muxproxy/ssh_config", "# mine now\n", 0o600)
	if err := p.Do(t.Context()); err == nil || !strings.Contains(err.Error(), "ssh_config has changed meanwhile") {
		t.Errorf("%v", err)
	}
	if got := w.read(".ssh/config"); got != "Host a\n" {
		t.Errorf("%q", got)
	}
}

// Of a state directory that hosts share, another host's part stays while a master lives there.
func TestSharedHome(t *testing.T) {
	w := newWorld(t)
	w.setup()
	if err := w.o.Dirs.Make(); err != nil {
		t.Fatal(err)
	}
	w.write(".local/state/muxproxy/run-dead/master.lock", "", 0o600)
	lock, err := paths.TryLock(w.write(".local/state/muxproxy/run-other/master.lock", "", 0o600))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	w.write(".local/state/muxproxy/known_hosts", "x", 0o600)
	p, err := Undo(w.o)
	if err != nil {
		t.Fatal(err)
	}
	var shown strings.Builder
	if err := p.Write(&shown); err != nil || !strings.Contains(shown.String(), "a master lives on another host: run-other\n") {
		t.Errorf("%s, %v", shown.String(), err)
	}
	w.do(p, nil)
	if w.read(".local/state/muxproxy/known_hosts") != "x" {
		t.Error("known_hosts is gone")
	}
	if _, err := os.Lstat(w.o.Dirs.Run); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", w.o.Dirs.Run, err)
	}
	lock.Close()
	w.undo()
	if _, err := os.Lstat(w.o.Dirs.State); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", w.o.Dirs.State, err)
	}
}

// What a master has left elsewhere goes too, if it can be a master's, and the line also where nothing else is known.
func TestUndoWithoutRecord(t *testing.T) {
	w := newWorld(t)
	w.write(".ssh/config", "Host a\n", 0o600)
	before := w.tree()
	w.write(".ssh/config", "Include \""+w.o.included()+"\"\nHost a\n", 0o600)
	if err := w.o.Dirs.Make(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(w.home)
	for name, stays := range map[string]bool{"elsewhere/muxproxy": false, "elsewhere/precious": true} {
		sockets := filepath.Join(dir, name)
		w.mkdir(sockets)
		if err := w.o.Dirs.Make(); err != nil {
			t.Fatal(err)
		}
		if err := w.o.Dirs.Publish(sockets); err != nil {
			t.Fatal(err)
		}
		w.undo()
		if _, err := os.Lstat(sockets); (err == nil) != stays {
			t.Errorf("%s: %v", sockets, err)
		}
	}
	for _, d := range []string{".local/state", ".local"} { // nobody knows that they are new
		if err := os.Remove(w.path(d)); err != nil {
			t.Fatal(err)
		}
	}
	if got := w.tree(); got != before {
		t.Errorf("left behind:\n%s\nwant:\n%s", got, before)
	}
}

// A state directory that is not what it should be is not emptied.
func TestUntrustedState(t *testing.T) {
	w := newWorld(t)
	w.setup()
	w.write("precious/file", "x", 0o600)
	w.link(w.path("precious"), ".local/state/muxproxy")
	if _, err := Undo(w.o); err == nil || !strings.Contains(err.Error(), "is a symbolic link: remove it") {
		t.Errorf("%v", err)
	}
	if w.read("precious/file") != "x" {
		t.Error("gone")
	}
}

// If ssh can't live with the outcome, or goes elsewhere, that is found.
func TestVerify(t *testing.T) {
	w := newWorld(t)
	w.o.Hosts = []string{"*.corp", "!example.corp"} // the first guess is none of them
	w.do(Make(t.Context(), w.o))
	if host, err := Verify(t.Context(), w.o); err != nil || host != "x.corp" {
		t.Errorf("%q, %v", host, err)
	}
	config := w.read(".ssh/config")
	w.write(".ssh/config", "ProxyCommand /bin/nc\n"+config, 0o600)
	if _, err := Verify(t.Context(), w.o); err == nil || errors.Is(err, ErrRejected) || !strings.Contains(err.Error(), `its ProxyCommand is "/bin/nc"`) {
		t.Errorf("%v", err)
	}
	w.write(".ssh/config", "ProxyCommand /elsewhere/muxproxy '%r@%h:%p'\n"+config, 0o600)
	if _, err := Verify(t.Context(), w.o); err == nil || !strings.Contains(err.Error(), "does not lead to "+w.o.Program) {
		t.Errorf("another muxproxy: %v", err)
	}
	if err := os.Chmod(w.o.included(), 0o602); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), w.o); !errors.Is(err, ErrRejected) || !strings.Contains(err.Error(), "Bad owner or permissions on") {
		t.Errorf("%v", err)
	}
}

func TestBack(t *testing.T) {
	for name, home := range homes {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			home(w)
			before := w.tree()
			p, err := Make(t.Context(), w.o)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Do(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := p.Back(); err != nil {
				t.Error(err)
			}
			if got := w.tree(); got != before {
				t.Errorf("%s\nwant:\n%s", got, before)
			}
		})
	}
}

// What somebody else has written meanwhile is not taken back.
func TestBackLeavesOthersEdits(t *testing.T) {
	w := newWorld(t)
	w.write(".ssh/config", "Host a\n", 0o600)
	p, err := Make(t.Context(), w.o)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Do(t.Context()); err != nil {
		t.Fatal(err)
	}
	edited := w.read(".ssh/config") + "Host b\n"
	w.write(".ssh/config", edited, 0o600)
	if err := p.Back(); !errors.Is(err, errMeanwhile) {
		t.Errorf("%v", err)
	}
	if got := w.read(".ssh/config"); got != edited {
		t.Errorf("%q, want %q", got, edited)
	}
}

// A file that setup has made and the user has put elsewhere since is emptied, and the link to it stays.
func TestUndoKeepsALaterLink(t *testing.T) {
	w := newWorld(t)
	w.setup()
	w.mkdir(w.path("dotfiles"))
	if err := os.Rename(w.path(".ssh/config"), w.path("dotfiles/config")); err != nil {
		t.Fatal(err)
	}
	w.link("../dotfiles/config", ".ssh/config")
	w.undo()
	if to, err := os.Readlink(w.path(".ssh/config")); err != nil || to != "../dotfiles/config" {
		t.Errorf("%q, %v", to, err)
	}
	if got := w.read("dotfiles/config"); got != "" {
		t.Errorf("%q", got)
	}
}

// Nor is a place for sockets emptied that others can write to: what is there may be anybody's.
func TestUntrustedSockets(t *testing.T) {
	w := newWorld(t)
	w.setup()
	if err := w.o.Dirs.Make(); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(w.o.Dirs.Runtime, "file")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(w.o.Dirs.Runtime, 0o770); err != nil {
		t.Fatal(err)
	}
	w.undo()
	if _, err := os.Lstat(precious); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(w.o.Dirs.State); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", w.o.Dirs.State, err)
	}
}

func TestSamples(t *testing.T) {
	for patterns, want := range map[string]string{
		"": "example.com", "*": "example", "*.corp": "example.corp", "!a a-? b": "a-x", "db": "db",
	} {
		if got := Samples(strings.Fields(patterns))[0]; got != want {
			t.Errorf("%q: %q, want %q", patterns, got, want)
		}
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(header + inMark + "\"/a\\nb\"\n" + madeOf + "\"/\"\nHost *\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		r := parseRecord(text)
		again := parseRecord([]byte(r.String()))
		if !slices.Equal(r.in, again.in) || !slices.Equal(r.made, again.made) {
			t.Fatalf("%q: %+v, then %+v", text, r, again)
		}
	})
}
