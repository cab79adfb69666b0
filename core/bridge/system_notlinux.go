//go:build !linux

package bridge

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"
)

// bindTo obeys BindInterface, which it can't here: another way out than the chosen one would be worse than none.
func bindTo(name string) func(network, address string, c syscall.RawConn) error {
	return func(string, string, syscall.RawConn) error {
		return fmt.Errorf("BindInterface %s: not on %s: %w", name, runtime.GOOS, errors.ErrUnsupported)
	}
}
