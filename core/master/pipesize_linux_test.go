package master

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func sizeOf(t *testing.T, f *os.File) int {
	t.Helper()
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	raw.Control(func(fd uintptr) { n, err = unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0) })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func newPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func TestOnlyBusyPipesAreRaisedAndFewOfThem(t *testing.T) {
	var sizes [raisedPipes + 1]pipeSize
	var files [raisedPipes + 1]*os.File
	for i := range sizes {
		_, files[i] = newPipe(t)
		sizes[i].carried(files[i], raiseAfter/2)
		if n := sizeOf(t, files[i]); n != normalPipe {
			t.Fatalf("pipe %d holds %d bytes before it carried much", i, n)
		}
		sizes[i].carried(files[i], raiseAfter/2)
	}
	for i := range sizes {
		want := raisedPipe
		if i == raisedPipes {
			want = normalPipe
		}
		if n := sizeOf(t, files[i]); n != want {
			t.Errorf("pipe %d holds %d bytes, want %d", i, n, want)
		}
	}
	sizes[0].end() // its place is free for another one
	sizes[raisedPipes].carried(files[raisedPipes], raiseAfter)
	if n := sizeOf(t, files[raisedPipes]); n != raisedPipe {
		t.Errorf("the last pipe holds %d bytes after a place was free", n)
	}
	for i := range sizes {
		sizes[i].end()
	}
	if len(raised) != 0 {
		t.Errorf("%d places are still taken", len(raised))
	}
}

func TestAQuietPipeIsLowered(t *testing.T) {
	_, w := newPipe(t)
	var p pipeSize
	p.carried(w, raiseAfter)
	if n := sizeOf(t, w); n != raisedPipe {
		t.Fatalf("a busy pipe holds %d bytes", n)
	}
	p.mu.Lock()
	p.last = time.Now().Add(-time.Hour)
	p.mu.Unlock()
	p.lower(w)
	if n := sizeOf(t, w); n != normalPipe {
		t.Errorf("a quiet pipe holds %d bytes", n)
	}
	if len(raised) != 0 {
		t.Errorf("%d places are still taken", len(raised))
	}
}
