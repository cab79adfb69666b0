package sshconfig

import (
	"errors"
	"strings"
)

// Parse reads what `ssh -G` prints: a keyword and its value per line. Keywords are put in lower case; a keyword without
// a value has the value "". Nothing is expanded or split, see Run for that.
func Parse(out []byte) (map[string][]string, error) {
	options := make(map[string][]string)
	for line := range strings.Lines(string(out)) {
		line = strings.TrimRight(line, "\r\n")
		keyword, value, _ := strings.Cut(strings.TrimLeft(line, " \t"), " ")
		if keyword == "" {
			continue
		}
		keyword = strings.ToLower(keyword)
		options[keyword] = append(options[keyword], value)
	}
	if len(options) == 0 {
		return nil, errors.New("ssh -G printed nothing")
	}
	return options, nil
}

// splitPaths takes apart the list of paths that ssh -G prints on one line, unquoted, so that a space inside a path
// looks like one between paths. A new path starts where an absolute one can; a list that starts with a relative path has
// no spaces inside its paths.
func splitPaths(line string) []string {
	if line == "" {
		return nil
	}
	if !startsPath(line) {
		return strings.Fields(line)
	}
	var paths []string
	start := 0
	for i := 1; i < len(line); i++ {
		if line[i-1] == ' ' && startsPath(line[i:]) {
			paths = append(paths, line[start:i-1])
			start = i
		}
	}
	return append(paths, line[start:])
}

func startsPath(s string) bool {
	if s[0] == '/' || s[0] == '~' || s[0] == '%' && len(s) > 1 || strings.HasPrefix(s, "${") {
		return true
	}
	letter := s[0] | 0x20
	return len(s) > 2 && letter >= 'a' && letter <= 'z' && s[1] == ':' && (s[2] == '/' || s[2] == '\\')
}
