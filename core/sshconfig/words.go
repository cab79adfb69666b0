package sshconfig

import (
	"path/filepath"
	"strings"
)

// whitespace is what separates words of a configuration line (readconf.c).
const whitespace = " \t\r\n\f\v"

// keyword splits a configuration line into its keyword, in lower case, and the rest, as readconf.c does with strdelim:
// whitespace or one `=` ends the keyword, quotes may surround it. ok is false for empty lines and comments.
func keyword(line string) (word, rest string, ok bool) {
	line = strings.Trim(line, whitespace)
	if line == "" || line[0] == '#' {
		return "", "", false
	}
	if line[0] == '"' {
		var found bool
		if word, rest, found = strings.Cut(line[1:], `"`); !found {
			return "", "", false
		}
	} else {
		i := strings.IndexAny(line, whitespace+"=")
		if i < 0 {
			i = len(line)
		}
		word, rest = line[:i], line[i:]
	}
	rest = strings.TrimLeft(rest, whitespace)
	if strings.HasPrefix(rest, "=") {
		rest = strings.TrimLeft(rest[1:], whitespace)
	}
	return strings.ToLower(word), rest, true
}

// words splits a value as argv_split of OpenSSH's misc.c does: quotes group, a backslash escapes quotes, itself and,
// outside quotes, a space; a `#` that starts a word ends the line. ok is false for an open quote.
func words(s string) (out []string, ok bool) {
	for i := 0; ; {
		for i < len(s) && strings.IndexByte(whitespace, s[i]) >= 0 {
			i++
		}
		if i == len(s) || s[i] == '#' {
			return out, true
		}
		var word strings.Builder
		quote := byte(0)
		for ; i < len(s); i++ {
			c := s[i]
			switch {
			case c == '\\' && i+1 < len(s) && (strings.IndexByte(`'"\`, s[i+1]) >= 0 || quote == 0 && s[i+1] == ' '):
				i++
				word.WriteByte(s[i])
				continue
			case quote == 0 && (c == ' ' || c == '\t'):
			case quote == 0 && (c == '"' || c == '\''):
				quote = c
				continue
			case quote != 0 && c == quote:
				quote = 0
				continue
			default:
				word.WriteByte(c)
				continue
			}
			break
		}
		if quote != 0 {
			return nil, false
		}
		out = append(out, word.String())
	}
}

// quoteWord writes a word so that words reads it back, as do the parsers of OpenSSH before 8.7 if it has neither quotes
// nor backslashes in it.
func quoteWord(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// ours reports whether a ProxyCommand leads to muxproxy: the word that the shell would start is so named, whatever its
// folder, after `exec`, `command`, `env` and assignments; or such a word stands somewhere (after sudo, in sh -c, behind
// a test) and what muxproxy takes as its target comes after it.
func ours(command string) bool {
	if _, ok := startsOurs(command); ok {
		return true
	}
	named := false
	for _, word := range strings.FieldsFunc(command, func(r rune) bool { return strings.ContainsRune(whitespace+";|&<>()'\"", r) }) {
		named = named || isOurName(word)
		if named && strings.Contains(word, "@%h") {
			return true
		}
	}
	return false
}

func isOurName(word string) bool {
	base := word[strings.LastIndexAny(word, `/\`)+1:]
	return base == "muxproxy" || strings.EqualFold(base, "muxproxy.exe")
}

// startsOurs returns the word too.
func startsOurs(command string) (program string, ok bool) {
	skipping := false // options and assignments of env
	for rest := command; ; {
		var word string
		if word, rest = shellWord(rest); word == "" && rest == "" {
			return "", false
		}
		base := word[strings.LastIndexAny(word, `/\`)+1:]
		switch {
		case isOurName(word):
			return word, true
		case word == "exec" || word == "command":
		case base == "env":
			skipping = true
		case isAssignment(word):
		case word == "-a", skipping && (word == "-u" || word == "-C"): // exec -a NAME, env -u NAME
			_, rest = shellWord(rest)
		case strings.HasPrefix(word, "-"):
		default:
			return "", false
		}
	}
}

func isAssignment(word string) bool {
	name, _, ok := strings.Cut(word, "=")
	if !ok || name == "" {
		return false
	}
	for i, c := range []byte(name) {
		letter := c == '_' || c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// shellWord takes the first word off a shell command. It knows quotes and backslashes and no expansions, which is
// enough for a program's name.
func shellWord(s string) (word, rest string) {
	s = strings.TrimLeft(s, whitespace)
	var b strings.Builder
	quote := byte(0)
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && quote != '\'' && i+1 < len(s) && filepath.Separator != '\\': // cmd.exe knows no such escape
			i++
			b.WriteByte(s[i])
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && strings.IndexByte(whitespace, c) >= 0:
			return b.String(), s[i:]
		case quote == 0 && strings.IndexByte(";|&<>()", c) >= 0:
			return b.String(), "" // what follows is another command or a redirection
		default:
			b.WriteByte(c)
		}
	}
	return b.String(), ""
}

// ourKnownHosts reports whether a path is the file in which the master keeps the public half of its CA.
func ourKnownHosts(path string) bool {
	return path == "muxproxy/known_hosts" || strings.HasSuffix(path, "/muxproxy/known_hosts")
}
