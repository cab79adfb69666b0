package use

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ReadCaller asks the kernel who is at the other end of conn. It fails only if the kernel doesn't say the uid. A process
// that has ended, or that this user may not look into, ends the chain early or leaves fields empty; without permission
// to read an executable its name stands in brackets, as in ps(1). Processes is empty if the peer itself has gone or
// lives in a pid namespace that can't be seen from here.
//
// Where the kernel has SO_PEERPIDFD (Linux 6.5) the pid is known to be the peer's for as long as reading takes. Before
// that, a peer that hands its socket to a child and ends can have its pid taken by another process of any user.
func ReadCaller(conn *net.UnixConn) (Caller, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Caller{}, fmt.Errorf("read the peer's identity: %w", err)
	}
	var cred *unix.Ucred
	pidfd := -1
	err2 := raw.Control(func(fd uintptr) {
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			return
		}
		// An older kernel says ENOPROTOOPT, and one whose peer is gone ESRCH or EINVAL; alive then finds out.
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
			pidfd = n
		}
	})
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	if err = errors.Join(err, err2); err != nil {
		return Caller{}, fmt.Errorf("read the peer's identity: %w", err)
	}
	caller := Caller{UID: int(cred.Uid)}
	if cred.Pid <= 0 {
		return caller, nil
	}
	chain := proc{root: "/proc"}.chain(int(cred.Pid))
	alive := false
	if pidfd >= 0 {
		alive = !ready(pidfd, unix.POLLIN) // readable: the process has ended (pidfd_open(2))
	} else if raw.Control(func(fd uintptr) { alive = !ready(int(fd), unix.POLLRDHUP) }) != nil {
		alive = false
	}
	if alive {
		caller.Processes = chain
	}
	return caller, nil
}

// ready reports whether fd has one of events, or an error or hang-up, now.
func ready(fd int, events int16) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, 0)
		if err != unix.EINTR {
			return err != nil || n > 0
		}
	}
}

// SameNamespaces reports whether p lives in the user, pid and mount namespaces of this process. An error means that it
// has ended, or that it may not be looked into.
func SameNamespaces(p Process) (bool, error) { return proc{root: "/proc"}.sameNamespaces(p) }

func (r proc) sameNamespaces(p Process) (bool, error) {
	same := true
	for _, ns := range []string{"user", "pid", "mnt"} {
		mine, err := r.link("self", "ns/"+ns)
		if err != nil {
			return false, fmt.Errorf("read own %s namespace: %w", ns, err)
		}
		theirs, err := r.link(strconv.Itoa(p.PID), "ns/"+ns)
		if err != nil {
			return false, fmt.Errorf("read the %s namespace of process %d: %w", ns, p.PID, err)
		}
		same = same && mine == theirs
	}
	if st, err := r.stat(p.PID); err != nil || st.start != p.Start {
		return false, fmt.Errorf("process %d has ended", p.PID)
	}
	return same, nil
}

// proc reads processes from a proc(5) file system.
type proc struct {
	root     string
	readlink func(string) (string, error) // nil: os.Readlink
}

type stat struct {
	comm          string
	ppid, session int
	tty           uint64
	start         uint64
}

func (r proc) path(pid, name string) string { return filepath.Join(r.root, pid, name) }

func (r proc) link(pid, name string) (string, error) {
	if r.readlink != nil {
		return r.readlink(r.path(pid, name))
	}
	return os.Readlink(r.path(pid, name))
}

// read returns at most limit bytes of a file.
func (r proc) read(pid int, name string, limit int64) ([]byte, error) {
	f, err := os.Open(r.path(strconv.Itoa(pid), name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

func (r proc) stat(pid int) (stat, error) {
	b, err := r.read(pid, "stat", 4096)
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// parseStat reads a line of /proc/PID/stat (proc_pid_stat(5)). The name is whatever the process likes, with parentheses,
// spaces and newlines; the last ")" ends it.
func parseStat(b []byte) (stat, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return stat{}, errors.New("stat: no process name")
	}
	f := strings.Fields(string(b[end+1:])) // f[0] is field 3, state
	if len(f) < 20 {
		return stat{}, fmt.Errorf("stat: %d fields after the name, want at least 20", len(f))
	}
	s := stat{comm: string(b[open+1 : end])}
	var errs [4]error
	s.ppid, errs[0] = strconv.Atoi(f[1])
	s.session, errs[1] = strconv.Atoi(f[3])
	tty, err := strconv.ParseInt(f[4], 10, 64) // an int to the kernel: negative for minors of more than 19 bits
	s.tty, errs[2] = uint64(uint32(tty)), err
	s.start, errs[3] = strconv.ParseUint(f[19], 10, 64)
	return s, errors.Join(errs[:]...)
}

// process reads one process. It fails if the process ends, or its pid gets another process, meanwhile.
func (r proc) process(pid int) (Process, stat, error) {
	st, err := r.stat(pid)
	if err != nil {
		return Process{}, stat{}, err
	}
	p := Process{PID: pid, Start: st.start, TTY: r.ttyName(st.tty)}
	id := strconv.Itoa(pid)
	if p.Exe, err = r.link(id, "exe"); err != nil {
		p.Exe = "[" + st.comm + "]"
	}
	if b, err := r.read(pid, "cmdline", maxArgsBytes); err == nil && len(b) > 0 {
		p.Args = strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
	}
	p.Cwd, _ = r.link(id, "cwd") // "" if not allowed
	again, err := r.stat(pid)
	if err == nil && again.start != st.start {
		err = fmt.Errorf("process %d has ended", pid)
	}
	return p, again, err
}

// chain reads pid and its parents, up to and including the leader of its session. It ends early where a process has
// ended or the session does: the parent of an orphan is a stranger (init, or a subreaper).
func (r proc) chain(pid int) []Process {
	p, st, err := r.process(pid)
	if err != nil {
		return nil
	}
	chain := []Process{p}
	session := st.session
	for len(chain) < maxProcesses && p.PID != session && st.ppid > 0 {
		parent, pst, err := r.process(st.ppid)
		if err != nil || pst.session != session || parent.Start > p.Start {
			break
		}
		// While the child still calls this pid its parent, it has not been given to another process.
		if now, err := r.stat(p.PID); err != nil || now.start != p.Start || now.ppid != parent.PID {
			break
		}
		chain = append(chain, parent)
		p, st = parent, pst
	}
	return chain
}

// ttyName names the terminal device of a tty_nr (minor in bits 31 to 20 and 7 to 0, major in those between), "" for none
// or one without a name.
func (r proc) ttyName(nr uint64) string {
	if nr == 0 {
		return ""
	}
	major, minor := nr>>8&0xfff, nr&0xff|nr>>12&0xfff00
	switch { // Documentation/admin-guide/devices.txt
	case major == 136: // the only one of 136 to 143 that Linux still uses
		return fmt.Sprintf("/dev/pts/%d", minor)
	case major == 4 && minor < 64:
		return fmt.Sprintf("/dev/tty%d", minor)
	case major == 4:
		return fmt.Sprintf("/dev/ttyS%d", minor-64)
	}
	// Everything else (ttyUSB0, hvc0, ttyAMA0) has the name that its driver chose.
	target, err := os.Readlink(filepath.Join(filepath.Dir(r.root), "sys/dev/char", fmt.Sprintf("%d:%d", major, minor)))
	if err != nil {
		return ""
	}
	return "/dev/" + filepath.Base(target)
}

// ReadEnv reads the named variables of the environment that p was started with. What is not there is absent; the same
// goes for a process that has ended or that this user may not look into.
func ReadEnv(p Process, names []string) map[string]string { return proc{root: "/proc"}.env(p, names) }

func (r proc) env(p Process, names []string) map[string]string {
	if len(names) == 0 {
		return nil
	}
	environ, err := r.read(p.PID, "environ", maxEnviron)
	if err != nil {
		return nil
	}
	if st, err := r.stat(p.PID); err != nil || st.start != p.Start {
		return nil // another process's
	}
	return pickEnv(environ, names)
}

// Chain is a process and its parents, as ReadCaller would have them; nil if there is none of that number.
func Chain(pid int) []Process { return proc{root: "/proc"}.chain(pid) }

// Self is this process and its parents, as ReadCaller would have it.
func Self() Caller {
	return Caller{UID: os.Geteuid(), Processes: proc{root: "/proc"}.chain(os.Getpid())}
}
