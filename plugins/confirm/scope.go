package confirm

import (
	"slices"
	"strings"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// scope is a process that answers are bound to, as long as it lives. The zero scope is nobody's: what has none is asked
// about each time.
type scope struct {
	pid   int
	start uint64
}

// servers live on when those who started something in them have gone, and start things for others: an answer that is bound
// to one would be good for whoever comes next.
var servers = []string{
	// terminal multiplexers
	"tmux", "tmux: server", "screen", "zellij", "dtach", "abduco", "dvtm", "tmate", "shpool", "byobu", "mtm", "wezterm-mux-server",
	// logins
	"sshd", "sshd-session", "sshd-auth", "dropbear", "mosh-server", "etserver", "etterminal", "tinysshd", "login", "agetty",
	// what starts everything else
	"init", "systemd", "launchd", "openrc", "runit", "runsvdir", "runsv", "s6-svscan", "s6-supervise", "dinit", "tini", "dumb-init",
	"docker-init", "containerd-shim-runc-v2", "conmon", "supervisord", "dbus-daemon", "dbus-broker-launch", "dbus-broker",
	"cron", "crond", "fcron", "anacron", "atd",
}

// bindable reports whether answers may be bound to a process.
func bindable(p plugin.Process) bool {
	name := strings.ToLower(strings.Trim(base(p), "[]"))
	return p.PID > 1 && p.Start != 0 && name != "?" && !slices.Contains(servers, name)
}

// scopeOf returns the process that answers about a use are bound to: the leader of the caller's session, if that has a
// terminal; else what started ssh. ok is false if there is none, or it is a server.
func scopeOf(chain []plugin.Process) (p plugin.Process, ok bool) {
	if len(chain) == 0 {
		return plugin.Process{}, false
	}
	if last := chain[len(chain)-1]; last.TTY != "" && bindable(last) && leads(last) {
		return last, true
	}
	if i := sshOf(chain); i >= 0 && i+1 < len(chain) && bindable(chain[i+1]) {
		return chain[i+1], true
	}
	return plugin.Process{}, false
}
