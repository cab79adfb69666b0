//go:build unix

package demo

import (
	"os/exec"
	"syscall"
)

// apart keeps what the terminal sends to this program's process group, ^C for instance, away from a command.
func apart(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
