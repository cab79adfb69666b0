package relay

import "sync"

// Sizes of a buffer: what somebody types fits the small one, which is all that an idle channel holds. The large one takes
// what has come while the last write was under way, several packets at once (32 KiB each: RFC 4254 section 5.2).
const (
	smallBuffer = 2 << 10
	largeBuffer = 128 << 10
)

var largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

// buffer is what one direction of a channel is copied through. The zero value is small.
type buffer struct {
	small []byte
	large *[largeBuffer]byte // nil unless much comes
}

// next is where to read to.
func (b *buffer) next() []byte {
	if b.large != nil {
		return b.large[:]
	}
	if b.small == nil {
		b.small = make([]byte, smallBuffer)
	}
	return b.small
}

// took is told how much was read, once that has been written.
func (b *buffer) took(n int) {
	switch {
	case b.large == nil && n == smallBuffer:
		b.large = largeBuffers.Get().(*[largeBuffer]byte)
	case b.large != nil && n <= smallBuffer:
		b.release()
	}
}

// release gives the large buffer back.
func (b *buffer) release() {
	if b.large != nil {
		largeBuffers.Put(b.large)
		b.large = nil
	}
}
