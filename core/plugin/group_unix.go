//go:build unix

package plugin

import (
	"os"

	"golang.org/x/sys/unix"
)

// endGroup ends what this process started, a dialog for example, and itself: the master may be gone and can't. It returns
// if this process does not lead its group: then others than its children are in it.
func endGroup() {
	if unix.Getpgrp() == os.Getpid() {
		_ = unix.Kill(0, unix.SIGKILL)
	}
}
