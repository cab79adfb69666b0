package confirm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// programs are askpass programs by their absolute paths, since PATH is whoever's who started the master: first what an
// administrator chose, then what shows a yes and a no rather than a field for a password.
var programs = []string{
	"/usr/bin/ssh-askpass",                     // Debian: what update-alternatives leads to; OpenSSH's default there
	"/usr/libexec/openssh/ssh-askpass",         // Fedora: OpenSSH's default
	"/usr/lib/ssh/ssh-askpass",                 // Arch, openSUSE: OpenSSH's default
	"/usr/libexec/ssh/ssh-askpass",             // openSUSE
	"/usr/lib/openssh/gnome-ssh-askpass",       // Debian: ssh-askpass-gnome
	"/usr/libexec/openssh/gnome-ssh-askpass",   // Fedora: openssh-askpass
	"/usr/lib/ssh/gnome-ssh-askpass3",          // Arch, openSUSE
	"/usr/lib/ssh/gnome-ssh-askpass2",          // the same
	"/usr/bin/ksshaskpass",                     // KDE
	"/usr/bin/lxqt-openssh-askpass",            // LXQt
	"/usr/libexec/seahorse/ssh-askpass",        // Debian, Fedora
	"/usr/lib/seahorse/ssh-askpass",            // Arch
	"/usr/bin/ssh-askpass-fullscreen",          // Debian
	"/usr/libexec/ssh-askpass/x11-ssh-askpass", // Debian
	"/usr/libexec/openssh/x11-ssh-askpass",     // Fedora
	"/usr/lib/ssh/x11-ssh-askpass",             // Arch
	"/usr/local/bin/ssh-askpass",               // FreeBSD, macOS: Homebrew on Intel
	"/opt/homebrew/bin/ssh-askpass",            // macOS: Homebrew
	"/opt/local/bin/ssh-askpass",               // macOS: MacPorts
	"/usr/X11R6/bin/ssh-askpass",               // OpenSSH's own default
}

// errNoAskpass is that none of programs is there.
var errNoAskpass = errors.New("no askpass program is installed")

// program returns the askpass program to run: named by policy, or the first of programs that is there. Nobody but this user
// and root may be able to change it.
func program(named string) (string, error) {
	if rest, ok := strings.CutPrefix(named, "~/"); ok {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("askpass %q: %w", named, err)
		}
		named = filepath.Join(home, rest)
	}
	if named != "" {
		return trusted(named)
	}
	for _, p := range programs {
		if _, err := os.Stat(p); err == nil {
			return trusted(p)
		}
	}
	return "", errNoAskpass
}

// trusted returns where a path leads, if that can be run and if nobody but this user and root can change it, nor any
// directory on the way there.
func trusted(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	var fi os.FileInfo
	if err == nil {
		fi, err = os.Stat(real)
	}
	if err != nil {
		if pe, ok := errors.AsType[*os.PathError](err); ok { // which may name only a directory on the way
			err = pe.Err
		}
		return "", fmt.Errorf("askpass %s: %w", path, err)
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o111 == 0 && executableBits {
		return "", fmt.Errorf("askpass %s is not a program", path)
	}
	for _, p := range []string{path, real} { // who can change a link on the way chooses any program of root's
		for {
			if err := onlyMine(p); err != nil {
				return "", fmt.Errorf("askpass %s: %w", path, err)
			}
			up := filepath.Dir(p)
			if up == p {
				break
			}
			p = up
		}
	}
	return real, nil
}

// verdict is how a question ended.
type verdict int

const (
	unanswered verdict = iota // in time
	yes
	no
	noWay     // nobody could be asked
	cancelled // nobody wants to know any more
)

// answer is a verdict with its reason, one line, escaped.
type answer struct {
	verdict
	why        string
	atTerminal bool // it was given in the client's terminal, for all that the client will ask for
}

// maxAnswer is what ssh reads of an answer (ssh_askpass in OpenSSH's readpass.c).
const maxAnswer = 1023

// agreed reports whether what an askpass program printed is a yes: ssh takes the first line, and nothing or "yes" in any
// case (ask_permission in OpenSSH's readpass.c).
func agreed(output []byte) bool {
	text := string(output)
	if i := strings.IndexAny(text, "\r\n"); i >= 0 {
		text = text[:i]
	}
	return len(output) <= maxAnswer && (text == "" || strings.EqualFold(text, "yes"))
}

// readSome reads all there is and returns the first max bytes.
func readSome(r io.Reader, max int64) []byte {
	b, _ := io.ReadAll(io.LimitReader(r, max)) // what came before an error counts
	_, _ = io.Copy(io.Discard, r)
	return b
}

// runner runs an askpass program, and returns soon after ctx has ended; then the verdict is unanswered.
type runner func(ctx context.Context, path string, env []string, prompt string) answer
