//go:build unix

package bridge

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/wire"
)

// The test binary plays all programs, by the name it is started under.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "muxproxy":
		if d, err := time.ParseDuration(os.Getenv("TEST_RESOLVE_TIMEOUT")); err == nil {
			resolveTimeout = d
		}
		os.Exit(Run(os.Args[1:], Std{os.Stdin, os.Stdout, os.Stderr}, os.Getenv))
	case "muxproxyd":
		if len(os.Args) != 2 || os.Args[1] != "master" {
			fmt.Printf("command %q\n", os.Args[1:])
			os.Exit(3)
		}
		if err := fakeMaster(); err != nil {
			fmt.Fprintln(os.Stderr, "fake master:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case "ssh":
		os.Exit(fakeSSH())
	}
	os.Exit(m.Run())
}

// fakeSSH is ssh -G, an ssh with a ProxyCommand, or what a ProxyJump runs.
func fakeSSH() int {
	if proxy := os.Getenv("TEST_SSH_PROXY"); proxy != "" {
		os.Unsetenv("TEST_SSH_PROXY")
		cmd := exec.Command("/bin/sh", "-c", "exec "+proxy)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT) // they are for the bridge
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		for _, f := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
			f.Close() // as if it had gone into the background
		}
		cmd.Wait()
		return cmd.ProcessState.ExitCode()
	}
	if len(os.Args) > 1 && os.Args[1] == "-G" {
		if reason := os.Getenv("TEST_SSH_FAILS"); reason != "" {
			fmt.Fprintln(os.Stderr, reason)
			return 255
		}
		if os.Getenv("TEST_SSH_HANGS") != "" { // in a Match exec, which outlives it, until the test ends
			cmd := exec.Command("cat", os.Getenv("MUXPROXY_TEST_LEASH"))
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
			cmd.Run()
		}
		fmt.Printf("user fromfile\nhostname fromfile\nport 1\n%s", os.Getenv("TEST_SSH_G"))
		return 0
	}
	fmt.Printf("%q\n", os.Args[1:])
	io.Copy(os.Stdout, os.Stdin)
	return 0
}

// fakeMaster serves canned answers, by the name of the host that is asked for. It ends with the test.
func fakeMaster() error {
	// The test holds the other end of this pipe.
	leash, err := os.Open(os.Getenv("MUXPROXY_TEST_LEASH"))
	if err != nil {
		return err
	}
	starts, err := os.OpenFile(os.Getenv("MUXPROXY_TEST_STARTS"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	cwd, err := os.Getwd()
	if err != nil {
		return err
	}
	sid, err := unix.Getsid(0)
	if err != nil {
		return err
	}
	fmt.Fprintf(starts, "cwd=%s leader=%t env=%s\n", cwd, sid == os.Getpid(), strings.Join(os.Environ(), ","))
	starts.Close()
	notify := func(msg string) error {
		c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: os.Getenv("NOTIFY_SOCKET"), Net: "unixgram"})
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte(msg))
		return err
	}
	switch os.Getenv("MUXPROXY_TEST_MASTER") {
	case "says why":
		if err := notify("STATUS=config.hcl:1:2: no\x1b[2J good\nERRNO=1\n"); err != nil {
			return err
		}
		<-untilEOF(leash)
		return nil
	case "dies":
		return errors.New("out of luck")
	case "is killed":
		return syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case "lies":
		if err := notify("READY=1"); err != nil {
			return err
		}
		<-untilEOF(leash)
		return nil
	}
	dirs, err := paths.Find(os.Getenv)
	if err != nil {
		return err
	}
	if err := dirs.Make(); err != nil {
		return err
	}
	lock, err := paths.TryLock(filepath.Join(dirs.Run, paths.MasterLock))
	if err != nil {
		return err
	}
	defer lock.Close()
	l, err := paths.Listen(dirs.Runtime, paths.MuxSocket)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := dirs.Publish(dirs.Runtime); err != nil {
		return err
	}
	if err := notify("READY=1\nSTATUS=ready\n"); err != nil {
		return err
	}
	go serve(l)
	<-untilEOF(leash)
	return nil
}

func untilEOF(f *os.File) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(io.Discard, f)
	}()
	return done
}

func serve(l *paths.Listener) {
	for n := 1; ; n++ {
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if err := serveOne(wire.NewConn(c), n); err != nil {
				fmt.Fprintln(os.Stderr, "fake master:", err)
			}
		}()
	}
}

// serveOne answers one bridge, the nth connection.
func serveOne(w *wire.Conn, n int) error {
	h, files, err := w.ReadHello()
	if err != nil {
		return err
	}
	for _, f := range files {
		defer f.Close()
	}
	answer := func(kind wire.AnswerKind) error { return w.SendAnswer(wire.Answer{Kind: kind}) }
	switch h.Target.Host {
	case "failed":
		return w.SendAnswer(wire.Answer{Kind: wire.Failed, Message: "failed:22: no\x1b[2J route\nsecond line"})
	case "hello":
		return w.SendAnswer(wire.Answer{Kind: wire.Failed, Message: fmt.Sprintf("%s %q %s %q HOME=%s agent=%s",
			h.Target, h.Target.Alias, h.Mode, h.SSHArgs, h.Env["HOME"], h.Env["SSH_AUTH_SOCK"])})
	case "never":
		return nil
	case "atlast":
		if n < attempts {
			return nil
		}
		return w.SendAnswer(wire.Answer{Kind: wire.Failed, Message: "at last"})
	case "resolve-and-end":
		if n > 1 {
			return w.SendAnswer(wire.Answer{Kind: wire.Failed, Message: "asked again"})
		}
		if err := answer(wire.Resolve); err != nil {
			return err
		}
		_, _, err := w.ReadResolution()
		return err
	case "bypass", "127.0.0.1":
		return answer(wire.Bypass)
	case "resolve":
		if err := answer(wire.Resolve); err != nil {
			return err
		}
		r, agent, err := w.ReadResolution()
		if err != nil {
			return err
		}
		heard := "none"
		if agent != nil {
			defer agent.Close()
			b, err := io.ReadAll(agent)
			if err != nil {
				return err
			}
			heard = string(b)
		}
		return w.SendAnswer(wire.Answer{Kind: wire.Failed, Message: fmt.Sprintf("%s@%s:%s agent %s at %s, error %q",
			r.Config.Get("user"), r.Config.Get("hostname"), r.Config.Get("port"), heard, filepath.Base(r.AgentPath), r.Error)})
	case "twice":
		if err := answer(wire.Resolve); err != nil {
			return err
		}
		if _, _, err := w.ReadResolution(); err != nil {
			return err
		}
		return answer(wire.Resolve)
	case "hang":
		if err := w.SendNote(wire.Note{Text: "not what was asked for"}); err != nil {
			return err
		}
		return nil
	}

	if err := answer(wire.Served); err != nil {
		return err
	}
	switch h.Target.Host {
	case "fatal":
		return w.SendNote(wire.Note{Text: "denied by policy: no", Fatal: true})
	case "cut":
		return nil
	case "left":
		files[0].SetReadDeadline(time.Now().Add(time.Minute))
		_, err := io.Copy(io.Discard, files[0]) // until ssh leaves
		return err
	}
	if h.Mode == wire.Pipes {
		if err := w.SendNote(wire.Note{Text: "waiting for\u202e you"}); err != nil {
			return err
		}
		if err := w.SendNote(wire.Note{Authenticated: true}); err != nil {
			return err
		}
		_, err := io.Copy(files[1], files[0])
		return err
	}
	_, err = io.Copy(w.NetConn(), w.NetConn())
	return err
}

// world is a home directory with programs and at most one master, which ends with the test.
type world struct {
	t      *testing.T
	bin    string
	env    []string
	dirs   paths.Dirs
	starts string
}

func newWorld(t *testing.T, env ...string) *world {
	t.Helper()
	base, err := os.MkdirTemp("", "mux")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	w := &world{t: t, bin: filepath.Join(base, "bin"), starts: filepath.Join(base, "starts")}
	home, leash := filepath.Join(base, "home"), filepath.Join(base, "leash")
	for _, dir := range []string{w.bin, home, filepath.Join(base, "run")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"muxproxy", "muxproxyd", "ssh"} {
		link(t, self, filepath.Join(w.bin, name))
	}
	if err := syscall.Mkfifo(leash, 0o600); err != nil {
		t.Fatal(err)
	}
	hold, err := os.OpenFile(leash, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.env = append([]string{
		"HOME=" + home, "PATH=" + w.bin + ":/usr/bin:/bin", "SHELL=/bin/sh", "XDG_RUNTIME_DIR=" + filepath.Join(base, "run"),
		"MUXPROXY_TEST_LEASH=" + leash, "MUXPROXY_TEST_STARTS=" + w.starts, "SECRET=not for the master",
		"GOCOVERDIR=" + os.Getenv("GOCOVERDIR"),
		"GORACE=atexit_sleep_ms=0", // a second for each process otherwise
	}, env...)
	if w.dirs, err = paths.Find(w.getenv); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		hold.Close()
		// The master holds its lock until it has ended.
		for {
			l, err := paths.TryLock(filepath.Join(w.dirs.Run, paths.MasterLock))
			if err == nil {
				l.Close()
				return
			}
			if !errors.Is(err, paths.ErrLocked) {
				return // never made
			}
			time.Sleep(poll)
		}
	})
	return w
}

func (w *world) getenv(name string) string {
	value := ""
	for _, pair := range w.env {
		if n, v, _ := strings.Cut(pair, "="); n == name {
			value = v
		}
	}
	return value
}

// link gives the test binary another name; a symbolic link would not hide the first one.
func link(t *testing.T, from, to string) {
	t.Helper()
	if os.Link(from, to) == nil {
		return
	}
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// started returns a line for each start of a master.
func (w *world) started() []string {
	b, err := os.ReadFile(w.starts)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")[:bytes.Count(b, []byte("\n"))]
}

func (w *world) command(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(w.t.Context(), filepath.Join(w.bin, "muxproxy"), args...)
	cmd.Env = w.env
	return cmd
}

// run runs a bridge with text as ssh's pipe to it.
func (w *world) run(text string, args ...string) (out, errs string, status int) {
	w.t.Helper()
	return w.finish(w.command(args...), text)
}

// finish runs a command with text as its input.
func (w *world) finish(cmd *exec.Cmd, text string) (out, errs string, status int) {
	w.t.Helper()
	var o, e bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(text), &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}
