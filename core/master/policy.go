package master

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/session"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// settleTime is how long the policy file has to be left alone before it is read: an editor writes it in several steps.
	settleTime = 100 * time.Millisecond
	// goneTime is how long it has to be missing until the defaults hold, which allow all: whatever replaces files in more
	// than one step takes them away first.
	goneTime = 2 * time.Second
	// idleLook bounds the time between two looks whether the master is idle.
	idleLook = 10 * time.Second
)

// policies holds the policy in force.
type policies struct {
	path    string
	named   bool // by $MUXPROXY_CONFIG: it has to exist
	home    string
	now     atomic.Pointer[policy.Snapshot] // never nil once the master runs
	seen    atomic.Pointer[stamp]           // what the file was when it was last read, or left unread
	loading chan struct{}                   // one place: one file is read at a time
	changed chan struct{}                   // one token: another policy holds
	opened  chan struct{}                   // one token: the lock has changed
	// generation counts the policies that were given to plugins; whoever holds loading may use it.
	generation uint64
	incomplete atomic.Bool                        // a plugin of the policy in force was never started
	trying     atomic.Pointer[context.CancelFunc] // ends the last try to start those; nil: there was none
}

func (p *policies) init(getenv func(string) string, configDir string) {
	p.path, p.named = policy.Where(getenv, configDir)
	p.home = getenv("HOME")
	p.loading = make(chan struct{}, 1)
	p.changed = make(chan struct{}, 1)
	p.opened = make(chan struct{}, 1)
}

// poke leaves a token.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// lookup is the policy in force.
func (p *policies) lookup() use.Lookup { return p.now.Load() }

// read reads the file. The snapshot is nil if there are errors.
func (p *policies) read(say func(error)) (*policy.Snapshot, policy.Diagnostics) {
	now := stampOf(p.path) // before it is read: a later change is another one
	p.seen.Store(&now)
	a := &aliases{say: say}
	s, diags := policy.Load(p.path, !p.named, policy.Options{Alias: a.leads, Home: p.home})
	if s != nil {
		a.config = s.Master().SSHConfig
	}
	return s, diags
}

func (m *Master) noAlias(err error) {
	m.log.Warn().Err(err).Msg("an alias can't be checked, so it does not count")
}

func (m *Master) warn(diags policy.Diagnostics) {
	for _, d := range diags.Warnings() {
		m.log.Warn().Msg(d.Error())
	}
}

// apply has the rest of the master do as the policy in force says.
func (m *Master) apply() {
	mp := m.policy.now.Load().Master()
	m.audit.Require(mp.AuditRequired)
	m.audit.Full(mp.AuditFull)
	if m.opts.LogLevel != nil {
		m.opts.LogLevel(mp.LogLevel)
	}
	poke(m.policy.changed)
}

// Reload implements control.Backend. A policy with errors changes nothing.
func (m *Master) Reload(ctx context.Context, by use.Caller, color bool) (control.Reloaded, error) {
	permit, err := m.permit(ctx, by, "reload", "", use.Target{})
	if err != nil {
		return control.Reloaded{}, err
	}
	diags, err := m.reload(ctx)
	if err != nil {
		permit.End(use.Result{Status: "refused", Err: err.Error()})
		if diags == nil {
			return control.Reloaded{}, err
		}
	} else {
		permit.End(use.Result{Status: "ok"})
	}
	var text bytes.Buffer
	_ = diags.Write(&text, color) // into memory
	list, jsonErr := diags.MarshalJSON()
	return control.Reloaded{
		File: m.policy.path, InForce: err == nil, Text: text.String(), Diagnostics: list,
	}, jsonErr
}

// reload puts the file's policy in force. Without an error the diagnostics are warnings.
func (m *Master) reload(ctx context.Context) (policy.Diagnostics, error) {
	if cancel := m.policy.trying.Load(); cancel != nil {
		(*cancel)() // a plugin that does not answer would keep this one waiting
	}
	select {
	case m.policy.loading <- struct{}{}:
		defer func() { <-m.policy.loading }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	diags, err := m.adopt(ctx, false)
	if err != nil {
		for _, d := range diags.Errors() {
			m.log.Error().Msg(d.Error())
		}
		m.log.Error().Str("file", m.policy.path).Msg("the policy file has errors; the policy in force stays")
		return diags, err
	}
	m.log.Info().Str("file", m.policy.path).Msg("another policy is in force")
	return diags, nil
}

// watchPolicy reloads when the file changes, on SIGHUP, and when the lock has been opened that kept it from doing so. It
// returns when ctx ends.
func (m *Master) watchPolicy(ctx context.Context) {
	w := &fileWatch{path: m.policy.path}
	defer w.close()
	if err := w.follow(); err != nil {
		m.log.Warn().Err(err).Msg("changes of the policy file are not noticed; use `muxproxy master reload`")
	}
	var retry <-chan time.Time
	pause := retryTime
	tried := make(chan bool, 1)
	var trying sync.WaitGroup
	defer trying.Wait()
	if m.policy.incomplete.Load() {
		retry = time.After(pause)
	}
	var settle <-chan time.Time
	var gone time.Time // since when the file is missing; zero: it is there, or has never been
	pending := false   // a reload that the lock has stopped
	reload := func(why string) {
		permit, err := m.permit(ctx, use.Self(), "reload", "", use.Target{})
		if err != nil {
			var denied *use.Denied
			pending = errors.As(err, &denied) && denied.By == "lock"
			now := stampOf(m.policy.path)
			m.policy.seen.Store(&now)
			m.log.Warn().Err(err).Str("why", why).Msg("the policy file is not read")
			return
		}
		pending = false
		if _, err := m.reload(ctx); err != nil {
			permit.End(use.Result{Status: "refused", Err: err.Error()})
			return
		}
		permit.End(use.Result{Status: "ok"})
	}
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-m.opts.Hangup:
			if ok {
				reload("SIGHUP")
			}
		case <-retry:
			retry = nil
			trying.Go(func() { tried <- m.complete(ctx) })
		case complete := <-tried:
			if !complete {
				pause = min(2*pause, retryMost)
				retry = time.After(pause)
			}
		case err := <-w.errors():
			m.log.Warn().Err(err).Msg("changes of the policy file may go unnoticed; use `muxproxy master reload`")
		case _, ok := <-w.events():
			if ok && settle == nil {
				settle = time.After(settleTime)
			}
		case <-settle:
			settle = nil
			if err := w.follow(); err != nil { // a directory may have come, or been replaced
				m.log.Warn().Err(err).Msg("changes of the policy file are not noticed; use `muxproxy master reload`")
			}
			now := stampOf(m.policy.path)
			switch {
			case now != (stamp{}) || now == *m.policy.seen.Load():
				gone = time.Time{}
			case gone.IsZero():
				gone = time.Now()
			}
			switch {
			case now == *m.policy.seen.Load():
			case !gone.IsZero() && time.Since(gone) < goneTime:
				settle = time.After(settleTime)
			case time.Since(now.mtime).Abs() < settleTime: // half of a policy may be a lax one
				settle = time.After(settleTime)
			default:
				reload("the file has changed")
			}
		case <-m.policy.opened:
			if pending && !m.lock.State().Locked {
				reload("the lock is open")
			}
		}
	}
}

// stamp is what tells one state of a file from another.
type stamp struct {
	target string // where a symbolic link leads
	dev    uint64
	inode  uint64
	size   int64
	mtime  time.Time
}

func stampOf(path string) stamp {
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return stamp{}
	}
	fi, err := os.Stat(target)
	if err != nil {
		return stamp{}
	}
	dev, inode, _ := deviceInode(fi)
	return stamp{target, dev, inode, fi.Size(), fi.ModTime()}
}

// fileWatch tells that something happens around a file: in its directory, since editors write a new file and rename it,
// in that of the file that a symbolic link leads to, and, where there is none yet, in the nearest directory above.
type fileWatch struct {
	path    string
	watcher *fsnotify.Watcher // nil: not begun, or it can't be
	dirs    []string
}

// follow watches the directories that count now.
func (w *fileWatch) follow() error {
	if w.watcher == nil {
		watcher, err := fsnotify.NewWatcher()
		if err != nil {
			return err
		}
		w.watcher = watcher
	}
	dirs := []string{existing(filepath.Dir(w.path))}
	if target, err := filepath.EvalSymlinks(w.path); err == nil && !slices.Contains(dirs, filepath.Dir(target)) {
		dirs = append(dirs, filepath.Dir(target))
	}
	for _, old := range w.dirs {
		if !slices.Contains(dirs, old) {
			_ = w.watcher.Remove(old) // it may be gone
		}
	}
	w.dirs = dirs
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, w.watcher.Add(dir)) // again: a directory of that name may be another one
	}
	return errors.Join(errs...)
}

// existing is dir or the nearest above it that there is.
func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func (w *fileWatch) events() <-chan fsnotify.Event {
	if w.watcher == nil {
		return nil
	}
	return w.watcher.Events
}

func (w *fileWatch) errors() <-chan error {
	if w.watcher == nil {
		return nil
	}
	return w.watcher.Errors
}

func (w *fileWatch) close() {
	if w.watcher != nil {
		w.watcher.Close()
	}
}

// follow does what depends on the policy and goes on for as long as it holds: the watch over the session, and the end of
// an idle master. It returns when ctx ends.
func (m *Master) follow(ctx context.Context) {
	var on []string
	stop := func() {}
	defer func() { stop() }()
	wake := func() {} // ends the watch over sleep for the plugins
	defer func() { wake() }()
	watched := false
	idle := idleness{since: time.Now()}
	for {
		mp := m.policy.now.Load().Master()
		if wanted := slices.Sorted(slices.Values(mp.LockOn)); !slices.Equal(wanted, on) || on == nil {
			stop()
			on = append([]string{}, wanted...)
			stop = m.watchSession(ctx, on)
		}
		if observed := m.plugins.Observed(); observed != watched {
			wake()
			wake, watched = func() {}, observed
			if observed {
				wake = watch(ctx, session.Options{Sleep: true, Getenv: m.opts.Getenv, Log: m.log}, sleep{m.plugins})
			}
		}
		var look <-chan time.Time
		if after := mp.ExitWhenIdle; after >= 0 && !m.draining.Load() {
			if idle.look(m) >= after {
				m.log.Info().Dur("after", after).Msg("idle for as long as policy allows")
				m.drain(false)
			}
			look = time.After(max(10*time.Millisecond, min(after/10, idleLook)))
		}
		select {
		case <-look:
		case <-m.policy.changed:
		case <-ctx.Done():
			return
		}
	}
}

// watchSession has the lock follow the session, and opens what nothing would open any more. The returned function ends
// that.
func (m *Master) watchSession(ctx context.Context, on []string) func() {
	var dead []string
	if !slices.Contains(on, "screen") {
		dead = append(dead, use.LockedByScreen, use.LockedBySaver)
	}
	if !slices.Contains(on, "sleep") {
		dead = append(dead, use.LockedBySleep)
	}
	if err := m.lock.UnlockSession(dead...); err != nil {
		m.log.Error().Err(err).Msg("lock")
	}
	if len(on) == 0 {
		return func() {}
	}
	return watch(ctx, session.Options{
		Screen: slices.Contains(on, "screen"), Sleep: slices.Contains(on, "sleep"), Getenv: m.opts.Getenv, Log: m.log,
	}, m.lock)
}

// watch follows the session until the returned function is called, which waits for that.
func watch(ctx context.Context, o session.Options, l session.Locker) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		session.Watch(ctx, o, l)
	}()
	return func() {
		cancel()
		<-done
	}
}

// idleness is how long nobody has used the master.
type idleness struct {
	since time.Time
	last  uint64 // number of the last client
}

func (i *idleness) look(m *Master) time.Duration {
	last := m.lastClient.Load()
	if m.clientsNow() > 0 || last != i.last || len(m.pool.List()) > 0 {
		i.since, i.last = time.Now(), last
	}
	return time.Since(i.since)
}
