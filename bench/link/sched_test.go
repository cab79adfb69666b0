package link

import (
	"testing"
	"time"
)

var t0 = time.Unix(1e9, 0)

// ms is a moment of the tests' clock.
func ms(n int) time.Time { return t0.Add(time.Duration(n) * time.Millisecond) }

func (s *scheduler) give(f *flow, n, size int, at time.Time) {
	for range n {
		s.add(&chunk{flow: f, b: make([]byte, size), arrived: at})
	}
}

// drain takes what the wire carries until a moment, looking as often as a timer would.
func (s *scheduler) drain(now, until time.Time) []*chunk {
	var all []*chunk
	for {
		c, wait := s.next(now)
		switch {
		case c != nil:
			all = append(all, c)
		case wait == 0:
			return all
		default:
			if now = now.Add(wait); now.After(until) {
				return all
			}
		}
	}
}

func TestRateAndDelay(t *testing.T) {
	for _, c := range []struct {
		name  string
		rate  float64
		delay time.Duration
		n     int
		first time.Time // when they are due
		last  time.Time
	}{
		{"neither", 0, 0, 10, ms(0), ms(0)},
		{"delay", 0, 20 * time.Millisecond, 10, ms(20), ms(20)},
		{"rate", 1e6, 0, 10, ms(1), ms(10)}, // chunks of 1000 bytes: one in each millisecond
		{"both", 1e6, 20 * time.Millisecond, 10, ms(21), ms(30)},
	} {
		s := scheduler{rate: c.rate, delay: c.delay}
		s.give(&flow{}, c.n, 1000, ms(0))
		got := s.drain(ms(0), ms(1000))
		if len(got) != c.n || !got[0].due.Equal(c.first) || !got[c.n-1].due.Equal(c.last) {
			t.Errorf("%s: %d chunks from %v to %v, want %d from %v to %v", c.name, len(got), got[0].due, got[len(got)-1].due,
				c.n, c.first, c.last)
		}
		if s.queued != 0 {
			t.Errorf("%s: %d bytes remain", c.name, s.queued)
		}
	}
}

// Who looks late finds everything sent at the time when it would have been; who comes after a pause finds a free wire,
// and no credit for the time in which there was nothing to send.
func TestRateIsTheWires(t *testing.T) {
	s := scheduler{rate: 1e6}
	f := &flow{}
	s.give(f, 10, 1000, ms(0))
	var last *chunk
	for range 10 {
		c, wait := s.next(ms(50))
		if c == nil {
			t.Fatalf("the wire is busy for %v more", wait)
		}
		last = c
	}
	if !last.due.Equal(ms(10)) {
		t.Errorf("the last is due at %v, want %v", last.due, ms(10))
	}
	s.give(f, 2, 1000, ms(100))
	if c, _ := s.next(ms(100)); c == nil || !c.due.Equal(ms(101)) {
		t.Errorf("after a pause: %v, want one due at %v", c, ms(101))
	}
	if c, wait := s.next(ms(100)); c != nil || wait != time.Millisecond {
		t.Errorf("two at once, or wait %v", wait)
	}
}

func TestDisciplines(t *testing.T) {
	for _, c := range []struct {
		name string
		fair bool
		// after how many chunks of a backlog a newcomer's single one goes
		max, min int
	}{
		{"plain", false, 100, 100},
		{"fair", true, 2, 0},
	} {
		s := scheduler{rate: 1e6, fair: c.fair}
		bulk, echo := &flow{}, &flow{}
		s.give(bulk, 100, 1000, ms(0))
		s.next(ms(0)) // the wire is busy with one
		s.give(echo, 1, 10, ms(0))
		ahead := 1
		for _, ch := range s.drain(ms(1), ms(1000)) {
			if ch.flow == echo {
				break
			}
			ahead++
		}
		if ahead > c.max || ahead < c.min {
			t.Errorf("%s: %d chunks went before the newcomer's, want %d to %d", c.name, ahead, c.min, c.max)
		}
	}
}

// Shares count bytes, not chunks, and one that is never out of work can't starve the others.
func TestFairShares(t *testing.T) {
	s := scheduler{rate: 1e6, fair: true}
	big, small := &flow{}, &flow{}
	s.give(big, 400, 1500, ms(0))
	s.give(small, 4000, 150, ms(0))
	sent := map[*flow]int{}
	for _, c := range s.drain(ms(0), ms(500)) {
		sent[c.flow] += len(c.b)
	}
	if b, m := sent[big], sent[small]; b+m < 490_000 || b > m+3*quantum || m > b+3*quantum {
		t.Errorf("shares of 500,000 bytes: %d and %d", b, m)
	}
}

// A flow that always comes back just after it has run dry is no newcomer each time.
func TestFairComesBack(t *testing.T) {
	s := scheduler{rate: 1e6, fair: true}
	bulk, clever := &flow{}, &flow{}
	s.give(bulk, 10_000, 150, ms(0))
	sent := map[*flow]int{}
	now := ms(0)
	for now.Before(ms(300)) {
		c, wait := s.next(now)
		if c == nil {
			now = now.Add(wait)
			continue
		}
		sent[c.flow] += len(c.b)
		if c.flow == bulk && clever.queued == 0 {
			s.give(clever, 1, 1400, now)
		}
	}
	if sent[clever] > sent[bulk]+3*quantum || sent[clever] == 0 {
		t.Errorf("%d bytes of the one that came back, %d of the other", sent[clever], sent[bulk])
	}
}
