package session

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/muxproxy/muxproxy/core/use"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// bus starts a D-Bus daemon of its own and returns its address. It ends with the test, or by the returned function.
func bus(t *testing.T) (address string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "bus")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	conf := filepath.Join(dir, "bus.conf")
	text := fmt.Sprintf(`<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path=%s/socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="false"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
</busconfig>
`, dir)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--config-file="+conf, "--nofork", "--print-address")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	t.Cleanup(stop)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line), stop
}

// peer is a connection to a bus that plays somebody.
func peer(t *testing.T, address string) *dbus.Conn {
	t.Helper()
	c, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// mock is python-dbusmock's logind.
type mock struct {
	t    *testing.T
	conn *dbus.Conn
	stop func()
}

func newMock(t *testing.T, address string) *mock {
	t.Helper()
	cmd := exec.Command("/usr/bin/python3", "-m", "dbusmock", "--system", "--template", "logind")
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+address)
	var errs strings.Builder
	cmd.Stderr, cmd.Stdout = &errs, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m := &mock{t: t, conn: peer(t, address)}
	m.stop = sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	t.Cleanup(m.stop)
	eventually(t, "the mock is there (package python3-dbusmock)", func() bool {
		var has bool
		err := m.conn.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, logind).Store(&has)
		if err == nil && has {
			return m.conn.Object(logind, logindPath).Call("org.freedesktop.DBus.Peer.Ping", 0).Err == nil
		}
		if cmd.ProcessState != nil {
			t.Fatal(errs.String())
		}
		return false
	})
	// The template's own adds a number to a text.
	m.call(logindPath, "org.freedesktop.DBus.Mock.AddMethod", managerIface, "GetUser", "u", "o",
		`ret = "/org/freedesktop/login1/user/%d" % args[0]`)
	return m
}

func (m *mock) call(path dbus.ObjectPath, method string, args ...any) {
	m.t.Helper()
	if err := m.conn.Object(logind, path).Call(method, 0, args...).Err; err != nil {
		m.t.Fatalf("%s: %v", method, err)
	}
}

// session adds a session of a user, and makes it that user's graphical one.
func (m *mock) session(id string, uid int, locked bool) dbus.ObjectPath {
	m.t.Helper()
	m.call(logindPath, "org.freedesktop.DBus.Mock.AddSession", id, "seat0", uint32(uid), fmt.Sprint("user", uid), true)
	path := dbus.ObjectPath(sessionPath + "/" + id)
	m.hint(path, locked)
	user := dbus.ObjectPath(fmt.Sprintf("%s/user/%d", logindPath, uid))
	display := struct {
		ID   string
		Path dbus.ObjectPath
	}{id, path}
	m.call(user, propertiesName+".Set", userIface, "Display", dbus.MakeVariant(display))
	return path
}

// hint changes LockedHint as SetLockedHint does.
func (m *mock) hint(path dbus.ObjectPath, locked bool) {
	m.t.Helper()
	m.call(path, "org.freedesktop.DBus.Mock.UpdateProperties", sessionIface,
		map[string]dbus.Variant{"LockedHint": dbus.MakeVariant(locked)})
}

// signal sends one of logind's.
func (m *mock) signal(path dbus.ObjectPath, iface, name, signature string, args ...any) {
	m.t.Helper()
	list := make([]dbus.Variant, 0, len(args))
	for _, a := range args {
		list = append(list, dbus.MakeVariant(a))
	}
	m.call(path, "org.freedesktop.DBus.Mock.EmitSignal", iface, name, signature, list)
}

// wakeful is a lock that is told of the end of a sleep.
type wakeful struct {
	*use.Lock
	awake chan struct{}
}

func (w wakeful) Awake() { w.awake <- struct{}{} }

// watched is a lock that follows a session.
type watched struct {
	*use.Lock
	awake chan struct{}
	t     *testing.T
	stop  func()
}

func follow(t *testing.T, o Options, system, session string) *watched {
	t.Helper()
	l, err := use.OpenLock(filepath.Join(t.TempDir(), "lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	return followWith(t, l, o, system, session)
}

func followWith(t *testing.T, l *use.Lock, o Options, system, session string) *watched {
	t.Helper()
	o.Log = zerolog.New(zerolog.NewTestWriter(t))
	o.Getenv = func(name string) string {
		return map[string]string{"DBUS_SYSTEM_BUS_ADDRESS": system, "DBUS_SESSION_BUS_ADDRESS": session}[name]
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	awake := make(chan struct{}, 16)
	go func() {
		defer close(done)
		Watch(ctx, o, wakeful{l, awake})
	}()
	w := &watched{Lock: l, awake: awake, t: t}
	w.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	t.Cleanup(w.stop)
	return w
}

func (w *watched) by(want ...string) {
	w.t.Helper()
	eventually(w.t, fmt.Sprintf("locked by %q", want), func() bool { return slices.Equal(w.State().By, want) })
}

// until repeats a signal that may come before the watch listens.
func (w *watched) until(send func(), want ...string) {
	w.t.Helper()
	eventually(w.t, fmt.Sprintf("locked by %q", want), func() bool {
		send()
		return slices.Equal(w.State().By, want)
	})
}

func TestLogindLocksAndOpens(t *testing.T) {
	address, _ := bus(t)
	m := newMock(t, address)
	mine := m.session("c1", os.Geteuid(), false)
	w := follow(t, Options{Screen: true, Sleep: true}, address, "")

	w.until(func() { m.signal(mine, sessionIface, "Lock", "") }, "screen")
	if err := w.Unlock(t.Context(), nil); err != nil { // nothing of a person's to open
		t.Fatal(err)
	}
	w.by("screen")
	m.signal(mine, sessionIface, "Unlock", "")
	w.by()

	m.hint(mine, true)
	w.by("screen")
	m.hint(mine, false)
	w.by()

	// What a person has locked logind does not open.
	if err := w.Lock.Lock(nil); err != nil {
		t.Fatal(err)
	}
	m.signal(mine, sessionIface, "Lock", "")
	w.by("person", "screen")
	m.signal(mine, sessionIface, "Unlock", "")
	w.by("person")
	if err := w.Unlock(t.Context(), nil); err != nil {
		t.Fatal(err)
	}

	// Sleep locks, waking up opens nothing, and the end of the session's lock does.
	m.signal(logindPath, managerIface, "PrepareForSleep", "b", true)
	w.by("sleep")
	m.signal(mine, sessionIface, "Lock", "")
	w.by("screen", "sleep")
	if len(w.awake) > 0 {
		t.Error("told to be awake before it was")
	}
	m.signal(logindPath, managerIface, "PrepareForSleep", "b", false)
	<-w.awake
	m.hint(mine, true) // behind it on the wire
	w.by("screen", "sleep")
	m.hint(mine, false)
	w.by()

	// Another user's session is none of ours.
	theirs := m.session("c2", os.Geteuid()+1, false)
	m.signal(theirs, sessionIface, "Lock", "")
	m.signal(logindPath, managerIface, "PrepareForSleep", "b", true)
	w.by("sleep")
	m.signal(theirs, sessionIface, "Unlock", "")
	m.signal(mine, sessionIface, "Lock", "")
	w.by("screen", "sleep")
}

// A session that is locked when the master starts, or that was opened while none ran.
func TestLockedHintAtTheStart(t *testing.T) {
	address, _ := bus(t)
	m := newMock(t, address)
	mine := m.session("c1", os.Geteuid(), true)
	w := follow(t, Options{Screen: true}, address, "")
	w.by("screen")
	w.stop()
	m.hint(mine, false)
	if by := w.State().By; !slices.Equal(by, []string{"screen"}) {
		t.Fatalf("opened by nobody: %q", by)
	}
	followWith(t, w.Lock, Options{Screen: true}, address, "").by()
}

// Only what was asked for is followed.
func TestWhatIsFollowed(t *testing.T) {
	address, _ := bus(t)
	m := newMock(t, address)
	mine := m.session("c1", os.Geteuid(), true)
	sleep := follow(t, Options{Sleep: true}, address, "")
	screen := follow(t, Options{Screen: true}, address, "")
	screen.by("screen")
	sleep.until(func() { m.signal(logindPath, managerIface, "PrepareForSleep", "b", true) }, "sleep")
	m.signal(mine, sessionIface, "Unlock", "")
	screen.by()
	m.signal(mine, sessionIface, "Lock", "")
	screen.by("screen")
	sleep.by("sleep")
}

// Every program may send what looks like logind's signals.
func TestAForgedSignalOpensNothing(t *testing.T) {
	address, _ := bus(t)
	m := newMock(t, address)
	mine := m.session("c1", os.Geteuid(), false)
	w := follow(t, Options{Screen: true, Sleep: true}, address, "")
	w.until(func() { m.signal(mine, sessionIface, "Lock", "") }, "screen")
	forger := peer(t, address)
	var names []string
	if err := forger.BusObject().Call("org.freedesktop.DBus.ListNames", 0).Store(&names); err != nil {
		t.Fatal(err)
	}
	for _, to := range append([]string{""}, names...) { // by the match rules, and straight to each
		if strings.HasPrefix(to, "org.") {
			continue
		}
		msg := &dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath: dbus.MakeVariant(mine), dbus.FieldInterface: dbus.MakeVariant(sessionIface), dbus.FieldMember: dbus.MakeVariant("Unlock"),
		}}
		if to != "" {
			msg.Headers[dbus.FieldDestination] = dbus.MakeVariant(to)
		}
		if call := forger.Send(msg, nil); call != nil && call.Err != nil {
			t.Fatal(call.Err)
		}
	}
	// The bus keeps the order of what comes from one and goes to one; a call of the forger's has to be answered after it.
	if err := forger.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil {
		t.Fatal(err)
	}
	m.signal(logindPath, managerIface, "PrepareForSleep", "b", true)
	w.by("screen", "sleep")
}

// told is a Locker that only keeps what it is told: true is a lock.
type told chan bool

func (c told) LockSession(string) error      { c <- true; return nil }
func (c told) UnlockSession(...string) error { c <- false; return nil }

// However many signals wait to be looked at, they are in their order.
func TestSignalsKeepTheirOrder(t *testing.T) {
	session, _ := bus(t)
	saver := peer(t, session)
	const name, many = "org.gnome.ScreenSaver", 300
	if _, err := saver.RequestName(name, 0); err != nil {
		t.Fatal(err)
	}
	active := func(on bool) {
		t.Helper()
		if err := saver.Emit("/org/gnome/ScreenSaver", name+".ActiveChanged", on); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	calls := make(told, 8*many)
	w := &watch{lock: calls, Options: Options{Screen: true, Log: zerolog.Nop(), Getenv: func(string) string { return session }}}
	done := make(chan error)
	go func() { done <- w.sessionBus(ctx) }()
	defer func() {
		cancel()
		<-done
	}()
	eventually(t, "the watch listens", func() bool {
		active(false)
		return len(calls) > 0
	})
	for i := range 2 * many {
		active(i < many)
	}
	for !next(t, calls) { // what it took to begin with
	}
	for i := 1; i < 2*many; i++ {
		if on := next(t, calls); on != (i < many) {
			t.Fatalf("signal %d of %d has overtaken others", i, 2*many)
		}
	}
}

func next(t *testing.T, calls told) bool {
	t.Helper()
	select {
	case on := <-calls:
		return on
	case <-time.After(patience):
		t.Fatal("a signal was lost")
		return false
	}
}

// A screen saver opens what it has locked, and nothing of logind's.
func TestScreenSavers(t *testing.T) {
	system, _ := bus(t)
	m := newMock(t, system)
	mine := m.session("c1", os.Geteuid(), false)
	session, _ := bus(t)
	saver := peer(t, session)
	for _, name := range []string{"org.freedesktop.ScreenSaver", "org.gnome.ScreenSaver"} {
		if _, err := saver.RequestName(name, 0); err != nil {
			t.Fatal(err)
		}
	}
	active := func(from *dbus.Conn, name string, on bool) {
		t.Helper()
		if err := from.Emit("/org/freedesktop/ScreenSaver", name+".ActiveChanged", on); err != nil {
			t.Fatal(err)
		}
	}
	w := follow(t, Options{Screen: true}, system, session)
	w.until(func() { active(saver, "org.gnome.ScreenSaver", true) }, "saver")
	active(saver, "org.freedesktop.ScreenSaver", true) // the same one under its other name
	stranger := peer(t, session)
	active(stranger, "org.gnome.ScreenSaver", false)
	active(saver, "org.mate.ScreenSaver", false) // a name that nobody has
	w.until(func() { m.signal(mine, sessionIface, "Lock", "") }, "saver", "screen")
	active(saver, "org.gnome.ScreenSaver", false)
	w.by("screen")
	active(saver, "org.gnome.ScreenSaver", true)
	w.by("saver", "screen")
	m.signal(mine, sessionIface, "Unlock", "") // the person is back, whatever the saver does
	w.by()
}

// Before logind lets the machine sleep, it waits for those who asked for that.
func TestSleepWaitsForTheLock(t *testing.T) {
	address, _ := bus(t)
	m := newMock(t, address)
	inhibited := func() bool {
		var list [][]any
		if err := m.conn.Object(logind, logindPath).Call(managerIface+".ListInhibitors", 0).Store(&list); err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(list, func(i []any) bool { return i[0] == "sleep" && i[1] == "muxproxy" && i[3] == "delay" })
	}
	w := follow(t, Options{Sleep: true}, address, "")
	eventually(t, "it asks logind to wait", inhibited)
	m.signal(logindPath, managerIface, "PrepareForSleep", "b", true)
	w.by("sleep")
	eventually(t, "it lets it go", func() bool { return !inhibited() })
	m.signal(logindPath, managerIface, "PrepareForSleep", "b", false)
	eventually(t, "it asks again", inhibited)
}

// Without a bus, and after its end, the lock stays as it is, and Watch ends when it is told to.
func TestWithoutABus(t *testing.T) {
	address, stop := bus(t)
	m := newMock(t, address)
	m.session("c1", os.Geteuid(), true)
	w := follow(t, Options{Screen: true}, address, "unix:path=/nonexistent/bus")
	w.by("screen")
	stop()
	w.stop()
	w.by("screen")
	gone := follow(t, Options{Screen: true, Sleep: true}, "unix:path=/nonexistent/bus", "no address")
	gone.stop()
	gone.by()
}
