package sshconfig

import (
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestParseArgs(t *testing.T) {
	for _, tc := range []struct {
		argv    string // words separated by spaces
		options string
		dest    string
		command string
	}{
		{"host", "", "host", ""},
		{"", "", "", ""},
		{"-V", "-V", "", ""},
		{"-vvp22 host", "-v -v -p 22", "host", ""},
		{"-p 22 -l bob host ls -l", "-p 22 -l bob", "host", "ls -l"},
		{"host -p 22 ls -p 23", "-p 22", "host", "ls -p 23"},
		{"host -tt -- -x", "-t -t", "host", "-x"},
		{"-- host -p 22", "", "host", "-p 22"},
		{"-- -host", "", "-host", ""},
		{"-4NfTp 2222 u@h", "-4 -N -f -T -p 2222", "u@h", ""},
		{"-oPort=22 -o User=x ssh://a@[::1]:44", "-o Port=22 -o User=x", "ssh://a@[::1]:44", ""},
		{"-p -- host", "-p --", "host", ""},
		{"-F f -i k -J a,b -b 1.2.3.4 -B lo host", "-F f -i k -J a,b -b 1.2.3.4 -B lo", "host", ""},
		{"host - -p", "", "host", "- -p"},
		{"-P tag -Yy host", "-P tag -Y -y", "host", ""},
		{"-L8080:x:80 host -s sftp", "-L 8080:x:80 -s", "host", "sftp"},
	} {
		got, err := ParseArgs(strings.Fields(tc.argv))
		if err != nil {
			t.Errorf("%q: %v", tc.argv, err)
			continue
		}
		if o, c := strings.Join(got.Options, " "), strings.Join(got.Command, " "); o != tc.options ||
			got.Destination != tc.dest || c != tc.command {
			t.Errorf("%q: got options %q, destination %q, command %q", tc.argv, o, got.Destination, c)
		}
	}
	for _, argv := range []string{"-p", "-z host", "-9 host", "host -o", "-vp"} {
		if got, err := ParseArgs(strings.Fields(argv)); err == nil {
			t.Errorf("%q: no error, got %+v", argv, got)
		}
	}
	if _, err := ParseArgs([]string{""}); err == nil {
		t.Error("an empty destination passed")
	}
}

func TestShape(t *testing.T) {
	a, err := ParseArgs(strings.Fields("-vv -q -L 1:x:2 -R 3 -D4 -W x:1 -S s -E log -Op -MNnfTtsGV -o A=b -F f -i k " +
		"-l u -p 1 -J j -b b -B B -c c -m m -I I -A -a -C -4 -6 -P t -Q q -w 0 -e ~ -X -x -Y -g -y host cmd"))
	if err != nil {
		t.Fatal(err)
	}
	want := "-v -v -q -o A=b -F f -i k -l u -p 1 -J j -b b -B B -c c -m m -I I -A -a -C -4 -6 -P t"
	if got := strings.Join(a.Shape(), " "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestArgsHost(t *testing.T) {
	for dest, want := range map[string]string{
		"h": "h", "u@h": "h", `d\u@x@h`: "h", "::1": "::1", "u@::1": "::1", "ssh://h": "h", "ssh://u@h:22": "h",
		"SSH://u@[::1]:22/": "::1", "ssh://[fe80::1]": "fe80::1", "": "",
	} {
		if got := (Args{Destination: dest}).Host(); got != want {
			t.Errorf("%q: got %q, want %q", dest, got, want)
		}
	}
}

func FuzzParseArgs(f *testing.F) {
	f.Add("-p\x0022\x00host\x00ls")
	f.Add("-vvoA=b\x00--\x00host")
	f.Add("host\x00-p22\x00--\x00-x")
	f.Fuzz(func(t *testing.T, s string) {
		argv := strings.Split(s, "\x00")
		a, err := ParseArgs(argv)
		if err != nil {
			return
		}
		// What was normalised means the same.
		again := slices.Clone(a.Options)
		if a.Destination != "" {
			again = append(append(again, "--", a.Destination), a.Command...)
		}
		b, err := ParseArgs(again)
		if err != nil || !reflect.DeepEqual(a, b) {
			t.Fatalf("%q: %+v, then %+v, %v", argv, a, b, err)
		}
		shape := a.Shape()
		c, err := ParseArgs(shape)
		if err != nil || !slices.Equal(c.Shape(), shape) || c.Destination != "" {
			t.Fatalf("%q: shape %q, then %+v, %v", argv, shape, c, err)
		}
		a.forResolve()
		a.Host()
	})
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("host x\nuser y z\nidentityfile ~/a b\n"))
	f.Add([]byte("canonicalizePermittedcnames none\r\n\n  x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		options, err := Parse(b)
		if err != nil {
			if len(options) != 0 {
				t.Fatal("options and an error")
			}
			return
		}
		for k, values := range options {
			if k == "" || k != strings.ToLower(k) || len(values) == 0 || strings.ContainsAny(k, " \n") {
				t.Fatalf("%q: keyword %q with %q", b, k, values)
			}
			for _, v := range values {
				if strings.Contains(v, "\n") {
					t.Fatalf("%q: value %q", b, v)
				}
				splitPaths(v)
			}
		}
	})
}

func FuzzWords(f *testing.F) {
	f.Add(`a "b c" 'd' \ e # f`)
	f.Fuzz(func(t *testing.T, s string) {
		ours(s)
		keyword(s)
		matchIsVolatile(s)
		list, ok := words(s)
		if !ok {
			return
		}
		line := ""
		for _, w := range list {
			line += " " + quoteWord(w)
		}
		if again, ok := words(line); !ok || !slices.Equal(list, again) {
			t.Fatalf("%q: %q, written as %q, read back as %q", s, list, line, again)
		}
	})
}

func TestOurs(t *testing.T) {
	for command, want := range map[string]bool{
		"muxproxy %r@%h:%p":                  true,
		"/usr/local/bin/muxproxy --fdpass x": true,
		`"/a b/muxproxy" '%r@%h:%p' '%n'`:    true,
		`'/a b'/muxproxy x`:                  true,
		`/a\ b/muxproxy x`:                   true,
		"exec ~/bin/muxproxy x":              true,
		"exec -a x muxproxy y":               true,
		"env -i A=b HOME=/x muxproxy x":      true,
		"/usr/bin/env -u A muxproxy x":       true,
		"MUXPROXY_CONFIG=/x muxproxy x":      true,
		`A="b c" exec muxproxy`:              true,
		"%d/bin/muxproxy x":                  true,
		`"C:\\bin\\MuxProxy.exe" x`:          true,
		"nice muxproxy '%r@%h:%p'":           true,
		`sh -c "muxproxy %r@%h:%p"`:          true,
		"[ -x /x/muxproxy ] && exec /x/muxproxy '%r@%h:%p' '%n' || nc %h %p": true,
		"if true; then muxproxy %r@%h:%p; fi":                                true,
		"nc %h %p":                                                           false,
		"ssh -W %h:%p muxproxy":                                              false,
		"nc -X 5 -x localhost:1080 %h %p # muxproxy":                         false,
		"muxproxyd x":                                                        false,
		"/opt/muxproxy/nc":                                                   false,
		"none":                                                               false,
		"":                                                                   false,
		"env":                                                                false,
		"cloudflared access ssh --hostname muxproxy ": false,
	} {
		if got := ours(command); got != want {
			t.Errorf("%q: %v", command, got)
		}
	}
}

func TestSplitPaths(t *testing.T) {
	for line, want := range map[string]string{
		"":                        "",
		"/a/b":                    "/a/b",
		"/a b/c /d":               "/a b/c|/d",
		"/a/x y z":                "/a/x y z",
		"~/a b %d/c ${X}/d e":     "~/a b|%d/c|${X}/d e",
		"a b":                     "a|b",
		"none":                    "none",
		`C:/x y C:\z`:             `C:/x y|C:\z`,
		"/etc/ssh/a /etc/ssh/b c": "/etc/ssh/a|/etc/ssh/b c",
	} {
		if got := strings.Join(splitPaths(line), "|"); got != want {
			t.Errorf("%q: got %q, want %q", line, got, want)
		}
	}
}
