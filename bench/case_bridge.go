//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/wire"
)

// errResolve says that the master wants to know anew what ssh -G says: one of the files that ssh reads has changed.
var errResolve = errors.New("the master asks for ssh_config")

// bridgeOwn is the time from the start of a bridge to the first byte of the master's, less what the master takes for that
// when this process says the same hello.
func bridgeOwn(ctx context.Context, b *bench) error {
	return b.inWorld(ctx, setting{}, func(w *world) error {
		if _, err := w.hold(ctx, pipes); err != nil {
			return err
		}
		conf := w.path(confName(pipes))
		target := fmt.Sprintf("%s@127.0.0.1:%d", b.me, w.port)
		started := func() (time.Duration, error) {
			in, feed, err := os.Pipe()
			if err != nil {
				return 0, err
			}
			defer feed.Close()
			read, out, err := os.Pipe()
			if err != nil {
				in.Close()
				return 0, err
			}
			defer read.Close()
			cmd := w.command(filepath.Join(b.bin, "muxproxy"), "-F", conf, target, "box")
			cmd.Stdin, cmd.Stdout = in, out
			began := time.Now()
			p, err := w.start(cmd)
			in.Close()
			out.Close()
			if err != nil {
				return 0, err
			}
			defer p.kill()
			read.SetReadDeadline(time.Now().Add(patience))
			if _, err = read.Read(make([]byte, 4)); err != nil {
				return 0, fmt.Errorf("no byte of the master's: %w: %s", err, p.errs)
			}
			return time.Since(began), nil
		}
		args, err := sshconfig.ParseArgs([]string{"-F", conf})
		if err != nil {
			return err
		}
		asked := func() (time.Duration, error) {
			began := time.Now()
			nc, err := w.connect(ctx)
			if err != nil {
				return 0, err
			}
			defer nc.Close()
			in, feed, err := os.Pipe()
			if err != nil {
				return 0, err
			}
			defer feed.Close()
			defer in.Close()
			read, out, err := os.Pipe()
			if err != nil {
				return 0, err
			}
			defer read.Close()
			defer out.Close()
			c := wire.NewConn(nc)
			h := w.hello(args, wire.Pipes)
			nc.SetDeadline(began.Add(patience))
			if err := c.SendHello(h, in, out); err != nil {
				return 0, err
			}
			a, err := c.ReadAnswer()
			switch {
			case err != nil:
				return 0, err
			case a.Kind == wire.Resolve:
				return 0, errResolve
			case a.Kind != wire.Served:
				return 0, fmt.Errorf("the master answers %s: %s", a.Kind, a.Message)
			}
			read.SetReadDeadline(began.Add(patience))
			_, err = read.Read(make([]byte, 4))
			return time.Since(began), err
		}
		if _, err := started(); err != nil { // from now on the master knows the answer of ssh -G
			return err
		}
		m := b.add("a bridge's own time", "ms", atMost(4))
		return b.turns(b.rounds(41, 21), []way{pipes}, func(_ int, by way) error {
			whole, err := started()
			if err != nil {
				return err
			}
			less, err := asked()
			if errors.Is(err, errResolve) {
				return nil // this round compares nothing
			}
			m.put(by, float64(whole-less)/float64(time.Millisecond))
			return err
		})
	})
}

// connect connects to the world's master.
func (w *world) connect(ctx context.Context) (*net.UnixConn, error) {
	dirs, err := paths.Find(func(name string) string { return w.env[name] })
	if err != nil {
		return nil, err
	}
	return bridge.Connect(ctx, dirs)
}

// hello is what a bridge below an ssh with these arguments says first.
func (w *world) hello(args sshconfig.Args, mode wire.Mode) wire.Hello {
	h := wire.Hello{
		Version: wire.Version,
		Target:  wire.Target{User: w.b.me, Host: "127.0.0.1", Port: uint16(w.port), Alias: "box"},
		Mode:    mode,
		SSHArgs: args.Shape(),
		Env:     map[string]string{},
	}
	if args.Destination != "" {
		h.SSHArgs = append(h.SSHArgs, "--", args.Destination)
	}
	for _, name := range wire.EnvNames {
		if v := w.env[name]; v != "" {
			h.Env[name] = v
		}
	}
	return h
}
