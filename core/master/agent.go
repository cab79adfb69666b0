package master

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/muxproxy/muxproxy/core/paths"
)

// agent is the caller's authentication agent (pool.Agent).
type agent struct {
	path string
	id   string // device and inode of its socket

	mu   sync.Mutex // guards conn
	conn *os.File   // connected by the bridge; nil once taken
}

// newAgent returns nil if there is no agent. It owns conn, which may be nil, until close.
func newAgent(path string, conn *os.File) *agent {
	if path == "" {
		return nil
	}
	id := "path " + path
	if fi, err := os.Stat(path); err == nil {
		if dev, ino, ok := deviceInode(fi); ok {
			id = fmt.Sprintf("%d:%d", dev, ino)
		}
	}
	return &agent{path: path, id: id, conn: conn}
}

// ID implements pool.Agent.
func (a *agent) ID() string { return a.id }

// Dial implements pool.Agent. The bridge's connection comes first: it was made where the caller lives.
func (a *agent) Dial() (net.Conn, error) {
	a.mu.Lock()
	f := a.conn
	a.conn = nil
	a.mu.Unlock()
	if f != nil {
		defer f.Close()
		return net.FileConn(f)
	}
	return paths.Dial(filepath.Split(a.path)) // whose paths may be longer than sockaddr_un
}

func (a *agent) close() {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn != nil {
		a.conn.Close()
		a.conn = nil
	}
}
