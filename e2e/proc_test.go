//go:build linux

package e2e

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// patience bounds every wait that should end at once. It is long because two cores run many tests, with the race
// detector.
const patience = 30 * time.Second

// buffer collects what a process writes. Waiters are told of each byte.
type buffer struct {
	mu   sync.Mutex // guards all below
	b    []byte
	seen int // expect goes on from here
	eof  bool
	more chan struct{} // closed and replaced when b or eof change
}

func newBuffer() *buffer { return &buffer{more: make(chan struct{})} }

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b = append(b.b, p...)
	close(b.more)
	b.more = make(chan struct{})
	return len(p), nil
}

func (b *buffer) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.eof = true
	close(b.more)
	b.more = make(chan struct{})
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.b)
}

// expect waits for want after what an earlier call found and returns what was before it.
func (b *buffer) expect(want string, within time.Duration) (string, bool) {
	deadline := time.After(within)
	for {
		b.mu.Lock()
		if before, _, ok := bytes.Cut(b.b[b.seen:], []byte(want)); ok {
			b.seen += len(before) + len(want)
			b.mu.Unlock()
			return string(before), true
		}
		more, eof := b.more, b.eof
		b.mu.Unlock()
		if eof {
			return "", false
		}
		select {
		case <-more:
		case <-deadline:
			return "", false
		}
	}
}

// result is how a process ended.
type result struct {
	out, err string
	status   int            // 128 plus the signal if one ended it, as a shell has it
	sig      syscall.Signal // 0: it exited
	took     time.Duration
}

// proc is a process with its streams under the test's control. It is gone when the test ends.
type proc struct {
	t        testing.TB
	cmd      *exec.Cmd
	in       io.WriteCloser // the terminal, with a pty
	out, err *buffer
	tty      *os.File // the pty's own end; nil without one
	began    time.Time
	done     chan struct{} // closed when it has ended and its output is read to the end
	res      result        // valid after done
}

// spec is what to start.
type spec struct {
	args  []string
	env   []string
	dir   string
	stdin io.Reader // nil: proc.in is a pipe to it
	null  bool      // stdin is /dev/null
	// stdout is the test's own, which closes its copy; nil: proc.out collects it
	stdout *os.File
	tty    bool // all three streams are a terminal of its own, which controls it
	sys    *syscall.SysProcAttr
}

// start starts a process.
func start(t testing.TB, s spec) *proc {
	t.Helper()
	p := &proc{t: t, cmd: exec.Command(s.args[0], s.args[1:]...), out: newBuffer(), err: newBuffer(), began: time.Now(),
		done: make(chan struct{})}
	p.cmd.Env, p.cmd.Dir, p.cmd.SysProcAttr = s.env, s.dir, s.sys
	var readers sync.WaitGroup
	collect := func(b *buffer, r io.Reader) {
		readers.Go(func() {
			io.Copy(b, r) // a pty's EOF is EIO
			b.end()
		})
	}
	if s.tty {
		blocking, err := pty.StartWithSize(p.cmd, &pty.Winsize{Rows: 24, Cols: 80})
		if err != nil {
			t.Fatalf("%q: %v", s.args, err)
		}
		// The package's ioctls make its file a blocking one, whose Close would wait for the reader and hang nothing up.
		fd, err := unix.FcntlInt(blocking.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		blocking.Close()
		if err == nil {
			err = unix.SetNonblock(fd, true)
		}
		if err != nil {
			t.Fatal(err)
		}
		p.tty = os.NewFile(uintptr(fd), "pty")
		p.in = p.tty
		collect(p.out, p.tty)
		p.err.end()
	} else {
		p.cmd.Stdin = s.stdin
		if s.stdin == nil && !s.null {
			in, err := p.cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			p.in = in
		}
		// Pipes of our own, not Cmd's: it would close them when the process ends, with output of its children unread.
		var writers []*os.File
		for dst, b := range map[*io.Writer]*buffer{&p.cmd.Stdout: p.out, &p.cmd.Stderr: p.err} {
			if b == p.out && s.stdout != nil {
				*dst = s.stdout
				b.end()
				continue
			}
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			*dst = w
			writers = append(writers, w)
			collect(b, r)
			t.Cleanup(func() { r.Close() })
		}
		err := p.cmd.Start()
		for _, w := range writers {
			w.Close()
		}
		if err != nil {
			t.Fatalf("%q: %v", s.args, err)
		}
	}
	go func() {
		err := p.cmd.Wait()
		p.res.took = time.Since(p.began)
		if p.tty == nil {
			readers.Wait()
		} else {
			// What it left behind may hold the terminal. What it wrote itself is there to be read now.
			p.tty.SetReadDeadline(time.Now().Add(time.Second))
			readers.Wait()
		}
		p.res.out, p.res.err = p.out.String(), p.err.String()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
				p.res.sig = ws.Signal()
				p.res.status = 128 + int(p.res.sig)
			} else {
				p.res.status = ws.ExitStatus()
			}
		}
		close(p.done)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		if p.tty != nil {
			p.tty.Close()
		}
	})
	return p
}

func (p *proc) pid() int { return p.cmd.Process.Pid }

// wait waits until the process has ended and all that hold its output have closed it. Longer than within fails the test.
func (p *proc) wait(within time.Duration) result {
	p.t.Helper()
	select {
	case <-p.done:
		return p.res
	case <-time.After(within):
		p.t.Fatalf("%q still runs, or its output is still held open, after %v\nstdout: %s\nstderr: %s",
			p.cmd.Args, within, tail(p.out.String()), tail(p.err.String()))
		return result{}
	}
}

// settle gives a process that seems to be ending the time to say why.
func (p *proc) settle() {
	select {
	case <-p.done:
	case <-time.After(time.Second):
	}
}

// expect waits for text on stdout (or the terminal) after what was found before, and returns what came before it.
func (p *proc) expect(want string) string {
	p.t.Helper()
	before, ok := p.out.expect(want, patience)
	if !ok {
		p.settle()
		p.t.Fatalf("%q: no %q on stdout\nstdout: %s\nstderr: %s", p.cmd.Args, want, tail(p.out.String()), tail(p.err.String()))
	}
	return before
}

// expectErr is expect for stderr.
func (p *proc) expectErr(want string) string {
	p.t.Helper()
	before, ok := p.err.expect(want, patience)
	if !ok {
		p.settle()
		p.t.Fatalf("%q: no %q on stderr\nstdout: %s\nstderr: %s", p.cmd.Args, want, tail(p.out.String()), tail(p.err.String()))
	}
	return before
}

func (p *proc) send(s string) {
	p.t.Helper()
	if _, err := io.WriteString(p.in, s); err != nil {
		p.t.Fatalf("%q: stdin: %v\nstderr: %s", p.cmd.Args, err, tail(p.err.String()))
	}
}

// echo sends a line to a `cat` at the other end and waits for it to come back.
func (p *proc) echo(line string) {
	p.t.Helper()
	p.send(line + "\n")
	p.expect(line + "\n")
}

// resize changes the terminal's size.
func (p *proc) resize(rows, cols uint16) {
	p.t.Helper()
	c, err := p.tty.SyscallConn()
	if err == nil {
		var ioctl error
		err = c.Control(func(fd uintptr) {
			ioctl = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
		})
		if err == nil {
			err = ioctl
		}
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *proc) signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("%q: %v: %v", p.cmd.Args, sig, err)
	}
}

// procStat is what /proc/PID/stat says; the zero value: no such process.
type procStat struct {
	state           byte
	parent, session int
}

func stat(pid int) procStat {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}
	}
	// The command name is in parentheses and may hold any byte.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 4 {
		return procStat{}
	}
	parent, _ := strconv.Atoi(f[1])
	session, _ := strconv.Atoi(f[3])
	return procStat{f[0][0], parent, session}
}

// gone reports whether a process has ended; that nobody has waited for it yet doesn't matter.
func gone(pid int) bool {
	s := stat(pid).state
	return s == 0 || s == 'Z' || s == 'X'
}

// children returns the process ids below pid, one generation.
func children(pid int) []int {
	var kids []int
	for p := range processes() {
		if stat(p).parent == pid {
			kids = append(kids, p)
		}
	}
	return kids
}

func kill9(pid int) { syscall.Kill(pid, syscall.SIGKILL) }

// eventually polls for what has no event to wait for: another process's state.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	if !within(patience, cond) {
		t.Fatalf("not within %v: %s", patience, what)
	}
}

func within(d time.Duration, cond func() bool) bool {
	for deadline := time.Now().Add(d); ; time.Sleep(10 * time.Millisecond) {
		if cond() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}

// tail is the end of a text, for failures.
func tail(s string) string {
	const most = 3000
	if len(s) > most {
		return "..." + s[len(s)-most:]
	}
	return s
}
