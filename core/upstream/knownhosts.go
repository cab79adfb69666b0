package upstream

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"os"
	"strings"

	"golang.org/x/crypto/ssh"
)

// maxKnownHosts bounds a known_hosts file: some 100,000 keys.
const maxKnownHosts = 64 << 20

// knownKey is a line of a known_hosts file (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).
type knownKey struct {
	file   string
	line   int // from 1
	marker marker
	hosts  string // the field with the names
	key    ssh.PublicKey
}

type marker string

const (
	noMarker  marker = ""
	authority marker = "@cert-authority"
	revoked   marker = "@revoked"
)

// readKnownHosts returns the lines of a file that are about name, as lookupName makes it. A file that is absent is empty, and a
// device is (/dev/null).
func readKnownHosts(file, name string) ([]knownKey, error) {
	text, err := readHostFile(file)
	return parseKnownHosts(file, text, name), err
}

func readHostFile(file string) ([]byte, error) {
	info, err := os.Stat(file)
	if err != nil {
		if os.IsNotExist(err) {
			return nil, nil
		}
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, nil
	}
	if info.Size() > maxKnownHosts {
		return nil, fmt.Errorf("%s is larger than %d MiB", file, maxKnownHosts>>20)
	}
	return os.ReadFile(file)
}

// parseKnownHosts returns the lines that are about name.
func parseKnownHosts(file string, text []byte, name string) []knownKey {
	return parseHostFile(file, text, func(hosts string) bool { return matchHosts(hosts, name) })
}

// parseHostFile skips lines that can't be understood, one by one: a broken line, or a key of a type from the future, must
// not hide the others. Of lines that are not wanted only the names are looked at.
func parseHostFile(file string, text []byte, wanted func(hosts string) bool) []knownKey {
	var keys []knownKey
	n := 0
	for line := range bytes.Lines(text) {
		n++
		if hosts, _, ok := splitHostLine(line); !ok || !wanted(hosts) {
			continue
		}
		if k, ok := parseHostLine(line); ok {
			k.file, k.line = file, n
			keys = append(keys, k)
		}
	}
	return keys
}

// splitHostLine finds the names in a line; fields are what follows the marker.
func splitHostLine(line []byte) (hosts string, fields [][]byte, ok bool) {
	fields = bytes.Fields(line)
	if len(fields) == 0 || fields[0][0] == '#' {
		return "", nil, false
	}
	if fields[0][0] == '@' {
		if m := marker(fields[0]); m != authority && m != revoked {
			return "", nil, false
		}
		fields = fields[1:]
	}
	if len(fields) < 3 {
		return "", nil, false
	}
	return string(fields[0]), fields, true
}

func parseHostLine(line []byte) (knownKey, bool) {
	var k knownKey
	var fields [][]byte
	var ok bool
	if k.hosts, fields, ok = splitHostLine(line); !ok {
		return k, false
	}
	if first := bytes.Fields(line)[0]; first[0] == '@' {
		k.marker = marker(first)
	}
	blob, err := base64.StdEncoding.DecodeString(string(fields[2]))
	if err != nil {
		return k, false
	}
	k.key, err = ssh.ParsePublicKey(blob)
	return k, err == nil && k.key.Type() == string(fields[1])
}

// lookupName is how known_hosts files name a host: [HOST]:PORT for a port other than 22.
func lookupName(host string, port uint16) string {
	host = strings.ToLower(host)
	if port == 22 {
		return host
	}
	return fmt.Sprintf("[%s]:%d", host, port)
}

// matchHosts reports whether the first field of a line is about name, which is in lower case.
func matchHosts(field, name string) bool {
	if strings.HasPrefix(field, "|") {
		return matchHash(field, name)
	}
	matched := false
	for _, pattern := range strings.Split(strings.ToLower(field), ",") {
		pattern, negated := strings.CutPrefix(pattern, "!")
		if pattern == "" || !matchPattern(pattern, name) {
			continue
		}
		if negated {
			return false
		}
		matched = true
	}
	return matched
}

// matchHash compares with |1|SALT|HASH, which HashKnownHosts writes: HMAC-SHA1 of the name.
func matchHash(field, name string) bool {
	parts := strings.Split(field, "|")
	if len(parts) != 4 || parts[1] != "1" {
		return false
	}
	salt, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil {
		return false
	}
	want, err := base64.StdEncoding.DecodeString(parts[3])
	if err != nil {
		return false
	}
	mac := hmac.New(sha1.New, salt)
	mac.Write([]byte(name))
	return hmac.Equal(mac.Sum(nil), want)
}

// matchPattern matches with * and ?, in time linear in each for one *, quadratic at worst.
func matchPattern(pattern, s string) bool {
	p, i := 0, 0
	star, mark := -1, 0 // the last * and where it began to match
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

func sameKey(a, b ssh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }
