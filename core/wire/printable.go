package wire

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
