package plugin

import (
	"strconv"
	"strings"
)

// Printable returns s for a terminal, a dialog or a log: one line, in which everything but graphic characters and spaces is
// escaped as Go does it, bidirectional marks among them.
func Printable(s string) string {
	q := strconv.QuoteToGraphic(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}
