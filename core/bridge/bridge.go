// Package bridge is what ssh starts: it finds or starts the master, hands over stdio, and resolves ssh_config when asked.
package bridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/wire"
)

// Std are the standard streams of a process.
type Std struct{ In, Out, Err *os.File }

// Exit statuses. ssh makes nothing of its ProxyCommand's, so they are for whoever runs it by hand.
const (
	exitOK     = 0
	exitUsage  = 2
	exitFailed = 255
)

const (
	// answerTimeout bounds how long a master may take for what it does without asking anybody. With --fdpass it answers
	// when TCP is up, which has the master's own bound.
	answerTimeout = 30 * time.Second
	// farewell is how long after the master this process may learn that ssh has ended.
	farewell = 100 * time.Millisecond
	// attempts is how often a master that ends while it is asked is looked for again: one that has just stopped still
	// takes connections for a moment.
	attempts = 3
)

// resolveTimeout bounds ssh -G, with all jump hosts, below the master's patience for the answer. Only tests change it.
var resolveTimeout = 50 * time.Second

const bypassHint = "set MUXPROXY_BYPASS=1 to connect without it"

// bridge is one run.
type bridge struct {
	std    Std
	getenv func(string) string
	fdpass bool
	target wire.Target
	args   sshconfig.Args
	// gone is done when ssh has ended, or has been interrupted together with this process.
	gone   context.Context
	ssh    bool // it is ssh that started this
	parent int  // pid of ssh, or of a shell between
}

// Run is the program: args are those of the command line without its name. It returns the exit status, and closes no
// file of std, but may put /dev/null in the place of their descriptors. It must run at most once per process, since it
// changes how the process takes signals; a command, and a bypass by ProxyCommand or ProxyJump, takes the process over
// by execve(2) and does not return.
func Run(args []string, std Std, getenv func(string) string) int {
	cl, err := parse(args)
	switch {
	case err != nil:
		fmt.Fprintf(std.Err, "muxproxy: %s\nTry 'muxproxy --help'.\n", wire.Printable(err.Error()))
		return exitUsage
	case cl.help:
		io.WriteString(std.Out, Usage)
		return exitOK
	case cl.command:
		err := execMaster(args)
		fmt.Fprintf(std.Err, "muxproxy: %s\n", wire.Printable(err.Error()))
		return exitFailed
	}

	b := &bridge{std: std, getenv: getenv, fdpass: cl.fdpass, target: cl.target, parent: os.Getppid()}
	gone, stop := takeSignals()
	defer stop()
	b.gone = gone
	closeOnExec()

	b.args = sshconfig.Args{Options: cl.options}
	var unknown error // an option that only a newer ssh knows could change where the connection leads
	if argv, ok := sshconfig.FromParents(); ok {
		a, err := sshconfig.ParseArgs(argv)
		if err == nil {
			b.args = a
		}
		unknown = err
		b.ssh = true
	}
	if b.target.Alias == "" {
		b.target.Alias = b.args.Host()
	}

	if v := getenv("MUXPROXY_BYPASS"); v != "" && v != "0" {
		return b.bypass()
	}
	dirs, err := paths.Find(getenv)
	switch {
	case errors.Is(err, paths.ErrForeignHome):
		return b.bypass()
	case unknown != nil:
		return b.fail(fmt.Errorf("the ssh that started this: %w; %s", unknown, bypassHint))
	case err != nil:
		return b.fail(fmt.Errorf("%w; or %s", err, bypassHint))
	}
	return b.share(dirs)
}

// share has the client served by a master.
func (b *bridge) share(dirs paths.Dirs) int {
	hello := b.hello()
	if err := hello.Check(); err != nil {
		return b.fail(fmt.Errorf("%w; %s", err, bypassHint))
	}
	for i := 1; ; i++ {
		conn, err := obtain(b.gone, dirs, b.getenv)
		if err != nil {
			return b.fail(err)
		}
		status, resolved, err := b.talk(conn, hello, dirs)
		conn.Close()
		switch {
		case err == nil:
			return status
		case ended(err) && !resolved && i < attempts && b.gone.Err() == nil:
			continue
		case ended(err):
			err = errors.New("ended while it was asked")
		}
		return b.fail(fmt.Errorf("the master: %w; see %s, or %s", err, logFile(dirs), bypassHint))
	}
}

// hello is what the master has to know first.
func (b *bridge) hello() wire.Hello {
	h := wire.Hello{
		Version: wire.Version,
		Target:  b.target,
		Mode:    b.mode(),
		SSHArgs: b.args.Shape(),
		Env:     make(map[string]string),
	}
	if d := b.args.Destination; d != "" {
		h.SSHArgs = append(h.SSHArgs, "--", d) // Match user looks at how the user was named
	}
	for _, name := range wire.EnvNames {
		if v := b.getenv(name); v != "" {
			h.Env[name] = v
		}
	}
	return h
}

// talk says hello and does what the master answers. An error means that nothing was done but what resolved says: ssh -G has
// run, and with it perhaps a Match exec, which is not run again unasked.
func (b *bridge) talk(conn *net.UnixConn, h wire.Hello, dirs paths.Dirs) (status int, resolved bool, err error) {
	cut := context.AfterFunc(b.gone, func() { conn.Close() })
	defer cut()
	w := wire.NewConn(conn)
	var files []syscall.Conn
	if h.Mode == wire.Pipes {
		files = []syscall.Conn{b.std.In, b.std.Out}
	}
	if err := w.SendHello(h, files...); err != nil {
		return 0, resolved, err
	}
	for {
		// The first answer is prompt. Served, where the socket becomes the stream, waits for the connection to the host.
		if deadline := time.Now().Add(answerTimeout); !resolved || h.Mode == wire.Pipes {
			conn.SetReadDeadline(deadline)
		} else {
			conn.SetReadDeadline(time.Time{})
		}
		a, err := w.ReadAnswer()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return 0, resolved, fmt.Errorf("no answer within %v", answerTimeout)
		case err != nil:
			return 0, resolved, err
		}
		switch a.Kind {
		case wire.Served:
			if !cut() {
				return exitFailed, resolved, nil // gone in this very moment
			}
			conn.SetReadDeadline(time.Time{})
			return b.stream(w, h.Mode, dirs), resolved, nil
		case wire.Resolve:
			if resolved {
				return 0, resolved, fmt.Errorf("%w: it asked twice what ssh_config says", wire.ErrMalformed)
			}
			resolved = true
			if err := b.resolve(w, a.Via); err != nil {
				return 0, resolved, err
			}
		case wire.Bypass:
			conn.Close()
			return b.bypass(), resolved, nil
		case wire.Failed:
			b.say(a.Message)
			return exitFailed, resolved, nil
		}
	}
}

// mode is how the SSH stream can reach the master.
func (b *bridge) mode() wire.Mode {
	switch {
	case !wire.CanPassFiles:
		return wire.Copy
	case b.fdpass && isUnixSocket(b.std.Out):
		return wire.FDs
	case isStream(b.std.In) && isStream(b.std.Out):
		return wire.Pipes
	}
	return wire.Copy
}

// stream is what follows Served.
func (b *bridge) stream(w *wire.Conn, mode wire.Mode, dirs paths.Dirs) int {
	switch mode {
	case wire.FDs:
		return b.passBack(w.NetConn())
	case wire.Copy:
		return b.copy(w.NetConn(), "the master")
	}
	// The master holds ssh's pipes now, and ssh must see them end when the master says so.
	if err := letGo(b.std.In, b.std.Out); err != nil {
		return b.fail(err)
	}
	authenticated := false
	for {
		n, err := w.ReadNote()
		switch {
		case err == io.EOF && authenticated:
			return exitOK
		case err != nil:
			if !authenticated && !b.sshLeft() {
				b.say(fmt.Sprintf("the master ended the connection to %s before its login (%v); see %s, or %s",
					b.target.Addr(), err, logFile(dirs), bypassHint))
			}
			return exitFailed
		}
		if n.Text != "" {
			b.say(n.Text)
		}
		if n.Fatal {
			return exitFailed
		}
		if n.Authenticated && !authenticated {
			authenticated = true
			if !b.ssh {
				// asyncssh reads this end of it as well, and takes its end for the connection's.
				continue
			}
			// After ssh -f this process would hold whatever the caller reads ssh's errors from.
			if err := letGo(b.std.Err); err != nil {
				return b.fail(err)
			}
		}
	}
}

// resolve answers the master's question what ssh_config says, and brings the agent along. via are policy's jump hosts, as
// in wire.Answer.
func (b *bridge) resolve(w *wire.Conn, via []string) error {
	ctx, cancel := context.WithTimeoutCause(b.gone, resolveTimeout,
		fmt.Errorf("ssh -G took longer than %s (a Match exec?); %s", resolveTimeout, bypassHint))
	defer cancel()
	config, err := sshconfig.Run(ctx, b.request())
	var hops []sshconfig.Hop
	if err == nil {
		config.JumpVia(via)
		hops, err = sshconfig.Hops(ctx, b.request(), config)
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return w.SendResolution(wire.Resolution{Error: err.Error()}, nil)
	}
	r := wire.Resolution{Config: *config, AgentPath: b.agentPath(config)}
	for _, h := range hops {
		r.Hops = append(r.Hops, wire.Hop{
			Target:    wire.Target{User: h.User, Host: h.Host, Port: h.Port, Alias: h.Alias},
			Config:    *h.Config,
			AgentPath: b.agentPath(h.Config),
		})
	}
	if r.AgentPath == "" {
		err = w.SendResolution(r, nil)
	} else if agent, err1 := paths.Dial(filepath.Split(r.AgentPath)); err1 != nil {
		err = w.SendResolution(r, nil) // as in ssh, an agent that is not there is no error
	} else {
		r.Agent = true
		err = w.SendResolution(r, agent)
		agent.Close()
	}
	var failed *net.OpError
	if err != nil && !errors.As(err, &failed) {
		// It can't be sent as it is, so nothing was.
		return w.SendResolution(wire.Resolution{Error: err.Error()}, nil)
	}
	return err
}

// config asks ssh -G about the target.
func (b *bridge) config() (*sshconfig.Resolved, error) {
	return sshconfig.Run(b.gone, b.request())
}

func (b *bridge) request() sshconfig.Request {
	return sshconfig.Request{
		Args: b.args, User: b.target.User, Host: b.target.Host, Port: b.target.Port, Alias: b.target.Alias,
	}
}

// agentPath is the absolute path of the caller's agent, or "". See IdentityAgent in ssh_config(5); package sshconfig
// has expanded the rest of it.
func (b *bridge) agentPath(config *sshconfig.Resolved) string {
	path := config.Get("identityagent")
	switch {
	case strings.EqualFold(path, "none"):
		return ""
	case path == "", path == "SSH_AUTH_SOCK":
		path = b.getenv("SSH_AUTH_SOCK")
	}
	if path == "" {
		return ""
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "" // the working directory is gone, and so is the agent to us
	}
	return path
}

// say prints text for the person at ssh's terminal.
func (b *bridge) say(text string) {
	for line := range strings.Lines(strings.TrimRight(text, "\n")) {
		io.WriteString(b.std.Err, "muxproxy: "+wire.Printable(strings.TrimSuffix(line, "\n"))+"\n")
	}
}

// fail says why this client ends, unless ssh has ended before it.
func (b *bridge) fail(err error) int {
	if b.gone.Err() == nil {
		b.say(err.Error())
	}
	return exitFailed
}

// sshLeft reports whether ssh has ended. It closes its pipes, which the master may notice first, and then sends SIGHUP.
func (b *bridge) sshLeft() bool {
	select {
	case <-b.gone.Done():
		return true
	case <-time.After(farewell):
		return os.Getppid() != b.parent
	}
}

// takeSignals keeps the signals that ssh gets or sends from ending this process: SIGHUP, which ssh sends while its last
// bytes are on their way, those of the terminal, which are for ssh to act on, and SIGPIPE, which becomes EPIPE. The
// first of them ends the context. They are caught rather than ignored: an ignored signal would be so after execve(2).
func takeSignals() (context.Context, func()) {
	var list []os.Signal
	for _, s := range []os.Signal{syscall.SIGHUP, os.Interrupt, syscall.SIGQUIT} {
		if !signal.Ignored(s) {
			list = append(list, s)
		}
	}
	pipe := make(chan os.Signal, 1) // never read
	signal.Notify(pipe, syscall.SIGPIPE)
	if len(list) == 0 {
		return context.Background(), func() { signal.Stop(pipe) } // with none, NotifyContext would take all there are
	}
	ctx, stop := signal.NotifyContext(context.Background(), list...)
	return ctx, func() {
		stop()
		signal.Stop(pipe)
	}
}

// ended reports whether err says that the other end of a socket has gone.
func ended(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

func logFile(dirs paths.Dirs) string { return filepath.Join(dirs.State, paths.MasterLog) }
