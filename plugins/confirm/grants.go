package confirm

import (
	"cmp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// maxGrants bounds the answers that count on for a process: each may hold a descriptor. maxClients bounds those for a client.
// The oldest goes first.
const maxGrants = 256

// key is what an answer is good for: uses of one kind of a host from a scope; or, given in a client's terminal, all that this
// client asks for, of jump hosts, too.
type key struct {
	scope
	host string // USER@HOST:PORT
	kind string
	rule string // of the block that wanted it

	client uint64 // instead of all that; 0: none
}

// grant is a yes that counts on.
type grant struct {
	id    uint64
	key   key
	host  string         // that the question was about, USER@HOST:PORT
	held  *held          // nil for a client, whose end the master tells
	who   plugin.Process // that it is bound to
	since time.Time
	until time.Time     // zero: no end by time
	idle  time.Duration // it ends when it was not used for so long; 0: no such end
	used  time.Time
	once  bool // it ends with the last connection to the host
	// atTerminal says that it was given in a client's terminal, for all that the client would ask for, and other clients
	// from the scope.
	atTerminal bool
	pos        string
}

// ends is when it ends by time; zero: never.
func (g *grant) ends() time.Time {
	if g.idle > 0 {
		return g.used.Add(g.idle)
	}
	return g.until
}

func (g *grant) valid(now time.Time) bool {
	end := g.ends()
	return (end.IsZero() || now.Before(end)) && (g.held == nil || g.held.alive())
}

// grants are all that count. They are nowhere but in memory.
type grants struct {
	mu   sync.Mutex // guards what follows
	all  map[key]*grant
	last uint64
}

func newGrants() *grants { return &grants{all: map[key]*grant{}} }

// has reports whether a yes counts for k, and notes that it was used. If it was given in a client's terminal, heir counts
// from now on: it is for another client, which may ask for more than k. nil: there is none.
func (s *grants) has(k key, heir *grant) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prune()
	g := s.all[k]
	if g == nil {
		return false
	}
	g.used = time.Now()
	if g.atTerminal && heir != nil {
		s.put(*heir)
	}
	return true
}

// add makes g count, in the place of what counted for the same. It takes g's held.
func (s *grants) add(g grant) grant {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prune()
	return s.put(g)
}

// put is add. mu is held.
func (s *grants) put(g grant) grant {
	s.last++
	g.id, g.since = s.last, time.Now()
	g.used = g.since
	most := maxGrants
	if g.held == nil {
		most = maxClients
	}
	var like []*grant
	for _, other := range s.all {
		if (other.held == nil) == (g.held == nil) {
			like = append(like, other)
		}
	}
	if old := s.all[g.key]; old != nil {
		s.remove(old)
	} else if len(like) >= most {
		s.remove(slices.MinFunc(like, func(a, b *grant) int { return cmp.Compare(a.id, b.id) }))
	}
	s.all[g.key] = &g
	return g
}

// remove ends one. mu is held.
func (s *grants) remove(g *grant) {
	if g.held != nil {
		g.held.release()
	}
	delete(s.all, g.key)
}

// prune ends what counts no more. mu is held.
func (s *grants) prune() {
	now := time.Now()
	for _, g := range s.all {
		if !g.valid(now) {
			s.remove(g)
		}
	}
}

// forget ends those that gone says so of, and returns them, the oldest first.
func (s *grants) forget(gone func(*grant) bool) []grant {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prune()
	var out []grant
	for _, g := range s.all {
		if gone(g) {
			out = append(out, *g)
			s.remove(g)
		}
	}
	return sorted(out)
}

// list returns what counts, the oldest first. Their held are not for use.
func (s *grants) list() []grant {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prune()
	var out []grant
	for _, g := range s.all {
		out = append(out, *g)
	}
	return sorted(out)
}

func sorted(list []grant) []grant {
	slices.SortFunc(list, func(a, b grant) int { return cmp.Compare(a.id, b.id) })
	return list
}

// what is what a grant is for, for a person.
func (g *grant) what() string {
	if g.key.client != 0 {
		return "all"
	}
	return kindLabel(g.key.kind)
}

func (g *grant) name() string { return strconv.FormatUint(g.id, 10) }
