//go:build unix

package paths

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

// otherUID is nobody's here.
const otherUID = 54321

// home makes a home directory of this user.
func home(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// foreign is a directory of another user.
func foreign(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		return "/" // root's
	}
	dir := filepath.Join(t.TempDir(), "foreign")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, otherUID, otherUID); err != nil {
		t.Fatal(err)
	}
	return dir
}

func env(pairs ...string) func(string) string {
	m := make(map[string]string)
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return func(name string) string { return m[name] }
}

// withRunUser makes Find look for runtime directories elsewhere.
func withRunUser(t *testing.T, dir string) {
	t.Helper()
	old := runUser
	runUser = dir
	t.Cleanup(func() { runUser = old })
}

func TestFind(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	withRunUser(t, t.TempDir())
	h, xdg, runtime := home(t), t.TempDir(), home(t)
	def := Dirs{
		State:  h + "/.local/state/muxproxy",
		Config: h + "/.config/muxproxy",
		Data:   h + "/.local/share/muxproxy",
		Run:    h + "/.local/state/muxproxy/run-" + fileName(host),
	}
	def.Runtime = def.Run
	with := func(f func(*Dirs)) Dirs {
		d := def
		f(&d)
		return d
	}
	closed := filepath.Join(home(t), "runtime")
	if err := os.MkdirAll(filepath.Join(closed, "muxproxy"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(closed, "muxproxy"), 0o750); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		env  func(string) string
		want Dirs
	}{
		{"home alone", env("HOME", h), def},
		{"relative XDG variables are ignored", env("HOME", h, "XDG_STATE_HOME", "a", "XDG_CONFIG_HOME", "./b",
			"XDG_DATA_HOME", "../c", "XDG_RUNTIME_DIR", "d"), def},
		{"runtime", env("HOME", h, "XDG_RUNTIME_DIR", runtime), with(func(d *Dirs) { d.Runtime = runtime + "/muxproxy" })},
		{"runtime of somebody else", env("HOME", h, "XDG_RUNTIME_DIR", foreign(t)), def},
		{"runtime that is missing", env("HOME", h, "XDG_RUNTIME_DIR", h+"/none"), def},
		{"runtime with a folder open to others", env("HOME", h, "XDG_RUNTIME_DIR", closed), def},
		{"XDG variables without HOME", env("XDG_STATE_HOME", xdg, "XDG_CONFIG_HOME", xdg+"/c", "XDG_DATA_HOME", xdg+"/d"),
			Dirs{State: xdg + "/muxproxy", Config: xdg + "/c/muxproxy", Data: xdg + "/d/muxproxy",
				Run: xdg + "/muxproxy/run-" + fileName(host), Runtime: xdg + "/muxproxy/run-" + fileName(host)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := Find(tc.env)
			if err != nil {
				t.Fatal(err)
			}
			if got != tc.want {
				t.Errorf("got  %+v\nwant %+v", got, tc.want)
			}
			if entries, err := os.ReadDir(h); err != nil || len(entries) > 0 {
				t.Errorf("Find created something: %v %v", entries, err)
			}
		})
	}

	t.Run("logind's directory", func(t *testing.T) {
		mine := filepath.Join(runUser, strconv.Itoa(os.Geteuid()))
		if err := os.Mkdir(mine, 0o700); err != nil {
			t.Fatal(err)
		}
		d, err := Find(env("HOME", h))
		if err != nil || d.Runtime != filepath.Join(mine, "muxproxy") {
			t.Errorf("got %q, %v", d.Runtime, err)
		}
	})
}

func TestFindRefuses(t *testing.T) {
	for _, tc := range []struct {
		name    string
		env     func(string) string
		foreign bool
		text    string
	}{
		{"nothing", env(), false, "HOME is not set"},
		{"relative", env("HOME", "home/me"), false, "not an absolute path"},
		{"half of XDG", env("XDG_CONFIG_HOME", "/c", "XDG_DATA_HOME", "/d"), false, "XDG_STATE_HOME"},
		{"foreign", env("HOME", foreign(t)), true, "belongs to another user"},
		{"foreign, with XDG", env("HOME", foreign(t), "XDG_STATE_HOME", t.TempDir()), true, "belongs to another user"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Find(tc.env)
			if err == nil || !strings.Contains(err.Error(), tc.text) || errors.Is(err, ErrForeignHome) != tc.foreign {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestFileName(t *testing.T) {
	for in, want := range map[string]string{"a.example": "a.example", "": "localhost", "a/../b c\n": "a_.._b_c_"} {
		if got := fileName(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestCheckDir(t *testing.T) {
	base := home(t)
	make := func(name string, mode os.FileMode) string {
		dir := filepath.Join(base, name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	good := make("good", 0o700)
	if err := os.Symlink(good, filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(base, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open := make("open", 0o777)
	if err := os.Mkdir(filepath.Join(open, "in"), 0o700); err != nil {
		t.Fatal(err)
	}
	sticky := make("sticky", os.ModeSticky|0o777)
	if err := os.Mkdir(filepath.Join(sticky, "in"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ dir, want string }{
		{good, ""},
		{good + "/", ""},
		{filepath.Join(sticky, "in"), ""},
		{"good", "not an absolute path"},
		{"", "not an absolute path"},
		{filepath.Join(base, "none"), "no such file"},
		{filepath.Join(base, "link"), "symbolic link"},
		{filepath.Join(base, "link") + "/", "symbolic link"},
		{filepath.Join(base, "file"), "not a directory"},
		{make("group", 0o750), "chmod 700"},
		{make("others", 0o701), "chmod 700"},
		{filepath.Join(open, "in"), "writable by everybody"},
		{foreign(t), "belongs to uid"},
	} {
		err := CheckDir(tc.dir)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: got %v, want %q", tc.dir, err, tc.want)
		}
	}
	if err := CheckDir(filepath.Join(base, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

func TestMake(t *testing.T) {
	h := home(t)
	withRunUser(t, t.TempDir())
	d, err := Find(env("HOME", h, "XDG_RUNTIME_DIR", home(t)))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.Make(); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{d.State, d.Run, d.Runtime} {
		if err := CheckDir(dir); err != nil {
			t.Error(err)
		}
	}
	if err := os.Chmod(d.State, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := d.Make(); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a state directory open to others: %v", err)
	}
}

// Root could create directories in everybody's home.
func TestMakeNotInForeignPlaces(t *testing.T) {
	dir := foreign(t)
	if os.Geteuid() != 0 {
		dir = "/proc/1" // root's; nobody can create anything there
	}
	if err := makeDir(filepath.Join(dir, "a", "b")); err == nil {
		t.Error("made")
	}
	if _, err := os.Stat(filepath.Join(dir, "a")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is there: %v", err)
	}
}

func TestTrusted(t *testing.T) {
	if !Trusted(0) || !Trusted(os.Geteuid()) || Trusted(otherUID) || Trusted(-1) {
		t.Error("wrong uids are trusted")
	}
}

func TestPublish(t *testing.T) {
	d := Dirs{Run: home(t)}
	if _, err := d.Published(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("before: %v", err)
	}
	if err := d.Unpublish("/a"); err != nil {
		t.Error(err)
	}
	if err := d.Publish("relative"); err == nil {
		t.Error("a relative path was published")
	}
	// What a killed master left.
	if err := os.Symlink("/x", filepath.Join(d.Run, socketsLink+".new")); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/a", "/b"} {
		if err := d.Publish(dir); err != nil {
			t.Fatal(err)
		}
		if got, err := d.Published(); got != dir || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
	}
	if err := d.Unpublish("/a"); err != nil {
		t.Error(err)
	}
	if got, err := d.Published(); got != "/b" || err != nil {
		t.Errorf("another master's link is gone: %q, %v", got, err)
	}
	if err := d.Unpublish("/b"); err != nil {
		t.Error(err)
	}
	if _, err := d.Published(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after: %v", err)
	}
	if err := os.Symlink("relative", filepath.Join(d.Run, socketsLink)); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Published(); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("a relative link: %v", err)
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(home(t), StartLock)
	l, err := TryLock(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := TryLock(path); !errors.Is(err, ErrLocked) {
		t.Errorf("second holder: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Lock(ctx, path); !errors.Is(err, ErrLocked) || !errors.Is(err, context.Canceled) {
		t.Errorf("second holder, waiting: %v", err)
	}
	got := make(chan error)
	go func() {
		l, err := Lock(context.Background(), path)
		if err == nil {
			err = l.Close()
		}
		got <- err
	}()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
	if _, err := TryLock(filepath.Join(path, "below a file")); err == nil || errors.Is(err, ErrLocked) {
		t.Errorf("impossible path: %v", err)
	}
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := TryLock(link); err == nil {
		t.Error("a symbolic link was followed")
	}
}

// dirs for sockets: one with a short path, one where sockaddr_un has no room.
func socketDirs(t *testing.T) map[string]string {
	t.Helper()
	base, err := os.MkdirTemp("", "mux") // t.TempDir may be too long itself
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	dirs := map[string]string{"short": base}
	if longPaths {
		long := filepath.Join(base, strings.Repeat("d", 100), strings.Repeat("e", 100))
		if err := os.MkdirAll(long, 0o700); err != nil {
			t.Fatal(err)
		}
		dirs["long"] = long
	}
	return dirs
}

func TestSockets(t *testing.T) {
	for name, dir := range socketDirs(t) {
		t.Run(name, func(t *testing.T) {
			if _, err := Dial(dir, MuxSocket); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("dial with no socket: %v", err)
			}
			l, err := Listen(dir, MuxSocket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if fi, err := os.Stat(l.Path()); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("mode: %v, %v", fi, err)
			}
			if _, err := Listen(dir, MuxSocket); !errors.Is(err, ErrInUse) {
				t.Errorf("second listener: %v", err)
			}
			(<-accept(l)).Close() // the probe of the second listener
			got := accept(l)
			c, err := Dial(dir, MuxSocket)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			s := <-got
			defer s.Close()
			for _, conn := range []*net.UnixConn{c, s} {
				if uid, pid, err := PeerCred(conn); uid != os.Geteuid() || pid != os.Getpid() || err != nil {
					t.Errorf("peer: uid %d, pid %d, %v", uid, pid, err)
				}
			}
			if !l.Present() {
				t.Error("not present")
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			if l.Present() {
				t.Error("still there")
			}
			if _, err := s.Write([]byte("x")); err != nil {
				t.Errorf("a connection ended with its listener: %v", err)
			}
			if b, err := io.ReadAll(io.LimitReader(c, 1)); string(b) != "x" || err != nil {
				t.Errorf("read %q, %v", b, err)
			}
		})
	}
}

// accept takes one connection, or closes the channel.
func accept(l *Listener) <-chan *net.UnixConn {
	got := make(chan *net.UnixConn, 1)
	go func() {
		defer close(got)
		if c, err := l.AcceptUnix(); err == nil {
			got <- c
		}
	}()
	return got
}

func TestListenReplacesStale(t *testing.T) {
	for name, dir := range socketDirs(t) {
		t.Run(name, func(t *testing.T) {
			dead, err := Listen(dir, MuxSocket)
			if err != nil {
				t.Fatal(err)
			}
			dead.UnixListener.Close() // as a killed master would: the name stays
			l, err := Listen(dir, MuxSocket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if err := os.Remove(l.Path()); err != nil {
				t.Fatal(err)
			}
			if l.Present() {
				t.Error("present without a name")
			}
			next, err := Listen(dir, MuxSocket)
			if err != nil {
				t.Fatal(err)
			}
			defer next.Close()
			if l.Present() {
				t.Error("takes another's name for its own")
			}
			for range 2 {
				l.Close()
			}
			if !next.Present() {
				t.Error("has removed another's name")
			}
		})
	}
	dir := home(t)
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(dir, "file"); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("in the place of a file: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "file")); string(b) != "kept" || err != nil {
		t.Errorf("the file: %q, %v", b, err)
	}
}

func TestNotifySocket(t *testing.T) {
	for name, dir := range socketDirs(t) {
		t.Run(name, func(t *testing.T) {
			// What a killed process with the same pid left.
			if err := os.WriteFile(filepath.Join(dir, "notify.1"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			c, addr, remove, err := NotifySocket(dir, "notify.1")
			if err != nil {
				t.Fatal(err)
			}
			defer remove()
			s, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: addr, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if _, err := s.Write([]byte("READY=1")); err != nil {
				t.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(10 * time.Second))
			buf := make([]byte, 100)
			if n, err := c.Read(buf); string(buf[:n]) != "READY=1" || err != nil {
				t.Errorf("read %q, %v", buf[:n], err)
			}
			remove()
			if _, err := os.Lstat(filepath.Join(dir, "notify.1")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("not removed: %v", err)
			}
		})
	}
}

func TestAlive(t *testing.T) {
	if !Alive(os.Getpid()) {
		t.Error("this process is not alive")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^$")
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0") // the race detector would wait for a second
	in, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		t.Fatal(err)
	}
	for runtime.GOOS == "linux" && Alive(cmd.Process.Pid) { // ends though nobody has waited for the process yet
		runtime.Gosched()
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if Alive(cmd.Process.Pid) || Alive(0) {
		t.Error("a process that has ended is alive")
	}
}
