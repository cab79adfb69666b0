package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/control"
)

func newDrain(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "drain [TARGET]",
		Short: "end connections once nothing uses them any more",
		Long: `Lets the upstream connections to TARGET, or all, take no new clients and end
with their last. The next ssh makes a new connection. TARGET is HOST, USER@HOST,
USER@HOST:PORT or an alias in use.`,
		Example:           "  muxproxy drain db.example.com",
		ValidArgsFunction: a.completeTarget,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.MaximumNArgs(1)(cmd, args); err != nil {
				return err
			}
			return notEmpty(args)
		},
		RunE: func(cmd *cobra.Command, args []string) error { return runDrain(cmd.Context(), a, args) },
	}
}

func runDrain(ctx context.Context, a *app, args []string) error {
	return a.withMaster(ctx, func(m *control.Master) error {
		n, err := m.Drain(ctx, first(args))
		return a.tellCount("draining", n, first(args), err)
	})
}
