package wire

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/muxproxy/muxproxy/core/sshconfig"
)

// Bounds of what a hello and a resolution may hold. OpenSSH's own are looser: a command line may be as long as the
// system allows, a host's name NI_MAXHOST (1025).
const (
	maxName   = 1024  // user, host, alias
	maxArgs   = 1024  // SSHArgs
	maxHops   = 16    // jump hosts of a resolution
	maxString = 65536 // one of them
	maxPath   = 4096
)

// ParseTarget reads USER@HOST:PORT as ssh_config's `%r@%h:%p` gives it. HOST is what stands between the last '@' and
// the last ':'; an IPv6 address may have brackets. USER may contain '@', ':' and '\'. Alias stays empty.
func ParseTarget(s string) (Target, error) {
	at := strings.LastIndexByte(s, '@')
	colon := strings.LastIndexByte(s, ':')
	if at < 0 || colon < at {
		return Target{}, fmt.Errorf("%q: want USER@HOST:PORT", s)
	}
	t := Target{User: s[:at], Host: s[at+1 : colon]}
	if h, ok := strings.CutPrefix(t.Host, "["); ok {
		h, ok = strings.CutSuffix(h, "]")
		if !ok || !strings.Contains(h, ":") {
			return Target{}, fmt.Errorf("%q: brackets are for IPv6 addresses", s)
		}
		t.Host = h
	}
	port, err := strconv.ParseUint(s[colon+1:], 10, 16)
	if err != nil || port == 0 {
		return Target{}, fmt.Errorf("%q: the port must be a number from 1 to 65535", s)
	}
	t.Port = uint16(port)
	if err := t.check(); err != nil {
		return Target{}, err
	}
	return t, nil
}

// String is USER@HOST:PORT, with an IPv6 address in brackets: what ParseTarget reads.
func (t Target) String() string { return t.User + "@" + t.Addr() }

// Addr is HOST:PORT, with an IPv6 address in brackets.
func (t Target) Addr() string { return net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port))) }

// check reports what is wrong with a target: any part but Alias is empty, or it could be taken for an option, hide
// something on a terminal, or be read in more than one way.
func (t Target) check() error {
	if t.Port == 0 {
		return fmt.Errorf("port 0")
	}
	if t.User == "" || t.Host == "" {
		return fmt.Errorf("%q: user or host is empty", t.String())
	}
	for _, part := range []struct{ what, s string }{{"user", t.User}, {"host", t.Host}, {"alias", t.Alias}} {
		if err := checkText(part.what, part.s, maxName, ""); err != nil {
			return err
		}
		if strings.HasPrefix(part.s, "-") {
			return fmt.Errorf("%s %q begins with '-'", part.what, part.s)
		}
	}
	if strings.ContainsAny(t.Host, "@[]/ ") {
		return fmt.Errorf("host %q: not a name or address", t.Host)
	}
	if strings.Contains(t.Host, ":") {
		if _, err := netip.ParseAddr(t.Host); err != nil {
			return fmt.Errorf("host %q: not an IPv6 address", t.Host)
		}
	}
	return nil
}

// Check reports what the master would refuse in a hello: SendHello and ReadHello do so.
func (h *Hello) Check() error {
	if h.Version != Version {
		return fmt.Errorf("%w: %d and %d", ErrVersion, h.Version, Version)
	}
	if h.Mode != Pipes && h.Mode != FDs && h.Mode != Copy {
		return fmt.Errorf("unknown mode %q", h.Mode)
	}
	if err := h.Target.check(); err != nil {
		return err
	}
	if len(h.SSHArgs) > maxArgs {
		return fmt.Errorf("%d arguments of ssh, at most %d", len(h.SSHArgs), maxArgs)
	}
	for _, a := range h.SSHArgs {
		if err := checkText("argument of ssh", a, maxString, "\t\n"); err != nil { // -o SetEnv may hold lines
			return err
		}
	}
	for name, value := range h.Env {
		if !slices.Contains(EnvNames, name) {
			return fmt.Errorf("environment variable %q is not for the master", name)
		}
		if err := checkText(name, value, maxPath, ""); err != nil {
			return err
		}
	}
	return nil
}

// files is how many files go with a hello.
func (h *Hello) files() int {
	if h.Mode == Pipes {
		return 2
	}
	return 0
}

func (a *Answer) check() error {
	switch a.Kind {
	case Served, Resolve, Bypass:
	case Failed:
		if a.Message == "" {
			return fmt.Errorf("an error without a message")
		}
	default:
		return fmt.Errorf("unknown answer %q", a.Kind)
	}
	if len(a.Message) > maxText {
		return fmt.Errorf("message of %d bytes", len(a.Message))
	}
	if len(a.Via) > maxHops {
		return fmt.Errorf("%d jump hosts, at most %d", len(a.Via), maxHops)
	}
	for _, host := range a.Via {
		if err := checkText("jump host", host, 2*maxName, ""); err != nil {
			return err
		}
		if host == "" || host[0] == '-' || strings.EqualFold(host, "none") || strings.ContainsAny(host, ", ") {
			return fmt.Errorf("%q is not one jump host", host)
		}
	}
	return nil
}

func (r *Resolution) check() error {
	if err := checkText("agent's path", r.AgentPath, maxPath, ""); err != nil {
		return err
	}
	if len(r.Error) > maxText {
		return fmt.Errorf("error of %d bytes", len(r.Error))
	}
	if len(r.Hops) > maxHops {
		return fmt.Errorf("%d jump hosts, at most %d", len(r.Hops), maxHops)
	}
	for _, h := range r.Hops {
		if err := h.Target.check(); err != nil {
			return fmt.Errorf("jump host: %w", err)
		}
		if err := checkText("agent's path", h.AgentPath, maxPath, ""); err != nil {
			return err
		}
		if err := checkConfig(&h.Config); err != nil {
			return err
		}
	}
	return checkConfig(&r.Config)
}

func checkConfig(c *sshconfig.Resolved) error {
	for keyword, values := range c.Options {
		for _, v := range append([]string{keyword}, values...) {
			if err := checkText("ssh_config", v, maxString, "\t"); err != nil {
				return err
			}
		}
	}
	for _, f := range c.Files {
		if err := checkText("name of a file", f.Path, maxPath, ""); err != nil {
			return err
		}
	}
	return nil
}

// checkText refuses text that is too long, is not UTF-8 (JSON would change it on the way) or has control characters
// other than those allowed.
func checkText(what, s string, limit int, allowed string) error {
	if len(s) > limit {
		return fmt.Errorf("%s of %d bytes: too long, at most %d", what, len(s), limit)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("%s is not UTF-8", what) // the value may be a secret
	}
	for _, r := range s {
		if (r < ' ' || r >= 0x7f && r < 0xa0) && !strings.ContainsRune(allowed, r) {
			return fmt.Errorf("%s has control characters", what)
		}
	}
	return nil
}

// clip cuts text off where a frame's bound is, between characters.
func clip(s string) string {
	s = strings.ToValidUTF8(s, "\ufffd")
	if len(s) <= maxText {
		return s
	}
	const more = "..."
	n := maxText - len(more)
	for !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + more
}
