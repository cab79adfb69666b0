package confirm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// maxAncestors bounds what is shown above a session leader.
const maxAncestors = 4

// maxEnviron bounds what is read of an environment, which can have any size.
const maxEnviron = 4 << 20

// held is a process that answers are bound to.
type held struct {
	fd int // a pidfd; -1: the kernel has none (before Linux 5.3)
	p  plugin.Process
}

// hold binds to a process. It fails if that has ended.
func hold(p plugin.Process) (*held, error) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) { // EPERM: of a container's filter
		return nil, fmt.Errorf("process %d: %w", p.PID, err)
	}
	if err != nil {
		fd = -1
	}
	h := &held{fd, p}
	// The pidfd is of whatever had the pid when it was opened.
	if !same(p) || !h.alive() {
		h.release()
		return nil, fmt.Errorf("process %d has ended", p.PID)
	}
	return h, nil
}

// alive reports whether the process has not ended.
func (h *held) alive() bool {
	if h.fd < 0 {
		return same(h.p)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(h.fd), Events: unix.POLLIN}}, 0) // readable: it has ended (pidfd_open(2))
		if err != unix.EINTR {
			return err == nil && n == 0
		}
	}
}

// release is called once.
func (h *held) release() {
	if h.fd >= 0 {
		unix.Close(h.fd)
	}
}

// leads reports whether a process leads its session.
func leads(p plugin.Process) bool {
	sid, err := unix.Getsid(p.PID)
	return err == nil && sid == p.PID
}

// same reports whether the process with p's pid is p.
func same(p plugin.Process) bool {
	_, start, err := stat(p.PID)
	return err == nil && start == p.Start
}

// stat reads from /proc/PID/stat (proc_pid_stat(5)). The name in it is whatever the process likes; the last ")" ends it.
func stat(pid int) (parent int, start uint64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // f[0] is field 3
	if len(f) < 20 {
		return 0, 0, errors.New("a short line")
	}
	if f[0] == "Z" || f[0] == "X" {
		return 0, 0, errors.New("it has ended")
	}
	parent, err = strconv.Atoi(f[1])
	if err == nil {
		start, err = strconv.ParseUint(f[19], 10, 64)
	}
	return parent, start, err
}

// ancestors are the parents of the last process of a chain, which ends with its session: the terminal, for one. They are
// for a person to read.
func ancestors(chain []plugin.Process) (above []plugin.Process) {
	if len(chain) == 0 {
		return nil
	}
	for child := chain[len(chain)-1]; len(above) < maxAncestors; {
		pid, start, err := stat(child.PID)
		if err != nil || start != child.Start || pid <= 1 {
			return above
		}
		p := plugin.Process{PID: pid}
		if _, p.Start, err = stat(pid); err != nil || p.Start > child.Start {
			return above
		}
		id := strconv.Itoa(pid)
		if p.Exe, err = os.Readlink("/proc/" + id + "/exe"); err != nil {
			comm, err := os.ReadFile("/proc/" + id + "/comm")
			if err != nil {
				return above
			}
			p.Exe = "[" + strings.TrimSuffix(string(comm), "\n") + "]"
		}
		if base(p) == "systemd" { // it starts everything
			return above
		}
		above = append(above, p)
		child = p
	}
	return above
}

// environ reads variables of the environment that the first process of a chain was started with that still lives.
func environ(chain []plugin.Process, names []string) ([]string, error) {
	for _, p := range chain {
		f, err := os.Open("/proc/" + strconv.Itoa(p.PID) + "/environ")
		if err != nil {
			continue
		}
		b, err := io.ReadAll(io.LimitReader(f, maxEnviron))
		f.Close()
		if err != nil || !same(p) { // after reading: it is p's
			continue
		}
		var out []string
		for v := range strings.SplitSeq(string(b), "\x00") {
			name, value, ok := strings.Cut(v, "=")
			for _, n := range names {
				if ok && n == name && value != "" {
					out = append(out, v)
				}
			}
		}
		return out, nil
	}
	return nil, errors.New("whoever asks has gone, or may not be looked into")
}
