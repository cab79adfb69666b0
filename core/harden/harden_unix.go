//go:build unix

package harden

import (
	"fmt"

	"golang.org/x/sys/unix"
)

func private() error {
	unix.Umask(0o077)
	var core unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_CORE, &core)
	if err == nil {
		core.Cur = 0
		err = unix.Setrlimit(unix.RLIMIT_CORE, &core)
	}
	if err != nil {
		return fmt.Errorf("can't rule out core files: setrlimit: %w", err)
	}
	return nil
}
