package wire

import (
	"strconv"
	"unicode/utf8"
)

// Printable makes text from the network, from a caller or from a plugin fit for one line on a terminal or in a log:
// control characters (C0, DEL, C1), line separators, invisible and direction-changing characters and bytes that are
// not UTF-8 become escapes as in Go's strings, "\n" or "\u202e". Everything else stays, backslashes too, so the
// result can't be turned back.
func Printable(s string) string {
	i := 0
	for i < len(s) {
		r, n := utf8.DecodeRuneInString(s[i:])
		if !plain(r, n) {
			break
		}
		i += n
	}
	if i == len(s) {
		return s
	}
	out := append(make([]byte, 0, len(s)+16), s[:i]...)
	for i < len(s) {
		r, n := utf8.DecodeRuneInString(s[i:])
		if plain(r, n) {
			out = append(out, s[i:i+n]...)
		} else {
			q := strconv.AppendQuote(nil, s[i:i+n])
			out = append(out, q[1:len(q)-1]...)
		}
		i += n
	}
	return string(out)
}

func plain(r rune, n int) bool { return strconv.IsPrint(r) && (r != utf8.RuneError || n > 1) }
