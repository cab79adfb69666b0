package use

import (
	"strings"
	"unicode"

	"golang.org/x/text/width"

	"github.com/muxproxy/muxproxy/core/wire"
)

// Printable returns s with everything escaped that a terminal, a log viewer or a reader's eye could be fooled with; see
// wire.Printable.
func Printable(s string) string { return wire.Printable(s) }

// Columns is how many columns of a terminal printable text takes.
func Columns(s string) int {
	n := 0
	for _, r := range s {
		switch kind := width.LookupRune(r).Kind(); {
		case unicode.In(r, unicode.Mn, unicode.Me):
		case kind == width.EastAsianWide, kind == width.EastAsianFullwidth:
			n += 2
		default:
			n++
		}
	}
	return n
}

// Program returns the first word of a command that every POSIX-like login shell reads as plain words, quotes removed, or
// "" if anything else is in it. Understood are words of ordinary characters, 'single quotes' and \c. Everything with
// another meaning to some shell (operators, expansions, globs, assignments, comments, double quotes, control characters
// and newlines, also quoted ones) gives "", and so does a backslash inside single quotes: fish escapes with it there.
//
// Login shells that quote in another way altogether (cmd.exe, rc) may still see other words.
func Program(command string) string {
	var first []byte
	inWord, haveFirst := false, false
	add := func(text string) {
		if !haveFirst {
			first = append(first, text...)
		}
	}
	for i := 0; i < len(command); i++ {
		c := command[i]
		if (c < 0x20 && c != '\t') || c == 0x7f {
			return ""
		}
		switch {
		case c == ' ' || c == '\t':
			haveFirst = haveFirst || inWord
			inWord = false
			continue
		case c == '\'':
			n := strings.IndexByte(command[i+1:], '\'')
			if n < 0 {
				return ""
			}
			quoted := command[i+1 : i+1+n]
			if strings.IndexFunc(quoted, func(r rune) bool { return r < 0x20 || r == 0x7f || r == '\\' }) >= 0 {
				return ""
			}
			add(quoted)
			i += n + 1
		case c == '\\':
			i++
			if i == len(command) || command[i] < 0x20 || command[i] == 0x7f {
				return ""
			}
			add(command[i : i+1])
		case c >= 0x80 || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
			strings.IndexByte("_-./,:+@", c) >= 0:
			add(command[i : i+1])
		case c == '=' && haveFirst && inWord: // NAME=value before a command assigns; zsh expands =name
			add(command[i : i+1])
		case c == '%' && inWord: // fish expands %self, csh and bash %job, all at the start of a word
			add(command[i : i+1])
		case c == '~' && inWord && command[i-1] != '=' && command[i-1] != ':': // elsewhere a home directory
			add(command[i : i+1])
		default:
			return ""
		}
		inWord = true
	}
	return string(first)
}
