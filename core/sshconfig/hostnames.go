package sshconfig

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// HostNames returns the names that Host lines give to hosts, sorted, each once: what can be typed after ssh. Lines are
// those of file and what it includes, or for "" of the user's and the system-wide configuration. Patterns are left out,
// and whatever can't be read or understood. No program is run: what a Match line says is not looked at.
func HostNames(file string) []string {
	names, err := LocalNames()
	if err != nil {
		return nil
	}
	return hostNames(names, systemConfig(), file)
}

func hostNames(names Names, system, file string) []string {
	c := &copier{names: names, includeHome: names.Home, system: system, seen: map[string]bool{}, busy: map[source]bool{}}
	if home := os.Getenv("HOME"); home != "" {
		c.includeHome = home
	}
	found := map[string]bool{}
	if file != "" {
		c.hostNames(source{file, true, false}, 0, found)
	} else {
		c.hostNames(source{filepath.Join(names.Home, ".ssh", "config"), true, true}, 0, found)
		c.hostNames(source{system, false, false}, 0, found)
	}
	return slices.Sorted(maps.Keys(found))
}

func (c *copier) hostNames(src source, depth int, found map[string]bool) {
	if c.busy[src] || depth > maxIncludes {
		return
	}
	c.busy[src] = true // for good: to read a file once is enough
	text, err := c.read(src.path)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(text)) {
		word, rest, ok := keyword(line)
		if !ok || word != "host" && word != "include" {
			continue
		}
		list, ok := words(rest)
		if !ok {
			continue
		}
		for _, w := range list {
			if word == "host" {
				if w != "" && !strings.ContainsAny(w, "*?!") {
					found[w] = true
				}
				continue
			}
			full, ok := c.includePattern(w, src)
			if !ok {
				continue
			}
			paths, err := filepath.Glob(full)
			if err != nil {
				continue
			}
			for _, path := range paths {
				c.hostNames(source{path, src.user, true}, depth+1, found)
			}
		}
	}
}
