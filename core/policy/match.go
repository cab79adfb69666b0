package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

// toASCII maps names as resolvers do (UTS 46, not transitional), but lets underscores and the like pass: they are not in
// host names, but in aliases.
var toASCII = idna.New(idna.MapForLookup(), idna.Transitional(false), idna.StrictDomainName(false), idna.BidiRule())

// canonicalName brings two spellings of one name together: lower case, no trailing dot, IDNA as ASCII, addresses as
// netip prints them, those of IPv4 in IPv6 as IPv4 and zones only where there are any (RFC 4007 section 6). A name that IDNA does not allow stays in lower case.
func canonicalName(name string) string {
	if bare, ok := strings.CutPrefix(name, "["); ok {
		if bare, ok = strings.CutSuffix(bare, "]"); ok {
			name = bare
		}
	}
	if ip, err := netip.ParseAddr(name); err == nil {
		return canonicalIP(ip)
	}
	if !isASCII(name) && utf8.ValidString(name) { // package idna would make U+FFFD of other bytes
		if ascii, err := toASCII.ToASCII(name); err == nil {
			name = ascii
		}
	}
	name = lower(name)
	if trimmed := strings.TrimRight(name, "."); trimmed != name && trimmed != "" {
		name = trimmed
		if ip, err := netip.ParseAddr(name); err == nil { // IDNA makes digits of full-width ones, too
			return canonicalIP(ip)
		}
	}
	return name
}

func canonicalIP(ip netip.Addr) string {
	if !ip.IsLinkLocalUnicast() && !ip.IsLinkLocalMulticast() && !ip.IsInterfaceLocalMulticast() {
		ip = ip.WithZone("") // ::1%1 is ::1 to the kernel
	}
	return ip.Unmap().String()
}

// canonicalHost is canonicalName for what will be connected to: getaddrinfo(3) also takes the numbers of inet_aton(3),
// 127.1 and 0x7f000001, for addresses.
func canonicalHost(host string) string {
	host = canonicalName(host)
	if ip, ok := aton(host); ok {
		return ip.String()
	}
	return host
}

// aton reads an IPv4 address as inet_aton(3) does: one to four numbers, decimal, octal or hexadecimal, of which the last
// fills what is left.
func aton(s string) (netip.Addr, bool) {
	parts := strings.Split(s, ".")
	if len(parts) > 4 {
		return netip.Addr{}, false
	}
	var b [4]byte
	for i, part := range parts {
		base, digits := 10, part
		switch {
		case strings.HasPrefix(part, "0x"):
			base, digits = 16, part[2:]
		case len(part) > 1 && part[0] == '0':
			base, digits = 8, part[1:]
		}
		bits := 8
		if i == len(parts)-1 {
			bits = 8 * (4 - i)
		}
		if strings.HasPrefix(digits, "+") {
			return netip.Addr{}, false
		}
		n, err := strconv.ParseUint(digits, base, bits)
		if err != nil {
			return netip.Addr{}, false
		}
		if i < len(parts)-1 {
			b[i] = byte(n)
			continue
		}
		for j := 3; j >= i; j-- {
			b[j] = byte(n)
			n >>= 8
		}
	}
	return netip.AddrFrom4(b), true
}

// patterns are the labels of a host block.
type patterns struct {
	yes, no []string
}

// parsePattern reads one label; not says that it began with "!".
func parsePattern(label string) (pattern string, not bool, err error) {
	pattern, not = strings.CutPrefix(label, "!")
	switch {
	case pattern == "":
		return "", not, errors.New("an empty pattern")
	case strings.HasPrefix(pattern, "!"):
		return "", not, errors.New(`only one "!" may stand before a pattern`)
	case strings.ContainsAny(pattern, " \t\r\n,"):
		return "", not, errors.New("one label is one pattern: write several labels")
	case strings.Contains(pattern, "/"):
		return "", not, errors.New("a pattern is a name with * and ?, not a network: use cidr(...) in a when")
	}
	if !strings.ContainsAny(pattern, "*?") {
		if isASCII(pattern) {
			return canonicalName(pattern), not, nil
		}
		ascii, err := toASCII.ToASCII(pattern)
		if err != nil {
			return "", not, errors.New("not a name that IDNA allows")
		}
		return canonicalName(ascii), not, nil
	}
	// Whole labels without wildcards have an ASCII form, parts of one don't.
	parts := strings.Split(strings.ToLower(pattern), ".")
	for i, part := range parts {
		if isASCII(part) {
			continue
		}
		if strings.ContainsAny(part, "*?") {
			return "", not, fmt.Errorf("%q mixes a wildcard with letters outside ASCII: names are matched in their xn-- form", part)
		}
		if parts[i], err = toASCII.ToASCII(part); err != nil {
			return "", not, errors.New("not a name that IDNA allows")
		}
	}
	pattern = strings.Join(parts, ".")
	if trimmed := strings.TrimRight(pattern, "."); trimmed != "" {
		pattern = trimmed
	}
	return pattern, not, nil
}

// match reports whether a block with these patterns is about any of the names, which are canonical: one of them matches
// a pattern, and none of them one after a "!".
func (p patterns) match(names ...string) bool {
	any := func(patterns []string) bool {
		return slices.ContainsFunc(patterns, func(pattern string) bool {
			return slices.ContainsFunc(names, func(name string) bool { return matchPattern(pattern, name) })
		})
	}
	return any(p.yes) && !any(p.no)
}

// covers reports that whatever matches q matches p, too. It may miss that, but never claims it wrongly.
func (p patterns) covers(q patterns) bool {
	for _, pattern := range q.yes {
		if !slices.ContainsFunc(p.yes, func(wider string) bool { return widerPattern(wider, pattern) }) {
			return false
		}
	}
	for _, pattern := range p.no {
		if !slices.ContainsFunc(q.no, func(wider string) bool { return widerPattern(wider, pattern) }) {
			return false
		}
	}
	return true
}

// matchPattern matches as match_pattern of OpenSSH's match.c does: * stands for any bytes, ? for one.
func matchPattern(pattern, s string) bool {
	return match(pattern, s, func(c byte) bool { return true })
}

// widerPattern reports that all that narrow matches wide does, too; not every such case is seen. In narrow, * and ? are
// taken for bytes that only what stands for all of them matches.
func widerPattern(wide, narrow string) bool {
	return match(wide, narrow, func(c byte) bool { return c != '*' })
}

// match takes time in proportion to the product of both lengths. one says which bytes of s a ? matches.
func match(pattern, s string, one func(byte) bool) bool {
	star, retry := -1, 0 // the last * of pattern, and where what follows it is tried next
	p, i := 0, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, retry = p, i
			p++
		case p < len(pattern) && (pattern[p] == s[i] && s[i] != '*' || pattern[p] == '?' && one(s[i])):
			p++
			i++
		case star >= 0:
			retry++
			p, i = star+1, retry
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// lower changes ASCII letters only: strings.ToLower would make U+FFFD of bytes that are not UTF-8.
func lower(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r >= 0x80 }) < 0
}
