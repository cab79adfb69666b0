//go:build !linux

package confirm

import (
	"errors"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// held is a process that answers are bound to. The parents of a caller are not known here, so there is none.
type held struct{}

func hold(plugin.Process) (*held, error) { return nil, errors.ErrUnsupported }
func (*held) alive() bool                { return false }
func (*held) release()                   {}

func leads(plugin.Process) bool                   { return false }
func ancestors([]plugin.Process) []plugin.Process { return nil }
func environ([]plugin.Process, []string) ([]string, error) {
	return nil, errors.New("the environment of whoever asks can't be read on this system")
}
