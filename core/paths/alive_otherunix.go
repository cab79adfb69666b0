//go:build unix && !linux

package paths

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Alive reports whether a process of this pid exists.
func Alive(pid int) bool { return pid > 0 && !errors.Is(unix.Kill(pid, 0), unix.ESRCH) }
