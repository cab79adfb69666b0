package confirm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

// sessions finds the user's graphical session. The buses are where the system has them: an address in the environment
// would be that of whoever has started the master.
type sessions struct {
	system string // address of the bus with logind
	user   string // and of that with the user's service manager
	uid    int
}

func newSessions() sessions {
	uid := os.Geteuid()
	return sessions{
		system: "unix:path=/run/dbus/system_bus_socket", user: fmt.Sprintf("unix:path=/run/user/%d/bus", uid), uid: uid,
	}
}

// busTime bounds all that the buses are asked.
const busTime = 5 * time.Second

const (
	logind      = "org.freedesktop.login1"
	logindPath  = "/org/freedesktop/login1"
	systemd     = "org.freedesktop.systemd1"
	systemdPath = "/org/freedesktop/systemd1"
	importHint  = "run `systemctl --user import-environment DISPLAY WAYLAND_DISPLAY XAUTHORITY` in it"
)

// environment is what the service manager of the user knows (org.freedesktop.systemd1(5), Environment), where logind
// (org.freedesktop.login1(5)) knows of a graphical session in which the person sits now.
func (s sessions) environment(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, busTime)
	defer cancel()
	found, err := s.active(ctx)
	if err != nil {
		return nil, err
	}
	vars := map[string]string{}
	if list, err := s.manager(ctx); err == nil { // without it, what logind knows may be enough
		for _, v := range list {
			if name, value, ok := strings.Cut(v, "="); ok && wanted(name) {
				vars[name] = value
			}
		}
	}
	if found.display != "" && vars["DISPLAY"] != found.display { // that of an earlier session
		delete(vars, "XAUTHORITY")
		delete(vars, "WAYLAND_DISPLAY")
		vars["DISPLAY"] = found.display
	}
	if vars["DISPLAY"] == "" && vars["WAYLAND_DISPLAY"] == "" {
		return nil, errors.New("your graphical session does not say what its display is; " + importHint)
	}
	if vars["XDG_RUNTIME_DIR"] == "" {
		vars["XDG_RUNTIME_DIR"] = "/run/user/" + strconv.Itoa(s.uid)
	}
	if vars["HOME"] == "" {
		if u, err := user.LookupId(strconv.Itoa(s.uid)); err == nil {
			vars["HOME"], vars["USER"], vars["LOGNAME"] = u.HomeDir, u.Username, u.Username
		}
	}
	if vars["XAUTHORITY"] == "" && vars["DISPLAY"] != "" && vars["HOME"] != "" {
		vars["XAUTHORITY"] = filepath.Join(vars["HOME"], ".Xauthority") // where xauth(1) looks
	}
	return complete(vars), nil
}

// graphical is a session of logind's.
type graphical struct{ display string }

// active returns the user's session that is graphical and in which a person sits now.
func (s sessions) active(ctx context.Context) (graphical, error) {
	c, err := dbus.Connect(s.system, dbus.WithContext(ctx))
	if err != nil {
		return graphical{}, fmt.Errorf("logind, which knows the sessions, can't be reached: %w", err)
	}
	defer c.Close()
	var all []struct {
		ID   string
		UID  uint32
		User string
		Seat string
		Path dbus.ObjectPath
	}
	err = c.Object(logind, logindPath).CallWithContext(ctx, logind+".Manager.ListSessions", 0).Store(&all)
	if err != nil {
		return graphical{}, fmt.Errorf("logind does not list the sessions: %w", err)
	}
	for _, one := range all {
		if int(one.UID) != s.uid {
			continue
		}
		properties := map[string]dbus.Variant{}
		err := c.Object(logind, one.Path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.GetAll", 0, logind+".Session").
			Store(&properties)
		if err != nil {
			continue // it has ended
		}
		text := func(name string) string {
			v, _ := properties[name].Value().(string)
			return v
		}
		active, _ := properties["Active"].Value().(bool)
		class := text("Class")
		if kind := text("Type"); active && (class == "user" || class == "") && (kind == "x11" || kind == "wayland" || kind == "mir") {
			return graphical{text("Display")}, nil
		}
	}
	return graphical{}, errors.New("no graphical session of yours is active")
}

// manager is the environment that the user's service manager gives to what it starts.
func (s sessions) manager(ctx context.Context) ([]string, error) {
	c, err := dbus.Connect(s.user, dbus.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var v dbus.Variant
	err = c.Object(systemd, systemdPath).
		CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, systemd+".Manager", "Environment").Store(&v)
	if err != nil {
		return nil, err
	}
	list, ok := v.Value().([]string)
	if !ok {
		return nil, fmt.Errorf("its environment is of type %s", v.Signature())
	}
	return list, nil
}
