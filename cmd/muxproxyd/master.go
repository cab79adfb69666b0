package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/harden"
	"github.com/muxproxy/muxproxy/core/master"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/use"
)

// stopTime is how long `master stop` waits for the master's process to end.
const stopTime = 5 * time.Second

func newMaster(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "master",
		Short: "run the master, or start, stop and inspect it",
		Long: `Runs the master in the foreground, with its log on stderr, until SIGTERM, SIGINT
or "muxproxy master stop". There is no need to: the first ssh starts one in the
background.`,
		Example: "  muxproxy master\n  muxproxy master stop --drain",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runMaster(cmd.Context(), a) },
	}
	var drain bool
	stop := &cobra.Command{
		Use:   "stop [--drain]",
		Short: "end the master",
		Long: `Ends the master and cuts every client, or, with --drain, lets it end with its
last client.`,
		Example: "  muxproxy master stop --drain",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runMasterStop(cmd.Context(), a, drain) },
	}
	stop.Flags().BoolVar(&drain, "drain", false, "take no new clients and end with the last one")
	var asJSON bool
	reload := &cobra.Command{
		Use:   "reload [--json]",
		Short: "read the policy file again",
		Long: `Has the master read its policy file again, which it does by itself when the
file changes. New uses see the new policy, connections go on. A file with errors
changes nothing: they are printed, and it ends with 1.`,
		Example: "  muxproxy master reload",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runMasterReload(cmd.Context(), a, asJSON) },
	}
	reload.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.AddCommand(
		&cobra.Command{
			Use:   "start",
			Short: "start a master in the background, unless one runs",
			Long: `Starts a master in the background, unless one runs, and waits until it takes
connections.`,
			Example: "  muxproxy master start",
			Args:    cobra.NoArgs,
			RunE:    func(cmd *cobra.Command, _ []string) error { return runMasterStart(cmd.Context(), a) },
		},
		stop,
		&cobra.Command{
			Use:   "restart",
			Short: "have the program that is installed now take over",
			Long: `Starts the muxproxyd that is installed now, which takes the sockets, so that no
ssh notices. The master that runs keeps its sessions and ends with the last one.
What "muxproxy lock" has locked stays so; what plugins have granted ends.`,
			Example: "  muxproxy master restart",
			Args:    cobra.NoArgs,
			RunE:    func(cmd *cobra.Command, _ []string) error { return runMasterRestart(cmd.Context(), a) },
		},
		reload,
		&cobra.Command{
			Use:   "dump",
			Short: "print the master's inner state for a bug report",
			Long: `Prints the master's goroutines and state for a bug report. There are host names
in it, no secrets.`,
			Example: "  muxproxy master dump > muxproxy.txt",
			Args:    cobra.NoArgs,
			RunE:    func(cmd *cobra.Command, _ []string) error { return runMasterDump(cmd.Context(), a) },
		},
	)
	return cmd
}

// runMaster is the daemon. Whoever waits for it (bridge.StartMaster, systemd) is told by sd_notify(3) when it is ready or
// why it can't be. Errors go to the log, as all that it says.
func runMaster(ctx context.Context, a *app) error {
	err := harden.Process() // before anything can be stolen
	// Never touched, so it takes no memory; but the garbage collector counts it, and runs half as often while the heap is as
	// small as a master's. Every packet is an allocation in x/crypto/ssh. More would put off what is memory until then.
	ballast := make([]byte, 4<<20)
	defer runtime.KeepAlive(ballast)
	// The other half is for the clients' own ssh, which have as much to do. A packet passes three goroutines of x/crypto/ssh;
	// where each has a processor that waits for work, they hand over one packet at a time, and wake each other for it.
	runtime.GOMAXPROCS((runtime.GOMAXPROCS(0) + 1) / 2)
	hangup := make(chan os.Signal, 1) // also from a terminal that it was started on, which does no harm
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	level := func(name string) { // for all loggers that are made of this one, at any time
		l, err := zerolog.ParseLevel(name)
		if err != nil {
			l = zerolog.InfoLevel
		}
		if a.getenv("MUXPROXY_DEBUG") == "1" {
			l = min(l, zerolog.DebugLevel)
		}
		zerolog.SetGlobalLevel(l)
	}
	level("info")
	log := zerolog.New(a.stderr).With().Timestamp().Logger()
	notify := func(unset bool, state string) {
		if _, err := daemon.SdNotify(unset, state); err != nil {
			log.Warn().Err(err).Msg("can't tell whoever started this master how it goes")
		}
	}
	var dirs paths.Dirs
	if err == nil {
		dirs, err = paths.Find(a.getenv)
	}
	var sockets master.Sockets
	if err == nil {
		sockets, err = passedSockets()
	}
	systemd := os.Getenv("NOTIFY_SOCKET") // for the master after this one
	if err == nil {
		err = master.Run(ctx, master.Options{
			Dirs: dirs, Log: log, Version: readVersion().Version, Getenv: a.getenv,
			Ready: func() { notify(true, fmt.Sprintf("%s\nMAINPID=%d", daemon.SdNotifyReady, os.Getpid())) }, LogLevel: level, Hangup: hangup, BuiltIn: builtInNames(),
			Sockets: sockets,
			Handover: func(dir string, names []string, kept bool) []string {
				env := handover(dir, names, kept)
				if _, err := os.Stat(systemd); err == nil { // a bridge's is gone by now
					env = append(env, "NOTIFY_SOCKET="+systemd)
				}
				return env
			},
		})
	}
	if err != nil {
		notify(false, "STATUS="+use.Printable(err.Error())+"\nERRNO=1")
		log.Error().Str("error", use.Printable(err.Error())).Msg("the master ends")
		return &statusError{status: exitFailed}
	}
	return nil
}

func runMasterStart(ctx context.Context, a *app) error {
	dirs, err := paths.Find(a.getenv)
	if err != nil {
		return err
	}
	if err := bridge.StartMaster(ctx, dirs, a.getenv); err != nil {
		return err
	}
	return a.withMaster(ctx, func(m *control.Master) error {
		s, err := m.Status(ctx)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(a.stdout, "a master runs, pid %d\n", s.PID)
		return err
	})
}

func runMasterStop(ctx context.Context, a *app, drain bool) error {
	return a.withMaster(ctx, func(m *control.Master) error {
		s, err := m.Status(ctx)
		if err != nil {
			return err
		}
		if drain {
			if err := m.Stop(ctx, true); err != nil {
				return err
			}
			_, err := fmt.Fprintf(a.stdout, "the master, pid %d, ends with its last client\n", s.PID)
			return err
		}
		if err := stopNow(ctx, m, s.PID); err != nil {
			return err
		}
		_, err = fmt.Fprintf(a.stdout, "the master, pid %d, has ended\n", s.PID)
		return err
	})
}

func runMasterRestart(ctx context.Context, a *app) error {
	var old control.Status
	var pid int
	err := a.withMaster(ctx, func(m *control.Master) (err error) {
		if old, err = m.Status(ctx); err == nil {
			pid, err = m.Restart(ctx)
		}
		return err
	})
	if errors.Is(err, control.ErrLost) {
		return errors.New("the master has ended meanwhile, after another restart or a stop; see `muxproxy status`")
	}
	if err != nil {
		return err
	}
	// The socket is the new one's by now, which answers when it is ready.
	var now control.Status
	err = a.withMaster(ctx, func(m *control.Master) (err error) {
		now, err = m.Status(ctx)
		return err
	})
	if none, ok := errors.AsType[*statusError](err); ok { // that no master runs is a failure here, and no answer
		err = none.err
	}
	if err != nil {
		return fmt.Errorf("the new master, pid %d, did not take over: %w; see `muxproxy log`", pid, err)
	}
	if now.PID != pid {
		return fmt.Errorf("the master that answers is pid %d: the new one, pid %d, has ended, or was restarted in its turn; see `muxproxy log`",
			now.PID, pid)
	}
	text := fmt.Sprintf("the master, pid %d, has taken over; the one before, pid %d, ends with its last session\n", pid, old.PID)
	if mine := readVersion().Version; now.Version != mine {
		text += fmt.Sprintf("it is muxproxy %s and this is %s: the master runs from another place; to have this one started, "+
			"`muxproxy master stop --drain`\n", use.Printable(now.Version), mine)
	}
	_, err = io.WriteString(a.stdout, text)
	return err
}

// stopNow ends a master and returns when its process has ended.
func stopNow(ctx context.Context, m *control.Master, pid int) error {
	// A master that goes at once may be gone before it has answered.
	if err := m.Stop(ctx, false); err != nil && !errors.Is(err, control.ErrLost) {
		return err
	}
	return waitForEnd(ctx, m, pid)
}

// waitForEnd returns when the master has closed the connection and its process has ended, so that a new one can start.
func waitForEnd(ctx context.Context, m *control.Master, pid int) error {
	ctx, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	late := func() error {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return fmt.Errorf("the master, pid %d, still runs after %v; see `muxproxy log`, or kill it", pid, stopTime)
		}
		return ctx.Err()
	}
	select {
	case <-m.Lost():
	case <-ctx.Done():
		return late()
	}
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for paths.Alive(pid) {
		select {
		case <-t.C:
		case <-ctx.Done():
			return late()
		}
	}
	return nil
}

func runMasterReload(ctx context.Context, a *app, asJSON bool) error {
	return a.withMaster(ctx, func(m *control.Master) error {
		r, err := m.Reload(ctx, colors(a.stderr))
		if err != nil {
			return err
		}
		switch {
		case asJSON:
			err = a.printJSON(r)
		default:
			_, err = io.WriteString(a.stderr, r.Text)
			if err == nil && r.InForce {
				_, err = fmt.Fprintf(a.stdout, "the policy of %s is in force\n", use.Printable(r.File))
			}
		}
		switch {
		case err != nil:
			return err
		case !r.InForce && asJSON:
			return &statusError{status: exitNo}
		case !r.InForce:
			return no("%s has errors: the policy that was in force still is", r.File)
		}
		return nil
	})
}

func runMasterDump(ctx context.Context, a *app) error {
	return a.withMaster(ctx, func(m *control.Master) error {
		text, err := m.Dump(ctx)
		if err != nil {
			return err
		}
		for line := range splitLines(text) {
			if _, err := io.WriteString(a.stdout, line+"\n"); err != nil {
				return err
			}
		}
		return nil
	})
}
