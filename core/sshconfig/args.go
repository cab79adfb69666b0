package sshconfig

import (
	"errors"
	"fmt"
	"strings"
)

// Args is the command line of an ssh, taken apart by its own rules.
type Args struct {
	Options     []string // normalised: "-p", "22", "-v", "-v": one letter per word, its argument the next word
	Destination string   // as typed: HOST, USER@HOST or ssh://USER@HOST:PORT; "" if there is none
	Command     []string // what follows the destination and its options
}

// ssh's getopt(3) string, OpenSSH 10.x (ssh.c). 9.3 and older took -P without an argument and ignored it; nothing
// uses that.
const (
	flagLetters = "1246afgknqstvxyACGKMNTVXY"
	argLetters  = "bceilmopBDEFIJLOPQRSWw"
)

// ParseArgs takes an ssh command line apart, argv[0] not included. Its rules are those of ssh.c: BSD getopt, which stops
// at the first word that is no option; the options may go on after the destination, unless `--` came before it.
// Whether values mean something is left to ssh; an error means that ssh would print its usage.
func ParseArgs(argv []string) (Args, error) {
	var a Args
	rest, terminated, err := a.getopt(argv)
	if err != nil {
		return Args{}, err
	}
	if len(rest) == 0 {
		return a, nil
	}
	if a.Destination = rest[0]; a.Destination == "" {
		return Args{}, errors.New("ssh arguments: empty destination")
	}
	if rest = rest[1:]; len(rest) > 0 && !terminated {
		if rest, _, err = a.getopt(rest); err != nil {
			return Args{}, err
		}
	}
	if len(rest) > 0 {
		a.Command = append([]string(nil), rest...)
	}
	return a, nil
}

// getopt appends to a.Options and returns what follows them, and whether `--` ended them.
func (a *Args) getopt(argv []string) (rest []string, terminated bool, err error) {
	for i := 0; i < len(argv); i++ {
		word := argv[i]
		if word == "--" {
			return argv[i+1:], true, nil
		}
		if len(word) < 2 || word[0] != '-' {
			return argv[i:], false, nil
		}
		for j := 1; j < len(word); j++ {
			c := word[j]
			switch {
			case strings.IndexByte(flagLetters, c) >= 0:
				a.Options = append(a.Options, "-"+string(c))
				continue
			case strings.IndexByte(argLetters, c) < 0:
				return nil, false, fmt.Errorf("ssh arguments: unknown option -%q", c)
			case j+1 < len(word):
				a.Options = append(a.Options, "-"+string(c), word[j+1:])
			case i+1 < len(argv):
				i++
				a.Options = append(a.Options, "-"+string(c), argv[i])
			default:
				return nil, false, fmt.Errorf("ssh arguments: option -%c needs an argument", c)
			}
			break
		}
	}
	return nil, false, nil
}

// Shape returns the options that shape the connection or matter to `ssh -G`, in their order, normalised: what two
// command lines must share to mean the same. Left out are those that say what to do with the connection (-L, -N, -t...),
// where to log (-E), or what else ssh should be (-G, -O, -Q, -V).
func (a Args) Shape() []string { return a.filter("46abcilmopqvABCFIJKPk") }

// forResolve is Shape and what Match sessiontype and Match command look at, but for -q, which would hide why ssh -G
// failed.
func (a Args) forResolve() []string { return a.filter("46abcilmopvABCFIJKPkNsTt") }

func (a Args) filter(letters string) []string {
	var out []string
	for i := 0; i < len(a.Options); i++ {
		o := a.Options[i]
		if len(o) != 2 {
			continue // not made by ParseArgs
		}
		hasArg := strings.IndexByte(argLetters, o[1]) >= 0
		if strings.IndexByte(letters, o[1]) >= 0 {
			out = append(out, o)
			if hasArg && i+1 < len(a.Options) {
				out = append(out, a.Options[i+1])
			}
		}
		if hasArg {
			i++
		}
	}
	return out
}

// configFile is the argument of the last -F, as ssh takes it.
func (a Args) configFile() (string, bool) {
	name, found := "", false
	for i := 0; i+1 < len(a.Options); i++ {
		if o := a.Options[i]; len(o) == 2 && strings.IndexByte(argLetters, o[1]) >= 0 {
			i++
			if o == "-F" {
				name, found = a.Options[i], true
			}
		}
	}
	return name, found
}

// Host is the host part of the destination: what ssh calls %n.
func (a Args) Host() string {
	d := a.Destination
	uri := false
	if len(d) >= 6 && strings.EqualFold(d[:6], "ssh://") {
		uri = true
		d = d[6:]
		if i := strings.IndexByte(d, '/'); i >= 0 {
			d = d[:i]
		}
	}
	if i := strings.LastIndexByte(d, '@'); i >= 0 {
		d = d[i+1:]
	}
	if !uri {
		return d
	}
	if strings.HasPrefix(d, "[") {
		if i := strings.IndexByte(d, ']'); i >= 0 {
			return d[1:i]
		}
	}
	if i := strings.IndexByte(d, ':'); i >= 0 {
		return d[:i]
	}
	return d
}
