package confirm

import (
	"fmt"
	"path"
	"strings"
	"unicode/utf8"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// firstLine begins every prompt. No caller has a say in it, and it has no markup: a dialog that looks for
// markup in the first line of a text (Qt's do) takes all of it for plain text.
const firstLine = "muxproxy: allow this use of a shared SSH connection?"

const (
	lineWidth   = 76   // dialogs that don't wrap (x11-ssh-askpass) must not hide the end of a command beyond the screen
	maxSubject  = 1200 // of the command or destination, escaped
	maxOther    = 120  // of others that wait with it
	maxOthers   = 3
	maxClaim    = 160 // of the asker's arguments, directory and terminal, each
	maxName     = 40  // of a process
	maxShown    = 8   // processes
	continued   = "    "
	hiddenBytes = "-- %d bytes in the middle are not shown --"
)

// prompt is the text of a dialog. It has lines that begin with a word of ours, and lines that go on with the one before,
// which begin with blanks: nothing that a caller or a policy chose looks like a line of ours. others wait for the same
// answer; chain is who asks, and counts what a yes is good for.
func prompt(u plugin.Use, others []plugin.Use, chain []plugin.Process, counts string) string {
	var b strings.Builder
	b.WriteString(firstLine + "\n\n")
	add := func(label, text string, limit int) { field(&b, label, text, limit) }
	processes := asking(chain)
	add("asked by", chainText(processes, u.UID), maxSubject)
	host := u.Target.String()
	if u.Target.Alias != "" && u.Target.Alias != u.Target.Host {
		host += " (" + u.Target.Alias + ")"
	}
	add("host", host, maxSubject)
	add(kindLabel(u.Kind), subject(u), maxSubject)
	for i, o := range others {
		if i == maxOthers {
			fmt.Fprintf(&b, "and %d more that wait for the same answer\n", len(others)-i)
			break
		}
		add("and "+kindLabel(o.Kind), subject(o), maxOther)
	}
	b.WriteString("\n")
	if len(processes) > 0 {
		p := processes[0]
		if len(p.Args) > 0 {
			add("it claims to be", strings.Join(p.Args, " "), maxClaim)
		}
		if p.Cwd != "" {
			add("in", p.Cwd, maxClaim)
		}
		if p.TTY != "" {
			add("on", p.TTY, maxClaim)
		}
	}
	b.WriteString(counts)
	return b.String()
}

// line asks about a client as it comes, in one line for its terminal. What the client chose comes last.
func line(u plugin.Use, counts string) string {
	s := fmt.Sprintf("allow %s to use the connection to %s? %s", chainText(asking(u.Processes), u.UID), brief(u.Target.String(), maxClaim),
		counts)
	if i := sshOf(u.Processes); i >= 0 && len(u.Processes[i].Args) > 0 {
		s += " It claims to be: " + brief(strings.Join(u.Processes[i].Args, " "), maxClaim)
	}
	return s
}

// kindLabel is a kind of use before the colon: of a later version it can be anything.
func kindLabel(kind string) string { return brief(kind, maxName) }

// subject is what the use is about: the exact command, destination or name. It is not escaped.
func subject(u plugin.Use) string {
	switch u.Kind {
	case "attach":
		return "log in, or join the connection"
	case "shell":
		return "a shell"
	case "exec":
		return u.Command
	case "subsystem":
		return u.Subsystem
	case "local-forward":
		return "to " + u.Addr
	case "remote-forward":
		if u.Name == "connect" {
			return "let that host connect to " + u.Addr
		}
		return "listen there on " + u.Addr
	case "cancel-forward":
		return "listen there no more on " + u.Addr
	case "agent":
		return "let that host use your ssh agent"
	case "x11":
		return "let that host use your display"
	case "jump":
		return "on to " + u.Addr
	}
	return strings.TrimSpace(u.Name + " " + u.Addr)
}

// base is the name of a process's program, whatever was done to its file: Linux adds the first ending when it is gone, Nix
// wraps programs.
func base(p plugin.Process) string {
	if p.Exe == "" {
		return "?"
	}
	if strings.HasPrefix(p.Exe, "[") { // the kernel's name for it: its file can't be seen
		return p.Exe
	}
	name := path.Base(strings.TrimSuffix(p.Exe, " (deleted)"))
	if inner, ok := strings.CutSuffix(name, "-wrapped"); ok {
		name = strings.TrimPrefix(inner, ".")
	}
	return name
}

// named is a process in a chain: no name looks like two of them.
func named(p plugin.Process) string {
	name := brief(base(p), maxName)
	if strings.ContainsAny(name, ` <("`) {
		return `"` + strings.ReplaceAll(name, `"`, "'") + `"` // it is escaped
	}
	return name
}

// sshOf is the index of the ssh that carries a use; -1: none is seen.
func sshOf(chain []plugin.Process) int {
	for i, p := range chain {
		if base(p) == "ssh" {
			return i
		}
	}
	return -1
}

// asking leaves out what only carries a use: muxproxy, and ssh unless a shell of the session, or nothing that is seen, has
// started it.
func asking(chain []plugin.Process) []plugin.Process {
	if len(chain) > 1 && base(chain[0]) == "muxproxy" {
		chain = chain[1:]
	}
	if len(chain) > 1 && base(chain[0]) == "ssh" && !leads(chain[1]) {
		chain = chain[1:]
	}
	return chain
}

// chainText is "git (4121) <- zsh <- kitty".
func chainText(chain []plugin.Process, uid int) string {
	if len(chain) == 0 {
		return fmt.Sprintf("a process of uid %d that can't be seen", uid)
	}
	var parts []string
	for i, p := range chain {
		name := named(p)
		switch hidden := len(chain) - maxShown; {
		case i == 0:
			name += fmt.Sprintf(" (%d)", p.PID)
		case hidden > 0 && i == maxShown-2:
			name = fmt.Sprintf("(%d more)", hidden+1)
		case hidden > 0 && i > maxShown-2 && i < len(chain)-1:
			continue
		}
		parts = append(parts, name)
	}
	return strings.Join(parts, " <- ")
}

// brief escapes s and cuts its end.
func brief(s string, limit int) string {
	head, tail, hidden := cut(s, limit)
	if hidden == 0 {
		return head + tail
	}
	return head + "..." + tail
}

// field adds a line, and those that go on with it.
func field(b *strings.Builder, label, text string, limit int) {
	head, tail, hidden := cut(text, limit)
	if hidden == 0 {
		head += tail
	}
	b.WriteString(wrap(label+": "+head) + "\n")
	if hidden > 0 {
		fmt.Fprintf(b, hiddenBytes+"\n", hidden)
		b.WriteString(wrap(continued+tail) + "\n")
	}
}

// cut escapes s (plugin.Printable) and leaves out so much of its middle that no more than limit bytes are left. hidden is
// how many bytes of s that is.
func cut(s string, limit int) (head, tail string, hidden int) {
	var h, t []string
	size, from, to := 0, 0, len(s)
	for from < to {
		_, n := utf8.DecodeRuneInString(s[from:])
		piece := plugin.Printable(s[from : from+n])
		if size += len(piece); size > limit*2/3 {
			break
		}
		h = append(h, piece)
		from += n
	}
	if from < to {
		size = 0
		for from < to {
			_, n := utf8.DecodeLastRuneInString(s[from:to])
			piece := plugin.Printable(s[to-n : to])
			if size += len(piece); size > limit/3 {
				break
			}
			t = append(t, piece)
			to -= n
		}
	}
	for i := len(t) - 1; i >= 0; i-- {
		tail += t[i]
	}
	return strings.Join(h, ""), tail, to - from
}

// wrap breaks a line that is too wide. Characters beyond the first few alphabets may be two columns wide.
func wrap(s string) string {
	var b strings.Builder
	width := 0
	for _, r := range s {
		w := 1
		if r >= 0x1100 {
			w = 2
		}
		if width+w > lineWidth {
			b.WriteString("\n" + continued)
			width = len(continued)
		}
		b.WriteRune(r)
		width += w
	}
	return b.String()
}
