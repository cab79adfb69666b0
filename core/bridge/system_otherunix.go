//go:build unix && !linux

package bridge

import "golang.org/x/sys/unix"

// closeOnExec keeps what this process has inherited beyond its standard streams, as the log of ssh -E, from its children.
func closeOnExec() {
	for fd := 3; fd < 1024; fd++ {
		unix.CloseOnExec(fd)
	}
}
