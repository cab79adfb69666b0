package master

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
	"github.com/muxproxy/muxproxy/core/wire"
)

// ParseHost reads [USER@]HOST[:PORT], as commands and plugins name a host. What is not given stays empty; HOST becomes the
// alias, and is yet to be resolved.
func ParseHost(s string) (use.Target, error) {
	var t use.Target
	rest := s
	if i := strings.LastIndexByte(rest, '@'); i >= 0 {
		t.User, rest = rest[:i], rest[i+1:]
		if t.User == "" {
			return t, fmt.Errorf("%q: the user is empty", s)
		}
	}
	if host, port, err := net.SplitHostPort(rest); err == nil { // not for an IPv6 address without brackets
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return t, fmt.Errorf("%q: the port must be a number from 1 to 65535", s)
		}
		t.Port, rest = uint16(n), host
	}
	t.Alias = strings.Trim(rest, "[]")
	if t.Alias == "" || strings.HasPrefix(t.Alias, "-") || strings.HasPrefix(t.User, "-") {
		return t, fmt.Errorf("%q: want [USER@]HOST[:PORT]", s)
	}
	return t, nil
}

// Resolve asks ssh_config where a host leads that ParseHost has read, as for an ssh without options. config is what
// `ssh -F` is given; "": ssh's own files.
func Resolve(ctx context.Context, config string, t use.Target) (use.Target, error) {
	t, _, err := resolve(ctx, config, t)
	return t, err
}

func resolve(ctx context.Context, config string, t use.Target) (use.Target, *sshconfig.Resolved, error) {
	r, err := askSSH(ctx, config, t)
	if err != nil {
		return use.Target{}, nil, err
	}
	port, err := strconv.ParseUint(r.Get("port"), 10, 16)
	if err != nil || port == 0 {
		return use.Target{}, nil, fmt.Errorf("ssh -G gives %s the port %q", t.Alias, r.Get("port"))
	}
	return use.Target{
		User: r.Get("user"), Host: strings.Trim(r.Get("hostname"), "[]"), Port: uint16(port), Alias: t.Alias,
	}, r, nil
}

// askSSH asks ssh -G about an alias without any client's options. config is for -F; "": ssh's own files.
func askSSH(ctx context.Context, config string, t use.Target) (*sshconfig.Resolved, error) {
	req, err := request(config, t)
	if err != nil {
		return nil, err
	}
	return sshconfig.Run(ctx, req)
}

func request(config string, t use.Target) (sshconfig.Request, error) {
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		return sshconfig.Request{}, fmt.Errorf("no ssh on PATH to ask what ssh_config says: %w", err)
	}
	req := sshconfig.Request{User: t.User, Port: t.Port, Alias: t.Alias, SSH: ssh}
	if config != "" {
		req.Args.Options = []string{"-F", config}
	}
	return req, nil
}

// ownResolution is what a login needs to know that no client asks for: ssh_config's answer and the jump hosts, policy's
// if it names some. The agents are those that clients of the same hosts have had last.
func (m *Master) ownResolution(ctx context.Context, t use.Target) (*resolution, error) {
	ctx, cancel := context.WithTimeout(ctx, resolveTime)
	defer cancel()
	config := m.policy.now.Load().Master().SSHConfig
	req, err := request(config, t)
	if err != nil {
		return nil, err
	}
	answer, err := sshconfig.Run(ctx, req)
	if err != nil {
		return nil, err
	}
	via, set := m.policy.lookup().For(t, use.Self()).Via()
	if set && via == nil {
		via = []string{}
	}
	answer.JumpVia(via)
	hops, err := sshconfig.Hops(ctx, req, answer)
	if err != nil {
		return nil, err
	}
	r := &resolution{config: *answer, agentPath: m.agents.path(t, answer)}
	for _, h := range hops {
		hop := use.Target{User: h.User, Host: h.Host, Port: h.Port, Alias: h.Alias}
		r.hops = append(r.hops, wire.Hop{Target: wire.Target(hop), Config: *h.Config, AgentPath: m.agents.path(hop, h.Config)})
	}
	return r, nil
}

// path is the agent that logs in at t: the one that ssh_config names, else that of the last client; "": none.
func (a *lastAgents) path(t use.Target, config *sshconfig.Resolved) string {
	switch path := config.Get("identityagent"); {
	case strings.EqualFold(path, "none"):
		return ""
	case path == "", path == "SSH_AUTH_SOCK":
		return a.of(t)
	case filepath.IsAbs(path):
		return path
	}
	return ""
}
