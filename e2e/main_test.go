//go:build linux

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/plugin"
)

var (
	plainMode = os.Getenv("E2E_PLAIN") == "1"
	bigMode   = os.Getenv("E2E_BIG") == "1"
	raceBuild = os.Getenv("E2E_RACE") != "0" && !bigMode

	binDir   string // where muxproxy and muxproxyd are; "" in plain mode
	me       string // the user who runs the tests, locally and remotely
	hostKeys []hostKey
	sshdPath string
	// sshdExtra are options that only some versions of sshd know.
	sshdExtra []string
	before    map[int][]string // processes when the tests began
	noTTY     string           // why sshd can't give this user a terminal; "": it can
)

// hostKey is one key of every sshd here. Making an RSA key takes longer than most tests, so all worlds share them.
type hostKey struct {
	kind    string
	private []byte // OpenSSH's format
	public  ssh.PublicKey
}

// TestMain builds the programs, or plays one of the helper processes.
func TestMain(m *testing.M) {
	if os.Getenv(plugin.CookieKey) != "" {
		plugin.Serve(&judge{})
	}
	if name := os.Getenv("E2E_HELPER"); name != "" {
		os.Exit(helper(name, os.Args[1:]))
	}
	// Most tests wait for processes more than they compute.
	if parallel := flag.Lookup("test.parallel"); runtime.GOMAXPROCS(0) < 4 {
		if err := parallel.Value.Set("4"); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			os.Exit(1)
		}
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "mxbin")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := prepare(dir); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	before = processes()
	status := m.Run()
	for _, pid := range ours() {
		if !gone(pid) {
			fmt.Fprintf(os.Stderr, "e2e: process %d outlived its test: %q\n", pid, processes()[pid])
			kill9(pid)
			status = 1
		}
	}
	return status
}

func prepare(dir string) error {
	u, err := user.Current()
	if err != nil {
		return err
	}
	me = u.Username
	// Programs are looked for where distributions put sshd, which is not on everyone's PATH.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	for _, p := range []string{"ssh", "scp", "sftp", "rsync", "git"} {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("these tests need %s: %w", p, err)
		}
	}
	// sshd starts itself again for each connection and wants an absolute path for that.
	if sshdPath, err = exec.LookPath("sshd"); err != nil {
		return fmt.Errorf("these tests need sshd (package openssh-server): %w", err)
	}
	if os.Geteuid() == 0 {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // sshd's privilege separation directory
			return err
		}
	}
	if hostKeys, err = makeHostKeys(); err != nil {
		return err
	}
	if err := probeSSHD(dir); err != nil {
		return err
	}
	if noTTY, err = probeTTY(); err != nil {
		return err
	}
	if plainMode {
		return nil
	}
	if given := os.Getenv("E2E_BIN"); given != "" {
		binDir, err = filepath.Abs(given)
		return err
	}
	binDir = dir
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	args := []string{"build", "-buildvcs=false", "-o", dir + "/"}
	if raceBuild {
		args = append(args, "-race")
	}
	args = append(args, "../cmd/muxproxy", "../cmd/muxproxyd")
	start := time.Now()
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	fmt.Fprintf(os.Stderr, "e2e: built in %.1f s, race detector: %v\n", time.Since(start).Seconds(), raceBuild)
	return nil
}

func makeHostKeys() ([]hostKey, error) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	var keys []hostKey
	for kind, k := range map[string]any{"ed25519": ed, "ecdsa": ec, "rsa": rs} {
		priv, pub, err := marshalKey(k)
		if err != nil {
			return nil, err
		}
		keys = append(keys, hostKey{kind, priv, pub})
	}
	return keys, nil
}

// marshalKey returns a private key in OpenSSH's format, and its public half.
func marshalKey(k any) ([]byte, ssh.PublicKey, error) {
	block, err := ssh.MarshalPrivateKey(k, "e2e")
	if err != nil {
		return nil, nil, err
	}
	signer, err := ssh.NewSignerFromKey(k)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(block), signer.PublicKey(), nil
}

// probeSSHD finds out which of the newer options this sshd knows.
func probeSSHD(dir string) error {
	key := filepath.Join(dir, "probe_key")
	if err := os.WriteFile(key, hostKeys[0].private, 0o600); err != nil {
		return err
	}
	conf := filepath.Join(dir, "probe_config")
	// Since 9.8, a rejected key costs the address of all tests some seconds.
	for _, option := range []string{"PerSourcePenalties no"} {
		if err := os.WriteFile(conf, []byte("HostKey "+key+"\n"+option+"\n"), 0o600); err != nil {
			return err
		}
		if exec.Command(sshdPath, "-t", "-f", conf).Run() == nil {
			sshdExtra = append(sshdExtra, option)
		}
	}
	return nil
}

// probeTTY finds out whether an sshd that is not root's can give its user a terminal: it has to belong to group tty
// from the start (pty_setowner in OpenSSH's sshpty.c).
func probeTTY() (string, error) {
	if os.Geteuid() == 0 {
		return "", nil
	}
	group, err := user.LookupGroup("tty")
	if err != nil {
		return "", nil // then sshd asks for the user's own group
	}
	master, slave, err := pty.Open()
	if err != nil {
		return "", err
	}
	defer master.Close()
	defer slave.Close()
	fi, err := slave.Stat()
	if err != nil {
		return "", err
	}
	if gid := fi.Sys().(*syscall.Stat_t).Gid; fmt.Sprint(gid) != group.Gid {
		return fmt.Sprintf("terminals here belong to group %d, so sshd can't give one to a user; mount /dev/pts with gid=%s", gid, group.Gid), nil
	}
	return "", nil
}

// remoteTTY reports whether sessions can have a terminal, and says in the log why not.
func remoteTTY(t testing.TB) bool {
	t.Helper()
	if noTTY != "" {
		t.Log(noTTY)
	}
	return noTTY == ""
}

// ours are the living processes of the programs under test.
func ours() []int {
	var pids []int
	for pid, args := range processes() {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		switch {
		case err == nil:
			if strings.HasPrefix(exe, binDir+"/") && binDir != "" {
				pids = append(pids, pid)
			}
		case filepath.Base(args[0]) == "muxproxyd" && before[pid] == nil && isMine(pid):
			// A master is not dumpable, so only root may see what it executes.
			pids = append(pids, pid)
		}
	}
	return pids
}

// isMine tells whether a process runs as this user. Its folder in /proc is root's if it is not dumpable.
func isMine(pid int) bool {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := strings.Cut(string(text), "\nUid:\t")
	uid, _, _ := strings.Cut(rest, "\t")
	return uid == strconv.Itoa(os.Getuid())
}

// processes returns the arguments of every process that has any, by process id. They are readable for everyone, unlike
// the executable and the environment of a process that is not dumpable.
func processes() map[int][]string {
	all := map[int][]string{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return all
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || len(line) == 0 {
			continue
		}
		all[pid] = strings.Split(string(bytes.TrimRight(line, "\x00")), "\x00")
	}
	return all
}
