package paths

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the room in sockaddr_un, without the NUL at its end (unix(7)).
const maxSocketPath = 107

// sockaddr returns an address for bind(2) and connect(2) of name in dir, good until release is called. Where the path
// is too long it goes by way of an open directory.
func sockaddr(dir, name string) (addr string, release func(), err error) {
	if path := filepath.Join(dir, name); len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	addr = "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name
	if len(addr) > maxSocketPath {
		unix.Close(fd)
		return "", nil, fmt.Errorf("%s: longer than a socket's name can be", name)
	}
	return addr, func() { unix.Close(fd) }, nil
}

// fromOutside makes an address of sockaddr usable by other processes.
func fromOutside(addr string) string {
	if rest, ok := strings.CutPrefix(addr, "/proc/self/"); ok {
		return "/proc/" + strconv.Itoa(os.Getpid()) + "/" + rest
	}
	return addr
}
