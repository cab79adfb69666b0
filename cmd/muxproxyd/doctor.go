package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/cmd/muxproxyd/internal/doctor"
	"github.com/muxproxy/muxproxy/core/master"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/plugins/confirm"
)

func newDoctor(a *app) *cobra.Command {
	var config string
	var asJSON bool
	names := doctor.Names()
	third := len(names) / 3
	cmd := &cobra.Command{
		Use:   "doctor [HOST] [--json]",
		Short: "find out why connections are not shared, and what mends it",
		Long: `Looks at ssh, its configuration, the programs, their places, the policy and the
master, and says of each whether it is ok, a warning or a failure, and which
command, or line of ssh_config, mends it. HOST is as for ssh; with it, what
ssh_config says about that host is looked at. Nothing is changed, no connection
is made, and no master is started. Ends with 1 if there is a failure; warnings
alone end with 0.

The JSON is an object: "host" (as given), "state" (the worst: "ok", "warning" or
"failure") and "results", a list of objects with "name", "state", "text" and,
where there is something to do, "mend". A name can come more than once. They are
` + strings.Join(names[:third], ", ") + `,
` + strings.Join(names[third:2*third], ", ") + `,
` + strings.Join(names[2*third:], ", ") + `.`,
		Example: "  muxproxy doctor\n  muxproxy doctor db.example.com\n" +
			"  muxproxy doctor --json | jq -r '.results[] | select(.state != \"ok\") | .mend'",
		Args: func(cmd *cobra.Command, args []string) error {
			if config == "none" || cmd.Flags().Changed("ssh-config") && config == "" {
				return errors.New("-F: want a file")
			}
			if err := cobra.MaximumNArgs(1)(cmd, args); err != nil {
				return err
			}
			if len(args) == 1 {
				_, err := master.ParseHost(args[0])
				return err
			}
			return nil
		},
		ValidArgsFunction: a.completeHost,
		RunE: func(cmd *cobra.Command, args []string) error {
			return runDoctor(cmd.Context(), a, first(args), config, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVarP(&config, "ssh-config", "F", "", "the `FILE` for ssh -F, instead of ~/.ssh/config")
	completeFlag(cmd, "ssh-config", cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault))
	return cmd
}

func runDoctor(ctx context.Context, a *app, host, config string, asJSON bool) error {
	dirs, err := paths.Find(a.getenv)
	if err != nil {
		return err
	}
	names, err := sshconfig.LocalNames()
	if err != nil {
		return err
	}
	o := doctor.Options{
		Dirs: dirs, Getenv: a.getenv, Home: names.Home, Host: host, Version: readVersion().Version, Self: a.exe,
		CanAsk: confirm.Ready, Connect: a.connect,
	}
	if host != "" {
		if o.Target, err = master.ParseHost(host); err != nil {
			return err
		}
	}
	if config != "" {
		if o.Config, err = filepath.Abs(config); err != nil {
			return err
		}
	}
	if o.Self == "" {
		if o.Self, err = os.Executable(); err != nil {
			return err
		}
	}
	if o.SSH, err = exec.LookPath("ssh"); err != nil {
		o.SSH = "" // the report says so
	}
	path, named, err := a.policyFile()
	if err != nil {
		return err
	}
	o.PolicyFile = path
	o.Policy, o.Diagnostics = policy.Load(path, !named, a.policyOptions())
	report, err := doctor.Run(ctx, o)
	if err != nil {
		return err
	}
	if asJSON {
		err = a.printJSON(report)
	} else {
		err = report.Write(a.stdout, colors(a.stdout))
	}
	if err == nil && report.State == doctor.Failure {
		err = &statusError{status: exitNo}
	}
	return err
}
