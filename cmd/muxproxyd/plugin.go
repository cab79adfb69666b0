package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/plugintest"
	"github.com/muxproxy/muxproxy/core/use"
)

func newPlugin(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "plugin",
		Short: "list and check plugins",
		Long: `Plugins judge uses, keep connections, observe, and bring commands of their own.
They are programs in any language; docs/plugins.md, which is muxproxy-plugin(7),
says how to write one.`,
		Example: "  muxproxy plugin list\n  muxproxy plugin check ~/bin/muxproxy-plugin-mine",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.usage(cmd) },
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
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault),
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
	check.Flags().StringVar(&o.Plugin, "plugin-block", "", "what its plugin block needs: a JSON `OBJECT`")
	check.Flags().StringVar(&o.Host, "host-block", "", "what its block in hosts needs: a JSON `OBJECT`")
	check.Flags().StringArrayVar(&o.Env, "env", nil, "`NAME=VALUE` for it, besides PATH and HOME")
	check.Flags().BoolVarP(&verbose, "verbose", "v", false, "show what the plugin logs")
	var asJSON bool
	list := &cobra.Command{
		Use:     "list [--json]",
		Short:   "show the plugins that the policy mentions",
		Long:    `Shows the plugins that the policy mentions, and how they are.`,
		Example: "  muxproxy plugin list --json",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runPluginList(cmd.Context(), a, asJSON) },
	}
	list.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.AddCommand(list, check)
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

func runPluginList(ctx context.Context, a *app, asJSON bool) error {
	return a.withMaster(ctx, func(m *control.Master) error {
		list, err := m.Plugins(ctx)
		if err != nil {
			return err
		}
		if asJSON {
			return writeJSON(a.stdout, list)
		}
		w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "NAME\tVERSION\tSTATE\tPID\tHOOKS\tMAY")
		for _, p := range list {
			pid := "-"
			if p.PID != 0 {
				pid = strconv.Itoa(p.PID)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", use.Printable(p.Name), orDash(p.Version), use.Printable(p.State), pid,
				orDash(strings.Join(p.Hooks, ",")), orDash(strings.Join(p.May, ",")))
		}
		if err := w.Flush(); err != nil {
			return err
		}
		for _, p := range list {
			if p.Error != "" {
				if _, err := fmt.Fprintf(a.stdout, "%s: %s\n", use.Printable(p.Name), use.Printable(p.Error)); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return use.Printable(s)
}

func writeJSON(w io.Writer, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err == nil {
		_, err = fmt.Fprintf(w, "%s\n", b)
	}
	return err
}

func newPending(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "pending [--json]",
		Short: "show what waits for a person's answer",
		Long: `Shows the uses that plugins are asking a person about. Those with a "yes" in the
last column can be answered with allow and deny.`,
		Example: "  muxproxy pending\n  muxproxy allow f3k2ab4c",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runPending(cmd.Context(), a, asJSON) },
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func runPending(ctx context.Context, a *app, asJSON bool) error {
	return a.withMaster(ctx, func(m *control.Master) error {
		list, err := m.Pending(ctx)
		if err != nil {
			return err
		}
		if asJSON {
			return writeJSON(a.stdout, list)
		}
		w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "ID\tASKED BY\tFOR\tUSE\tTARGET\tCALLER\tALLOW/DENY")
		for _, p := range list {
			what, answerable := p.Kind, "no"
			if p.Detail != "" {
				what += " " + p.Detail
			}
			if p.Answerable {
				answerable = "yes"
			}
			fmt.Fprintf(w, "%s\t%s\t%v\t%s\t%s\t%s\t%s\n", use.Printable(p.ID), use.Printable(p.Plugin),
				a.now().Sub(p.Since).Round(time.Second), use.Printable(what), use.Printable(p.Target), orDash(p.Caller), answerable)
		}
		return w.Flush()
	})
}

func newAllow(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "allow ID",
		Short:             "answer yes to what waits for a person",
		Long:              `Allows a use that a plugin is asking a person about; see "muxproxy pending".`,
		Example:           "  muxproxy allow f3k2ab4c",
		ValidArgsFunction: a.completePending,
		Args:              cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withMaster(cmd.Context(), func(m *control.Master) error { return m.Decide(cmd.Context(), args[0], true, "") })
		},
	}
}

func newDeny(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "deny ID [REASON...]",
		Short:             "answer no to what waits for a person",
		Long:              `Denies a use that a plugin is asking a person about; see "muxproxy pending".`,
		Example:           "  muxproxy deny f3k2ab4c not today",
		ValidArgsFunction: a.completePending,
		Args:              cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withMaster(cmd.Context(), func(m *control.Master) error {
				return m.Decide(cmd.Context(), args[0], false, strings.Join(args[1:], " "))
			})
		},
	}
}

// runVerb runs a command that a plugin brings, if one does. A built-in plugin that does not run is named, for it could.
func runVerb(ctx context.Context, a *app, name string, args []string) (found bool, err error) {
	builtIn := false
	if construct := builtIns[name]; construct != nil {
		_, builtIn = construct().(plugin.Commander)
	}
	connected := false
	err = a.withMaster(ctx, func(m *control.Master) error {
		connected = true
		status, err := m.RunPlugin(ctx, name, args, a.stdout, a.stderr)
		if err == nil && status != exitYes {
			err = &statusError{status: status}
		}
		return err
	})
	switch {
	case !connected:
		return builtIn, err // without a master there is no command of another plugin
	case errors.Is(err, control.ErrNoCommand) && builtIn:
		return true, no("the plugin %s does not run: no host block of the policy has %s { ... }, or `muxproxy plugin list` says why", name, name)
	case errors.Is(err, control.ErrNoCommand):
		return false, nil
	}
	return true, err
}
