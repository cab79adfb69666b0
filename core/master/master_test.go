package master

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/use"
)

// The test binary plays the built-in plugin.
func TestMain(m *testing.M) {
	if os.Getenv(plugin.CookieKey) != "" {
		if len(os.Args) == 3 && os.Args[1] == "plugin" && os.Args[2] == "small" {
			plugin.Serve(small{})
		}
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/muxproxy/muxproxy/core/plugin/pluginrun.init.func1.1"))
}

const patience = 20 * time.Second

func within(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s: not within %v", what, patience)
	}
}

func newDirs(t *testing.T) paths.Dirs {
	t.Helper()
	env := map[string]string{"HOME": t.TempDir(), "XDG_RUNTIME_DIR": t.TempDir()}
	if err := os.Chmod(env["XDG_RUNTIME_DIR"], 0o700); err != nil {
		t.Fatal(err)
	}
	dirs, err := paths.Find(func(k string) string { return env[k] })
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

// start runs a master; stop ends it and waits.
func start(t *testing.T, dirs paths.Dirs) (ready, ended chan struct{}, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		if err := Run(ctx, Options{Dirs: dirs, Log: zerolog.Nop(), Getenv: os.Getenv, Ready: func() { close(ready) }}); err != nil {
			t.Error(err)
		}
	}()
	stop = func() {
		cancel()
		within(t, "the master ends", ended)
	}
	t.Cleanup(stop)
	return ready, ended, stop
}

func canDial(dirs paths.Dirs, name string) bool {
	c, err := paths.Dial(dirs.Runtime, name)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

func TestAMasterLeavesNothingButItsLogs(t *testing.T) {
	dirs := newDirs(t)
	ready, _, stop := start(t, dirs)
	within(t, "ready", ready)
	known := filepath.Join(dirs.State, paths.KnownHosts)
	if b, err := os.ReadFile(known); err != nil || strings.Count(string(b), "@cert-authority * ecdsa") != 1 {
		t.Errorf("known_hosts %q, %v", b, err)
	}
	if fi, err := os.Stat(known); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	for _, name := range []string{paths.MuxSocket, paths.ControlSocket} {
		if !canDial(dirs, name) {
			t.Errorf("%s: nobody listens", name)
		}
	}
	stop()
	if b, err := os.ReadFile(known); err != nil || len(b) > 0 {
		t.Errorf("known_hosts afterwards %q, %v", b, err)
	}
	left, err := os.ReadDir(dirs.Runtime)
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if at, err := dirs.Published(); err == nil {
		t.Errorf("still published at %s", at)
	}
}

// Somebody may take away the state directory as a whole, too.
func TestAVanishedSocketIsMadeAgain(t *testing.T) {
	for name, gone := range map[string]func(paths.Dirs) []string{
		"sockets":    func(d paths.Dirs) []string { return []string{d.Runtime} },
		"everything": func(d paths.Dirs) []string { return []string{d.State, d.Runtime} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dirs := newDirs(t)
			ready, _, _ := start(t, dirs)
			within(t, "ready", ready)
			for _, dir := range gone(dirs) {
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
			}
			for _, name := range []string{paths.MuxSocket, paths.ControlSocket} {
				eventually(t, name+" is there again", func() bool { return canDial(dirs, name) })
			}
			b, err := os.ReadFile(filepath.Join(dirs.State, paths.KnownHosts))
			if err != nil || strings.Count(string(b), "@cert-authority * ecdsa") != 1 {
				t.Errorf("known_hosts %q, %v", b, err)
			}
		})
	}
}

// logind takes /run/user/UID away after the last logout; only root could make it again.
func TestAVanishedRuntimeDirectoryMovesTheSockets(t *testing.T) {
	dirs := newDirs(t)
	ready, _, stop := start(t, dirs)
	within(t, "ready", ready)
	parent := filepath.Dir(dirs.Runtime)
	eventually(t, "a file is in the way, for root too", func() bool { // the master may make the directory again meanwhile
		return os.RemoveAll(parent) == nil && os.WriteFile(parent, nil, 0o600) == nil
	})
	moved := dirs
	moved.Runtime = dirs.Run
	for _, name := range []string{paths.MuxSocket, paths.ControlSocket} {
		eventually(t, name+" is elsewhere", func() bool { return canDial(moved, name) })
	}
	eventually(t, "they are published", func() bool { // once they listen
		at, err := dirs.Published()
		return err == nil && at == dirs.Run
	})
	stop()
	if _, err := dirs.Published(); err == nil {
		t.Error("still published")
	}
}

// The second of two masters stands back while the first can be reached, and takes over when that has ended.
func TestOneMaster(t *testing.T) {
	dirs := newDirs(t)
	ready, _, stop := start(t, dirs)
	within(t, "ready", ready)
	ready2, ended2, _ := start(t, dirs)
	within(t, "the second says ready", ready2)
	within(t, "the second ends", ended2)
	stop()
	ready3, _, _ := start(t, dirs)
	within(t, "the third is ready", ready3)
	if !canDial(dirs, paths.MuxSocket) {
		t.Error("nobody listens")
	}
}

func TestAMasterThatIsEndingIsWaitedFor(t *testing.T) {
	dirs := newDirs(t)
	if err := dirs.Make(); err != nil {
		t.Fatal(err)
	}
	ending, err := paths.TryLock(filepath.Join(dirs.Run, paths.MasterLock))
	if err != nil {
		t.Fatal(err)
	}
	ready, _, _ := start(t, dirs)
	select {
	case <-ready:
		t.Fatal("ready beside another master")
	case <-time.After(200 * time.Millisecond):
	}
	ending.Close()
	within(t, "ready", ready)
}

func TestKnownHostsKeepsTheLivingAndDropsTheDead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "known_hosts")
	before := "@cert-authority * ssh-ed25519 AAAA elsewhere+1\n" + // another host's master: nobody can tell from here
		"@cert-authority * ssh-ed25519 BBBB here+999999999\n" + // dead: above any pid_max
		"@cert-authority * ssh-ed25519 CCCC here+1\n" +
		"some.host ssh-ed25519 DDDD a line of the user's\n"
	if err := os.WriteFile(path, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	k := knownHosts{path: path, host: "here", pid: os.Getpid()}
	if err := k.add("ecdsa-sha2-nistp256 EEEE"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]bool{"AAAA": true, "BBBB": false, "CCCC": true, "DDDD": true, "EEEE " + k.mark(): true} {
		if strings.Contains(string(b), key) != want {
			t.Errorf("%s there: %v, want %v\n%s", key, !want, want, b)
		}
	}
	if err := k.remove(); err != nil {
		t.Fatal(err)
	}
	if b, err = os.ReadFile(path); err != nil || strings.Contains(string(b), "EEEE") || !strings.Contains(string(b), "CCCC") {
		t.Errorf("afterwards %q, %v", b, err)
	}
}

func TestDetailHidesCommands(t *testing.T) {
	for _, x := range []struct {
		u    use.Use
		want string
	}{
		{use.Use{Kind: use.Exec, Command: "mysql --password=secret"}, "mysql"},
		{use.Use{Kind: use.Exec, Command: "PASS=secret mysql; x"}, ""},
		{use.Use{Kind: use.Subsystem, Subsystem: "sftp\x1b[2J"}, `sftp\x1b[2J`},
		{use.Use{Kind: use.LocalForward, Addr: "db:5432"}, "db:5432"},
		{use.Use{Kind: use.Other, Name: "x@example.com"}, "x@example.com"},
		{use.Use{Kind: use.Shell}, ""},
	} {
		if got := detail(x.u); got != x.want {
			t.Errorf("%+v: %q, want %q", x.u, got, x.want)
		}
	}
}
