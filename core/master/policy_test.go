//go:build unix

package master

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muxproxy/muxproxy/core/use"
)

// fakeSSH puts an ssh on PATH that answers -G with host, and returns what counts its runs.
func fakeSSH(t *testing.T, host string) (runs func() int) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	script := fmt.Sprintf("#!/bin/sh\necho \"$*\" >>%s\necho hostname %s\necho user me\necho port 22\n", log, host)
	if err := os.WriteFile(filepath.Join(dir, "ssh"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() int {
		b, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return strings.Count(string(b), "\n")
	}
}

func TestAliasesAreAskedOnce(t *testing.T) {
	runs := fakeSSH(t, "DB.example.com")
	config := filepath.Join(t.TempDir(), "config")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("Host db\n")
	a := &aliases{config: config, say: func(err error) { t.Error(err) }}
	leads := func(alias, host string) bool {
		return a.leads(use.Target{User: "me", Host: host, Port: 22, Alias: alias})
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if !leads("db", "db.example.com") {
				t.Error("db does not lead to its host")
			}
		})
	}
	wg.Wait()
	if leads("db", "other.example.com") || runs() != 1 {
		t.Errorf("%d runs of ssh -G", runs())
	}
	// All but the first two lead there as far as ssh is concerned, and begin as their caller likes.
	for _, alias := range []string{"", "-oProxyCommand=x", "lab-x@db", "lab@x@db", "ssh://db", "ssh://lab-x@db:22/"} {
		if leads(alias, "db.example.com") {
			t.Errorf("%q counts", alias)
		}
	}
	write("Host db\n  Compression no\n") // another size
	if !leads("db", "db.example.com") || runs() != 2 {
		t.Errorf("%d runs after the file has changed", runs())
	}
	for i := range 2 * maxConfigs {
		a.mu.Lock()
		a.putLocked(use.Target{Alias: fmt.Sprint(i)}, &lead{})
		n := len(a.known)
		a.mu.Unlock()
		if n > maxConfigs {
			t.Fatalf("%d answers are kept", n)
		}
	}
}

// What depends on more than files is asked again after a while, and what can't be asked does not count, nor is it
// tried for each use.
func TestAliasesThatChange(t *testing.T) {
	runs := fakeSSH(t, "db")
	config := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(config, []byte("Match exec true\n  Compression no\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	said := 0
	a := &aliases{config: config, say: func(error) { said++ }}
	target := use.Target{User: "me", Host: "db", Port: 22, Alias: "db"}
	for range 3 {
		if !a.leads(target) {
			t.Fatal("it does not lead there")
		}
	}
	if runs() != 1 {
		t.Errorf("%d runs", runs())
	}
	a.known[use.Target{User: "me", Port: 22, Alias: "db"}].at = time.Now().Add(-volatileTime)
	if !a.leads(target) || runs() != 2 {
		t.Errorf("%d runs, later", runs())
	}
	t.Setenv("PATH", t.TempDir())
	target.Alias = "gone"
	for range 3 {
		if a.leads(target) {
			t.Error("an alias counts that nobody has checked")
		}
	}
	if said != 1 {
		t.Errorf("said %d times", said)
	}
}

// A change is noticed however it is made, wherever the file is.
func TestFileWatch(t *testing.T) {
	for name, change := range map[string]func(dir string) error{
		"written": func(dir string) error { return os.WriteFile(filepath.Join(dir, "etc/config.hcl"), []byte("x"), 0o600) },
		"removed": func(dir string) error { return os.Remove(filepath.Join(dir, "etc/config.hcl")) },
		"the target": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "dotfiles/mux.hcl"), []byte("x"), 0o600)
		},
		"renamed": func(dir string) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, "new"), nil, 0o600),
				os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "etc/config.hcl")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "etc/config.hcl")
			for _, d := range []string{"etc", "dotfiles"} {
				if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			err := os.WriteFile(filepath.Join(dir, "dotfiles/mux.hcl"), nil, 0o600)
			if err = errors.Join(err, os.Symlink("../dotfiles/mux.hcl", path)); err != nil {
				t.Fatal(err)
			}
			noticed(t, path, func() error { return change(dir) })
		})
	}
	t.Run("its directory comes", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "a/b/config.hcl")
		w := noticed(t, path, func() error { return os.MkdirAll(filepath.Dir(path), 0o700) })
		if err := w.follow(); err != nil {
			t.Fatal(err)
		}
		before := stampOf(path)
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		event(t, w)
		if stampOf(path) == before {
			t.Error("the stamp is the same")
		}
	})
}

func noticed(t *testing.T, path string, change func() error) *fileWatch {
	t.Helper()
	w := &fileWatch{path: path}
	t.Cleanup(w.close)
	if err := w.follow(); err != nil {
		t.Fatal(err)
	}
	if err := change(); err != nil {
		t.Fatal(err)
	}
	event(t, w)
	return w
}

func event(t *testing.T, w *fileWatch) {
	t.Helper()
	select {
	case <-w.events():
	case err := <-w.errors():
		t.Fatal(err)
	case <-time.After(patience):
		t.Fatal("nothing was noticed")
	}
}
