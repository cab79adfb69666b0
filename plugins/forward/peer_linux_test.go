package forward

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns both ends of a connection.
func pair(t *testing.T, network, address string) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near = dial(t, network, l.Addr().String())
	far, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	return near, far
}

func inodeOf(t *testing.T, c net.Conn) uint64 {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) })
	if err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// Both ways of asking say the same, for all kinds of addresses.
func TestPeer(t *testing.T) {
	for _, network := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0"} {
		near, far := pair(t, "tcp", network)
		its, other := addrPort(far.RemoteAddr()), addrPort(far.LocalAddr())
		want := peer{uid: os.Geteuid(), inode: inodeOf(t, near)}
		if p, err := sockDiag(its, other); p != want || err != nil {
			t.Errorf("%s: sock_diag: %+v, %v, want %+v", network, p, err, want)
		}
		if p, err := procNet(its, other, "/proc/net/tcp", "/proc/net/tcp6"); p != want || err != nil {
			t.Errorf("%s: /proc/net: %+v, %v, want %+v", network, p, err, want)
		}
		if p, err := peerOf(far); p != want || err != nil {
			t.Errorf("%s: %+v, %v", network, p, err)
		}
		if pid := newFinder().find(t.Context(), want.inode); pid != os.Getpid() {
			t.Errorf("%s: process %d, want %d", network, pid, os.Getpid())
		}
		// An end that is closed is nobody's: the kernel calls it root's.
		near.Close()
		until(t, "closed", func() bool { _, err := far.Read(make([]byte, 1)); return err != nil })
		if p, err := peerOf(far); err == nil && (p.uid != os.Geteuid() || p.uid == 0) {
			t.Errorf("%s: a closed end: %+v", network, p)
		}
	}
	// Another machine's end may have the port of a listener here, such as the forward's own: that is not its socket.
	for _, network := range []string{"tcp4", "tcp"} {
		l, err := net.Listen(network, ":0")
		if err != nil {
			t.Fatal(err)
		}
		port := addrPort(l.Addr()).Port()
		for _, machine := range []string{"192.0.2.1", "2001:db8::1"} {
			elsewhere := netip.AddrPortFrom(netip.MustParseAddr(machine), port)
			if p, err := sockDiag(elsewhere, elsewhere); !errors.Is(err, unix.ENOENT) {
				t.Errorf("%s: a listener on all addresses is taken for %s: %+v, %v", network, elsewhere, p, err)
			}
		}
		l.Close()
	}
	nowhere := netip.MustParseAddrPort("192.0.2.1:1")
	if p, err := sockDiag(nowhere, nowhere); err == nil {
		t.Errorf("nobody: %+v", p)
	}
	if p, err := procNet(nowhere, nowhere, "/proc/net/tcp", "/proc/net/tcp6"); err == nil {
		t.Errorf("nobody: %+v", p)
	}
	if p, err := procNet(nowhere, nowhere, "/proc/net/nothing"); err == nil {
		t.Errorf("nothing to read: %+v", p)
	}
	near, far := pair(t, "unix", filepath.Join(t.TempDir(), "s"))
	if p, err := peerOf(far); err != nil || p.uid != os.Geteuid() || p.pid != os.Getpid() {
		t.Errorf("unix: %+v, %v", p, err)
	}
	near.Close()
}

func TestProcAddr(t *testing.T) {
	for text, want := range map[string]string{
		"0100007F:0050":                         "127.0.0.1:80",
		"00000000000000000000000001000000:1F90": "[::1]:8080",
		"0000000000000000FFFF00000100007F:0050": "127.0.0.1:80",
		"":                                      "invalid AddrPort",
		"0100007F":                              "invalid AddrPort",
		"0100007:0050":                          "invalid AddrPort",
		"zz00007F:0050":                         "invalid AddrPort",
		"0100007F:99999":                        "invalid AddrPort",
	} {
		if got := procAddr(text).String(); got != want && !(want == "invalid AddrPort" && !procAddr(text).IsValid()) {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

// BenchmarkFinder finds a socket of a process that was not found before.
func BenchmarkFinder(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	raw, err := l.(syscall.Conn).SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	var st unix.Stat_t
	raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) })
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if newFinder().find(b.Context(), st.Ino) != os.Getpid() {
			b.Fatal("not found")
		}
	}
}

// Many look at once, and nobody finds what is not there.
func TestFinder(t *testing.T) {
	f := newFinder()
	var finding sync.WaitGroup
	for range 100 {
		near, _ := pair(t, "tcp", "127.0.0.1:0")
		inode := inodeOf(t, near)
		finding.Go(func() {
			if pid := f.find(t.Context(), inode); pid != os.Getpid() {
				t.Errorf("%d", pid)
			}
		})
	}
	finding.Wait()
	if pid := f.find(t.Context(), 1); pid != 0 {
		t.Errorf("nobody's: %d", pid)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f.looking <- struct{}{}
	go f.find(t.Context(), 2) // looks first
	until(t, "somebody waits", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.next != nil })
	if pid := f.find(ctx, 3); pid != 0 {
		t.Errorf("given up: %d", pid)
	}
	<-f.looking
}

// playClient connects to NETWORK ADDRESS and prints what comes back for "hi".
func playClient(to string) {
	network, address, _ := strings.Cut(to, " ")
	fmt.Println(say(network, address))
	os.Exit(0)
}

// say says what comes back for "hi".
func say(network, address string) string {
	c, err := net.DialTimeout(network, address, 20*time.Second)
	switch {
	case errors.Is(err, syscall.ECONNRESET): // that fast
		return "cut off"
	case err != nil:
		return "no way: " + shorter(err).Error()
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprint(c, "hi")
	b := make([]byte, 2)
	if _, err := io.ReadFull(c, b); err != nil {
		return "cut off"
	}
	return string(b)
}

// Only this user's processes come in, unless policy says otherwise. Who may not is put into the audit log.
func TestUsers(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	w := newWorld(t)
	dir, err := os.MkdirTemp("", "mpf")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self, selfUnix := filepath.Join(dir, "self"), filepath.Join(dir, "any")
	w.use(fmt.Sprintf(`{"local": [
		{"address": "127.0.0.1:%d", "to": %q, "users": "self"}, {"address": "127.0.0.1:%d", "to": %q, "users": "any"},
		{"address": %q, "to": %q, "users": "self"}, {"address": %q, "to": %q, "users": "any"}],
		"dynamic": [{"address": "127.0.0.1:%d", "users": "self"}]}`,
		free(t), to, free(t), to, self, to, selfUnix, to, free(t)))
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A copy that others may run: go test's own is in a directory of this user's.
	client := filepath.Join(dir, "client")
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(client, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(client, 0o755); err != nil {
		t.Fatal(err)
	}
	w.opened(0)
	if code, out := w.command("add", "-L", fmt.Sprintf("127.0.0.1:%d:%s", free(t), to), "h"); code != 0 {
		t.Fatal(out)
	}
	var at [6]string
	for i, s := range w.list() {
		at[i] = s.Listening[0]
	}
	try := func(i int, uid int) string {
		t.Helper()
		network := "tcp"
		if strings.HasPrefix(at[i], "/") {
			network = "unix"
		}
		cmd := exec.Command(client)
		cmd.Dir = "/"
		cmd.Env = []string{"PLAY_CLIENT=" + network + " " + at[i]}
		if uid != os.Geteuid() {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	me := os.Geteuid()
	for i := range at {
		want := "hi"
		if i == 0 {
			want = "cut off" // it speaks no SOCKS
		}
		if got := try(i, me); got != want {
			t.Errorf("own process, forward %d: %s", i, got)
		}
	}
	w.recorded("refused ", 0)
	other := me
	if me == 0 {
		other = 65534 // root can be somebody else
	} else {
		w.p.uid++ // everybody else can only be somebody else's plugin
	}
	for i, want := range []string{"cut off", "cut off", "hi", "no way: permission denied", "hi", "cut off"} {
		if i == 3 && me != 0 {
			want = "cut off"
		}
		if got := try(i, other); got != want {
			t.Errorf("another user's process, forward %d: %s", i, got)
		}
	}
	// A socket's mode is not all: the peer is asked, too.
	if err := os.Chmod(self, 0o666); err != nil {
		t.Fatal(err)
	}
	if got := try(3, other); got != "cut off" {
		t.Errorf("another user's process: %s", got)
	}
	w.recorded("refused u@test.example.com:22 dynamic 127.0.0.1:", 1)
	w.recorded("refused u@test.example.com:22 local 127.0.0.1:", 2) // of policy and of the command
}

// Another machine comes in only where gateway and users = "any" are said: a network of this test's own has one.
func TestAnotherMachine(t *testing.T) {
	if os.Getenv("PLAY_NETWORK") != "" {
		inNetwork(t)
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestAnotherMachine$", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), "PLAY_NETWORK=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if uid := os.Geteuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EACCES) {
		t.Logf("this system lets nobody have a network of their own: %v", err) // such as a container
		return
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func inNetwork(t *testing.T) {
	ip := func(args string) {
		t.Helper()
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s (package iproute2): %v\n%s", args, err, out)
		}
	}
	// The other machine is a process with a network of its own, which dials what it reads.
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	machine := exec.Command(exe)
	machine.Env = append(os.Environ(), "PLAY_MACHINE=192.0.2.2/24")
	machine.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	machine.Stderr = os.Stderr
	in, err1 := machine.StdinPipe()
	out, err2 := machine.StdoutPipe()
	if err := errors.Join(err1, err2, machine.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := machine.Wait(); err != nil {
			t.Error(err)
		}
	})
	ip("link set lo up")
	ip("link add near type veth peer name far")
	ip("address add 192.0.2.1/24 dev near")
	ip("link set near up")
	ip(fmt.Sprintf("link set far netns %d", machine.Process.Pid))
	answers := bufio.NewScanner(out)
	from := func(at string) string {
		t.Helper()
		fmt.Fprintln(in, at)
		if !answers.Scan() {
			t.Fatalf("the other machine ends: %v", answers.Err())
		}
		return answers.Text()
	}

	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	w := newWorld(t)
	var port [4]int
	for i := range port {
		port[i] = free(t)
	}
	block := func(address, users string, gateway bool) string {
		return fmt.Sprintf(`{"address": %q, "to": %q, "users": %q, "gateway": %v}`, address, to, users, gateway)
	}
	w.use(fmt.Sprintf(`{"local": [%s, %s, %s, %s]}`,
		block(fmt.Sprintf("192.0.2.1:%d", port[0]), "any", true), block(fmt.Sprintf("*:%d", port[1]), "any", true),
		block(fmt.Sprintf("192.0.2.1:%d", port[2]), "self", true), block(fmt.Sprint(port[3]), "any", false)))
	w.opened(0)
	for i, c := range []struct{ there, here string }{
		{"hi", "hi"}, {"hi", "hi"}, {"cut off", "hi"}, {"no way: connection refused", "no way: connection refused"},
	} {
		at := fmt.Sprintf("192.0.2.1:%d", port[i])
		if got := from(at); got != c.there {
			t.Errorf("forward %d from another machine: %s, want %s", i, got, c.there)
		}
		if got := say("tcp", at); got != c.here {
			t.Errorf("forward %d from this machine: %s, want %s", i, got, c.here)
		}
	}
	w.recorded(fmt.Sprintf("refused u@test.example.com:22 local 192.0.2.1:%d to %s, from 192.0.2.2:", port[2], to), 1)
}

// playMachine has the interface "far", as soon as that comes, and tells what each address that it reads says to "hi".
func playMachine(address string) {
	up := func() error {
		for _, args := range [][]string{{"address", "add", address, "dev", "far"}, {"link", "set", "far", "up"}} {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				return fmt.Errorf("ip %q: %w: %s", args, err, out)
			}
		}
		return nil
	}
	lines := bufio.NewScanner(os.Stdin)
	for first := true; lines.Scan(); first = false {
		if first {
			if err := up(); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
		}
		fmt.Println(say("tcp", lines.Text()))
	}
	os.Exit(0)
}

// Out of descriptors, a listener waits for better times.
func TestDescriptors(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	w := newWorld(t)
	w.use(fmt.Sprintf(`{"local": [{"address": "127.0.0.1:%d", "to": %q, "users": "self"}]}`, free(t), to))
	at := w.opened(0)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	low := was
	low.Cur = 200
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	restore := func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &was) }
	defer restore()
	var hoard []*os.File
	f := w.p.all()[0]
	var c net.Conn
	// Others may free some meanwhile: then it is accepted, and refused for want of one to look whose it is. Again.
	until(t, "accept fails", func() bool {
		for {
			h, err := os.Open("/dev/null")
			if err != nil {
				break
			}
			hoard = append(hoard, h)
		}
		hoard[0].Close() // for this client's own socket
		hoard = hoard[1:]
		var err error
		if c, err = net.Dial("tcp", at); err != nil {
			return false
		}
		fmt.Fprint(c, "after")
		for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			f.mu.Lock()
			told := slices.Collect(maps.Keys(f.told))
			clear(f.told)
			f.mu.Unlock()
			if len(told) > 0 {
				if strings.HasPrefix(told[0], "can't accept") {
					return true
				}
				break
			}
		}
		c.Close()
		return false
	})
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	for _, h := range hoard {
		h.Close()
	}
	if !readIs(c, make([]byte, 5), "after") {
		t.Error("the listener did not survive")
	}
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	at := endpoint{path: path}
	open := func(anyUser bool) (net.Listener, error) {
		ls, err := listen(at, anyUser)
		if err != nil {
			return nil, err
		}
		return ls[0], nil
	}
	l, err := open(false)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if _, err := open(false); err == nil || err.Error() != "another process listens there" {
		t.Errorf("while it is open: %v", err)
	}
	l.Close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}
	// One that a killed process has left.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if l, err = open(true); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	// What has taken its place is not removed.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := open(false); err == nil || err.Error() != "there is something else of this name" {
		t.Errorf("a file: %v", err)
	}
	if os.Geteuid() == 0 {
		os.Remove(path)
		if err := unix.Mknod(path, unix.S_IFSOCK|0o600, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		if _, err := open(false); err == nil || err.Error() != "another user's socket is there" {
			t.Errorf("another user's: %v", err)
		}
	}
	if _, err := listen(endpoint{path: filepath.Join(dir, "no", "where")}, false); err == nil {
		t.Error("in no directory")
	}
}

// One of the two loopback addresses is taken: the other one alone would be half a forward.
func TestHalfTaken(t *testing.T) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	if ls, err := listen(endpoint{port: port}, false); err == nil {
		closeAll(ls)
		t.Error("half of it is open")
	}
	v4, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatalf("the other half was left open: %v", err)
	}
	v4.Close()
}
