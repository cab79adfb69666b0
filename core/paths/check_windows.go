package paths

import (
	"errors"
	"fmt"
)

// Trusted reports whether a peer of this uid may connect to a master. Windows has no uids: never.
func Trusted(int) bool { return false }

// CheckDir reports why a directory can't be trusted. Owners and access lists are not read on Windows, so none can.
func CheckDir(dir string) error {
	return fmt.Errorf("%s: can't tell on Windows who may use it: %w", dir, errors.ErrUnsupported)
}

// CheckParents reports why what is made in a directory could not be trusted. On Windows that can't be told: see CheckDir.
func CheckParents(dir string) error { return CheckDir(dir) }

func makeDir(dir string) error { return CheckDir(dir) }

func usableRuntime(string) bool { return false }

func checkHome(string) error { return nil }

// CheckFile reports why others could change a file. On Windows that can't be told: see CheckDir.
func CheckFile(path string) error { return CheckDir(path) }

// ReadTrusted reads a file that others must not be able to change. On Windows that can't be told: see CheckDir.
func ReadTrusted(path string, _ int64) ([]byte, error) { return nil, CheckDir(path) }
