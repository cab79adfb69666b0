//go:build linux

package e2e

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/crypto/ssh"
)

// python is Debian's: another one on PATH need not have the modules.
const python = "/usr/bin/python3"

// otherClient is an SSH client that is not OpenSSH. It does not read ssh_config: what the host needs, the bridge
// takes from its own -F.
type otherClient struct {
	name string
	// prepare writes what the client wants to have in files; nil: nothing.
	prepare func(w *world, keys []ssh.PublicKey)
	// args runs a command at the other end of proxy, where a server with one of these keys is.
	args func(w *world, proxy string, keys []ssh.PublicKey, command string) []string
}

// otherClients know no host certificates, or are not told of the CA: each sees the plain key.
var otherClients = []otherClient{
	{
		name: "plink",
		args: func(w *world, proxy string, keys []ssh.PublicKey, command string) []string {
			args := []string{"plink", "-ssh", "-batch", "-noagent", "-proxycmd", proxy, "-l", me}
			for _, k := range keys {
				args = append(args, "-hostkey", ssh.FingerprintSHA256(k))
			}
			return append(args, "box", command) // it takes no proxy to a loopback address
		},
	},
	{
		name: "dbclient",
		// It reads only ~/.ssh/known_hosts, without ports.
		prepare: func(w *world, keys []ssh.PublicKey) {
			var known strings.Builder
			for _, k := range keys {
				fmt.Fprintf(&known, "127.0.0.1 %s", ssh.MarshalAuthorizedKey(k))
			}
			w.write("home/.ssh/known_hosts", known.String())
		},
		args: func(w *world, proxy string, _ []ssh.PublicKey, command string) []string {
			return []string{"dbclient", "-J", proxy, "-l", me, "-p", fmt.Sprint(w.link.port()), "127.0.0.1", command}
		},
	},
	{
		name: "paramiko", // never tries "none"
		args: func(w *world, proxy string, _ []ssh.PublicKey, command string) []string {
			return paramikoArgs(w, proxy, "key:"+w.path("stranger"), command)
		},
		prepare: func(w *world, keys []ssh.PublicKey) {
			writeKnown(w, keys)
			_, key, err := ed25519.GenerateKey(rand.Reader)
			if err != nil {
				w.t.Fatal(err)
			}
			private, _, err := marshalKey(key)
			if err != nil {
				w.t.Fatal(err)
			}
			w.write("stranger", string(private)) // the server does not know it
		},
	},
	{
		name:    "asyncssh",
		prepare: writeKnown,
		args: func(w *world, proxy string, _ []ssh.PublicKey, command string) []string {
			return []string{python, testdata(w.t, "asyncssh_client.py"), proxy, "127.0.0.1", fmt.Sprint(w.link.port()), me,
				w.path("known_master"), command}
		},
	},
	{
		name: "libssh",
		prepare: func(w *world, keys []ssh.PublicKey) {
			writeKnown(w, keys)
			cc := exec.Command("gcc", "-Wall", "-Werror", "-o", w.path("libssh_client"), testdata(w.t, "libssh_client.c"), "-lssh")
			if out, err := cc.CombinedOutput(); err != nil {
				w.t.Fatalf("%q: %v\n%s", cc.Args, err, out)
			}
		},
		args: func(w *world, proxy string, _ []ssh.PublicKey, command string) []string {
			return []string{w.path("libssh_client"), proxy, "127.0.0.1", fmt.Sprint(w.link.port()), me, w.path("known_master"), command}
		},
	},
}

func paramikoArgs(w *world, proxy, login, command string) []string {
	return []string{python, testdata(w.t, "paramiko_client.py"), proxy, "127.0.0.1", fmt.Sprint(w.link.port()), me,
		w.path("known_master"), login, command}
}

func writeKnown(w *world, keys []ssh.PublicKey) {
	var known strings.Builder
	for _, k := range keys {
		fmt.Fprintf(&known, "[127.0.0.1]:%d %s", w.link.port(), ssh.MarshalAuthorizedKey(k))
	}
	w.write("known_master", known.String())
}

func testdata(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// proxy is the command line of a bridge that another program than ssh starts.
func (w *world) proxy() string {
	return fmt.Sprintf("%s/muxproxy -F %s %s@127.0.0.1:%d box", binDir, w.conf, me, w.link.port())
}

// plainKeys are what `muxproxy host-key` prints for clients without certificates.
func (w *world) plainKeys() []ssh.PublicKey {
	w.t.Helper()
	r := w.run(spec{args: []string{binDir + "/muxproxy", "host-key"}, null: true})
	var keys []ssh.PublicKey
	for line := range strings.Lines(r.out) {
		if strings.HasPrefix(line, "@cert-authority ") {
			continue
		}
		k, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
		if err != nil {
			w.t.Fatalf("%q: %v", line, err)
		}
		keys = append(keys, k)
	}
	if r.status != 0 || len(keys) == 0 {
		w.t.Fatalf("muxproxy host-key: status %d: %s%s", r.status, r.out, r.err)
	}
	return keys
}

func TestOtherClientsShareTheConnection(t *testing.T) {
	for _, c := range otherClients {
		t.Run(c.name, func(t *testing.T) {
			forPipes(t, func(t *testing.T, w *world) {
				if !muxproxyOnly(t) {
					return
				}
				holder := w.hold()
				keys := w.plainKeys()
				if c.prepare != nil {
					c.prepare(w, keys)
				}
				for _, status := range []int{0, 7} {
					command := fmt.Sprintf("cat; echo to stderr >&2; exit %d", status)
					r := w.run(spec{args: c.args(w, w.proxy(), keys, command), stdin: strings.NewReader("to stdout\n")})
					want(t, r, status, "to stdout\n")
					if !strings.Contains(r.err, "to stderr\n") {
						t.Errorf("stderr is %q", r.err)
					}
				}
				holder.echo("still here")
				holder.release()
				w.connections(1)
			})
		})
	}
}

func TestOtherClientsMoveBytesExactly(t *testing.T) {
	const size = 1 << 20
	data := make([]byte, size)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	for _, c := range otherClients {
		t.Run(c.name, func(t *testing.T) {
			forPipes(t, func(t *testing.T, w *world) {
				if !muxproxyOnly(t) {
					return
				}
				holder := w.hold()
				keys := w.plainKeys()
				if c.prepare != nil {
					c.prepare(w, keys)
				}
				file := w.path("copy")
				r := w.run(spec{args: c.args(w, w.proxy(), keys, "cat >"+file), stdin: bytes.NewReader(data)})
				want(t, r, 0, "")
				if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, data) {
					t.Errorf("up: %d bytes are not the %d that were sent (%v)", len(got), size, err)
				}
				down := spec{args: c.args(w, w.proxy(), keys, "cat "+file), stdin: strings.NewReader("")}
				if c.name == "dbclient" {
					// Into a file, which is never full. When the CLOSE of its last channel comes while its stdout takes no more,
					// dbclient 2022.83 writes the rest, answers the CLOSE and then waits for a packet or for the next key
					// exchange, in 8 hours (session_loop in its common-session.c looks for cli_finished before the channel is
					// removed by channelio). It does so with a plain sshd, too.
					f, err := os.Create(w.path("down"))
					if err != nil {
						t.Fatal(err)
					}
					defer f.Close()
					down.stdout = f
				}
				r = w.run(down)
				if down.stdout != nil {
					r.out = w.read("down")
				}
				if r.status != 0 || r.out != string(data) {
					t.Errorf("down: status %d, %d bytes are not the %d that were sent: %s", r.status, len(r.out), size, tail(r.err))
				}
				holder.release()
				w.connections(1)
			})
		})
	}
}

// A client that knows the host keys of another master, or the server's own, must not get in.
func TestOtherClientsCheckTheHostKey(t *testing.T) {
	for _, c := range otherClients {
		t.Run(c.name, func(t *testing.T) {
			forPipes(t, func(t *testing.T, w *world) {
				if !muxproxyOnly(t) {
					return
				}
				holder := w.hold()
				var keys []ssh.PublicKey
				for _, k := range hostKeys {
					keys = append(keys, k.public)
				}
				if c.prepare != nil {
					c.prepare(w, keys)
				}
				r := w.run(spec{args: c.args(w, w.proxy(), keys, "echo in"), stdin: strings.NewReader("")})
				if r.status == 0 || strings.Contains(r.out, "in") {
					t.Errorf("status %d, stdout %q, stderr %q", r.status, r.out, r.err)
				}
				holder.release()
			})
		})
	}
}

// A client that can only send a password answers the server's question with it: paramiko and dbclient as they are without a key,
// plink by -pw. A second one then needs none.
func TestAPasswordOfAnotherClientAnswersTheServer(t *testing.T) {
	const secret = "correct horse"
	for _, c := range []struct {
		name string
		// args runs a command; password is what the client has been given.
		args func(w *world, keys []ssh.PublicKey, password, command string) ([]string, []string)
	}{
		{"paramiko", func(w *world, keys []ssh.PublicKey, password, command string) ([]string, []string) {
			writeKnown(w, keys)
			return paramikoArgs(w, w.proxy(), "password:"+password, command), nil
		}},
		{"plink", func(w *world, keys []ssh.PublicKey, password, command string) ([]string, []string) {
			args := otherClients[0].args(w, w.proxy(), keys, command)
			return slices.Insert(args, 1, "-pw", password), nil
		}},
		{"dbclient", func(w *world, keys []ssh.PublicKey, password, command string) ([]string, []string) {
			otherClients[1].prepare(w, keys)
			return otherClients[1].args(w, w.proxy(), nil, command), []string{"DROPBEAR_PASSWORD=" + password}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			forPipes(t, func(t *testing.T, w *world) {
				if !muxproxyOnly(t) {
					return
				}
				var tries atomic.Int32
				addr, key := shellServer(t, &ssh.ServerConfig{
					PasswordCallback: func(_ ssh.ConnMetadata, got []byte) (*ssh.Permissions, error) {
						tries.Add(1)
						if string(got) != secret {
							return nil, errors.New("wrong password")
						}
						return nil, nil
					},
				})
				w.link.lead(addr)
				w.write("known_hosts", fmt.Sprintf("[127.0.0.1]:%d %s", w.link.port(), ssh.MarshalAuthorizedKey(key)))
				// There is a person, who uses a client that does not know keyboard-interactive.
				w.write("ssh_config", strings.Replace(w.read("ssh_config"), "BatchMode yes", "BatchMode no", 1))
				// The master's host key is known only when there is a master.
				if start := w.run(spec{args: []string{binDir + "/muxproxy", "master", "start"}, null: true}); start.status != 0 {
					t.Fatalf("muxproxy master start: %d: %s", start.status, start.err)
				}
				keys := w.plainKeys()
				run := func(password, command string) spec {
					args, env := c.args(w, keys, password, command)
					return spec{args: args, env: append(slices.Clone(w.env), env...)}
				}
				if r := w.run(run("wrong", "echo in")); r.status == 0 || strings.Contains(r.out, "in\n") {
					t.Errorf("with a wrong password: status %d, stdout %q, stderr %q", r.status, r.out, r.err)
				}
				first := w.start(run(secret, "echo begun; cat"))
				first.expect("begun\n")
				asked := tries.Load()
				want(t, w.run(run("none is needed", "echo second")), 0, "second\n")
				if tries.Load() != asked {
					t.Errorf("the server was asked again")
				}
				first.echo("still here")
				first.in.Close()
				want(t, first.wait(patience), 0, "begun\nstill here\n")
			})
		})
	}
}

// ansible runs `command: id -u` on twenty aliases of the one sshd, all at once.
func (w *world) ansible(env ...string) result {
	w.t.Helper()
	const hosts = 20
	var aliases, inventory strings.Builder
	for i := range hosts {
		fmt.Fprintf(&aliases, " h%02d", i)
		fmt.Fprintf(&inventory, "h%02d\n", i)
	}
	conf := w.write("ansible_ssh_config", strings.Replace(w.read("ssh_config"), "Host box", "Host box"+aliases.String(), 1))
	env = append(env,
		"ANSIBLE_HOME="+w.path("ansible"), "ANSIBLE_LOCAL_TEMP="+w.path("ansible/tmp"), "ANSIBLE_REMOTE_TEMP="+w.path("ansible/remote"),
		"ANSIBLE_SSH_CONTROL_PATH_DIR="+w.path("cp"), "ANSIBLE_SSH_COMMON_ARGS=-F "+conf,
		"ANSIBLE_PYTHON_INTERPRETER="+python, "ANSIBLE_TIMEOUT=60", "ANSIBLE_NOCOLOR=1", "LC_ALL=C.UTF-8",
		// A terminal is not what this is about, and not every sshd here can give one.
		"ANSIBLE_SSH_USETTY=no",
	)
	return w.start(spec{
		args: []string{"ansible", "all", "-i", w.write("hosts", inventory.String()), "-f", fmt.Sprint(hosts), "-o",
			"-m", "command", "-a", "id -u"},
		env: append(slices.Clone(w.env), env...), null: true,
	}).wait(6 * patience)
}

func TestAnsible(t *testing.T) {
	check := func(t *testing.T, w *world, r result) {
		t.Helper()
		for i := range 20 {
			line := fmt.Sprintf("h%02d | CHANGED | rc=0 | (stdout) %d\n", i, os.Getuid())
			if !strings.Contains(r.out, line) {
				t.Errorf("no %q", line)
			}
		}
		if r.status != 0 || t.Failed() {
			t.Errorf("status %d\nstdout %s\nstderr %s", r.status, r.out, tail(r.err))
		}
		t.Logf("%v, %d TCP connections", r.took, w.link.count())
	}
	// Ansible's own default: ControlMaster=auto, ControlPersist=60s.
	t.Run("with its ControlPersist", func(t *testing.T) {
		forPipes(t, func(t *testing.T, w *world) {
			r := w.ansible()
			sockets, _ := filepath.Glob(w.path("cp/*"))
			if len(sockets) != 20 {
				t.Errorf("%d sockets of masters, not 20", len(sockets))
			}
			for _, s := range sockets {
				exit := w.run(spec{args: []string{"ssh", "-F", "none", "-S", s, "-O", "exit", "any"}, null: true})
				if exit.status != 0 {
					t.Errorf("ssh -O exit: %d: %s", exit.status, exit.err)
				}
			}
			check(t, w, r)
		})
	})
	t.Run("with ControlMaster=no", func(t *testing.T) {
		forPipes(t, func(t *testing.T, w *world) {
			holder := w.hold()
			check(t, w, w.ansible("ANSIBLE_SSH_ARGS=-o ControlMaster=no"))
			holder.release()
		})
	})
}

// goClient is a client of x/crypto/ssh, which asks for what ssh never does. Its bridge leads a session with a terminal of its
// own.
type goClient struct {
	*ssh.Client
	t      testing.TB
	bridge *exec.Cmd
	pty    *os.File
	said   *buffer // the standard error of a session
	in     io.Closer
}

// goClient starts one. Its session says what the person is told. It has to be closed.
func (w *world) goClient() *goClient {
	t := w.t
	t.Helper()
	leads, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	cmd := exec.Command(binDir+"/muxproxy", "-F", w.conf, fmt.Sprintf("%s@127.0.0.1:%d", me, w.link.port()), "box")
	cmd.Env, cmd.Dir, cmd.ExtraFiles = w.env, w.dir, []*os.File{tty}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 3}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &goClient{t: t, bridge: cmd, pty: leads, said: newBuffer()}
	stuck := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer stuck.Stop()
	conn, chans, reqs, err := ssh.NewClientConn(&stdio{in: in, out: out}, "box", &ssh.ClientConfig{
		User: me, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		t.Fatal(err)
	}
	c.Client = ssh.NewClient(conn, chans, reqs)
	session, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	session.Stderr = c.said
	if c.in, err = session.StdinPipe(); err == nil {
		err = session.Start("cat")
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		session.Wait()
		c.said.end()
	}()
	return c
}

// told ends the session and returns all that it said.
func (c *goClient) told() string {
	c.in.Close()
	c.said.expect("\x00", patience)
	return c.said.String()
}

func (c *goClient) close() {
	c.Close()
	c.bridge.Process.Kill()
	c.bridge.Wait()
	c.pty.Close()
}
