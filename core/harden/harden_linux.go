package harden

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// denyTracing first closes the door, then looks who is inside already.
func denyTracing() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("can't keep other processes of this user out: PR_SET_DUMPABLE: %w", err)
	}
	return checkTracers("/proc/self/task")
}

// checkTracers looks at every thread, since ptrace(2) attaches to one at a time. A tracer outside this process's pid
// namespace is not seen: there it has the number 0.
func checkTracers(dir string) error {
	const unknown = "can't find out whether this process is traced: %w"
	threads, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf(unknown, err)
	}
	for _, t := range threads {
		status, err := os.ReadFile(filepath.Join(dir, t.Name(), "status"))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) { // it has ended
			continue
		}
		var tracer int
		if err == nil {
			tracer, err = tracerPid(status)
		}
		switch {
		case err != nil:
			return fmt.Errorf(unknown, err)
		case tracer != 0:
			return fmt.Errorf("%w: end process %d, or start this one without it", ErrTraced, tracer)
		}
	}
	return nil
}

// tracerPid reads /proc/PID/status, proc_pid_status(5): 0 for none.
func tracerPid(status []byte) (int, error) {
	for line := range bytes.Lines(status) {
		if rest, ok := strings.CutPrefix(string(line), "TracerPid:"); ok {
			return strconv.Atoi(strings.TrimSpace(rest))
		}
	}
	return 0, errors.New("no TracerPid in /proc/self/status")
}
