//go:build unix

package plugin

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// endGroup ends what this process started, a dialog for example, and itself: the master may be gone and can't. It returns
// if this process does not lead its group: then others than its children are in it.
func endGroup() {
	if unix.Getpgrp() == os.Getpid() {
		_ = unix.Kill(0, unix.SIGKILL)
	}
}

// catchSIGPIPE makes writing to standard error fail when the master is gone, instead of ending this process before it has
// ended what it started. Signals that are caught are as ever in children, those that are ignored are not.
func catchSIGPIPE() { signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE) }
