package harden

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// denyTracing uses PT_DENY_ATTACH of ptrace(2): the kernel ends this process if it is traced already, and whoever
// attaches later.
func denyTracing() error {
	if err := unix.PtraceDenyAttach(); err != nil {
		return fmt.Errorf("can't keep other processes of this user out: PT_DENY_ATTACH: %w", err)
	}
	return nil
}
