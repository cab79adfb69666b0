//go:build unix

package bridge

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/wire"
)

func TestParse(t *testing.T) {
	target := wire.Target{User: "u", Host: "h", Port: 22}
	alias := target
	alias.Alias = "a"
	for _, tc := range []struct {
		args []string
		want commandLine
	}{
		{[]string{"u@h:22"}, commandLine{target: target}},
		{[]string{"u@h:22", "a"}, commandLine{target: alias}},
		{[]string{"--fdpass", "u@h:22", "a"}, commandLine{fdpass: true, target: alias}},
		{[]string{"-F", "f", "-ikey", "-o", "A=b", "--", "u@h:22"},
			commandLine{options: []string{"-F", "f", "-i", "key", "-o", "A=b"}, target: target}},
		{[]string{"-h"}, commandLine{help: true}},
		{[]string{"--fdpass", "--help"}, commandLine{help: true}},
		{[]string{"status", "--json"}, commandLine{command: true}},
		{[]string{"close", "u@h:22"}, commandLine{command: true}},
		{[]string{"--version"}, commandLine{command: true}},
	} {
		got, err := parse(tc.args)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(tc.want) {
			t.Errorf("%q: got %+v, %v", tc.args, got, err)
		}
	}
	for _, args := range [][]string{
		{}, {""}, {"-x", "u@h:22"}, {"-o"}, {"-"}, {"u@h"}, {"h:22"}, {"u@h:22", "a", "b"}, {"--fdpass"}, {"--fdpass", "status"},
	} {
		if got, err := parse(args); err == nil {
			t.Errorf("%q: got %+v", args, got)
		}
	}
}

func TestUsage(t *testing.T) {
	w := newWorld(t)
	if out, errs, status := w.run("", "--help"); status != 0 || errs != "" || !strings.Contains(out, "muxproxy --fdpass ") {
		t.Errorf("help: %d, %q, %q", status, out, errs)
	}
	if out, errs, status := w.run("", "-z\x1b"); status != 2 || out != "" || !strings.Contains(errs, `unknown option -z\x1b`) {
		t.Errorf("wrong option: %d, %q, %q", status, out, errs)
	}
	if out, _, status := w.run("", "close", "u@h:22"); status != 3 || out != "command [\"close\" \"u@h:22\"]\n" {
		t.Errorf("a command: %d, %q", status, out)
	}
	if out, _, status := w.run("", "--version"); status != 3 || out != "command [\"version\"]\n" {
		t.Errorf("version: %d, %q", status, out)
	}
	if err := os.Remove(filepath.Join(w.bin, "muxproxyd")); err != nil {
		t.Fatal(err)
	}
	if _, errs, status := w.run("", "status"); status != 255 || !strings.Contains(errs, "muxproxyd is neither in "+w.bin) {
		t.Errorf("no muxproxyd: %d, %q", status, errs)
	}
	if len(w.started()) > 0 {
		t.Error("a master was started")
	}
}

func TestServedByPipes(t *testing.T) {
	w := newWorld(t, "LC_ALL=C", "MUXPROXY_CONFIG=/x", "MUXPROXY_BYPASS=0")
	for range 2 {
		out, errs, status := w.run("SSH-2.0-x\r\n", "u@pipes:22")
		if out != "SSH-2.0-x\r\n" || status != 0 || errs != "muxproxy: waiting for\\u202e you\n" {
			t.Errorf("%d, %q, %q", status, out, errs)
		}
	}
	starts := w.started()
	if len(starts) != 1 {
		t.Fatalf("%d masters were started", len(starts))
	}
	for _, want := range []string{"cwd=/ ", "leader=true", "LC_ALL=C", "MUXPROXY_CONFIG=/x", "HOME=", "NOTIFY_SOCKET="} {
		if !strings.Contains(starts[0], want) {
			t.Errorf("the master's start lacks %s: %s", want, starts[0])
		}
	}
	for _, not := range []string{"SECRET", "MUXPROXY_BYPASS"} {
		if strings.Contains(starts[0], not) {
			t.Errorf("the master got %s", not)
		}
	}
	if names, err := filepath.Glob(filepath.Join(w.dirs.Run, "notify.*")); err != nil || len(names) > 0 {
		t.Errorf("left behind: %v, %v", names, err)
	}
	if fi, err := os.Stat(logFile(w.dirs)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the log: %v, %v", fi, err)
	}
}

func TestFiftyBridgesStartOneMaster(t *testing.T) {
	w := newWorld(t)
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			text := fmt.Sprintf("client %d", i)
			cmd := w.command("u@pipes:22")
			var errs bytes.Buffer
			cmd.Stdin, cmd.Stderr = strings.NewReader(text), &errs
			if out, err := cmd.Output(); err != nil || string(out) != text {
				t.Errorf("%v, %q, %q", err, out, errs.String())
			}
		})
	}
	wg.Wait()
	if n := len(w.started()); n != 1 {
		t.Errorf("%d masters were started", n)
	}
}

func TestAnswers(t *testing.T) {
	w := newWorld(t, "SSH_AUTH_SOCK=/nowhere/agent")
	for _, tc := range []struct {
		args   []string
		status int
		errs   string
	}{
		{[]string{"u@failed:22"}, 255, "muxproxy: failed:22: no\\x1b[2J route\nmuxproxy: second line\n"},
		{[]string{"u@fatal:22"}, 255, "muxproxy: denied by policy: no\n"},
		{[]string{"-o", "Port=7", "-v", "u@hello:22"}, 2, "unknown option"},
		{[]string{"-oPort=7", "-i", "k", `d\u@hello:22`, "al"}, 255,
			`muxproxy: d\u@hello:22 "al" pipes ["-o" "Port=7" "-i" "k"] HOME=` + w.getenv("HOME") + " agent=/nowhere/agent\n"},
		{[]string{"--fdpass", "u@hello:22"}, 255, `muxproxy: u@hello:22 "" pipes []`},
		{[]string{"u@cut:22"}, 255, "muxproxy: the master ended the connection to cut:22 before its login"},
		{[]string{"u@never:22"}, 255, "muxproxy: the master: ended while it was asked; see " + logFile(w.dirs)},
		{[]string{"u@hang:22"}, 255, "muxproxy: the master: malformed frame: note, want answer"},
		{[]string{"u@twice:22"}, 255, "muxproxy: the master: malformed frame: it asked twice"},
		{[]string{"u@resolve:77"}, 255, `muxproxy: u@resolve:77 agent none at agent, error ""`},
		{[]string{"u@h:22", "-alias"}, 255, `muxproxy: alias "-alias" begins with '-'; set MUXPROXY_BYPASS=1`},
	} {
		out, errs, status := w.run("", tc.args...)
		if out != "" || status != tc.status || !strings.Contains(errs, tc.errs) {
			t.Errorf("%q: %d, %q, %q", tc.args, status, out, errs)
		}
		if n := strings.Count(errs, "\n"); n > 2 {
			t.Errorf("%q: %d lines", tc.args, n)
		}
	}
	if n := len(w.started()); n != 1 {
		t.Errorf("%d masters were started", n)
	}
}

func TestOptionsOfTheSSHAbove(t *testing.T) {
	w := newWorld(t)
	under := func(proxy string, ssh ...string) (out, errs string, status int) {
		t.Helper()
		cmd := w.command()
		cmd.Path, cmd.Args = filepath.Join(w.bin, "ssh"), append([]string{"ssh"}, ssh...)
		cmd.Env = append(slices.Clone(w.env), "TEST_SSH_PROXY="+proxy)
		return w.finish(cmd, "x")
	}
	_, errs, status := under("muxproxy -o Port=1 u@hello:22", "-tvp2200", "-i", "key", "me@db", "-L1:h:1", "uptime")
	if want := `"db" pipes ["-v" "-p" "2200" "-i" "key" "--" "me@db"]`; status != 255 || !strings.Contains(errs, want) {
		t.Errorf("%d, %q, want %q", status, errs, want)
	}
	// An option of a newer ssh could be about where the connection leads.
	_, errs, status = under("muxproxy u@hello:22", "-Z", "db")
	if status != 255 || !strings.Contains(errs, "unknown option") || !strings.Contains(errs, "MUXPROXY_BYPASS=1") {
		t.Errorf("%d, %q", status, errs)
	}
	target := fmt.Sprintf("u@127.0.0.1:%d", echo(t))
	out, errs, status := under("env MUXPROXY_BYPASS=1 muxproxy "+target, "-Z", "db")
	if out != "x" || errs != "" || status != 0 {
		t.Errorf("%d, %q, %q", status, out, errs)
	}
}

// A master that is about to end still takes connections.
func TestAsksAgainWhenTheMasterEnds(t *testing.T) {
	w := newWorld(t)
	if _, errs, status := w.run("", "u@atlast:22"); status != 255 || errs != "muxproxy: at last\n" {
		t.Errorf("%d, %q", status, errs)
	}
}

// But not after ssh -G has run: a Match exec may do more than look.
func TestDoesNotAskAgainAfterResolve(t *testing.T) {
	w := newWorld(t)
	_, errs, status := w.run("", "u@resolve-and-end:22")
	if status != 255 || !strings.HasPrefix(errs, "muxproxy: the master: ended while it was asked; see ") {
		t.Errorf("%d, %q", status, errs)
	}
}

// A Match exec that does not end holds ssh up no longer than the bound, also if what it has started keeps ssh's pipes.
func TestResolveIsBounded(t *testing.T) {
	w := newWorld(t, "TEST_SSH_HANGS=1", "TEST_RESOLVE_TIMEOUT=200ms")
	_, errs, status := w.run("", "u@resolve:77")
	if want := `error "ssh -G took longer than 200ms (a Match exec?); set MUXPROXY_BYPASS=1`; status != 255 || !strings.Contains(errs, want) {
		t.Errorf("%d, %q", status, errs)
	}
}

func TestResolve(t *testing.T) {
	w := newWorld(t)
	sock := filepath.Join(w.dirs.State, "agent")
	if err := w.dirs.Make(); err != nil {
		t.Fatal(err)
	}
	agent, err := paths.Listen(w.dirs.State, "agent")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := agent.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "hi")
			c.Close()
		}
	}()
	w.env = append(w.env, "SSH_AUTH_SOCK="+sock)
	for _, tc := range []struct{ env, want string }{
		{"", `muxproxy: u@resolve:77 agent hi at agent, error ""`},
		{"TEST_SSH_G=identityagent none\n", `agent none at .,`},
		{"TEST_SSH_G=identityagent " + sock + "\nproxyjump none\n", `agent hi at agent,`},
		{"TEST_SSH_FAILS=line 3: bad\nterminating", `muxproxy: @: agent none at ., error "terminating"`},
		{"SSH_AUTH_SOCK=", `agent none at .,`},
	} {
		env := w.env
		w.env = append(slices.Clone(env), tc.env)
		_, errs, status := w.run("", "u@resolve:77")
		w.env = env
		if status != 255 || !strings.Contains(errs, tc.want) {
			t.Errorf("%q: %d, %q, want %q", tc.env, status, errs, tc.want)
		}
	}
	agent.Close()
	<-served
}

func TestCopy(t *testing.T) {
	w := newWorld(t)
	name := filepath.Join(t.TempDir(), "in")
	text := strings.Repeat("SSH-2.0-x\r\n", 100_000)
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	cmd := w.command("u@echo:22")
	var errs bytes.Buffer
	cmd.Stdin, cmd.Stderr = in, &errs // a regular file is no pipe
	out, err := cmd.Output()
	if err != nil || string(out) != text {
		t.Errorf("%v, %d bytes of %d, %q", err, len(out), len(text), errs.String())
	}
}

// fdpassed runs a bridge as ssh does with ProxyUseFdpass and returns what it passes back.
func fdpassed(t *testing.T, w *world, args ...string) net.Conn {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	unix.CloseOnExec(fds[0])
	unix.CloseOnExec(fds[1])
	cmd := w.command(append([]string{"--fdpass"}, args...)...)
	errs, err := os.Create(filepath.Join(t.TempDir(), "errors")) // a pipe would end only with a ProxyCommand
	if err != nil {
		t.Fatal(err)
	}
	defer errs.Close()
	said := func() string {
		b, err := os.ReadFile(errs.Name())
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, errs
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	buf, oob := make([]byte, 16), make([]byte, 64)
	n, oobn, _, _, err := unix.Recvmsg(fds[0], buf, oob, 0)
	if err != nil || n != 1 {
		cmd.Wait()
		t.Fatalf("got %d bytes, %v, %q", n, err, said())
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("%v, %v", msgs, err)
	}
	got, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(got) != 1 {
		t.Fatalf("%v, %v", got, err)
	}
	unix.CloseOnExec(got[0])
	if flags, err := unix.FcntlInt(uintptr(got[0]), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("the socket does not block: %#x, %v", flags, err)
	}
	f := os.NewFile(uintptr(got[0]), "passed")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := cmd.Wait(); err != nil {
		t.Errorf("the bridge: %v, %q", err, said())
	}
	return c
}

func echoed(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(c, "SSH-2.0-x\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); string(b) != "SSH-2.0-x\r\n" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
}

func TestFdpass(t *testing.T) {
	w := newWorld(t)
	echoed(t, fdpassed(t, w, "u@fds:22"))
}

// echo is a host without ssh.
func echo(t *testing.T) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).Port
}

func TestBypass(t *testing.T) {
	w := newWorld(t)
	port := echo(t)
	target := fmt.Sprintf("u@127.0.0.1:%d", port)
	const text = "SSH-2.0-x\r\n"

	for _, tc := range []struct {
		name string
		env  []string
	}{
		{"because policy says so", nil},
		{"because the user says so", []string{"MUXPROXY_BYPASS=1"}},
		{"without a home", []string{"MUXPROXY_BYPASS=1", "HOME="}},
		{"with everything broken", []string{"MUXPROXY_BYPASS=1", "HOME=/dev/null", "XDG_RUNTIME_DIR=/"}},
		{"no proxy", []string{"TEST_SSH_G=proxycommand none\nproxyjump none\n", "MUXPROXY_BYPASS=1"}},
		{"bound", []string{"TEST_SSH_G=bindaddress 127.0.0.1\naddressfamily inet\nconnecttimeout 5\n", "MUXPROXY_BYPASS=1"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			old := w.env
			defer func() { w.env = old }()
			w.env = append(slices.Clone(w.env), tc.env...)
			if out, errs, status := w.run(text, target); out != text || errs != "" || status != 0 {
				t.Errorf("%d, %q, %q", status, out, errs)
			}
			echoed(t, fdpassed(t, w, target))
		})
	}
	w.env = append(w.env, "MUXPROXY_BYPASS=1")

	t.Run("ssh -G fails", func(t *testing.T) {
		old := w.env
		defer func() { w.env = old }()
		w.env = append(slices.Clone(w.env), "TEST_SSH_FAILS=no good")
		out, errs, status := w.run(text, target)
		if out != text || status != 0 || errs != "muxproxy: no good; connecting to "+target[2:]+" directly\n" {
			t.Errorf("%d, %q, %q", status, out, errs)
		}
	})
	t.Run("refused", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		l.Close()
		out, errs, status := w.run(text, "u@"+addr)
		if out != "" || status != 255 || errs != "muxproxy: "+addr+": connection refused (127.0.0.1)\n" {
			t.Errorf("%d, %q, %q", status, out, errs)
		}
	})
	t.Run("no such host", func(t *testing.T) { // nor a valid name: no resolver is asked
		_, errs, status := w.run(text, "u@no..where:22")
		if status != 255 || !strings.HasPrefix(errs, "muxproxy: no..where:22: no such host") || strings.Count(errs, "\n") != 1 {
			t.Errorf("%d, %q", status, errs)
		}
	})
	t.Run("interface that can't be bound to", func(t *testing.T) {
		old := w.env
		defer func() { w.env = old }()
		w.env = append(slices.Clone(w.env), "TEST_SSH_G=bindinterface nonesuch0\n")
		if out, errs, status := w.run(text, target); out != "" || status != 255 || !strings.Contains(errs, target[2:]) {
			t.Errorf("%d, %q, %q", status, out, errs)
		}
	})
	t.Run("ProxyCommand", func(t *testing.T) {
		old := w.env
		defer func() { w.env = old }()
		w.env = append(slices.Clone(w.env), `TEST_SSH_G=proxycommand sh -c 'echo "$0"; exec cat' %r-%h-%p`+"\n")
		if out, errs, status := w.run(text, "u@host:44"); out != "u-host-44\n"+text || errs != "" || status != 0 {
			t.Errorf("%d, %q, %q", status, out, errs)
		}
		c := fdpassed(t, w, "u@host:44")
		c.SetDeadline(time.Now().Add(30 * time.Second))
		r := bufio.NewReader(c)
		if line, err := r.ReadString('\n'); line != "u-host-44\n" || err != nil {
			t.Errorf("%q, %v", line, err)
		}
		echoed(t, c)
	})
	t.Run("ProxyCommand that passes a socket", func(t *testing.T) {
		old := w.env
		defer func() { w.env = old }()
		w.env = append(slices.Clone(w.env), "TEST_SSH_G=proxycommand nc -F %h %p\nproxyusefdpass yes\n")
		if _, errs, status := w.run(text, "u@host:44"); status != 255 || !strings.Contains(errs, "ProxyUseFdpass") {
			t.Errorf("%d, %q", status, errs)
		}
	})
	t.Run("ProxyJump", func(t *testing.T) {
		old := w.env
		defer func() { w.env = old }()
		w.env = append(slices.Clone(w.env), "TEST_SSH_G=proxyjump a,me@[::1]:2222\n")
		want := `["-J" "a" "-l" "me" "-p" "2222" "-F" "/dev/null" "-W" "[host]:44" "--" "::1"]` + "\n"
		if out, errs, status := w.run(text, "-F/dev/null", "u@host:44"); out != want+text || errs != "" || status != 0 {
			t.Errorf("%d, %q, %q", status, out, errs)
		}
	})
	if n := len(w.started()); n != 1 {
		t.Errorf("%d masters were started, only the first case needs one", n)
	}
}

func TestForeignHomeIsBypassed(t *testing.T) {
	home := "/" // root's
	if os.Geteuid() == 0 {
		home = filepath.Join(t.TempDir(), "home")
		if err := os.Mkdir(home, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(home, 54321, 54321); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t)
	w.env = append(w.env, "HOME="+home)
	out, errs, status := w.run("x", fmt.Sprintf("u@127.0.0.1:%d", echo(t)))
	if out != "x" || errs != "" || status != 0 {
		t.Errorf("%d, %q, %q", status, out, errs)
	}
	if len(w.started()) > 0 {
		t.Error("a master was started")
	}
	if home != "/" {
		if entries, err := os.ReadDir(home); err != nil || len(entries) > 0 {
			t.Errorf("created: %v, %v", entries, err)
		}
	}
}

func TestJumpCommand(t *testing.T) {
	target := wire.Target{User: "u", Host: "::1", Port: 22}
	for jump, want := range map[string]string{
		"j":                  "ssh -W [::1]:22 -- j",
		"me@j:2222":          "ssh -l me -p 2222 -W [::1]:22 -- j",
		"a,b@c,me@x@j":       "ssh -J a,b@c -l me@x -W [::1]:22 -- j",
		"[2001:db8::1]":      "ssh -W [::1]:22 -- 2001:db8::1",
		"u@[2001:db8::1]:22": "ssh -l u -p 22 -W [::1]:22 -- 2001:db8::1",
	} {
		if got := strings.Join(jumpCommand(jump, target, sshconfig.Args{}), " "); got != want {
			t.Errorf("%s: got %s, want %s", jump, got, want)
		}
	}
	args := sshconfig.Args{Options: []string{"-v", "-F", "a", "-l", "u", "-v", "-F", "b"}}
	if got := strings.Join(jumpCommand("j", target, args), " "); got != "ssh -v -v -F b -W [::1]:22 -- j" {
		t.Errorf("got %s", got)
	}
}

func TestMasterThatDoesNotStart(t *testing.T) {
	for how, want := range map[string]string{
		"says why":  `master did not start: config.hcl:1:2: no\x1b[2J good; see `,
		"dies":      `master did not start: fake master: out of luck; see `,
		"is killed": `master did not start: it was ended by signal 9 (killed); see `,
		"lies":      `master did not start: it said that it is ready, but nothing listens; see `,
	} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t, "MUXPROXY_TEST_MASTER="+how)
			out, errs, status := w.run("x", "u@h:22")
			want := "muxproxy: " + want + logFile(w.dirs) + ", or set MUXPROXY_BYPASS=1 to connect without it\n"
			if out != "" || status != 255 || errs != want {
				t.Errorf("%d, %q, %q", status, out, errs)
			}
			if l, err := paths.TryLock(filepath.Join(w.dirs.Run, paths.StartLock)); err != nil {
				t.Errorf("the lock is still held: %v", err)
			} else {
				l.Close()
			}
		})
	}
}

func TestUntrustedPlaces(t *testing.T) {
	w := newWorld(t)
	if err := w.dirs.Make(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{w.dirs.Run, w.dirs.State, w.dirs.Runtime} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		// Find does not take a runtime directory that is open to others; a link must not lead there either.
		if dir == w.dirs.Runtime {
			if err := w.dirs.Publish(dir); err != nil {
				t.Fatal(err)
			}
		}
		_, errs, status := w.run("x", "u@h:22")
		want := dir + " is open to others (mode 0755): chmod 700 " + dir
		if status != 255 || !strings.Contains(errs, want) || !strings.Contains(errs, "MUXPROXY_BYPASS=1") {
			t.Errorf("%s: %d, %q", dir, status, errs)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if len(w.started()) > 0 {
		t.Error("a master was started")
	}
}

func TestConnectAndStartMaster(t *testing.T) {
	w := newWorld(t)
	for _, pair := range w.env { // the master is started by this process
		name, value, _ := strings.Cut(pair, "=")
		t.Setenv(name, value)
	}
	ctx := t.Context()
	if _, err := Connect(ctx, w.dirs); !errors.Is(err, ErrNoMaster) {
		t.Errorf("before: %v", err)
	}
	if _, err := os.Stat(w.dirs.Run); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Connect has created something: %v", err)
	}
	for range 2 {
		if err := StartMaster(ctx, w.dirs, os.Getenv); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(w.started()); n != 1 {
		t.Errorf("%d masters were started", n)
	}
	c, err := Connect(ctx, w.dirs)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := ConnectTo(ctx, w.dirs, paths.ControlSocket); !errors.Is(err, ErrNoMaster) {
		t.Errorf("a socket that is not there: %v", err)
	}
	// A process without XDG_RUNTIME_DIR finds the same master by the link.
	other, err := paths.Find(func(name string) string {
		if name == "XDG_RUNTIME_DIR" {
			return ""
		}
		return w.getenv(name)
	})
	if err != nil {
		t.Fatal(err)
	}
	if other.Runtime == w.dirs.Runtime {
		t.Fatal("same directory")
	}
	if c, err = Connect(ctx, other); err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestWaitingForAnotherStarter(t *testing.T) {
	w := newWorld(t)
	if err := w.dirs.Make(); err != nil {
		t.Fatal(err)
	}
	lock, err := paths.TryLock(filepath.Join(w.dirs.Run, paths.StartLock))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if err := StartMaster(ctx, w.dirs, w.getenv); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Errorf("got %v", err)
	}
	if len(w.started()) > 0 {
		t.Error("a second master was started")
	}
}

// After ssh -f, ssh's parent waits for the end of what it gave as stderr.
func TestStderrIsLetGoAndHangupIgnored(t *testing.T) {
	w := newWorld(t)
	cmd := w.command()
	cmd.Path, cmd.Args = filepath.Join(w.bin, "ssh"), []string{"ssh", "-f", "h", "true"}
	cmd.Env = append(slices.Clone(w.env), "TEST_SSH_PROXY=muxproxy u@pipes:22")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	// What ssh -E leaves open.
	r, extra, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.ExtraFiles = []*os.File{extra}
	err = cmd.Start()
	extra.Close()
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(errs); !strings.Contains(string(b), "waiting") || err != nil {
		t.Errorf("stderr: %q, %v", b, err)
	}
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP} {
		if err := syscall.Kill(-cmd.Process.Pid, s); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(in, "last bytes"); err != nil {
		t.Fatal(err)
	}
	in.Close()
	// The bridge has let go of these as well, so it is the master that ends them.
	if b, err := io.ReadAll(out); string(b) != "last bytes" || err != nil {
		t.Errorf("stdout: %q, %v", b, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the bridge: %v", err)
	}
	// The master lives, and must not hold it.
	if b, err := io.ReadAll(r); len(b) > 0 || err != nil {
		t.Errorf("fd 3: %q, %v", b, err)
	}
}

// ssh closes its pipes and sends SIGHUP when a login is given up: that is nothing to complain about.
func TestQuietWhenSSHLeaves(t *testing.T) {
	w := newWorld(t)
	if _, _, status := w.run("", "u@failed:22"); status != 255 { // the master is there
		t.Fatal(status)
	}
	cmd := w.command("u@left:22")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	io.ReadAll(out) // the master has let go
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 255 || errs.Len() > 0 {
		t.Errorf("%v, %q", err, errs.String())
	}
}

// Until the stream begins there are no last bytes to wait for.
func TestHangupEndsTheWait(t *testing.T) {
	w := newWorld(t)
	if err := w.dirs.Make(); err != nil {
		t.Fatal(err)
	}
	l, err := paths.Listen(w.dirs.Runtime, paths.MuxSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd := w.command("u@h:22")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, _, err := wire.NewConn(c).ReadHello(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 255 || errs.Len() > 0 {
		t.Errorf("%v, %q", err, errs.String())
	}
	if n, err := c.Read(make([]byte, 1)); n > 0 || err != io.EOF {
		t.Errorf("the master sees %d, %v", n, err)
	}
}

// nothing of a bypass outlives ssh for long, even if the far end never closes.
func TestBypassEndsAfterSSH(t *testing.T) {
	w := newWorld(t, "MUXPROXY_BYPASS=1")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd := w.command("u@" + l.Addr().String())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(in, "bye"); err != nil {
		t.Fatal(err)
	}
	in.Close()
	if b, err := io.ReadAll(c); string(b) != "bye" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestInputStops(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	in := newInput(r)
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 8)
	if n, err := in.Read(b); string(b[:n]) != "x" || err != nil {
		t.Errorf("%q, %v", b[:n], err)
	}
	got := make(chan error)
	go func() {
		_, err := in.Read(b)
		got <- err
	}()
	if !in.stop() {
		t.Error("it can't be stopped")
	}
	if err := <-got; !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v", err)
	}
	in.release()
}

func TestParseNotify(t *testing.T) {
	for msg, want := range map[string]struct {
		ready bool
		err   string
	}{
		"READY=1":                    {true, ""},
		"STATUS=up\nREADY=1\n":       {true, ""},
		"STATUS=loading":             {},
		"":                           {},
		"READY=0":                    {},
		"ERRNO=1":                    {false, "it does not say why"},
		"ERRNO=2\nSTATUS=a b\nX=1\n": {false, "a b"},
	} {
		ready, err := parseNotify(msg)
		if text := fmt.Sprint(err); ready != want.ready || want.err == "" && err != nil || want.err != "" && text != want.err {
			t.Errorf("%q: got %t, %v", msg, ready, err)
		}
	}
}

func TestMasterEnv(t *testing.T) {
	environ := []string{"HOME=1", "PATH=2", "LC_TIME=3", "XDG_DATA_HOME=4", "MUXPROXY_CONFIG=5", "MUXPROXY_BYPASS=6", "TZ=",
		"LD_PRELOAD=7", "SSH_ASKPASS=8", "DISPLAY=9", "LANGUAGE=10", "MUXPROXYX=11"}
	got := masterEnv(environ, func(name string) string {
		for _, pair := range environ {
			if v, ok := strings.CutPrefix(pair, name+"="); ok {
				return v
			}
		}
		return ""
	})
	if want := []string{"HOME=1", "PATH=2", "LC_TIME=3", "XDG_DATA_HOME=4", "MUXPROXY_CONFIG=5"}; !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}
