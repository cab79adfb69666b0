package master

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

var _ control.Backend = (*Master)(nil)

// Status implements control.Backend.
func (m *Master) Status() control.Status {
	s := control.Status{
		Version: m.opts.Version, PID: os.Getpid(), Since: m.since, Sockets: m.sockets(), Draining: m.draining.Load(),
		Upstreams: []control.Upstream{}, Clients: []control.Client{},
	}
	for _, u := range m.pool.List() {
		cu := control.Upstream{
			ID: u.ID, Target: u.Target.String(), Lane: u.Lane, State: string(u.State), Since: u.Since, LastHeard: u.LastHeard,
			Addr: u.Server.Addr, Server: use.Printable(u.Server.Version), Kex: u.Server.Kex, Cipher: u.Server.Cipher,
			PostQuantum: u.Server.PostQuantum, Auth: use.Printable(u.Server.Auth), Clients: u.Clients, Channels: int(u.Channels),
			In: u.In, Out: u.Out, Sessions: u.Sessions, MaxSessions: u.MaxSessions, Suspect: u.Suspect,
		}
		if u.Server.HostKey != nil {
			cu.HostKey = u.Server.HostKey.Type() + " " + ssh.FingerprintSHA256(u.Server.HostKey)
		}
		s.Upstreams = append(s.Upstreams, cu)
	}
	for _, c := range m.snapshot() {
		cc := control.Client{
			ID: c.id, Target: c.target.String(), Alias: c.target.Alias, Upstream: c.upstream.Load(), Mode: string(c.hello.Mode),
			Since: c.since, Caller: c.caller, Channels: []control.Channel{},
		}
		if r := c.relay.Load(); r != nil {
			for _, ch := range r.Channels() {
				cc.Channels = append(cc.Channels, control.Channel{
					Kind: string(ch.Use.Kind), Upstream: ch.Upstream, Detail: detail(ch.Use), Since: ch.Since, In: ch.In, Out: ch.Out,
				})
			}
		}
		s.Clients = append(s.Clients, cc)
	}
	slices.SortFunc(s.Clients, func(a, b control.Client) int { return int(a.ID) - int(b.ID) })
	return s
}

// detail says what a use is about, without what may be secret in a command.
func detail(u use.Use) string {
	switch u.Kind {
	case use.Exec:
		return use.Printable(use.Program(u.Command))
	case use.Subsystem:
		return use.Printable(u.Subsystem)
	case use.Other:
		return use.Printable(u.Name)
	}
	return use.Printable(u.Addr)
}

// matcher returns what tells whether an upstream is meant by target: HOST, USER@HOST, USER@HOST:PORT, or an alias that
// a client of it uses. The empty target means all.
func (m *Master) matcher(target string) func(pool.ConnInfo) bool {
	aliases := map[uint64][]string{}
	for _, c := range m.snapshot() {
		id := c.upstream.Load()
		aliases[id] = append(aliases[id], c.target.Alias)
	}
	return func(u pool.ConnInfo) bool {
		t := u.Target
		if target == "" || target == t.String() || target == t.Alias || slices.Contains(aliases[u.ID], target) {
			return true
		}
		user, host, found := "", target, false
		if i := strings.LastIndexByte(target, '@'); i >= 0 {
			user, host, found = target[:i], target[i+1:], true
		}
		return (!found || user == t.User) && (strings.EqualFold(strings.Trim(host, "[]"), t.Host) || strings.EqualFold(host, t.Addr()))
	}
}

// permit passes the gate for a command that changes something.
func (m *Master) permit(ctx context.Context, by use.Caller, verb, target string) (*use.Permit, error) {
	p, denied := m.gate.Decide(ctx, use.Use{Kind: use.Control, Caller: by, Name: verb, Addr: target}, nil)
	if denied != nil {
		return nil, denied
	}
	return p, nil
}

// Exists implements control.Backend.
func (m *Master) Exists(target string) bool {
	match := m.matcher(target)
	return slices.ContainsFunc(m.pool.List(), func(u pool.ConnInfo) bool { return u.State == pool.Up && match(u) })
}

// Close implements control.Backend.
func (m *Master) Close(ctx context.Context, by use.Caller, target string) (int, error) {
	p, err := m.permit(ctx, by, "close", target)
	if err != nil {
		return 0, err
	}
	match := m.matcher(target)
	var n int
	// Each with its own host in the line that its clients get.
	for _, u := range m.pool.List() {
		if match(u) {
			n += m.pool.CloseMatching(func(o pool.ConnInfo) bool { return o.ID == u.ID },
				fmt.Errorf("%s: closed by muxproxy close", u.Target.Addr()))
		}
	}
	p.End(use.Result{Status: "ok"})
	return n, nil
}

// Drain implements control.Backend.
func (m *Master) Drain(ctx context.Context, by use.Caller, target string) (int, error) {
	p, err := m.permit(ctx, by, "drain", target)
	if err != nil {
		return 0, err
	}
	n := m.pool.Drain(m.matcher(target))
	p.End(use.Result{Status: "ok"})
	return n, nil
}

// Stop implements control.Backend. Draining gives the sockets and the lock away at once, so that the next ssh starts
// a master of its own.
func (m *Master) Stop(ctx context.Context, by use.Caller, drain bool) error {
	verb := "stop"
	if drain {
		verb = "stop --drain"
	}
	p, err := m.permit(ctx, by, verb, "")
	if err != nil {
		return err
	}
	p.End(use.Result{Status: "ok"})
	if !drain {
		m.log.Info().Stringer("caller", by).Msg("told to stop")
		m.stop(errStopped)
		return nil
	}
	if m.draining.Swap(true) {
		return nil
	}
	m.log.Info().Stringer("caller", by).Msg("told to drain")
	m.mu.Lock()
	idle := make(chan struct{})
	if len(m.clients) == 0 {
		close(idle)
	} else {
		m.idle = idle
	}
	m.mu.Unlock()
	m.closeListeners()
	m.unlock()
	go func() { // ends with the last client, which ends with Run
		<-idle
		m.stop(errStopped)
	}()
	return nil
}

// HostKeys implements control.Backend.
func (m *Master) HostKeys() (plain, ca []string) {
	plain, ca, err := m.authority.Keys()
	if err != nil {
		m.log.Error().Err(err).Msg("local host keys")
	}
	return plain, ca
}

// Dump implements control.Backend.
func (m *Master) Dump() string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	s := m.Status()
	for i := range s.Clients {
		for j := range s.Clients[i].Caller.Processes {
			s.Clients[i].Caller.Processes[j].Args = nil // may hold secrets
		}
	}
	state, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		state = []byte(err.Error())
	}
	return fmt.Sprintf("muxproxy %s, %s, %s/%s, %d goroutines\n\n%s\n\n%s", m.opts.Version, runtime.Version(), runtime.GOOS,
		runtime.GOARCH, runtime.NumGoroutine(), state, buf)
}
