//go:build linux

// Command bench measures muxproxy beside OpenSSH's ControlMaster and plain ssh: the same work against the same sshd, in
// turns within one run, on loopback and through a simulated link.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// errGoals says that a goal was missed or a case failed, which has been printed.
var errGoals = errors.New("not every goal is met")

func main() {
	if os.Getenv(plugin.CookieKey) != "" {
		plugin.Serve(&meter{})
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the command line's.
type options struct {
	bin, out, cases              string
	quick, check, markdown, list bool
}

func command() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "measure muxproxy beside ControlMaster and plain ssh",
		Long: `Measures muxproxy (through pipes, and with --fdpass), OpenSSH's ControlMaster and
plain ssh, in turns, against an sshd of its own on loopback, and prints medians,
ratios and whether they meet the goals. Nothing of it stays but the JSON file.`,
		Example:       "  make bench\n  bin/bench --quick --cases 'shared*' --markdown",
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), o, os.Stdout, os.Stderr) },
	}
	f := cmd.Flags()
	f.StringVar(&o.bin, "bin", "", "directory of muxproxy and muxproxyd (default: that of this program)")
	f.StringVar(&o.out, "out", "", "JSON file to write (default: none)")
	f.StringVar(&o.cases, "cases", "*", "which cases to run: a pattern, or several with commas")
	f.BoolVar(&o.quick, "quick", false, "fewer rounds, within three minutes on an idle machine")
	f.BoolVar(&o.check, "check", false, "exit with 1 if a goal is missed or a case fails")
	f.BoolVar(&o.markdown, "markdown", false, "print the table as Markdown")
	f.BoolVar(&o.list, "list", false, "list the cases and leave")
	cmd.CompletionOptions.DisableDefaultCmd = true
	cmd.AddCommand(bareCommand())
	return cmd
}

func run(ctx context.Context, o options, stdout, stderr *os.File) error {
	var chosen []benchCase
	for _, c := range cases {
		ok, err := matches(o.cases, c.name)
		if err != nil {
			return err
		}
		if ok {
			chosen = append(chosen, c)
		}
	}
	if len(chosen) == 0 {
		return fmt.Errorf("no case is called %q; see --list", o.cases)
	}
	if o.list {
		for _, c := range chosen {
			fmt.Fprintf(stdout, "%-10s %s\n", c.name, c.about)
		}
		return nil
	}
	b := &bench{quick: o.quick, say: newProgress(stderr)}
	if err := b.prepare(ctx, o.bin); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	b.report.begin(b)
	for i, c := range chosen {
		b.say.stage("%s (%d of %d): %s", c.name, i+1, len(chosen), c.about)
		b.current = c.name
		began := time.Now()
		err := c.run(ctx, b)
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		b.report.Took[c.name] = time.Since(began).Seconds()
		if err != nil {
			b.report.Failed = append(b.report.Failed, failure{c.name, err.Error()})
			b.say.stage("%s: %v", c.name, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	b.say.done()
	b.report.finish()
	if err := b.report.print(stdout, o.markdown); err != nil {
		return err
	}
	if o.out != "" {
		if err := b.report.write(o.out); err != nil {
			return err
		}
	}
	switch {
	case ctx.Err() != nil:
		return errors.New("interrupted")
	case o.check && !b.report.met():
		return errGoals
	}
	return nil
}

// matches tells whether a name fits one of some patterns, which commas divide.
func matches(patterns, name string) (bool, error) {
	for p := range strings.SplitSeq(patterns, ",") {
		ok, err := path.Match(strings.TrimSpace(p), name)
		if err != nil {
			return false, fmt.Errorf("--cases %q: %w", p, err)
		}
		if ok {
			return true, nil
		}
	}
	return false, nil
}

// bench is one run.
type bench struct {
	quick   bool
	say     *progress
	self    string // this program
	bin     string // directory of the programs under test
	dir     string // holds everything that this run makes
	sshd    string // its absolute path
	me      string
	current string // the case
	report  report
}

// rounds is how often to measure: less if time is short.
func (b *bench) rounds(full, quick int) int {
	if b.quick {
		return quick
	}
	return full
}

// prepare looks for the programs and makes a directory, which the caller removes.
func (b *bench) prepare(ctx context.Context, bin string) error {
	var err error
	if b.self, err = os.Executable(); err != nil {
		return err
	}
	if bin == "" {
		bin = filepath.Dir(b.self)
	}
	if b.bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	if err := b.look(ctx); err != nil {
		return err
	}
	// Short, for the sake of socket paths.
	b.dir, err = os.MkdirTemp("", "mxb")
	return err
}

// progress tells what goes on: on a terminal in one line that changes, elsewhere a line per stage.
type progress struct {
	w   io.Writer
	tty bool
}

func newProgress(f *os.File) *progress {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &progress{f, err == nil}
}

func (p *progress) stage(format string, args ...any) {
	p.done()
	fmt.Fprintf(p.w, "bench: "+format+"\n", args...)
}

func (p *progress) step(format string, args ...any) {
	if p.tty {
		fmt.Fprintf(p.w, "\r\x1b[K  "+format, args...)
	}
}

// done takes the changing line away.
func (p *progress) done() {
	if p.tty {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
