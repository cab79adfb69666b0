package session

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/muxproxy/muxproxy/core/use"
)

// Names of logind (org.freedesktop.login1(5)).
const (
	logind         = "org.freedesktop.login1"
	logindPath     = "/org/freedesktop/login1"
	sessionPath    = logindPath + "/session"
	managerIface   = logind + ".Manager"
	sessionIface   = logind + ".Session"
	userIface      = logind + ".User"
	propertiesName = "org.freedesktop.DBus.Properties"
)

// savers are the interfaces of screen savers; the bus names are the same words.
var savers = []string{
	"org.freedesktop.ScreenSaver", "org.gnome.ScreenSaver", "org.mate.ScreenSaver", "org.cinnamon.ScreenSaver",
	"org.xfce.ScreenSaver",
}

const (
	// again is the pause before a bus that was lost, or is not there, is tried again.
	again = 5 * time.Second
	// callTime bounds a question to a service.
	callTime = 5 * time.Second
)

// Watch follows the session until ctx ends, and returns then. What it can't reach it tries again: meanwhile the lock stays
// as it is.
//
// Signals count if the service sent them that owns the name, and those of logind if the session is this user's. The
// services of the session's own bus can be any program of this user, which is why they open only what they have locked.
func Watch(ctx context.Context, o Options, l Locker) {
	var wg sync.WaitGroup
	defer wg.Wait()
	if !o.Screen && !o.Sleep {
		<-ctx.Done()
		return
	}
	w := &watch{Options: o, lock: l, uid: uint32(os.Geteuid())}
	wg.Go(func() { w.keep(ctx, "system bus", w.systemBus) })
	if o.Screen {
		wg.Go(func() { w.keep(ctx, "session bus", w.sessionBus) })
	}
}

type watch struct {
	Options
	lock Locker
	uid  uint32
}

func (w *watch) done(err error) {
	if err != nil {
		w.Log.Error().Err(err).Msg("lock")
	}
}

// keep runs follow, which returns when its bus is lost, again and again. A bus that stays away is told of once.
func (w *watch) keep(ctx context.Context, name string, follow func(context.Context) error) {
	told := ""
	for ctx.Err() == nil {
		err := follow(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil && err.Error() != told {
			told = err.Error()
			w.Log.Warn().Err(err).Str("bus", name).Msg("when the session locks or the machine sleeps is not seen")
		}
		t := time.NewTimer(again)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// systemBus follows logind.
func (w *watch) systemBus(ctx context.Context) error {
	address := w.Getenv("DBUS_SYSTEM_BUS_ADDRESS")
	if address == "" {
		address = "unix:path=/run/dbus/system_bus_socket"
	}
	c, err := connect(ctx, address)
	if err != nil {
		return err
	}
	defer c.Close()
	signals := make(chan *dbus.Signal, 64)
	c.Signal(signals)
	from := dbus.WithMatchSender(logind)
	var errs []error
	if w.Screen {
		errs = append(errs,
			c.AddMatchSignal(from, dbus.WithMatchInterface(sessionIface), dbus.WithMatchPathNamespace(sessionPath)),
			c.AddMatchSignal(from, dbus.WithMatchInterface(propertiesName), dbus.WithMatchPathNamespace(sessionPath)))
	}
	if w.Sleep {
		errs = append(errs, c.AddMatchSignal(from, dbus.WithMatchInterface(managerIface), dbus.WithMatchMember("PrepareForSleep")))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if w.Screen { // after the matches: what happens meanwhile is a signal
		if err := w.lockedHint(ctx, c); err != nil {
			w.Log.Warn().Err(err).Msg("logind does not say whether the session is locked")
		}
	}
	var delay delay
	defer delay.release()
	if w.Sleep {
		delay.take(ctx, w, c)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case s, ok := <-signals:
			if !ok {
				return fmt.Errorf("%s: the connection has ended", address)
			}
			if owns(ctx, c, s.Sender, logind) {
				w.heard(ctx, c, s, &delay)
			}
		}
	}
}

// heard does what a signal of logind says.
func (w *watch) heard(ctx context.Context, c *dbus.Conn, s *dbus.Signal, delay *delay) {
	switch s.Name {
	case managerIface + ".PrepareForSleep":
		var before bool
		if !w.Sleep || dbus.Store(s.Body, &before) != nil {
			return
		}
		if !before { // awake again: what was locked stays so
			if a, ok := w.lock.(Waker); ok {
				a.Awake()
			}
			delay.take(ctx, w, c)
			return
		}
		w.done(w.lock.LockSession(use.LockedBySleep))
		delay.release() // now it may sleep
	case sessionIface + ".Lock":
		w.screen(ctx, c, s.Path, true)
	case sessionIface + ".Unlock":
		w.screen(ctx, c, s.Path, false)
	case propertiesName + ".PropertiesChanged":
		var iface string
		var changed map[string]dbus.Variant
		var invalid []string
		if dbus.Store(s.Body, &iface, &changed, &invalid) != nil || iface != sessionIface {
			return
		}
		if locked, ok := changed["LockedHint"].Value().(bool); ok {
			w.screen(ctx, c, s.Path, locked)
		} else if slices.Contains(invalid, "LockedHint") {
			if locked, err := property[bool](ctx, c, s.Path, sessionIface, "LockedHint"); err == nil {
				w.screen(ctx, c, s.Path, locked)
			}
		}
	}
}

// screen locks or opens with a session, if it is this user's.
func (w *watch) screen(ctx context.Context, c *dbus.Conn, session dbus.ObjectPath, locked bool) {
	owner, err := property[[]any](ctx, c, session, sessionIface, "User")
	if err == nil && (len(owner) == 0 || owner[0] != w.uid) {
		return // another user's
	}
	if err != nil && !locked {
		w.Log.Warn().Err(err).Msg("a session was unlocked that may be another user's")
		return
	}
	w.turn(locked)
}

// turn follows logind's lock. Its end opens all that is not a person's: the person is back.
func (w *watch) turn(locked bool) {
	if locked {
		w.done(w.lock.LockSession(use.LockedByScreen))
	} else {
		w.done(w.lock.UnlockSession(use.LockedByScreen, use.LockedBySaver, use.LockedBySleep))
	}
}

// lockedHint finds out how the user's graphical session is now: its lock may have come or gone unseen.
func (w *watch) lockedHint(ctx context.Context, c *dbus.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var user dbus.ObjectPath
	err := c.Object(logind, logindPath).CallWithContext(ctx, managerIface+".GetUser", 0, w.uid).Store(&user)
	if err != nil {
		return err
	}
	display, err := property[[]any](ctx, c, user, userIface, "Display")
	if err != nil {
		return err
	}
	if len(display) < 2 || display[0] == "" {
		return nil // no graphical session
	}
	path, ok := display[1].(dbus.ObjectPath)
	if !ok {
		return errors.New("logind names no object for the session")
	}
	locked, err := property[bool](ctx, c, path, sessionIface, "LockedHint")
	if err != nil {
		return err
	}
	if locked {
		w.turn(true)
	} else { // not more than what it is about: the machine may have slept since
		w.done(w.lock.UnlockSession(use.LockedByScreen))
	}
	return nil
}

// sessionBus follows screen savers.
func (w *watch) sessionBus(ctx context.Context) error {
	address := w.Getenv("DBUS_SESSION_BUS_ADDRESS")
	if address == "" {
		address = "unix:path=/run/user/" + strconv.FormatUint(uint64(w.uid), 10) + "/bus"
	}
	c, err := connect(ctx, address)
	if err != nil {
		return err
	}
	defer c.Close()
	signals := make(chan *dbus.Signal, 64)
	c.Signal(signals)
	var errs []error
	for _, name := range savers {
		errs = append(errs, c.AddMatchSignal(dbus.WithMatchInterface(name), dbus.WithMatchMember("ActiveChanged")))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	active := map[string]bool{} // by their names on the bus
	for {
		select {
		case <-ctx.Done():
			return nil
		case s, ok := <-signals:
			if !ok {
				return fmt.Errorf("%s: the connection has ended", address)
			}
			var on bool
			i := slices.IndexFunc(savers, func(name string) bool { return s.Name == name+".ActiveChanged" })
			if i < 0 || dbus.Store(s.Body, &on) != nil || !owns(ctx, c, s.Sender, savers[i]) {
				continue
			}
			// One program can have several of the names, and sends a signal for each.
			if on {
				active[s.Sender] = true
				w.done(w.lock.LockSession(use.LockedBySaver))
				continue
			}
			delete(active, s.Sender)
			for name := range active {
				if !owned(ctx, c, name) { // it has ended
					delete(active, name)
				}
			}
			if len(active) == 0 {
				w.done(w.lock.UnlockSession(use.LockedBySaver))
			}
		}
	}
}

// connect speaks with a bus; the caller closes the connection.
func connect(ctx context.Context, address string) (*dbus.Conn, error) {
	// Lock and unlock have to come in their order: the default handler loses it when its channel is full, and any program may
	// send signals that fill it.
	c, err := dbus.Connect(address, dbus.WithContext(ctx), dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	return c, nil
}

// owns reports whether the sender of a signal has a name now. The bus lets every program send every signal.
func owns(ctx context.Context, c *dbus.Conn, sender, name string) bool {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var owner string
	err := c.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetNameOwner", 0, name).Store(&owner)
	return err == nil && owner == sender
}

// owned reports whether somebody has a name.
func owned(ctx context.Context, c *dbus.Conn, name string) bool {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var has bool
	err := c.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.NameHasOwner", 0, name).Store(&has)
	return err != nil || has
}

// property reads one of an object of logind's.
func property[T any](ctx context.Context, c *dbus.Conn, path dbus.ObjectPath, iface, name string) (value T, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var v dbus.Variant
	if err := c.Object(logind, path).CallWithContext(ctx, propertiesName+".Get", 0, iface, name).Store(&v); err != nil {
		return value, fmt.Errorf("%s of %s: %w", name, path, err)
	}
	value, ok := v.Value().(T)
	if !ok {
		return value, fmt.Errorf("%s of %s is of type %s", name, path, v.Signature())
	}
	return value, nil
}

// delay keeps the machine from sleeping before the lock is on (systemd-inhibit(1), mode delay). The zero value holds
// nothing.
type delay struct{ file *os.File }

func (d *delay) take(ctx context.Context, w *watch, c *dbus.Conn) {
	if d.file != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var fd dbus.UnixFD
	err := c.Object(logind, logindPath).CallWithContext(ctx, managerIface+".Inhibit", 0,
		"sleep", "muxproxy", "lock before sleep", "delay").Store(&fd)
	if err != nil {
		w.Log.Info().Err(err).Msg("logind does not wait for the lock before it sleeps")
		return
	}
	d.file = os.NewFile(uintptr(fd), "inhibit")
}

func (d *delay) release() {
	if d.file != nil {
		d.file.Close()
		d.file = nil
	}
}
