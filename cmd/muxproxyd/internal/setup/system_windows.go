package setup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Nothing is set up on Windows: the master does not run there yet (paths.CheckDir), and its ssh can't pass connections.

func ownerLinks(fs.FileInfo) (uid int, links uint64) { return -1, 1 }

func access(dir string) error { return fmt.Errorf("on Windows: %w", errors.ErrUnsupported) }

func sameOwner(*os.File, fs.FileInfo) error { return nil }

func syncDir(string) error { return nil }
