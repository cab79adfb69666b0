//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/wire"
)

// guest is a client of muxproxy's master within this process: what a bridge with --fdpass and an ssh are together, without
// their processes. A thousand real ssh would measure this machine, not the master.
type guest struct {
	client *ssh.Client
	in     io.WriteCloser // of the session that hold opened
}

// guest attaches a client. The caller closes it.
func (w *world) guest(ctx context.Context) (*guest, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	nc, err := w.connect(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	g, err := w.attach(ctx, wire.NewConn(nc))
	if err != nil {
		nc.Close()
	}
	return g, err
}

func (w *world) attach(ctx context.Context, c *wire.Conn) (*guest, error) {
	args, err := sshconfig.ParseArgs([]string{"-F", w.path(confName(fdpass)), "box"})
	if err != nil {
		return nil, err
	}
	h := w.hello(args, wire.FDs)
	c.NetConn().SetDeadline(time.Now().Add(patience))
	if err := c.SendHello(h); err != nil {
		return nil, err
	}
	for {
		a, err := c.ReadAnswer()
		if err != nil {
			return nil, err
		}
		switch a.Kind {
		case wire.Served:
			return shake(c, w.b.me)
		case wire.Resolve:
			t := h.Target
			r, err := sshconfig.Run(ctx, sshconfig.Request{Args: args, User: t.User, Host: t.Host, Port: t.Port, Alias: t.Alias})
			if err != nil {
				return nil, err
			}
			if err := c.SendResolution(wire.Resolution{Config: *r}, nil); err != nil {
				return nil, err
			}
		default:
			return nil, fmt.Errorf("the master answers %s: %s", a.Kind, a.Message)
		}
	}
}

// shake speaks SSH with the master. Whose key it shows was settled by whose socket this is.
func shake(c *wire.Conn, user string) (*guest, error) {
	conn, channels, requests, err := ssh.NewClientConn(c.NetConn(), "box", &ssh.ClientConfig{
		User: user, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		return nil, err
	}
	c.NetConn().SetDeadline(time.Time{})
	return &guest{client: ssh.NewClient(conn, channels, requests)}, nil
}

// direct logs in to the world's sshd without a master. The caller closes it.
func (w *world) direct(ctx context.Context) (*guest, error) {
	key, err := os.ReadFile(w.path("id"))
	if err != nil {
		return nil, err
	}
	signer, err := ssh.ParsePrivateKey(key)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", loopback(w.port))
	if err != nil {
		return nil, err
	}
	nc.SetDeadline(time.Now().Add(patience))
	conn, channels, requests, err := ssh.NewClientConn(nc, "box", &ssh.ClientConfig{
		User: w.b.me, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		nc.Close()
		return nil, err
	}
	nc.SetDeadline(time.Time{})
	return &guest{client: ssh.NewClient(conn, channels, requests)}, nil
}

// hold opens a session that stays, in time.
func (g *guest) hold() error {
	late := time.AfterFunc(patience, func() { g.client.Close() })
	defer late.Stop()
	s, err := g.client.NewSession()
	if err != nil {
		return err
	}
	if g.in, err = s.StdinPipe(); err != nil {
		return err
	}
	out, err := s.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.Start("echo ready; exec cat"); err != nil {
		return err
	}
	got := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(out, got); err != nil || string(got) != "ready\n" {
		return errors.Join(fmt.Errorf("%q instead of a beginning", got), err)
	}
	return nil
}

// run runs a command in a session of its own, in time.
func (g *guest) run(command string) error {
	late := time.AfterFunc(patience, func() { g.client.Close() })
	defer late.Stop()
	s, err := g.client.NewSession()
	if err != nil {
		return err
	}
	defer s.Close()
	return s.Run(command)
}

func (g *guest) close() { g.client.Close() }
