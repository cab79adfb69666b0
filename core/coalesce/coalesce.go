// Package coalesce makes the reads and writes of an SSH connection few and large.
package coalesce

import (
	"net"
	"sync"
	"sync/atomic"
)

const (
	// part is the size of x/crypto/ssh's buffers (bufio's default). A packet that does not fit is written as one such part
	// and the rest, and read in the same way: two system calls for each packet, or more, and two TCP segments.
	part = 4096
	// ahead is how much is read at a time while there is that much.
	ahead = 64 << 10
	// largest is a channel packet's data (RFC 4254 section 5.2) with what the transport puts around it.
	largest = 32<<10 + 1024
)

// Conn is a connection under an SSH transport of x/crypto/ssh. Reads are for one goroutine at a time, and writes, too.
type Conn struct {
	net.Conn

	join   atomic.Bool
	vector bool // Conn takes several buffers in one system call
	held   *[part]byte
	parts  [2][]byte

	await    func()       // waits for something to read, without room for it; nil: can't be done
	buf      *[ahead]byte // nil unless it holds something, or await is nil
	from, to int          // what of buf has not been read yet
	err      error        // comes after that
	full     bool         // the last read took all that there was room for
}

var (
	heads  = sync.Pool{New: func() any { return new([part]byte) }}
	bufs   = sync.Pool{New: func() any { return new([ahead]byte) }}
	joined = sync.Pool{New: func() any { return new([part + largest]byte) }}
)

// New returns c's wrapper, which owns c. If c is a syscall.Conn its descriptor is the one that it reads from.
func New(c net.Conn) *Conn {
	s := &Conn{Conn: c, await: readable(c)}
	switch c.(type) {
	case *net.TCPConn, *net.UnixConn:
		s.vector = true
	}
	return s
}

// Join has the two writes of a large packet made one, if cipher is what the connection encrypts with (its name in RFC
// 5647 or OpenSSH's PROTOCOL.chacha20poly1305): with these ciphers no packet has the very size of the first write, so
// that another is sure to follow.
func (c *Conn) Join(cipher string) {
	switch cipher {
	case "aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com":
		c.join.Store(true)
	}
}

// Write writes p, or keeps the first part of a packet until the rest comes. An error may be that of the part before.
func (c *Conn) Write(p []byte) (int, error) {
	if c.held == nil {
		if len(p) != part || !c.join.Load() {
			return c.Conn.Write(p)
		}
		c.held = heads.Get().(*[part]byte)
		return copy(c.held[:], p), nil
	}
	head := c.held
	c.held = nil
	defer heads.Put(head)
	n, err := c.writeBoth(head[:], p)
	return max(n-part, 0), err
}

func (c *Conn) writeBoth(head, rest []byte) (int, error) {
	if c.vector {
		c.parts = [2][]byte{head, rest}
		v := net.Buffers(c.parts[:])
		n, err := v.WriteTo(c.Conn)
		c.parts = [2][]byte{}
		return int(n), err
	}
	if len(rest) > largest {
		if n, err := c.Conn.Write(head); err != nil {
			return n, err
		}
		n, err := c.Conn.Write(rest)
		return part + n, err
	}
	b := joined.Get().(*[part + largest]byte)
	defer joined.Put(b)
	copy(b[:], head)
	return c.Conn.Write(b[:part+copy(b[part:], rest)])
}

// Read reads what has come. While more comes than is asked for it reads ahead.
func (c *Conn) Read(p []byte) (int, error) {
	if c.from == c.to {
		if c.err != nil {
			return 0, c.err
		}
		if !c.full {
			n, err := c.Conn.Read(p)
			c.full = n >= part && n == len(p)
			return n, err
		}
		if c.await != nil { // else a connection that goes quiet now keeps a buffer for nothing
			c.await()
		}
		if c.buf == nil {
			c.buf = bufs.Get().(*[ahead]byte)
		}
		c.from = 0
		c.to, c.err = c.Conn.Read(c.buf[:])
		c.full = c.to >= ahead/2
	}
	n := copy(p, c.buf[c.from:c.to])
	c.from += n
	if c.from < c.to {
		return n, nil
	}
	if !c.full || c.await != nil {
		bufs.Put(c.buf)
		c.buf, c.from, c.to = nil, 0, 0
	}
	if n == 0 {
		return 0, c.err
	}
	return n, nil
}
