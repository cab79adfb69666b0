package setup

import (
	"slices"
	"strconv"
	"strings"
)

// record is what Undo has to know. It stands in the included file, as comments.
type record struct {
	in   []string // the files that include it
	made []string // files and directories that were not there before muxproxy
}

const (
	header = "# Written by `muxproxy setup`, anew each time; `muxproxy setup --undo` removes it.\n"
	inMark = "# included by "
	madeOf = "# new with muxproxy: "
)

func (r *record) add(list *[]string, path string) {
	if !slices.Contains(*list, path) {
		*list = append(*list, path)
		slices.Sort(*list)
	}
}

// String is the head of the included file.
func (r *record) String() string {
	text := header
	for _, p := range r.in {
		text += inMark + strconv.Quote(p) + "\n"
	}
	for _, p := range r.made {
		text += madeOf + strconv.Quote(p) + "\n"
	}
	return text
}

// parseRecord reads what String has written. What else the text may be is passed over.
func parseRecord(text []byte) *record {
	r := &record{}
	for line := range strings.Lines(string(text)) {
		for mark, list := range map[string]*[]string{inMark: &r.in, madeOf: &r.made} {
			if quoted, ok := strings.CutPrefix(line, mark); ok {
				if path, err := strconv.Unquote(strings.TrimSpace(quoted)); err == nil && strings.HasPrefix(path, "/") {
					r.add(list, path)
				}
			}
		}
	}
	return r
}
