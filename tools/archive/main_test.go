package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The same files in another order, with other times and modes, give the same archive.
func TestPack(t *testing.T) {
	at := time.Unix(1700000000, 0).UTC()
	make := func(umask os.FileMode, names ...string) string {
		dir := filepath.Join(t.TempDir(), "top")
		for _, name := range names {
			path := filepath.Join(dir, name)
			mode := 0o666 &^ umask
			if strings.HasPrefix(name, "bin/") {
				mode = 0o777 &^ umask
			}
			if err := os.MkdirAll(filepath.Dir(path), 0o777&^umask); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(name), mode); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	a, b := make(0o022, "bin/x", "README", "doc/a"), make(0o077, "doc/a", "README", "bin/x")
	want := "top/ 755, top/README 644 README, top/bin/ 755, top/bin/x 755 bin/x, top/doc/ 755, top/doc/a 644 doc/a"
	for _, kind := range []string{".tar.gz", ".zip"} {
		var archives [][]byte
		for _, dir := range []string{a, b} {
			name := filepath.Join(t.TempDir(), "x"+kind)
			if err := pack(dir, name, at); err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			archives = append(archives, data)
		}
		if !bytes.Equal(archives[0], archives[1]) {
			t.Errorf("%s: not the same", kind)
		}
		if got := contents(t, kind, archives[0], at); got != want {
			t.Errorf("%s holds\n%s\nwant\n%s", kind, got, want)
		}
	}
	if err := os.Symlink("README", filepath.Join(a, "link")); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "x.zip")
	if err := pack(a, name, at); err == nil {
		t.Error("a link is packed")
	} else if _, err := os.Stat(name); err == nil {
		t.Error("a broken archive is left")
	}
}

func contents(t *testing.T, kind string, data []byte, at time.Time) string {
	t.Helper()
	var list []string
	add := func(name string, mode os.FileMode, modified time.Time, r io.Reader) {
		body, err := io.ReadAll(r)
		if err != nil || !modified.Equal(at) {
			t.Errorf("%s: %v, %v", name, err, modified)
		}
		list = append(list, strings.TrimSpace(fmt.Sprintf("%s %o %s", name, mode.Perm(), body)))
	}
	if kind == ".zip" {
		z, err := zip.NewReader(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range z.File {
			r, err := f.Open()
			if err != nil {
				t.Fatal(err)
			}
			add(f.Name, f.Mode(), f.Modified, r)
		}
		return strings.Join(list, ", ")
	}
	g, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(g)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return strings.Join(list, ", ")
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 {
			t.Errorf("%s belongs to %d:%d", h.Name, h.Uid, h.Gid)
		}
		add(h.Name, h.FileInfo().Mode(), h.ModTime, r)
	}
}
