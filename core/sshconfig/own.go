package sshconfig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// systemKnownHosts are ssh's default of GlobalKnownHostsFile (ssh_config(5)).
var systemKnownHosts = []string{"/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"}

// Own is what ssh_config has to say for ssh to go through muxproxy. Run answers as if it were not there.
type Own struct {
	Hosts      []string // patterns for a Host line; none: all hosts
	Program    string   // absolute path of muxproxy
	KnownHosts string   // absolute path of the file that holds the public half of the master's CA
}

// Lines returns a Host block, for the start of a file of its own. An error says what can't be written into ssh_config in
// a way that every ssh reads alike.
//
// ControlPath none is there because a ControlPath further down would have ssh share its connection with muxproxy a second
// time, with all that ControlMaster gets wrong.
func (o Own) Lines() (string, error) {
	hosts := o.Hosts
	if len(hosts) == 0 {
		hosts = []string{"*"}
	}
	for _, h := range hosts {
		if err := CheckPattern(h); err != nil {
			return "", err
		}
	}
	if !slices.ContainsFunc(hosts, func(h string) bool { return h[0] != '!' }) {
		return "", fmt.Errorf("%s: matches no host; a ! only takes away from what another pattern matches", strings.Join(hosts, " "))
	}
	for _, path := range []string{o.Program, o.KnownHosts} {
		if err := CheckPath(path); err != nil {
			return "", err
		}
	}
	if command := quoteOdd(o.Program); !ours(command) {
		return "", fmt.Errorf("%s: the program has to be named muxproxy", o.Program)
	}
	if !ourKnownHosts(o.KnownHosts) {
		return "", fmt.Errorf("%s: the file has to be muxproxy/known_hosts in some directory", o.KnownHosts)
	}
	return fmt.Sprintf(`Host %s
    ProxyCommand %s --fdpass '%%r@%%h:%%p' '%%n'
    ProxyUseFdpass yes
    GlobalKnownHostsFile %s %s
    ControlPath none
`, strings.Join(hosts, " "), quoteOdd(o.Program), quoteOdd(o.KnownHosts), strings.Join(systemKnownHosts, " ")), nil
}

// CheckPattern says why a pattern can't stand in a Host line (ssh_config(5), PATTERNS) that means the same to every ssh.
func CheckPattern(p string) error {
	name := strings.TrimPrefix(p, "!")
	switch {
	case name == "":
		return fmt.Errorf("%q: an empty pattern", p)
	case !plainText(p) || strings.ContainsAny(p, " '`#=$%"):
		return fmt.Errorf("%q: a host pattern has no spaces, quotes, control characters, \\ # = $ or %% in it", p)
	case strings.Contains(p, ","):
		return fmt.Errorf("%q: give each host pattern by itself, without a comma", p)
	case strings.ContainsAny(name, "!@") || strings.HasPrefix(name, "-"):
		return fmt.Errorf("%q: a host pattern is a name without user, in which * and ? stand for others, with a ! before it or not", p)
	}
	return nil
}

// CheckPath says why a path can't be written into ssh_config in a way that every ssh, its glob(3) and a shell read alike.
// OpenSSH before 8.7 knows no escapes, one before 10.0 takes % and $ in Include as they are.
func CheckPath(path string) error {
	switch {
	case !filepath.IsAbs(path):
		return fmt.Errorf("%q: not an absolute path", path)
	case !plainText(path) || strings.ContainsAny(path, "'`$%*?[]!"):
		return fmt.Errorf("%q: can't be written into ssh_config so that every ssh reads it; "+
			"it has a quote, a control character or one of \\ $ %% * ? [ ] ! in it", path)
	}
	return nil
}

// plainText reports whether s has only printable characters, and neither " nor \ among them.
func plainText(s string) bool { return strconv.Quote(s) == `"`+s+`"` }

// quoteOdd quotes a path that CheckPath has passed, if ssh_config or a shell could take it for more than a word.
func quoteOdd(path string) string {
	for _, c := range []byte(path) {
		letter := c|0x20 >= 'a' && c|0x20 <= 'z' || c >= '0' && c <= '9' || c >= 0x80
		if !letter && strings.IndexByte("/._-+@:,", c) < 0 {
			return `"` + path + `"`
		}
	}
	return path
}

// IncludeLine is the line by which ssh reads a file whose path CheckPath has passed. It has no line end.
func IncludeLine(path string) string { return "Include " + quoteOdd(path) }

// AddInclude returns the text of an ssh_config in which IncludeLine(path) is the first line in effect: ssh takes the first
// value of an option, and below a Host or Match line it would read the file for some hosts only. What follows is as if the
// line were not there: a Host block ends with the included file (readconf.c). No other line changes; where ours is there
// already, nothing does.
func AddInclude(text []byte, path string) []byte {
	without, n := RemoveInclude(text, path)
	if n == 1 && startsWith(text, path) {
		return text
	}
	end := "\n"
	if first, _, _ := bytes.Cut(without, []byte("\n")); bytes.HasSuffix(first, []byte("\r")) {
		end = "\r\n"
	}
	return append([]byte(IncludeLine(path)+end), without...)
}

// startsWith reports whether the first line in effect is IncludeLine(path).
func startsWith(text []byte, path string) bool {
	for line := range bytes.Lines(text) {
		if _, _, ok := keyword(string(line)); ok {
			return includes(string(line), path)
		}
	}
	return false
}

// RemoveInclude takes all lines away that include this file and no other, and says how many there were.
func RemoveInclude(text []byte, path string) (rest []byte, n int) {
	rest = make([]byte, 0, len(text))
	for line := range bytes.Lines(text) {
		if includes(string(line), path) {
			n++
			continue
		}
		rest = append(rest, line...)
	}
	return rest, n
}

func includes(line, path string) bool {
	word, rest, ok := keyword(line)
	if !ok || word != "include" {
		return false
	}
	list, ok := words(rest)
	return ok && slices.Equal(list, []string{path})
}

// AsIs asks `ssh -G` about a destination and returns what Parse makes of it: muxproxy's own lines are in effect, and nothing is
// expanded. ssh is the executable. An error is a line for a person.
func AsIs(ctx context.Context, ssh string, args Args) (map[string][]string, error) {
	if args.Destination == "" {
		return nil, errors.New("no host name")
	}
	argv := append([]string{"-G"}, args.forResolve()...)
	out, err := (&copier{}).ask(ctx, ssh, append(argv, "--", args.Destination))
	if err != nil {
		return nil, err
	}
	return Parse(out)
}

// Leads reports whether a ProxyCommand, as ssh_config or `ssh -G` has it, leads to muxproxy. program is the executable as it
// is named there, "" if only a shell or ssh can tell.
func Leads(command string) (program string, ok bool) {
	if word, first := startsOurs(command); first && !strings.ContainsAny(word, "%$`*?~") {
		program = word
	}
	return program, ours(command)
}

// KnownHostsFiles are the paths in a GlobalKnownHostsFile or UserKnownHostsFile of `ssh -G`, as it prints them.
func KnownHostsFiles(value string) []string { return splitPaths(value) }

// IsSystemFile reports whether a path is that of the system-wide ssh_config.
func IsSystemFile(path string) bool { return path == systemConfig() }
