package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/control"
)

func newExists(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "exists TARGET",
		Short: "tell by the exit status whether a connection to a host is up",
		Long: `Ends with 0 if an upstream connection to TARGET is up, with 1 if not. TARGET is
HOST, USER@HOST, USER@HOST:PORT or an alias in use.`,
		Example:           "  muxproxy exists db.example.com && rsync -a src db.example.com:",
		ValidArgsFunction: a.completeTarget,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(1)(cmd, args); err != nil {
				return err
			}
			return notEmpty(args)
		},
		RunE: func(cmd *cobra.Command, args []string) error { return runExists(cmd.Context(), a, args[0]) },
	}
}

func runExists(ctx context.Context, a *app, target string) error {
	return a.withMaster(ctx, func(m *control.Master) error {
		ok, err := m.Exists(ctx, target)
		if err == nil && !ok {
			return &statusError{status: exitNo}
		}
		return err
	})
}
