package muxproxy_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

var update = flag.Bool("update", false, "write docs/architecture.md's generated parts anew")

const architecture = "docs/architecture.md"

// generated replaces what stands between <!-- NAME: begin --> and <!-- NAME: end --> by text, in a code block or as it is.
func generated(t *testing.T, doc, name, text string) string {
	t.Helper()
	begin, end := "<!-- "+name+": begin -->\n", "<!-- "+name+": end -->"
	before, rest, ok := strings.Cut(doc, begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no %q and %q", architecture, begin, end)
	}
	return before + begin + "\n" + text + "\n" + end + after
}

// The drawing of the packages and the table of what they are for are what the code says, and the locks that are named are there.
func TestArchitecture(t *testing.T) {
	pkgs := map[string]pkg{}
	for path, p := range load(t, "linux") {
		if name := ours(path); name != "" && len(p.GoFiles) > 0 {
			pkgs[name] = p
		}
	}
	text, err := os.ReadFile(architecture)
	if err != nil {
		t.Fatal(err)
	}
	doc := generated(t, string(text), "drawing", "```text\n"+drawing(pkgs)+"```\n")
	doc = generated(t, doc, "packages", packageTable(pkgs))
	switch {
	case doc == string(text):
	case *update:
		if err := os.WriteFile(architecture, []byte(doc), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s is not what the code says; run: go test . -run TestArchitecture -update", architecture)
	}
	named := regexp.MustCompile("(?m)^\\| (core/[a-z]+) \\| `([A-Za-z]+)\\.([a-z]+)` \\|").FindAllStringSubmatch(doc, -1)
	if len(named) < 5 {
		t.Errorf("only %q", named)
	}
	for _, m := range named {
		lock := regexp.MustCompile(`\ntype ` + m[2] + ` struct \{\n(\t.*\n|\n)*\t` + m[3] + ` +sync\.(RW)?Mutex`)
		if !slices.ContainsFunc(pkgs[m[1]].GoFiles, func(file string) bool {
			text, err := os.ReadFile(filepath.Join(m[1], file))
			return err == nil && lock.Match(text)
		}) {
			t.Errorf("%s has no lock %s.%s", m[1], m[2], m[3])
		}
	}
}

// imports are a package's direct imports of ours, without generated code.
func imports(p pkg) []string {
	var list []string
	for _, path := range p.Imports {
		if name := ours(path); name != "" {
			list = append(list, name)
		}
	}
	slices.Sort(list)
	return list
}

// drawing puts each package into a band above all that it imports, and into the column of its kind.
func drawing(pkgs map[string]pkg) string {
	bands := map[int][]string{}
	heights := map[string]int{}
	var height func(name string) int
	height = func(name string) int {
		h, known := heights[name]
		if !known {
			for _, dep := range imports(pkgs[name]) {
				h = max(h, height(dep)+1)
			}
			heights[name] = h
		}
		return h
	}
	for name := range pkgs {
		if !under(name, "e2e") && !under(name, "examples") {
			bands[height(name)] = append(bands[height(name)], name)
		}
	}
	columns := []struct {
		title string
		has   func(name string) bool
	}{
		{"programs", func(name string) bool { return under(name, "cmd") || under(name, "bench") }},
		{"core", func(name string) bool { return under(name, "core") && !under(name, "core/plugin") }},
		{"plugins, and what they import", func(name string) bool { return under(name, "plugins") || under(name, "core/plugin") }},
	}
	const width = 34
	rule := func(left, middle, right string) string {
		bar := strings.Repeat("─", width)
		return left + bar + middle + bar + middle + bar + right + "\n"
	}
	var b strings.Builder
	row := func(cells ...string) {
		for _, cell := range cells {
			fmt.Fprintf(&b, "│ %-*s ", width-2, cell)
		}
		b.WriteString("│\n")
	}
	b.WriteString(rule("┌", "┬", "┐"))
	row(columns[0].title, columns[1].title, columns[2].title)
	for h := len(bands) - 1; h >= 0; h-- {
		b.WriteString(rule("├", "┼", "┤"))
		slices.Sort(bands[h])
		for i := 0; ; i++ {
			cells := make([]string, len(columns))
			for j, c := range columns {
				own := slices.DeleteFunc(slices.Clone(bands[h]), func(name string) bool { return !c.has(name) })
				if i < len(own) {
					cells[j] = own[i]
				}
			}
			if strings.Join(cells, "") == "" {
				break
			}
			row(cells...)
		}
	}
	return b.String() + rule("└", "┴", "┘")
}

// packageTable has each package's own sentence.
func packageTable(pkgs map[string]pkg) string {
	var names []string
	for name := range pkgs {
		names = append(names, name)
	}
	slices.Sort(names)
	var b strings.Builder
	b.WriteString("| package | what it is for | imports of ours |\n| --- | --- | --- |\n")
	for _, name := range names {
		p := pkgs[name]
		_, what, _ := strings.Cut(p.Doc, " "+name[strings.LastIndexByte(name, '/')+1:]+" ")
		deps := imports(p)
		for i := range deps {
			deps[i] = strings.TrimPrefix(deps[i], "core/")
		}
		fmt.Fprintf(&b, "| [%s](../%s) | %s | %s |\n", name, name, strings.ReplaceAll(what, "|", "\\|"), strings.Join(deps, " "))
	}
	return b.String()
}

// docFiles are all that people read.
func docFiles(t *testing.T) []string {
	t.Helper()
	var files []string
	for _, pattern := range []string{"*.md", "docs/*.md", "plugins/*/README.md", "examples/*/README.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	if len(files) < 10 {
		t.Errorf("only %q", files)
	}
	return files
}

// slug is what GitHub makes of a heading.
func slug(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
			return unicode.ToLower(r)
		}
		return -1
	}, heading)
}

var (
	mdLink    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	mdHeading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	mdNamed   = regexp.MustCompile("`(Test[A-Z][A-Za-z]+)`|`(?:[a-z0-9]+/)?([a-z_]+\\.(?:go|proto))`")
)

// Links lead to files and headings that there are, and the files and tests that are named are in the code.
func TestDocLinks(t *testing.T) {
	var code bytes.Buffer // names of all files, and the text of the tests
	err := filepath.WalkDir(".", func(path string, d os.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" && filepath.Ext(path) != ".proto" {
			return err
		}
		fmt.Fprintf(&code, "file %s\n", filepath.Base(path))
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(path)
		code.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	links, named := 0, 0
	for _, file := range docFiles(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range mdLink.FindAllStringSubmatch(string(text), -1) {
			path, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(path, "://") {
				continue
			}
			links++
			to := file
			if path != "" {
				to = filepath.Join(filepath.Dir(file), path)
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: %v", file, err)
				continue
			}
			if anchor == "" {
				continue
			}
			target, err := os.ReadFile(to)
			if err != nil {
				t.Errorf("%s: %v", file, err)
				continue
			}
			if !slices.ContainsFunc(mdHeading.FindAllStringSubmatch(string(target), -1), func(h []string) bool { return slug(h[1]) == anchor }) {
				t.Errorf("%s: %s has no heading #%s", file, to, anchor)
			}
		}
		if strings.HasPrefix(file, "docs/plugins") {
			continue // its files are the reader's
		}
		for _, m := range mdNamed.FindAllStringSubmatch(string(text), -1) {
			named++
			want := "func " + m[1] + "("
			if m[2] != "" {
				want = "file " + m[2] + "\n"
			}
			if !bytes.Contains(code.Bytes(), []byte(want)) {
				t.Errorf("%s names %s, which there is not", file, m[0])
			}
		}
	}
	if links < 20 || named < 40 {
		t.Errorf("%d links, %d names", links, named)
	}
}
