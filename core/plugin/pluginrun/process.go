package pluginrun

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// process is a plugin's process, as go-plugin's runner.Runner.
type process struct {
	cmd    *exec.Cmd
	dir    string // of its sockets
	line   []byte // the first on its standard input
	stderr func(string)

	handshake *io.PipeReader // what go-plugin reads: one line
	done      chan struct{}  // closed when the process has ended and been waited for

	mu    sync.Mutex // guards what follows
	id    int        // pid; 0: not started
	ended bool       // its id may be another's soon
	stdin *os.File   // the life line; nil once cut
	err   error      // how it ended
	bad   error      // what is wrong with its handshake
	last  string     // last line of its standard error
}

// Start implements runner.Runner.
func (p *process) Start(context.Context) error {
	var ours, theirs [3]*os.File
	for i := range ours {
		r, w, err := os.Pipe()
		if err != nil {
			closeAll(ours[:])
			closeAll(theirs[:])
			return err
		}
		ours[i], theirs[i] = r, w
		if i == 0 {
			ours[i], theirs[i] = w, r
		}
	}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = theirs[0], theirs[1], theirs[2]
	_, err := ours[0].Write(p.line) // a new pipe has room for it
	if err == nil {
		err = startApart(p.cmd)
	}
	closeAll(theirs[:])
	if err != nil {
		closeAll(ours[:])
		return err
	}
	var out *io.PipeWriter
	p.handshake, out = io.Pipe()
	p.mu.Lock()
	p.id, p.stdin = p.cmd.Process.Pid, ours[0]
	p.mu.Unlock()
	var reading sync.WaitGroup
	reading.Go(func() { p.readStdout(ours[1], out) })
	reading.Go(func() { p.readStderr(ours[2]) })
	go p.wait(&reading, ours[1], ours[2])
	return nil
}

// wait is the process's only waiter.
func (p *process) wait(reading *sync.WaitGroup, outputs ...*os.File) {
	// Where it can be waited for without freeing its pid, this group is surely the plugin's.
	held := awaitEnd(p.cmd.Process.Pid)
	if held {
		p.end()
	}
	err := p.cmd.Wait()
	if !held {
		p.end()
	}
	p.mu.Lock()
	p.err = err
	p.mu.Unlock()
	// A child that left the group may hold the pipes open.
	for _, f := range outputs {
		if f.SetReadDeadline(time.Now().Add(drainTime)) != nil {
			f.Close() // no deadlines here; reading ends all the same
		}
	}
	reading.Wait()
	closeAll(outputs)
	p.cut()
	close(p.done)
}

// readStdout passes the first line on and drops the rest.
func (p *process) readStdout(f *os.File, out *io.PipeWriter) {
	r := bufio.NewReaderSize(f, maxLine)
	line, err := r.ReadSlice('\n')
	if err == nil {
		err = p.check(string(bytes.TrimSpace(line)))
	} else if errors.Is(err, bufio.ErrBufferFull) {
		err = errors.New("does not begin as a plugin does: its first line of output is too long")
	} else {
		err = nil // it ended: failure has words for that
	}
	if err != nil {
		p.fail(err)
		out.CloseWithError(err)
	} else {
		_, _ = out.Write(line)
		out.Close()
	}
	_, _ = io.Copy(io.Discard, r)
}

// check judges the handshake, so that the message is for a person.
func (p *process) check(line string) error {
	parts := strings.Split(line, "|")
	if len(parts) < 5 || parts[0] != "1" {
		return fmt.Errorf("does not begin as a plugin does: its first line of output is %q", clip(plugin.Printable(line), 80))
	}
	if parts[1] != strconv.Itoa(plugin.ProtocolVersion) {
		return fmt.Errorf("speaks version %s of the plugin protocol, this muxproxy speaks %d: use versions that fit",
			clip(plugin.Printable(parts[1]), 20), plugin.ProtocolVersion)
	}
	if parts[4] != "grpc" {
		return fmt.Errorf("speaks %q instead of grpc", clip(plugin.Printable(parts[4]), 20))
	}
	return nil
}

func (p *process) readStderr(f *os.File) {
	r := bufio.NewReaderSize(f, maxLine)
	for {
		line, isPrefix, err := r.ReadLine()
		if err != nil {
			return
		}
		text := string(line)
		for isPrefix && err == nil { // the rest is dropped
			_, isPrefix, err = r.ReadLine()
		}
		p.mu.Lock()
		p.last = text
		p.mu.Unlock()
		p.stderr(text)
	}
}

func (p *process) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bad == nil {
		p.bad = err
	}
}

// failure says why a start failed, if it is the process's doing. It is for after the end.
func (p *process) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.bad != nil:
		return p.bad
	case !p.ended || p.handshake == nil:
		return nil
	case p.err != nil && p.err.Error() == "signal: killed":
		return nil // we did
	}
	how := "exit status 0"
	if p.err != nil {
		how = p.err.Error()
	}
	if p.last != "" {
		how += ", its last words: " + clip(plugin.Printable(p.last), 200)
	}
	return fmt.Errorf("ended before it was ready: %s", how)
}

// Wait implements runner.Runner.
func (p *process) Wait(context.Context) error {
	<-p.done
	return p.status()
}

func (p *process) status() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Kill implements runner.Runner.
func (p *process) Kill(context.Context) error {
	p.kill()
	<-p.done
	return nil
}

// kill ends the process and its group, unless its id is free for others.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.id != 0 && !p.ended {
		killGroup(p.id)
	}
}

// cut ends the plugin's standard input.
func (p *process) cut() {
	p.mu.Lock()
	f := p.stdin
	p.stdin = nil
	p.mu.Unlock()
	if f != nil {
		f.Close()
	}
}

// end kills what is left of the group, for the last time.
func (p *process) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	killGroup(p.id)
	p.ended = true
}

func (p *process) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.id
}

// Stdout implements runner.Runner.
func (p *process) Stdout() io.ReadCloser { return p.handshake }

// Stderr implements runner.Runner. There is nothing for go-plugin: it panics over {"@message": 1}.
func (p *process) Stderr() io.ReadCloser { return io.NopCloser(strings.NewReader("")) }

// Name implements runner.Runner.
func (p *process) Name() string { return p.cmd.Path }

// ID implements runner.Runner.
func (p *process) ID() string {
	if id := p.pid(); id != 0 {
		return strconv.Itoa(id)
	}
	return ""
}

// Diagnose implements runner.Runner.
func (p *process) Diagnose(context.Context) string { return "" }

// PluginToHost implements runner.Runner. A plugin listens in its own directory, where no other can be in its place.
func (p *process) PluginToHost(network, address string) (string, string, error) {
	inside := network == "unix" && strings.HasPrefix(filepath.Clean(address), p.dir+string(filepath.Separator))
	if local := network == "tcp" && strings.HasPrefix(address, "127.0.0.1:"); !inside && !(runtime.GOOS == "windows" && local) {
		err := fmt.Errorf("listens at %s %q, not in the directory it was given",
			plugin.Printable(network), clip(plugin.Printable(address), 100))
		p.fail(err)
		return "", "", err
	}
	return network, address, nil
}

// HostToPlugin implements runner.Runner.
func (p *process) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "..."
}
