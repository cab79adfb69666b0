package policy

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/zclconf/go-cty/cty"
)

// path makes a path of words and numbers.
func path(s string) cty.Path {
	var p cty.Path
	for _, w := range strings.Fields(s) {
		if n, err := strconv.Atoi(w); err == nil {
			p = p.IndexInt(n)
		} else {
			p = p.GetAttr(w)
		}
	}
	return p
}

func TestCanonical(t *testing.T) {
	for _, c := range []struct{ in, name, host string }{
		{"Example.COM", "example.com", ""},
		{"example.com.", "example.com", ""},
		{"BÜCHER.example.", "xn--bcher-kva.example", ""},
		{"ｅxample.com", "example.com", ""},
		{"xn--bcher-kva.example", "xn--bcher-kva.example", ""},
		{"_srv.x_y", "_srv.x_y", ""},
		{".", ".", ""},
		{"", "", ""},
		{"2001:DB8::0001", "2001:db8::1", ""},
		{"[2001:db8::1]", "2001:db8::1", ""},
		{"[x", "[x", ""},
		{"::ffff:10.0.0.1", "10.0.0.1", ""},
		{"fe80::1%eth0", "fe80::1%eth0", ""},
		{"2001:db8::1%eth0", "2001:db8::1", ""},
		{"::1%1", "::1", ""},
		{"2001:db8::1%2.", "2001:db8::1", ""},
		{"10.0.0.1.", "10.0.0.1", ""},
		{"127.1", "127.1", "127.0.0.1"},
		{"0x7F000001", "0x7f000001", "127.0.0.1"},
		{"2130706433", "2130706433", "127.0.0.1"},
		{"0177.0.0.1", "0177.0.0.1", "127.0.0.1"},
		{"10.1.258", "10.1.258", "10.1.1.2"},
		{"256.1", "256.1", "256.1"},
		{"1.2.3.4.5", "1.2.3.4.5", ""},
		{"+1", "+1", ""},
		{"0x", "0x", ""},
		{"a\xffb", "a\xffb", ""},
	} {
		if got := canonicalName(c.in); got != c.name {
			t.Errorf("name %q: %q, want %q", c.in, got, c.name)
		}
		if c.host == "" {
			c.host = c.name
		}
		if got := canonicalHost(c.in); got != c.host {
			t.Errorf("host %q: %q, want %q", c.in, got, c.host)
		}
	}
}

func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		labels string
		names  string // space separated: host and alias
		want   bool
	}{
		{"*", "x", true},
		{"*.Example.com", "a.example.com", true},
		{"*.example.com.", "a.example.com", true},
		{"*.example.com", "example.com", false},
		{"web?", "web1", true},
		{"web?", "web", false},
		{"a b", "b", true},
		{"* !b", "b", false},
		{"* !b", "a b", false}, // the alias takes away, too
		{"b", "a b", true},
		{"2001:DB8:0::1", "2001:db8::1", true},
		{"10.0.*", "10.0.3.4", true},
		{"BÜCHER.*", "xn--bcher-kva.example", true},
		{"bücher.example", "xn--bcher-kva.example", true},
		{"!b", "a", false},
	} {
		var p patterns
		for _, label := range strings.Fields(c.labels) {
			pattern, not, err := parsePattern(label)
			if err != nil {
				t.Fatal(err)
			}
			if not {
				p.no = append(p.no, pattern)
			} else {
				p.yes = append(p.yes, pattern)
			}
		}
		if got := p.match(strings.Fields(c.names)...); got != c.want {
			t.Errorf("%q, %q: %v", c.labels, c.names, got)
		}
	}
}

// What `covers` claims is true of every name.
func TestCovers(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	claimed := 0
	for range 20000 {
		p, q := randomPatterns(rng), randomPatterns(rng)
		if !p.covers(q) {
			continue
		}
		claimed++
		for range 20 {
			a, b := randomWord(rng, "ab.", 4), randomWord(rng, "ab.", 4)
			if q.match(a) && !p.match(a) || q.match(a, b) && !p.match(a, b) {
				t.Fatalf("%q is said to cover %q, but not %q, %q", p, q, a, b)
			}
		}
	}
	if claimed < 100 {
		t.Errorf("only %d cases", claimed)
	}
}

func randomWord(rng *rand.Rand, alphabet string, n int) string {
	b := make([]byte, 1+rng.IntN(n))
	for i := range b {
		b[i] = alphabet[rng.IntN(len(alphabet))]
	}
	return string(b)
}

func randomPatterns(rng *rand.Rand) (p patterns) {
	for range 1 + rng.IntN(2) {
		p.yes = append(p.yes, randomWord(rng, "ab.*?*", 4))
	}
	if rng.IntN(3) == 0 {
		p.no = append(p.no, randomWord(rng, "ab.*?", 3))
	}
	return p
}

// Host blocks match as those of ssh_config do. Each Host block of the file adds its number to SendEnv, so that one `ssh -G`
// says of one name which of all the blocks match.
func TestMatchAsOpenSSH(t *testing.T) {
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal("ssh is not installed")
	}
	rng := rand.New(rand.NewPCG(1, 2))
	const alphabet = "ab1-."
	all := []patterns{
		{yes: []string{"*"}}, {yes: []string{"?"}}, {yes: []string{"**a"}}, {yes: []string{"a*?"}}, {yes: []string{"*"}, no: []string{"a*"}},
		{no: []string{"a"}}, {yes: []string{"*.*.*"}}, {yes: []string{"*a*b*"}},
	}
	for range 400 {
		var p patterns
		for range 1 + rng.IntN(3) {
			p.yes = append(p.yes, randomWord(rng, alphabet+"**??", 6))
		}
		for range rng.IntN(2) {
			p.no = append(p.no, randomWord(rng, alphabet+"*?", 5))
		}
		all = append(all, p)
	}
	var config strings.Builder
	for i, p := range all {
		fmt.Fprintf(&config, "Host %s", strings.Join(p.yes, " "))
		for _, n := range p.no {
			fmt.Fprintf(&config, " !%s", n)
		}
		fmt.Fprintf(&config, "\nSendEnv M%d\n", i)
	}
	file := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(file, []byte(config.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	matched := 0
	for range 60 {
		name := "a" + randomWord(rng, alphabet, 7)
		name = strings.TrimRight(name, ".")
		if canonicalName(name) != name {
			t.Fatalf("%q is not canonical", name)
		}
		out, err := exec.CommandContext(t.Context(), ssh, "-G", "-F", file, "--", name).Output()
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		var theirs []string
		for line := range strings.Lines(string(out)) {
			if m, ok := strings.CutPrefix(strings.TrimSpace(line), "sendenv "); ok {
				theirs = append(theirs, m)
			}
		}
		for i, p := range all {
			m := p.match(name)
			if m {
				matched++
			}
			if want := slices.Contains(theirs, "M"+strconv.Itoa(i)); m != want {
				t.Errorf("%q against %q: %v, ssh says %v", name, p, m, want)
			}
		}
	}
	if matched < 100 {
		t.Errorf("only %d matches", matched)
	}
}
