package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/cmd/muxproxyd/internal/demo"
)

func newDemo(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "demo [HOST]",
		Short: "measure what sharing gives",
		Long: `Measures what sharing gives: the same work by ssh alone and through a master of
its own, with a server of its own on this machine, or with HOST, any host that
ssh reaches. Nothing of it stays.`,
		Example:           "  muxproxy demo\n  muxproxy demo db.example.com",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeHost,
		RunE:              func(cmd *cobra.Command, args []string) error { return runDemo(cmd.Context(), a, first(args)) },
	}
}

func runDemo(ctx context.Context, a *app, host string) error {
	return demo.Run(ctx, demo.Options{Stdout: a.stdout, Stderr: a.stderr, Host: host})
}
