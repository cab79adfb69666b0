//go:build unix

package doctor

import (
	"io/fs"
	"os"
	"syscall"

	"github.com/muxproxy/muxproxy/core/paths"
)

// others reports whether everybody may change a file, or what is in a directory.
func others(info fs.FileInfo) bool {
	return info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0
}

// foreign reports whether a file belongs to neither this user nor root.
func foreign(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && !paths.Trusted(int(st.Uid))
}

// owned reports whether a file is this user's.
func owned(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}
