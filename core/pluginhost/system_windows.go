package pluginhost

import "errors"

func sessionOf(int) (int, error) { return 0, errors.ErrUnsupported }

func shortDir(string) (string, error) { return "", errors.ErrUnsupported }
