package doctor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/godbus/dbus/v5"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/cmd/muxproxyd/internal/setup"
	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/use"
)

// masterPID is of a process that lives.
var masterPID = os.Getpid()

const (
	deadPID = 1 << 30 // more than any kernel has
	someKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEzoMM91qLdYWlrRBSBA7BXSTxl3jvfgxshqce4FVH0K"
)

// world is a home directory in which all is well: muxproxy is set up for two names, and a master runs.
type world struct {
	t    *testing.T
	home string
	env  map[string]string
	o    Options
	m    *fakeMaster
}

// fakeMaster answers what a doctor asks.
type fakeMaster struct {
	control.Backend
	control.PluginBackend
	status  control.Status
	plugins []control.Plugin
}

func (f *fakeMaster) Status() control.Status    { return f.status }
func (f *fakeMaster) Plugins() []control.Plugin { return f.plugins }
func (f *fakeMaster) HostKeys(made bool) (plain, cas []string) {
	if !made {
		panic("a doctor has the master make keys")
	}
	return nil, []string{someKey}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "doctor")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, home: filepath.Join(dir, "home")}
	w.env = map[string]string{"HOME": w.home, "XDG_RUNTIME_DIR": filepath.Join(dir, "run"), "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere"}
	for _, d := range []string{w.home, filepath.Join(dir, "run"), filepath.Join(dir, "tmp")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("TMPDIR", filepath.Join(dir, "tmp"))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w.copy(self, "bin/muxproxy")
	w.copy(self, "bin/muxproxyd")
	dirs, err := paths.Find(w.getenv)
	if err != nil {
		t.Fatal(err)
	}
	if err := dirs.Make(); err != nil {
		t.Fatal(err)
	}
	real, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal(err)
	}
	w.m = &fakeMaster{status: control.Status{Version: "1.2.3", PID: masterPID}}
	w.o = Options{
		Dirs: dirs, Getenv: w.getenv, Home: w.home, Config: w.path("config"), SSH: real, Self: w.path("bin/muxproxyd"), Version: "1.2.3",
		CanAsk: func(_ context.Context, askpass string) error {
			if askpass == "/bin/true" {
				return nil
			}
			return errors.New("no " + askpass)
		},
		Connect: func(ctx context.Context) (*control.Master, error) {
			conn, err := bridge.ConnectTo(ctx, dirs, paths.ControlSocket)
			if err != nil {
				return nil, err
			}
			return control.New(conn)
		},
	}
	w.write("config", "Host box\n  HostName 192.0.2.1\n  Port 2200\n  User bob\n")
	w.setup("box", "*.corp")
	w.write(".local/state/muxproxy/known_hosts", "@cert-authority * "+someKey+" "+w.mark(masterPID)+"\n")
	w.policy("")
	return w
}

func (w *world) getenv(name string) string { return w.env[name] }
func (w *world) path(name string) string   { return filepath.Join(w.home, name) }

func (w *world) mark(pid int) string {
	w.t.Helper()
	host, err := os.Hostname()
	if err != nil {
		w.t.Fatal(err)
	}
	return fmt.Sprintf("%s+%d", host, pid)
}

func (w *world) write(name, text string) string {
	w.t.Helper()
	path := w.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// prepend puts text before what a file holds.
func (w *world) prepend(name, text string) {
	w.t.Helper()
	old, err := os.ReadFile(w.path(name))
	if err != nil {
		w.t.Fatal(err)
	}
	w.write(name, text+string(old))
}

// replace changes a file's text.
func (w *world) replace(name, old, now string) {
	w.t.Helper()
	text, err := os.ReadFile(w.path(name))
	if err != nil || !strings.Contains(string(text), old) {
		w.t.Fatalf("%s, %v", text, err)
	}
	w.write(name, strings.ReplaceAll(string(text), old, now))
}

// copy makes a file that is another one, as far as anybody can see.
func (w *world) copy(from, name string) {
	w.t.Helper()
	to := w.path(name)
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		w.t.Fatal(err)
	}
	if err := os.RemoveAll(to); err != nil {
		w.t.Fatal(err)
	}
	if os.Link(from, to) == nil {
		return
	}
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, text, 0o700)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) chmod(path string, mode fs.FileMode) {
	w.t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) remove(path string) {
	w.t.Helper()
	if err := os.RemoveAll(path); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) setup(hosts ...string) {
	w.t.Helper()
	p, err := setup.Make(w.t.Context(), setup.Options{
		Dirs: w.o.Dirs, Config: w.o.Config, Hosts: hosts, Program: w.path("bin/muxproxy"), SSH: w.o.SSH,
	})
	if err == nil {
		err = p.Do(w.t.Context())
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// policy is what the shell's policy file says. The master goes by the same.
func (w *world) policy(text string) {
	w.t.Helper()
	w.o.PolicyFile = w.path(".config/muxproxy/config.hcl")
	if text != "" {
		w.m.status.Policy = w.write(".config/muxproxy/config.hcl", text)
	}
	w.o.Policy, w.o.Diagnostics = policy.Load(w.o.PolicyFile, true, policy.Options{Alias: func(use.Target) bool { return true }})
}

// host has an ssh to box looked at.
func (w *world) host(name string) {
	w.o.Host, w.o.Target = name, use.Target{Alias: name}
}

// ssh puts a program in the place of ssh, which goes on to the real one.
func (w *world) ssh(script string) {
	w.t.Helper()
	path := w.write("ssh", "#!/bin/sh\n"+script+"\nexec "+w.o.SSH+" \"$@\"\n")
	w.chmod(path, 0o700)
	w.o.SSH = path
}

// alive has somebody hold the living master's lock until the test ends.
func (w *world) alive() {
	w.t.Helper()
	lock, err := paths.TryLock(filepath.Join(w.o.Dirs.Run, paths.MasterLock))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { lock.Close() })
}

// serve has the master live until the test ends.
func (w *world) serve() {
	w.t.Helper()
	w.alive()
	l, err := paths.Listen(w.o.Dirs.Runtime, paths.ControlSocket)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- control.Serve(ctx, l, w.m) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			w.t.Error(err)
		}
	})
}

func (w *world) run() Report {
	w.t.Helper()
	r, err := Run(w.t.Context(), w.o)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// tree lists what there is, to see that nothing changes.
func (w *world) tree() string {
	w.t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(filepath.Dir(w.home), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if path == os.TempDir() { // sshconfig.Run makes private copies there, and takes them away
			fmt.Fprintln(&b, path)
			return nil
		}
		fmt.Fprintln(&b, path, info.Mode(), info.Size(), info.ModTime().UnixNano())
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return b.String()
}

// logind plays what ends sessions, on a bus of its own.
type logindFake map[string]any

func (f logindFake) Get(_, name string) (dbus.Variant, *dbus.Error) {
	v, ok := f[name]
	if !ok {
		return dbus.Variant{}, dbus.MakeFailedError(errors.New("no such property"))
	}
	return dbus.MakeVariant(v), nil
}

func (f logindFake) GetUser(uint32) (dbus.ObjectPath, *dbus.Error) { return "/user", nil }

func (w *world) logind(f logindFake) {
	t := w.t
	t.Helper()
	dir, err := os.MkdirTemp("", "bus")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	conf := filepath.Join(dir, "bus.conf")
	text := fmt.Sprintf(`<busconfig><type>session</type><listen>unix:path=%s/socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>`, dir)
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
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	address := strings.TrimSpace(line)
	w.env["DBUS_SYSTEM_BUS_ADDRESS"] = address
	c, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	for _, path := range []dbus.ObjectPath{logindPath, "/user"} {
		if err := errors.Join(c.Export(f, path, "org.freedesktop.DBus.Properties"), c.Export(f, path, logind+".Manager")); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := c.RequestName(logind, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatal(r, err)
	}
}

// listen makes a socket. It stays when nobody listens any more.
func listen(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	return l
}

const setupCommand = "muxproxy setup -F {home}/config --host box --host '*.corp'"

// spoiled is a world in which something is not well, and what is found. {home}, {state}, {run} and {sockets} stand for
// those places.
type spoiled struct {
	what  string
	spoil func(w *world)
	name  string
	state State
	text  string // a part of it
	mend  string // its start
}

var cases = []spoiled{
	{"bypass", func(w *world) { w.env["MUXPROXY_BYPASS"] = "1" },
		"environment", Warning, "MUXPROXY_BYPASS is set", "unset MUXPROXY_BYPASS"},
	{"other HOME", func(w *world) { w.o.Config, w.o.Home = "", "/elsewhere" },
		"environment", Warning, "HOME is {home}, but ssh reads its configuration in /elsewhere", "export HOME=/elsewhere"},

	{"no ssh", func(w *world) { w.o.SSH = "" }, "ssh", Failure, "there is no ssh on PATH", "install OpenSSH 7.3 or newer"},
	{"old ssh", func(w *world) { w.ssh(`[ "$1" = -V ] && { echo 'OpenSSH_7.2p2 Ubuntu' >&2; exit; }`) },
		"ssh", Failure, "is OpenSSH_7.2p2, which knows no Include", "install OpenSSH 7.3 or newer"},
	{"very old ssh", func(w *world) { w.ssh(`[ "$1" = -V ] && { echo 'OpenSSH_6.9' >&2; exit; }`) },
		"ssh", Failure, "is OpenSSH_6.9, which knows no Include", ""},
	{"other ssh", func(w *world) { w.ssh(`[ "$1" = -V ] && { printf 'Dropbear v1\033[2J\n' >&2; exit 1; }`) },
		"ssh", Warning, `is not OpenSSH, as far as it says: "Dropbear v1\x1b[2J" (exit status 1)`, ""},

	{"program gone", func(w *world) { w.remove(w.path("bin/muxproxy")) },
		"programs", Failure, "ssh can't start {home}/bin/muxproxy: ", setupCommand},
	{"program not executable", func(w *world) { w.copy(w.write("x", "x"), "bin/muxproxy") },
		"programs", Failure, "permission denied", setupCommand},
	{"no muxproxyd", func(w *world) { w.remove(w.path("bin/muxproxyd")); w.o.Self = w.path("bin/muxproxy") },
		"programs", Failure, "muxproxyd is neither beside {home}/bin/muxproxy nor on PATH", "install muxproxyd beside {home}/bin/muxproxy"},
	{"relative", func(w *world) { w.replace(".config/muxproxy/ssh_config", "ProxyCommand "+w.home, "ProxyCommand .") },
		"programs", Failure, "can't start ./bin/muxproxy", setupCommand},
	{"by PATH", func(w *world) {
		w.replace(".config/muxproxy/ssh_config", w.home+"/bin/muxproxy", "muxproxy")
		w.t.Setenv("PATH", w.path("bin")+":"+os.Getenv("PATH"))
	}, "programs", Warning, "ssh starts the muxproxy that is first on PATH, here {home}/bin/muxproxy", setupCommand},
	{"replaceable", func(w *world) { w.chmod(w.path("bin"), 0o777) },
		"programs", Failure, "{home}/bin is writable by everybody (mode 0777)", "chmod o-w {home}/bin"},
	{"another build", func(w *world) {
		path, err := exec.LookPath("go")
		if err != nil {
			w.t.Fatal(err)
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			w.t.Fatal(err)
		}
		w.copy(path, "bin/muxproxy")
	}, "programs", Warning, "{home}/bin/muxproxy is of another build (", "install muxproxy and muxproxyd of one version, side by side"},
	{"a script", func(w *world) {
		w.copy("/dev/null", "x")
		w.copy(w.o.SSH, "bin/muxproxyd")
		w.o.Self = w.path("bin/muxproxy")
	},
		"programs", Warning, "no telling of which version they are", ""},

	{"broken ssh_config", func(w *world) { w.prepend("config", "Hosst x\n") },
		"ssh_config", Failure, "line 1: Bad configuration option: hosst", ""},
	{"open to others", func(w *world) { w.chmod(w.path(".config/muxproxy/ssh_config"), 0o666) },
		"ssh_config", Failure, "Bad owner or permissions on {home}/.config/muxproxy/ssh_config", ""},
	{"no line", func(w *world) { w.write("config", "User x\n"); w.remove(w.path(".config/muxproxy/ssh_config")) },
		"ssh_config", Failure, "ssh example.com does not go through muxproxy: it has no ProxyCommand", "muxproxy setup -F {home}/config"},
	{"line gone", func(w *world) { w.write("config", "User x\n") },
		"ssh_config", Failure, "ssh box does not go through muxproxy: it has no ProxyCommand", setupCommand},
	{"not this host", func(w *world) { w.host("other") },
		"ssh_config", Failure, "ssh other does not go through muxproxy", setupCommand + " --host other"},
	{"excluded", func(w *world) { w.setup("*", "!other"); w.host("other") },
		"ssh_config", Failure, "ssh other does not go through muxproxy", "muxproxy setup -F {home}/config --host '*' --host other"},
	{"another before", func(w *world) { w.prepend("config", "ProxyCommand nc %h %p\n"); w.host("box") },
		"ssh_config", Failure, `ssh box does not go through muxproxy: its ProxyCommand is "nc %h %p"`, setupCommand},

	{"ProxyJump before", func(w *world) { w.prepend("config", "ProxyJump jump\n"); w.host("box") },
		"proxy_jump", Failure, "ProxyJump jump comes before muxproxy's lines, so ssh box goes without it", setupCommand},

	{"ControlMaster", func(w *world) {
		w.replace(".config/muxproxy/ssh_config", "ControlPath none", "ControlPath /x/cm-%C")
		w.prepend("config", "ControlMaster auto\n")
	}, "control_master", Warning, "with ControlMaster auto and ControlPath /x/cm-", setupCommand},
	{"ControlMaster lives", func(w *world) {
		listen(w.t, w.path("cm")).Close()
		w.prepend("config", "ControlPath "+w.path("cm")+"\n")
	}, "control_master", Warning, "ssh's own ControlMaster listens at {home}/cm", "ssh -F {home}/config -O exit box"},

	{"no --fdpass", func(w *world) { w.replace(".config/muxproxy/ssh_config", " --fdpass", "") },
		"fdpass", Failure, "ProxyUseFdpass yes, but no --fdpass", setupCommand},
	{"no ProxyUseFdpass", func(w *world) { w.replace(".config/muxproxy/ssh_config", "ProxyUseFdpass yes", "") },
		"fdpass", Warning, "--fdpass without ProxyUseFdpass yes", "ProxyUseFdpass yes"},

	{"key turned down", func(w *world) { w.prepend("config", "GlobalKnownHostsFile /etc/ssh/ssh_known_hosts\n") },
		"host_key", Failure, "ssh_config lacks the line that has ssh trust the master: GlobalKnownHostsFile is /etc/ssh/ssh_known_hosts,",
		"GlobalKnownHostsFile {state}/known_hosts /etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"},
	{"state elsewhere", func(w *world) { w.o.Dirs.State = "/other/muxproxy" },
		"host_key", Failure, "without /other/muxproxy/known_hosts", "GlobalKnownHostsFile /other/muxproxy/known_hosts "},
	{"the wrong option", func(w *world) {
		w.replace(".config/muxproxy/ssh_config", "GlobalKnownHostsFile", "UserKnownHostsFile")
	}, "host_key", Warning, "UserKnownHostsFile names {state}/known_hosts", "GlobalKnownHostsFile {state}/known_hosts "},
	{"no certificates", func(w *world) { w.prepend("config", "HostKeyAlgorithms ssh-ed25519\n") },
		"host_key", Failure, "this ssh accepts no host certificate", "HostKeyAlgorithms +ecdsa-sha2-nistp256-cert-v01@openssh.com"},
	{"no such CA", func(w *world) { w.prepend("config", "CASignatureAlgorithms ssh-ed25519\n") },
		"host_key", Failure, "CASignatureAlgorithms ssh-ed25519 leaves out", "CASignatureAlgorithms +ecdsa-sha2-nistp256"},

	{"jumps in a circle", func(w *world) {
		w.write("config", "Host box\n ProxyJump j\nHost j\n ProxyJump box\n")
		w.setup("box")
		w.host("box")
	},
		"target", Failure, "more than 8 jump hosts, or a circle", ""},
	{"not shared", func(w *world) { w.policy("host \"192.0.2.1\" {\n  share = false\n}\n"); w.host("box") },
		"target", Warning, "policy says share = false of bob@192.0.2.1:2200 ({home}/.config/muxproxy/config.hcl:2", ""},

	{"known_hosts of the user's", func(w *world) {
		w.write("config", "Host *\n GlobalKnownHostsFile /corp/known /etc/ssh/ssh_known_hosts\n")
		w.setup("*")
		w.host("box")
	}, "target", Warning, "GlobalKnownHostsFile /corp/known /etc/ssh/ssh_known_hosts counts for the master, but not",
		"GlobalKnownHostsFile {state}/known_hosts /corp/known /etc/ssh/ssh_known_hosts"},
	{"state open", func(w *world) { w.chmod(w.o.Dirs.State, 0o755) },
		"directories", Failure, "{state} is open to others (mode 0755)", "chmod 700 {state}"},
	{"sockets open", func(w *world) { w.chmod(w.o.Dirs.Run, 0o777) },
		"directories", Failure, "{run} is open to others (mode 0777)", "chmod 700 {run}"},
	{"home open", func(w *world) { w.chmod(w.home, 0o777) },
		"directories", Failure, "{home} is writable by everybody", "chmod o-w {home}"},
	{"home open, nothing made", func(w *world) { w.remove(w.path(".local")); w.chmod(w.home, 0o777) },
		"directories", Failure, "{home} is writable by everybody", "chmod o-w {home}"},
	{"no room", func(w *world) { w.remove(w.path(".local")); w.write(".local", "") },
		"directories", Failure, ": not a directory", ""},
	{"can't be made", func(w *world) {
		w.remove(w.path(".local"))
		if err := os.Mkdir(w.path(".local"), 0o500); err != nil {
			w.t.Fatal(err)
		}
	}, "directories", Failure, "{state} is not there, and can't be made in {home}/.local", ""},
	{"log open", func(w *world) { w.chmod(w.write(".local/state/muxproxy/audit.log", ""), 0o644) },
		"directories", Warning, "{state}/audit.log is open to others (mode 0644)", "chmod 600 {state}/audit.log"},

	{"policy broken", func(w *world) { w.policy("host {\n") }, "policy", Failure, "config.hcl:1", "muxproxy config check"},
	{"policy open", func(w *world) { w.chmod(w.write(".config/muxproxy/config.hcl", ""), 0o666); w.policy("") },
		"policy", Failure, "is writable by others (mode 0666)", "muxproxy config check"},
	{"policy with a warning", func(w *world) { w.policy("host \"*\" {\n  persist {}\n}\n") },
		"policy", Warning, "config.hcl:2", "muxproxy config check"},

	{"another version", func(w *world) { w.m.status.Version = "1.2.2" },
		"master", Warning, " is of version 1.2.2, and 1.2.3 is installed", "muxproxy master restart"},
	{"locked", func(w *world) { w.m.status.Lock = use.LockState{Locked: true, By: []string{"person"}} },
		"master", Warning, " is locked (person)", "muxproxy unlock"},
	{"not to be reached", func(w *world) {
		w.o.Connect = func(context.Context) (*control.Master, error) {
			return nil, errors.New("a process of uid 7 listens there")
		}
	}, "master", Failure, "it can't be asked: a process of uid 7 listens there", "muxproxy log"},

	{"no CA", func(w *world) { w.remove(w.path(".local/state/muxproxy/known_hosts")) },
		"known_hosts", Failure, "the CA of the master is not in known_hosts", "muxproxy master restart"},
	{"another's CA", func(w *world) { w.replace(".local/state/muxproxy/known_hosts", "VH0K", "VH0L") },
		"known_hosts", Failure, "{state}/known_hosts lacks the line of the master that runs", "muxproxy master restart"},
	{"not a CA", func(w *world) { w.replace(".local/state/muxproxy/known_hosts", "@cert-authority *", "*") },
		"known_hosts", Failure, "lacks the line of the master that runs", ""},
	{"for some hosts", func(w *world) { w.replace(".local/state/muxproxy/known_hosts", " * ", " box ") },
		"known_hosts", Failure, "lacks the line of the master that runs", ""},
	{"broken key", func(w *world) { w.replace(".local/state/muxproxy/known_hosts", "AAAAC3", "AAAAC4") },
		"known_hosts", Failure, "lacks the line of the master that runs", ""},

	{"another policy", func(w *world) { w.policy("host \"x\" {}\n"); w.m.status.Policy = "/other/config.hcl" },
		"master_policy", Warning, "the master goes by /other/config.hcl, this shell by {home}/.config/muxproxy/config.hcl", "muxproxy master stop"},
	{"a policy only here", func(w *world) { w.policy("host \"x\" {}\n"); w.m.status.Policy = "" },
		"master_policy", Warning, "the master goes by the defaults, this shell by {home}", ""},
	{"a policy only there", func(w *world) { w.m.status.Policy = "/other/config.hcl" },
		"master_policy", Warning, "this shell by the defaults", ""},

	{"plugin failed", func(w *world) {
		w.m.plugins = []control.Plugin{{Name: "mail", State: "failed", Path: "/x/mail", Error: "exit status 1\x1b"}}
	}, "plugins", Failure, `mail is failed: exit status 1\x1b`, "muxproxy plugin check /x/mail"},
	{"plugin restarting", func(w *world) {
		w.m.plugins = []control.Plugin{{Name: "mail", State: "restarting", Path: "/x/mail", Error: "it crashed"}}
	}, "plugins", Warning, "mail is being restarted: it crashed", "muxproxy plugin check /x/mail"},
	{"plugin not found", func(w *world) {
		w.m.plugins = []control.Plugin{{Name: "mail", State: "failed", Error: "it is nowhere"}}
	}, "plugins", Failure, "mail is failed: it is nowhere", "install muxproxy-plugin-mail in {home}/.local/share/muxproxy/plugins"},
	{"plugin not started", func(w *world) { w.policy("host \"*\" {\n  mail {}\n}\n") },
		"plugins", Warning, "policy mentions mail, which the master has not started", "muxproxy master reload"},

	{"no such askpass", func(w *world) { w.env["SSH_ASKPASS"] = "/nowhere/askpass" },
		"askpass", Failure, "SSH_ASKPASS is /nowhere/askpass, which can't be run: ", "unset SSH_ASKPASS"},
	{"no such askpass in policy", func(w *world) { w.policy("master {\n  askpass = \"/nowhere/ask\"\n}\n") },
		"askpass", Warning, "policy may have to ask on the screen, and can't now (unless a confirm block says how): no /nowhere/ask", ""},
	{"no askpass", func(w *world) { w.policy("host \"*\" {\n  confirm {}\n}\n") },
		"askpass", Warning, "policy may have to ask on the screen, and can't now (unless a confirm block says how): no ", ""},

	{"no linger", func(w *world) { w.logind(logindFake{"KillUserProcesses": true, "Linger": false}) },
		"linger", Warning, "logind ends the master, and all connections, when you log out", "loginctl enable-linger"},

	{"line of a dead master", func(w *world) {
		w.prepend(".local/state/muxproxy/known_hosts", "@cert-authority * "+someKey+" "+w.mark(deadPID)+"\n")
	}, "leftovers", Warning, "1 line in {state}/known_hosts; the next master takes them away", "muxproxy master restart"},
	{"notify", func(w *world) { w.write(".local/state/muxproxy/"+filepath.Base(w.o.Dirs.Run)+"/notify.1073741824", "") },
		"leftovers", Warning, "{run}/notify.1073741824", ""},
	{"copy of ssh_config", func(w *world) {
		dir := filepath.Join(os.TempDir(), "muxproxy-config-1")
		if err := os.Mkdir(dir, 0o700); err != nil {
			w.t.Fatal(err)
		}
		old := time.Now().Add(-time.Hour)
		if err := os.Chtimes(dir, old, old); err != nil {
			w.t.Fatal(err)
		}
	}, "leftovers", Warning, "/muxproxy-config-1", "rm -r /"},
}

func TestChecks(t *testing.T) {
	for _, c := range cases {
		t.Run(strings.ReplaceAll(c.name+" "+c.what, " ", "_"), func(t *testing.T) {
			w := newWorld(t)
			c.spoil(w)
			if _, err := os.Stat(w.o.Dirs.Run); err == nil {
				w.serve()
			}
			before := w.tree()
			r := w.run()
			if w.tree() != before {
				t.Errorf("something was changed: \n%s\nbefore:\n%s", w.tree(), before)
			}
			w.expect(r, c.name, c.state, c.text, c.mend)
		})
	}
	for _, name := range Names() {
		if !slices.ContainsFunc(cases, func(c spoiled) bool { return c.name == name }) {
			t.Errorf("nothing makes %s fail", name)
		}
	}
}

// expect looks for a result.
func (w *world) expect(r Report, name string, state State, text, mend string) {
	w.t.Helper()
	places := strings.NewReplacer("{home}", w.home, "{state}", w.o.Dirs.State, "{run}", w.o.Dirs.Run, "{sockets}", w.o.Dirs.Runtime)
	text, mend = places.Replace(text), places.Replace(mend)
	if !slices.ContainsFunc(r.Results, func(r Result) bool {
		return r.Name == name && r.State == state && strings.Contains(r.Text, text) && strings.HasPrefix(r.Mend, mend)
	}) {
		w.t.Errorf("no %s %s %q, mend %q in\n%s", name, state, text, mend, shown(w.t, r))
	}
	if r.State != Failure && (state == Failure || r.State == OK && state == Warning) {
		w.t.Errorf("the whole is %s", r.State)
	}
	for _, r := range r.Results {
		if use.Printable(r.Text+r.Mend) != r.Text+r.Mend {
			w.t.Errorf("not escaped: %+v", r)
		}
	}
}

func shown(t *testing.T, r Report) string {
	t.Helper()
	var b strings.Builder
	if err := r.Write(&b, false); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// What is locked stays so where no master runs.
func TestLockedWithoutAMaster(t *testing.T) {
	w := newWorld(t)
	w.write(".local/state/muxproxy/"+filepath.Base(w.o.Dirs.Run)+"/"+paths.LockState, "{}")
	w.expect(w.run(), "master", Warning, "none runs, and the next one begins locked", "muxproxy unlock")
}

// Where sockets are in the state directory, what is wrong with it is said once; so is what is wrong with a parent of both.
func TestOnePlaceIsNamedOnce(t *testing.T) {
	for name, spoil := range map[string]func(w *world){
		"same directory": func(w *world) { w.o.Dirs.Runtime = w.o.Dirs.Run; w.chmod(w.o.Dirs.Run, 0o777) },
		"same parent":    func(w *world) { w.chmod(w.home, 0o777) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			spoil(w)
			n := 0
			r := w.run()
			for _, res := range r.Results {
				if res.Name == "directories" {
					n++
				}
			}
			if n != 1 {
				t.Errorf("%d results of directories in\n%s", n, shown(t, r))
			}
		})
	}
}

// Where all is well, every check says so.
func TestAllIsWell(t *testing.T) {
	for name, c := range map[string]struct {
		change func(w *world)
		texts  []string
	}{
		"no host": {func(*world) {}, []string{"ssh box goes through muxproxy", "no HOST was given", "has the CA of the master that runs"}},
		"host":    {func(w *world) { w.host("box") }, []string{"the master logs in to bob@192.0.2.1:2200"}},
		"user and port": {func(w *world) {
			w.host("box")
			w.o.Target.User, w.o.Target.Port = "eve", 99
		}, []string{"the master logs in to eve@192.0.2.1:99"}},
		"jump": {func(w *world) { w.write("config", "Host box\n ProxyJump j1,j2\n"); w.setup("*"); w.host("box") },
			[]string{"@box:22, by way of j1,j2"}},
		"own ProxyCommand": {func(w *world) { w.write("config", "ProxyCommand nc %h %p\n"); w.setup("*"); w.host("box") },
			[]string{"by the ProxyCommand nc %h %p"}},
		"via": {func(w *world) { w.policy("host \"*\" {\n  via = [\"bastion\"]\n}\n"); w.host("box") }, []string{`by way of ["bastion"] (`}},
		"without a master": {func(w *world) {
			w.m = nil
			w.remove(w.path(".local"))
			w.remove(w.o.Dirs.Runtime)
		}, []string{"none runs; the next ssh starts one"}},
		"plugins": {func(w *world) {
			w.policy("host \"*\" {\n  mail {}\n}\n")
			w.m.plugins = []control.Plugin{{Name: "mail", State: "up"}}
		}, []string{"mail: up"}},
		"askpass": {func(w *world) {
			w.policy("master {\n  askpass = \"/bin/true\"\n}\n")
		}, []string{"there is an askpass program, and a graphical session"}},
		"linger":     {func(w *world) { w.logind(logindFake{"KillUserProcesses": true, "Linger": true}) }, []string{"linger is on"}},
		"no killing": {func(w *world) { w.logind(logindFake{"KillUserProcesses": false, "Linger": false}) }, []string{"logind lets the master run"}},
		"spared": {func(w *world) {
			out, err := exec.Command("id", "-un").Output()
			if err != nil {
				w.t.Fatal(err)
			}
			w.logind(logindFake{"KillUserProcesses": true, "Linger": false, "KillExcludeUsers": []string{strings.TrimSpace(string(out))}})
		}, []string{"logind lets the master run"}},
		"by hand": {func(w *world) {
			w.remove(w.path(".config/muxproxy/ssh_config"))
			w.write("config", "Host *\n  ProxyCommand "+w.path("bin/muxproxy")+" %r@%h:%p\n  GlobalKnownHostsFile "+w.o.Dirs.State+"/known_hosts\n")
		}, []string{"ssh example.com goes through muxproxy", "muxproxy stays beside each ssh"}},
		"copy of ssh_config in use": {func(w *world) {
			if err := os.Mkdir(filepath.Join(os.TempDir(), "muxproxy-config-2"), 0o700); err != nil {
				w.t.Fatal(err)
			}
		}, []string{"nothing is left"}},
		"known_hosts of the user's, for both": {func(w *world) {
			w.write("config", "Host *\n GlobalKnownHostsFile /corp/known\n")
			w.setup("*")
			w.prepend("config", "GlobalKnownHostsFile "+w.o.Dirs.State+"/known_hosts /corp/known ~/known\n")
			me, err := user.Current() // whose home directory ssh and the master take
			if err != nil {
				w.t.Fatal(err)
			}
			w.o.Home = me.HomeDir
			w.host("box")
		}, nil},
		"no bypass":        {func(w *world) { w.env["MUXPROXY_BYPASS"] = "0" }, nil},
		"idle ControlPath": {func(w *world) { w.prepend("config", "ControlPath "+w.path("cm")+"\n") }, []string{"and nobody listens there"}},
		"other hosts": {func(w *world) {
			w.prepend(".local/state/muxproxy/known_hosts", "@cert-authority * "+someKey+" elsewhere+1073741824\n# a comment\n")
		}, []string{"nothing is left"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c.change(w)
			if w.m != nil {
				w.serve()
			}
			before := w.tree()
			r := w.run()
			if w.tree() != before {
				t.Error("something was changed")
			}
			if r.State != OK || r.Host != w.o.Host {
				t.Errorf("%s", shown(t, r))
			}
			var names []string
			for _, r := range r.Results {
				names = append(names, r.Name)
			}
			if !slices.Equal(names, Names()) {
				t.Errorf("%q", names)
			}
			for _, text := range c.texts {
				if !slices.ContainsFunc(r.Results, func(r Result) bool { return strings.Contains(r.Text, text) }) {
					t.Errorf("no %q in\n%s", text, shown(t, r))
				}
			}
		})
	}
}

// What a master that was killed leaves: its line, its sockets and the link to them.
func TestDeadMaster(t *testing.T) {
	w := newWorld(t)
	w.replace(".local/state/muxproxy/known_hosts", fmt.Sprint("+", masterPID), fmt.Sprint("+", deadPID))
	listen(t, filepath.Join(w.o.Dirs.Runtime, paths.MuxSocket)).Close()
	if err := w.o.Dirs.Publish(w.o.Dirs.Runtime); err != nil {
		t.Fatal(err)
	}
	w.expect(w.run(), "leftovers", Warning, "1 line in {state}/known_hosts, {run}/sockets, {sockets}/muxproxy.sock; the next master",
		"muxproxy master start")
	// One in a place that the next master does not use.
	w.remove(filepath.Join(w.o.Dirs.Runtime, paths.MuxSocket))
	listen(t, filepath.Join(w.o.Dirs.Run, paths.MuxSocket)).Close()
	w.expect(w.run(), "leftovers", Warning, "{run}/muxproxy.sock", "rm -r {run}/sockets {run}/muxproxy.sock")
}

// Where systemd listens for a master, it is not asked to start one.
func TestNobodyIsWoken(t *testing.T) {
	w := newWorld(t)
	w.remove(w.path(".local/state/muxproxy/known_hosts"))
	w.write(".local/state/muxproxy/"+filepath.Base(w.o.Dirs.Run)+"/"+paths.MasterLock, "")
	for _, name := range []string{paths.MuxSocket, paths.ControlSocket} {
		l := listen(t, filepath.Join(w.o.Dirs.Runtime, name))
		defer l.Close()
	}
	w.o.Connect = func(context.Context) (*control.Master, error) {
		t.Error("somebody was asked")
		return nil, bridge.ErrNoMaster
	}
	if r := w.run(); r.State != OK {
		t.Error(shown(t, r))
	}
}

// A master that is killed while it is asked is no reason to stop.
func TestStatusFails(t *testing.T) {
	w := newWorld(t)
	w.alive()
	l, err := paths.Listen(w.o.Dirs.Runtime, paths.ControlSocket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	defer func() { l.Close(); <-done }()
	w.expect(w.run(), "master", Failure, "it can't be asked: ", "muxproxy log")
}

func TestInterrupted(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, w.o); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestWrite(t *testing.T) {
	long := strings.Repeat("word ", 40) + strings.Repeat("x", 100)
	r := Report{State: Failure, Results: []Result{
		{"ssh", OK, "fine", ""}, {"control_master", Warning, long, "do it"}, {"policy", Failure, "bad", strings.Repeat("y", 90)},
	}}
	text := shown(t, r)
	for line := range strings.Lines(text) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > columns && !strings.ContainsAny(line, "xy") {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	if !strings.HasPrefix(text, "ok       ssh             fine\nwarning  control_master  word word") ||
		!strings.HasSuffix(text, "yyy\n1 failure, 1 warning\n") || !strings.Contains(text, "\n                         mend: do it\n") {
		t.Error(text)
	}
	var b strings.Builder
	if err := r.Write(&b, true); err != nil || !strings.Contains(b.String(), "\x1b[31mfailure\x1b[0m  policy") {
		t.Errorf("%q, %v", b.String(), err)
	}
	if err := r.Write(broken{}, false); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("%v", err)
	}
	got, err := json.Marshal(Report{Host: "h", State: OK, Results: []Result{{"a", OK, "b", ""}, {"c", Warning, "d", "e"}}})
	const want = `{"host":"h","state":"ok","results":[{"name":"a","state":"ok","text":"b"},{"name":"c","state":"warning","text":"d","mend":"e"}]}`
	if err != nil || string(got) != want {
		t.Errorf("%s, %v", got, err)
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestSigns(t *testing.T) {
	const rest = ",ssh-ed25519"
	for _, c := range []struct {
		hostKey, ca string
		want        bool
	}{
		{ecdsaCert + rest, ecdsa, true},
		{ecdsaCert + rest, "ssh-ed25519,rsa-sha2-512", false},
		{"ssh-ed25519-cert-v01@openssh.com", "ssh-ed25519", true},
		{"ssh-ed25519-cert-v01@openssh.com," + ecdsaCert, "ssh-ed25519", false}, // the cheapest comes first
		{"rsa-sha2-512-cert-v01@openssh.com", "rsa-sha2-256", true},
		{"rsa-sha2-512-cert-v01@openssh.com", "ssh-rsa", false},
		{"", "", true},
	} {
		if got := signs(c.hostKey, c.ca); got != c.want {
			t.Errorf("%q, %q: %v", c.hostKey, c.ca, got)
		}
	}
	if _, _, _, _, _, err := ssh.ParseKnownHosts([]byte("@cert-authority * " + someKey + " m\n")); err != nil {
		t.Error(err)
	}
}
