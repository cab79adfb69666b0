//go:build unix

package paths

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestReadTrusted(t *testing.T) {
	dir := home(t)
	in := func(parts ...string) string { return filepath.Join(append([]string{dir}, parts...)...) }
	make := func(path string, mode os.FileMode) string {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("text"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := func(to, path string) string {
		t.Helper()
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := in("fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	good := make(in("good"), 0o644)
	groupDir, openDir, stickyDir := make(in("group", "f"), 0o600), make(in("open", "f"), 0o600), make(in("sticky", "f"), 0o600)
	for path, mode := range map[string]os.FileMode{groupDir: 0o770, openDir: 0o777, stickyDir: 0o777 | os.ModeSticky} {
		if err := os.Chmod(filepath.Dir(path), mode); err != nil {
			t.Fatal(err)
		}
	}
	cases := map[string]string{ // part of the error; "": none
		good:                              "",
		make(in("private"), 0o400):        "",
		make(in("group writes"), 0o620):   "chmod go-w",
		make(in("others write"), 0o602):   "chmod go-w",
		groupDir:                          "",
		stickyDir:                         "",
		openDir:                           "writable by everybody",
		link(good, in("link")):            "",
		link(openDir, in("link to open")): "writable by everybody",
		link(good, in("open", "link")):    "writable by everybody",
		fifo:                              "not a regular file",
		dir:                               "not a regular file",
		"relative":                        "not an absolute path",
	}
	if os.Geteuid() == 0 { // nobody else can give files away
		foreignFile, foreignLink := make(in("foreign"), 0o600), link(good, in("foreign link"))
		for _, path := range []string{foreignFile, foreignLink} {
			if err := os.Lchown(path, otherUID, otherUID); err != nil {
				t.Fatal(err)
			}
			cases[path] = "belongs to uid 54321"
		}
		cases[make(filepath.Join(foreign(t), "f"), 0o600)] = "belongs to uid 54321"
	}
	for path, want := range cases {
		text, err := ReadTrusted(path, 4)
		if want == "" && (err != nil || string(text) != "text") || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %q, %v, want %q", path, text, err, want)
		}
	}
	if _, err := ReadTrusted(good, 3); err == nil || !strings.Contains(err.Error(), "longer than 3 bytes") {
		t.Error(err)
	}
	if _, err := ReadTrusted(in("none"), 4); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
