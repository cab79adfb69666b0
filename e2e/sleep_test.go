//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/godbus/dbus/v5"
)

// logind is a system bus with one service on it, which says when the machine sleeps.
type logind struct {
	address string
	conn    *dbus.Conn
	null    *os.File
}

const logindName, logindPath = "org.freedesktop.login1", dbus.ObjectPath("/org/freedesktop/login1")

func (w *world) newLogind() *logind {
	t := w.t
	t.Helper()
	socket := w.path("bus")
	conf := w.write("bus.conf", fmt.Sprintf(`<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path=%s</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="false"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
</busconfig>
`, socket))
	w.start(spec{args: []string{"dbus-daemon", "--config-file=" + conf, "--nofork"}, null: true})
	l := &logind{address: "unix:path=" + socket}
	var err error
	eventually(t, "dbus-daemon answers (package dbus-daemon)", func() bool { // its socket is there before it listens
		l.conn, err = dbus.Connect(l.address)
		return err == nil
	})
	if l.null, err = os.Open(os.DevNull); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.conn.Close()
		l.null.Close()
	})
	if err := l.conn.Export(l, logindPath, logindName+".Manager"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.conn.RequestName(logindName, 0); err != nil {
		t.Fatal(err)
	}
	return l
}

// Inhibit hands out what would keep the machine awake.
func (l *logind) Inhibit(string, string, string, string) (dbus.UnixFD, *dbus.Error) {
	return dbus.UnixFD(l.null.Fd()), nil
}

func (l *logind) sleep(w *world, begins bool) {
	w.t.Helper()
	if err := l.conn.Emit(logindPath, logindName+".Manager.PrepareForSleep", begins); err != nil {
		w.t.Fatal(err)
	}
}

// A suspend ends the connections that shall not outlive it, and those that are wanted in advance come back.
func TestASuspendClosesKeptConnections(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	forPipes(t, func(t *testing.T, w *world) {
		l := w.newLogind()
		w.policy(w.persists("    idle = \"forever\"\n    on_suspend = \"close\""))
		p := w.start(spec{args: []string{filepath.Join(binDir, "muxproxyd"), "master"}, null: true,
			env: append(w.env, "DBUS_SYSTEM_BUS_ADDRESS="+l.address)})
		p.expectErr("master is ready")
		want(t, w.ssh("box", "true"), 0, "")
		w.kept()
		eventually(t, "the connection is closed", func() bool {
			l.sleep(w, true) // again: the master may not listen yet
			return len(w.mustStatus().Upstreams) == 0
		})
		w.recorded("close", ": the machine went to sleep")
		w.reload(w.persists("    idle = \"forever\"\n    on_suspend = \"close\"\n    prewarm = true"))
		if n := len(w.mustStatus().Upstreams); n != 0 {
			t.Errorf("%d connections while it sleeps", n)
		}
		l.sleep(w, false)
		w.recorded("connect", ", made in advance after ")
		w.connections(2)
	})
}
