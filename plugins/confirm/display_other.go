//go:build !linux

package confirm

import (
	"context"
	"errors"
	"os"
	"runtime"
)

// sessions finds the user's graphical session.
type sessions struct{}

func newSessions() sessions { return sessions{} }

// environment is, on macOS, what a dialog needs: it has one screen. Elsewhere nothing says which display is the user's.
func (sessions) environment(context.Context) ([]string, error) {
	if runtime.GOOS != "darwin" {
		return nil, errors.New("nothing on this system says which display is yours")
	}
	vars := map[string]string{"DISPLAY": ":0"} // for programs that want one
	for _, name := range []string{"HOME", "USER", "LOGNAME", "LANG", "TMPDIR"} {
		vars[name] = os.Getenv(name)
	}
	return complete(vars), nil
}
