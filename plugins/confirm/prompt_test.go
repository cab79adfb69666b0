package confirm

import (
	"fmt"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/muxproxy/muxproxy/core/plugin"
)

func proc(pid int, exe string, args ...string) plugin.Process {
	return plugin.Process{PID: pid, Start: uint64(pid), Exe: exe, Args: args}
}

func TestPrompt(t *testing.T) {
	target := plugin.Target{User: "deploy", Host: "db.example.com", Port: 22, Alias: "db"}
	git := proc(4121, "/usr/bin/git", "git", "fetch", "origin")
	git.Cwd, git.TTY = "/home/me/src", "/dev/pts/3"
	chain := []plugin.Process{proc(4123, "/usr/bin/muxproxy"), proc(4122, "/usr/bin/ssh", "ssh", "db"), git, proc(991, "/bin/zsh"), proc(900, "/usr/bin/kitty")}
	u := plugin.Use{Kind: "exec", Target: target, Command: "git-upload-pack '/srv/x.git'"}
	got := prompt(u, nil, chain, "Yes counts for this one.")
	want := `muxproxy: allow this use of a shared SSH connection?

asked by: git (4121) <- zsh <- kitty
host: deploy@db.example.com:22 (db)
exec: git-upload-pack '/srv/x.git'

it claims to be: git fetch origin
in: /home/me/src
on: /dev/pts/3
Yes counts for this one.`
	if got != want {
		t.Errorf("%s", got)
	}
	var others []plugin.Use
	for i := range 5 {
		others = append(others, plugin.Use{Kind: "exec", Target: target, Command: fmt.Sprint("echo ", i)})
	}
	got = prompt(u, others, nil, "Yes.")
	if !strings.Contains(got, "\nand exec: echo 0\nand exec: echo 1\nand exec: echo 2\nand 2 more that wait for the same answer\n") ||
		!strings.Contains(got, "asked by: a process of uid 0 that can't be seen\n") {
		t.Errorf("%s", got)
	}
	for kind, want := range map[string]string{
		"attach": "attach: log in, or join the connection", "shell": "shell: a shell", "subsystem": "subsystem: sftp",
		"local-forward": "local-forward: to 10.0.0.1:80", "remote-forward": "remote-forward: listen there on 10.0.0.1:80",
		"cancel-forward": "cancel-forward: listen there no more on 10.0.0.1:80", "agent": "agent: let that host use your ssh agent",
		"x11": "x11: let that host use your display", "jump": "jump: on to 10.0.0.1:80", "other": "other: tun@openssh.com 10.0.0.1:80",
		"control": "control: tun@openssh.com 10.0.0.1:80", "of-a-later-version": "of-a-later-version: tun@openssh.com 10.0.0.1:80",
	} {
		u := plugin.Use{Kind: kind, Target: target, Subsystem: "sftp", Addr: "10.0.0.1:80", Name: "tun@openssh.com"}
		if got := prompt(u, nil, chain, ""); !strings.Contains(got, "\n"+want+"\n") {
			t.Errorf("%s: %s", kind, got)
		}
	}
	u = plugin.Use{Kind: "remote-forward", Target: target, Addr: "10.0.0.1:80", Name: "connect"}
	if got := prompt(u, nil, chain, ""); !strings.Contains(got, "\nremote-forward: let that host connect to 10.0.0.1:80\n") {
		t.Error(got)
	}
	long := "begin" + strings.Repeat("x", 100_000) + "; rm -rf ~"
	got = prompt(plugin.Use{Kind: "exec", Target: target, Command: long}, nil, chain, "")
	if !strings.Contains(got, "exec: beginxxx") || !strings.Contains(got, "xxx; rm -rf ~\n") {
		t.Errorf("a long command: %s", got)
	}
	var hidden int
	_, after, _ := strings.Cut(got, "\n-- ")
	if _, err := fmt.Sscanf(after, "%d bytes in the middle are not shown --\n", &hidden); err != nil || hidden+strings.Count(got, "x") < 100_000 {
		t.Errorf("%d bytes are said to be hidden: %v\n%s", hidden, err, got)
	}
}

// What the person reads of who asks.
func TestChain(t *testing.T) {
	mux, ssh := proc(10, "/usr/bin/muxproxy"), proc(9, "/usr/bin/ssh")
	for _, c := range []struct {
		chain []plugin.Process
		want  string
	}{
		{nil, "a process of uid 7 that can't be seen"},
		{[]plugin.Process{mux}, "muxproxy (10)"},
		{[]plugin.Process{mux, ssh}, "ssh (9)"},
		{[]plugin.Process{ssh}, "ssh (9)"},
		{[]plugin.Process{mux, ssh, proc(8, "/usr/bin/scp"), proc(7, "/bin/zsh")}, "scp (8) <- zsh"},
		{[]plugin.Process{mux, proc(8, "/opt/plink"), proc(7, "/bin/zsh")}, "plink (8) <- zsh"},
		{[]plugin.Process{mux, ssh, proc(8, "/usr/bin/tmux (deleted)")}, "tmux (8)"},
		{[]plugin.Process{mux, ssh, proc(8, "/nix/store/x/bin/.git-wrapped")}, "git (8)"},
		{[]plugin.Process{mux, ssh, proc(8, "[tmux: server]")}, `"[tmux: server]" (8)`},
		{[]plugin.Process{mux, ssh, proc(8, "/tmp/git (1) <- zsh")}, `"git (1) <- zsh" (8)`},
		{[]plugin.Process{mux, ssh, proc(8, "/tmp/a\nhost: b\x1b[2J\u202e")}, `"a\nhost: b\x1b[2J\u202e" (8)`},
		{[]plugin.Process{mux, ssh, proc(8, "")}, "? (8)"},
	} {
		if got := chainText(asking(c.chain), 7); !strings.Contains(got, c.want) {
			t.Errorf("%v: %s, want %s", c.chain, got, c.want)
		}
	}
	var many []plugin.Process
	for i := range 32 {
		many = append(many, proc(100-i, fmt.Sprintf("/bin/p%d", i)))
	}
	if got := chainText(many, 0); got != "p0 (100) <- p1 <- p2 <- p3 <- p4 <- p5 <- (25 more) <- p31" {
		t.Error(got)
	}
}

func TestLine(t *testing.T) {
	chain := []plugin.Process{proc(10, "/usr/bin/muxproxy"), proc(9, "/usr/bin/ssh", "ssh", "db", "up\ntime"), proc(8, "/usr/bin/git")}
	got := line(plugin.Use{Kind: "attach", Processes: chain, Target: plugin.Target{User: "u", Host: "h", Port: 22}}, "Yes counts.")
	if got != `allow git (8) to use the connection to u@h:22? Yes counts. It claims to be: ssh db up\ntime` {
		t.Error(got)
	}
}

// Whatever callers choose: a prompt has only graphic characters, lines that are short, and no line of ours but our own.
func FuzzPrompt(f *testing.F) {
	f.Add("exec", "ls\nhost: other", "/bin/sh\n", "arg", "h\x1b[2J")
	f.Add("exec", "\u202egpj.exe", "git <- zsh", "\xff\xfe", "h")
	f.Add("later\nkind", strings.Repeat("é\u3000", 9000), strings.Repeat("n", 300), "", "-- 5 bytes in the middle are not shown --")
	f.Add("exec", strings.Repeat(`\`, 5000), "x", strings.Repeat("\x00", 5000), "h")
	f.Fuzz(func(t *testing.T, kind, command, exe, arg, host string) {
		p := plugin.Process{PID: 5, Exe: exe, Args: []string{arg, arg}, Cwd: arg, TTY: exe}
		u := plugin.Use{Kind: kind, Command: command, Name: command, Addr: arg, Subsystem: command, Target: plugin.Target{User: arg, Host: host, Alias: command}}
		got := prompt(u, []plugin.Use{u, u}, []plugin.Process{p, p, p}, "Yes counts.")
		if !utf8.ValidString(got) || len(got) > 16<<10 {
			t.Fatalf("%d bytes, valid %v", len(got), utf8.ValidString(got))
		}
		lines := strings.Split(got, "\n")
		if lines[0] != firstLine || lines[len(lines)-1] != "Yes counts." {
			t.Errorf("%q, %q", lines[0], lines[len(lines)-1])
		}
		label := kindLabel(kind)
		hosts := 0
		for _, l := range lines {
			for _, r := range l {
				if !unicode.IsGraphic(r) {
					t.Errorf("%q in %q", r, l)
				}
			}
			if n := utf8.RuneCountInString(l); n > lineWidth {
				t.Errorf("%d columns: %q", n, l)
			}
			if strings.HasPrefix(l, "host: ") {
				hosts++
			}
			var n int
			_, cutErr := fmt.Sscanf(l, hiddenBytes, &n)
			ours := l == "" || strings.HasPrefix(l, continued) || cutErr == nil || l == firstLine || l == "Yes counts."
			for _, word := range []string{"asked by: ", "host: ", "it claims to be: ", "in: ", "on: ", label + ": ", "and " + label + ": "} {
				ours = ours || strings.HasPrefix(l, strings.TrimRight(word, " "))
			}
			if !ours {
				// A label of a kind to come can itself be so long that it is broken.
				if len(label) < 30 {
					t.Errorf("whose line is %q?", l)
				}
			}
		}
		if hosts != 1 && label != "host" {
			t.Errorf("%d lines on the host in %s", hosts, got)
		}
		for s, limit := range map[string]int{command: maxSubject, arg: maxClaim} {
			head, tail, hidden := cut(s, limit)
			switch {
			case len(head)+len(tail) > limit:
				t.Errorf("%d of %d bytes", len(head)+len(tail), limit)
			case hidden == 0 && head+tail != plugin.Printable(s):
				t.Errorf("%q became %q", s, head+tail)
			case hidden < 0 || hidden > len(s):
				t.Errorf("%d of %d bytes hidden", hidden, len(s))
			}
		}
		if l := line(u, "Yes counts."); strings.ContainsFunc(l, func(r rune) bool { return !unicode.IsGraphic(r) }) {
			t.Errorf("%q", l)
		}
	})
}
