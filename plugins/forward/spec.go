package forward

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// kind is what a forward is: ssh's -D, -L and -R, and the names of the blocks in policy.
type kind string

const (
	dynamic kind = "dynamic"
	local   kind = "local"
	remote  kind = "remote"
)

// Limits of OpenSSH's parser.
const (
	maxHost = 1024 // NI_MAXHOST, with the NUL that ends it
	maxPath = 107  // what fits into a sockaddr_un of Linux
)

// endpoint is where to listen, or where a stream goes.
type endpoint struct {
	host string // of a listener "": loopback, "*": every address; an IPv6 address has no brackets
	port int
	path string // of a Unix socket; then host and port are zero
}

func (e endpoint) String() string {
	switch {
	case e.path != "":
		return e.path
	case e.host == "":
		return strconv.Itoa(e.port)
	}
	return net.JoinHostPort(e.host, strconv.Itoa(e.port))
}

// network and address are what dialling and listening take.
func (e endpoint) network() string {
	if e.path != "" {
		return "unix"
	}
	return "tcp"
}

func (e endpoint) address() string {
	if e.path != "" {
		return e.path
	}
	return net.JoinHostPort(e.host, strconv.Itoa(e.port))
}

// gateway reports whether listening there may let other machines in: it is not known to be loopback.
func (e endpoint) gateway() bool {
	if e.path != "" || e.host == "" || strings.EqualFold(e.host, "localhost") {
		return false
	}
	ip, err := netip.ParseAddr(e.host)
	return err != nil || !ip.Unmap().IsLoopback()
}

// spec is one forward as a person writes it.
type spec struct {
	kind   kind
	listen endpoint
	to     endpoint // zero: each stream says it (SOCKS, HTTP CONNECT)
}

func (s spec) String() string {
	if s.to == (endpoint{}) {
		return string(s.kind) + " " + s.listen.String()
	}
	return string(s.kind) + " " + s.listen.String() + " to " + s.to.String()
}

// parseSpec reads the argument of ssh's -D, -L or -R, as parse_forward in OpenSSH's readconf.c does. What it takes and
// this does not: a socket's path for a host, which can't work, and paths that are not absolute, since nobody here knows
// whose directory is meant.
func parseSpec(k kind, text string) (spec, error) {
	s, err := parse(k, text)
	if err != nil {
		return spec{}, fmt.Errorf("%q is no %s forward: %w", text, k, err)
	}
	return s, nil
}

func parse(k kind, text string) (spec, error) {
	fs, err := fields(text)
	if err != nil {
		return spec{}, err
	}
	s := spec{kind: k}
	paths := ""
	for _, f := range fs {
		paths += map[bool]string{true: "p", false: "-"}[f.path]
	}
	bind := func(f field) string { // an empty one is given, and means every address
		if f.text == "" {
			return "*"
		}
		return f.text
	}
	var host, port, toHost, toPort = "", "", "", ""
	socks := false
	switch paths {
	case "-":
		port, socks = fs[0].text, true
	case "p":
		s.listen.path, socks = fs[0].text, true
	case "--":
		host, port, socks = bind(fs[0]), fs[1].text, true
	case "pp":
		s.listen.path, s.to.path = fs[0].text, fs[1].text
	case "-p":
		port, s.to.path = fs[0].text, fs[1].text
	case "p--":
		s.listen.path, toHost, toPort = fs[0].text, fs[1].text, fs[2].text
	case "--p":
		host, port, s.to.path = bind(fs[0]), fs[1].text, fs[2].text
	case "---":
		port, toHost, toPort = fs[0].text, fs[1].text, fs[2].text
	case "----":
		host, port, toHost, toPort = bind(fs[0]), fs[1].text, fs[2].text, fs[3].text
	default:
		return spec{}, forms(k)
	}
	if socks != (k == dynamic) && !(socks && k == remote) {
		return spec{}, forms(k)
	}
	if s.listen.path == "" {
		if s.listen.port, err = number(port); err != nil {
			return spec{}, err
		}
		if s.listen.port == 0 && k != remote {
			return spec{}, errors.New("only a server can choose a port: port 0 is for remote forwards")
		}
		s.listen.host = host
	}
	if !socks && s.to.path == "" {
		if s.to.port, err = number(toPort); err != nil {
			return spec{}, err
		}
		if s.to.port == 0 || toHost == "" {
			return spec{}, forms(k)
		}
		s.to.host = toHost
	}
	for _, e := range []*endpoint{&s.listen, &s.to} {
		if err := e.check(); err != nil {
			return spec{}, err
		}
	}
	return s, nil
}

// check bounds an endpoint, and makes a path of this machine absolute.
func (e *endpoint) check() error {
	if rest, ok := strings.CutPrefix(e.path, "~/"); ok {
		home, err := os.UserHomeDir()
		if err != nil {
			return err
		}
		e.path = filepath.Join(home, rest)
	}
	switch {
	case len(e.host) >= maxHost:
		return errors.New("a host name that long is none")
	case strings.ContainsAny(e.host+e.path, "\x00\n\r"):
		return errors.New("neither a name nor a path has line breaks")
	case e.path != "" && !filepath.IsAbs(e.path):
		return fmt.Errorf("%s: give the whole path", e.path)
	case len(e.path) > maxPath:
		return fmt.Errorf("%s: a socket's path has at most %d bytes", e.path, maxPath)
	}
	return nil
}

func forms(k kind) error {
	switch k {
	case dynamic:
		return errors.New("write [ADDRESS:]PORT or a socket's path")
	case local:
		return errors.New("write [ADDRESS:]PORT:HOST:HOSTPORT, with a socket's path for either side if you like")
	}
	return errors.New("write [ADDRESS:]PORT:HOST:HOSTPORT, with a socket's path for either side if you like, or [ADDRESS:]PORT for SOCKS")
}

// field is a part of a specification between colons.
type field struct {
	text string
	path bool // it has a slash
}

// fields divides a specification: brackets keep colons, and a backslash whatever comes next. A colon at the end ends the
// last field.
func fields(text string) ([]field, error) {
	rest := strings.TrimLeft(text, " \t\n\v\f\r")
	var out []field
	for rest != "" {
		if len(out) == 4 {
			return nil, errors.New("it has too many parts")
		}
		if rest[0] == '[' {
			end := strings.IndexByte(rest, ']')
			if end < 0 || end+1 < len(rest) && rest[end+1] != ':' {
				return nil, errors.New("a bracket is not closed where its part ends")
			}
			f := rest[1:end]
			out = append(out, field{f, strings.Contains(f, "/")})
			rest = strings.TrimPrefix(rest[end+1:], ":")
			continue
		}
		var f field
		var b strings.Builder
		i := 0
		for ; i < len(rest) && rest[i] != ':'; i++ {
			switch rest[i] {
			case '\\':
				if i++; i == len(rest) {
					return nil, errors.New("nothing comes after the backslash")
				}
			case '/':
				f.path = true
			}
			b.WriteByte(rest[i])
		}
		f.text = b.String()
		out = append(out, f)
		rest = rest[min(i+1, len(rest)):]
	}
	return out, nil
}

// number is a port: a number, or a service's name.
func number(text string) (int, error) {
	if n, err := strconv.Atoi(text); err == nil {
		if n < 0 || n > 65535 {
			return 0, fmt.Errorf("there is no port %d", n)
		}
		return n, nil
	}
	if text == "" {
		return 0, errors.New("a port is missing")
	}
	n, err := net.LookupPort("tcp", text)
	if err != nil {
		return 0, fmt.Errorf("%q is no port", text)
	}
	return n, nil
}

// parseListen reads an address to listen on, as policy has it.
func parseListen(k kind, text string) (endpoint, error) {
	fs, err := fields(text)
	if err != nil {
		return endpoint{}, err
	}
	if len(fs) == 0 || len(fs) > 2 || slices.ContainsFunc(fs, func(f field) bool { return f.path }) && len(fs) > 1 {
		return endpoint{}, errors.New("write ADDRESS:PORT, PORT for this machine alone, or a socket's path")
	}
	// What a dynamic forward listens on is all that its specification has; port 0 is for remote ones.
	as := dynamic
	if k == remote {
		as = remote
	}
	s, err := parse(as, text)
	return s.listen, err
}

// parseTo reads where a forward leads, as policy has it.
func parseTo(text string) (endpoint, error) {
	s, err := parse(local, "1:"+text)
	if err != nil || s.listen.host != "" {
		return endpoint{}, fmt.Errorf("%q leads nowhere: write HOST:PORT, with brackets around an IPv6 address, or a socket's path", text)
	}
	return s.to, nil
}
