package paths

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// ErrLocked says that another process, or another FileLock of this one, holds a lock.
var ErrLocked = errors.New("locked by another process")

// lockPoll is how often Lock tries. A blocking flock(2) could not be given up when the context ends.
const lockPoll = 10 * time.Millisecond

// FileLock is a lock on a file, held until Close or the death of the process. Child processes don't inherit it.
type FileLock struct{ f *os.File }

// Lock waits for the lock on a file, which it creates if need be. The file must never be removed while in use.
func Lock(ctx context.Context, path string) (*FileLock, error) {
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		l, err := TryLock(path)
		if !errors.Is(err, ErrLocked) {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w, and it did not let go: %w", err, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// TryLock is Lock without waiting: the error wraps ErrLocked if somebody else holds the lock.
func TryLock(path string) (*FileLock, error) {
	f, err := openLock(path)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	// A file that was replaced meanwhile would let a second holder in.
	held, err1 := f.Stat()
	named, err2 := os.Lstat(path)
	if err1 != nil || err2 != nil || !os.SameFile(held, named) {
		f.Close()
		return nil, fmt.Errorf("%s: replaced: %w", path, ErrLocked)
	}
	return &FileLock{f}, nil
}

// Close lets go of the lock. The file stays.
func (l *FileLock) Close() error { return l.f.Close() }
