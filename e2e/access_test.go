//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sockets of a living master, wherever it put them.
func (w *world) sockets() []string {
	w.t.Helper()
	dir := w.mustStatus().Sockets
	entries, err := os.ReadDir(dir)
	if err != nil {
		w.t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		if e.Type() == os.ModeSocket {
			all = append(all, filepath.Join(dir, e.Name()))
		}
	}
	for _, name := range []string{"muxproxy.sock", "control.sock"} {
		if !exists(filepath.Join(dir, name)) {
			w.t.Fatalf("%s has no %s, only %q", dir, name, all)
		}
	}
	return all
}

func TestPlacesAreThisUsersAlone(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		p := w.hold()
		dirs := []string{w.mustStatus().Sockets, w.path("state/muxproxy")}
		for _, d := range dirs {
			fi, err := os.Stat(d)
			if err != nil || fi.Mode().Perm() != 0o700 {
				t.Errorf("%s: %v, %v", d, fi.Mode(), err)
			}
		}
		for _, s := range w.sockets() {
			if fi, err := os.Stat(s); err != nil || fi.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s: %v, %v", s, fi.Mode(), err)
			}
		}
		for _, name := range []string{"master.log"} {
			if fi, err := os.Stat(w.path("state/muxproxy/" + name)); err != nil || fi.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s: %v, %v", name, fi, err)
			}
		}
		p.release()
	})
}

// Another user gets nothing, neither by the file modes nor, where somebody has opened those, by the peer's uid.
func TestAnotherUserGetsNothing(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	if os.Geteuid() != 0 {
		t.Log("only root can become another user; TestPlacesAreThisUsersAlone looked at the modes")
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		p := w.hold()
		// The test's own binary is where only this user can reach it.
		self, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		if err := writeProgram(w.path("helper"), self); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(w.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		sockets := w.sockets()
		asNobody := func() map[string]string {
			cmd := exec.Command(w.path("helper"), sockets...)
			cmd.Env = []string{"E2E_HELPER=knock"}
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, NoSetGroups: false}}
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("the helper: %v", err)
			}
			said := map[string]string{}
			for line := range strings.Lines(string(out)) {
				path, what, _ := strings.Cut(strings.TrimSpace(line), ": ")
				said[path] = what
			}
			return said
		}
		for path, what := range asNobody() {
			if what != "no permission" {
				t.Errorf("%s for another user: %s", path, what)
			}
		}
		for dir := filepath.Dir(sockets[0]); dir != w.dir; dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range sockets {
			if err := os.Chmod(s, 0o666); err != nil {
				t.Fatal(err)
			}
		}
		said := asNobody()
		for _, path := range sockets {
			if said[path] != "closed" {
				t.Errorf("%s for another user, with open modes: %q", path, said[path])
			}
		}
		for dir := filepath.Dir(sockets[0]); dir != w.dir; dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		p.echo("still here")
		p.release()
	})
}

// knock connects to each socket, says something and prints what comes of it.
func knock(paths []string) int {
	for _, path := range paths {
		fmt.Printf("%s: %s\n", path, knockAt(path))
	}
	return 0
}

func knockAt(path string) string {
	c, err := net.Dial("unix", path)
	switch {
	case errors.Is(err, os.ErrPermission):
		return "no permission"
	case err != nil:
		return err.Error()
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	said := hello(1, "copy")
	if strings.HasSuffix(path, "/control.sock") {
		said = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	}
	io.WriteString(c, said) // it may have been closed before
	b := make([]byte, 1024)
	n, err := c.Read(b)
	switch {
	case n > 0:
		return fmt.Sprintf("answered %q", b[:n])
	case os.IsTimeout(err):
		return "left open"
	}
	return "closed"
}

// Sockets are not put into a runtime directory that others can look into.
func TestALooseRuntimeDirectoryIsNotUsed(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	if real := fmt.Sprintf("/run/user/%d", os.Getuid()); exists(real) {
		t.Logf("%s exists: the sockets would go there, which is the developer's own place", real)
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		loose := w.path("run/muxproxy")
		if err := os.Mkdir(loose, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(loose, 0o755); err != nil { // whatever the umask
			t.Fatal(err)
		}
		p := w.hold()
		if s := w.mustStatus(); strings.HasPrefix(s.Sockets, w.path("run")) {
			t.Errorf("the sockets are in %s", s.Sockets)
		}
		if entries, err := os.ReadDir(loose); err != nil || len(entries) > 0 {
			t.Errorf("%s has %v (%v)", loose, entries, err)
		}
		p.release()
	})
}
