package use

import (
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary plays the processes of a chain: leader -> middle -> client, or one that connects and leaves at once.
func TestMain(m *testing.M) {
	role, socket := os.Getenv("USE_TEST_ROLE"), os.Getenv("USE_TEST_SOCKET")
	switch role {
	case "":
		os.Exit(m.Run())
	case "leader", "middle":
		next := map[string]string{"leader": "middle", "middle": "client"}[role]
		exe, err := os.Executable()
		if err != nil {
			panic(err)
		}
		cmd := exec.Command(exe, next, "with an argument")
		cmd.Env = append(os.Environ(), "USE_TEST_ROLE="+next)
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, role, err)
			os.Exit(1)
		}
	case "client", "hasty":
		c, err := net.Dial("unix", socket)
		if err != nil {
			panic(err)
		}
		if role == "client" {
			io.Copy(io.Discard, c) // until the test closes it
		}
	}
	os.Exit(0)
}

func listen(t *testing.T) *net.UnixListener {
	t.Helper()
	dir, err := os.MkdirTemp("", "use") // t.TempDir's names are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func helper(t *testing.T, role string, l *net.UnixListener) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, role)
	// The race detector makes every process sleep for a second before it ends.
	cmd.Env = append(os.Environ(), "USE_TEST_ROLE="+role, "USE_TEST_SOCKET="+l.Addr().String(), "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	return cmd
}

func accept(t *testing.T, l *net.UnixListener) *net.UnixConn {
	t.Helper()
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// openPTY returns both ends of a pseudo-terminal and the name of its terminal end.
func openPTY(t *testing.T) (ptmx, tty *os.File, name string) {
	t.Helper()
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ptmx.Close() })
	if err := unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	name = "/dev/pts/" + strconv.Itoa(n)
	tty, err = os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	return ptmx, tty, name
}

func TestReadCallerChain(t *testing.T) {
	l := listen(t)
	_, tty, name := openPTY(t)
	cmd := helper(t, "leader", l)
	cmd.Dir = t.TempDir()
	cmd.Stdin = tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn := accept(t, l)
	caller, err := ReadCaller(conn)
	if err != nil {
		t.Fatal(err)
	}
	same, nsErr := false, error(nil)
	if len(caller.Processes) > 0 {
		same, nsErr = SameNamespaces(caller.Processes[0])
	}
	conn.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}

	if caller.UID != os.Geteuid() || len(caller.Processes) != 3 {
		t.Fatalf("%+v: want this uid and three processes", caller)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cwd, err := filepath.EvalSymlinks(cmd.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range [][]string{{exe, "client", "with an argument"}, {exe, "middle", "with an argument"}, {exe, "leader"}} {
		p := caller.Processes[i]
		if p.Exe != exe || !slices.Equal(p.Args, want) || p.Cwd != cwd || p.TTY != name || p.Start == 0 {
			t.Errorf("process %d: %+v, want args %q, cwd %s, tty %s", i, p, want, cwd, name)
		}
	}
	if pid := caller.Processes[2].PID; pid != cmd.Process.Pid {
		t.Errorf("the leader is %d, want %d", pid, cmd.Process.Pid)
	}
	if nsErr != nil || !same {
		t.Errorf("SameNamespaces: %v, %v", same, nsErr)
	}
	if _, err := SameNamespaces(caller.Processes[0]); err == nil {
		t.Error("SameNamespaces of a process that has ended")
	}
}

func TestReadCallerGone(t *testing.T) {
	l := listen(t)
	if err := helper(t, "hasty", l).Run(); err != nil {
		t.Fatal(err)
	}
	caller, err := ReadCaller(accept(t, l))
	if err != nil || caller.UID != os.Geteuid() || len(caller.Processes) != 0 {
		t.Errorf("%+v, %v: want the uid alone", caller, err)
	}
}

func TestReadCallerClosed(t *testing.T) {
	l := listen(t)
	mine, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	mine.Close()
	if c, err := ReadCaller(mine); err == nil {
		t.Errorf("a closed socket has the caller %+v", c)
	}
}

// fakeProc is a proc file system in a folder.
type fakeProc struct {
	t    *testing.T
	root string
}

func newFakeProc(t *testing.T) fakeProc { return fakeProc{t, filepath.Join(t.TempDir(), "proc")} }

type fake struct {
	pid, ppid, session int
	start              uint64
	tty                int32
	comm, exe          string
	args               string
}

func (f fakeProc) put(p fake) {
	f.t.Helper()
	dir := filepath.Join(f.root, strconv.Itoa(p.pid))
	if err := os.RemoveAll(dir); err != nil {
		f.t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		f.t.Fatal(err)
	}
	stat := fmt.Sprintf("%d (%s) S %d %d %d %d -1 4194304 100 0 0 0 0 0 0 0 20 0 1 0 %d 3133440 412\n",
		p.pid, p.comm, p.ppid, p.session, p.session, p.tty, p.start)
	for name, text := range map[string]string{"stat": stat, "cmdline": p.args} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			f.t.Fatal(err)
		}
	}
	if p.exe != "" {
		f.link(p.exe, filepath.Join(dir, "exe"))
	}
	f.link("/home/alice", filepath.Join(dir, "cwd"))
}

func (f fakeProc) link(target, name string) {
	f.t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		f.t.Fatal(err)
	}
	os.Remove(name)
	if err := os.Symlink(target, name); err != nil {
		f.t.Fatal(err)
	}
}

// during runs change once, in the middle of reading pid.
func (f fakeProc) during(pid int, change func()) proc {
	done := false
	return proc{root: f.root, readlink: func(path string) (string, error) {
		if strings.HasPrefix(path, filepath.Join(f.root, strconv.Itoa(pid))+"/") && !done {
			done = true
			change()
		}
		return os.Readlink(path)
	}}
}

func TestChain(t *testing.T) {
	bridge := fake{pid: 40, ppid: 30, session: 20, start: 400, comm: "muxproxy", exe: "/usr/bin/muxproxy"}
	ssh := fake{pid: 30, ppid: 20, session: 20, start: 300, comm: "ssh", exe: "/usr/bin/ssh"}
	zsh := fake{pid: 20, ppid: 10, session: 20, start: 200, comm: "zsh", exe: "/usr/bin/zsh"}
	kitty := fake{pid: 10, ppid: 1, session: 10, start: 100, comm: "kitty", exe: "/usr/bin/kitty"}
	with := func(p fake, change func(*fake)) fake { change(&p); return p }
	for _, c := range []struct {
		name   string
		have   []fake
		pid    int         // in whose middle
		change func() fake // it becomes this
		want   string
	}{
		{"whole", []fake{bridge, ssh, zsh, kitty}, 0, nil, "muxproxy (40) <- ssh <- zsh"},
		{"the peer is gone", []fake{ssh, zsh}, 0, nil, "uid 1000"},
		{"a parent is gone", []fake{bridge, zsh}, 0, nil, "muxproxy (40)"},
		{"an orphan's parent is a stranger",
			[]fake{with(bridge, func(p *fake) { p.ppid = 10 }), kitty}, 0, nil, "muxproxy (40)"},
		{"no permission to read a parent's executable",
			[]fake{bridge, ssh, with(zsh, func(p *fake) { p.exe = "" })}, 0, nil, "muxproxy (40) <- ssh <- [zsh]"},
		{"a name with parentheses",
			[]fake{bridge, with(ssh, func(p *fake) { p.comm, p.exe = "a) S 1 1 (\nb", "" }), zsh}, 0, nil,
			`muxproxy (40) <- [a) S 1 1 (\nb] <- zsh`},
		{"an executable's name with controls",
			[]fake{with(bridge, func(p *fake) { p.exe = "/tmp/\x1b[2Jgit\u202e" }), ssh, zsh}, 0, nil,
			`\x1b[2Jgit\u202e (40) <- ssh <- zsh`},
		{"the peer's pid is reused while it is read", []fake{bridge, ssh, zsh}, 40,
			func() fake { return with(bridge, func(p *fake) { p.start, p.exe = 900, "/usr/bin/other" }) }, "uid 1000"},
		{"a parent's pid is reused while it is read", []fake{bridge, ssh, zsh}, 30,
			func() fake { return with(ssh, func(p *fake) { p.start = 901 }) }, "muxproxy (40)"},
		{"the child loses its parent while that is read", []fake{bridge, ssh, zsh}, 30,
			func() fake { return with(bridge, func(p *fake) { p.ppid = 1 }) }, "muxproxy (40)"},
		{"a parent is younger than its child",
			[]fake{bridge, with(ssh, func(p *fake) { p.start = 401 }), zsh}, 0, nil, "muxproxy (40)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFakeProc(t)
			for _, p := range c.have {
				f.put(p)
			}
			r := proc{root: f.root}
			if c.change != nil {
				r = f.during(c.pid, func() { f.put(c.change()) })
			}
			if got := (Caller{UID: 1000, Processes: r.chain(40)}).String(); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}

func TestChainBounds(t *testing.T) {
	f := newFakeProc(t)
	for i := 1; i <= 100; i++ {
		f.put(fake{pid: i, ppid: i - 1, session: 1, start: uint64(i), comm: "sh", exe: "/bin/sh", args: strings.Repeat("x\x00", 9000)})
	}
	chain := proc{root: f.root}.chain(100)
	if len(chain) != maxProcesses || chain[0].PID != 100 {
		t.Fatalf("%d processes, first %d", len(chain), chain[0].PID)
	}
	if n := len(chain[0].Args); n != maxArgsBytes/2 {
		t.Errorf("%d arguments, want %d", n, maxArgsBytes/2)
	}
}

func TestTTYName(t *testing.T) {
	f := newFakeProc(t)
	char := filepath.Join(filepath.Dir(f.root), "sys/dev/char")
	f.link("../../devices/virtual/tty/hvc0", filepath.Join(char, "229:0"))
	r := proc{root: f.root}
	for nr, want := range map[int32]string{
		0:                          "",
		136<<8 | 5:                 "/dev/pts/5",
		1<<20 | 136<<8 | 0x2c:      "/dev/pts/300",
		-1<<31 | 136<<8:            "/dev/pts/524288",
		4<<8 | 1:                   "/dev/tty1",
		4<<8 | 64:                  "/dev/ttyS0",
		229 << 8:                   "/dev/hvc0",
		188<<8 | 3 /* no entry */ : "",
	} {
		f.put(fake{pid: 9, session: 9, start: 1, tty: nr, comm: "x"})
		if chain := r.chain(9); len(chain) != 1 || chain[0].TTY != want {
			t.Errorf("tty_nr %d: %+v, want %q", nr, chain, want)
		}
	}
}

func TestSameNamespaces(t *testing.T) {
	peer := fake{pid: 40, session: 40, start: 400, comm: "ssh"}
	for _, c := range []struct {
		name  string
		ns    map[string]string // of 40, where it differs; "" for unreadable
		start uint64
		same  bool
		fails bool
	}{
		{"same", nil, 400, true, false},
		{"user", map[string]string{"user": "user:[9]"}, 400, false, false},
		{"pid", map[string]string{"pid": "pid:[9]"}, 400, false, false},
		{"mnt", map[string]string{"mnt": "mnt:[9]"}, 400, false, false},
		{"net does not count", map[string]string{"net": "net:[9]"}, 400, true, false},
		{"unreadable", map[string]string{"mnt": ""}, 400, false, true},
		{"another process by now", nil, 399, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFakeProc(t)
			f.put(peer)
			for _, ns := range []string{"user", "pid", "mnt", "net"} {
				f.link(ns+":[1]", filepath.Join(f.root, "self/ns", ns))
				theirs, differs := c.ns[ns]
				if !differs {
					theirs = ns + ":[1]"
				}
				if theirs != "" {
					f.link(theirs, filepath.Join(f.root, "40/ns", ns))
				}
			}
			same, err := proc{root: f.root}.sameNamespaces(Process{PID: 40, Start: c.start})
			if same != c.same || (err != nil) != c.fails {
				t.Errorf("%v, %v", same, err)
			}
		})
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (init) S 0 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 5 1 1"))
	f.Add([]byte("1 (a) b) S 0 1 1 34816 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 18446744073709551615"))
	f.Add([]byte(") ("))
	f.Add([]byte("1 (x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseStat(b)
		if err == nil && !strings.Contains(string(b), "("+s.comm+")") {
			t.Errorf("%q: name %q", b, s.comm)
		}
	})
}

// The variables that were asked for, of a process that is still the same.
func TestReadEnv(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	cmd.Env = []string{"CI=1", "EMPTY=", "CI=2", "SECRET=x", "ODD"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	r := proc{root: "/proc"}
	p := Process{PID: cmd.Process.Pid}
	for p.Start == 0 || len(r.env(p, []string{"SECRET"})) == 0 { // until it has become sleep
		if st, err := r.stat(p.PID); err != nil {
			t.Fatal(err)
		} else {
			p.Start = st.start
		}
	}
	got := ReadEnv(p, []string{"CI", "EMPTY", "ODD", "HOME"})
	if want := map[string]string{"CI": "2", "EMPTY": ""}; !maps.Equal(got, want) { // os/exec keeps the last of two
		t.Errorf("%q, want %q", got, want)
	}
	if got := ReadEnv(p, nil); got != nil {
		t.Errorf("none asked for: %q", got)
	}
	p.Start++
	if got := ReadEnv(p, []string{"CI"}); got != nil {
		t.Errorf("of another process: %q", got)
	}
}

func TestPickEnv(t *testing.T) {
	got := pickEnv([]byte("A=1\x00B=x=y\x00A=2\x00=C\x00D\x00E="), []string{"A", "B", "D", "E", ""})
	if want := map[string]string{"A": "1", "B": "x=y", "E": "", "": "C"}; !maps.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestSelf(t *testing.T) {
	c := Self()
	if len(c.Processes) == 0 || c.Processes[0].PID != os.Getpid() || c.UID != os.Geteuid() {
		t.Errorf("%+v", c)
	}
	if p, ok := c.Client(); !ok || len(c.Processes) > 1 && p.PID != os.Getppid() {
		t.Errorf("%+v", p)
	}
}
