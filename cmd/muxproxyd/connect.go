package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/master"
	"github.com/muxproxy/muxproxy/core/use"
)

func newConnect(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "connect TARGET [-- SSH-OPTION...]",
		Short: "make a connection, and leave it to whoever comes",
		Long: `Has your own ssh make the connection to TARGET, without a session, and ends as
soon as that is up. What the login wants to know (a password, a code, whether an
unknown host key is right) is asked at your terminal. How long the connection
then stays, without a client, is policy's to say: without a persist block for
the host it closes at once.

TARGET is HOST, USER@HOST or USER@HOST:PORT. Options for ssh, such as -i or -F,
count as they do for an ssh that shall share the connection.`,
		Example: "  muxproxy connect db.example.com\n  muxproxy connect root@db -- -i ~/.ssh/id_root",
		Args: func(cmd *cobra.Command, args []string) error {
			own := args
			if n := cmd.ArgsLenAtDash(); n >= 0 {
				own = args[:n]
			}
			return cobra.ExactArgs(1)(cmd, own)
		},
		ValidArgsFunction: a.completeHost,
		RunE:              func(cmd *cobra.Command, args []string) error { return runConnect(cmd.Context(), a, args[0], args[1:]) },
	}
}

const (
	// upWord is what ssh's LocalCommand says.
	upWord = "up"
	// settleTime bounds the wait for the connection to be let go, and for what policy says of it then.
	settleTime = 10 * time.Second
	settleLook = 20 * time.Millisecond
)

// sshToConnect is an ssh that makes a connection and says so, for a LocalCommand runs when all questions are answered and
// before anything else is done. It ends when its standard input does. Nothing of what ssh_config wants of a session is
// made: no forward would outlive it.
func sshToConnect(t use.Target, options []string) []string {
	args := []string{
		"-N", "-S", "none", "-o", "ControlMaster=no", "-o", "ClearAllForwardings=yes",
		"-o", "PermitLocalCommand=yes", "-o", "LocalCommand=echo " + upWord + "; cat",
	}
	if t.User != "" {
		args = append(args, "-l", t.User)
	}
	if t.Port != 0 {
		args = append(args, "-p", strconv.Itoa(int(t.Port)))
	}
	return append(append(args, options...), "--", t.Alias)
}

func runConnect(ctx context.Context, a *app, target string, options []string) error {
	t, err := master.ParseHost(target)
	if err != nil {
		return &statusError{exitUsage, err}
	}
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		return fmt.Errorf("no ssh on PATH: %w", err)
	}
	began := a.now()
	cmd := exec.CommandContext(ctx, ssh, sshToConnect(t, options)...)
	cmd.Stderr = a.stderr
	cmd.WaitDelay = time.Second
	hold, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	defer hold.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	said, err := bufio.NewReader(io.LimitReader(out, 4096)).ReadString('\n')
	if err != nil || strings.TrimSpace(said) != upWord {
		hold.Close()
		err := cmd.Wait()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return notConnected(target, err)
	}
	pid := cmd.Process.Pid
	u, err := a.upstreamOf(ctx, pid)
	_ = cmd.Process.Kill() // before its LocalCommand ends: it would go on, and could put itself into the background
	hold.Close()
	_ = cmd.Wait() // killed
	if err != nil {
		return err
	}
	if u == nil {
		return fmt.Errorf("%s was reached, but not through muxproxy: ssh_config has no such ProxyCommand for it, or policy says "+
			"share = false", use.Printable(target))
	}
	what := "connected to "
	if u.Since.Before(began) {
		what = "was connected to "
	}
	stays, err := a.settle(ctx, pid, u.ID)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.stdout, "%s%s; %s\n", what, use.Printable(u.Target), stays)
	return err
}

// notConnected is what became of an ssh that could not connect. It has said why, unless something ended it.
func notConnected(target string, err error) error {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return &statusError{status: exitFailed}
	}
	if err == nil {
		return fmt.Errorf("%s: ssh has ended without a word", use.Printable(target))
	}
	return fmt.Errorf("%s: ssh has ended: %w", use.Printable(target), err)
}

// upstreamOf returns the connection that the client with this process is on; nil: there is no such client.
func (a *app) upstreamOf(ctx context.Context, pid int) (*control.Upstream, error) {
	var found *control.Upstream
	err := a.withMaster(ctx, func(m *control.Master) error {
		s, err := m.Status(ctx)
		if err != nil {
			return err
		}
		if c := clientOf(s, pid); c != nil {
			for _, u := range s.Upstreams {
				if u.ID == c.Upstream {
					found = &u
				}
			}
		}
		return nil
	})
	if no, ok := errors.AsType[*statusError](err); ok && no.status == exitNo {
		return nil, nil // ssh went without
	}
	return found, err
}

// clientOf returns the client that a process has started, or nil.
func clientOf(s control.Status, pid int) *control.Client {
	for _, c := range s.Clients {
		if slices.ContainsFunc(c.Caller.Processes, func(p use.Process) bool { return p.PID == pid }) {
			return &c
		}
	}
	return nil
}

// settle waits until the client of that process has let the connection go, and says what becomes of that.
func (a *app) settle(ctx context.Context, pid int, id uint64) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	result := "it is not said yet how long it stays; see `muxproxy status`"
	err := a.withMaster(ctx, func(m *control.Master) error {
		look := time.NewTicker(settleLook)
		defer look.Stop()
		for {
			s, err := m.Status(ctx)
			if err != nil {
				return err
			}
			i := slices.IndexFunc(s.Upstreams, func(u control.Upstream) bool { return u.ID == id })
			switch {
			case clientOf(s, pid) != nil:
			case i < 0:
				result = "nothing keeps it without a client: policy has no persist block that would"
				return nil
			case s.Upstreams[i].Clients > 0:
				result = "others use it"
				return nil
			case !s.Upstreams[i].KeptUntil.IsZero():
				result = kept(s.Upstreams[i].KeptUntil, a.now())
				return nil
			}
			select {
			case <-look.C:
			case <-ctx.Done():
				return nil
			}
		}
	})
	return result, err
}
