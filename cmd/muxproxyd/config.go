package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/master"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/use"
)

func newConfig(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "check the policy file, or show what applies to a host",
		Long: `Works on the policy file: $MUXPROXY_CONFIG, or config.hcl in the configuration
directory. docs/policy.md, which is muxproxy.hcl(5), says what may stand in it.`,
		Example: "  muxproxy config check\n  muxproxy config show db.example.com",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.usage(cmd) },
	}
	var asJSON bool
	check := &cobra.Command{
		Use:   "check [FILE] [--json]",
		Short: "say what is wrong with the policy file",
		Long: `Reports all that is wrong with the policy file, or with FILE, each with its
line. Plugins that it mentions are started to ask what their blocks may hold.
Ends with 1 if there are errors; warnings alone end with 0.`,
		Example:           "  muxproxy config check",
		ValidArgsFunction: cobra.FixedCompletions([]cobra.Completion{"hcl"}, cobra.ShellCompDirectiveFilterFileExt),
		Args:              cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runConfigCheck(cmd.Context(), a, first(args), asJSON)
		},
	}
	check.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	var showJSON bool
	show := &cobra.Command{
		Use:   "show [USER@]HOST[:PORT] [--json]",
		Short: "show what applies to a host, with the line of each part",
		Long: `Shows what the policy file says about a host, with file and line of each part,
in the order in which it is looked at. HOST is as for ssh: your ssh_config is
asked where it leads.`,
		Example:           "  muxproxy config show db.example.com",
		ValidArgsFunction: a.completeHost,
		Args:              cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runConfigShow(cmd.Context(), a, args[0], showJSON)
		},
	}
	show.Flags().BoolVar(&showJSON, "json", false, "print JSON")
	cmd.AddCommand(check, show, &cobra.Command{
		Use:     "path",
		Short:   "print the path of the policy file",
		Long:    `Prints the path of the policy file. Ends with 1 if there is none.`,
		Example: "  $EDITOR $(muxproxy config path)",
		Args:    cobra.NoArgs,
		RunE:    func(*cobra.Command, []string) error { return runConfigPath(a) },
	})
	return cmd
}

// policyFile says where the policy is.
func (a *app) policyFile() (path string, named bool, err error) {
	dirs, err := paths.Find(a.getenv)
	if err != nil {
		return "", false, err
	}
	path, named = policy.Where(a.getenv, dirs.Config)
	return path, named, nil
}

// policyOptions has every alias count: commands ask about hosts that ssh_config has been asked for.
func (a *app) policyOptions() policy.Options {
	return policy.Options{Home: a.getenv("HOME"), Alias: func(use.Target) bool { return true }}
}

// loadPolicy loads the policy file. Its errors are printed; warnings are for `config check`.
func (a *app) loadPolicy() (*policy.Snapshot, error) {
	path, named, err := a.policyFile()
	if err != nil {
		return nil, err
	}
	s, diags := policy.Load(path, !named, a.policyOptions())
	if s == nil {
		if err := printDiagnostics(a.stderr, diags.Errors()); err != nil {
			return nil, err
		}
		return nil, &statusError{status: exitNo}
	}
	return s, nil
}

func printDiagnostics(w io.Writer, diags policy.Diagnostics) error { return diags.Write(w, colors(w)) }

// colors reports whether w may get ANSI colours.
func colors(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && policy.Color(f)
}

func runConfigCheck(ctx context.Context, a *app, file string, asJSON bool) error {
	path, named, err := a.policyFile()
	if file != "" {
		path, err = filepath.Abs(file)
		named = true
	}
	if err != nil {
		return err
	}
	diags, err := a.checkPolicy(ctx, path, !named)
	switch {
	case err != nil:
	case asJSON:
		err = a.printJSON(struct {
			File        string             `json:"file"`
			Diagnostics policy.Diagnostics `json:"diagnostics"`
		}{path, diags})
	case len(diags) > 0:
		err = printDiagnostics(a.stdout, diags)
	default:
		said := "no problems"
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			said = "there is no such file, so the defaults hold"
		}
		_, err = fmt.Fprintf(a.stdout, "%s: %s\n", use.Printable(path), said)
	}
	if err == nil && diags.HasErrors() {
		err = &statusError{status: exitNo}
	}
	return err
}

// checkPolicy says what is wrong with a policy file and with the plugins that it mentions.
func (a *app) checkPolicy(ctx context.Context, path string, mayMiss bool) (policy.Diagnostics, error) {
	s, diags := policy.Load(path, mayMiss, a.policyOptions())
	if s == nil || len(s.Plugins()) == 0 {
		return diags, nil
	}
	dirs, err := paths.Find(a.getenv)
	if err != nil {
		return nil, err
	}
	scratch, err := os.MkdirTemp("", "muxproxy") // 0700
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(scratch)
	_, diags = master.CheckPolicy(ctx, s, master.Options{
		Dirs: dirs, Getenv: a.getenv, BuiltIn: builtInNames(), Log: zerolog.Nop(),
	}, scratch)
	return diags, nil
}

func runConfigShow(ctx context.Context, a *app, host string, asJSON bool) error {
	s, err := a.loadPolicy()
	if err != nil {
		return err
	}
	t, err := a.target(ctx, s, host)
	if err != nil {
		return err
	}
	parts := s.Show(t)
	if asJSON {
		return a.printJSON(struct {
			Target use.Target    `json:"target"`
			Parts  []policy.Part `json:"parts"`
		}{t, parts})
	}
	return s.WriteParts(a.stdout, parts)
}

func runConfigPath(a *app) error {
	path, _, err := a.policyFile()
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(a.stdout, path); err != nil { // for programs: as it is
		return err
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return &statusError{status: exitNo}
	}
	return nil
}

// target asks ssh_config where [USER@]HOST[:PORT] leads, as the master does where there is no client.
func (a *app) target(ctx context.Context, s *policy.Snapshot, host string) (use.Target, error) {
	t, err := master.ParseHost(host)
	if err != nil {
		return use.Target{}, &statusError{exitUsage, err}
	}
	return master.Resolve(ctx, s.Master().SSHConfig, t)
}
