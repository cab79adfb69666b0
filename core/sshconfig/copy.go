package sshconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const (
	maxIncludes = 16      // nesting, READCONF_MAX_DEPTH of readconf.c
	maxFile     = 4 << 20 // a configuration file larger than this is a mistake
)

// copier walks a user's configuration and writes private copies of the files from which a line must go.
type copier struct {
	dir   string // for the copies; made when the first is written
	count int
	names Names
	// system is the path of the system-wide file.
	system string
	// includeHome stands for ~ in Include, which is glob(3)'s: $HOME first, unlike everywhere else.
	includeHome string

	files    []Stamp
	seen     map[string]bool // paths in files
	set      map[string]bool // keywords that some line sets, in lower case
	volatile bool
	origin   map[string]string // path of a copy: path of its original
	done     map[source]string // path of the copy, or of the original where that serves
	busy     map[source]bool
}

// source is a file and how ssh reads it.
type source struct {
	path string
	// user: read as part of the user's configuration; relative Includes are in ~/.ssh, not /etc/ssh.
	user bool
	// checked: ssh refuses the file if others can write to it (SSHCONF_CHECKPERM).
	checked bool
}

var errNotRegular = errors.New("not a regular file")

// copy returns the path that ssh should read instead of src.path: itself, or a copy without our lines. must says that
// a copy is needed even if no line is ours. A file that can't be read is left to ssh, which says so or ignores it.
func (c *copier) copy(src source, must bool, depth int) (string, error) {
	if path, ok := c.done[src]; ok && (!must || path != src.path) {
		return path, nil
	}
	if c.busy[src] || depth > maxIncludes {
		return src.path, nil // a circle: ssh refuses it by its own limit
	}
	c.busy[src] = true
	defer delete(c.busy, src)

	text, err := c.read(src.path)
	if errors.Is(err, errNotRegular) && depth == 0 {
		return "", fmt.Errorf("%s: %w, so it can't be read a second time; put the configuration into a file", src.path, err)
	}
	if err != nil {
		c.done[src] = src.path
		return src.path, nil
	}
	lines := strings.SplitAfter(string(text), "\n")
	changed, err := c.filter(lines, src, depth)
	if err != nil {
		return "", err
	}
	if !changed && !must {
		c.done[src] = src.path
		return src.path, nil
	}
	if src.checked {
		// The copy would pass ssh's check, whatever the original.
		if err := checkOwner(src.path); err != nil {
			return "", err
		}
	}
	path, err := c.write(strings.Join(lines, ""), src.path)
	if err != nil {
		return "", err
	}
	c.done[src] = path
	return path, nil
}

// read stamps and reads a file. The null device is an empty file.
func (c *copier) read(path string) ([]byte, error) {
	if path == os.DevNull {
		return nil, nil
	}
	c.stamp(path)
	// Looked at before it is opened: /dev/stdin of the one who runs this can be a connection.
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		c.volatile = true
		return nil, errNotRegular
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("%s: larger than %d MiB", path, maxFile>>20)
	}
	return os.ReadFile(path)
}

func (c *copier) stamp(path string) {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	if !c.seen[path] {
		c.seen[path] = true
		c.files = append(c.files, newStamp(path))
	}
}

func (c *copier) write(text, original string) (string, error) {
	if c.dir == "" {
		dir, err := privateDir()
		if err != nil {
			return "", err
		}
		c.dir = dir
	}
	c.count++
	path := filepath.Join(c.dir, strconv.Itoa(c.count))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return "", fmt.Errorf("private copy of %s: %w", original, err)
	}
	c.origin[path] = original
	return path, nil
}

// filter changes lines in place: those that lead to muxproxy become empty, so that ssh's messages keep their line numbers.
func (c *copier) filter(lines []string, src source, depth int) (changed bool, err error) {
	start := 0 // of the block between two Host or Match lines
	endBlock := func(end int) {
		if dropProxy(lines[start:end]) {
			changed = true
		}
		start = end
	}
	for i, line := range lines {
		word, rest, ok := keyword(line)
		if !ok {
			continue
		}
		c.note(word, rest)
		switch word {
		case "host", "match":
			endBlock(i)
		case "globalknownhostsfile":
			if kept, ours := withoutOurs(rest); ours {
				lines[i] = kept + "\n"
				changed = true
			}
		case "include":
			instead, err := c.include(rest, src, depth)
			if err != nil {
				return false, err
			}
			if instead != "" {
				lines[i] = instead + "\n"
				changed = true
			}
		}
	}
	endBlock(len(lines))
	return changed, nil
}

// dropProxy empties each ProxyCommand of a block that leads to muxproxy, and with it ProxyUseFdpass, which says how to
// talk to that one and not to the user's own, and what keeps ControlMaster off: Own writes all of these.
func dropProxy(block []string) (dropped bool) {
	for i, line := range block {
		if word, rest, ok := keyword(line); ok && word == "proxycommand" && ours(rest) {
			block[i] = "\n"
			dropped = true
		}
	}
	for i, line := range block {
		word, rest, ok := keyword(line)
		if dropped && ok && (word == "proxyusefdpass" || word == "controlpath" && strings.EqualFold(rest, "none")) {
			block[i] = "\n"
		}
	}
	return dropped
}

// withoutOurs takes the master's file out of a GlobalKnownHostsFile list. What setup writes repeats ssh's default
// behind it; then nothing is left of the line, so that a line of the user's further down counts.
func withoutOurs(rest string) (line string, found bool) {
	list, ok := words(rest)
	if !ok {
		return "", false
	}
	n := len(list)
	list = slices.DeleteFunc(list, ourKnownHosts)
	if len(list) == n {
		return "", false
	}
	if len(list) == 0 || slices.Equal(list, systemKnownHosts) {
		return "", true
	}
	line = "GlobalKnownHostsFile"
	for _, path := range list {
		line += " " + quoteWord(path)
	}
	return line, true
}

// note records what a line says about the whole answer.
func (c *copier) note(word, rest string) {
	c.set[word] = true
	switch word {
	case "match":
		c.volatile = c.volatile || matchIsVolatile(rest)
	case "canonicalizehostname": // asks the resolver
		c.volatile = c.volatile || !strings.EqualFold(rest, "no") && !strings.EqualFold(rest, "false")
	case "knownhostscommand":
		c.volatile = c.volatile || !strings.EqualFold(rest, "none")
	case "identityagent":
		c.volatile = c.volatile || strings.Contains(rest, "$")
	case "proxycommand", "localcommand", "remotecommand": // a $ there is the shell's
	default:
		c.volatile = c.volatile || strings.Contains(rest, "${")
	}
}

// matchIsVolatile reports whether a Match line looks at more than names.
func matchIsVolatile(rest string) bool {
	list, ok := words(rest)
	if !ok {
		return true
	}
	for i := 0; i < len(list); i++ {
		name, _, hasArg := strings.Cut(strings.ToLower(strings.TrimPrefix(list[i], "!")), "=")
		switch name {
		case "all", "canonical", "final":
		case "host", "originalhost", "user", "localuser", "tagged":
			if !hasArg {
				i++
			}
		default:
			return true
		}
	}
	return false
}

// include follows an Include line. It returns the line to put in its place, or "" if it can stay.
func (c *copier) include(rest string, src source, depth int) (string, error) {
	patterns, ok := words(rest)
	if !ok {
		return "", nil // ssh complains
	}
	var list []string
	changed := false
	for _, pattern := range patterns {
		full, ok := c.includePattern(pattern, src)
		if !ok {
			return "", nil
		}
		c.stampFolders(full)
		paths, err := filepath.Glob(full)
		if err != nil {
			return "", nil // glob(3) and ssh may still make something of it, but no rule of ours can
		}
		if !hasMeta(full) {
			paths = []string{unescape(full)}
		}
		for _, path := range paths {
			instead, err := c.copy(source{path, src.user, true}, false, depth+1)
			if err != nil {
				return "", err
			}
			if instead != path {
				changed = true
			}
			list = append(list, instead)
		}
		// The system-wide file is read as an included file of the user's copy, where a relative path means ~/.ssh.
		if !src.user && !filepath.IsAbs(pattern) {
			changed = true
		}
	}
	if !changed {
		return "", nil
	}
	line := "Include"
	for _, path := range list {
		line += " " + quoteWord(escapeMeta(path))
	}
	if len(list) == 0 {
		line = "# " + line
	}
	return line, nil
}

// includePattern anchors and expands what an Include names. ok is false if ssh will refuse the line.
func (c *copier) includePattern(pattern string, src source) (string, bool) {
	if strings.ContainsAny(pattern, "%") || strings.Contains(pattern, "${") {
		// OpenSSH 10.0 and newer; an older one takes the characters as they are.
		expanded, err := c.names.percent(pattern, true)
		if err != nil {
			return "", false
		}
		pattern = expanded
	}
	switch {
	case strings.HasPrefix(pattern, "~"):
		if !src.user {
			return "", false
		}
	case filepath.IsAbs(pattern):
		return pattern, true
	case !src.user:
		return filepath.Join(filepath.Dir(c.system), pattern), true
	default:
		pattern = "~/.ssh/" + pattern
	}
	names := c.names
	if names.Home != c.includeHome && (strings.HasPrefix(pattern, "~/") || pattern == "~") {
		names.Home = c.includeHome
		c.volatile = true // depends on the caller's environment
	}
	full, err := names.tilde(pattern)
	return full, err == nil
}

// stampFolders records the folders whose entries decide what a pattern matches.
func (c *copier) stampFolders(pattern string) {
	for dir := pattern; hasMeta(dir); {
		dir = filepath.Dir(dir)
		if !hasMeta(dir) {
			c.stamp(unescape(dir))
			return
		}
		folders, err := filepath.Glob(dir)
		if err != nil {
			c.volatile = true
			return
		}
		for _, folder := range folders {
			c.stamp(folder)
		}
	}
}

func hasMeta(s string) bool {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '*', '?', '[':
			return true
		}
	}
	return false
}

func unescape(s string) string {
	if filepath.Separator == '\\' || strings.IndexByte(s, '\\') < 0 {
		return s
	}
	var b bytes.Buffer
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func escapeMeta(s string) string {
	if filepath.Separator == '\\' {
		return s
	}
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// privateDir makes a folder that only this user can enter.
func privateDir() (string, error) {
	base := os.TempDir()
	if run := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(run) {
		if info, err := os.Stat(run); err == nil && info.IsDir() && info.Mode().Perm()&0o077 == 0 {
			base = run
		}
	}
	dir, err := os.MkdirTemp(base, "muxproxy-config-")
	if err != nil && base != os.TempDir() && !errors.Is(err, fs.ErrExist) {
		dir, err = os.MkdirTemp("", "muxproxy-config-")
	}
	if err != nil {
		return "", fmt.Errorf("no place for a private copy of ssh's configuration: %w", err)
	}
	return dir, nil
}
