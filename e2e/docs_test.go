//go:build linux

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The documentation's blocks that begin with ```sh test run as they stand:
//
//   - Each section (## or #) has a world of its own, its blocks run one after another in it, each by `sh -eu` in an empty
//     directory of the section. A ### belongs to the section that it stands in.
//   - ```sh test 255 is a block that ends with this status; without a number it is 0.
//   - A ```text block behind one holds lines that it printed, to stdout or stderr, in their order; there may be others between
//     them. Three dots stand for anything within a line, and how many spaces there are does not matter.
//   - <!-- sh test ... --> is a block that readers need not see, such as one that makes the trouble that the next one shows.
//
// In that world the names under example.com lead to loopback, and `muxproxy setup` has been run, unless the section does that
// itself. "$T" is the blocks' directory, and "$SSHD_LOG" the log of the sshd.

// docBlock is one block that runs.
type docBlock struct {
	file   string
	line   int
	script string
	status int
	want   []string // lines that it prints
}

// docSection is what runs in one world.
type docSection struct {
	name   string // file and heading
	blocks []docBlock
}

var (
	docFence = regexp.MustCompile("^```sh test(?: ([0-9]+))?$")
	docHead  = regexp.MustCompile(`^##? (.*)$`)
)

// docSections reads a file of the documentation.
func docSections(file, text string) ([]docSection, error) {
	var sections []docSection
	section := docSection{name: file}
	close := func() {
		if len(section.blocks) > 0 {
			sections = append(sections, section)
		}
	}
	lines := strings.Split(text, "\n")
	last := -1 // where the last block ended
	// until returns what stands before the line that ends a block, and that line's number.
	until := func(i int, end string) (body []string, at int, err error) {
		for at = i + 1; at < len(lines); at++ {
			if lines[at] == end {
				return lines[i+1 : at], at, nil
			}
		}
		return nil, 0, fmt.Errorf("%s:%d: a block without an end", file, i+1)
	}
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		m := docFence.FindStringSubmatch(line)
		switch {
		case m != nil || line == "<!-- sh test":
			b, end := docBlock{file: file, line: i + 1}, "-->"
			if m != nil {
				end = "```"
				b.status, _ = strconv.Atoi(m[1])
			}
			body, at, err := until(i, end)
			if err != nil {
				return nil, err
			}
			b.script = strings.Join(body, "\n") + "\n"
			section.blocks = append(section.blocks, b)
			i, last = at, at
		case line == "```text" && last >= 0 && strings.TrimSpace(strings.Join(lines[last+1:i], "")) == "":
			body, at, err := until(i, "```")
			if err != nil {
				return nil, err
			}
			section.blocks[len(section.blocks)-1].want = body
			i, last = at, -1
		case strings.HasPrefix(line, "```"):
			if strings.HasPrefix(line, "```sh ") {
				return nil, fmt.Errorf("%s:%d: want \"```sh test\" and perhaps a status, not %q", file, i+1, line)
			}
			_, at, err := until(i, "```")
			if err != nil {
				return nil, err
			}
			i, last = at, -1
		default:
			if h := docHead.FindStringSubmatch(line); h != nil {
				close()
				section, last = docSection{name: file + " " + h[1]}, -1
			}
		}
	}
	close()
	return sections, nil
}

// printed reports which of the lines that a block should print is missing from what it has printed; "" if none is.
func printed(want []string, got string) string {
	rest := strings.Split(strings.ReplaceAll(got, "\r\n", "\n"), "\n")
	for _, line := range want {
		parts := strings.Split(oneSpace(line), "...")
		for i := range parts {
			parts[i] = regexp.QuoteMeta(parts[i])
		}
		like := regexp.MustCompile("^" + strings.Join(parts, ".*") + "$")
		i := slices.IndexFunc(rest, func(l string) bool { return like.MatchString(oneSpace(l)) })
		if i < 0 {
			return line
		}
		rest = rest[i+1:]
	}
	return ""
}

func oneSpace(line string) string { return strings.Join(strings.Fields(line), " ") }

// docWorld is a home in which nobody has heard of muxproxy yet.
func docWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t, fdpass, asInstalled, func(s *setup) {
		s.sshd = []string{"MaxSessions 10"} // sshd's own default
		for _, name := range []string{"GIT_SSH_COMMAND", "GIT_CONFIG_NOSYSTEM"} {
			s.env[name] = ""
		}
	})
	for _, dir := range []string{"docs-bin", "docs-files"} {
		if err := os.Mkdir(w.path(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	w.conf = w.path("home/.ssh/config")
	w.write("home/.ssh/config", fmt.Sprintf(`Host bastion.example.com
    Port %d

Host *.example.com
    HostName 127.0.0.1
    Port %d

Host *
    User %s
    IdentityFile %s
    IdentityAgent none
    UserKnownHostsFile %s
`, w.link.port(), w.sshd, me, w.path("id"), w.path("known_hosts")))
	// ssh looks for its configuration where the password database has the home directory, so each program is told.
	script := func(name, text string) {
		if err := writeProgram(w.path("docs-bin/"+name), []byte("#!/bin/sh\n"+text+"\n")); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"ssh", "scp", "sftp"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		script(name, "exec "+path+" -F "+w.conf+` "$@"`)
	}
	script("muxproxy", `case ${1-} in
setup|doctor) command=$1; shift; exec `+binDir+`/muxproxy "$command" -F `+w.conf+` "$@" ;;
esac
exec `+binDir+`/muxproxy "$@"`)
	w.env = slices.DeleteFunc(w.env, func(e string) bool { return strings.HasPrefix(e, "PATH=") })
	w.env = append(w.env, "PATH="+w.path("docs-bin")+":"+binDir+":"+os.Getenv("PATH"), "T="+w.path("docs-files"),
		"SSHD_LOG="+w.sshdLog, "ANSIBLE_SSH_USETTY=no") // not every sshd here can give a terminal
	t.Cleanup(func() { // what blocks left, here and on the remote side; before the master goes, as in world.end
		for pid, args := range processes() {
			environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
			if err == nil && slices.Contains(strings.Split(string(environ), "\x00"), "HOME="+w.path("home")) &&
				filepath.Base(args[0]) != "muxproxyd" {
				kill9(pid)
			}
		}
	})
	return w
}

func TestDocs(t *testing.T) {
	if !muxproxyOnly(t) {
		return
	}
	t.Parallel()
	files, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, "../README.md")
	t.Run("hcl", func(t *testing.T) {
		t.Parallel()
		checkDocPolicies(t, files)
	})
	ran := map[string]int{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(file, "../")
		sections, err := docSections(name, string(text))
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sections {
			ran[name] += len(s.blocks)
			t.Run(strings.ReplaceAll(s.name, "/", "_"), func(t *testing.T) {
				t.Parallel()
				w := docWorld(t)
				if !slices.ContainsFunc(s.blocks, func(b docBlock) bool { return strings.Contains(b.script, "muxproxy setup") }) {
					r := w.run(spec{args: []string{w.path("docs-bin/muxproxy"), "setup", "--yes"}, null: true})
					if r.status != 0 {
						t.Fatalf("muxproxy setup: status %d\n%s%s", r.status, r.out, r.err)
					}
				}
				for _, b := range s.blocks {
					if !w.runBlock(t, b) {
						return // the next one would only follow from it
					}
				}
			})
		}
	}
	for _, name := range []string{"README.md", "docs/recipes.md", "docs/troubleshooting.md", "docs/security.md", "docs/comparison.md"} {
		if ran[name] == 0 {
			t.Errorf("no block of %s runs", name)
		}
	}
}

// checkDocPolicies has `muxproxy config check` look at what the documentation shows of policy files. docs/policy.md and
// docs/plugins.md, whose plugins nobody has, are looked at by tests of core/policy and examples.
func checkDocPolicies(t *testing.T, files []string) {
	w := newWorld(t, fdpass, asInstalled)
	blocks := regexp.MustCompile("(?ms)^```hcl\n(.*?)^```$")
	readmes, err := filepath.Glob("../plugins/*/README.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, file := range append(slices.Clone(files), readmes...) {
		if base := filepath.Base(file); base == "policy.md" || base == "plugins.md" {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range blocks.FindAllStringSubmatch(string(text), -1) {
			found++
			text := m[1]
			if word, _, _ := strings.Cut(text, " "); !slices.Contains([]string{"host", "master", "plugin"}, word) {
				text = "host \"*\" {\n" + text + "}\n" // part of one
			}
			r := w.run(spec{args: []string{binDir + "/muxproxy", "config", "check", w.write("block.hcl", text)}, null: true})
			if r.status != 0 {
				t.Errorf("%s: status %d\n%s%s\n%s", file, r.status, r.out, r.err, text)
			}
		}
	}
	if found < 2 {
		t.Errorf("%d blocks", found)
	}
}

// runBlock reports whether a block did what the documentation says.
func (w *world) runBlock(t *testing.T, b docBlock) bool {
	t.Helper()
	cmd := exec.Command("sh", "-euc", b.script)
	cmd.Env, cmd.Dir = w.env, w.path("docs-files")
	out, err := os.CreateTemp(w.dir, "out") // a file: what a block leaves in the background may hold it
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end := time.AfterFunc(3*patience, func() { cmd.Process.Kill() })
	_ = cmd.Wait() // its status says it
	end.Stop()
	got, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	where := fmt.Sprintf("%s:%d (%.1f s)", b.file, b.line, time.Since(began).Seconds())
	if status := cmd.ProcessState.ExitCode(); status != b.status {
		t.Errorf("%s: status %d, want %d\n%s\n%s", where, status, b.status, b.script, got)
		return false
	}
	missing := ""
	if !within(patience, func() bool { // what it left in the background may be about to say it
		if got, err = os.ReadFile(out.Name()); err != nil {
			t.Fatal(err)
		}
		missing = printed(b.want, string(got))
		return missing == ""
	}) {
		t.Errorf("%s: no line like %q in what it printed:\n%s", where, missing, got)
		return false
	}
	t.Logf("%s\n%s", where, got)
	return true
}

// What is marked is found, and what is wrong with a mark is not passed over.
func TestDocSections(t *testing.T) {
	const fence = "```"
	text := strings.ReplaceAll(`# Title
'''sh test
one
'''

'''text
out ...
'''
## A
<!-- sh test
hidden
-->

prose

'''text
of nothing
'''
'''sh
not run
'''
### B
'''sh test 255
two
'''
## C
`, "'''", fence)
	sections, err := docSections("f.md", text)
	want := "[{f.md Title [{f.md 2 one\n 0 [out ...]}]} {f.md A [{f.md 10 hidden\n 0 []} {f.md 23 two\n 255 []}]}]"
	if got := fmt.Sprint(sections); err != nil || got != want {
		t.Errorf("%v\n%s\nwant\n%s", err, got, want)
	}
	for _, bad := range []string{"'''sh test\n", "<!-- sh test\n", "'''sh test x\n'''\n", "'''sh tests\n'''\n", "'''go\n"} {
		if got, err := docSections("f.md", strings.ReplaceAll(bad, "'''", fence)); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
	for _, c := range []struct {
		want    []string
		got     string
		missing string
	}{
		{nil, "x", ""},
		{[]string{"a", "c"}, "a\nb\nc\n", ""},
		{[]string{"c", "a"}, "a\nb\nc\n", "a"},
		{[]string{"a ... z"}, "a lot of z\r\n", ""},
		{[]string{"a ... z"}, "a lot of z.\n", "a ... z"},
		{[]string{"(a)"}, "a\n", "(a)"},
		{[]string{"a   b"}, "  a b\n", ""},
	} {
		if got := printed(c.want, c.got); got != c.missing {
			t.Errorf("%q in %q: %q", c.want, c.got, got)
		}
	}
}
