package doctor

import (
	"os"
	"strings"
)

// listening reports whether somebody listens at a Unix socket, without a connection to it: systemd would start a master
// for that (/proc/net/unix of proc(5); the flag is __SO_ACCEPTCON).
func listening(path string) bool {
	text, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if fields := strings.Fields(line); len(fields) > 7 && fields[3] == "00010000" && strings.HasSuffix(line, " "+path) {
			return true
		}
	}
	return false
}
