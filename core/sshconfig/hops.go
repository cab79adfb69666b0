package sshconfig

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
)

// Hop is one jump host on the way to a destination.
type Hop struct {
	User, Host string
	Port       uint16
	Alias      string // as ProxyJump names it
	Config     *Resolved
}

// maxHops bounds a chain of jump hosts, which may lead in a circle.
const maxHops = 8

// Hops resolves the jump hosts of a destination that Run has resolved, in the order in which they are passed; none if it
// has no ProxyJump. As in ssh (ssh.c), each is reached through those before it, by its own lines of ssh_config, and of
// the command line only -F counts.
func Hops(ctx context.Context, req Request, r *Resolved) ([]Hop, error) {
	return hops(ctx, req, r, maxHops)
}

func hops(ctx context.Context, req Request, r *Resolved, left int) ([]Hop, error) {
	jump := r.Get("proxyjump")
	if jump == "" || strings.EqualFold(jump, "none") {
		return nil, nil
	}
	if left == 0 {
		return nil, fmt.Errorf("ProxyJump %s: more than %d jump hosts, or a circle", jump, maxHops)
	}
	before, last := "", jump
	if i := strings.LastIndexByte(jump, ','); i >= 0 {
		before, last = jump[:i], jump[i+1:]
	}
	user, host, port := splitJump(last)
	if host == "" {
		return nil, fmt.Errorf("ProxyJump %s: no host name", jump)
	}
	var args Args
	if file, ok := req.Args.configFile(); ok {
		args.Options = append(args.Options, "-F", file)
	}
	if user != "" {
		args.Options = append(args.Options, "-l", user)
	}
	if port != "" {
		args.Options = append(args.Options, "-p", port)
	}
	if before != "" {
		args.Options = append(args.Options, "-J", before)
	}
	args.Destination = host
	hop, err := Run(ctx, Request{Args: args, SSH: req.SSH})
	if err != nil {
		return nil, fmt.Errorf("ProxyJump %s: %w", last, err)
	}
	n, err := strconv.ParseUint(hop.Get("port"), 10, 16)
	if err != nil || n == 0 {
		return nil, fmt.Errorf("ProxyJump %s: no port", last)
	}
	earlier, err := hops(ctx, req, hop, left-1)
	if err != nil {
		return nil, err
	}
	return append(earlier, Hop{
		User: hop.Get("user"), Host: strings.Trim(hop.Get("hostname"), "[]"), Port: uint16(n), Alias: host, Config: hop,
	}), nil
}

// JumpVia puts other jump hosts in the place of ProxyJump, each as that has it, and then of ProxyCommand. Empty: none; nil:
// nothing changes.
func (r *Resolved) JumpVia(hosts []string) {
	switch {
	case hosts == nil:
	case len(hosts) == 0:
		delete(r.Options, "proxyjump")
	default:
		r.Options["proxyjump"] = []string{strings.Join(hosts, ",")}
		delete(r.Options, "proxycommand")
		delete(r.Options, "proxyusefdpass")
	}
}

// JumpsVia reports whether JumpVia has been done with these.
func (r *Resolved) JumpsVia(hosts []string) bool {
	return hosts == nil || r.Get("proxyjump") == strings.Join(hosts, ",")
}

// splitJump takes one jump host apart: [USER@]HOST[:PORT] or ssh://[USER@]HOST[:PORT], an IPv6 address in brackets if a
// port follows.
func splitJump(s string) (user, host, port string) {
	if rest, ok := strings.CutPrefix(s, "ssh://"); ok {
		s = strings.TrimSuffix(rest, "/")
	}
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		user, s = s[:i], s[i+1:]
	}
	if h, p, err := net.SplitHostPort(s); err == nil {
		return user, h, p
	}
	return user, strings.Trim(s, "[]"), ""
}
