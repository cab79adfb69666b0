package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/plugintest"
)

func newPlugin(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "plugin",
		Short: "check plugins",
		Long: `Plugins judge uses, keep connections, observe, and bring commands of their own.
They are programs in any language; docs/plugins.md says how to write one.`,
		Example: "  muxproxy plugin check ~/bin/muxproxy-plugin-mine",
	}
	var o plugintest.Options
	var verbose bool
	check := &cobra.Command{
		Use:   "check PATH [ARG...]",
		Short: "see whether a program is a good plugin",
		Long: `Starts a program as the master would and tries all that the master expects of a
plugin, with a master that is made up. No policy is read and no master need run.
The exit status is 0 if everything is as it should be, and 1 if not.`,
		Example: `  muxproxy plugin check ~/bin/muxproxy-plugin-mine
  muxproxy plugin check --host-block '{"from":"08:00"}' ./mine`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			o.Path, o.Args = path, args[1:]
			if verbose {
				o.Log = func(line string) { fmt.Fprintf(a.stderr, "plugin: %s\n", plugin.Printable(line)) }
			}
			return runPluginCheck(cmd.Context(), a, o)
		},
	}
	check.Flags().SetInterspersed(false) // what follows PATH is the plugin's
	check.Flags().StringVar(&o.Plugin, "plugin-block", "", "JSON object: what its plugin block needs besides defaults")
	check.Flags().StringVar(&o.Host, "host-block", "", "JSON object: what its block in hosts needs besides defaults")
	check.Flags().StringArrayVar(&o.Env, "env", nil, "NAME=VALUE for the plugin's environment; it gets PATH and HOME")
	check.Flags().BoolVarP(&verbose, "verbose", "v", false, "show what the plugin logs")
	cmd.AddCommand(check)
	return cmd
}

func runPluginCheck(ctx context.Context, a *app, o plugintest.Options) error {
	bad := 0
	for _, r := range plugintest.Check(ctx, o) {
		line := "ok      " + r.Name
		if r.Err != nil {
			bad++
			line = "WRONG   " + r.Name + "\n        " + plugin.Printable(r.Err.Error())
		}
		if _, err := fmt.Fprintln(a.stdout, line); err != nil {
			return err
		}
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case bad == 1:
		return &statusError{exitNo, errors.New("one thing is wrong with this plugin")}
	case bad > 1:
		return no("%d things are wrong with this plugin", bad)
	}
	return nil
}
