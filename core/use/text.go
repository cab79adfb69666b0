package use

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Printable returns s with everything escaped that a terminal, a log viewer or a reader's eye could be fooled with:
// control characters (C0, DEL, C1), bidirectional and other format characters, invisible ones, spaces other than
// U+0020, private-use and unassigned code points. Bytes that are not UTF-8 become \xNN, the rest \n, \r, \t, \xNN (below
// U+0080), \uNNNN or \UNNNNNNNN. The result is one line.
//
// A backslash stays as it is: a second pass changes nothing, and a command shows the way it was typed. So the result is
// for showing, not for getting s back.
func Printable(s string) string {
	start := strings.IndexFunc(s, func(r rune) bool { return r == utf8.RuneError || !plain(r) })
	first, _ := utf8.DecodeRuneInString(s)
	if start < 0 && !unicode.Is(unicode.M, first) {
		return s
	}
	var b strings.Builder
	b.Grow(len(s) + 16)
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case plain(r) && !(i == 0 && unicode.Is(unicode.M, r)): // a leading mark would join the text before it
			b.WriteString(s[i : i+n])
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\r':
			b.WriteString(`\r`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
		i += n
	}
	return b.String()
}

// plain reports whether r shows as itself and only as itself. unicode.IsPrint leaves out Cc, Cf, Co, Cs, Cn, Zl, Zp and
// all spaces but U+0020; letters and marks that show as nothing (Hangul fillers, variation selectors, U+034F) and the
// blank Braille pattern it lets through.
func plain(r rune) bool {
	if r < 0x80 {
		return r >= 0x20 && r < 0x7f
	}
	return unicode.IsPrint(r) && r != '\u2800' &&
		!unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector)
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
