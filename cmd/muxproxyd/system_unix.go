//go:build unix

package main

import (
	"errors"

	"golang.org/x/sys/unix"
)

// setUmask makes every file that the master creates private to its user.
func setUmask() { unix.Umask(0o077) }

// alive reports whether a process of this pid exists.
func alive(pid int) bool { return pid > 0 && !errors.Is(unix.Kill(pid, 0), unix.ESRCH) }
