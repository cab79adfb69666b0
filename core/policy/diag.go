package policy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/agext/levenshtein"
	"github.com/hashicorp/hcl/v2"
	"github.com/mattn/go-isatty"

	"github.com/muxproxy/muxproxy/core/use"
	"github.com/muxproxy/muxproxy/core/wire"
)

// Severity tells a problem that keeps a policy from being used from one that does not.
type Severity string

// The severities.
const (
	Error   Severity = "error"
	Warning Severity = "warning"
)

// Diagnostic is one problem of a policy file.
type Diagnostic struct {
	Severity  Severity `json:"severity"`
	File      string   `json:"file"`
	Line      int      `json:"line,omitempty"`   // from 1; 0: the file as a whole
	Column    int      `json:"column,omitempty"` // from 1, in characters as a person counts them (grapheme clusters)
	EndLine   int      `json:"end_line,omitempty"`
	EndColumn int      `json:"end_column,omitempty"` // the first one after it
	Message   string   `json:"message"`              // one line, lower case
	Allowed   string   `json:"allowed,omitempty"`    // what may stand there
	Source    string   `json:"source,omitempty"`     // the line, as it is in the file

	from, to int  // bytes of Source that are marked
	foreign  bool // worded by a library: of two for one place ours is kept
	rng      hcl.Range
}

// Error is the line for a person: file:line:col: message.
func (d Diagnostic) Error() string {
	var b strings.Builder
	b.WriteString(wire.Printable(d.File))
	if d.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", d.Line, d.Column)
	}
	b.WriteString(": ")
	if d.Severity == Warning {
		b.WriteString("warning: ")
	}
	b.WriteString(wire.Printable(d.Message))
	return b.String()
}

// Diagnostics are the problems of one file.
type Diagnostics []Diagnostic

// HasErrors reports whether the policy can't be used.
func (ds Diagnostics) HasErrors() bool {
	return slices.ContainsFunc(ds, func(d Diagnostic) bool { return d.Severity == Error })
}

// Errors are those that keep the policy from being used, Warnings the others.
func (ds Diagnostics) Errors() Diagnostics { return ds.only(Error) }

// Warnings are those that do not keep the policy from being used.
func (ds Diagnostics) Warnings() Diagnostics { return ds.only(Warning) }

func (ds Diagnostics) only(s Severity) Diagnostics {
	var out Diagnostics
	for _, d := range ds {
		if d.Severity == s {
			out = append(out, d)
		}
	}
	return out
}

// Error is the first line and how many more there are.
func (ds Diagnostics) Error() string {
	switch len(ds) {
	case 0:
		return "no problems"
	case 1:
		return ds[0].Error()
	}
	return fmt.Sprintf("%s (and %d more)", ds[0].Error(), len(ds)-1)
}

// Sort puts them in the order of the file, errors before warnings at one place.
func (ds Diagnostics) Sort() {
	slices.SortStableFunc(ds, func(a, b Diagnostic) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column),
			cmp.Compare(a.Severity, b.Severity), cmp.Compare(a.Message, b.Message), cmp.Compare(a.EndLine, b.EndLine),
			cmp.Compare(a.EndColumn, b.EndColumn))
	})
}

// MarshalJSON is a list, also if it is empty.
func (ds Diagnostics) MarshalJSON() ([]byte, error) {
	return json.Marshal(append([]Diagnostic{}, ds...))
}

// Write writes them for a person, each with its source line, a caret under the place, and what is allowed there. All
// text of the file is escaped. color adds ANSI colours.
func (ds Diagnostics) Write(w io.Writer, color bool) error {
	paint := func(code, s string) string {
		if !color {
			return s
		}
		return "\x1b[" + code + "m" + s + "\x1b[0m"
	}
	var b bytes.Buffer
	for _, d := range ds {
		hue := "31"
		if d.Severity == Warning {
			hue = "33"
		}
		line, rest, _ := strings.Cut(d.Error(), ": ")
		fmt.Fprintf(&b, "%s %s\n", paint("1", line+":"), paint(hue, rest))
		if d.Line > 0 {
			number := fmt.Sprintf("%5d", d.Line)
			before, marked, after := d.excerpt()
			carets := "^" + strings.Repeat("~", max(0, use.Columns(marked)-1))
			fmt.Fprintf(&b, "%s | %s\n", number, before+marked+after)
			fmt.Fprintf(&b, "%5s | %s%s\n", "", strings.Repeat(" ", use.Columns(before)), paint(hue, carets))
		}
		if d.Allowed != "" {
			fmt.Fprintf(&b, "%5s = allowed: %s\n", "", wire.Printable(d.Allowed))
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}

// Color reports whether f is to get ANSI colours: a terminal is, unless NO_COLOR is set (https://no-color.org).
func Color(f *os.File) bool {
	return isatty.IsTerminal(f.Fd()) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// Width of an excerpt: what is longer is cut around the place.
const (
	excerptBefore = 60
	excerptAfter  = 100
)

// excerpt returns the source line, escaped, in three parts: before the place, the place, and after it.
func (d Diagnostic) excerpt() (before, marked, after string) {
	from := min(d.from, len(d.Source))
	to := max(from, min(d.to, len(d.Source)))
	show := func(s string) string { return wire.Printable(strings.ReplaceAll(s, "\t", "    ")) }
	before, marked, after = d.Source[:from], d.Source[from:to], d.Source[to:]
	head, tail := "", ""
	if len(before) > excerptBefore {
		head, before = "...", cutFront(before, excerptBefore)
	}
	if room := max(0, excerptAfter-len(marked)); len(marked) > excerptAfter || len(after) > room {
		marked, after = cutBack(marked, excerptAfter), cutBack(after, room)
		tail = "..."
	}
	return head + show(before), show(marked), show(after) + tail
}

// cutFront and cutBack keep at most n bytes of s, whole characters.
func cutFront(s string, n int) string {
	s = s[max(0, len(s)-n):]
	for s != "" && !utf8.RuneStart(s[0]) {
		s = s[1:]
	}
	return s
}

func cutBack(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// report collects the problems of one file.
type report struct {
	file string
	src  []byte
	list Diagnostics
	more int // problems beyond maxProblems
}

// maxProblems is how many are told of one file: beyond that it is no policy.
const maxProblems = 100

func (r *report) add(s Severity, rng hcl.Range, allowed, message string) {
	d := Diagnostic{Severity: s, Message: message, Allowed: allowed, rng: rng}
	r.append(d)
}

func (r *report) append(d Diagnostic) {
	if len(r.list) >= maxProblems {
		r.more++
		return
	}
	r.place(&d)
	r.list = append(r.list, d)
}

func (r *report) errorf(rng hcl.Range, format string, args ...any) {
	r.add(Error, rng, "", fmt.Sprintf(format, args...))
}

// wrong is an error that says what is allowed.
func (r *report) wrong(rng hcl.Range, allowed, format string, args ...any) {
	r.add(Error, rng, allowed, fmt.Sprintf(format, args...))
}

func (r *report) warnf(rng hcl.Range, format string, args ...any) {
	r.add(Warning, rng, "", fmt.Sprintf(format, args...))
}

// unknown is an error about a name that is not among the known ones.
func (r *report) unknown(rng hcl.Range, known []string, format string, args ...any) {
	message := fmt.Sprintf(format, args...)
	given := string(rng.SliceBytes(r.src))
	if name := Near(strings.Trim(given, `".`), known); name != "" {
		message += fmt.Sprintf("; did you mean %q?", name)
	}
	r.add(Error, rng, strings.Join(known, ", "), message)
}

// foreign takes over what a library found. Its sentences become one line.
func (r *report) foreign(diags hcl.Diagnostics) {
	for _, h := range diags {
		message := lowerFirst(h.Summary)
		if detail := strings.TrimSuffix(strings.Join(strings.Fields(h.Detail), " "), "."); detail != "" {
			message += ": " + lowerFirst(detail)
		}
		d := Diagnostic{Severity: Error, Message: message, foreign: true}
		if h.Severity == hcl.DiagWarning {
			d.Severity = Warning
		}
		if h.Subject != nil { // the library's contract lets it be missing
			d.rng = *h.Subject
		}
		r.append(d)
	}
}

// place fills in what follows from d.rng.
func (r *report) place(d *Diagnostic) {
	d.File = r.file
	rng := d.rng
	if rng.Start.Line == 0 {
		return
	}
	d.Line, d.Column, d.EndLine, d.EndColumn = rng.Start.Line, rng.Start.Column, rng.End.Line, rng.End.Column
	at := max(0, min(rng.Start.Byte, len(r.src)))
	start := bytes.LastIndexByte(r.src[:at], '\n') + 1
	end := len(r.src)
	if n := bytes.IndexByte(r.src[start:], '\n'); n >= 0 {
		end = start + n
	}
	line := bytes.TrimSuffix(r.src[start:end], []byte("\r"))
	d.Source = text(line)
	d.from = at - start
	d.to = min(rng.End.Byte-start, len(line))
	if rng.End.Line > rng.Start.Line {
		d.to = len(line)
	}
}

// done returns all problems, sorted, each once. Where ours and a library's words are about one place, ours are kept.
func (r *report) done() Diagnostics {
	var out Diagnostics
	if r.more > 0 {
		message := fmt.Sprintf("%d more problems, which are not listed", r.more)
		out = append(out, Diagnostic{Severity: Error, File: r.file, Message: message})
	}
	for _, d := range r.list {
		if d.foreign && slices.ContainsFunc(r.list, func(o Diagnostic) bool {
			return !o.foreign && o.Severity == Error && o.rng.Overlaps(d.rng)
		}) {
			continue
		}
		out = append(out, d)
	}
	out.Sort()
	return slices.CompactFunc(out, func(a, b Diagnostic) bool {
		return a.Line == b.Line && a.Column == b.Column && a.Severity == b.Severity && a.Message == b.Message
	})
}

// Near returns the known name that is most like given, or "".
func Near(given string, known []string) string {
	best, least := "", 3
	for _, name := range known {
		// Of a short word nearly every other one is two changes away.
		if d := levenshtein.Distance(given, name, nil); d < least && d < max(len(given), len(name))-1 {
			best, least = name, d
		}
	}
	return best
}

// text makes b valid UTF-8 for JSON, byte by byte, so that places in it stay where they are.
func text(b []byte) string {
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		if r == utf8.RuneError && n == 1 {
			out = append(out, '?')
		} else {
			out = append(out, b[:n]...)
		}
		b = b[n:]
	}
	return string(out)
}

func lowerFirst(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	if n == 0 || len(s) > n && unicode.IsUpper([]rune(s[n:])[0]) { // an abbreviation stays
		return s
	}
	return string(unicode.ToLower(r)) + s[n:]
}

func quoted(words []string) string {
	var b strings.Builder
	for i, w := range words {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%q", w)
	}
	return b.String()
}
