package master

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// pipes is ssh's pair of pipes as one connection: what ssh writes is read from in, what it reads is written to out.
type pipes struct {
	in, out         *os.File
	inSize, outSize pipeSize
	once            sync.Once
	err             error // of Close
}

func (p *pipes) Read(b []byte) (int, error) {
	n, err := p.in.Read(b)
	p.inSize.carried(p.in, n)
	return n, err
}

func (p *pipes) Write(b []byte) (int, error) {
	n, err := p.out.Write(b)
	p.outSize.carried(p.out, n)
	return n, err
}

// SyscallConn implements syscall.Conn: of what is read from.
func (p *pipes) SyscallConn() (syscall.RawConn, error) { return p.in.SyscallConn() }

// Close closes both pipes: ssh ends only when its own stdout pipe, our out, gives EOF.
func (p *pipes) Close() error {
	p.once.Do(func() {
		p.inSize.end()
		p.outSize.end()
		p.err = errors.Join(p.in.Close(), p.out.Close())
	})
	return p.err
}

func (p *pipes) SetDeadline(t time.Time) error {
	return errors.Join(p.in.SetReadDeadline(t), p.out.SetWriteDeadline(t))
}
func (p *pipes) SetReadDeadline(t time.Time) error  { return p.in.SetReadDeadline(t) }
func (p *pipes) SetWriteDeadline(t time.Time) error { return p.out.SetWriteDeadline(t) }
func (p *pipes) LocalAddr() net.Addr                { return pipeAddr{} }
func (p *pipes) RemoteAddr() net.Addr               { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }
