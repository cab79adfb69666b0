package confirm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	// restTime is how long whoever has been told no waits for the next question.
	restTime = 5 * time.Second
	// maxQueue bounds the questions that wait for their turn, maxOpen all that wait, those for `muxproxy allow` among them.
	maxQueue = 64
	maxOpen  = 512
)

var errQueue = errors.New("too many questions wait for an answer already")

// turns lets one question at a time be asked, in the order in which they came, but for those whose asker rests.
type turns struct {
	mu      sync.Mutex // guards what follows
	busy    bool
	queue   []*turn
	rests   map[scope]time.Time // until when; an asker that is nobody in particular is one asker
	changed chan struct{}       // closed, and made anew, when somebody may go now
}

type turn struct{ asker scope }

func newTurns() *turns { return &turns{rests: map[scope]time.Time{}, changed: make(chan struct{})} }

// take waits for asker's turn; leave has to be called after it. say is told what is waited for.
func (t *turns) take(ctx context.Context, asker scope, say func(string)) error {
	me := &turn{asker}
	t.mu.Lock()
	if len(t.queue) >= maxQueue {
		t.mu.Unlock()
		return errQueue
	}
	t.queue = append(t.queue, me)
	for {
		rest, mine := t.look(me)
		if mine {
			t.busy = true
			t.remove(me)
			t.mu.Unlock()
			return nil
		}
		changed := t.changed
		t.mu.Unlock()
		var over <-chan time.Time
		var timer *time.Timer
		if rest > 0 {
			say(fmt.Sprintf("the last answer was no; asking again in %v", rest.Round(time.Second)))
			timer = time.NewTimer(rest)
			over = timer.C
		} else {
			say("waiting for an earlier question to be answered")
		}
		select {
		case <-over:
		case <-changed:
		case <-ctx.Done():
		}
		if timer != nil {
			timer.Stop()
		}
		t.mu.Lock()
		if err := ctx.Err(); err != nil {
			t.remove(me)
			t.wake() // the next one may have looked while this one stood before it
			t.mu.Unlock()
			return err
		}
	}
}

// look returns how long me has to rest, and whether it is its turn. mu is held.
func (t *turns) look(me *turn) (rest time.Duration, mine bool) {
	now := time.Now()
	for asker, until := range t.rests {
		if !until.After(now) {
			delete(t.rests, asker)
		}
	}
	if until, ok := t.rests[me.asker]; ok {
		return until.Sub(now), false
	}
	if t.busy {
		return 0, false
	}
	for _, other := range t.queue {
		if _, resting := t.rests[other.asker]; !resting {
			return 0, other == me
		}
	}
	return 0, false
}

// remove takes me from the queue. mu is held.
func (t *turns) remove(me *turn) {
	t.queue = slices.DeleteFunc(t.queue, func(other *turn) bool { return other == me })
}

// wake has all look again. mu is held.
func (t *turns) wake() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// leave lets the next one go.
func (t *turns) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.busy = false
	t.wake()
}

// refused makes an asker rest.
func (t *turns) refused(asker scope) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rests[asker] = time.Now().Add(restTime)
}
