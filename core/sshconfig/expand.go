package sshconfig

import (
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strings"
)

// Names are what the tokens of ssh_config stand for (ssh_config(5), TOKENS).
type Names struct {
	User  string // %r
	Host  string // %h
	Port  string // %p
	Alias string // %n: as typed
	Key   string // %k: HostKeyAlias, else as Alias
	Jump  string // %j: ProxyJump, "" if none

	Home      string // %d
	LocalUser string // %u
	LocalUID  string // %i
	LocalHost string // %l; %L is its first label

	// Env is asked for ${NAME}.
	Env func(string) (string, bool)
}

// LocalNames returns Names that know this process's user, host and environment, and nothing of a destination. The home
// directory is the one of the password database, as in ssh, or $HOME for a user that is not in it.
func LocalNames() (Names, error) {
	u, err := user.Current()
	if err != nil {
		return Names{}, fmt.Errorf("who runs this is not known: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return Names{}, fmt.Errorf("the name of this host is not known: %w", err)
	}
	return Names{Home: u.HomeDir, LocalUser: u.Username, LocalUID: u.Uid, LocalHost: host, Env: os.LookupEnv}, nil
}

func (n Names) token(c byte) (string, bool) {
	switch c {
	case '%':
		return "%", true
	case 'C':
		// OpenSSH before 9.6 leaves %j out, which differs only for a host with ProxyJump.
		sum := sha1.Sum([]byte(n.LocalHost + n.Host + n.Port + n.User + n.Jump))
		return hex.EncodeToString(sum[:]), true
	case 'd':
		return n.Home, true
	case 'h':
		return n.Host, true
	case 'i':
		return n.LocalUID, true
	case 'j':
		return n.Jump, true
	case 'k':
		if n.Key != "" {
			return n.Key, true
		}
		return n.Alias, true
	case 'L':
		short, _, _ := strings.Cut(n.LocalHost, ".")
		return short, true
	case 'l':
		return n.LocalHost, true
	case 'n':
		return n.Alias, true
	case 'p':
		return n.Port, true
	case 'r':
		return n.User, true
	case 'u':
		return n.LocalUser, true
	}
	return "", false
}

// percent expands tokens, and ${NAME} if dollar is set. What they stand for is not expanded again.
func (n Names) percent(s string, dollar bool) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '%':
			if i++; i == len(s) {
				return "", fmt.Errorf("%q ends with a lone %%", s)
			}
			v, ok := n.token(s[i])
			if !ok {
				return "", fmt.Errorf("%q: unknown token %q", s, s[i-1:i+1])
			}
			b.WriteString(v)
		case dollar && strings.HasPrefix(s[i:], "${"):
			name, _, ok := strings.Cut(s[i+2:], "}")
			if !ok || name == "" {
				return "", fmt.Errorf("%q: ${ without a name and }", s)
			}
			v, ok := "", false
			if n.Env != nil {
				v, ok = n.Env(name)
			}
			if !ok {
				return "", fmt.Errorf("%q: %s is not set in the environment", s, name)
			}
			b.WriteString(v)
			i += len(name) + 2
		default:
			b.WriteByte(s[i])
		}
	}
	return b.String(), nil
}

// tilde expands a leading ~ or ~USER as tilde_expand_filename of OpenSSH's misc.c does.
func (n Names) tilde(path string) (string, error) {
	if !strings.HasPrefix(path, "~") {
		return path, nil
	}
	name, rest, _ := strings.Cut(filepath.ToSlash(path[1:]), "/")
	home := n.Home
	if name != "" {
		u, err := user.Lookup(name)
		if err != nil {
			return "", fmt.Errorf("%s: no such user %s", path, name)
		}
		home = u.HomeDir
	}
	if home == "" {
		return "", fmt.Errorf("%s: the home directory is not known", path)
	}
	return strings.TrimRight(home, "/") + "/" + rest, nil
}

// path expands ~, tokens and ${NAME}, in ssh's order.
func (n Names) path(s string) (string, error) {
	s, err := n.tilde(s)
	if err != nil {
		return "", err
	}
	return n.percent(s, true)
}

// ExpandProxyCommand expands the tokens of a ProxyCommand as ssh does: nothing is quoted, and $ is left to the shell.
// It is an error if user or host hold what a shell would take for more than a word, since ssh refuses those too.
func (r *Resolved) ExpandProxyCommand(n Names) (string, error) {
	command := r.Get("proxycommand")
	if command == "" || strings.EqualFold(command, "none") {
		return "", errors.New("no ProxyCommand")
	}
	for _, name := range []string{n.Host, n.Alias, n.Key} {
		if !validHost(name) {
			return "", fmt.Errorf("host name %q contains characters that a shell would act on", name)
		}
	}
	if !validUser(n.User) {
		return "", fmt.Errorf("user name %q contains characters that a shell would act on", n.User)
	}
	return n.percent(command, false)
}

// named expands the tokens of a command that stand for how the host was named, and leaves the others.
func (n Names) named(command string) string {
	var b strings.Builder
	for i := 0; i < len(command); i++ {
		if command[i] != '%' || i+1 == len(command) {
			b.WriteByte(command[i])
			continue
		}
		i++
		switch c := command[i]; c {
		case 'n', 'k':
			name, _ := n.token(c)
			b.WriteString(strings.ReplaceAll(name, "%", "%%"))
		default:
			b.WriteString(command[i-1 : i+1])
		}
	}
	return b.String()
}

// validHost is valid_hostname of OpenSSH's ssh.c.
func validHost(s string) bool {
	if strings.HasPrefix(s, "-") {
		return false
	}
	for _, c := range []byte(s) {
		if strings.IndexByte("'`\"$\\;&<>|(){}", c) >= 0 || c <= ' ' || c == 0x7f {
			return false
		}
	}
	return true
}

// validUser is valid_ruser of OpenSSH's ssh.c, and stricter: it takes no space and no $ either, which ssh lets through and
// the shell then acts on.
func validUser(s string) bool {
	if strings.HasPrefix(s, "-") {
		return false
	}
	for i, c := range []byte(s) {
		if strings.IndexByte("'`\";&<>|(){}", c) >= 0 || c < ' ' || c == 0x7f {
			return false
		}
		// A last backslash would take the next character along.
		if c == ' ' || c == '$' || c == '\\' && i == len(s)-1 {
			return false
		}
	}
	return true
}
