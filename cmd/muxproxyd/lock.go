package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/use"
)

func newLock(a *app) *cobra.Command {
	var passphrase bool
	cmd := &cobra.Command{
		Use:   "lock [--passphrase]",
		Short: "let nobody use the connections until unlock",
		Long: `Stops all new uses of the connections, new connections of standing forwards
too, until "muxproxy unlock", over restarts of the master; where none runs, it
starts one. What runs goes on, and what ends something still works: close,
drain, master stop, cancelled forwards. With --passphrase it asks for one that
unlock will want, or reads a line of its input.`,
		Example: "  muxproxy lock --passphrase",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runLock(cmd.Context(), a, passphrase) },
	}
	cmd.Flags().BoolVar(&passphrase, "passphrase", false, "ask for a passphrase")
	return cmd
}

func newUnlock(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "unlock",
		Short: "open what lock has locked",
		Long: `Opens what "muxproxy lock" has locked, and what sleep has. What the session's
lock has locked, only the session opens: then it ends with 1 and says so.`,
		Example: "  muxproxy unlock",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runUnlock(cmd.Context(), a) },
	}
}

func runLock(ctx context.Context, a *app, withPassphrase bool) error {
	// Without a master too, for the next ssh would start one that is open.
	return a.withAnyMaster(ctx, func(m *control.Master) error {
		s, err := m.Status(ctx)
		if err != nil {
			return err
		}
		if slices.Contains(s.Lock.By, "person") {
			return no("it is locked already")
		}
		var passphrase []byte
		defer func() { clear(passphrase) }()
		if withPassphrase {
			if passphrase, err = a.readPassphrase(ctx, "Passphrase to unlock with: ", "The same again: "); err != nil {
				return err
			}
			if len(passphrase) == 0 {
				return errors.New("an empty passphrase; without --passphrase none is needed")
			}
		}
		if err := m.Lock(ctx, passphrase); err != nil {
			return err
		}
		_, err = fmt.Fprintln(a.stdout, "locked until `muxproxy unlock`")
		return err
	})
}

func runUnlock(ctx context.Context, a *app) error {
	dirs, err := paths.Find(a.getenv)
	if err != nil {
		return err
	}
	with := a.withMaster
	if _, err := os.Lstat(filepath.Join(dirs.Run, paths.LockState)); err == nil {
		with = a.withAnyMaster // the next one would be locked
	}
	return with(ctx, func(m *control.Master) error {
		s, err := m.Status(ctx)
		if err != nil {
			return err
		}
		var passphrase []byte
		defer func() { clear(passphrase) }()
		if s.Lock.Passphrase {
			if passphrase, err = a.readPassphrase(ctx, "Passphrase: "); err != nil {
				return err
			}
		}
		left, err := m.Unlock(ctx, passphrase)
		switch {
		case errors.Is(err, use.ErrPassphrase):
			return no("%w", err)
		case err != nil:
			return err
		case left.Locked:
			return no("still locked by the session (%s): unlock that", strings.Join(left.By, ", "))
		}
		text := "unlocked"
		if !s.Lock.Locked {
			text = "it was not locked"
		}
		_, err = fmt.Fprintln(a.stdout, text)
		return err
	})
}

// readPassphrase reads a secret from the terminal, without echo, as often as there are prompts, or else a line of stdin. The caller
// clears it.
func (a *app) readPassphrase(ctx context.Context, prompts ...string) ([]byte, error) {
	f, ok := a.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		line, err := bufio.NewReader(io.LimitReader(a.stdin, 4096)).ReadBytes('\n')
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("reading the passphrase: %w", err)
		}
		return bytes.TrimRight(line, "\r\n"), nil
	}
	var first []byte
	for i, prompt := range prompts {
		fmt.Fprint(a.stderr, "muxproxy: "+prompt)
		secret, err := readSecret(ctx, f)
		fmt.Fprintln(a.stderr)
		switch {
		case err != nil:
			clear(first)
			return nil, err
		case i == 0:
			first = secret
			continue
		}
		same := bytes.Equal(secret, first)
		clear(secret)
		if !same {
			clear(first)
			return nil, errors.New("the two differ; nothing was locked")
		}
	}
	return first, nil
}

// readSecret reads a line without echo. An interrupt leaves the terminal as it was.
func readSecret(ctx context.Context, f *os.File) ([]byte, error) {
	fd := int(f.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("the terminal: %w", err)
	}
	type result struct {
		secret []byte
		err    error
	}
	done := make(chan result, 1)
	go func() { // ends with the line, or with the process
		secret, err := term.ReadPassword(fd)
		done <- result{secret, err}
	}()
	select {
	case r := <-done:
		return r.secret, r.err
	case <-ctx.Done():
		_ = term.Restore(fd, before) // the last thing that can be tried
		return nil, context.Cause(ctx)
	}
}
