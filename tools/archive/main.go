// Command archive packs the files of a directory: archive DIR NAME.tar.gz, or NAME.zip. The same files give the same
// bytes: names are sorted, times are $SOURCE_DATE_EPOCH, files are root's, with mode 0755 if they are executable and 0644 if not.
package main

import (
	"archive/tar"
	"archive/zip"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("archive: ")
	if len(os.Args) != 3 {
		log.Fatal("usage: archive DIR NAME.tar.gz|NAME.zip")
	}
	// https://reproducible-builds.org/specs/source-date-epoch/
	epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		log.Fatalf("SOURCE_DATE_EPOCH: %v", err)
	}
	if err := pack(os.Args[1], os.Args[2], time.Unix(epoch, 0).UTC()); err != nil {
		log.Fatal(err)
	}
}

// entry writes one file or directory; name ends in / for a directory, and body is nil then.
type entry func(name string, mode fs.FileMode, size int64, body io.Reader) error

func pack(dir, name string, at time.Time) (err error) {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(name)
		}
	}()
	if strings.HasSuffix(name, ".zip") {
		z := zip.NewWriter(f)
		err := walk(dir, func(name string, mode fs.FileMode, _ int64, body io.Reader) error {
			h := &zip.FileHeader{Name: name, Method: zip.Deflate, Modified: at}
			h.SetMode(mode)
			w, err := z.CreateHeader(h)
			if err == nil && body != nil {
				_, err = io.Copy(w, body)
			}
			return err
		})
		return errors.Join(err, z.Close())
	}
	g := gzip.NewWriter(f)
	t := tar.NewWriter(g)
	err = walk(dir, func(name string, mode fs.FileMode, size int64, body io.Reader) error {
		h := &tar.Header{Name: name, Mode: int64(mode.Perm()), Size: size, ModTime: at, Typeflag: tar.TypeReg,
			Uname: "root", Gname: "root", Format: tar.FormatUSTAR}
		if body == nil {
			h.Typeflag = tar.TypeDir
		}
		if err := t.WriteHeader(h); err != nil || body == nil {
			return err
		}
		_, err := io.Copy(t, body)
		return err
	})
	return errors.Join(err, t.Close(), g.Close())
}

// walk hands over what is in dir, under dir's own name; filepath.WalkDir goes in the order of names.
func walk(dir string, add entry) error {
	return filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(filepath.Dir(dir), file)
		if err != nil {
			return err
		}
		name := filepath.ToSlash(rel)
		info, err := d.Info()
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return add(path.Clean(name)+"/", fs.ModeDir|0o755, 0, nil)
		case !info.Mode().IsRegular():
			return fmt.Errorf("%s: neither a file nor a directory", file)
		}
		mode := fs.FileMode(0o644)
		if info.Mode()&0o111 != 0 {
			mode = 0o755
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		return add(name, mode, info.Size(), f)
	})
}
