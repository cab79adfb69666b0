//go:build unix

package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func init() { asProxy = proxyHelper }

// proxyHelper is the test binary as a ProxyCommand. Its argument is the address; it says its pid first.
func proxyHelper(mode string) {
	fmt.Fprintf(os.Stderr, "pid %d\n", os.Getpid())
	address := os.Args[len(os.Args)-1]
	c, err := net.Dial("tcp", address)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	switch mode {
	case "pass":
		f, err := c.(*net.TCPConn).File()
		if err == nil {
			err = unix.Sendmsg(1, []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "stubborn": // outlives a hang-up, as does its child, which holds stderr
		child := exec.Command("/bin/sh", "-c", "trap '' HUP; while :; do sleep 60; done")
		child.Stderr = os.Stderr
		signal.Ignore(syscall.SIGHUP)
		if err := child.Start(); err != nil {
			os.Exit(1)
		}
		go io.Copy(c, os.Stdin)
		io.Copy(os.Stdout, c)
		never := make(chan os.Signal, 1)
		signal.Notify(never, syscall.SIGUSR1)
		<-never
	default:
		done := make(chan struct{}, 2)
		go func() { io.Copy(c, os.Stdin); done <- struct{}{} }()
		go func() { io.Copy(os.Stdout, c); done <- struct{}{} }()
		<-done
	}
}

func gone(pid int) bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }

func proxyPID(t *testing.T, heard *told) int {
	t.Helper()
	for _, line := range heard.get(&heard.debug) {
		if s, ok := strings.CutPrefix(line, "proxy command: pid "); ok {
			pid, err := strconv.Atoi(s)
			check(t, err)
			return pid
		}
	}
	t.Fatal("the proxy command did not say its pid")
	return 0
}

func TestProxyCommand(t *testing.T) {
	exe, err := os.Executable()
	check(t, err)
	user := newKey(t, "ed25519")
	s := startSSHD(t, newKey(t, "ed25519"), []key{user})
	id := "identityfile " + user.file(t, s.dir, "id", "")
	for _, mode := range []string{"copy", "stubborn"} {
		t.Run(mode, func(t *testing.T) {
			sp := spec(t, s.port, s.known(t), id, "proxycommand env MUXPROXY_TEST_PROXY="+mode+" "+exe+" %h:%p")
			heard := listening(&sp)
			c, line := dialAsking(t, sp, nil)
			if c == nil {
				t.Fatal(line)
			}
			data := []byte(strings.Repeat("data ", 100000))
			if got := run(t, c, "cat", data); string(got) != string(data) {
				t.Errorf("%d bytes came back of %d", len(got), len(data))
			}
			if c.Server().Addr != "" {
				t.Errorf("address %q", c.Server().Addr)
			}
			check(t, c.Probe(t.Context(), nil))
			pid := proxyPID(t, heard)
			if pgid, err := syscall.Getpgid(pid); err != nil || pgid != pid {
				t.Errorf("process group %d of %d, %v", pgid, pid, err)
			}
			c.Close()
			check(t, c.Wait())
			if !gone(pid) {
				t.Errorf("the proxy command is still there, mode %s", mode)
			}
		})
	}
}

func TestProxyCommandShellAndTokens(t *testing.T) {
	dir := t.TempDir()
	shell := write(t, dir, "shell", "#!/bin/sh\nprintf '%s|' \"$MARK\" \"$@\" >&2\nexit 7\n")
	check(t, os.Chmod(shell, 0o700))
	sp := spec(t, 2222, "proxycommand nc %r@%h:%p %n %k 100%%", "hostkeyalias key")
	sp.Target.User = "me"
	sp.Env = []string{"SHELL=" + shell, "MARK=here"}
	got := dialError(t, sp)
	contains(t, got, `127.0.0.1:2222: ProxyCommand ended before the server identified itself (exit status 7); it said "here|-c|exec nc me@127.0.0.1:2222 box key 100%|"`)
	for _, tc := range []struct{ user, host, command, want string }{
		{"a;b", "h", "x %r", "characters that a shell would act on"},
		{"me", "$(x)", "x %h", "characters that a shell would act on"},
		{"me", "h", "x %", "lone %"},
	} {
		sp := spec(t, 22, "proxycommand "+tc.command)
		sp.Target.User, sp.Target.Host = tc.user, tc.host
		contains(t, dialError(t, sp), "ProxyCommand: ", tc.want)
	}
	sp = spec(t, 22, "proxycommand x")
	sp.Env = []string{"SHELL=" + dir + "/absent"}
	contains(t, dialError(t, sp), "ProxyCommand: no such file or directory")
}

func TestProxyUseFdpass(t *testing.T) {
	exe, err := os.Executable()
	check(t, err)
	user := newKey(t, "ed25519")
	s := startSSHD(t, newKey(t, "ed25519"), []key{user})
	id := "identityfile " + user.file(t, s.dir, "id", "")
	sp := spec(t, s.port, s.known(t), id, "proxyusefdpass yes", "proxycommand env MUXPROXY_TEST_PROXY=pass "+exe+" %h:%p")
	heard := listening(&sp)
	c := dial(t, sp)
	if pid := proxyPID(t, heard); !gone(pid) {
		t.Error("the proxy command is still there")
	}
	if got := string(run(t, c, "echo hello", nil)); got != "hello\n" {
		t.Errorf("got %q", got)
	}
	for command, want := range map[string]string{
		"sh -c 'echo why >&2; exit 4'": `ProxyCommand ended before the server identified itself (exit status 4); it said "why"`,
		"echo hello":                   "ProxyCommand ended before the server identified itself",
		"sleep 100":                    "ProxyCommand: ",
	} {
		contains(t, dialError(t, spec(t, 22, "proxyusefdpass yes", "connecttimeout 1", "proxycommand "+command)), want)
	}
}

// What stands for TCP decides how the host is reached, whatever ssh_config says of it.
func TestTransport(t *testing.T) {
	user := newKey(t, "ed25519")
	s := startSSHD(t, newKey(t, "ed25519"), []key{user})
	sp := spec(t, s.port, s.known(t), "identityfile "+user.file(t, s.dir, "id", ""), "proxyjump a,b")
	used := 0
	sp.Transport = func(ctx context.Context) (net.Conn, error) {
		used++
		var d net.Dialer
		return d.DialContext(ctx, "tcp", sp.Target.Addr())
	}
	c := dial(t, sp)
	if got := string(run(t, c, "echo hello", nil)); got != "hello\n" || used != 1 {
		t.Errorf("got %q, used %d times", got, used)
	}
	for _, tc := range []struct {
		err  error
		want string
	}{
		{&Error{Host: "jump:22", Msg: "permission denied"}, "jump:22: permission denied"},
		{errors.New("no\x1b way"), fmt.Sprintf("127.0.0.1:%d: no\\x1b way", s.port)},
	} {
		sp.Transport = func(context.Context) (net.Conn, error) { return nil, tc.err }
		if got := dialError(t, sp); got != tc.want {
			t.Errorf("got %q", got)
		}
	}
	// A stream without an address, as a channel is.
	f := startFake(t, openServer(), newKey(t, "ed25519").signer)
	sp = spec(t, f.port, "stricthostkeychecking no")
	sp.Transport = func(context.Context) (net.Conn, error) {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", f.port))
		return noAddr{c}, err
	}
	c = dial(t, sp)
	<-f.conns
	if c.Server().Addr != "" {
		t.Errorf("address %q", c.Server().Addr)
	}
}

type noAddr struct{ net.Conn }

func (noAddr) RemoteAddr() net.Addr { return nil }
