package confirm

import "context"

// Ready says why no dialog could ask the user now, where policy names no program: no well-known askpass program is there, or
// no graphical session to show it in.
func Ready(ctx context.Context) error {
	if _, err := program(""); err != nil {
		return err
	}
	_, err := newSessions().environment(ctx)
	return err
}
