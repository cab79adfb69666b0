package upstream

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/crypto/ssh"
)

// hostLine is a line of a known_hosts file without its line break. hash hides the name, as HashKnownHosts wants.
func hostLine(name string, key ssh.PublicKey, hash bool) (string, error) {
	if hash {
		salt := make([]byte, sha1.Size)
		if _, err := rand.Read(salt); err != nil {
			return "", err
		}
		mac := hmac.New(sha1.New, salt)
		mac.Write([]byte(name))
		b64 := base64.StdEncoding.EncodeToString
		name = "|1|" + b64(salt) + "|" + b64(mac.Sum(nil))
	}
	return name + " " + strings.TrimSuffix(string(ssh.MarshalAuthorizedKey(key)), "\n"), nil
}

// usableName reports whether a name can stand in a known_hosts file and means only itself there.
func usableName(name string) bool {
	return name != "" && !strings.ContainsAny(name, " \t\r\n\v\f\x00,*?!|#@")
}

// appendHost adds a key to a known_hosts file as ssh does (add_host_to_hostfile of hostfile.c): ~/.ssh and the file are made if
// they are missing, closed to others, and a last line without its end is ended first. One write adds the line, so that
// those of several writers do not mix.
func appendHost(file, name string, key ssh.PublicKey, hash bool) error {
	if !usableName(name) {
		return fmt.Errorf("%q can't be written as a host name", name)
	}
	line, err := hostLine(name, key, hash)
	if err != nil {
		return err
	}
	if dir := filepath.Dir(file); filepath.Base(dir) == ".ssh" {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	hostFilesMu.Lock()
	defer hostFilesMu.Unlock()
	f, err := os.OpenFile(file, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	text := line + "\n"
	if open, err := endsOpen(f); err != nil {
		f.Close()
		return err
	} else if open {
		text = "\n" + text
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// endsOpen reports whether the last line of a file lacks its end.
func endsOpen(f *os.File) (bool, error) {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return false, err
	}
	var last [1]byte
	if _, err := f.ReadAt(last[:], info.Size()-1); err != nil && err != io.EOF {
		return false, err
	}
	return last[0] != '\n', nil
}

// replaceHost rewrites a known_hosts file so that the lines of name hold keep and nothing else: other keys of name go, those of
// keep that are missing come at the end (hostfile_replace_entries of hostfile.c). All other lines stay as they are, broken ones
// too. The file before is kept as FILE.old. It reports whether anything had to change.
func replaceHost(file, name string, keep []ssh.PublicKey, hash bool) (bool, error) {
	hostFilesMu.Lock()
	defer hostFilesMu.Unlock()
	// What a link points to is what the user wants changed; a rename would replace the link.
	target, err := filepath.EvalSymlinks(file)
	if err != nil {
		return false, err
	}
	info, err := os.Stat(target)
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxKnownHosts {
		return false, errors.New("not a file that can be rewritten")
	}
	text, err := os.ReadFile(target)
	if err != nil {
		return false, err
	}
	var out bytes.Buffer
	changed := false
	have := make([]bool, len(keep))
	for line := range bytes.Lines(text) {
		k, ok := parseHostLine(line)
		if ok && k.marker == noMarker && matchHosts(k.hosts, name) {
			wanted := false
			for i, key := range keep {
				if sameKey(key, k.key) {
					wanted, have[i] = true, true
				}
			}
			if !wanted {
				changed = true
				continue
			}
		}
		out.Write(line)
	}
	if out.Len() > 0 && out.Bytes()[out.Len()-1] != '\n' {
		out.WriteByte('\n')
	}
	for i, key := range keep {
		if have[i] {
			continue
		}
		line, err := hostLine(name, key, hash)
		if err != nil {
			return false, err
		}
		out.WriteString(line + "\n")
		changed = true
	}
	if !changed {
		return false, nil
	}
	return true, replaceFile(target, out.Bytes(), info)
}

// hostFilesMu is held while a known_hosts file is changed, so that no login of this master takes back what another one
// has written.
var hostFilesMu sync.Mutex

func replaceFile(file string, text []byte, before os.FileInfo) error {
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Chmod(before.Mode().Perm())
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		// Somebody else's change since is not to be lost.
		if now, serr := os.Stat(file); serr != nil || !os.SameFile(now, before) || now.Size() != before.Size() ||
			!now.ModTime().Equal(before.ModTime()) {
			err = errors.New("it changed meanwhile")
		}
	}
	if err == nil {
		old := file + ".old"
		if err = os.Remove(old); err == nil || errors.Is(err, os.ErrNotExist) {
			err = os.Link(file, old)
		}
	}
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
