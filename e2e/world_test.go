//go:build linux

package e2e

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// mode is how ssh reaches the server.
type mode string

const (
	plain  mode = "plain"  // no ProxyCommand
	pipes  mode = "pipes"  // ProxyCommand muxproxy
	fdpass mode = "fdpass" // ProxyCommand muxproxy --fdpass, ProxyUseFdpass yes
)

// forEach runs a test once in each mode, each in a world of its own, beside others.
func forEach(t *testing.T, f func(t *testing.T, w *world), options ...option) {
	t.Parallel()
	modes := []mode{pipes, fdpass}
	if plainMode {
		modes = []mode{plain}
	}
	for _, m := range modes {
		t.Run(string(m), func(t *testing.T) {
			t.Parallel()
			f(t, newWorld(t, m, options...))
		})
	}
}

// forPipes runs a test in one mode only, where fd passing changes nothing.
func forPipes(t *testing.T, f func(t *testing.T, w *world), options ...option) {
	t.Parallel()
	m := pipes
	if plainMode {
		m = plain
	}
	f(t, newWorld(t, m, options...))
}

// muxproxyOnly reports whether muxproxy is under test, and says so in the log if not.
func muxproxyOnly(t testing.TB) bool {
	t.Helper()
	if plainMode {
		t.Log("plain ssh has nothing to show here")
	}
	return !plainMode
}

// world is one test's home, sshd and master.
type world struct {
	t    testing.TB
	mode mode
	dir  string // short, for the sake of socket paths
	env  []string
	conf string // ssh_config of this mode; its host is "box"
	// direct is an ssh_config without ProxyCommand and link, to compare with.
	direct  string
	link    *link
	sshd    int    // its port
	sshdLog string // file
	state   string // what XDG_STATE_HOME is in dir
	race    string // prefix of the race detector's reports
}

type option func(*setup)

// setup is what an option may change before ssh's configuration is written.
type setup struct {
	dir   string            // the world's
	state string            // where XDG_STATE_HOME, or what stands for it, is in dir
	bin   string            // directory of muxproxy
	env   map[string]string // "" removes a variable
	sshd  []string          // lines of sshd_config, before the usual ones
}

// newWorld makes a home, starts an sshd, and writes an ssh_config that leads to it. When the test ends all is gone: a
// master that can't be stopped, or that reported a data race or a panic, fails the test.
func newWorld(t testing.TB, m mode, options ...option) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "mx")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, mode: m, dir: dir, conf: filepath.Join(dir, "ssh_config"), direct: filepath.Join(dir, "direct_config"),
		race: filepath.Join(dir, "race")}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := setup{dir: dir, state: "state", bin: binDir, env: map[string]string{}}
	for _, o := range options {
		o(&s)
	}
	w.state = s.state

	for _, d := range []string{"home", "home/.ssh", "state", "run", "config"} {
		if err := os.Mkdir(w.path(d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, public, err := marshalKey(key)
	if err != nil {
		t.Fatal(err)
	}
	w.write("id", string(private))
	w.write("authorized_keys", string(ssh.MarshalAuthorizedKey(public)))
	w.startSSHD(s.sshd)
	w.link = newLink(t, loopback(w.sshd))
	w.write("known_hosts", knownHosts(w.link.port())+knownHosts(w.sshd))

	common := fmt.Sprintf(`    User %s
    IdentityFile %s
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile %s
    BatchMode yes
    IgnoreUnknown EnableEscapeCommandline
`, me, w.path("id"), w.path("known_hosts"))
	w.write("direct_config", fmt.Sprintf("Host box\n    HostName 127.0.0.1\n    Port %d\n%s", w.sshd, common))
	proxy := ""
	switch m {
	case pipes:
		proxy = fmt.Sprintf("    ProxyCommand %s/muxproxy '%%r@%%h:%%p' '%%n'\n", s.bin)
	case fdpass:
		proxy = fmt.Sprintf("    ProxyCommand %s/muxproxy --fdpass '%%r@%%h:%%p' '%%n'\n    ProxyUseFdpass yes\n", s.bin)
	}
	if m != plain {
		proxy += "    GlobalKnownHostsFile " + w.path(s.state+"/muxproxy/known_hosts") + "\n"
	}
	w.write("ssh_config", fmt.Sprintf("Host box\n    HostName 127.0.0.1\n    Port %d\n\nHost *\n%s%s",
		w.link.port(), proxy, common))

	env := map[string]string{
		"PATH": os.Getenv("PATH"), "HOME": w.path("home"), "USER": me, "LOGNAME": me, "SHELL": "/bin/sh", "TERM": "xterm",
		"LC_ALL":          "C",
		"XDG_STATE_HOME":  w.path("state"),
		"XDG_RUNTIME_DIR": w.path("run"),
		"XDG_CONFIG_HOME": w.path("config"),
		"GORACE":          "log_path=" + w.race + " exitcode=66 atexit_sleep_ms=0",
		"GIT_SSH_COMMAND": "ssh -F " + w.conf, "GIT_CONFIG_NOSYSTEM": "1",
		"GIT_AUTHOR_NAME": "e2e", "GIT_AUTHOR_EMAIL": "e2e@localhost",
		"GIT_COMMITTER_NAME": "e2e", "GIT_COMMITTER_EMAIL": "e2e@localhost",
	}
	for k, v := range s.env {
		env[k] = v
	}
	for k, v := range env {
		if v != "" {
			w.env = append(w.env, k+"="+v)
		}
	}
	t.Cleanup(w.end)
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

// write puts a file of the user's own into the world's folder.
func (w *world) write(name, content string) string {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), []byte(content), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return w.path(name)
}

// writeProgram writes what a test will run, and others may. No other test forks meanwhile: its child would have the file
// open for writing until its execve(2), and the program could not be run.
func writeProgram(path string, content []byte) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, content, 0o700); err != nil {
		return err
	}
	return os.Chmod(path, 0o755)
}

func (w *world) read(name string) string {
	w.t.Helper()
	b, err := os.ReadFile(w.path(name))
	if err != nil {
		w.t.Fatal(err)
	}
	return string(b)
}

// knownHosts is what known_hosts holds of an sshd at this port.
func knownHosts(port int) string {
	var b strings.Builder
	for _, k := range hostKeys {
		fmt.Fprintf(&b, "[127.0.0.1]:%d %s", port, ssh.MarshalAuthorizedKey(k.public))
	}
	return b.String()
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// somePort is below what the kernel gives to outgoing connections.
func somePort() int { return 12000 + mrand.IntN(20000) }

// startSSHD starts an sshd. It ends with the test. HOME is an empty folder there: bash reads ~/.bashrc for each command below
// sshd, and what that does is not the test's.
func (w *world) startSSHD(lines []string) {
	t := w.t
	t.Helper()
	w.sshdLog = w.path("sshd.log")
	var keys strings.Builder
	for _, k := range hostKeys {
		keys.WriteString("HostKey " + w.write("host_"+k.kind, string(k.private)) + "\n")
	}
	logFile, err := os.Create(w.sshdLog)
	if err != nil {
		t.Fatal(err)
	}
	defer logFile.Close()
	for range 20 {
		w.sshd = freePort(t)
		conf := w.write("sshd_config", strings.Join(lines, "\n")+fmt.Sprintf(`
Port %d
ListenAddress 127.0.0.1
%sAuthorizedKeysFile %s
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
AcceptEnv *
AllowTcpForwarding yes
AllowStreamLocalForwarding yes
MaxSessions 100
MaxStartups 200
SetEnv HOME=%s
UseDNS no
PrintMotd no
LogLevel VERBOSE
Subsystem sftp internal-sftp
%s
`, w.sshd, keys.String(), w.path("authorized_keys"), w.path("home"), strings.Join(sshdExtra, "\n")))
		cmd := exec.Command(sshdPath, "-D", "-e", "-f", conf)
		cmd.Stderr = logFile
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		ready := within(patience, func() bool {
			select {
			case <-ended:
				return true
			default:
				return speaksSSH(loopback(w.sshd))
			}
		})
		select {
		case <-ended:
			continue // somebody took the port
		default:
		}
		t.Cleanup(func() { cmd.Process.Kill(); <-ended })
		if !ready {
			t.Fatalf("sshd does not answer:\n%s", w.read("sshd.log"))
		}
		return
	}
	t.Fatalf("sshd does not start:\n%s", w.read("sshd.log"))
}

func speaksSSH(addr string) bool {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	b := make([]byte, 4)
	_, err = io.ReadFull(c, b)
	return err == nil && string(b) == "SSH-"
}

// end stops the world's master and looks for what it left.
func (w *world) end() {
	t := w.t
	// Clients that a test left in the background (ssh -f) name our configuration. They are killed before the master
	// goes, so that its end is not a client's end.
	for pid, args := range processes() {
		if pid != os.Getpid() && strings.Contains(strings.Join(args, " "), w.dir+"/ssh_config") {
			kill9(pid)
		}
	}
	if w.mode != plain {
		w.stopMaster()
		reports, _ := filepath.Glob(w.race + "*")
		for _, r := range reports {
			b, _ := os.ReadFile(r)
			t.Errorf("the race detector says:\n%s", b)
		}
		// The master's environment is a short list of its own, so its reports may be in its log instead.
		for _, bad := range []string{"WARNING: DATA RACE", "panic: ", "fatal error: "} {
			if strings.Contains(w.masterLog(), bad) {
				t.Errorf("the master's log has %q", bad)
			}
		}
	}
	if t.Failed() {
		if w.mode != plain {
			t.Logf("master.log:\n%s", tail(w.masterLog()))
		}
		b, _ := os.ReadFile(w.sshdLog)
		t.Logf("sshd's log:\n%s", tail(string(b)))
	}
}

func (w *world) masterLog() string {
	b, _ := os.ReadFile(w.path(w.state + "/muxproxy/master.log"))
	return string(b)
}

// stopMaster ends the master as a person would, and insists that it is gone.
func (w *world) stopMaster() {
	t := w.t
	t.Helper()
	st, ok := w.status()
	if !ok {
		return
	}
	stop := w.run(spec{args: []string{binDir + "/muxproxy", "master", "stop"}, null: true})
	if stop.status != 0 {
		t.Errorf("muxproxy master stop: status %d: %s%s", stop.status, stop.out, stop.err)
	}
	if !within(10*time.Second, func() bool { return gone(st.PID) }) {
		t.Errorf("master %d did not end within 10 s of `master stop`", st.PID)
		kill9(st.PID)
	}
}

// status is what `muxproxy status --json` says, as far as the tests look at it.
type status struct {
	PID       int    `json:"pid"`
	Sockets   string `json:"sockets"`
	Draining  bool   `json:"draining"`
	Upstreams []struct {
		ID       uint64 `json:"id"`
		Target   string `json:"target"`
		Lane     string `json:"lane"`
		State    string `json:"state"`
		Clients  int    `json:"clients"`
		Channels int    `json:"channels"`
		In       int64  `json:"in"`
		Sessions int    `json:"sessions"`
		Most     int    `json:"max_sessions"`
		Suspect  bool   `json:"suspect"`

		KeptUntil time.Time `json:"kept_until"`
	} `json:"upstreams"`
	Clients []struct {
		ID       uint64 `json:"id"`
		Target   string `json:"target"`
		Mode     string `json:"mode"`
		Channels []struct {
			Kind     string `json:"kind"`
			Upstream uint64 `json:"upstream"`
			Detail   string `json:"detail"`
		} `json:"channels"`
	} `json:"clients"`
}

// channels is the number of channels towards all servers.
func (s status) channels() int {
	n := 0
	for _, u := range s.Upstreams {
		n += u.Channels
	}
	return n
}

// status asks the master; false if there is none.
func (w *world) status() (status, bool) { return w.statusIn(w.env) }

func (w *world) statusIn(env []string) (status, bool) {
	w.t.Helper()
	var s status
	r := w.run(spec{args: []string{binDir + "/muxproxy", "status", "--json"}, env: env, null: true})
	if r.status != 0 {
		return s, false
	}
	if err := json.Unmarshal([]byte(r.out), &s); err != nil {
		w.t.Fatalf("muxproxy status --json: %v\n%s", err, r.out)
	}
	return s, s.PID != 0
}

// mustStatus is status of a master that must be there.
func (w *world) mustStatus() status {
	w.t.Helper()
	s, ok := w.status()
	if !ok {
		w.t.Fatalf("no master answers `muxproxy status --json`\nmaster.log:\n%s", tail(w.masterLog()))
	}
	return s
}

// goroutines counts those of the master. The count includes what serves the question.
func (w *world) goroutines() int {
	w.t.Helper()
	r := w.run(spec{args: []string{binDir + "/muxproxy", "master", "dump"}, null: true})
	n := strings.Count("\n"+r.out, "\ngoroutine ")
	if r.status != 0 || n == 0 {
		w.t.Fatalf("muxproxy master dump: status %d, %d goroutines: %s", r.status, n, r.err)
	}
	return n
}

// fds returns what each of a master's file descriptors leads to, where that can be seen: a master is not dumpable, so
// only root may look; others get nil.
func (w *world) fds(pid int) []string {
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		w.t.Logf("a master's file descriptors are for root to see: %v", err)
		return nil
	}
	var all []string
	for _, e := range entries {
		if to, err := os.Readlink(dir + e.Name()); err == nil {
			all = append(all, to)
		}
	}
	return all
}

// run runs a command to its end in this world.
func (w *world) run(s spec) result {
	w.t.Helper()
	return w.start(s).wait(2 * patience)
}

// start starts a command in this world.
func (w *world) start(s spec) *proc {
	w.t.Helper()
	if s.env == nil {
		s.env = w.env
	}
	if s.dir == "" {
		s.dir = w.dir
	}
	return start(w.t, s)
}

// ssh runs an ssh with nothing on stdin.
func (w *world) ssh(args ...string) result {
	w.t.Helper()
	return w.run(spec{args: w.sshArgs(args...), null: true})
}

// sshIn runs an ssh with this on stdin.
func (w *world) sshIn(stdin io.Reader, args ...string) result {
	w.t.Helper()
	return w.run(spec{args: w.sshArgs(args...), stdin: stdin})
}

// sshStart starts an ssh with a pipe on stdin.
func (w *world) sshStart(args ...string) *proc {
	w.t.Helper()
	return w.start(spec{args: w.sshArgs(args...)})
}

// sshTTY starts an ssh on a terminal of its own.
func (w *world) sshTTY(args ...string) *proc {
	w.t.Helper()
	return w.start(spec{args: w.sshArgs(args...), tty: true})
}

func (w *world) sshArgs(args ...string) []string {
	return append([]string{"ssh", "-F", w.conf}, args...)
}

// plainSSH runs an ssh that knows nothing of muxproxy, to compare with.
func (w *world) plainSSH(args ...string) result {
	w.t.Helper()
	return w.run(spec{args: append([]string{"ssh", "-F", w.direct}, args...), null: true})
}

// hold starts a session that stays until its stdin is closed, and shows that it works.
func (w *world) hold(options ...string) *proc {
	w.t.Helper()
	p := w.sshStart(append(options, "box", "cat")...)
	p.echo("held")
	return p
}

// release ends a held session in good order.
func (p *proc) release() {
	p.t.Helper()
	p.in.Close()
	if r := p.wait(patience); r.status != 0 {
		p.t.Errorf("%q ended with %d: %s", p.cmd.Args, r.status, r.err)
	}
}

// connections checks how many TCP connections the server has accepted since the world began. Plain ssh needs more.
func (w *world) connections(want int) {
	w.t.Helper()
	if w.mode == plain {
		return
	}
	if got := w.link.count(); got != want {
		w.t.Errorf("the server accepted %d TCP connections, not %d", got, want)
	}
}

// want checks how an ssh ended.
func want(t testing.TB, r result, status int, stdout string) {
	t.Helper()
	if r.status != status || r.out != stdout {
		t.Errorf("status %d (want %d), stdout %q (want %q), stderr %q", r.status, status, tail(r.out), stdout, tail(r.err))
	}
}

// bridge is the process that ssh started as its ProxyCommand.
func (w *world) bridge(ssh *proc) int {
	w.t.Helper()
	var found int
	eventually(w.t, "ssh has a bridge below it", func() bool {
		for _, pid := range children(ssh.pid()) {
			if args := processes()[pid]; len(args) > 0 && strings.HasSuffix(args[0], "/muxproxy") {
				found = pid
				return true
			}
		}
		return false
	})
	return found
}
