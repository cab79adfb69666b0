// Package buffer has room for copying a channel's data: little while it is idle, much while much comes.
package buffer

import "sync"

// Sizes of a buffer: what somebody types fits the small one, which is all that an idle channel holds. The large one takes
// what has come while the last write was under way, several packets at once (32 KiB each: RFC 4254 section 5.2).
const (
	smallBuffer = 2 << 10
	largeBuffer = 128 << 10
)

var largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

// Buffer is what one direction of a channel is copied through, by one goroutine. The zero value is small.
type Buffer struct {
	small []byte
	large *[largeBuffer]byte // nil unless much comes
}

// Next is where to read to; it holds until Took or Release.
func (b *Buffer) Next() []byte {
	if b.large != nil {
		return b.large[:]
	}
	if b.small == nil {
		b.small = make([]byte, smallBuffer)
	}
	return b.small
}

// Took is told how much was read, once that has been written.
func (b *Buffer) Took(n int) {
	switch {
	case b.large == nil && n == smallBuffer:
		b.large = largeBuffers.Get().(*[largeBuffer]byte)
	case b.large != nil && n <= smallBuffer:
		b.Release()
	}
}

// Release gives back what is large. The Buffer can be used on.
func (b *Buffer) Release() {
	if b.large != nil {
		largeBuffers.Put(b.large)
		b.large = nil
	}
}
