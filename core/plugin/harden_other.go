//go:build unix && !linux

package plugin

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// harden makes files private and leaves no core.
func harden() error {
	unix.Umask(0o077)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switch off core files: %w", err)
	}
	return nil
}
