package upstream

import "os"

// checkKeyMode: access lists decide there, and a mode says nothing.
func checkKeyMode(string) error { return nil }

// inode: a file's time and size must do there.
func inode(os.FileInfo) uint64 { return 0 }
