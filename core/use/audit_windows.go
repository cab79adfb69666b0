package use

import "os"

const openFilesCantMove = true

// openAppend opens the log for appending. What the user's profile folder allows protects it: there is no mode.
func openAppend(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
}

// lockFile does nothing: a file that another process has open can't be renamed here, so that rename fails instead.
func lockFile(*os.File) error { return nil }

// openState opens a file that only this user writes, for reading.
func openState(path string) (*os.File, error) { return os.Open(path) }
