//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// optionCase is an ssh_config and how ssh ends with it.
type optionCase struct {
	option string
	lines  string   // before those that let ssh in; placeholders are replaced
	args   []string // before the host; nil: none
	host   string   // "": box
	env    []string
	before func(w *world)
	status int    // 0, then the session says "in"; or 255
	says   string // instead of "in"
}

const (
	in  = 0
	out = 255
)

// Every option that decides whom ssh reaches, whether it trusts him and how it logs in has its effect through muxproxy
// too: each is shown letting ssh in, and keeping it out.
func TestOptionsDecideAsInPlainSSH(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		_, second := w.newKey("second") // allowed nowhere by itself
		w.newKey("agents")
		w.allow(w.read("agents.pub"))
		agent := w.agentWith("agent.sock", "agents")
		w.newKey("ca")
		w.tool("ssh-keygen", "-q", "-s", w.path("ca"), "-I", "e2e", "-n", me, w.path("second.pub"))
		must(t, os.Rename(w.path("second-cert.pub"), w.path("certificate.pub")))
		w.write("keys_of_"+me, w.read("id"))
		w.write("public_only.pub", w.read("agents.pub"))
		w.write("empty", "")
		w.write("broken", "nonsense\n")
		w.write("included", "IdentityFile "+w.path("id")+"\n")
		w.write("included_wrong", "IdentityFile "+w.path("second")+"\n")
		picky := w.sshdAlso("127.0.0.1", "Ciphers aes256-ctr", "MACs hmac-sha2-256", "KexAlgorithms ecdh-sha2-nistp384",
			"TrustedUserCAKeys "+w.path("ca.pub"))
		w.append("known_hosts", knownHosts(picky))
		impatient := w.sshdAlso("127.0.0.1", "MaxAuthTries 2")
		w.append("known_hosts", knownHosts(impatient))
		for _, k := range []string{"wrong1", "wrong2", "wrong3"} {
			w.newKey(k)
		}
		crowded := w.agentWith("crowded.sock", "wrong1", "wrong2", "wrong3", "agents")
		six := w.sshdAlso("::1")
		late := lateServer(t, loopback(w.sshd), 3*time.Second)
		w.append("known_hosts", knownHosts(late))
		name := fmt.Sprintf("[127.0.0.1]:%d ", w.sshd)
		w.write("one_type", name+publicKey("ed25519")+"\n")
		w.write("of_six", fmt.Sprintf("[::1]:%d %s\n", six, publicKey("ed25519")))
		w.write("alias_only", "some-alias "+publicKey("ed25519")+"\n")
		w.write("wrong", name+second)
		w.write("kh_127.0.0.1", w.read("known_hosts"))
		w.write("revoked", publicKey("ed25519")+"\n"+publicKey("ecdsa")+"\n"+publicKey("rsa")+"\n")
		w.write("revoked_other", second)
		w.script("var_is_yes", "#!/bin/sh\ntest \"$E2E_VAR\" = yes\n")
		free := freePort(t)
		password, _ := w.passwordDoor("sesame")
		code := w.newDoor(&ssh.ServerConfig{
			KeyboardInteractiveCallback: func(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
				if answers, err := ask("", "", []string{"Code: "}, []bool{false}); err != nil || answers[0] != "sesame" {
					return nil, errors.New("wrong")
				}
				return nil, nil
			},
		})
		// It answers what the person at the terminal would; the other one is wrong the first time that an ssh asks it.
		sesame := []string{"SSH_ASKPASS=" + w.script("sesame", "#!/bin/sh\necho sesame\n"), "SSH_ASKPASS_REQUIRE=force"}
		atLast := []string{"SSH_ASKPASS=" + w.script("at_last", strings.ReplaceAll("#!/bin/sh\ntest -e {dir}/tried.$PPID && exec echo sesame\ntouch {dir}/tried.$PPID\necho wrong\n", "{dir}", w.dir)), "SSH_ASKPASS_REQUIRE=force"}
		// Names that only ssh knows. The one with an alias leads to a name that every machine has.
		// What stays without a canonical name is too long for any resolver to ask the network about it.
		long := strings.Repeat("x", 64)
		w.write("hosts", "127.0.0.1 localhost web.e2e.test\n127.0.0.1 "+long+".e2e.test\n127.0.0.1 x."+long+".e2e.test\n")
		names := []string{"LD_PRELOAD=libnss_wrapper.so", "NSS_WRAPPER_HOSTS={dir}/hosts"}
		w.write("of_long", "*.e2e.test "+publicKey("ed25519")+"\n")
		w.write("of_localhost", fmt.Sprintf("[localhost]:%d %s\n", w.sshd, publicKey("ed25519")))
		const (
			canonical = "CanonicalizeHostname yes\nCanonicalDomains e2e.test\n"
			// The host is another one, with a user, a port and a way of its own, once it has its canonical name.
			proxied = "HostName %h\nUserKnownHostsFile {dir}/of_long\nHost *.e2e.test\n  User {me}\n  Port 22\n  ProxyCommand nc 127.0.0.1 {port}"
			dialled = "HostName %h\nAddressFamily inet\nUserKnownHostsFile {dir}/of_localhost\nHost localhost\n  User {me}\n  Port {port}"
		)

		fill := strings.NewReplacer("{dir}", w.dir, "{me}", me, "{picky}", fmt.Sprint(picky), "{six}", fmt.Sprint(six),
			"{late}", fmt.Sprint(late), "{free}", fmt.Sprint(free), "{port}", fmt.Sprint(w.sshd), "{agent}", agent,
			"{impatient}", fmt.Sprint(impatient), "{crowded}", crowded,
			"{password}", fmt.Sprint(password.port()), "{code}", fmt.Sprint(code.port()), "{cert}", "ecdsa-sha2-nistp256-cert-v01@openssh.com")
		cases := []optionCase{
			{option: "HostName", lines: "HostName 127.0.0.1", host: "box.invalid"},
			{option: "HostName", lines: "HostName %h", host: "127.0.0.1"},
			{option: "HostName", lines: "HostName 127.0.0.2", status: out},
			{option: "Port", lines: "Port {port}"},
			{option: "Port", lines: "Port {free}", status: out},
			{option: "Port", lines: "Port {free}", args: []string{"-p", "{port}"}},
			{option: "Port", args: []string{"-oPort={free}"}, status: out},
			{option: "destination", host: "ssh://{me}@box:{port}",
				lines: "Port {free}\nUser e2e-nobody\nMatch user e2e-nobody\n  PubkeyAuthentication no"},
			{option: "destination", host: "ssh://{me}@box:{free}", status: out},
			{option: "User", lines: "User {me}"},
			{option: "User", lines: "User e2e-nobody", status: out},
			{option: "User", lines: "User e2e-nobody", args: []string{"-l", "{me}"}},
			{option: "User", lines: "User {me}", host: "e2e-nobody@box", status: out},
			{option: "IdentityFile", lines: "IdentityFile {dir}/id"},
			{option: "IdentityFile", lines: "IdentityFile {dir}/second", status: out},
			{option: "IdentityFile", lines: "IdentityFile {dir}/second\nIdentityFile {dir}/id"},
			{option: "IdentityFile", lines: "IdentityFile {dir}/missing", status: out},
			{option: "IdentityFile", lines: "IdentityFile {dir}/keys_of_%r"},
			{option: "IdentityFile", lines: "IdentityFile ${E2E_KEYS}/id", env: []string{"E2E_KEYS={dir}"}},
			{option: "IdentityFile", lines: "IdentityFile ${E2E_KEYS}/second", env: []string{"E2E_KEYS={dir}"}, status: out},
			{option: "IdentityFile", lines: "IdentityFile {dir}/second", args: []string{"-i", "{dir}/id"}},
			{option: "IdentityFile", lines: "IdentityFile none", args: []string{"-i", "{dir}/second"}, status: out},
			{option: "IdentityFile", lines: "IdentityFile none", args: []string{"-i", "id"}}, // in ssh's directory
			{option: "IdentitiesOnly", lines: "IdentityFile {dir}/second\nIdentityAgent {agent}\nIdentitiesOnly no"},
			{option: "IdentitiesOnly", lines: "IdentityFile {dir}/second\nIdentityAgent {agent}\nIdentitiesOnly yes", status: out},
			{option: "IdentitiesOnly", lines: "IdentityFile {dir}/public_only\nIdentityAgent {agent}\nIdentitiesOnly yes"},
			{option: "order of keys", lines: "Port {impatient}\nIdentityFile {dir}/public_only\nIdentitiesOnly no\nIdentityAgent {crowded}"},
			{option: "order of keys", lines: "Port {impatient}\nIdentityFile {dir}/id\nIdentitiesOnly no\nIdentityAgent {crowded}", status: out},
			{option: "order of keys", lines: "Port {impatient}\nIdentityFile {dir}/id\nIdentitiesOnly yes\nIdentityAgent {crowded}"},
			{option: "IdentityAgent", lines: "IdentityFile none\nIdentitiesOnly no\nIdentityAgent {agent}"},
			{option: "IdentityAgent", lines: "IdentityFile none\nIdentitiesOnly no\nIdentityAgent none",
				env: []string{"SSH_AUTH_SOCK={agent}"}, status: out},
			{option: "IdentityAgent", lines: "IdentityFile none\nIdentitiesOnly no\nIdentityAgent SSH_AUTH_SOCK",
				env: []string{"SSH_AUTH_SOCK={agent}"}},
			{option: "IdentityAgent", lines: "IdentityFile none\nIdentitiesOnly no\nIdentityAgent $E2E_AGENT",
				env: []string{"E2E_AGENT={agent}"}},
			{option: "IdentityAgent", lines: "IdentityFile none\nIdentitiesOnly no\nIdentityAgent $E2E_AGENT",
				env: []string{"E2E_AGENT={dir}/nothing"}, status: out},
			{option: "CertificateFile", lines: "Port {picky}\nIdentityFile {dir}/second\nCertificateFile {dir}/certificate.pub"},
			{option: "CertificateFile", lines: "Port {picky}\nIdentityFile {dir}/second", status: out},
			{option: "PreferredAuthentications", lines: "PreferredAuthentications password,publickey"},
			{option: "PreferredAuthentications", lines: "PreferredAuthentications password", status: out},
			{option: "PasswordAuthentication", lines: "Port {password}\nBatchMode no\nPasswordAuthentication yes", env: sesame, says: "in as " + me},
			{option: "PasswordAuthentication", lines: "Port {password}\nBatchMode no\nPasswordAuthentication no", env: sesame, status: out},
			{option: "KbdInteractiveAuthentication", lines: "Port {code}\nBatchMode no\nKbdInteractiveAuthentication yes", env: sesame, says: "in as " + me},
			{option: "KbdInteractiveAuthentication", lines: "Port {code}\nBatchMode no\nKbdInteractiveAuthentication no", env: sesame, status: out},
			{option: "BatchMode", lines: "Port {password}\nBatchMode no", env: sesame, says: "in as " + me},
			{option: "BatchMode", lines: "Port {password}\nBatchMode yes", env: sesame, status: out},
			{option: "NumberOfPasswordPrompts", lines: "Port {password}\nBatchMode no\nNumberOfPasswordPrompts 2", env: atLast, says: "in as " + me},
			{option: "NumberOfPasswordPrompts", lines: "Port {password}\nBatchMode no\nNumberOfPasswordPrompts 1", env: atLast, status: out},
			{option: "PubkeyAuthentication", lines: "PubkeyAuthentication yes"},
			{option: "PubkeyAuthentication", lines: "PubkeyAuthentication no", status: out},
			{option: "PubkeyAcceptedAlgorithms", lines: "PubkeyAcceptedAlgorithms ssh-ed25519"},
			{option: "PubkeyAcceptedAlgorithms", lines: "PubkeyAcceptedAlgorithms rsa-sha2-512", status: out},
			{option: "HostKeyAlias", lines: "UserKnownHostsFile {dir}/alias_only\nHostKeyAlias some-alias"},
			{option: "HostKeyAlias", lines: "UserKnownHostsFile {dir}/alias_only\nHostKeyAlias other-alias", status: out},
			{option: "HostKeyAlgorithms", lines: "UserKnownHostsFile {dir}/one_type\nHostKeyAlgorithms ssh-ed25519,{cert}"},
			{option: "HostKeyAlgorithms", lines: "UserKnownHostsFile {dir}/one_type\nHostKeyAlgorithms rsa-sha2-512,{cert}", status: out},
			{option: "StrictHostKeyChecking", lines: "UserKnownHostsFile {dir}/one_type\nStrictHostKeyChecking yes"},
			{option: "StrictHostKeyChecking", lines: "UserKnownHostsFile {dir}/empty\nStrictHostKeyChecking yes", status: out},
			{option: "StrictHostKeyChecking", lines: "UserKnownHostsFile {dir}/empty\nStrictHostKeyChecking ask", status: out},
			{option: "StrictHostKeyChecking", lines: "UserKnownHostsFile /dev/null\nStrictHostKeyChecking no"},
			{option: "StrictHostKeyChecking", lines: "UserKnownHostsFile /dev/null\nStrictHostKeyChecking accept-new"},
			{option: "StrictHostKeyChecking", lines: "UserKnownHostsFile {dir}/wrong\nStrictHostKeyChecking accept-new", status: out},
			{option: "UserKnownHostsFile", lines: "UserKnownHostsFile {dir}/empty {dir}/one_type"},
			{option: "UserKnownHostsFile", lines: "UserKnownHostsFile {dir}/empty", status: out},
			{option: "UserKnownHostsFile", lines: "UserKnownHostsFile none", status: out},
			{option: "UserKnownHostsFile", lines: "UserKnownHostsFile {dir}/kh_%h"},
			{option: "UserKnownHostsFile", args: []string{"-oUserKnownHostsFile={dir}/empty"}, status: out},
			{option: "UserKnownHostsFile", lines: "UserKnownHostsFile {dir}/empty", args: []string{"-oUserKnownHostsFile={dir}/one_type"}},
			{option: "GlobalKnownHostsFile", lines: "UserKnownHostsFile {dir}/empty\nGlobalKnownHostsFile {global} {dir}/one_type"},
			{option: "GlobalKnownHostsFile", lines: "UserKnownHostsFile {dir}/empty\nGlobalKnownHostsFile {global} {dir}/wrong", status: out},
			{option: "RevokedHostKeys", lines: "RevokedHostKeys {dir}/revoked_other"},
			{option: "RevokedHostKeys", lines: "RevokedHostKeys {dir}/revoked", status: out},
			{option: "VerifyHostKeyDNS", lines: "VerifyHostKeyDNS yes"},
			{option: "VerifyHostKeyDNS", lines: "VerifyHostKeyDNS yes\nUserKnownHostsFile {dir}/empty", status: out},
			{option: "NoHostAuthenticationForLocalhost", lines: "UserKnownHostsFile {dir}/empty\nNoHostAuthenticationForLocalhost yes"},
			{option: "NoHostAuthenticationForLocalhost", lines: "UserKnownHostsFile {dir}/empty\nNoHostAuthenticationForLocalhost no", status: out},
			{option: "AddressFamily", lines: "AddressFamily inet"},
			{option: "AddressFamily", lines: "AddressFamily inet6", status: out},
			{option: "AddressFamily", lines: "HostName ::1\nPort {six}\nUserKnownHostsFile {dir}/of_six\nAddressFamily inet6"},
			{option: "AddressFamily", lines: "HostName ::1\nPort {six}\nUserKnownHostsFile {dir}/of_six", args: []string{"-4"}, status: out},
			{option: "BindAddress", lines: "BindAddress 127.0.0.1"},
			{option: "BindAddress", lines: "BindAddress 192.0.2.1", status: out},
			{option: "BindInterface", lines: "BindInterface lo"},
			{option: "BindInterface", lines: "BindInterface e2e0", status: out},
			{option: "Ciphers", lines: "Port {picky}\nCiphers aes256-ctr"},
			{option: "Ciphers", lines: "Port {picky}\nCiphers aes128-ctr", status: out},
			{option: "Ciphers", lines: "Port {picky}\nCiphers -aes256-ctr", status: out},
			{option: "KexAlgorithms", lines: "Port {picky}\nKexAlgorithms ecdh-sha2-nistp384"},
			{option: "KexAlgorithms", lines: "Port {picky}\nKexAlgorithms curve25519-sha256", status: out},
			{option: "MACs", lines: "Port {picky}\nMACs hmac-sha2-256"},
			{option: "MACs", lines: "Port {picky}\nMACs hmac-sha2-512", status: out},
			{option: "ConnectTimeout", lines: "Port {late}\nConnectTimeout 60"},
			{option: "ConnectTimeout", lines: "Port {late}\nConnectTimeout 1", status: out},
			{option: "RequiredRSASize", lines: "HostKeyAlgorithms rsa-sha2-512,{cert}\nRequiredRSASize 2048"},
			{option: "RequiredRSASize", lines: "HostKeyAlgorithms rsa-sha2-512,{cert}\nRequiredRSASize 4096", status: out},
			{option: "Compression", lines: "Compression yes"},
			{option: "Match", lines: "Match originalhost box user {me}\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second"},
			{option: "Match", lines: "Match originalhost other\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second", status: out},
			{option: "Match final", lines: "IdentityFile {dir}/second\nMatch final host 127.0.0.1\n  IdentityFile {dir}/id"},
			{option: "Match exec", lines: "Match exec \"test -e {dir}/flag\"\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second", status: out},
			{option: "Match exec", lines: "Match exec \"test -e {dir}/flag\"\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second",
				before: func(w *world) { w.write("flag", "") }},
			{option: "Match exec", lines: "Match exec \"test %n = box\"\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second"},
			{option: "Match exec", lines: "Match exec {dir}/var_is_yes\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second",
				env: []string{"E2E_VAR=yes"}},
			{option: "Match exec", lines: "Match exec {dir}/var_is_yes\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second",
				env: []string{"E2E_VAR=no"}, status: out},
			{option: "CanonicalizeHostname", lines: "CanonicalizeHostname yes\nIdentityFile {dir}/second\nMatch canonical\n  IdentityFile {dir}/id", host: "127.0.0.1"},
			{option: "CanonicalizeHostname", lines: "IdentityFile {dir}/second\nMatch canonical\n  IdentityFile {dir}/id", host: "127.0.0.1", status: out},
			{option: "CanonicalDomains", lines: canonical + proxied, env: names, host: long},
			{option: "CanonicalDomains", lines: strings.ReplaceAll(canonical, "test", "invalid") + proxied, env: names, host: "localhost", status: out},
			{option: "CanonicalDomains", lines: proxied, env: names, host: long, status: out},
			{option: "CanonicalizeMaxDots", lines: canonical + proxied, env: names, host: "x." + long},
			{option: "CanonicalizeMaxDots", lines: canonical + "CanonicalizeMaxDots 0\n" + proxied, env: names, host: "x." + long, status: out},
			{option: "CanonicalizePermittedCNAMEs", lines: canonical + "CanonicalizePermittedCNAMEs *.e2e.test:localhost\n" + dialled, env: names, host: "web"},
			{option: "CanonicalizePermittedCNAMEs", lines: canonical + dialled, env: names, host: long, status: out},
			// With a ProxyCommand ssh itself finds the name only if it always has to.
			{option: "CanonicalizeHostname", lines: strings.Replace(canonical, "yes", "always", 1) + "CanonicalizePermittedCNAMEs *.e2e.test:localhost\n" + dialled, env: names, host: "web"},
			{option: "CanonicalizeHostname", lines: canonical + "CanonicalizePermittedCNAMEs *.e2e.test:localhost\n" + dialled + "\nMatch all\n  HostKeyAlias [localhost]:{port}",
				env: append(names, "MUXPROXY_BYPASS=1"), host: "web"},
			{option: "Include", lines: "IdentityFile {dir}/second\nInclude {dir}/included"},
			{option: "Include", lines: "IdentityFile {dir}/second\nInclude {dir}/included_wrong", status: out},
			{option: "Include", lines: "IdentityFile {dir}/second\nInclude {dir}/include[d]"},
			{option: "ProxyCommand", lines: "HostName box.invalid\nPort {port}\nHostKeyAlias some-alias\nUserKnownHostsFile {dir}/alias_only\nProxyCommand nc 127.0.0.1 {port}"},
			{option: "ProxyCommand", lines: "HostName 127.0.0.1\nProxyCommand nc %h {free}", status: out},
			{option: "ProxyCommand", lines: "HostName 127.0.0.1\nProxyCommand false", status: out},
			{option: "ProxyJump", lines: "Host box\n  ProxyJump localhost:{port}"},
			{option: "ProxyJump", lines: "Host box\n  ProxyJump localhost:{free}", status: out},
		}
		if r := w.run(spec{args: []string{"ssh", "-F", "none", "-oTag=e2e", "-G", "box"}, null: true}); r.status == 0 { // OpenSSH 9.4
			const tagged = "Match tagged e2e\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second"
			cases = append(cases, []optionCase{
				{option: "Tag", lines: tagged, args: []string{"-P", "e2e"}},
				{option: "Tag", lines: tagged, args: []string{"-oTag=e2e"}},
				{option: "Tag", lines: tagged, args: []string{"-P", "other"}, status: out},
				{option: "Tag", lines: "Match originalhost box\n  Tag e2e\n" + tagged},
				{option: "Match localnetwork", lines: "Match localnetwork 127.0.0.0/8\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second"},
				{option: "Match localnetwork", lines: "Match !localnetwork 127.0.0.0/8\n  IdentityFile {dir}/id\nMatch all\n  IdentityFile {dir}/second", status: out},
			}...)
		}
		shown := map[string][2]bool{}
		for n, c := range cases {
			both := shown[c.option]
			both[c.status/out] = true
			shown[c.option] = both
			t.Run(fmt.Sprintf("%s-%d", c.option, n), func(t *testing.T) {
				if c.before != nil {
					c.before(w)
				}
				lines := fill.Replace(c.lines)
				args := make([]string, 0, 8)
				for _, a := range c.args {
					args = append(args, fill.Replace(a))
				}
				host := fill.Replace(c.host)
				if host == "" {
					host = "box"
				}
				var env []string
				for _, e := range c.env {
					env = append(env, fill.Replace(e))
				}
				files := w.both(fmt.Sprintf("case%d", n), lines, w.base(w.sshd))
				mux, plain := w.each(files, env, append(args, host, "echo in")...)
				stdout := "in\n"
				if c.says != "" {
					stdout = c.says + "\n"
				}
				if c.status != in {
					stdout = ""
				}
				same(t, mux, plain, c.status, stdout)
			})
		}
		for option, ways := range shown {
			if ways != [2]bool{true, true} && option != "Compression" && option != "Match final" {
				t.Errorf("%s is not shown to decide both ways", option)
			}
		}
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What the local side can't do is said, with the way around it, which works.
func TestAClientWithoutCertificatesIsToldTheWayAround(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		r := w.ssh("-oHostKeyAlgorithms=ssh-ed25519", "box", "echo in")
		want(t, r, 255, "")
		if line := oneLine(t, r); !strings.Contains(line, "HostKeyAlgorithms") || !strings.Contains(line, "MUXPROXY_BYPASS=1") {
			t.Errorf("muxproxy says %q", line)
		}
		env := append([]string{"MUXPROXY_BYPASS=1"}, w.env...)
		want(t, w.run(spec{args: w.sshArgs("-oHostKeyAlgorithms=ssh-ed25519", "box", "echo in"), env: env, null: true}), 0, "in\n")
	})
}

// A configuration that is named from ssh's working directory is another one in another directory.
func TestARelativeConfigurationIsOfSSHsDirectory(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		w.newKey("second")
		for dir, key := range map[string]string{"right": "id", "wrong": "second"} {
			must(t, os.Mkdir(w.path(dir), 0o700))
			must(t, os.Rename(w.interactive(dir+".conf", w.sshd, "BatchMode yes\nIdentityFile "+w.path(key)), w.path(dir+"/conf")))
		}
		// What is known of a connection that lives is not asked for again.
		first := w.start(spec{args: []string{"ssh", "-F", "conf", "box", "cat"}, dir: w.path("right")})
		first.echo("held")
		for _, c := range []struct {
			dir, file string
			status    int
			stdout    string
		}{
			{"right", "conf", in, "in\n"},
			{"wrong", "conf", out, ""},
			{"right", "./conf", in, "in\n"},
			{"wrong", "../right/conf", in, "in\n"},
			{"right", "../wrong/conf", out, ""},
		} {
			r := w.run(spec{args: []string{"ssh", "-F", c.file, "box", "echo in"}, dir: w.path(c.dir), null: true})
			want(t, r, c.status, c.stdout)
			if c.status == out && w.mode != plain {
				oneLine(t, r)
			}
		}
		first.release()
		// A file that is there in one directory only.
		must(t, os.Remove(w.path("wrong/conf")))
		want(t, w.run(spec{args: []string{"ssh", "-F", "conf", "box", "echo in"}, dir: w.path("wrong"), null: true}), out, "")
	})
}

// What ssh_config says now decides for the next client, also while a connection by its old words lives.
func TestAChangedConfigurationCountsAtOnce(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		_, key := w.newKey("second")
		w.write("right", "IdentityFile "+w.path("id")+"\n")
		w.write("wrong", "IdentityFile "+w.path("second")+"\n")
		included := w.write("included", w.read("right"))
		conf := w.interactive("changed.conf", w.sshd, "BatchMode yes\nInclude "+included+"\nIdentityFile none")
		run := func(status int, stdout string) {
			t.Helper()
			want(t, w.noTTY(conf, "box", "echo in").wait(patience), status, stdout)
		}
		first := w.start(spec{args: []string{"ssh", "-F", conf, "box", "cat"}})
		first.echo("held")
		run(in, "in\n")
		run(in, "in\n")
		w.write("included", w.read("wrong"))
		run(out, "")
		w.allow(key)
		run(in, "in\n")
		w.write("included", w.read("right"))
		run(in, "in\n")
		first.echo("still here")
		first.release()
	})
}

// A server that wants the password changed can't be served: x/crypto/ssh takes no SSH_MSG_USERAUTH_PASSWD_CHANGEREQ
// (RFC 4252 section 8). Without sharing, ssh does it.
func TestAPasswordThatHasToBeChanged(t *testing.T) {
	forEach(t, func(t *testing.T, w *world) {
		server := w.start(spec{args: []string{python, testdata(t, "asyncssh_server.py"), w.path("host_ed25519"), "old", "new"}})
		defer server.release()
		port, err := strconv.Atoi(server.expect("\n"))
		if err != nil {
			t.Fatal(err)
		}
		w.append("known_hosts", knownHosts(port))
		conf := w.interactive("expired.conf", port, "PreferredAuthentications password,keyboard-interactive")
		prompt := me + "@127.0.0.1's password: "
		if w.mode != plain {
			p := w.tty(conf, "box", "true")
			p.answer(prompt, "old")
			line := oneLine(t, p.ended(255, "muxproxy: "))
			for _, part := range []string{me + "@127.0.0.1", "wants the password to be changed", "MUXPROXY_BYPASS=1 ssh box"} {
				if !strings.Contains(line, part) {
					t.Errorf("no %q in %q", part, line)
				}
			}
		}
		p := w.start(spec{args: []string{"ssh", "-F", conf, "box", "true"}, env: append([]string{"MUXPROXY_BYPASS=1"}, w.env...), tty: true})
		p.answer(prompt, "old")
		if said := p.answer("old password: ", "old"); !strings.Contains(said, "Your password has expired.") {
			t.Errorf("the server's words are not in %q", said)
		}
		p.answer("new password: ", "new")
		p.answer("new password: ", "new")
		p.ended(0, "changed")
	})
}

// Where ssh would have gone by what the DNS says of an unknown key (RFC 4255), it is said that nobody has asked.
func TestVerifyHostKeyDNSIsSaidToBeUnsupported(t *testing.T) {
	const said = "VerifyHostKeyDNS is not supported"
	forEach(t, func(t *testing.T, w *world) {
		if !muxproxyOnly(t) {
			return
		}
		for _, value := range []string{"yes", "ask", "no"} {
			lines := 1
			if value == "no" {
				lines = 0
			}
			run := func(name, known, options string) result {
				w.write("known", known)
				return w.noTTY(w.interactive(name+value, w.sshd, "VerifyHostKeyDNS "+value+"\nUserKnownHostsFile "+w.path("known")+"\n"+options),
					"box", "echo in").wait(patience)
			}
			check := func(name string, r result, status, lines int) {
				t.Helper()
				if n := strings.Count(r.err+r.out, said); r.status != status || n != lines {
					t.Errorf("VerifyHostKeyDNS %s, %s: status %d, said %d times, not %d: %q", value, name, r.status, n, lines, tail(r.err+r.out))
				}
			}
			check("known", run("known", w.read("known_hosts"), ""), in, 0)
			check("accept-new", run("new", "", "StrictHostKeyChecking accept-new"), in, lines)
			strict := run("strict", "", "StrictHostKeyChecking yes")
			check("strict", strict, out, lines)
			if line := oneLine(t, strict); strings.Contains(line, said) != (lines == 1) {
				t.Errorf("the refusal says %q", line)
			}
			w.write("known", "")
			p := w.tty(w.interactive("ask"+value, w.sshd, "VerifyHostKeyDNS "+value+"\nUserKnownHostsFile "+w.path("known")), "box", "echo in")
			question := p.answer("(yes/no/[fingerprint])? ", "yes")
			if strings.Contains(question, said) != (lines == 1) {
				t.Errorf("the question is %q", question)
			}
			check("asked", p.ended(in, "in\r\n"), in, lines)
		}
	})
}

// ConnectionAttempts lets ssh wait for a server that is not there yet.
func TestConnectionAttempts(t *testing.T) {
	forPipes(t, func(t *testing.T, w *world) {
		free := freePort(t)
		refused := w.noTTY(w.interactive("one.conf", free, "ConnectionAttempts 1"), "box", "true").wait(patience)
		want(t, refused, out, "")
		w.append("known_hosts", knownHosts(free))
		p := w.noTTY(w.interactive("many.conf", free, "ConnectionAttempts 100"), "-v", "box", "echo in")
		p.expectErr(fmt.Sprintf("connect to address 127.0.0.1 port %d: ", free))
		ln, err := net.Listen("tcp", loopback(free))
		must(t, err)
		front := newLinkFrom(t, ln, loopback(w.sshd))
		want(t, p.wait(patience), in, "in\n")
		if front.count() == 0 {
			t.Error("somebody else has answered")
		}
	})
}
