package use_test

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/muxproxy/muxproxy/core/use"
)

func TestPrintable(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"empty", "", ""},
		{"plain", "alice@db.example.com:22", "alice@db.example.com:22"},
		{"other scripts", "grüße 日本 кот", "grüße 日本 кот"},
		{"composed mark inside", "e\u0301", "e\u0301"},
		{"leading mark", "\u0301e", `\u0301e`},
		{"backslash stays", `DOMAIN\user`, `DOMAIN\user`},
		{"newline, return, tab", "a\nb\rc\td", `a\nb\rc\td`},
		{"escape sequence", "\x1b]0;owned\x07", `\x1b]0;owned\x07`},
		{"nul and delete", "\x00\x7f", `\x00\x7f`},
		{"c1", "a\u009b31mb", `a\u009b31mb`},
		{"raw c1 byte", "a\x9b31mb", `a\x9b31mb`},
		{"bidi override", "safe\u202egnp.exe", `safe\u202egnp.exe`},
		{"bidi isolate", "\u2066x\u2069", `\u2066x\u2069`},
		{"zero width", "a\u200bb\u200d\ufeff", `a\u200bb\u200d\ufeff`},
		{"line separators", "a\u2028b\u2029", `a\u2028b\u2029`},
		{"no-break space", "a\u00a0b", `a\u00a0b`},
		{"hangul filler", "a\u3164b\u115f", `a\u3164b\u115f`},
		{"variation selector", "a\ufe0fb\U000e0100", `a\ufe0fb\U000e0100`},
		{"blank braille", "\u2800", `\u2800`},
		{"tag character", "a\U000e0041", `a\U000e0041`},
		{"private use", "\ue000\U000f0000", `\ue000\U000f0000`},
		{"invalid utf-8", "a\xff\xc3(", `a\xff\xc3(`},
		{"surrogate in utf-8", "\xed\xa0\x80", `\xed\xa0\x80`},
		{"the replacement character itself", "a\ufffdb", "a\ufffdb"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := use.Printable(c.in); got != c.want {
				t.Errorf("Printable(%q) = %q, want %q", c.in, got, c.want)
			}
		})
	}
}

func TestColumns(t *testing.T) {
	for text, want := range map[string]int{"": 0, "abc": 3, "grüße": 5, "日本": 4, "ｆｕ": 4, "e\u0301": 1, "ｶ": 1} {
		if got := use.Columns(text); got != want {
			t.Errorf("Columns(%q) = %d, want %d", text, got, want)
		}
	}
}

func FuzzPrintable(f *testing.F) {
	for _, s := range []string{"", "a", "\x1b[0m", "\u202e\xff", `\x41`, "\u0301"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p := use.Printable(s)
		if !utf8.ValidString(p) {
			t.Fatalf("%q is not UTF-8", p)
		}
		for _, r := range p {
			if !unicode.IsPrint(r) {
				t.Fatalf("%q has %U", p, r)
			}
		}
		if again := use.Printable(p); again != p {
			t.Fatalf("a second pass made %q of %q", again, p)
		}
	})
}

func TestProgram(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"   ", ""},
		{"true", "true"},
		{"  uptime -p ", "uptime"},
		{"git-upload-pack '/srv/x.git'", "git-upload-pack"},
		{`git-upload-pack '/srv/it'\''s.git'`, "git-upload-pack"},
		{`git-receive-pack '/srv/a'\!'b.git'`, "git-receive-pack"},
		{"rsync --server -vlogDtpre.iLsfxC --log-format=X . /srv/a", "rsync"},
		{`rsync --server . /srv/a\ b\*`, "rsync"},
		{"scp -t -- /tmp/x~", "scp"},
		{"/usr/lib/openssh/sftp-server", "/usr/lib/openssh/sftp-server"},
		{"'a b' c", "a b"},
		{"gi't-upload-pack' x", "git-upload-pack"},
		{`\rm -rf x`, "rm"},
		{"'' x", ""},
		{"grüße x", "grüße"},
		{"date +%s", "date"},

		{"git-upload-pack x; id", ""},
		{"git-upload-pack x\nid", ""},
		{"git-upload-pack 'x\nid'", ""},
		{"git-upload-pack x\rid", ""},
		{"git-upload-pack \\\nx", ""},
		{"git-upload-pack x && id", ""},
		{"git-upload-pack x | sh", ""},
		{"git-upload-pack $(id)", ""},
		{"git-upload-pack `id`", ""},
		{"git-upload-pack $HOME", ""},
		{`git-upload-pack "x"`, ""},
		{"git-upload-pack x > y", ""},
		{"git-upload-pack < y", ""},
		{"git-upload-pack *", ""},
		{"git-upload-pack a?", ""},
		{"git-upload-pack [a]", ""},
		{"git-upload-pack {a,b}", ""},
		{"git-upload-pack ~/x", ""},
		{"git-upload-pack --x=~/y", ""},
		{"git-upload-pack x #y", ""},
		{"git-upload-pack =ls", ""},
		{"%1 x", ""},
		{"! true", ""},
		{"^a^b", ""},
		{"(id)", ""},
		{"LD_PRELOAD=/tmp/x git-upload-pack x", ""},
		{"=git-upload-pack x", ""},
		{"git-upload-pack 'x", ""},
		{`git-upload-pack x\`, ""},
		{`git-upload-pack 'a\' 'b'`, ""},
		{"git-upload-pack x\x00", ""},
		{"git-upload-pack 'x\x00'", ""},
		{"git-upload-pack x\x7f", ""},
	} {
		if got := use.Program(c.in); got != c.want {
			t.Errorf("Program(%q) = %q, want %q", c.in, got, c.want)
		}
	}
}

func FuzzProgram(f *testing.F) {
	for _, s := range []string{"a b", "a 'b' c", `a\ b`, "a;b", "'a", "a=b c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := use.Program(s)
		if got == "" {
			return
		}
		if strings.ContainsFunc(s, func(r rune) bool { return r == '\n' || r == '"' || r == '`' || r == '$' }) &&
			!strings.ContainsAny(s, `'\`) {
			t.Fatalf("%q went through as %q", s, got)
		}
		// A word by itself, quoted, is the same program; so is one with arguments.
		if !strings.ContainsAny(got, `'\`) {
			if again := use.Program("'" + got + "' x"); again != got {
				t.Fatalf("Program of %q quoted is %q", got, again)
			}
		}
	})
}
