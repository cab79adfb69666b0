//go:build unix

package forward

import (
	"io/fs"
	"os"
	"syscall"
)

// mine reports whether a file is this user's.
func mine(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}
