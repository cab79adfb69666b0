package confirm

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// bus starts a D-Bus daemon of its own, which ends with the test, and returns its address.
func bus(t *testing.T) string {
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
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatalf("%v (package dbus-daemon)", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// peer is a connection to a bus that has a name there.
func peer(t *testing.T, address, name string) *dbus.Conn {
	t.Helper()
	c, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := c.RequestName(name, 0); err != nil {
		t.Fatal(err)
	}
	return c
}

// oneSession is one of logind's, with its properties.
type oneSession map[string]any

func (s oneSession) GetAll(string) (map[string]dbus.Variant, *dbus.Error) {
	out := map[string]dbus.Variant{}
	for name, value := range s {
		out[name] = dbus.MakeVariant(value)
	}
	return out, nil
}

// desk plays logind and the service manager.
type desk struct {
	mu       sync.Mutex // guards what follows
	sessions []listed
	env      any
}

type listed struct {
	ID   string
	UID  uint32
	User string
	Seat string
	Path dbus.ObjectPath
}

func (d *desk) ListSessions() ([]listed, *dbus.Error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sessions, nil
}

func (d *desk) Get(iface, name string) (dbus.Variant, *dbus.Error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if iface != systemd+".Manager" || name != "Environment" || d.env == nil {
		return dbus.Variant{}, dbus.MakeFailedError(fmt.Errorf("no %s.%s", iface, name))
	}
	return dbus.MakeVariant(d.env), nil
}

// The environment of a dialog is that of the graphical session in which the user sits, and of no other.
func TestSession(t *testing.T) {
	system, user := bus(t), bus(t)
	login, manager := peer(t, system, logind), peer(t, user, systemd)
	d := &desk{}
	if err := login.Export(d, logindPath, logind+".Manager"); err != nil {
		t.Fatal(err)
	}
	if err := manager.Export(d, systemdPath, "org.freedesktop.DBus.Properties"); err != nil {
		t.Fatal(err)
	}
	uid := os.Geteuid()
	s := sessions{system, user, uid}
	for i, c := range []struct {
		name     string
		sessions []oneSession // with "uid"
		env      any
		want     []string // among the result; "!NAME": not there
		err      string
	}{
		{"none", nil, []string{"DISPLAY=:0"}, nil, "no graphical session of yours is active"},
		{"another user's", []oneSession{{"uid": uid + 1, "Active": true, "Type": "x11", "Class": "user", "Display": ":0"}}, nil, nil,
			"no graphical session of yours is active"},
		{"not active", []oneSession{{"uid": uid, "Active": false, "Type": "x11", "Class": "user", "Display": ":0"}}, nil, nil,
			"no graphical session of yours is active"},
		{"not graphical", []oneSession{{"uid": uid, "Active": true, "Type": "tty", "Class": "user", "Display": ""}}, []string{"DISPLAY=:0"}, nil,
			"no graphical session of yours is active"},
		{"a login screen", []oneSession{{"uid": uid, "Active": true, "Type": "x11", "Class": "greeter", "Display": ":0"}}, nil, nil,
			"no graphical session of yours is active"},
		{"X11, no service manager", []oneSession{
			{"uid": uid, "Active": true, "Type": "tty", "Class": "user"},
			{"uid": uid, "Active": true, "Type": "x11", "Class": "user", "Display": ":1"},
		}, nil, []string{"DISPLAY=:1", "PATH=" + safePath, "XDG_RUNTIME_DIR=/run/user/" + fmt.Sprint(uid), "!WAYLAND_DISPLAY"}, ""},
		{"Wayland", []oneSession{{"uid": uid, "Active": true, "Type": "wayland", "Class": "user", "Display": ""}},
			[]string{"DISPLAY=:0", "WAYLAND_DISPLAY=wayland-1", "XAUTHORITY=/run/x", "PATH=/opt/bin", "HOME=/home/me", "LANG=de_DE.UTF-8",
				"LC_TIME=C", "LD_PRELOAD=/tmp/evil.so", "GTK_MODULES=evil", "SSH_ASKPASS=/bin/true", "XDG_RUNTIME_DIR=/run/user/7", "broken"},
			[]string{"DISPLAY=:0", "WAYLAND_DISPLAY=wayland-1", "XAUTHORITY=/run/x", "PATH=/opt/bin", "HOME=/home/me", "LANG=de_DE.UTF-8",
				"LC_TIME=C", "XDG_RUNTIME_DIR=/run/user/7", "!LD_PRELOAD", "!GTK_MODULES", "!SSH_ASKPASS"}, ""},
		{"the manager knows an earlier session", []oneSession{{"uid": uid, "Active": true, "Type": "x11", "Class": "user", "Display": ":2"}},
			[]string{"DISPLAY=:0", "WAYLAND_DISPLAY=wayland-0", "XAUTHORITY=/run/x", "HOME=/home/me"},
			[]string{"DISPLAY=:2", "XAUTHORITY=/home/me/.Xauthority", "!WAYLAND_DISPLAY"}, ""},
		{"nobody says what the display is", []oneSession{{"uid": uid, "Active": true, "Type": "wayland", "Class": "user", "Display": ""}},
			[]string{"HOME=/home/me"}, nil, "import-environment"},
		{"nonsense of the manager's", []oneSession{{"uid": uid, "Active": true, "Type": "x11", "Class": "user", "Display": ":1"}}, "text",
			[]string{"DISPLAY=:1"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var list []listed
			for j, one := range c.sessions {
				path := dbus.ObjectPath(fmt.Sprintf("%s/session/c%d_%d", logindPath, i, j))
				list = append(list, listed{fmt.Sprint(j), uint32(one["uid"].(int)), "u", "seat0", path})
				properties := oneSession{}
				for name, value := range one {
					if name != "uid" {
						properties[name] = value
					}
				}
				if err := login.Export(properties, path, "org.freedesktop.DBus.Properties"); err != nil {
					t.Fatal(err)
				}
			}
			d.mu.Lock()
			d.sessions, d.env = list, c.env
			d.mu.Unlock()
			env, err := s.display(t.Context(), &block{Display: session}, plugin.Use{})
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Fatalf("%v, want %q", err, c.err)
			}
			for _, v := range c.want {
				name, not := strings.CutPrefix(v, "!")
				has := slices.ContainsFunc(env, func(have string) bool { return have == v || not && strings.HasPrefix(have, name+"=") })
				if has == not {
					t.Errorf("%s in %q", v, env)
				}
			}
		})
	}
	if _, err := (sessions{"unix:path=/nonexistent", user, uid}).environment(t.Context()); err == nil || !strings.Contains(err.Error(), "logind") {
		t.Errorf("without a bus: %v", err)
	}
	// The buses are not those that the environment names: whoever has started the master chose it.
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", system)
	t.Setenv("DBUS_SESSION_BUS_ADDRESS", user)
	if got := newSessions(); got.system != "unix:path=/run/dbus/system_bus_socket" || got.user != fmt.Sprintf("unix:path=/run/user/%d/bus", uid) {
		t.Errorf("%+v", got)
	}
}

// Where policy says so, a dialog appears where whoever asks has its display; what else it gets is not theirs.
func TestCallersDisplay(t *testing.T) {
	start := func(env ...string) plugin.Process {
		t.Helper()
		cmd := exec.Command("sleep", "1000")
		cmd.Env = env
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		// The environment is there once exec(2) is through: Start has waited for that.
		_, begun, err := stat(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		return plugin.Process{PID: cmd.Process.Pid, Start: begun}
	}
	t.Setenv("DISPLAY", ":1")
	t.Setenv("LD_PRELOAD", "")
	t.Setenv("LANG", "C")
	both := start("DISPLAY=:9", "XAUTHORITY=/a b", "LANG=xx", "LD_PRELOAD=/tmp/evil.so", "WAYLAND_DISPLAY=")
	none := start("LANG=xx")
	other := both
	other.Start++ // has ended, and its pid is another's
	gone := plugin.Process{PID: 1 << 30, Start: 1}
	show := func(chain ...plugin.Process) ([]string, error) {
		return newSessions().display(t.Context(), &block{Display: caller}, plugin.Use{Processes: chain})
	}
	env, err := show(gone, other, both, none)
	if err != nil || !slices.Contains(env, "DISPLAY=:9") || !slices.Contains(env, "XAUTHORITY=/a b") || !slices.Contains(env, "LANG=C") ||
		slices.ContainsFunc(env, func(v string) bool {
			return v == "DISPLAY=:1" || v == "LANG=xx" || strings.HasPrefix(v, "LD_PRELOAD") || strings.HasPrefix(v, "WAYLAND")
		}) {
		t.Errorf("%q, %v", env, err)
	}
	for want, chain := range map[string][]plugin.Process{
		"has no display": {none, both}, "has gone": {gone, other},
	} {
		if _, err := show(chain...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
