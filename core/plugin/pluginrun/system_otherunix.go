//go:build unix && !linux

package pluginrun

import (
	"os/exec"
	"syscall"
)

// startApart starts cmd in a session of its own: other plugins can't move into its process group then (setpgid(2)).
func startApart(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}

// awaitEnd can't here.
func awaitEnd(int) bool { return false }
