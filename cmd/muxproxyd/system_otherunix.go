//go:build unix && !linux

package main

import (
	"errors"

	"golang.org/x/sys/unix"
)

// alive reports whether a process of this pid exists.
func alive(pid int) bool { return pid > 0 && !errors.Is(unix.Kill(pid, 0), unix.ESRCH) }
