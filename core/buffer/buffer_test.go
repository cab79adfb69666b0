package buffer

import "testing"

// A buffer is large only while reads fill it.
func TestSizes(t *testing.T) {
	var b Buffer
	for i, step := range []struct{ took, next int }{
		{1, smallBuffer},
		{smallBuffer - 1, smallBuffer},
		{smallBuffer, largeBuffer},
		{smallBuffer + 1, largeBuffer},
		{largeBuffer, largeBuffer},
		{smallBuffer, smallBuffer},
		{smallBuffer, largeBuffer},
		{1, smallBuffer},
		{0, smallBuffer},
	} {
		b.Took(step.took)
		if got := len(b.Next()); got != step.next {
			t.Errorf("step %d: after %d bytes there is room for %d, want %d", i, step.took, got, step.next)
		}
	}
	b.Took(smallBuffer)
	b.Release()
	if b.large != nil || len(b.Next()) != smallBuffer {
		t.Error("what is large was not given back")
	}
}
