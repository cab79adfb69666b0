package confirm

import (
	"strings"
	"testing"
)

func TestReady(t *testing.T) {
	if err := Ready(t.Context(), "/nowhere/askpass"); err == nil || !strings.Contains(err.Error(), "/nowhere/askpass: ") {
		t.Errorf("%v", err)
	}
	_, session := newSessions().environment(t.Context())
	if err := Ready(t.Context(), "/bin/true"); (err == nil) != (session == nil) || err != nil && err.Error() != session.Error() {
		t.Errorf("%v, of the session %v", err, session)
	}
}
