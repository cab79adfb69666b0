package plugin

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// The master asked for SIGKILL at its death, which would leave this process's children behind; Serve sees to both. The
// setting is the first thread's alone (PR_SET_PDEATHSIG in prctl(2)), and only initialization is sure to run on that.
func init() {
	if os.Getenv(CookieKey) == CookieValue {
		_ = unix.Prctl(unix.PR_SET_PDEATHSIG, 0, 0, 0, 0) // fails for no number but a signal's that is none
	}
}

// harden keeps other processes of the same user out of this one, as ssh-agent does: what it learns and may do is more
// than they should.
func harden() error {
	unix.Umask(0o077)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switch off core files: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep others out: %w", err)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return fmt.Errorf("see who traces this process: %w", err)
	}
	_, tracer, _ := bytes.Cut(status, []byte("TracerPid:\t"))
	if !bytes.HasPrefix(tracer, []byte("0\n")) {
		return errors.New("another process traces this one")
	}
	return nil
}
