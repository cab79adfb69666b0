package confirm

import (
	"errors"
	"testing"
)

func TestReady(t *testing.T) {
	before := programs
	defer func() { programs = before }()
	programs = nil
	if err := Ready(t.Context()); !errors.Is(err, errNoAskpass) {
		t.Errorf("%v", err)
	}
	programs = []string{"/bin/true"}
	_, session := newSessions().environment(t.Context())
	if err := Ready(t.Context()); (err == nil) != (session == nil) || err != nil && err.Error() != session.Error() {
		t.Errorf("%v, of the session %v", err, session)
	}
}
