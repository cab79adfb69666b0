package pluginhost

import (
	"testing"
	"time"
)

// What began an hour ago began an hour before now, whatever happened to the clock meanwhile.
func TestOnWallClock(t *testing.T) {
	now := time.Now()
	began := now.Add(-time.Hour) // by both clocks
	wall := now.Round(0)
	if got := onWallClock(began, now); !got.Equal(wall.Add(-time.Hour)) {
		t.Errorf("undisturbed: %v", got)
	}
	// Without a monotonic reading only the wall clock counts, which has gone on while the machine slept.
	if got := onWallClock(began.Round(0).Add(-8*time.Hour), now); !got.Equal(wall.Add(-9 * time.Hour)) {
		t.Errorf("asleep: %v", got)
	}
	if got := onWallClock(wall.Add(time.Hour), now); !got.Equal(wall.Add(time.Hour)) {
		t.Errorf("in the future: %v", got)
	}
}
