package doctor

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/sshconfig"
)

// programs looks at what ssh starts, and whether it is of one build with this.
func (d *doctor) programs(context.Context) {
	program, ok := sshconfig.Leads(d.get("proxycommand"))
	switch {
	case !ok:
		program = filepath.Join(filepath.Dir(d.Self), "muxproxy")
	case program == "":
		d.ok("only a shell knows which muxproxy %q starts", d.get("proxycommand"))
		return
	}
	path, err := exec.LookPath(program)
	if err != nil {
		d.fail(d.setup(), "ssh can't start %s: %v", program, cause(err))
		return
	}
	if !filepath.IsAbs(path) {
		d.fail(d.setup(), "ssh starts %s, which depends on the working directory", path)
		return
	}
	if !filepath.IsAbs(program) {
		d.warn(d.setup(), "ssh starts the %s that is first on PATH, here %s; cron has another PATH", program, path)
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	// As muxproxy finds it.
	beside, err := exec.LookPath(filepath.Join(filepath.Dir(path), "muxproxyd"))
	if err != nil {
		if beside, err = exec.LookPath("muxproxyd"); err != nil {
			d.fail("install muxproxyd beside "+path, "muxproxyd is neither beside %s nor on PATH", path)
			return
		}
	}
	for _, p := range []string{filepath.Dir(path), path, beside} {
		switch info, err := os.Stat(p); {
		case err != nil:
			d.fail("", "%v", err)
		case others(info):
			d.fail("chmod o-w "+shellQuote(p), "%s is writable by everybody (mode %04o), who could replace what ssh starts", p, info.Mode().Perm())
		case foreign(info):
			d.fail("", "%s belongs to another user, who could replace what ssh starts", p)
		}
	}
	mine, err := build(d.Self)
	for _, p := range []string{path, beside} {
		if err != nil {
			break
		}
		var its string
		if its, err = build(p); err == nil && its != mine {
			d.warn("install muxproxy and muxproxyd of one version, side by side", "%s is of another build (%s) than %s (%s)", p, its, d.Self, mine)
		}
	}
	if err != nil {
		d.warn("", "no telling of which version they are: %v", err)
	}
	if !d.found {
		d.ok("%s, %s", path, d.Version)
	}
}

// build says of what an executable was built.
func build(path string) (string, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return "", err
	}
	text := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" || s.Key == "vcs.modified" && s.Value == "true" || s.Key == "-ldflags" {
			text += " " + s.Key + "=" + s.Value
		}
	}
	return text + " " + info.GoVersion, nil
}

// cause takes off what package exec repeats.
func cause(err error) error {
	var e *exec.Error
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

// directories looks at who may use the places of sockets and state.
func (d *doctor) directories(context.Context) {
	dirs := []string{d.Dirs.State, d.Dirs.Run}
	if !slices.Contains(dirs, d.Dirs.Runtime) {
		dirs = append(dirs, d.Dirs.Runtime)
	}
	reported := map[string]bool{} // a parent of several
	for _, dir := range dirs {
		err := paths.CheckDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			above := existing(dir)
			if info, err := os.Stat(above); err != nil || !info.IsDir() || info.Mode().Perm()&0o300 != 0o300 || foreign(info) {
				d.fail("", "%s is not there, and can't be made in %s", dir, above)
				continue
			}
			err = paths.CheckParents(above)
		}
		if err == nil || reported[err.Error()] {
			continue
		}
		reported[err.Error()] = true
		text, mend := err.Error(), ""
		if pe := (*fs.PathError)(nil); !errors.As(err, &pe) { // else it ends with what to do
			text, mend, _ = strings.Cut(text, ": ")
		}
		d.fail(mend, "%s", text)
	}
	for _, name := range []string{paths.KnownHosts, paths.MasterLog, paths.AuditLog} {
		path := filepath.Join(d.Dirs.State, name)
		if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o077 != 0 {
			d.warn("chmod 600 "+shellQuote(path), "%s is open to others (mode %04o)", path, info.Mode().Perm())
		}
	}
	if !d.found {
		d.ok("%s and %s are for their owner alone", d.Dirs.State, d.Dirs.Runtime)
	}
}

func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// knownHosts looks for the living master's CAs in the file that ssh reads.
func (d *doctor) knownHosts(ctx context.Context) {
	const restart = "muxproxy master restart"
	path := filepath.Join(d.Dirs.State, paths.KnownHosts)
	if d.masterErr != nil {
		d.ok("the next master writes its CA into %s", path)
		return
	}
	_, cas, err := d.master.HostKeys(ctx, true) // before the file is read: a CA is written there before it is used
	if err != nil {
		d.fail("muxproxy log", "the master does not tell its CA: %v", err)
		return
	}
	text, err := os.ReadFile(path)
	if err != nil {
		d.fail(restart, "the CA of the master is not in known_hosts, so ssh turns its host key down: %v", err)
		return
	}
	trusted := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		marker, hosts, key, _, _, err := ssh.ParseKnownHosts([]byte(line))
		if err == nil && marker == "cert-authority" && slices.Equal(hosts, []string{"*"}) {
			trusted[strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))] = true
		}
	}
	for _, ca := range cas {
		if !trusted[ca] {
			d.fail(restart, "%s lacks the line of the master that runs, so ssh turns its host key down: @cert-authority * %s", path, ca)
		}
	}
	if !d.found {
		d.ok("%s has the CA of the master that runs", path)
	}
}

// leftovers looks for files of masters and bridges that were killed. Nobody can do harm with them.
func (d *doctor) leftovers(context.Context) {
	var list []string
	swept := true // a master that starts takes them away
	add := func(path string, bySweep bool) {
		list = append(list, path)
		swept = swept && bySweep
	}
	host, _ := os.Hostname() // without one there is no mark to look for
	known := filepath.Join(d.Dirs.State, paths.KnownHosts)
	text, _ := os.ReadFile(known) // what can't be read is told of elsewhere
	dead := 0
	for line := range strings.Lines(string(text)) {
		mark := line[strings.LastIndexByte(strings.TrimSpace(line), ' ')+1:]
		name, number, ok := strings.Cut(strings.TrimSpace(mark), "+")
		if pid, err := strconv.Atoi(number); ok && err == nil && name == host && !paths.Alive(pid) {
			dead++
		}
	}
	if dead > 0 {
		add(fmt.Sprintf("%s in %s", number(dead, "line"), known), true)
	}
	if d.noMaster() {
		sockets := []string{d.Dirs.Runtime, d.Dirs.Run}
		if dir, err := d.Dirs.Published(); err == nil {
			add(filepath.Join(d.Dirs.Run, "sockets"), true)
			sockets = append(sockets, dir)
		}
		slices.Sort(sockets)
		for _, dir := range slices.Compact(sockets) {
			for _, name := range []string{paths.MuxSocket, paths.ControlSocket, paths.StreamSocket} {
				if path := filepath.Join(dir, name); isSocket(path) && !listening(path) {
					add(path, dir == d.Dirs.Runtime)
				}
			}
		}
	}
	notify, _ := filepath.Glob(filepath.Join(d.Dirs.Run, "notify.*")) // the pattern is well formed but for odd folders
	for _, path := range notify {
		if pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(path), "notify.")); err == nil && !paths.Alive(pid) {
			add(path, true)
		}
	}
	for _, dir := range []string{d.Getenv("XDG_RUNTIME_DIR"), os.TempDir()} {
		copies, _ := filepath.Glob(filepath.Join(dir, "muxproxy-config-*"))
		for _, path := range copies {
			if info, err := os.Lstat(path); err == nil && owned(info) && time.Since(info.ModTime()) > oldCopy {
				add(path, false)
			}
		}
	}
	switch {
	case len(list) == 0:
		d.ok("nothing is left of masters that were killed")
	case swept && d.noMaster():
		d.warn("muxproxy master start", "left by what was killed: %s; the next master takes them away", strings.Join(list, ", "))
	case swept:
		d.warn("muxproxy master restart", "left by what was killed: %s; the next master takes them away",
			strings.Join(list, ", "))
	default:
		var mend []string
		for _, path := range list {
			if filepath.IsAbs(path) {
				mend = append(mend, shellQuote(path))
			}
		}
		d.warn("rm -r "+strings.Join(mend, " "), "left by what was killed: %s", strings.Join(list, ", "))
	}
}

// oldCopy is the age from which a private copy of ssh_config is taken for left behind: nobody waits so long for ssh -G.
const oldCopy = 10 * time.Minute
