package confirm

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// safePath is PATH for askpass programs that are scripts, where the session says none.
const safePath = "/usr/local/bin:/usr/bin:/bin"

// displays are the variables that say where a dialog appears.
var displays = []string{"DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY"}

// wanted reports whether a dialog gets a variable of the session: where to appear, how to look, what to speak, and who the
// user is. Nothing that changes which code runs, such as LD_PRELOAD or GTK_MODULES.
func wanted(name string) bool {
	return strings.HasPrefix(name, "LC_") || strings.HasPrefix(name, "XCURSOR_") || slices.Contains([]string{
		"DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "XDG_RUNTIME_DIR", "XDG_SESSION_TYPE", "XDG_CURRENT_DESKTOP",
		"XDG_SESSION_DESKTOP", "DESKTOP_SESSION", "KDE_FULL_SESSION", "KDE_SESSION_VERSION", "DBUS_SESSION_BUS_ADDRESS", "HOME",
		"USER", "LOGNAME", "SHELL", "PATH", "LANG", "LANGUAGE", "TZ", "GTK_THEME", "GDK_SCALE", "GDK_DPI_SCALE", "QT_SCALE_FACTOR",
		"QT_FONT_DPI", "XDG_DATA_DIRS", "XDG_CONFIG_DIRS", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME",
	}, name)
}

// displayer returns the environment for a dialog. The error is one line for a person.
type displayer func(ctx context.Context, b *block, u plugin.Use) ([]string, error)

// shows reports whether an environment names a display.
func shows(env []string) bool {
	return slices.ContainsFunc(env, func(v string) bool {
		name, value, _ := strings.Cut(v, "=")
		return (name == "DISPLAY" || name == "WAYLAND_DISPLAY") && value != ""
	})
}

// display is a displayer: that of the user's graphical session, or, where policy says so, of whoever asks.
func (s sessions) display(ctx context.Context, b *block, u plugin.Use) ([]string, error) {
	if b.Display != caller {
		return s.environment(ctx)
	}
	theirs, err := environ(u.Processes, displays)
	if err != nil {
		return nil, err
	}
	if !shows(theirs) {
		return nil, errors.New("whoever asks has no display")
	}
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return !wanted(name) || slices.Contains(displays, name)
	})
	return append(env, theirs...), nil
}

// complete adds what an environment lacks, and sorts it.
func complete(vars map[string]string) []string {
	if vars["PATH"] == "" {
		vars["PATH"] = safePath
	}
	var env []string
	for name, value := range vars {
		if value != "" {
			env = append(env, name+"="+value)
		}
	}
	slices.Sort(env)
	return env
}
