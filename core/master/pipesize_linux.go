package master

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bulk through ssh's pipes is 1.6 times as fast when they hold 1 MiB. But the kernel bounds what all pipes of a user
// hold together (fs.pipe-user-pages-soft), and past it every new pipe of that user gets 8 KiB. So few are raised, only
// for clients that move much, and not for longer than they do.
const (
	raisedPipe  = 1 << 20
	normalPipe  = 64 << 10 // what pipe(2) makes
	raiseAfter  = 4 << 20  // bytes that a client has moved since it was last quiet
	raisedPipes = 16       // pipes at a time, of all clients together
	pipeQuiet   = time.Second
)

var raised = make(chan struct{}, raisedPipes)

// pipeSize follows how much one pipe carries, and sets its size. The zero value is a quiet pipe.
type pipeSize struct {
	mu    sync.Mutex // guards what follows
	moved int64      // since the pipe was quiet
	last  time.Time
	timer *time.Timer // runs while the pipe is raised
}

// carried is called after each read or write of f.
func (p *pipeSize) carried(f *os.File, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if now.Sub(p.last) > pipeQuiet {
		p.moved = 0
	}
	p.last = now
	before := p.moved
	p.moved += int64(n)
	if p.timer != nil || before/raiseAfter == p.moved/raiseAfter {
		return
	}
	select {
	case raised <- struct{}{}:
	default:
		return // tried again raiseAfter bytes later
	}
	if setPipeSize(f, raisedPipe) != nil { // no pipe, or past fs.pipe-max-size
		<-raised
		return
	}
	p.timer = time.AfterFunc(pipeQuiet, func() { p.lower(f) })
}

// lower gives the memory back once the pipe has been quiet.
func (p *pipeSize) lower(f *os.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer == nil {
		return
	}
	// EBUSY: there is more in it than would fit, so it is not quiet.
	if wait := pipeQuiet - time.Since(p.last); wait > 0 || setPipeSize(f, normalPipe) == unix.EBUSY {
		p.timer.Reset(max(wait, pipeQuiet/10))
		return
	}
	p.timer = nil
	<-raised
}

// end is called when f is closed.
func (p *pipeSize) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
		<-raised
	}
}

func setPipeSize(f *os.File, size int) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	err2 := raw.Control(func(fd uintptr) { _, err = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, size) })
	if err != nil {
		return err
	}
	return err2
}
