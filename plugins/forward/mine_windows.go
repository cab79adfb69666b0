package forward

import "io/fs"

// mine reports whether a file is this user's, which can't be told here.
func mine(fs.FileInfo) bool { return false }
