package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/control"
)

func newClose(a *app) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "close TARGET | --all",
		Short: "end connections to a host, and all that uses them, now",
		Long: `Ends the upstream connections to TARGET and every client that uses them, now.
TARGET is HOST, USER@HOST, USER@HOST:PORT or an alias in use.`,
		Example:           "  muxproxy close db.example.com\n  muxproxy close --all",
		ValidArgsFunction: a.completeTarget,
		Args: func(_ *cobra.Command, args []string) error {
			if all != (len(args) == 0) || len(args) > 1 {
				return errors.New("give either one TARGET or --all")
			}
			return notEmpty(args)
		},
		RunE: func(cmd *cobra.Command, args []string) error { return runClose(cmd.Context(), a, args) },
	}
	cmd.Flags().BoolVar(&all, "all", false, "end all connections")
	return cmd
}

func runClose(ctx context.Context, a *app, args []string) error {
	return a.withMaster(ctx, func(m *control.Master) error {
		n, err := m.Close(ctx, first(args))
		return a.tellCount("closed", n, first(args), err)
	})
}

// first returns the argument of a command that takes none or one.
func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

// notEmpty refuses an empty TARGET, which to the master means all.
func notEmpty(args []string) error {
	for _, arg := range args {
		if arg == "" {
			return errors.New("TARGET is empty")
		}
	}
	return nil
}

// tellCount says how many connections a command has found.
func (a *app) tellCount(done string, n int, target string, err error) error {
	if err != nil {
		return err
	}
	if n == 0 && target != "" {
		return no("no connection to %s; `muxproxy status` lists them", target)
	}
	s := "s"
	if n == 1 {
		s = ""
	}
	_, err = fmt.Fprintf(a.stdout, "%s %d connection%s\n", done, n, s)
	return err
}
