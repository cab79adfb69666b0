package upstream

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A dial that began while the network was away, or is slow, or fails.
func TestDialAnew(t *testing.T) {
	refused := errors.New("connection refused")
	for name, c := range map[string]struct {
		first, later time.Duration // when a SYN is answered that was sent at the start, or later; 0: never
		back         time.Duration // when later ones get through
		fails        error         // what the first answer is; nil: a connection
		laterFails   bool
		took         time.Duration
		tries        int64
	}{
		"at once": {first: time.Millisecond, took: time.Millisecond, tries: 1},
		"refused": {first: time.Millisecond, fails: refused, took: time.Millisecond, tries: 1},
		"the network comes back": {
			first: 15 * time.Second, back: 7 * time.Second, later: time.Millisecond, took: 8*time.Second + time.Millisecond, tries: 5,
		},
		"a network of three seconds":   {first: 3 * time.Second, later: 3 * time.Second, took: 3 * time.Second, tries: 2},
		"nobody answers but the first": {first: 63 * time.Second, took: 63 * time.Second, tries: 32},
		"refused late":                 {first: 5 * time.Second, fails: refused, took: 5 * time.Second, tries: 3},
		"later ones fail at once": {
			first: 5 * time.Second, later: time.Microsecond, laterFails: true, took: 5 * time.Second, tries: 3,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				var tries, flying, open atomic.Int64
				dial := func(ctx context.Context) (net.Conn, error) {
					first := tries.Add(1) == 1
					if flying.Add(1) > 3 { // one of them is being ended
						t.Errorf("%d dials at a time", flying.Load())
					}
					defer flying.Add(-1)
					answer, err := c.first, c.fails
					if !first {
						answer, err = c.later, nil
						if c.laterFails {
							err = errors.New("network is unreachable")
						} else if time.Since(began) < c.back {
							answer = 0
						}
					}
					if answer == 0 {
						answer = time.Hour
					}
					select {
					case <-time.After(answer):
					case <-ctx.Done():
						return nil, ctx.Err()
					}
					if err != nil {
						return nil, err
					}
					open.Add(1)
					return &counted{open: &open}, nil
				}
				got, err := anew(t.Context(), dial)
				if took := time.Since(began); !errors.Is(err, c.fails) || took != c.took || tries.Load() != c.tries {
					t.Errorf("%v after %s and %d tries", err, took, tries.Load())
				}
				if err == nil {
					got.Close()
				}
				if open.Load() != 0 || flying.Load() != 0 {
					t.Errorf("%d connections and %d dials are left", open.Load(), flying.Load())
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(5*time.Second, func() { cancel(gone) })
		_, err := anew(ctx, func(ctx context.Context) (net.Conn, error) {
			<-ctx.Done()
			return nil, context.Cause(ctx)
		})
		if !errors.Is(err, gone) {
			t.Errorf("got %v", err)
		}
	})
}

// counted is a connection that is missed if nobody closes it.
type counted struct {
	net.Conn
	open *atomic.Int64
}

func (c *counted) Close() error { c.open.Add(-1); return nil }
