// Package master is the daemon: listeners, start, drain, and the wiring of all other parts.
package master

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/local"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/pluginhost"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/upstream"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// presentEvery is how often the sockets' names are looked after: a vanished one keeps every new ssh out.
	presentEvery = time.Second
	// takeOverTime is how long a master waits for another one that can't be reached: more than a shutdown takes, which
	// gives clients a second for their last line and commands two, and less than a bridge waits.
	takeOverTime = 6 * time.Second
	// acceptPause is the wait after a failed accept (fd limit reached).
	acceptPause = 100 * time.Millisecond
)

// Options are what a master is started with.
type Options struct {
	Dirs    paths.Dirs
	Log     zerolog.Logger
	Version string
	Getenv  func(string) string
	Ready   func() // called once when bridges can connect
	// LogLevel is told what policy says of the log, at the start and whenever it changes: "trace", "debug", "info",
	// "warn" or "error". nil: the log stays as it is.
	LogLevel func(string)
	// BuiltIn are the plugins that this program is itself when it is started as "plugin NAME".
	BuiltIn []string
	// Sockets listen already.
	Sockets Sockets
	// Handover is the environment by which this program, started again, finds sockets of these names in dir as its
	// descriptors from 3 on; kept is Sockets' Kept.
	Handover func(dir string, names []string, kept bool) []string
	// Hangup asks to read the policy file again (SIGHUP); nil: nobody does.
	Hangup <-chan os.Signal
}

// Master is one running daemon.
type Master struct {
	opts       Options
	log        zerolog.Logger
	since      time.Time
	authority  *local.Authority
	knownHosts knownHosts
	policy     policies
	audit      *use.Audit
	lock       *use.Lock
	gate       use.Gate
	pool       *pool.Pool
	configs    configs
	agents     lastAgents
	plugins    *pluginhost.Manager

	stop       context.CancelCauseFunc // ends Run
	ending     chan struct{}           // closed when Run is to end
	draining   atomic.Bool
	restarting atomic.Bool // another master is being started

	telling sync.Mutex // keeps what the plugins are told of the lock in order; guards locked
	locked  bool       // what they were told

	accepted   chan struct{} // closed when the last bridge has been taken, or never if none could be
	lastClient atomic.Uint64
	wg         sync.WaitGroup // clients
	again      sync.Mutex     // held while a socket is made again: the two sockets share directory and link

	mu        sync.Mutex      // guards what follows
	living    *paths.FileLock // says that this is the one living master; nil once given away
	clients   map[uint64]*client
	serving   int               // clients, those that have not said hello yet too
	listeners []*paths.Listener // mux, control
	socketDir string            // where those are
	idle      chan struct{}     // closed when draining and the last client has left
}

var errStopped = errors.New("the master was stopped")

// Run is a master's whole life: it returns nil when ctx ends or it has been told to stop, after every client has been
// cut and everything closed. If another master of this user lives on this host, it returns nil as soon as that one can
// be reached.
func Run(ctx context.Context, opts Options) error {
	if opts.Sockets.Dir != "" {
		opts.Dirs.Runtime = opts.Sockets.Dir
	}
	if err := opts.Dirs.Make(); err != nil {
		return err
	}
	wait := takeOver
	if opts.Sockets.TakeOver {
		wait = awaitLock
	}
	lock, err := wait(ctx, opts)
	if lock == nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("this host's name: %w", err)
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	m := &Master{
		opts: opts, log: opts.Log, since: time.Now(), stop: stop, living: lock, clients: map[uint64]*client{},
		ending:     make(chan struct{}),
		accepted:   make(chan struct{}),
		socketDir:  opts.Dirs.Runtime,
		knownHosts: knownHosts{path: filepath.Join(opts.Dirs.State, paths.KnownHosts), host: host, pid: os.Getpid()},
	}
	defer m.giveUp(false)
	return m.run(ctx)
}

// takeOver gets the lock of the one living master. It returns nil, and no error, if another master lives and can be
// reached. One that can't be is about to end, or has lost its sockets' names and is about to notice.
func takeOver(ctx context.Context, opts Options) (*paths.FileLock, error) {
	ctx, cancel := context.WithTimeout(ctx, takeOverTime)
	defer cancel()
	path := filepath.Join(opts.Dirs.Run, paths.MasterLock)
	t := time.NewTicker(takeOverTime / 100)
	defer t.Stop()
	for {
		lock, err := paths.TryLock(path)
		if !errors.Is(err, paths.ErrLocked) {
			return lock, err
		}
		if dir, err := opts.Dirs.Published(); err == nil {
			if c, err := paths.Dial(dir, paths.MuxSocket); err == nil {
				c.Close()
				opts.Log.Info().Msg("another master is alive")
				opts.Ready()
				return nil, nil
			}
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("another master holds %s and does not listen: find its pid with fuser, and end it", path)
		}
	}
}

// giveUp lets another master be the living one. handedOver: it has the sockets, and the link to them is right.
func (m *Master) giveUp(handedOver bool) {
	m.mu.Lock()
	lock := m.living
	m.living = nil
	m.mu.Unlock()
	if lock == nil {
		return
	}
	if !handedOver {
		if err := m.opts.Dirs.Unpublish(m.sockets()); err != nil {
			m.log.Warn().Err(err).Msg("can't remove the link to the sockets")
		}
	}
	lock.Close()
}

func (m *Master) run(ctx context.Context) error {
	m.policy.init(m.opts.Getenv, m.opts.Dirs.Config)
	var err error
	m.audit, err = use.OpenAudit(use.AuditOptions{
		Path: filepath.Join(m.opts.Dirs.State, paths.AuditLog),
		Report: func(err error) {
			m.log.Err(err).Msg("audit log")
		},
	})
	if err != nil {
		return err
	}
	defer m.audit.Close()
	m.lock, err = use.OpenLock(filepath.Join(m.opts.Dirs.Run, paths.LockState))
	if err != nil {
		m.log.Error().Err(err).Msg("lock")
	}
	locked := m.lock.State().Locked
	m.plugins = pluginhost.New(pluginhost.Options{
		Dir: m.sockets, State: m.opts.Dirs.State, Env: pluginhost.Environment(m.opts.Getenv), Backend: backend{m}, Log: m.log,
		Locked: locked,
	})
	m.locked = locked // nobody else has it yet
	m.lock.OnChange(m.lockChanged)
	m.gate = m.lock.NewGate(m.audit, observer{m.plugins}, m.plugins.Check)
	m.authority, err = local.NewAuthority(func(ca string) error { return m.knownHosts.add(ca) })
	if err != nil {
		return fmt.Errorf("the local host keys: %w", err)
	}
	defer func() {
		if err := m.knownHosts.remove(); err != nil {
			m.log.Warn().Err(err).Msg("can't take the local CA out of known_hosts")
		}
	}()
	m.pool = pool.New(&upstream.Dialer{Log: m.log}, keeper{m.plugins}, m.gate, m.log)
	defer m.plugins.Wait()
	defer m.pool.Close()
	defer m.wg.Wait()
	end := sync.OnceFunc(func() { close(m.ending) })
	defer end()
	defer m.plugins.Close()
	// Without a policy there is no master: the default would allow what the file denies.
	if diags, err := m.adopt(ctx, true); err != nil {
		if diags == nil {
			return err
		}
		return fmt.Errorf("%w; `muxproxy config check` shows all of it", err)
	}

	var wg sync.WaitGroup // what listens
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	listen := func(name string, serve func(net.Listener) error) error {
		l, err := m.listen(name)
		if err != nil {
			return err
		}
		m.mu.Lock()
		m.listeners = append(m.listeners, l)
		m.mu.Unlock()
		wg.Go(func() {
			m.keepListening(ctx, l, name, serve)
			if name == paths.MuxSocket {
				close(m.accepted)
			}
		})
		return nil
	}
	defer m.closeListeners(false)
	clients, cutClients := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cutClients(nil)
	if err := listen(paths.MuxSocket, func(l net.Listener) error { return m.accept(clients, l) }); err != nil {
		return err
	}
	if err := listen(paths.ControlSocket, func(l net.Listener) error { return control.Serve(ctx, l, m) }); err != nil {
		return err
	}
	if err := m.opts.Dirs.Publish(m.opts.Dirs.Runtime); err != nil {
		return err
	}
	wg.Go(func() { m.watchPolicy(ctx) })
	wg.Go(func() { m.follow(ctx) })
	m.log.Info().Str("version", m.opts.Version).Int("pid", os.Getpid()).Str("sockets", m.opts.Dirs.Runtime).
		Msg("master is ready")
	m.opts.Ready()

	<-ctx.Done()
	end()
	m.closeListeners(false)
	var cut sync.WaitGroup
	for _, c := range m.snapshot() {
		cut.Go(func() { c.cut(errStopped) })
	}
	cut.Wait()
	wg.Wait()              // so nobody comes any more
	cutClients(errStopped) // those that came meanwhile
	m.wg.Wait()
	m.log.Info().Msg("master has ended")
	return nil
}

// keepListening serves one socket until ctx ends or the master drains. If the socket's name vanishes it is made
// again: nobody could connect any more.
func (m *Master) keepListening(ctx context.Context, l *paths.Listener, name string, serve func(net.Listener) error) {
	for {
		served := make(chan error, 1)
		go func() { served <- serve(l) }()
		next := m.watch(ctx, l, name, served)
		if next == nil {
			return
		}
		l = next
	}
}

// watch returns when l is to be replaced by another listener, or, with nil, when there is nothing left to serve. It
// waits for what serves l.
func (m *Master) watch(ctx context.Context, l *paths.Listener, name string, served <-chan error) *paths.Listener {
	t := time.NewTicker(presentEvery)
	defer t.Stop()
	told := false
	for {
		select {
		case err := <-served:
			if ctx.Err() == nil && !m.draining.Load() {
				m.log.Error().Err(err).Str("socket", name).Msg("listener has ended")
				m.stop(err)
			}
			return nil
		case <-t.C:
		}
		if l.Present() || m.draining.Load() || ctx.Err() != nil {
			continue
		}
		next, err := m.listenAgain(name)
		if err != nil {
			if !told {
				m.log.Error().Err(err).Str("socket", name).Msg("the socket has vanished and can't be made again yet")
			}
			told = true
			continue
		}
		m.log.Warn().Str("socket", next.Path()).Msg("the socket had vanished and was made again")
		m.mu.Lock()
		i := slices.Index(m.listeners, l)
		if i >= 0 {
			m.listeners[i] = next
		}
		m.mu.Unlock()
		l.Close()
		<-served
		if i < 0 { // closeListeners was quicker
			next.Close()
			return nil
		}
		return next
	}
}

// listenAgain makes a socket where it was, or, if that place is gone for good, where there always is one: logind takes
// /run/user/UID away with the user's last session, and the master lives on.
func (m *Master) listenAgain(name string) (*paths.Listener, error) {
	m.again.Lock()
	defer m.again.Unlock()
	dirs := m.opts.Dirs
	dirs.Runtime = m.sockets()
	if dirs.Make() != nil {
		dirs.Runtime = dirs.Run
		if err := dirs.Make(); err != nil {
			return nil, err
		}
	}
	// Who removes the sockets' folder may have removed known_hosts with it, without which ssh turns this master's key down.
	_, cas := m.authority.Made()
	if err := m.knownHosts.add(cas...); err != nil { // the commands need their socket all the same
		m.log.Error().Err(err).Msg("the host key can't be written: ssh will not take it")
	}
	l, err := paths.Listen(dirs.Runtime, name)
	if err != nil {
		return nil, err
	}
	if err := dirs.Publish(dirs.Runtime); err != nil {
		l.Close()
		return nil, err
	}
	m.mu.Lock()
	m.socketDir = dirs.Runtime
	m.mu.Unlock()
	return l, nil
}

// sockets is the directory that holds the sockets.
func (m *Master) sockets() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.socketDir
}

// listen makes a socket, unless it was there when the master started.
func (m *Master) listen(name string) (*paths.Listener, error) {
	if l := m.opts.Sockets.Listeners[name]; l != nil {
		return paths.Adopt(l, filepath.Join(m.opts.Dirs.Runtime, name), m.opts.Sockets.Kept)
	}
	return paths.Listen(m.opts.Dirs.Runtime, name)
}

// closeListeners stops listening. handedOver: another master listens on the same sockets, whose names stay.
func (m *Master) closeListeners(handedOver bool) {
	m.mu.Lock()
	ls := m.listeners
	m.listeners = nil
	m.mu.Unlock()
	for _, l := range ls {
		if handedOver {
			l.Leave()
		} else {
			l.Close()
		}
	}
}

// accept takes bridges until l is closed.
func (m *Master) accept(ctx context.Context, l net.Listener) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			// Most likely no fd is left. Those who wait are served when a client leaves.
			m.log.Error().Err(err).Msg("can't accept")
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
				return nil
			}
			continue
		}
		m.begin()
		m.wg.Go(func() {
			defer m.end()
			m.serve(ctx, c.(*net.UnixConn))
		})
	}
}

// snapshot returns the clients of this moment.
func (m *Master) snapshot() []*client {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]*client, 0, len(m.clients))
	for _, c := range m.clients {
		list = append(list, c)
	}
	return list
}

func (m *Master) enter(c *client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clients[c.id] = c
}

func (m *Master) leave(c *client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.clients, c.id)
}

// begin and end count who is connected, from before its hello.
func (m *Master) begin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.serving++
}

func (m *Master) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.serving--
	if m.idle != nil && m.serving == 0 {
		close(m.idle)
		m.idle = nil
	}
}

func (m *Master) clientsNow() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.serving
}
