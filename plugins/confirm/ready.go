package confirm

import "context"

// Ready says why no dialog could ask the user now: there is no askpass program to run, or no graphical session to show it in.
// askpass is the program's path as policy has it, "" for the first well-known one that is there.
func Ready(ctx context.Context, askpass string) error {
	if _, err := program(askpass); err != nil {
		return err
	}
	_, err := newSessions().environment(ctx)
	return err
}
