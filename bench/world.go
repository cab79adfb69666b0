//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/bench/link"
)

// patience bounds each step that should take seconds at most, on a busy machine too.
const patience = 60 * time.Second

// look finds the programs and what they can do.
func (b *bench) look(ctx context.Context) error {
	u, err := user.Current()
	if err != nil {
		return err
	}
	b.me = u.Username
	// sshd is where not everyone's PATH leads.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	for _, p := range []string{"ssh", "scp", "rsync", "git", "ssh-keygen"} {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("the benchmark needs %s: %w", p, err)
		}
	}
	// It starts itself again for each connection and wants an absolute path for that.
	if b.sshd, err = exec.LookPath("sshd"); err != nil {
		return fmt.Errorf("the benchmark needs sshd (package openssh-server): %w", err)
	}
	for _, p := range []string{"muxproxy", "muxproxyd"} {
		if _, err := exec.LookPath(filepath.Join(b.bin, p)); err != nil {
			return fmt.Errorf("no %s in %s: build it first, as `make bench` does: %w", p, b.bin, err)
		}
	}
	if os.Geteuid() == 0 {
		return os.MkdirAll("/run/sshd", 0o755) // sshd's privilege separation directory
	}
	return nil
}

// setting is what a case wants of its world.
type setting struct {
	link        *link.Config // nil: straight to sshd
	maxSessions int          // sshd's; 0: so many that it does not matter
}

// world is an sshd, a master, and ssh's configuration for each way.
type world struct {
	b      *bench
	dir    string
	env    map[string]string
	port   int // where ssh connects: sshd's, or the link's
	sshd   *proc
	link   *link.Link // or nil
	master int        // pid of muxproxy's

	mu    sync.Mutex // guards what follows
	procs []*proc
	// held are the sessions that stay: nothing else may refer to them, and a file that is not referred to is closed,
	// which ends the session.
	held []*session
}

// newWorld makes a world with nobody logged in. The caller closes it.
func (b *bench) newWorld(ctx context.Context, s setting) (w *world, err error) {
	w = &world{b: b}
	if w.dir, err = os.MkdirTemp(b.dir, "w"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
			w = nil
		}
	}()
	for _, d := range []string{"home", "home/.ssh", "state", "run", "config", "data"} {
		if err := os.Mkdir(w.path(d), 0o700); err != nil {
			return w, err
		}
	}
	w.env = map[string]string{
		"PATH": os.Getenv("PATH"), "HOME": w.path("home"), "USER": b.me, "LOGNAME": b.me, "SHELL": "/bin/sh", "TERM": "xterm",
		"LC_ALL": "C", "XDG_STATE_HOME": w.path("state"), "XDG_RUNTIME_DIR": w.path("run"),
		"XDG_CONFIG_HOME": w.path("config"), "XDG_DATA_HOME": w.path("data"),
		"GIT_CONFIG_NOSYSTEM": "1", "GIT_SSH_VARIANT": "ssh",
		"GIT_AUTHOR_NAME": "bench", "GIT_AUTHOR_EMAIL": "bench@localhost",
		"GIT_COMMITTER_NAME": "bench", "GIT_COMMITTER_EMAIL": "bench@localhost",
	}
	hostKey, err := w.makeKey("host_key")
	if err != nil {
		return w, err
	}
	userKey, err := w.makeKey("id")
	if err != nil {
		return w, err
	}
	if err := w.write("authorized_keys", string(ssh.MarshalAuthorizedKey(userKey))); err != nil {
		return w, err
	}
	if err := w.startSSHD(ctx, s.maxSessions); err != nil {
		return w, err
	}
	if s.link != nil {
		if w.link, err = link.New(loopback(w.port), *s.link); err != nil {
			return w, err
		}
		w.port = w.link.Addr().Port
	}
	if err := w.write("known_hosts", fmt.Sprintf("[127.0.0.1]:%[1]d,[localhost]:%[1]d %[2]s", w.port, ssh.MarshalAuthorizedKey(hostKey))); err != nil {
		return w, err
	}
	for _, way := range append(slices.Clone(allWays), bare) {
		if err := w.write(confName(way), w.config(way)); err != nil {
			return w, err
		}
	}
	if err := w.run(ctx, filepath.Join(b.bin, "muxproxy"), "master", "start"); err != nil {
		return w, err
	}
	w.master, err = w.masterPID(ctx)
	return w, err
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) write(name, text string) error {
	return os.WriteFile(w.path(name), []byte(text), 0o600)
}

func loopback(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

// makeKey writes a private key and returns its public half.
func (w *world) makeKey(name string) (ssh.PublicKey, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(private, "bench")
	if err != nil {
		return nil, err
	}
	if err := w.write(name, string(pem.EncodeToMemory(block))); err != nil {
		return nil, err
	}
	return ssh.NewPublicKey(public)
}

// confName is the ssh_config of a way.
func confName(w way) string {
	return "ssh_config." + strings.ReplaceAll(strings.ToLower(string(w)), " ", "-")
}

// config is ssh_config(5) for a way. Its host is "box", and "twin" is the same under a name of its own.
func (w *world) config(by way) string {
	c := ""
	if by == bare { // of a host key that nobody knows; ssh takes the first value of an option
		c = "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
	}
	c += fmt.Sprintf(`Host box
    HostName 127.0.0.1
Host twin
    HostName localhost
Host box twin
    Port %d
    User %s
    IdentityFile %s
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile %s
    BatchMode yes
`, w.port, w.b.me, w.path("id"), w.path("known_hosts"))
	muxproxy := filepath.Join(w.b.bin, "muxproxy")
	known := "    GlobalKnownHostsFile " + w.path("state/muxproxy/known_hosts") + "\n"
	switch by {
	case controlMaster:
		c += "    ControlPath " + w.path("cm") + "\n"
	case pipes:
		c += "    ProxyCommand " + muxproxy + " '%r@%h:%p' '%n'\n" + known
	case fdpass:
		c += "    ProxyCommand " + muxproxy + " --fdpass '%r@%h:%p' '%n'\n    ProxyUseFdpass yes\n" + known
	case bare:
		c += "    ProxyCommand " + w.b.self + " relay %h:%p %r " + w.path("id") + "\n"
	}
	return c
}

// startSSHD starts an sshd on a free port.
func (w *world) startSSHD(ctx context.Context, maxSessions int) error {
	if maxSessions == 0 {
		maxSessions = 5000
	}
	// With the user's own HOME, bash would run ~/.bashrc before each command below sshd, which can take longer than
	// everything that is measured here.
	lines := fmt.Sprintf(`ListenAddress 127.0.0.1
HostKey %s
AuthorizedKeysFile %s
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxSessions %d
MaxStartups 2000
UseDNS no
PrintMotd no
PrintLastLog no
SetEnv HOME=%s
Subsystem sftp internal-sftp
`, w.path("host_key"), w.path("authorized_keys"), maxSessions, w.path("home"))
	// Since OpenSSH 9.8 many connections from one address can be taken for an attack. Older ones don't know the option.
	const calm = "PerSourcePenalties no\n"
	if err := w.write("sshd_config", lines+calm); err != nil {
		return err
	}
	if exec.CommandContext(ctx, w.b.sshd, "-t", "-f", w.path("sshd_config")).Run() != nil {
		if err := w.write("sshd_config", lines); err != nil {
			return err
		}
	}
	for range 20 {
		ln, err := net.Listen("tcp", loopback(0))
		if err != nil {
			return err
		}
		w.port = ln.Addr().(*net.TCPAddr).Port
		ln.Close()
		log, err := os.Create(w.path("sshd.log"))
		if err != nil {
			return err
		}
		cmd := w.command(w.b.sshd, "-D", "-e", "-f", w.path("sshd_config"), "-p", fmt.Sprint(w.port))
		cmd.Stderr = log
		w.sshd, err = start(cmd)
		log.Close()
		if err != nil {
			return err
		}
		// A thousand sessions of one connection need more files than many a shell's limit allows.
		var limit unix.Rlimit
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
			limit.Cur = limit.Max
			unix.Prlimit(w.sshd.pid(), unix.RLIMIT_NOFILE, &limit, nil) // else the case with so many fails and says so
		}
		if answers(ctx, w.sshd, w.port) {
			return nil
		}
		w.sshd.kill() // somebody else took the port
	}
	text, _ := os.ReadFile(w.path("sshd.log"))
	return fmt.Errorf("sshd does not start: %s", bytes.TrimSpace(text))
}

// answers waits until a process speaks SSH at a port; false if it ends before.
func answers(ctx context.Context, p *proc, port int) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if c, err := net.Dial("tcp", loopback(port)); err == nil {
			c.SetDeadline(time.Now().Add(patience))
			b := make([]byte, 4)
			_, err = io.ReadFull(c, b)
			c.Close()
			if err == nil && string(b) == "SSH-" {
				return true
			}
		}
		select {
		case <-p.done:
			return false
		case <-ctx.Done():
			return false
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// command is a command in this world.
func (w *world) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = w.dir
	for k, v := range w.env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return cmd
}

// ssh is an ssh that goes one of the ways, with options and a command after -F.
func (w *world) ssh(by way, args ...string) *exec.Cmd {
	return w.command("ssh", append([]string{"-F", w.path(confName(by))}, args...)...)
}

// start starts a command. It ends with the world.
func (w *world) start(cmd *exec.Cmd) (*proc, error) {
	p, err := start(cmd)
	if err == nil {
		w.mu.Lock()
		w.procs = append(w.procs, p)
		w.mu.Unlock()
	}
	return p, err
}

// finish runs a command to its good end.
func (w *world) finish(ctx context.Context, cmd *exec.Cmd) (*proc, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*patience, fmt.Errorf("%s takes too long", cmd.Args[0]))
	defer cancel()
	p, err := w.start(cmd)
	if err != nil {
		return nil, err
	}
	return p, p.wait(ctx)
}

func (w *world) run(ctx context.Context, name string, args ...string) error {
	_, err := w.finish(ctx, w.command(name, args...))
	return err
}

// timed is how many milliseconds a command takes.
func (w *world) timed(ctx context.Context, cmd *exec.Cmd) (float64, error) {
	p, err := w.finish(ctx, cmd)
	if err != nil {
		return 0, err
	}
	return float64(p.took) / float64(time.Millisecond), nil
}

// logins is how often somebody logged in at the server.
func (w *world) logins() int {
	text, err := os.ReadFile(w.path("sshd.log"))
	if err != nil {
		return 0
	}
	return bytes.Count(text, []byte("Accepted publickey"))
}

// masterPID asks for the pid of muxproxy's master; 0 if there is none.
func (w *world) masterPID(ctx context.Context) (int, error) {
	cmd := w.command(filepath.Join(w.b.bin, "muxproxy"), "status", "--json")
	var out bytes.Buffer
	cmd.Stdout = &out
	if _, err := w.finish(ctx, cmd); err != nil {
		return 0, err
	}
	var status struct {
		PID int `json:"pid"`
	}
	err := json.Unmarshal(out.Bytes(), &status)
	return status.PID, err
}

// session is a running ssh whose streams are ours.
type session struct {
	*proc
	in  *os.File
	out *os.File
	buf *bufio.Reader // of out
}

// open starts an ssh whose remote command's first line is "ready", and waits for that.
func (w *world) open(ctx context.Context, by way, args ...string) (*session, error) {
	cmd := w.ssh(by, args...)
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		inR.Close()
		inW.Close()
		return nil, err
	}
	cmd.Stdin, cmd.Stdout = inR, outW
	p, err := w.start(cmd)
	inR.Close()
	outW.Close()
	if err != nil {
		inW.Close()
		outR.Close()
		return nil, err
	}
	s := &session{p, inW, outR, bufio.NewReader(outR)}
	stop := context.AfterFunc(ctx, func() { outR.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	outR.SetReadDeadline(time.Now().Add(patience))
	line, err := s.buf.ReadString('\n')
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == nil && strings.TrimSpace(line) != "ready" {
		err = fmt.Errorf("%q instead of a beginning", line)
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("%s: no session: %w: %s", by, err, s.errs)
	}
	return s, nil
}

// close ends it.
func (s *session) close() {
	s.in.Close()
	s.out.Close()
	s.kill()
}

// hold opens a session that keeps the way's connection up; plain ssh has none to share. It stays until the world ends.
func (w *world) hold(ctx context.Context, by way) (*session, error) {
	switch by {
	case plain:
		return nil, nil
	case controlMaster:
		s, err := w.open(ctx, by, "-o", "ControlMaster=yes", "box", "echo ready; exec cat")
		if err != nil {
			return nil, err
		}
		// Without it, an ssh would log in on its own and say nothing.
		_, err = w.finish(ctx, w.ssh(by, "-O", "check", "box"))
		w.keep(s)
		return s, err
	}
	s, err := w.open(ctx, by, "box", "echo ready; exec cat")
	if err == nil {
		w.keep(s)
	}
	return s, err
}

func (w *world) keep(s *session) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held = append(w.held, s)
}

// holdAll is hold for several ways.
func (w *world) holdAll(ctx context.Context, ways []way) (map[way]*session, error) {
	held := map[way]*session{}
	for _, by := range ways {
		s, err := w.hold(ctx, by)
		if err != nil {
			return nil, err
		}
		held[by] = s
	}
	return held, nil
}

// turns calls f for each way, round by round, each round beginning with another one.
func (b *bench) turns(rounds int, ways []way, f func(round int, by way) error) error {
	for r := range rounds {
		for i := range ways {
			by := ways[(i+r)%len(ways)]
			b.say.step("%s: round %d of %d, %s", b.current, r+1, rounds, by)
			if err := f(r, by); err != nil {
				return err
			}
		}
	}
	return nil
}

// close ends everything that runs in the world, and removes its files.
func (w *world) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	w.mu.Lock()
	procs := slices.Clone(w.procs)
	w.mu.Unlock()
	for _, p := range procs {
		p.kill()
	}
	var errs []error
	if w.env != nil {
		errs = append(errs, w.endMaster(ctx))
	}
	if w.sshd != nil {
		below := descendants(w.sshd.pid())
		w.sshd.kill()
		if w.link != nil {
			errs = append(errs, w.link.Close())
		}
		endAll(below)
	}
	errs = append(errs, os.RemoveAll(w.dir))
	return errors.Join(errs...)
}

// endMaster stops muxproxy's master, if there is one: also one that crashed meanwhile and was started anew.
func (w *world) endMaster(ctx context.Context) error {
	pid, err := w.masterPID(ctx)
	if err != nil || pid == 0 {
		return err
	}
	err = w.run(ctx, filepath.Join(w.b.bin, "muxproxy"), "master", "stop")
	if err != nil {
		unix.Kill(pid, unix.SIGKILL)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.procs = nil
	return err
}

// endAll waits for processes to end, and kills those that don't: each is still the one it was.
func endAll(procs map[int]stat) {
	deadline := time.Now().Add(3 * time.Second)
	for pid, was := range procs {
		for {
			is, err := readStat(pid)
			if err != nil || is.start != was.start {
				break
			}
			if time.Now().After(deadline) {
				unix.Kill(pid, unix.SIGKILL)
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}
