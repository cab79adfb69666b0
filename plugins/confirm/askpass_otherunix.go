//go:build unix && !linux

package confirm

import (
	"os/exec"
	"syscall"
)

// startGroup starts a program that leads a process group.
func startGroup(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd.Start()
}

// awaitEnd can't here: the group of a program that has ended by itself is left alone.
func awaitEnd(int) bool { return false }
