package sshconfig

import (
	"io/fs"
	"os"
	"path/filepath"
)

func systemConfig() string {
	data := os.Getenv("ProgramData")
	if data == "" {
		data = `C:\ProgramData`
	}
	return filepath.Join(data, "ssh", "ssh_config")
}

// inode: a file is known by its time and size there.
func inode(fs.FileInfo) uint64 { return 0 }

// checkOwner: ssh checks access lists there, which a copy in the user's own folder does not widen.
func checkOwner(string) error { return nil }
