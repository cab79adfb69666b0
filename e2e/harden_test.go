//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// somebody is a user without privileges: whoever runs the tests or, for root, whom nobody could keep out, another one.
type somebody struct {
	t   *testing.T
	dir string
	sys *syscall.SysProcAttr
}

func newSomebody(t *testing.T) *somebody {
	t.Helper()
	dir, err := os.MkdirTemp("", "mx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	// go test's own folder is closed to others.
	if err := writeProgram(filepath.Join(dir, "helper"), self); err != nil {
		t.Fatal(err)
	}
	s := &somebody{t: t, dir: dir}
	if os.Geteuid() == 0 {
		const nobody = 65534
		s.sys = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		if err := os.Chown(dir, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *somebody) start(env string, args ...string) *proc {
	s.t.Helper()
	return start(s.t, spec{
		args: args, dir: "/", sys: s.sys,
		env: []string{env, "HOME=" + s.dir, "XDG_RUNTIME_DIR=" + s.dir, "PATH=" + os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0"},
	})
}

func (s *somebody) helper(role string, args ...string) *proc {
	s.t.Helper()
	return s.start("E2E_HELPER="+role, append([]string{filepath.Join(s.dir, "helper")}, args...)...)
}

func (s *somebody) master() *proc {
	s.t.Helper()
	p := s.start("MUXPROXY_DEBUG=", filepath.Join(binDir, "muxproxyd"), "master")
	s.t.Cleanup(func() {
		p.cmd.Process.Signal(syscall.SIGTERM)
		p.wait(patience)
	})
	p.expectErr("master is ready")
	return p
}

// attacks is what another process of its user can do to a process: "done", or why not.
func (s *somebody) attacks(pid int) map[string]string {
	s.t.Helper()
	r := s.helper("attack", strconv.Itoa(pid)).wait(patience)
	if r.status != 0 {
		s.t.Fatalf("the attacker: status %d: %s", r.status, r.err)
	}
	said := map[string]string{}
	for line := range strings.Lines(r.out) {
		what, how, _ := strings.Cut(strings.TrimSpace(line), ": ")
		said[what] = how
	}
	return said
}

// yama is the kernel's ptrace_scope: from 2 on it keeps processes of a user from attaching to each other by itself.
func yama() int {
	b, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope")
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return n
}

func TestTheSameUserCannotGetIntoTheMaster(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	t.Parallel()
	s := newSomebody(t)
	v := s.helper("victim")
	v.expect("ready\n")
	attaching := []string{"ptrace", "pidfd_getfd", "mem"}
	reading := []string{"environ", "maps", "fd"}
	said := s.attacks(v.pid())
	for _, what := range reading {
		if said[what] != "done" {
			t.Errorf("%s of an ordinary process: %q", what, said[what])
		}
	}
	for _, what := range attaching {
		if said[what] != "done" && yama() < 2 {
			t.Errorf("%s of an ordinary process: %q", what, said[what])
		}
	}
	v.in.Close()
	v.wait(patience)

	m := s.master()
	said = s.attacks(m.pid())
	for _, what := range append(attaching, reading...) {
		if !strings.HasPrefix(said[what], "denied") {
			t.Errorf("%s of the master: %q", what, said[what])
		}
	}
	for file, want := range map[string]string{"limits": "Max core file size 0 ", "status": "Umask: 0077 "} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", m.pid(), file))
		if err != nil || !strings.Contains(strings.Join(strings.Fields(string(b)), " "), want) {
			t.Errorf("no %q in the master's %s (%v):\n%s", want, file, err, b)
		}
	}
}

func TestAMasterThatIsTracedDoesNotStart(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	t.Parallel()
	s := newSomebody(t)
	r := s.helper("trace", filepath.Join(binDir, "muxproxyd"), "master").wait(patience)
	if r.status != 255 {
		t.Errorf("status %d", r.status)
	}
	if n := strings.Count(r.err, "\n"); n != 1 || !strings.Contains(r.err, "a debugger or strace is attached") {
		t.Errorf("it said %q", r.err)
	}
}

// victim is an ordinary process that lets every process of its user attach.
func victim() int {
	if err := unix.Prctl(unix.PR_SET_PTRACER, ^uintptr(0), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) { // no Yama
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// attack tries what a process can do to another one of its user.
func attack(args []string) int {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	open := func(name string) func() error {
		return func() error {
			f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
			if err != nil {
				return err
			}
			return f.Close()
		}
	}
	for what, do := range map[string]func() error{
		"ptrace":      func() error { return attachOnce(pid) },
		"pidfd_getfd": func() error { return takeFD(pid) },
		"mem":         open("mem"),
		"environ":     open("environ"),
		"maps":        open("maps"),
		"fd":          open("fd"),
	} {
		err := do()
		switch {
		case err == nil:
			fmt.Printf("%s: done\n", what)
		case errors.Is(err, os.ErrPermission):
			fmt.Printf("%s: denied (%v)\n", what, err)
		default:
			fmt.Printf("%s: %v\n", what, err)
		}
	}
	return 0
}

func attachOnce(pid int) error {
	runtime.LockOSThread() // what a thread traces is its own
	defer runtime.UnlockOSThread()
	if err := unix.PtraceAttach(pid); err != nil {
		return err
	}
	if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
		return err
	}
	return unix.PtraceDetach(pid)
}

// takeFD copies a process's stderr.
func takeFD(pid int) error {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, 2, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// trace runs a program as strace would, and ends with its status.
func trace(args []string) int {
	runtime.LockOSThread()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	first := true
	for {
		var ws unix.WaitStatus
		_, err := unix.Wait4(cmd.Process.Pid, &ws, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			fmt.Fprintln(os.Stderr, err)
			return 1
		case ws.Exited():
			return ws.ExitStatus()
		case ws.Signaled():
			return 128 + int(ws.Signal())
		}
		sig := int(ws.StopSignal())
		if first { // the trap of execve(2)
			first, sig = false, 0
		}
		if err := unix.PtraceCont(cmd.Process.Pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
}

// A container or sandbox of the same uid would get out by the master.
func TestACallerInOtherNamespacesIsRefused(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	const user, pid, mnt = syscall.CLONE_NEWUSER, syscall.CLONE_NEWPID, syscall.CLONE_NEWNS
	forEach(t, func(t *testing.T, w *world) {
		p := w.hold()
		for _, c := range []struct {
			name    string
			flags   uintptr
			refused bool
		}{
			{"all three", user | pid | mnt, true},
			{"user", user, true},
			{"user and pid", user | pid, true},
			{"user and mount", user | mnt, true},
			{"pid", pid, true},
			{"mount", mnt, true},
			{"uts and ipc", syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC, false},
		} {
			sys := &syscall.SysProcAttr{Cloneflags: c.flags}
			if c.flags&user != 0 {
				sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
				sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
			}
			probe := exec.Command("true")
			probe.SysProcAttr = sys
			if err := probe.Run(); err != nil {
				t.Logf("%s: this user can't make such namespaces here: %v", c.name, err)
				continue
			}
			r := w.run(spec{args: w.sshArgs("box", "echo in"), null: true, sys: sys})
			if !c.refused {
				want(t, r, 0, "in\n")
				continue
			}
			want(t, r, 255, "")
			if line := oneLine(t, r); !strings.Contains(line, "namespace") || !strings.Contains(line, "MUXPROXY_BYPASS=1") {
				t.Errorf("%s: %q", c.name, line)
			}
		}
		p.echo("still here")
		p.release()
		w.connections(1)
	})
}
