package doctor

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"slices"
	"time"

	"github.com/godbus/dbus/v5"
)

// login is what logind says of this user (org.freedesktop.login1(5)).
type login struct {
	kills   bool // processes end with the last session
	lingers bool
}

const (
	logind     = "org.freedesktop.login1"
	logindPath = "/org/freedesktop/login1"
	logindTime = 3 * time.Second
)

// askLogind asks. The error means that nobody answers.
func askLogind(ctx context.Context, getenv func(string) string) (login, error) {
	ctx, cancel := context.WithTimeout(ctx, logindTime)
	defer cancel()
	address := getenv("DBUS_SYSTEM_BUS_ADDRESS")
	if address == "" {
		address = "unix:path=/run/dbus/system_bus_socket"
	}
	c, err := dbus.Connect(address, dbus.WithContext(ctx))
	if err != nil {
		return login{}, fmt.Errorf("%s: %w", address, err)
	}
	defer c.Close()
	get := func(path dbus.ObjectPath, iface, name string, to any) error {
		var v dbus.Variant
		err := c.Object(logind, path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, logind+"."+iface, name).Store(&v)
		if err != nil {
			return fmt.Errorf("logind's %s: %w", name, err)
		}
		return dbus.Store([]any{v.Value()}, to)
	}
	var l login
	if err := get(logindPath, "Manager", "KillUserProcesses", &l.kills); err != nil {
		return l, err
	}
	var spared []string
	if err := get(logindPath, "Manager", "KillExcludeUsers", &spared); err == nil && l.kills {
		if u, err := user.Current(); err == nil && slices.Contains(spared, u.Username) {
			l.kills = false
		}
	}
	var self dbus.ObjectPath
	call := c.Object(logind, logindPath).CallWithContext(ctx, logind+".Manager.GetUser", 0, uint32(os.Geteuid()))
	if err := call.Store(&self); err != nil {
		return l, nil // no session of this user, so nothing of it ends one
	}
	return l, get(self, "User", "Linger", &l.lingers)
}
