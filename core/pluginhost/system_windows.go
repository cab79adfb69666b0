package pluginhost

import (
	"errors"
	"fmt"
	"io/fs"
)

func sessionOf(int) (int, error) { return 0, errors.ErrUnsupported }

func onlyMine(path string, _ fs.FileInfo) error {
	return fmt.Errorf("%s: can't tell on Windows who may change it: %w", path, errors.ErrUnsupported)
}

func shortDir(string) (string, error) { return "", errors.ErrUnsupported }
