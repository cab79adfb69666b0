//go:build !linux

package paths

import (
	"fmt"
	"path/filepath"
)

// maxSocketPath is the room in the smallest sockaddr_un around (BSD), without the NUL at its end.
const maxSocketPath = 103

func sockaddr(dir, name string) (addr string, release func(), err error) {
	path := filepath.Join(dir, name)
	if len(path) > maxSocketPath {
		return "", nil, fmt.Errorf("%s: longer than the %d bytes of a socket's path; set XDG_RUNTIME_DIR to a shorter one",
			path, maxSocketPath)
	}
	return path, func() {}, nil
}

func fromOutside(addr string) string { return addr }
