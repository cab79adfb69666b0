package master

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/use"
)

// Sockets are those that a master finds listening when it starts: systemd's, or those of the master before it.
type Sockets struct {
	Listeners map[string]*net.UnixListener // by the name of the socket's file
	Dir       string                       // where those are
	// Kept says that their names belong to somebody else (systemd), and stay when the master ends.
	Kept bool
	// TakeOver says that another master gives them away, and is about to let go of MasterLock.
	TakeOver bool
}

const (
	// handoverTime is how long a new master waits for the one before it to let go.
	handoverTime = 30 * time.Second
	// checkTime bounds the look of a new program at the policy.
	checkTime = 30 * time.Second
	// busyEvery is how often a draining master without clients looks whether plugins' streams still run.
	busyEvery = 200 * time.Millisecond
)

// Restart implements control.Backend.
func (m *Master) Restart(ctx context.Context, by use.Caller) (pid int, err error) {
	p, err := m.permit(ctx, by, "restart", "", use.Target{})
	if err != nil {
		return 0, err
	}
	pid, err = m.handOver(ctx)
	if err != nil {
		m.log.Error().Err(err).Msg("no restart")
	}
	return pid, finish(p, err)
}

// handOver starts the program that is installed where this one was, gives it the sockets, and lets this one drain.
func (m *Master) handOver(ctx context.Context) (pid int, err error) {
	if !canHandOver {
		return 0, fmt.Errorf("%w on this system; use `muxproxy master stop --drain`", errors.ErrUnsupported)
	}
	if m.restarting.Swap(true) {
		return 0, errors.New("another restart is under way; see `muxproxy status`")
	}
	defer m.restarting.Store(false)
	exe, err := os.Executable()
	if err != nil {
		return 0, err
	}
	exe = strings.TrimSuffix(exe, " (deleted)") // another version is there now
	if err := checkProgram(ctx, exe); err != nil {
		return 0, err
	}
	m.mu.Lock()
	sockets := slices.Clone(m.listeners)
	m.mu.Unlock()
	if len(sockets) == 0 || m.draining.Load() {
		return 0, errors.New("this master ends already, after another restart or a `stop --drain`; see `muxproxy status`")
	}
	var names []string
	for _, l := range sockets {
		names = append(names, filepath.Base(l.Path()))
	}
	env := append(os.Environ(), m.opts.Handover(m.sockets(), names, m.opts.Sockets.Kept)...)
	process, err := launch([]string{exe, "master"}, env, sockets)
	if err != nil {
		return 0, err
	}
	pid = process.Pid
	m.log.Info().Int("pid", pid).Str("program", exe).Msg("another master takes over")
	m.wg.Go(func() { // reaps it if it ends first
		ended := make(chan *os.ProcessState, 1)
		go func() { // not waited for: the new master outlives this one
			state, _ := process.Wait()
			ended <- state
		}()
		select {
		case state := <-ended:
			m.log.Error().Stringer("status", state).Int("pid", pid).Msg("the master that took over has ended")
		case <-m.ending:
		}
	})
	m.drain(true)
	return pid, nil
}

// checkProgram has a program look at the policy: one that can't take over must not make this one let go.
func checkProgram(ctx context.Context, exe string) error {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, "config", "check")
	cmd.Dir = "/"
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		line, _, _ := strings.Cut(strings.TrimSpace(out.String()), "\n")
		return fmt.Errorf("%s can't take over: `muxproxy config check`: %w: %s", exe, err, use.Printable(line))
	}
	return nil
}

// awaitLock waits until the master before this one has let go.
func awaitLock(ctx context.Context, opts Options) (*paths.FileLock, error) {
	ctx, cancel := context.WithTimeout(ctx, handoverTime)
	defer cancel()
	path := filepath.Join(opts.Dirs.Run, paths.MasterLock)
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		lock, err := paths.TryLock(path)
		if !errors.Is(err, paths.ErrLocked) {
			return lock, err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("the master before this one does not let go of %s", path)
		}
	}
}

// drain ends the master with its last client, and the last stream that a plugin has begun. handedOver: another master has
// the sockets; else the next ssh starts one.
func (m *Master) drain(handedOver bool) {
	if m.draining.Swap(true) {
		return
	}
	m.closeListeners(handedOver)
	m.lock.Share()
	m.giveUp(handedOver)
	m.wg.Go(func() { // ends with the last client, which ends with Run
		// What plugins do by themselves is the next master's: their ports, the connections that they keep.
		m.plugins.Retire()
		m.pool.Reconsider()
		<-m.accepted // whoever was taken in the last moment counts
		idle := make(chan struct{})
		m.mu.Lock()
		if m.serving == 0 {
			close(idle)
		} else {
			m.idle = idle
		}
		m.mu.Unlock()
		<-idle
		t := time.NewTicker(busyEvery)
		defer t.Stop()
		for m.busy() {
			select {
			case <-t.C:
			case <-m.ending:
			}
		}
		m.stop(errStopped)
	})
}

// busy reports whether something still runs through a connection.
func (m *Master) busy() bool {
	select {
	case <-m.ending:
		return false
	default:
	}
	for _, u := range m.pool.List() {
		if u.Clients > 0 {
			return true
		}
	}
	return false
}
