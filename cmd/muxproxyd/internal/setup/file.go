package setup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// maxFile is more than any ssh_config has.
const maxFile = 4 << 20

// file is one that may be changed, as it is.
type file struct {
	path   string // as it is named
	real   string // where symbolic links lead: what is written
	exists bool
	before []byte
	info   fs.FileInfo // whose owner and mode it shall have; nil: it is new
}

// String names the file, and what is behind a link.
func (f *file) String() string {
	if f.exists && f.real != f.path {
		return f.path + " (" + f.real + ")"
	}
	return f.path
}

// read looks at a file, which may be absent.
func read(path string) (*file, error) {
	f := &file{path: path}
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		if to, err := os.Readlink(path); err == nil {
			return nil, fmt.Errorf("%s is a symbolic link to %s, which does not exist: make that, or remove the link", path, to)
		}
		f.real = path
		if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
			f.real = filepath.Join(dir, filepath.Base(path))
		}
		return f, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	f.real, f.exists = real, true
	if f.info, err = os.Stat(real); err != nil {
		return nil, err
	}
	switch {
	case !f.info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", f)
	case f.info.Size() > maxFile:
		return nil, fmt.Errorf("%s is larger than %d MiB", f, maxFile>>20)
	}
	f.before, err = os.ReadFile(real)
	return f, err
}

// writable says why another text can't take the place of this one, with the same owner and mode.
func (f *file) writable() error {
	if !f.exists {
		return writableDir(existing(filepath.Dir(f.real)))
	}
	uid, links := ownerLinks(f.info)
	switch {
	case uid != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, this is uid %d", f, uid, os.Geteuid())
	case f.info.Mode().Perm()&0o200 == 0:
		return fmt.Errorf("%s is read-only (mode %04o): chmod u+w %s", f, f.info.Mode().Perm(), f.real)
	case links > 1:
		return fmt.Errorf("%s has %d names (hard links), of which only one would see the change", f, links)
	}
	return writableDir(filepath.Dir(f.real))
}

func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func writableDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	uid, _ := ownerLinks(info)
	switch {
	case !info.IsDir():
		return fmt.Errorf("%s is not a directory", dir)
	case uid != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, this is uid %d", dir, uid, os.Geteuid())
	}
	if err := access(dir); err != nil {
		return fmt.Errorf("nothing can be written in %s: %w", dir, err)
	}
	return nil
}

var errMeanwhile = errors.New("has changed meanwhile and was left as it is; run this again")

// replace puts another text in the place of the file, in one step, with the same owner and mode; a new file is for its owner
// alone. A symbolic link stays. If the file is no longer what read has seen, nothing changes.
func (f *file) replace(text []byte) error {
	if err := f.same(); err != nil {
		return err
	}
	dir := filepath.Dir(f.real)
	temp, err := os.CreateTemp(dir, ".muxproxy-*")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // gone after the rename
	_, err = temp.Write(text)
	if err == nil && f.info != nil {
		err = temp.Chmod(f.info.Mode().Perm())
		if err == nil {
			err = sameOwner(temp, f.info)
		}
	}
	if err == nil {
		err = temp.Sync()
	}
	if err := errors.Join(err, temp.Close()); err != nil {
		return fmt.Errorf("%s: %w", f, err)
	}
	if err := os.Rename(temp.Name(), f.real); err != nil {
		return err
	}
	return syncDir(dir)
}

// remove takes the file away.
func (f *file) remove() error {
	if err := f.same(); err != nil {
		return err
	}
	return os.Remove(f.path)
}

func (f *file) same() error {
	now, err := os.ReadFile(f.real)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !f.exists:
		return nil
	case err == nil && f.exists && bytes.Equal(now, f.before):
		return nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return fmt.Errorf("%s %w", f, errMeanwhile)
}

// back makes the file what read has seen, if it is still what this program has made of it; nil: it was removed.
func (f *file) back(made []byte) error {
	now, err := read(f.path)
	if err != nil {
		return err
	}
	if now.exists != (made != nil) || !bytes.Equal(now.before, made) {
		return fmt.Errorf("%s %w", f, errMeanwhile)
	}
	if !f.exists {
		return now.remove()
	}
	now.info = f.info
	return now.replace(f.before)
}
