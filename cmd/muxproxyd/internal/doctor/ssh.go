package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/cmd/muxproxyd/internal/setup"
	"github.com/muxproxy/muxproxy/core/local"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/sshconfig"
)

// sshTime bounds a call of ssh; a Match exec can take long.
const sshTime = 30 * time.Second

// askSSH asks where the host leads, or, without one, a host that the included file is for.
func (d *doctor) askSSH(ctx context.Context) {
	d.sample = d.Target.Alias
	if d.Host == "" {
		hosts, _ := setup.Hosts(d.Dirs)
		d.sample = setup.Samples(hosts)[0]
	}
	if d.SSH == "" {
		d.sshErr = errors.New("there is no ssh on PATH")
		return
	}
	ctx, cancel := context.WithTimeoutCause(ctx, sshTime, fmt.Errorf("no answer within %v (a Match exec?)", sshTime))
	defer cancel()
	d.config, d.sshErr = sshconfig.AsIs(ctx, d.SSH, d.args())
	_, d.leads = sshconfig.Leads(d.get("proxycommand"))
}

// environment looks at what this shell gives to an ssh.
func (d *doctor) environment(context.Context) {
	if v := d.Getenv("MUXPROXY_BYPASS"); v != "" && v != "0" {
		d.warn("unset MUXPROXY_BYPASS", "MUXPROXY_BYPASS is set: an ssh of this shell goes without muxproxy")
	}
	home := d.Getenv("HOME")
	if d.Config == "" && filepath.Clean(home) != filepath.Clean(d.Home) && !sameFile(home, d.Home) {
		d.warn("export HOME="+d.Home, "HOME is %s, but ssh reads its configuration in %s, the home directory in the password database",
			home, d.Home)
	}
	if !d.found {
		d.ok("HOME is %s", home)
	}
}

func sameFile(a, b string) bool {
	fa, err1 := os.Stat(a)
	fb, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(fa, fb)
}

var opensshVersion = regexp.MustCompile(`^OpenSSH_(?:for_Windows_)?(\d+)\.(\d+)\S*`)

// sshVersion looks for what setup needs of ssh: Include, of 7.3.
func (d *doctor) sshVersion(ctx context.Context) {
	const mend = "install OpenSSH 7.3 or newer"
	if d.SSH == "" {
		d.fail(mend, "there is no ssh on PATH")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, sshTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, d.SSH, "-V").CombinedOutput()
	found := opensshVersion.FindStringSubmatch(string(out))
	if found == nil {
		line, _, _ := strings.Cut(string(out), "\n")
		d.warn(mend, "%s is not OpenSSH, as far as it says: %q (%v)", d.SSH, line, err)
		return
	}
	major, _ := strconv.Atoi(found[1]) // of digits
	minor, _ := strconv.Atoi(found[2])
	if major < 7 || major == 7 && minor < 3 {
		d.fail(mend, "%s is %s, which knows no Include", d.SSH, found[0])
		return
	}
	d.ok("%s is %s", d.SSH, found[0])
}

// sshConfig finds out whether ssh goes to muxproxy.
func (d *doctor) sshConfig(context.Context) {
	switch command := d.get("proxycommand"); {
	case d.sshErr != nil:
		d.fail("", "ssh does not take its configuration: %v", d.sshErr)
	case d.leads:
		d.ok("ssh %s goes through muxproxy", d.sample)
	case !none(d.get("proxyjump")):
		d.fail(d.setup(), "ssh %s does not go through muxproxy: see proxy_jump", d.sample)
	case none(command):
		d.fail(d.setup(), "ssh %s does not go through muxproxy: it has no ProxyCommand", d.sample)
	default:
		d.fail(d.setup(), "ssh %s does not go through muxproxy: its ProxyCommand is %q", d.sample, command)
	}
}

// setup is the command that leads ssh here for the host too.
func (d *doctor) setup() string {
	command := "muxproxy setup"
	if d.Config != "" {
		command += " -F " + shellQuote(d.Config)
	}
	hosts, found := setup.Hosts(d.Dirs)
	if !found || slices.Equal(hosts, []string{"*"}) {
		return command
	}
	if d.Host != "" && d.SSH != "" && !d.covered() {
		if i := slices.Index(hosts, "!"+d.sample); i >= 0 {
			hosts = slices.Delete(hosts, i, i+1)
		}
		hosts = append(hosts, d.sample)
	}
	for _, h := range hosts {
		command += " --host " + shellQuote(h)
	}
	return command
}

// covered reports whether the included file by itself is for the host.
func (d *doctor) covered() bool {
	ctx, cancel := context.WithTimeout(context.Background(), sshTime)
	defer cancel()
	options, err := sshconfig.AsIs(ctx, d.SSH, sshconfig.Args{
		Options: []string{"-F", filepath.Join(d.Dirs.Config, setup.FileName)}, Destination: d.sample,
	})
	_, ok := sshconfig.Leads(strings.Join(options["proxycommand"], ""))
	return err == nil && ok
}

func shellQuote(s string) string {
	if s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-:@+", r))
	}) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// proxyJump looks for one above muxproxy's line, which ssh takes instead: the first of both counts.
func (d *doctor) proxyJump(context.Context) {
	if jump := d.get("proxyjump"); !none(jump) {
		d.fail(d.setup(), "ProxyJump %s comes before muxproxy's lines, so ssh %s goes without it", jump, d.sample)
		return
	}
	d.ok("none comes before muxproxy's lines")
}

// controlMaster looks for a connection that ssh itself shares, on top of muxproxy's.
func (d *doctor) controlMaster(context.Context) {
	path, mode := d.get("controlpath"), d.get("controlmaster")
	switch {
	case none(path):
		d.ok("ssh shares nothing by itself")
	case isSocket(path):
		d.warn("ssh "+d.fileOption()+"-O exit "+shellQuote(d.sample), "ssh's own ControlMaster listens at %s, and new ssh go to that", path)
	case mode != "no" && mode != "false" && mode != "":
		d.warn(d.setup(), "with ControlMaster %s and ControlPath %s ssh shares connections by itself, on top of muxproxy", mode, path)
	default:
		d.ok("ControlPath is %s, and nobody listens there", path)
	}
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&fs.ModeSocket != 0
}

func (d *doctor) fileOption() string {
	if d.Config == "" {
		return ""
	}
	return "-F " + shellQuote(d.Config) + " "
}

// fdpass compares --fdpass with ProxyUseFdpass.
func (d *doctor) fdpass(context.Context) {
	passes := slices.Contains(strings.Fields(d.get("proxycommand")), "--fdpass")
	wants := d.get("proxyusefdpass") == "yes"
	switch {
	case !d.leads:
		d.ok("nothing to see, since ssh does not go through muxproxy")
	case passes && !wants:
		d.warn("ProxyUseFdpass yes", "--fdpass without ProxyUseFdpass yes: a process stays beside each ssh")
	case wants && !passes:
		d.fail(d.setup(), "ProxyUseFdpass yes, but no --fdpass in the ProxyCommand: ssh waits for what muxproxy does not send")
	case passes:
		d.ok("muxproxy passes connections to ssh, and no process stays between")
	default:
		d.ok("muxproxy stays beside each ssh")
	}
}

// hostKey finds out whether ssh takes the master for the host: it shows a certificate of a CA whose public half is in a file
// that ssh_config has to name (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).
func (d *doctor) hostKey(context.Context) {
	if !d.leads {
		d.ok("nothing to see, since ssh does not go through muxproxy")
		return
	}
	file := filepath.Join(d.Dirs.State, paths.KnownHosts)
	isOurs := func(p string) bool { return filepath.Clean(p) == file || sameFile(p, file) }
	global := sshconfig.KnownHostsFiles(d.get("globalknownhostsfile"))
	user := sshconfig.KnownHostsFiles(d.get("userknownhostsfile"))
	line := "GlobalKnownHostsFile " + file + " /etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
	switch {
	case slices.ContainsFunc(global, isOurs):
	case slices.ContainsFunc(user, isOurs):
		d.warn(line, "UserKnownHostsFile names %s: that ends UpdateHostKeys, and another -o UserKnownHostsFile takes it away; "+
			"the place for it is GlobalKnownHostsFile", file)
	default:
		d.fail(line, "ssh_config lacks the line that has ssh trust the master: GlobalKnownHostsFile is %s, without %s; "+
			"ssh turns the host key down (REMOTE HOST IDENTIFICATION HAS CHANGED)", strings.Join(global, " "), file)
	}
	if err := local.Check(d.get("hostkeyalgorithms")); err != nil {
		d.fail("HostKeyAlgorithms +"+ecdsaCert, "%v", err)
	} else if list := d.get("casignaturealgorithms"); list != "" && !signs(d.get("hostkeyalgorithms"), list) {
		d.fail("CASignatureAlgorithms +"+ecdsa, "CASignatureAlgorithms %s leaves out that of the master's CA", list)
	}
	if !d.found {
		d.ok("ssh trusts what the master writes into %s", file)
	}
}

const (
	ecdsa     = "ecdsa-sha2-nistp256"
	ecdsaCert = "ecdsa-sha2-nistp256-cert-v01@openssh.com"
)

// signs reports whether ssh takes the CA's signature: the certificate that a client gets is the first of these that it
// takes, and its CA is of the same type.
func signs(hostKey, ca string) bool {
	offers, takes := strings.Split(hostKey, ","), strings.Split(ca, ",")
	for _, t := range []struct {
		certs, cas []string
	}{
		{[]string{ecdsaCert}, []string{ecdsa}},
		{[]string{"ssh-ed25519-cert-v01@openssh.com"}, []string{"ssh-ed25519"}},
		{[]string{"rsa-sha2-256-cert-v01@openssh.com", "rsa-sha2-512-cert-v01@openssh.com"}, []string{"rsa-sha2-256", "rsa-sha2-512"}},
	} {
		if slices.ContainsFunc(t.certs, func(c string) bool { return slices.Contains(offers, c) }) {
			return slices.ContainsFunc(t.cas, func(c string) bool { return slices.Contains(takes, c) })
		}
	}
	return true // not known
}

// target shows what the master will be told about the host, as it asks for it.
func (d *doctor) target(ctx context.Context) {
	switch {
	case d.Host == "":
		d.ok("no HOST was given")
		return
	case d.sshErr != nil:
		d.ok("nothing to see, since ssh says nothing")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, sshTime)
	defer cancel()
	req := sshconfig.Request{Args: d.args(), SSH: d.SSH}
	r, err := sshconfig.Run(ctx, req)
	if err == nil {
		_, err = sshconfig.Hops(ctx, req, r)
	}
	if err != nil {
		d.fail("", "the master can't find out how to reach %s: %v", d.sample, err)
		return
	}
	// ssh takes the first line of these, which is setup's; the master leaves that one out.
	reads := sshconfig.KnownHostsFiles(d.get("globalknownhostsfile"))
	for i, p := range reads {
		if strings.HasPrefix(p, "~/") {
			reads[i] = d.Home + p[1:]
		}
	}
	if list := r.All("globalknownhostsfile"); d.leads && slices.ContainsFunc(list, func(p string) bool { return !slices.Contains(reads, p) }) {
		d.warn("GlobalKnownHostsFile "+strings.Join(append([]string{filepath.Join(d.Dirs.State, paths.KnownHosts)}, list...), " "),
			"GlobalKnownHostsFile %s counts for the master, but not for an ssh with MUXPROXY_BYPASS=1; above muxproxy's Include the line "+
				"below does for both", strings.Join(list, " "))
	}
	t := d.Target
	t.User, t.Host = r.Get("user"), strings.Trim(r.Get("hostname"), "[]")
	if port, err := strconv.ParseUint(r.Get("port"), 10, 16); err == nil {
		t.Port = uint16(port)
	}
	way := ""
	if jump := r.Get("proxyjump"); !none(jump) {
		way = ", by way of " + jump
	} else if command := r.Get("proxycommand"); !none(command) {
		way = ", by the ProxyCommand " + command
	}
	if d.Policy != nil {
		for _, part := range d.Policy.Show(t) {
			if part.What == "share" && part.Value == "false" {
				d.warn("", "policy says share = false of %s (%s): ssh goes there by itself", t, part.Pos)
				return
			}
			if part.What == "via" && part.Pos != "" {
				way = ", by way of " + part.Value + " (" + part.Pos + ")"
			}
		}
	}
	d.ok("the master logs in to %s%s", t, way)
}
