//go:build linux

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// optionCase is an ssh_config and how ssh ends with it.
type optionCase struct {
	option string
	lines  string   // before those that let ssh in; placeholders are replaced
	args   []string // before the host; nil: none
	host   string   // "": box
	env    []string
	before func(w *world)
	status int // 0, then the session says "in"; or 255
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

		fill := strings.NewReplacer("{dir}", w.dir, "{me}", me, "{picky}", fmt.Sprint(picky), "{six}", fmt.Sprint(six),
			"{late}", fmt.Sprint(late), "{free}", fmt.Sprint(free), "{port}", fmt.Sprint(w.sshd), "{agent}", agent,
			"{impatient}", fmt.Sprint(impatient), "{crowded}", crowded, "{cert}", "ecdsa-sha2-nistp256-cert-v01@openssh.com")
		cases := []optionCase{
			{option: "HostName", lines: "HostName 127.0.0.1", host: "box.invalid"},
			{option: "HostName", lines: "HostName %h", host: "127.0.0.1"},
			{option: "HostName", lines: "HostName 127.0.0.2", status: out},
			{option: "Port", lines: "Port {port}"},
			{option: "Port", lines: "Port {free}", status: out},
			{option: "Port", lines: "Port {free}", args: []string{"-p", "{port}"}},
			{option: "Port", args: []string{"-oPort={free}"}, status: out},
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
			{option: "Include", lines: "IdentityFile {dir}/second\nInclude {dir}/included"},
			{option: "Include", lines: "IdentityFile {dir}/second\nInclude {dir}/included_wrong", status: out},
			{option: "Include", lines: "IdentityFile {dir}/second\nInclude {dir}/include[d]"},
			{option: "ProxyCommand", lines: "HostName box.invalid\nPort {port}\nHostKeyAlias some-alias\nUserKnownHostsFile {dir}/alias_only\nProxyCommand nc 127.0.0.1 {port}"},
			{option: "ProxyCommand", lines: "HostName 127.0.0.1\nProxyCommand nc %h {free}", status: out},
			{option: "ProxyCommand", lines: "HostName 127.0.0.1\nProxyCommand false", status: out},
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
				host := c.host
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
