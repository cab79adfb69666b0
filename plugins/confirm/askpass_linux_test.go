package confirm

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What is killed with ctx is killed before the program is waited for: after that its group's number may be another's.
func TestRunKillsNobodyElse(t *testing.T) {
	before := killGroup
	defer func() { killGroup = before }()
	started := filepath.Join(t.TempDir(), "started")
	ctx, cancel := context.WithCancel(within(t))
	var slow atomic.Bool
	killGroup = func(pid int) {
		before(pid)
		if slow.Swap(true) {
			return
		}
		for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if err := syscall.Kill(pid, 0); err != nil {
				t.Errorf("it was waited for meanwhile: %v", err)
				return
			}
		}
	}
	done := make(chan answer, 1)
	path := script(t, "echo >"+started+"; exec sleep 1000")
	go func() { done <- run(ctx, path, []string{"PATH=" + os.Getenv("PATH")}, "?") }()
	for {
		if _, err := os.Stat(started); err == nil {
			break
		}
		time.Sleep(time.Millisecond) // polling: it has no other way to say so
	}
	cancel()
	if a := <-done; a.verdict != unanswered {
		t.Errorf("%+v", a)
	}
}
