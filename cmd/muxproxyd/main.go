// Command muxproxyd is the master of muxproxy, and all commands. People type `muxproxy COMMAND`, which runs this.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/use"
)

// Exit statuses of every command.
const (
	exitYes    = 0
	exitNo     = 1
	exitUsage  = 2
	exitFailed = 255
)

func main() {
	servePlugin(os.Args[1:])
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv, now: time.Now}, os.Args[1:]))
}

// app is what commands get of the world around them.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	now            func() time.Time
	exe            string // path of this executable; "": os.Executable knows
}

// statusError is an error that ends the program with a status of its own. Every other one ends it with exitFailed.
type statusError struct {
	status int
	err    error // nil: everything is said
}

func (e *statusError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *statusError) Unwrap() error { return e.err }

// no is the error of a question whose answer is no.
func no(format string, args ...any) error {
	return &statusError{exitNo, fmt.Errorf(format, args...)}
}

// run is the program: it returns the exit status. All errors are printed here, as one line.
func run(ctx context.Context, a *app, args []string) int {
	root := newRoot(a)
	root.SetArgs(append([]string{}, args...)) // for nil, cobra takes os.Args
	running := false                          // errors before that are about the command line
	root.PersistentPreRun = func(*cobra.Command, []string) { running = true }
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitYes
	}
	status := exitFailed
	var own *statusError
	switch {
	case errors.As(err, &own):
		if status = own.status; own.err == nil {
			return status
		}
	case !running:
		status = exitUsage
		if word := cmd.Flags().Arg(0); word != "" && cmd.HasSubCommands() {
			err = didYouMean(err, word, commandNames(cmd))
		}
		err = fmt.Errorf("%w; see `%s --help`", err, cmd.CommandPath())
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		err = errors.New("interrupted")
	}
	fmt.Fprintf(a.stderr, "muxproxy: %s\n", use.Printable(err.Error()))
	return status
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "muxproxy",
		Short: "shares SSH connections between ssh, scp, sftp, rsync, git and everything else that runs ssh",
		Long: `muxproxy shares SSH connections between ssh, scp, sftp, rsync, git and whatever
else runs ssh.

ssh itself starts it as ProxyCommand, once "muxproxy setup" has led it here.
MUXPROXY_BYPASS=1 in the environment goes without it.`,
		Example:       "  muxproxy setup\n  muxproxy doctor db.example.com\n  muxproxy status",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return a.usage(cmd)
			}
			if found, err := runVerb(cmd.Context(), a, args[0], args[1:]); found {
				return err
			}
			if slices.Contains(builtInNames(), args[0]) {
				return no("%s is a plugin's command: it needs a master whose policy has a %s block; see `muxproxy plugin list`",
					args[0], args[0])
			}
			err := didYouMean(fmt.Errorf("unknown command %q", args[0]), args[0],
				slices.Concat(commandNames(cmd), builtInNames(), slices.Collect(maps.Keys(a.verbs(cmd)))))
			return &statusError{exitUsage, fmt.Errorf("%w; see `muxproxy help`", err)}
		},
		ValidArgsFunction: a.completeVerb,
	}
	root.Flags().SetInterspersed(false) // what follows a plugin's command is the plugin's
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var unknown *pflag.NotExistError
		if !errors.As(err, &unknown) {
			return err
		}
		var names []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, "--"+f.Name) })
		return didYouMean(err, "--"+unknown.GetSpecifiedName(), names)
	})
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.AddCommand(
		newStatus(a), newConnect(a), newClose(a), newDrain(a), newExists(a), newMaster(a), newLog(a), newHostKey(a), newVersion(a),
		newDemo(a), newConfig(a), newExplain(a), newLock(a), newUnlock(a), newPlugin(a), newPending(a), newAllow(a), newDeny(a),
		newSetup(a), newDoctor(a),
	)
	root.AddCommand(newTopics()...)
	root.AddCommand(newManual(a))
	root.InitDefaultCompletionCmd() // which cobra else adds when it runs
	plainUsage(root)
	return root
}

// plainUsage takes "[flags]" out of the usage lines, which name the flags that matter.
func plainUsage(cmd *cobra.Command) {
	cmd.DisableFlagsInUseLine = true
	for _, c := range cmd.Commands() {
		plainUsage(c)
	}
}

// usage is what a command does that needs another word behind it.
func (a *app) usage(cmd *cobra.Command) error {
	cmd.SetOut(a.stderr)
	_ = cmd.Usage() // writes to stderr, the last thing that can be tried
	return &statusError{status: exitUsage}
}

// commandNames are the words that can follow a command's own.
func commandNames(cmd *cobra.Command) []string {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() || c.Name() == "help" {
			names = append(names, c.Name())
		}
	}
	return names
}

// didYouMean adds the word that was meant, if there is one that is like it or begins with it.
func didYouMean(err error, word string, names []string) error {
	near := policy.Near(word, names)
	if near == "" {
		for _, name := range names {
			if word != "" && strings.HasPrefix(name, word) {
				near = name
				break
			}
		}
	}
	if near == "" {
		return err
	}
	return fmt.Errorf("%w; did you mean %q?", err, near)
}

// connect returns the master that runs for this user; the caller calls Disconnect. The error wraps bridge.ErrNoMaster if
// there is none.
func (a *app) connect(ctx context.Context) (*control.Master, error) {
	dirs, err := paths.Find(a.getenv)
	if err != nil {
		return nil, err
	}
	conn, err := bridge.ConnectTo(ctx, dirs, paths.ControlSocket)
	if err != nil {
		return nil, err
	}
	return control.New(conn)
}

// withMaster calls do with the master that runs; if there is none, the answer is no.
func (a *app) withMaster(ctx context.Context, do func(*control.Master) error) error {
	m, err := a.connect(ctx)
	if errors.Is(err, bridge.ErrNoMaster) {
		return no("no master runs; the next ssh starts one, or `muxproxy master start`")
	}
	if err != nil {
		return err
	}
	defer m.Disconnect()
	return do(m)
}

// withAnyMaster is withMaster, but starts a master where none runs.
func (a *app) withAnyMaster(ctx context.Context, do func(*control.Master) error) error {
	m, err := a.connect(ctx)
	if errors.Is(err, bridge.ErrNoMaster) {
		dirs, found := paths.Find(a.getenv)
		if found != nil {
			return found
		}
		if err := bridge.StartMaster(ctx, dirs, a.getenv); err != nil {
			return err
		}
		m, err = a.connect(ctx)
	}
	if err != nil {
		return err
	}
	defer m.Disconnect()
	return do(m)
}
