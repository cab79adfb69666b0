package link

import "time"

// chunk is what one read gave. Without bytes it is the end of that direction of its connection.
type chunk struct {
	flow    *flow
	b       []byte
	arrived time.Time
	due     time.Time // when it reaches the other side; set by next
}

// scheduler is one direction's bottleneck: a queue in front of a wire of some rate. It reads no clock, and its user's
// lock guards it.
type scheduler struct {
	rate  float64 // bytes per second; 0: no limit
	delay time.Duration
	fair  bool

	queued int // bytes
	// Plain: fifo holds all. Fair: each flow holds its own, and waits in one of two lists.
	fifo          []*chunk
	fresh, served []*flow
	free          time.Time // when the wire has sent what it was given
}

// flow is one direction of one connection, as far as the queue is concerned.
type flow struct {
	queue   []*chunk // fair only
	credit  int      // bytes that it may still send in its turn
	waiting bool     // it is in one of the lists
	queued  int      // bytes of it in the queue, whatever the discipline
	under   int      // bytes read and not yet written to the other side
	over    bool     // nobody takes its bytes any more
	line    line
}

// add queues a chunk.
func (s *scheduler) add(c *chunk) {
	s.queued += len(c.b)
	c.flow.queued += len(c.b)
	if !s.fair {
		s.fifo = append(s.fifo, c)
		return
	}
	f := c.flow
	f.queue = append(f.queue, c)
	if !f.waiting {
		f.waiting, f.credit = true, quantum
		s.fresh = append(s.fresh, f)
	}
}

// next takes the chunk whose turn it is and puts it on the wire, which then is busy until free. Without one it says
// how long to wait for the wire; 0 means that there is nothing to send.
func (s *scheduler) next(now time.Time) (*chunk, time.Duration) {
	if s.rate > 0 && s.free.After(now) {
		if len(s.fifo)+len(s.fresh)+len(s.served) == 0 {
			return nil, 0
		}
		return nil, s.free.Sub(now)
	}
	c := s.pick()
	if c == nil {
		return nil, 0
	}
	s.queued -= len(c.b)
	c.flow.queued -= len(c.b)
	// A late timer must cost no throughput: the wire began with this chunk when it could, not when somebody looked.
	start := c.arrived
	if s.free.After(start) {
		start = s.free
	}
	if s.rate > 0 {
		s.free = start.Add(time.Duration(float64(len(c.b)) / s.rate * float64(time.Second)))
		start = s.free
	}
	c.due = start.Add(s.delay)
	return c, 0
}

// pick chooses as RFC 8290, section 4.2, does: deficit round robin, and a flow that had nothing queued goes first.
func (s *scheduler) pick() *chunk {
	if !s.fair {
		if len(s.fifo) == 0 {
			return nil
		}
		c := s.fifo[0]
		s.fifo[0], s.fifo = nil, s.fifo[1:]
		return c
	}
	for {
		list := &s.fresh
		if len(*list) == 0 {
			list = &s.served
		}
		if len(*list) == 0 {
			return nil
		}
		f := (*list)[0]
		switch {
		case f.credit <= 0:
			f.credit += quantum
			*list = (*list)[1:]
			s.served = append(s.served, f)
		case len(f.queue) == 0:
			*list = (*list)[1:]
			if list == &s.fresh && len(s.served) > 0 {
				s.served = append(s.served, f) // else it could come back as a fresh one again and again
			} else {
				f.waiting = false
			}
		default:
			c := f.queue[0]
			f.queue[0], f.queue = nil, f.queue[1:]
			f.credit -= max(len(c.b), 1)
			return c
		}
	}
}
