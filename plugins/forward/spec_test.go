package forward

import (
	"os/exec"
	"strings"
	"testing"
)

// Specifications with what they mean; "": refused. ssh says itself what it takes.
var specs = []struct {
	option string
	text   string
	want   string
	stray  bool // ssh takes what means nothing here
}{
	{option: "-D", text: "1080", want: "dynamic 1080"},
	{option: "-D", text: "127.0.0.1:1080", want: "dynamic 127.0.0.1:1080"},
	{option: "-D", text: "[::1]:1080", want: "dynamic [::1]:1080"},
	{option: "-D", text: "*:1080", want: "dynamic *:1080"},
	{option: "-D", text: ":1080", want: "dynamic *:1080"},
	{option: "-D", text: "/run/socks", want: "dynamic /run/socks"},
	{option: "-D", text: "1080:", want: "dynamic 1080"},
	{option: "-D", text: "0"},
	{option: "-D", text: "65536"},
	{option: "-D", text: "-1"},
	{option: "-D", text: ""},
	{option: "-D", text: ":"},
	{option: "-D", text: "1080:a:80"},
	{option: "-D", text: "/run/socks:1080", stray: true},
	{option: "-L", text: "8080:localhost:80", want: "local 8080 to localhost:80"},
	{option: "-L", text: " 8080:localhost:80", want: "local 8080 to localhost:80"},
	{option: "-L", text: "8080:localhost:80:", want: "local 8080 to localhost:80"},
	{option: "-L", text: "127.0.0.1:8080:localhost:80", want: "local 127.0.0.1:8080 to localhost:80"},
	{option: "-L", text: "[::1]:8080:[2001:db8::1]:80", want: "local [::1]:8080 to [2001:db8::1]:80"},
	{option: "-L", text: "*:8080:h:80", want: "local *:8080 to h:80"},
	{option: "-L", text: ":8080:h:80", want: "local *:8080 to h:80"},
	{option: "-L", text: "[8080]:h:80", want: "local 8080 to h:80"},
	{option: "-L", text: `80\80:h:80`, want: "local 8080 to h:80"},
	{option: "-L", text: "8080:/run/x.sock", want: "local 8080 to /run/x.sock"},
	{option: "-L", text: `8080:/run/x\:y`, want: "local 8080 to /run/x:y"},
	{option: "-L", text: "8080:[/run/x:y]", want: "local 8080 to /run/x:y"},
	{option: "-L", text: "h:8080:/run/x.sock", want: "local h:8080 to /run/x.sock"},
	{option: "-L", text: "/run/a:/run/b", want: "local /run/a to /run/b"},
	{option: "-L", text: "/run/a:h:80", want: "local /run/a to h:80"},
	{option: "-L", text: "run/a:h:80", stray: true},
	{option: "-L", text: "8080::80", stray: true},
	{option: "-L", text: "8080"},
	{option: "-L", text: "8080:80"},
	{option: "-L", text: "/run/a"},
	{option: "-L", text: "/run/a:80"},
	{option: "-L", text: "8080:h:0"},
	{option: "-L", text: "0:h:80"},
	{option: "-L", text: "8080:h:"},
	{option: "-L", text: "8080:h:99999"},
	{option: "-L", text: "a:b:c:d:e"},
	{option: "-L", text: "1:2:3:4:5"},
	{option: "-L", text: "8080:h:no-such-service"},
	{option: "-L", text: "::1:8080:h:80"},
	{option: "-L", text: "[::1:8080:h:80"},
	{option: "-L", text: "[::1]x:8080:h:80"},
	{option: "-L", text: `8080:h:80\`},
	{option: "-L", text: "/" + strings.Repeat("x", 200) + ":h:80"},
	{option: "-L", text: "8080:" + strings.Repeat("x", 1025) + ":80"},
	{option: "-R", text: "8080:localhost:80", want: "remote 8080 to localhost:80"},
	{option: "-R", text: "0:localhost:80", want: "remote 0 to localhost:80"},
	{option: "-R", text: "*:0:localhost:80", want: "remote *:0 to localhost:80"},
	{option: "-R", text: "/run/a:/run/b", want: "remote /run/a to /run/b"},
	{option: "-R", text: "8080:/run/b", want: "remote 8080 to /run/b"},
	{option: "-R", text: "1080", want: "remote 1080"},
	{option: "-R", text: "[::]:1080", want: "remote [::]:1080"},
	{option: "-R", text: "8080:localhost:0"},
	{option: "-R", text: "a:b:c"},
	{option: "-R", text: ""},
}

var kinds = map[string]kind{"-D": dynamic, "-L": local, "-R": remote}

func TestSpec(t *testing.T) {
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range specs {
		s, err := parseSpec(kinds[c.option], c.text)
		if (err == nil) != (c.want != "") || err == nil && s.String() != c.want {
			t.Errorf("%s %q: %q, %v; want %q", c.option, c.text, s, err, c.want)
		}
		if err != nil && (strings.Contains(err.Error(), "\n") || err.Error() == "") {
			t.Errorf("%s %q: %v", c.option, c.text, err)
		}
		out, err := exec.Command(ssh, "-F", "none", "-G", c.option, c.text, "h").CombinedOutput()
		if took := err == nil; took != (c.want != "" || c.stray) {
			t.Errorf("%s %q: ssh's own opinion: %v, %s", c.option, c.text, err, out)
		}
	}
}

func TestEndpoints(t *testing.T) {
	t.Setenv("HOME", "/home/me")
	for _, c := range []struct {
		kind    kind
		text    string
		want    string
		gateway bool
	}{
		{dynamic, "127.0.0.1:1080", "127.0.0.1:1080", false},
		{dynamic, "127.9.9.9:1080", "127.9.9.9:1080", false},
		{dynamic, "localhost:1080", "localhost:1080", false},
		{dynamic, "1080", "1080", false},
		{dynamic, "[::1]:1080", "[::1]:1080", false},
		{dynamic, "[::ffff:127.0.0.1]:1080", "[::ffff:127.0.0.1]:1080", false},
		{dynamic, "~/socks", "/home/me/socks", false},
		{dynamic, ":1080", "*:1080", true},
		{dynamic, "*:1080", "*:1080", true},
		{dynamic, "0.0.0.0:1080", "0.0.0.0:1080", true},
		{dynamic, "[::]:1080", "[::]:1080", true},
		{dynamic, "192.0.2.1:1080", "192.0.2.1:1080", true},
		{dynamic, "name:1080", "name:1080", true},
		{dynamic, "0", "", false},
		{local, "127.0.0.1:0", "", false},
		{remote, "127.0.0.1:0", "127.0.0.1:0", false},
		{dynamic, "", "", false},
		{dynamic, "socks/x", "", false},
		{dynamic, "1:a:2", "", false},
		{dynamic, "8080:/run/x", "", false},
		{dynamic, "::1:1080", "", false},
	} {
		e, err := parseListen(c.kind, c.text)
		if (err == nil) != (c.want != "") || err == nil && (e.String() != c.want || e.gateway() != c.gateway) {
			t.Errorf("%s %q: %q, gateway %v, %v", c.kind, c.text, e, e.gateway(), err)
		}
	}
	for text, want := range map[string]string{
		"localhost:5432": "localhost:5432", "[::1]:80": "[::1]:80", "/run/x": "/run/x", "~/x": "/home/me/x", "h:http": "h:80",
		"": "", "h": "", "h:0": "", ":80": "", "1:2:3": "", "80": "", "x/y": "",
	} {
		if e, err := parseTo(text); (err == nil) != (want != "") || err == nil && e.String() != want {
			t.Errorf("to %q: %q, %v", text, e, err)
		}
	}
}

// What is read is printed so that it means the same again.
func FuzzSpec(f *testing.F) {
	for _, c := range specs {
		f.Add(c.option[1], c.text)
	}
	f.Fuzz(func(t *testing.T, option byte, text string) {
		k, ok := kinds["-"+string(option)]
		if !ok {
			k = local
		}
		s, err := parseSpec(k, text)
		if err != nil {
			return
		}
		if k == local && s.to == (endpoint{}) || k == dynamic && s.to != (endpoint{}) {
			t.Errorf("%q: %+v", text, s)
		}
		if s.listen.path != "" && (s.listen.path[0] != '/' || s.listen.host != "" || s.listen.port != 0) {
			t.Errorf("%q: %+v", text, s)
		}
		if s.listen.port < 0 || s.listen.port > 65535 || s.to.port < 0 || s.to.port > 65535 {
			t.Errorf("%q: %+v", text, s)
		}
		again := "[" + s.listen.host + "]:" + s.listen.address()[strings.LastIndexByte(s.listen.address(), ':')+1:]
		if s.listen.path != "" || s.to.path != "" || s.to.port == 0 || strings.ContainsAny(s.listen.host+s.to.host, "[]") || s.listen.host == "" {
			return
		}
		if r, err := parseSpec(k, again+":["+s.to.host+"]:"+s.to.address()[strings.LastIndexByte(s.to.address(), ':')+1:]); err != nil || r != s {
			t.Errorf("%q: %+v, then %+v, %v", text, s, r, err)
		}
	})
}
