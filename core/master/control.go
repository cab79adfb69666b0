package master

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/metrics"
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
		Lock: m.lock.State(), Policy: m.policy.now.Load().File(), Upstreams: []control.Upstream{}, Clients: []control.Client{},
	}
	for _, u := range m.pool.List() {
		cu := control.Upstream{
			ID: u.ID, Target: u.Target.String(), Lane: u.Lane, State: string(u.State), Since: u.Since, LastHeard: u.LastHeard,
			Addr: u.Server.Addr, Server: use.Printable(u.Server.Version), Kex: u.Server.Kex, Cipher: u.Server.Cipher,
			PostQuantum: u.Server.PostQuantum, Auth: use.Printable(u.Server.Auth), Clients: u.Clients, Channels: int(u.Channels),
			In: u.In, Out: u.Out, Sessions: u.Sessions, MaxSessions: u.MaxSessions, Suspect: u.Suspect,
			IdleSince: u.IdleSince, KeptUntil: u.KeptUntil,
		}
		if u.Server.HostKey != nil {
			cu.HostKey = u.Server.HostKey.Type() + " " + ssh.FingerprintSHA256(u.Server.HostKey)
		}
		s.Upstreams = append(s.Upstreams, cu)
	}
	for _, c := range m.snapshot() {
		cc := control.Client{
			ID: c.id, Target: c.target.String(), Alias: c.target.Alias, Upstream: c.upstream.Load(), Mode: string(c.hello.Mode),
			Since: c.since, Caller: c.who, Channels: []control.Channel{},
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
	case use.RemoteForward:
		return use.Printable(strings.TrimSpace(u.Name + " " + u.Addr))
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

// permit passes the gate for a command that changes something. addr is what the command was given, about the host that
// this means, if it is about one.
func (m *Master) permit(ctx context.Context, by use.Caller, verb, addr string, about use.Target) (*use.Permit, error) {
	if err := m.checkNamespaces(by); err != nil {
		m.log.Warn().Err(err).Stringer("caller", by).Str("command", verb).Msg("command refused")
		return nil, err
	}
	if p, ok := by.Client(); ok {
		by.Env = use.ReadEnv(p, m.policy.now.Load().EnvNames())
	}
	u := use.Use{Kind: use.Control, Caller: by, Target: about, Name: verb, Addr: addr}
	p, denied := m.gate.Decide(ctx, u, nil)
	if denied != nil {
		return nil, denied
	}
	return p, nil
}

// permitAll is permit for a command about connections: each host that it would touch is asked about, and if one is
// denied none is touched. end ends the permits.
func (m *Master) permitAll(ctx context.Context, by use.Caller, verb, target string) (ups []pool.ConnInfo, end func(), err error) {
	match := m.matcher(target)
	var permits []*use.Permit
	end = func() {
		for _, p := range permits {
			p.End(use.Result{Status: "ok"})
		}
	}
	asked := map[use.Target]bool{}
	ask := func(about use.Target) error {
		if asked[about] {
			return nil
		}
		asked[about] = true
		p, err := m.permit(ctx, by, verb, target, about)
		if err == nil {
			permits = append(permits, p)
		}
		return err
	}
	for _, u := range m.pool.List() {
		if !match(u) {
			continue
		}
		ups = append(ups, u)
		if err := ask(u.Target); err != nil {
			end()
			return nil, nil, err
		}
	}
	if len(ups) == 0 {
		if err := ask(use.Target{}); err != nil {
			return nil, nil, err
		}
	}
	return ups, end, nil
}

// Exists implements control.Backend.
func (m *Master) Exists(target string) bool {
	match := m.matcher(target)
	return slices.ContainsFunc(m.pool.List(), func(u pool.ConnInfo) bool { return u.State == pool.Up && match(u) })
}

// Close implements control.Backend.
func (m *Master) Close(ctx context.Context, by use.Caller, target string) (int, error) {
	ups, end, err := m.permitAll(ctx, by, "close", target)
	if err != nil {
		return 0, err
	}
	defer end()
	var n int
	// Each with its own host in the line that its clients get.
	for _, u := range ups {
		n += m.pool.CloseMatching(func(o pool.ConnInfo) bool { return o.ID == u.ID },
			fmt.Errorf("%s: closed by muxproxy close", u.Target.Addr()))
	}
	return n, nil
}

// Drain implements control.Backend.
func (m *Master) Drain(ctx context.Context, by use.Caller, target string) (int, error) {
	ups, end, err := m.permitAll(ctx, by, "drain", target)
	if err != nil {
		return 0, err
	}
	defer end()
	return m.pool.Drain(func(o pool.ConnInfo) bool {
		return slices.ContainsFunc(ups, func(u pool.ConnInfo) bool { return o.ID == u.ID })
	}), nil
}

// Lock implements control.Backend.
func (m *Master) Lock(ctx context.Context, by use.Caller, passphrase []byte) error {
	p, err := m.permit(ctx, by, "lock", "", use.Target{})
	if err != nil {
		return err
	}
	return finish(p, m.lock.Lock(passphrase))
}

// Unlock implements control.Backend.
func (m *Master) Unlock(ctx context.Context, by use.Caller, passphrase []byte) (use.LockState, error) {
	p, err := m.permit(ctx, by, "unlock", "", use.Target{})
	if err != nil {
		return use.LockState{}, err
	}
	err = finish(p, m.lock.Unlock(ctx, passphrase))
	return m.lock.State(), err
}

// finish ends a permit as what it was for has ended.
func finish(p *use.Permit, err error) error {
	res := use.Result{Status: "ok"}
	if err != nil {
		res = use.Result{Status: "refused", Err: err.Error()}
	}
	p.End(res)
	return err
}

// Stop implements control.Backend. Draining gives the sockets and the lock away at once, so that the next ssh starts
// a master of its own.
func (m *Master) Stop(ctx context.Context, by use.Caller, drain bool) error {
	verb := "stop"
	if drain {
		verb = "stop --drain"
		if m.opts.Sockets.Kept {
			return errors.New("systemd listens for this master: clients would wait until the last session has ended; " +
				"use `muxproxy master restart`, or stop muxproxy.socket first")
		}
	}
	p, err := m.permit(ctx, by, verb, "", use.Target{})
	if err != nil {
		return err
	}
	p.End(use.Result{Status: "ok"})
	if !drain {
		m.log.Info().Stringer("caller", by).Msg("told to stop")
		m.stop(errStopped)
		return nil
	}
	m.log.Info().Stringer("caller", by).Msg("told to drain")
	m.drain(false)
	return nil
}

// HostKeys implements control.Backend.
func (m *Master) HostKeys(made bool) (plain, ca []string) {
	if made {
		return m.authority.Made()
	}
	plain, ca, err := m.authority.Keys()
	if err != nil {
		m.log.Error().Err(err).Msg("local host keys")
	}
	return plain, ca
}

// Dump implements control.Backend.
func (m *Master) Dump() string {
	memory := memoryInUse() // before the rest of this takes some
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
	return fmt.Sprintf("muxproxy %s, %s, %s/%s, %d goroutines\n%s\n\n%s\n\n%s", m.opts.Version, runtime.Version(), runtime.GOOS,
		runtime.GOARCH, runtime.NumGoroutine(), memory, state, buf)
}

// memoryInUse says what is in use, without garbage: what the system shows of a process depends on when it last collected that.
func memoryInUse() string {
	runtime.GC()
	runtime.GC() // what is in a sync.Pool goes at the second
	in := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	metrics.Read(in)
	return fmt.Sprintf("in use: heap %d, stacks %d bytes", in[0].Value.Uint64(), in[1].Value.Uint64())
}
