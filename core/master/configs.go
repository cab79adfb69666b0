package master

import (
	"crypto/sha256"
	"encoding/json"
	"slices"
	"sync"

	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
	"github.com/muxproxy/muxproxy/core/wire"
)

// maxConfigs bounds how many answers of `ssh -G` are kept, and how many agents are remembered.
const maxConfigs = 256

// configs keeps answers of `ssh -G` until a file that was read changes.
type configs struct {
	mu    sync.Mutex // guards byKey
	byKey map[[sha256.Size]byte]resolution
}

// resolution is what a bridge found out about its host.
type resolution struct {
	config    sshconfig.Resolved
	agentPath string
	hops      []wire.Hop
}

// fresh tells whether no file has changed that was read for it.
func (r *resolution) fresh() bool {
	return r.config.Fresh() && !slices.ContainsFunc(r.hops, func(h wire.Hop) bool { return !h.Config.Fresh() })
}

func (r *resolution) volatile() bool {
	return r.config.Volatile || slices.ContainsFunc(r.hops, func(h wire.Hop) bool { return h.Config.Volatile })
}

// configKey is all that an answer depends on, files apart.
func configKey(h wire.Hello, via []string) [sha256.Size]byte {
	b, _ := json.Marshal(struct { // strings, numbers and a map with sorted keys: it can't fail
		Target wire.Target
		Args   []string
		Env    map[string]string
		Via    []string
	}{h.Target, h.SSHArgs, h.Env, via})
	return sha256.Sum256(b)
}

// get returns an answer that still holds.
func (c *configs) get(h wire.Hello, via []string) (resolution, bool) {
	c.mu.Lock()
	r, ok := c.byKey[configKey(h, via)]
	c.mu.Unlock()
	return r, ok && r.fresh()
}

func (c *configs) put(h wire.Hello, via []string, r resolution) {
	if r.volatile() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byKey == nil {
		c.byKey = map[[sha256.Size]byte]resolution{}
	}
	makeRoom(c.byKey)
	c.byKey[configKey(h, via)] = r
}

// makeRoom takes any entries out of a full map: what they hold is found out again when it is missed.
func makeRoom[K comparable, V any](m map[K]V) {
	for k := range m {
		if len(m) < maxConfigs {
			break
		}
		delete(m, k)
	}
}

// lastAgents remembers which agent clients of a host had, for logins that no client asks for.
type lastAgents struct {
	mu    sync.Mutex // guards paths
	paths map[use.Target]string
}

// note takes what a client's login would use.
func (a *lastAgents) note(r *resolution, target use.Target) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.paths == nil {
		a.paths = map[use.Target]string{}
	}
	a.putLocked(target, r.agentPath)
	for _, h := range r.hops {
		a.putLocked(use.Target(h.Target), h.AgentPath)
	}
}

func (a *lastAgents) putLocked(t use.Target, path string) {
	if path == "" {
		return // a client without one says nothing about the others'
	}
	t.Alias = ""
	makeRoom(a.paths)
	a.paths[t] = path
}

func (a *lastAgents) of(t use.Target) string {
	t.Alias = ""
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.paths[t]
}
