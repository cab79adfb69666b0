// Command man makes a manual page of a file in Markdown as docs/ has it: man -name NAME -section N -summary TEXT
// -version V < FILE.md > NAME.N
//
// It rewrites what does not look well in a manual page, and leaves the rest to go-md2man: tables become lists, links
// to other files their text, the title the section NAME.
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cpuguy83/go-md2man/v2/md2man"
)

// page is what a manual page has besides its text.
type page struct {
	name, section, summary, version, seeAlso string
	date                                     time.Time
}

// manuals names the sections of the manual.
var manuals = map[string]string{"1": "User Commands", "5": "File Formats", "7": "Miscellaneous Information"}

func main() {
	log.SetFlags(0)
	log.SetPrefix("man: ")
	var p page
	flag.StringVar(&p.name, "name", "", "name of the page")
	flag.StringVar(&p.section, "section", "", "section of the manual")
	flag.StringVar(&p.summary, "summary", "", "what it is about, for apropos(1)")
	flag.StringVar(&p.version, "version", "", "version of the program")
	flag.StringVar(&p.seeAlso, "see-also", "", "other pages, as NAME(SECTION), with commas")
	flag.Parse()
	// https://reproducible-builds.org/specs/source-date-epoch/
	epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		log.Fatalf("SOURCE_DATE_EPOCH: %v", err)
	}
	p.date = time.Unix(epoch, 0).UTC()
	if manuals[p.section] == "" {
		log.Fatalf("section %q: there is no name for it here", p.section)
	}
	text, err := io.ReadAll(os.Stdin)
	if err == nil {
		_, err = os.Stdout.Write(p.render(string(text)))
	}
	if err != nil {
		log.Fatal(err)
	}
}

func (p page) render(text string) []byte {
	title := fmt.Sprintf("# %s %s %q %q %q\n", strings.ToUpper(p.name), p.section, p.date.Format(time.DateOnly), "muxproxy "+p.version,
		manuals[p.section])
	head := fmt.Sprintf("# NAME\n\n%s - %s\n\n", p.name, p.summary)
	tail := ""
	if p.seeAlso != "" {
		var list []string
		for _, other := range strings.Split(p.seeAlso, ",") {
			name, section, _ := strings.Cut(other, "(")
			list = append(list, "**"+name+"**("+section)
		}
		tail = "\n# SEE ALSO\n\n" + strings.Join(list, ", ") + "\n"
	}
	return polish(md2man.Render([]byte(title + head + rewrite(text) + tail)))
}

var (
	localLink = regexp.MustCompile(`\[([^]]*)\]\((#[^)]*|[^):]*)\)`)
	cellEnd   = regexp.MustCompile(`\s*\|\s*`)
)

// rewrite makes Markdown for a manual page of Markdown for a reader.
func rewrite(text string) string {
	var out, table []string
	fence := false
	end := func() {
		out = append(out, list(table)...)
		table = nil
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "```") {
			fence = !fence
		} else if !fence && !strings.HasPrefix(line, "    ") {
			line = localLink.ReplaceAllString(line, "$1")
			switch {
			case strings.HasPrefix(line, "| "):
				table = append(table, line)
				continue
			case strings.HasPrefix(line, "# "):
				line = "# DESCRIPTION"
			case strings.HasPrefix(line, "## "):
				line = "# " + strings.ToUpper(line[len("## "):])
			}
		}
		end()
		out = append(out, line)
	}
	end()
	return strings.Join(out, "\n") + "\n"
}

// list is a table as a list: of each row the first cell is the term, the last one describes it, and those between come
// before the description, in parentheses. An empty first cell is the one above it.
func list(table []string) []string {
	if len(table) < 2 {
		return table
	}
	var rows [][]string
	for _, line := range table {
		line = strings.ReplaceAll(strings.Trim(line, "| "), `\|`, "\x00")
		cells := cellEnd.Split(line, -1)
		for i := range cells {
			cells[i] = strings.ReplaceAll(cells[i], "\x00", "|")
		}
		if len(cells) < len(cellEnd.Split(strings.Trim(table[0], "| "), -1)) { // Trim took an empty first cell
			cells = append([]string{""}, cells...)
		}
		rows = append(rows, cells)
	}
	heads, rows := rows[0], rows[2:]
	out := []string{""}
	for i, row := range rows {
		last := len(row) - 1
		var about []string
		for j := 1; j < last; j++ {
			if row[j] == "the same" { // as above
				row[j] = rows[i-1][j]
			}
			switch heads[j] {
			case "type":
				about = append(about, row[j])
			case "default":
				about = append(about, "default "+row[j])
			case "who sees it":
				about = append(about, "for "+row[j])
			default:
				about = append(about, heads[j]+": "+row[j])
			}
		}
		text := row[last]
		if len(about) > 0 {
			text = "(" + strings.Join(about, "; ") + ") " + text
		}
		if row[0] == "" && i > 0 {
			row[0] = rows[i-1][0]
		}
		out = append(out, row[0], ": "+text, "")
	}
	return out
}

var codeSpan = regexp.MustCompile(`\\fB.*?\\f[RP]`)

// polish does what go-md2man leaves out (groff_man_style(7)): a hyphen that somebody may copy is a minus sign, quotes in
// headings are escaped, and hyphenation is switched off where .TH and .EE have switched it on.
func polish(roff []byte) []byte {
	var b strings.Builder
	example := false
	minus := func(s string) string { return strings.ReplaceAll(s, "-", `\-`) }
	for line := range strings.Lines(string(roff)) {
		switch {
		case line == ".nh\n":
			continue
		case strings.HasPrefix(line, ".TH "):
			line += ".nh\n.ad l\n"
		case strings.HasPrefix(line, ".EX"):
			example = true
		case strings.HasPrefix(line, ".EE"):
			example = false
			line += ".nh\n"
		case strings.HasPrefix(line, ".SS "), strings.HasPrefix(line, ".SH "):
			line = minus(strings.ReplaceAll(line, `"`, `\(dq`))
		case example:
			line = minus(line)
		default:
			line = codeSpan.ReplaceAllStringFunc(line, minus)
		}
		b.WriteString(line)
	}
	return []byte(b.String())
}
