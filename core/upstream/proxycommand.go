package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// proxyGrace is how long a ProxyCommand may take to end after SIGHUP, before it is killed.
	proxyGrace = time.Second
	// maxProxyLine bounds a line of its stderr.
	maxProxyLine = 1024
)

// proxyConn is the stream of a ProxyCommand: two pipes. It owns the process.
type proxyConn struct {
	d      *dialing
	cmd    *exec.Cmd
	in     *os.File // the process's stdout
	out    *os.File // and stdin
	stderr *lineWriter
	close  func()
	done   chan struct{} // closed when the process has been waited for
	status error         // of it; set before done closes
}

// proxyCommand runs the user's ProxyCommand as ssh does (ssh_proxy_connect of sshconnect.c), without a terminal.
func (d *dialing) proxyCommand(ctx context.Context) (net.Conn, error) {
	names, err := sshconfig.LocalNames()
	if err != nil {
		return nil, d.errorf("ProxyCommand: %s", use.Printable(err.Error()))
	}
	t := d.spec.Target
	names.User, names.Host, names.Port = t.User, strings.Trim(t.Host, "[]"), strconv.Itoa(int(t.Port))
	names.Alias, names.Key = t.Alias, d.option("hostkeyalias")
	if names.Alias == "" {
		names.Alias = names.Host
	}
	if names.Key == "" {
		names.Key = names.Alias
	}
	command, err := d.spec.Config.ExpandProxyCommand(names)
	if err != nil {
		return nil, d.errorf("ProxyCommand: %s", use.Printable(err.Error()))
	}
	d.debugf("Executing proxy command: exec %s", command)
	shell := "/bin/sh"
	for _, v := range d.spec.Env {
		if s, ok := strings.CutPrefix(v, "SHELL="); ok && s != "" {
			shell = s
		}
	}
	cmd := exec.Command(shell, "-c", "exec "+command)
	cmd.Env = append(os.Environ(), d.spec.Env...)
	// A grandchild may hold on to stderr.
	cmd.WaitDelay = proxyGrace
	stderr := &lineWriter{d: d}
	cmd.Stderr = stderr
	if d.on("proxyusefdpass", false) {
		return d.proxyFD(ctx, cmd, stderr)
	}
	c, err := startProxy(d, cmd, stderr)
	if err != nil {
		e := d.errorf("ProxyCommand: %s", systemText(err))
		e.Err = err
		return nil, e
	}
	return c, nil
}

func startProxy(d *dialing, cmd *exec.Cmd, stderr *lineWriter) (*proxyConn, error) {
	childIn, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	in, childOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, childIn.Close(), out.Close())
	}
	cmd.Stdin, cmd.Stdout = childIn, childOut
	ownGroup(cmd)
	err = cmd.Start()
	childIn.Close()
	childOut.Close()
	if err != nil {
		return nil, errors.Join(err, in.Close(), out.Close())
	}
	p := &proxyConn{d: d, cmd: cmd, in: in, out: out, stderr: stderr, done: make(chan struct{})}
	p.close = sync.OnceFunc(func() {
		p.in.Close()
		p.out.Close()
		select {
		case <-p.done: // its number may be another's by now
		default:
			hangUp(cmd)
		}
	})
	go func() {
		p.status = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *proxyConn) Read(b []byte) (int, error)  { return p.in.Read(b) }
func (p *proxyConn) Write(b []byte) (int, error) { return p.out.Write(b) }

// SyscallConn implements syscall.Conn: of what is read from.
func (p *proxyConn) SyscallConn() (syscall.RawConn, error) { return p.in.SyscallConn() }

func (p *proxyConn) LocalAddr() net.Addr                { return proxyAddr{} }
func (p *proxyConn) RemoteAddr() net.Addr               { return proxyAddr{} }
func (p *proxyConn) SetReadDeadline(t time.Time) error  { return p.in.SetReadDeadline(t) }
func (p *proxyConn) SetWriteDeadline(t time.Time) error { return p.out.SetWriteDeadline(t) }
func (p *proxyConn) SetDeadline(t time.Time) error {
	return errors.Join(p.in.SetReadDeadline(t), p.out.SetWriteDeadline(t))
}

// Close tells the process to end. wait waits for that.
func (p *proxyConn) Close() error {
	p.close()
	return nil
}

// wait is called after Close. It returns within about twice proxyGrace.
func (p *proxyConn) wait() {
	grace := time.NewTimer(proxyGrace)
	defer grace.Stop()
	select {
	case <-p.done:
	case <-grace.C:
		kill(p.cmd)
		<-p.done
	}
}

// failure says why the stream has ended before the server identified itself.
func (p *proxyConn) failure() string {
	p.Close()
	p.wait()
	return proxyFailure(p.status, p.stderr)
}

func proxyFailure(status error, stderr *lineWriter) string {
	msg := "ProxyCommand ended before the server identified itself"
	var exit *exec.ExitError
	if errors.As(status, &exit) && exit.Exited() {
		msg += fmt.Sprintf(" (exit status %d)", exit.ExitCode())
	}
	if last := stderr.lastLine(); last != "" {
		msg += `; it said "` + last + `"`
	}
	return msg
}

// proxyAddr is the address of what has none.
type proxyAddr struct{}

func (proxyAddr) Network() string { return "proxy" }
func (proxyAddr) String() string  { return "proxy command" }

// lineWriter tells what a ProxyCommand writes to stderr, line by line.
type lineWriter struct {
	d    *dialing
	mu   sync.Mutex // guards the rest
	part []byte
	last string // escaped
}

func (w *lineWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for rest := b; len(rest) > 0; {
		line, after, ended := bytes.Cut(rest, []byte("\n"))
		rest = after
		w.part = append(w.part, line[:min(len(line), maxProxyLine-len(w.part))]...)
		if !ended {
			break
		}
		w.flush()
	}
	return len(b), nil
}

// flush is called with mu held.
func (w *lineWriter) flush() {
	if line := strings.TrimSpace(string(w.part)); line != "" {
		w.last = use.Printable(line)
		w.d.debugf("proxy command: %s", line)
	}
	w.part = w.part[:0]
}

func (w *lineWriter) lastLine() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flush()
	return w.last
}
