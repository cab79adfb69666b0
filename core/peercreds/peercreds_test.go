package peercreds

import (
	"os"
	"testing"

	"github.com/muxproxy/muxproxy/core/use"
)

func TestAdmit(t *testing.T) {
	for uid, want := range map[int]bool{os.Geteuid(): true, 0: true, os.Geteuid() + 1: false} {
		if _, err := admit(use.Caller{UID: uid}); (err == nil) != want {
			t.Errorf("uid %d: %v, want admitted %v", uid, err, want)
		}
	}
}
