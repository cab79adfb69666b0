package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/use"
)

func newExplain(a *app) *cobra.Command {
	var kind string
	var asJSON bool
	var kinds []string
	for _, k := range use.Kinds() {
		kinds = append(kinds, string(k))
	}
	cmd := &cobra.Command{
		Use:   "explain [USER@]HOST[:PORT] [--kind KIND] [COMMAND]",
		Short: "say what would be decided about a use, and why",
		Long: `Says what the policy file decides about a use, by which block, lane and plugin,
and whether the lock would stop it. Nothing is connected, and no plugin is
asked. The client is taken to be what runs this command.

KIND is ` + strings.Join(kinds[:5], ", ") + `,
` + strings.Join(kinds[5:], ", ") + `; without it
exec, or shell without COMMAND. COMMAND stands for what the use is about: a
subsystem's name, where a forward leads (host:port), the name of a command.
Quote a COMMAND of several words. Ends with 1 if it would be denied.`,
		Example: "  muxproxy explain db.example.com 'git-upload-pack /srv/x.git'\n" +
			"  muxproxy explain root@db --kind local-forward localhost:5432",
		Args: func(cmd *cobra.Command, args []string) error {
			if kind != "" && !slices.Contains(kinds, kind) {
				return fmt.Errorf("there is no kind of use %q", kind)
			}
			return cobra.MinimumNArgs(1)(cmd, args)
		},
		ValidArgsFunction: a.completeHost,
		RunE: func(cmd *cobra.Command, args []string) error {
			return runExplain(cmd.Context(), a, args[0], use.Kind(kind), strings.Join(args[1:], " "), asJSON)
		},
	}
	cmd.Flags().StringVar(&kind, "kind", "", "the `KIND` of use")
	completeFlag(cmd, "kind", cobra.FixedCompletions(kinds, cobra.ShellCompDirectiveNoFileComp))
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// explained is what `explain --json` prints.
type explained struct {
	*policy.Explanation
	Plugin string         `json:"plugin,omitempty"` // the one that would be asked and does not run
	Lock   *use.LockState `json:"lock,omitempty"`   // it would stop the use
}

func runExplain(ctx context.Context, a *app, host string, kind use.Kind, what string, asJSON bool) error {
	s, err := a.loadPolicy()
	if err != nil {
		return err
	}
	t, err := a.target(ctx, s, host)
	if err != nil {
		return err
	}
	u := use.Use{Kind: kind, Target: t, Caller: use.Self()}
	if p, ok := u.Caller.Client(); ok {
		u.Caller.Env = use.ReadEnv(p, s.EnvNames())
	}
	switch {
	case kind == "" && what == "":
		u.Kind = use.Shell
	case kind == "":
		u.Kind = use.Exec
	}
	switch u.Kind {
	case use.Exec:
		u.Command = what
	case use.Subsystem:
		u.Subsystem = what
	case use.Control, use.Other:
		u.Name = what
	default:
		u.Addr = what
	}
	x := explained{Explanation: s.Explain(u)}
	switch m, err := a.connect(ctx); {
	case errors.Is(err, bridge.ErrNoMaster): // what it has locked counts when there is one
	case err != nil:
		return err
	default:
		st, err := m.Status(ctx)
		if err == nil {
			x.Plugin, err = failedPlugin(ctx, m, x.Plugins)
		}
		m.Disconnect()
		if err != nil {
			return err
		}
		if st.Lock.Locked && !use.TakesAway(u) {
			x.Lock = &st.Lock
		}
	}
	if asJSON {
		err = a.printJSON(x)
	} else {
		err = x.Write(a.stdout)
		if err == nil && x.Plugin != "" {
			_, err = fmt.Fprintln(a.stdout, "plugin: "+x.Plugin)
		}
		if err == nil && x.Lock != nil {
			_, err = fmt.Fprintf(a.stdout, "lock: stops it now (%s)\n", strings.Join(x.Lock.By, ", "))
		}
	}
	if err == nil && (!x.Allowed || x.Plugin != "" || x.Lock != nil) {
		err = &statusError{status: exitNo}
	}
	return err
}

// failedPlugin says which of the plugins that would be asked can't be.
func failedPlugin(ctx context.Context, m *control.Master, asked map[string]string) (string, error) {
	list, err := m.Plugins(ctx)
	for _, p := range list {
		if _, ok := asked[p.Name]; ok && p.State != "up" {
			return fmt.Sprintf("%s does not run: %s", p.Name, p.Error), err
		}
	}
	return "", err
}
