package coalesce

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
)

// fakeConn notes the sizes of its writes and reads from a script.
type fakeConn struct {
	net.Conn
	writes []int
	wrote  bytes.Buffer
	fail   error // of writes
	takes  int   // bytes that a failing write takes
	r      io.Reader
	reads  []int // sizes that were asked for
}

func (c *fakeConn) Write(p []byte) (int, error) {
	c.writes = append(c.writes, len(p))
	if c.fail != nil {
		return min(c.takes, len(p)), c.fail
	}
	return c.wrote.Write(p)
}

func (c *fakeConn) Read(p []byte) (int, error) {
	c.reads = append(c.reads, len(p))
	return c.r.Read(p)
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// write does what bufio does with a packet: a full buffer first, then the rest.
func write(t *testing.T, c *Conn, packet []byte) {
	t.Helper()
	for _, p := range [][]byte{packet[:min(len(packet), part)], packet[min(len(packet), part):]} {
		if len(p) == 0 {
			continue
		}
		if n, err := c.Write(p); n != len(p) || err != nil {
			t.Fatalf("wrote %d of %d: %v", n, len(p), err)
		}
	}
}

func TestTheTwoWritesOfAPacketBecomeOne(t *testing.T) {
	for _, tt := range []struct {
		cipher string
		want   []int
	}{
		{"aes128-gcm@openssh.com", []int{100, 32 << 10, part + 1, part + largest, part, largest + 1, 20}},
		{"aes256-gcm@openssh.com", []int{100, 32 << 10, part + 1, part + largest, part, largest + 1, 20}},
		{"chacha20-poly1305@openssh.com", []int{100, 32 << 10, part + 1, part + largest, part, largest + 1, 20}},
		{"aes128-ctr", []int{100, part, 32<<10 - part, part, 1, part, largest, part, largest + 1, 20}},
	} {
		f := &fakeConn{}
		c := New(f)
		c.Join(tt.cipher)
		var all []byte
		for _, size := range []int{100, 32 << 10, part + 1, part + largest, part + largest + 1, 20} {
			p := random(size)
			all = append(all, p...)
			write(t, c, p)
		}
		if !bytes.Equal(f.wrote.Bytes(), all) {
			t.Errorf("%s: other bytes", tt.cipher)
		}
		if !slices.Equal(f.writes, tt.want) {
			t.Errorf("%s: writes of %d, want %d", tt.cipher, f.writes, tt.want)
		}
	}
}

func TestAFailedWriteIsToldByItsSecondPart(t *testing.T) {
	broken := errors.New("broken pipe")
	for _, takes := range []int{0, 10, part, part + 10} {
		f := &fakeConn{fail: broken, takes: takes}
		c := New(f)
		c.Join("aes128-gcm@openssh.com")
		if n, err := c.Write(random(part)); n != part || err != nil {
			t.Fatalf("first part: %d, %v", n, err)
		}
		if n, err := c.Write(random(100)); n != max(takes-part, 0) || !errors.Is(err, broken) {
			t.Errorf("second part, %d taken: %d, %v", takes, n, err)
		}
	}
}

// On a real socket both parts go in one system call; the other end sees the bytes in order.
func TestSockets(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	w, r := New(near), New(far)
	w.Join("aes128-gcm@openssh.com")
	if !w.vector {
		t.Error("a TCP connection takes several buffers at once")
	}
	want := random(20 << 20)
	done := make(chan error, 1)
	go func() {
		rnd := rand.New(rand.NewPCG(2, 3))
		for p := want; len(p) > 0; {
			n := min(rnd.IntN(36<<10)+1, len(p))
			if n == part {
				continue // no packet has this size
			}
			write(t, w, p[:n])
			p = p[n:]
		}
		done <- w.Close()
	}()
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes are not the %d that were sent: %v", len(got), len(want), err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	r.Close()
}

func TestReadsAheadWhileMuchComes(t *testing.T) {
	data := random(1 << 20)
	f := &fakeConn{r: bytes.NewReader(data)}
	c := New(f)
	got, err := io.ReadAll(struct{ io.Reader }{io.LimitReader(c, 1<<20)})
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}

	f = &fakeConn{r: bytes.NewReader(data)}
	c = New(f)
	p := make([]byte, part)
	for range 256 {
		if n, err := io.ReadFull(c, p); err != nil || n != part {
			t.Fatal(n, err)
		}
	}
	if len(f.reads) > 1+1<<20/ahead {
		t.Errorf("%d reads for 1 MiB", len(f.reads))
	}
	if n, err := c.Read(p); n != 0 || err != io.EOF {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if n, err := c.Read(p); n != 0 || err != io.EOF {
		t.Errorf("after the end: %d, %v", n, err)
	}
	if c.buf != nil {
		t.Error("the end holds a buffer")
	}
}

// A quiet connection reads what it is asked for, and holds nothing.
func TestAQuietConnectionHoldsNoBuffer(t *testing.T) {
	parts := [][]byte{random(part), random(100), random(50)}
	f := &fakeConn{r: io.MultiReader(bytes.NewReader(parts[0]), bytes.NewReader(parts[1]), bytes.NewReader(parts[2]))}
	c := New(f)
	p := make([]byte, part)
	for i, want := range parts {
		n, err := c.Read(p)
		if !bytes.Equal(p[:n], want) || err != nil && err != io.EOF {
			t.Fatalf("read %d: %d bytes, %v", i, n, err)
		}
	}
	if c.buf != nil {
		t.Error("it holds a buffer")
	}
}

// One that goes quiet right after much has come waits without a buffer, and reads what comes next.
func TestAConnectionThatGoesQuietHoldsNoBuffer(t *testing.T) {
	kinds := map[string]func(t *testing.T) (w io.WriteCloser, r net.Conn){
		"socket": func(t *testing.T) (io.WriteCloser, net.Conn) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			w, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			r, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			return w, r
		},
		"pipe": func(t *testing.T) (io.WriteCloser, net.Conn) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			return w, fileConn{f: r}
		},
	}
	for name, ends := range kinds {
		t.Run(name, func(t *testing.T) {
			w, r := ends(t)
			defer r.Close()
			c := New(r)
			if c.await == nil {
				t.Fatal("its descriptor can't be looked at")
			}
			waits := make(chan struct{})
			var come atomic.Bool
			wait := c.await
			c.await = func() {
				if c.buf != nil {
					t.Error("it waits with a buffer")
				}
				if !come.Load() {
					waits <- struct{}{}
				}
				wait()
				if !come.Load() {
					t.Error("it does not wait")
				}
			}
			type result struct {
				n   int
				err error
			}
			p := make([]byte, part)
			for _, next := range []string{"more", ""} { // "": the end
				come.Store(true)
				carry := func(much int) {
					if _, err := w.Write(random(much)); err != nil {
						t.Fatal(err)
					}
					if _, err := io.ReadFull(c, make([]byte, much)); err != nil {
						t.Fatal(err)
					}
				}
				carry(part)
				for carry(12 * part); !c.full; { // the last of it came ahead, much at a time
					carry(12 * part)
				}
				come.Store(false)
				got := make(chan result, 1)
				go func() {
					n, err := c.Read(p)
					got <- result{n, err}
				}()
				<-waits
				come.Store(true)
				if next == "" {
					w.Close()
					if g := <-got; g.n != 0 || g.err != io.EOF {
						t.Errorf("at the end: %+v", g)
					}
				} else {
					io.WriteString(w, next)
					if g := <-got; string(p[:g.n]) != next || g.err != nil {
						t.Errorf("got %+v", g)
					}
				}
				if c.buf != nil {
					t.Error("it holds a buffer")
				}
			}
		})
	}
}

// fileConn is a file as a connection that is only read.
type fileConn struct {
	net.Conn
	f *os.File
}

func (c fileConn) Read(b []byte) (int, error)            { return c.f.Read(b) }
func (c fileConn) Close() error                          { return c.f.Close() }
func (c fileConn) SyscallConn() (syscall.RawConn, error) { return c.f.SyscallConn() }

// Errors come after the data that came before them, whatever the sizes.
func FuzzRead(f *testing.F) {
	f.Add([]byte("hello"), uint16(3), uint16(4096))
	f.Add(make([]byte, 200<<10), uint16(4096), uint16(33000))
	f.Fuzz(func(t *testing.T, data []byte, a, b uint16) {
		broken := errors.New("reset")
		c := New(&fakeConn{r: io.MultiReader(bytes.NewReader(data), iotest.ErrReader(broken))})
		var got []byte
		for i := 0; ; i++ {
			size := int(a)
			if i%2 == 1 {
				size = int(b)
			}
			p := make([]byte, max(size, 1))
			n, err := c.Read(p)
			got = append(got, p[:n]...)
			if err != nil {
				if !errors.Is(err, broken) {
					t.Fatal(err)
				}
				break
			}
		}
		if !bytes.Equal(got, data) {
			t.Fatalf("%d bytes of %d", len(got), len(data))
		}
	})
}
