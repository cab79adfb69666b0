package use

import (
	"bytes"
	"slices"
)

// maxEnviron bounds what is read of a process's environment: Linux lets it and the arguments have a quarter of the
// stack's limit together, mostly 2 MiB.
const maxEnviron = 4 << 20

// pickEnv takes variables out of an environment as the kernel shows it, NAME=VALUE with a NUL byte behind each. Of a
// name that is there twice the first counts, as for getenv(3).
func pickEnv(environ []byte, names []string) map[string]string {
	found := map[string]string{}
	for pair := range bytes.SplitSeq(environ, []byte{0}) {
		name, value, ok := bytes.Cut(pair, []byte{'='})
		if !ok || !slices.Contains(names, string(name)) {
			continue
		}
		if _, twice := found[string(name)]; !twice {
			found[string(name)] = string(value)
		}
	}
	return found
}
