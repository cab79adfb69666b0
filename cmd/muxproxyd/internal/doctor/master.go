package doctor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/policy"
)

// policy looks at the file as a master that starts would.
func (d *doctor) policyFile(context.Context) {
	const mend = "muxproxy config check"
	switch errs, warnings := d.Diagnostics.Errors(), d.Diagnostics.Warnings(); {
	case len(errs) > 0:
		d.fail(mend, "%v", errs)
	case len(warnings) > 0:
		d.warn(mend, "%v", warnings)
	default:
		if _, err := os.Stat(d.PolicyFile); errors.Is(err, fs.ErrNotExist) {
			d.ok("there is no %s, so the defaults hold", d.PolicyFile)
			return
		}
		d.ok("%s has no problems", d.PolicyFile)
	}
}

// masterState looks whether the master lives and is of this version.
func (d *doctor) masterState(context.Context) {
	switch {
	case d.noMaster() && d.keptLock():
		d.warn("muxproxy unlock", "none runs, and the next one begins locked, as the one before has ended: nobody can use connections then")
	case d.noMaster():
		d.ok("none runs; the next ssh starts one")
	case d.masterErr != nil:
		d.fail("muxproxy log", "it can't be asked: %v", d.masterErr)
	case d.status.Version != d.Version:
		d.warn("muxproxy master restart", "pid %d is of version %s, and %s is installed", d.status.PID, d.status.Version, d.Version)
	case d.status.Lock.Locked:
		d.warn("muxproxy unlock", "pid %d is locked (%s): nobody can use connections", d.status.PID, strings.Join(d.status.Lock.By, ", "))
	default:
		d.ok("pid %d runs, of version %s", d.status.PID, d.status.Version)
	}
}

// keptLock reports whether a master that starts finds itself locked (use.OpenLock).
func (d *doctor) keptLock() bool {
	_, err := os.Lstat(filepath.Join(d.Dirs.Run, paths.LockState))
	return err == nil
}

// masterPolicy finds out whether the master goes by the file that this shell knows.
func (d *doctor) masterPolicy(context.Context) {
	mine := d.PolicyFile
	if _, err := os.Stat(mine); errors.Is(err, fs.ErrNotExist) {
		mine = ""
	}
	say := func(path string) string {
		if path == "" {
			return "the defaults"
		}
		return path
	}
	switch {
	case d.masterErr != nil:
		d.ok("no master to compare with")
	case d.status.Policy != mine && !sameFile(d.status.Policy, mine):
		d.warn("muxproxy master stop --drain", "the master goes by %s, this shell by %s ($MUXPROXY_CONFIG and $XDG_CONFIG_HOME count where "+
			"the master is started)", say(d.status.Policy), say(mine))
	default:
		d.ok("the master goes by %s, as this shell does", say(mine))
	}
}

// plugins looks at those that the policy mentions.
func (d *doctor) plugins(ctx context.Context) {
	var wanted []string
	if d.Policy != nil {
		for _, p := range d.Policy.Plugins() {
			wanted = append(wanted, p.Name)
		}
	}
	if d.masterErr != nil {
		if len(wanted) == 0 {
			d.ok("policy mentions none")
		} else {
			d.ok("policy mentions %s; a master starts them", strings.Join(wanted, ", "))
		}
		return
	}
	list, err := d.master.Plugins(ctx)
	if err != nil {
		d.fail("muxproxy log", "the master does not tell: %v", err)
		return
	}
	var up []string
	for _, p := range list {
		wanted = slices.DeleteFunc(wanted, func(name string) bool { return name == p.Name })
		check := "muxproxy plugin check " + shellQuote(p.Path)
		if p.Path == "" { // not found
			check = "install muxproxy-plugin-" + p.Name + " in " + shellQuote(filepath.Join(d.Dirs.Data, "plugins"))
		}
		switch p.State {
		case "up":
			up = append(up, p.Name)
		case "restarting":
			d.warn(check, "%s is being restarted: %s", p.Name, p.Error)
		default:
			d.fail(check, "%s is %s: %s", p.Name, p.State, p.Error)
		}
	}
	if len(wanted) > 0 {
		d.warn("muxproxy master reload", "policy mentions %s, which the master has not started", strings.Join(wanted, ", "))
	}
	if !d.found && len(up) == 0 {
		d.ok("policy mentions none")
	} else if !d.found {
		d.ok("%s: up", strings.Join(up, ", "))
	}
}

// askpass looks whether there is a way to ask a person who has no terminal: ssh's own, and that of policy.
func (d *doctor) askpass(ctx context.Context) {
	if path := d.Getenv("SSH_ASKPASS"); path != "" {
		if _, err := exec.LookPath(path); err != nil {
			d.fail("unset SSH_ASKPASS", "SSH_ASKPASS is %s, which can't be run: %v", path, cause(err))
		}
	}
	program, asks := "", false
	if d.Policy != nil {
		program = d.Policy.Master().Askpass
		asks = program != "" || slices.ContainsFunc(d.Policy.Plugins(), func(p policy.Plugin) bool { return p.Name == "confirm" })
	}
	if asks {
		if err := d.CanAsk(ctx, program); err != nil {
			d.warn("", "policy may have to ask on the screen, and can't now (unless a confirm block says how): %v", err)
		}
	}
	switch {
	case d.found:
	case asks:
		d.ok("there is an askpass program, and a graphical session")
	default:
		d.ok("policy asks nobody on the screen")
	}
}

// linger finds out whether the master outlives the user's last session (logind.conf(5), KillUserProcesses).
func (d *doctor) linger(ctx context.Context) {
	switch l, err := askLogind(ctx, d.Getenv); {
	case err != nil:
		d.ok("no logind answers, so nothing ends the master when you log out")
	case !l.kills:
		d.ok("logind lets the master run when you log out")
	case l.lingers:
		d.ok("logind ends processes when you log out, but not yours: linger is on")
	default:
		d.warn("loginctl enable-linger", "logind ends the master, and all connections, when you log out (KillUserProcesses=yes)")
	}
}
