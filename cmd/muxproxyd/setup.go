package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/muxproxy/muxproxy/cmd/muxproxyd/internal/setup"
	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

// setupFlags are the command line of setup.
type setupFlags struct {
	hosts             []string
	config            string
	dryRun, undo, yes bool
}

func newSetup(a *app) *cobra.Command {
	var f setupFlags
	cmd := &cobra.Command{
		Use:   "setup [--host PATTERN]... [--dry-run | --yes] | --undo",
		Short: "lead ssh to muxproxy, or away from it again",
		Long: `Puts one Include line at the top of ~/.ssh/config and writes the file that it
names, which leads ssh to muxproxy for all hosts, or for those that a PATTERN
matches (as in a Host line of ssh_config: * ? and ! before it). No other line is
touched. It shows what it is about to do and asks first; the outcome is the same
however often it is run. Where the file can't be changed it says which line to
put there.

--undo takes all of that away: the line, the file, the master and what it left
(known_hosts, logs, locks, sockets). Your policy file stays.`,
		Example: "  muxproxy setup --dry-run\n  muxproxy setup --host '*.example.com' --host '!bastion.example.com'\n" +
			"  muxproxy setup --undo",
		Args: func(cmd *cobra.Command, args []string) error {
			if f.undo && len(f.hosts) > 0 {
				return errors.New("--undo is for all hosts")
			}
			for _, h := range f.hosts {
				if err := sshconfig.CheckPattern(h); err != nil {
					return fmt.Errorf("--host %w", err)
				}
			}
			if f.config == "none" || cmd.Flags().Changed("ssh-config") && f.config == "" {
				return errors.New("-F: want a file")
			}
			return cobra.NoArgs(cmd, args)
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return runSetup(cmd.Context(), a, f) },
	}
	cmd.Flags().StringArrayVar(&f.hosts, "host", nil, "only hosts that this `PATTERN` matches; can be repeated")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "show what would be done, and do nothing")
	cmd.Flags().BoolVar(&f.undo, "undo", false, "take away what setup and the master have made")
	cmd.Flags().BoolVarP(&f.yes, "yes", "y", false, "don't ask")
	cmd.Flags().StringVarP(&f.config, "ssh-config", "F", "", "the `FILE` for ssh -F, instead of ~/.ssh/config")
	completeFlag(cmd, "host", a.completePattern)
	completeFlag(cmd, "ssh-config", cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault))
	return cmd
}

func runSetup(ctx context.Context, a *app, f setupFlags) error {
	o, err := a.setupOptions(f)
	if err != nil {
		return err
	}
	var plan *setup.Plan
	if f.undo {
		if systemdListens(ctx) {
			return errors.New("systemd listens for the master and would start it again; " +
				"first `systemctl --user disable --now muxproxy.socket`")
		}
		m, err := a.connect(ctx)
		switch {
		case err == nil:
			defer m.Disconnect()
			if o.Running, err = running(ctx, m); err != nil {
				return err
			}
		case !errors.Is(err, bridge.ErrNoMaster):
			return err
		}
		if plan, err = setup.Undo(o); err != nil {
			return err
		}
	} else if plan, err = setup.Make(ctx, o); err != nil {
		return err
	}
	if plan.Empty() {
		return a.setupDone(ctx, o, f.undo, false)
	}
	title := "This will be done:\n"
	if f.dryRun {
		title = "This would be done:\n"
	}
	if sudo := a.getenv("SUDO_USER"); sudo != "" {
		title = fmt.Sprintf("Under sudo this is for the user with the home %s; for %s, leave sudo away.\n",
			use.Printable(a.getenv("HOME")), use.Printable(sudo)) + title
	}
	if _, err := io.WriteString(a.stdout, title); err != nil {
		return err
	}
	if err := plan.Write(a.stdout); err != nil || f.dryRun {
		return err
	}
	if !f.yes {
		if err := a.confirm(ctx, "Do it? [y/N] "); err != nil {
			return err
		}
	}
	if err := plan.Do(ctx); err != nil {
		return err
	}
	err = a.setupDone(ctx, o, f.undo, true)
	if errors.Is(err, setup.ErrRejected) {
		if back := plan.Back(); back != nil {
			return fmt.Errorf("%w; and that can't be taken back: %w", err, back)
		}
		return fmt.Errorf("%w; all is as it was before", err)
	}
	return err
}

// setupOptions finds out for whom and with which programs.
func (a *app) setupOptions(f setupFlags) (setup.Options, error) {
	dirs, err := paths.Find(a.getenv)
	if err != nil {
		return setup.Options{}, err
	}
	o := setup.Options{Dirs: dirs, Hosts: f.hosts}
	if f.config != "" {
		if o.Config, err = filepath.Abs(f.config); err != nil {
			return o, err
		}
	}
	names, err := sshconfig.LocalNames()
	if err != nil {
		return o, err
	}
	o.Home = names.Home
	if home := a.getenv("HOME"); o.Config == "" && !sameFile(home, o.Home) {
		return o, fmt.Errorf("HOME is %s, but ssh reads the configuration in %s, the home directory in the password database: "+
			"correct HOME, or name the file with -F", home, o.Home)
	}
	if o.SSH, err = exec.LookPath("ssh"); err != nil {
		return o, fmt.Errorf("no ssh on PATH: %w; install an OpenSSH client", err)
	}
	if !f.undo {
		o.Program, err = a.program()
	}
	return o, err
}

func sameFile(a, b string) bool {
	if filepath.Clean(a) == filepath.Clean(b) {
		return true
	}
	fa, err1 := os.Stat(a)
	fb, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(fa, fb)
}

// program is the path of muxproxy: beside this executable, or, where that is the same file, as PATH leads there, since package
// managers change the former with each version.
func (a *app) program() (string, error) {
	self := a.exe
	if self == "" {
		var err error
		if self, err = os.Executable(); err != nil {
			return "", err
		}
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	program := filepath.Join(filepath.Dir(self), "muxproxy")
	if _, err := exec.LookPath(program); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = errors.New("it is not there")
		}
		return "", fmt.Errorf("%s: %w; install muxproxy beside muxproxyd", program, err)
	}
	if named, err := exec.LookPath("muxproxy"); err == nil && filepath.IsAbs(named) && sameFile(named, program) {
		return named, nil
	}
	return program, nil
}

// systemctlTime bounds a question to systemd.
const systemctlTime = 5 * time.Second

// systemdListens reports whether the user's systemd holds the sockets.
func systemdListens(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, systemctlTime)
	defer cancel()
	return exec.CommandContext(ctx, "systemctl", "--user", "--quiet", "is-active", "muxproxy.socket").Run() == nil
}

// running is what undoing has to know of the master, and do with it.
func running(ctx context.Context, m *control.Master) (*setup.Running, error) {
	s, err := m.Status(ctx)
	if err != nil {
		return nil, err
	}
	return &setup.Running{PID: s.PID, Clients: len(s.Clients), Stop: func(ctx context.Context) error {
		return stopNow(ctx, m, s.PID)
	}}, nil
}

// confirm asks a person at the terminal.
func (a *app) confirm(ctx context.Context, question string) error {
	f, ok := a.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return &statusError{exitUsage, errors.New("there is no terminal to ask on: nothing was done; give --yes or --dry-run")}
	}
	if _, err := io.WriteString(a.stderr, question); err != nil {
		return err
	}
	answer := make(chan string, 1)
	go func() { // ends with the line, or with the process
		line, _ := bufio.NewReader(f).ReadString('\n') // on an error the answer is what came before: not yes
		answer <- line
	}()
	select {
	case line := <-answer:
		if line = strings.ToLower(strings.TrimSpace(line)); line == "y" || line == "yes" {
			return nil
		}
		return no("nothing was done")
	case <-ctx.Done():
		fmt.Fprintln(a.stderr)
		return context.Cause(ctx)
	}
}

// setupDone says how it is now, and what a person may do next. changed tells whether anything was done.
func (a *app) setupDone(ctx context.Context, o setup.Options, undone, changed bool) error {
	var text string
	switch {
	case undone && changed:
		text = "Done: ssh is as it was before muxproxy.\n"
		if setup.Leads(ctx, o) {
			text = "Done; but ssh still goes to muxproxy, by lines of your own: `ssh -G HOST | grep proxycommand`.\n"
		}
	case undone:
		text = "There is nothing to undo.\n"
	default:
		host, err := setup.Verify(ctx, o)
		if err != nil && !errors.Is(err, setup.ErrRejected) {
			return &statusError{exitNo, err}
		}
		if err != nil {
			return err
		}
		text = "All is in place"
		if changed {
			text = "Done"
		}
		file := ""
		if o.Config != "" {
			file = "-F " + use.Printable(o.Config) + " "
		}
		text += fmt.Sprintf(": ssh -G says that %s goes through muxproxy. Next:\n", use.Printable(host))
		next := [][2]string{
			{"ssh " + file + "HOST", "in two terminals: the second needs no login"},
			{"muxproxy status", "what is shared, and by whom"},
			{"muxproxy doctor " + file + "HOST", "if something is amiss"},
			{"muxproxy setup " + file + "--undo", "takes it away again"},
		}
		for _, n := range next {
			text += fmt.Sprintf("  %-*s  %s\n", len(next[3][0]), n[0], n[1])
		}
	}
	_, err := io.WriteString(a.stdout, text)
	return err
}
