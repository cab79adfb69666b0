// Package confirm is the built-in plugin that asks a person before a shared connection is used.
//
// It follows the convention of SSH_ASKPASS (ssh(1)). What it shows of whoever asks are claims: any process of the same user
// can rename itself and trace others. It stops accidents, and what nobody has noticed, not a program of the same user that
// wants in.
package confirm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/plugin"
)

const (
	// callTime bounds a call to the master.
	callTime = 2 * time.Second
	// answeredTime is how long a use that was decided by `muxproxy allow` or `deny` waits for the event that says so. To it
	// that looks like a client that has left.
	answeredTime = time.Second
	// maxClients bounds what is remembered of clients.
	maxClients = 4096
)

// New returns the plugin.
func New() plugin.Plugin { return newConfirm() }

func newConfirm() *confirm {
	c := &confirm{
		run: run, program: program, display: newSessions().display, hold: hold, turns: newTurns(), grants: newGrants(),
		log: zerolog.Nop(), rules: map[string]bool{}, questions: map[key]*question{}, open: map[*question]bool{},
		clients: map[uint64]map[string]bool{},
	}
	c.ctx, c.stop = context.WithCancelCause(context.Background())
	return c
}

// confirm is the plugin.
type confirm struct {
	// What tests replace.
	run     runner
	program func(named string) (string, error)
	display displayer
	hold    func(plugin.Process) (*held, error)

	turns   *turns
	grants  *grants
	ctx     context.Context // ends with Close
	stop    context.CancelCauseFunc
	putting sync.WaitGroup // all put; ask adds, unless Close has begun

	mu        sync.Mutex // guards what follows
	host      *plugin.Host
	log       zerolog.Logger
	askpass   string          // of the plugin block
	rules     map[string]bool // of the blocks in force
	questions map[key]*question
	open      map[*question]bool         // those of questions, and those that nobody can join
	clients   map[uint64]map[string]bool // of those that have logged in: the kinds of use that this has stood for
	floor     uint64                     // clients up to this number that are not among clients were forgotten
	closed    bool
}

// Describe implements plugin.Plugin.
func (c *confirm) Describe() plugin.Info {
	return plugin.Info{
		Name: "confirm", Version: "1", AsksPerson: true, Plugin: own{}, Host: block{},
		Wants: []plugin.Capability{plugin.CanObserve, plugin.CanList},
		Verbs: []plugin.Verb{
			{Usage: "grants [--json]", Doc: "list the answers that count on"},
			{Usage: "forget [ID]", Doc: "ask again, instead of counting on an answer or on any"},
		},
	}
}

// Check implements plugin.Checker.
func (c *confirm) Check(_ context.Context, cfg *plugin.Config) (ds plugin.Diagnostics) {
	askpass := cfg.Plugin.Value.(*own).Askpass
	ds = checkPath(cfg.Plugin, askpass)
	for _, h := range cfg.Hosts {
		ds = append(ds, h.Value.(*block).check(h)...)
	}
	if ds.HasErrors() {
		return ds
	}
	warn := func(at plugin.Block, path string) {
		if path == "" {
			return
		}
		if _, err := c.program(path); err != nil {
			ds = append(ds, at.Warnf(plugin.Path{"askpass"}, "%s", plugin.Printable(err.Error())))
		}
	}
	warn(cfg.Plugin, askpass)
	for _, h := range cfg.Hosts {
		warn(h, h.Value.(*block).Askpass)
	}
	return ds
}

// Configure implements plugin.Plugin. Answers end that were given under a block that is not there any more.
func (c *confirm) Configure(ctx context.Context, cfg *plugin.Config) plugin.Diagnostics {
	ds := c.Check(ctx, cfg)
	if ds.HasErrors() {
		return ds
	}
	rules := map[string]bool{}
	for _, h := range cfg.Hosts {
		rules[h.Value.(*block).rule(h.Pos)] = true
	}
	c.mu.Lock()
	c.host, c.log, c.askpass, c.rules = cfg.Host, cfg.Log, cfg.Plugin.Value.(*own).Askpass, rules
	c.mu.Unlock()
	c.forgotten(c.grants.forget(func(g *grant) bool { return g.key.client == 0 && !rules[g.key.rule] }), "policy has changed")
	return ds
}

// Close implements io.Closer: no dialog stays.
func (c *confirm) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.stop(errors.New("the plugin ends"))
	c.putting.Wait()
	c.grants.forget(func(*grant) bool { return true })
	return nil
}

// Observe implements plugin.Observer.
func (c *confirm) Observe(ctx context.Context, e plugin.Event) {
	if e.Dropped > 0 {
		// What was lost may have been the lock, or the end of a connection or a client.
		c.forgotten(c.grants.forget(func(*grant) bool { return true }), "events were lost")
	}
	switch e.Kind {
	case "locked":
		c.mu.Lock()
		for q := range c.open { // first: no answer of theirs counts any more
			q.cancel(errLocked)
		}
		c.mu.Unlock()
		c.forgotten(c.grants.forget(func(*grant) bool { return true }), "locked")
	case "down":
		c.down(ctx)
	case "end":
		if e.Use.Kind == "attach" {
			c.mu.Lock()
			delete(c.clients, e.Use.Client)
			c.mu.Unlock()
			c.grants.forget(func(g *grant) bool { return g.key.client != 0 && g.key.client == e.Use.Client })
		}
	case "answered":
		c.answered(e.ID, e.Allowed)
	}
}

var errLocked = errors.New("muxproxy is locked")

// down ends the answers that count as long as a host's connection.
func (c *confirm) down(ctx context.Context) {
	c.mu.Lock()
	host, log := c.host, c.log
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	up := map[string]bool{}
	list, err := host.Connections(ctx)
	if err != nil {
		log.Warn().Err(err).Msg("the connections can't be listed: answers that count as long as one end now")
	}
	for _, conn := range list {
		if conn.Up {
			up[hostOf(conn.Target)] = true
		}
	}
	c.forgotten(c.grants.forget(func(g *grant) bool { return g.once && !up[g.key.host] }), "the connection is down")
}

// hostOf is what answers are about.
func hostOf(t plugin.Target) string {
	t.Alias = ""
	t.Host = strings.ToLower(t.Host)
	return t.String()
}

// Authorize implements plugin.Authorizer.
func (c *confirm) Authorize(ctx context.Context, r *plugin.Request) plugin.Decision {
	b, u := r.Block.(*block), r.Use
	coming := u.Kind == "attach" && !b.concerns(u.Kind) // asked for the sake of what comes after it, if at all
	switch {
	case b.Ask == never:
		return plugin.Allow()
	case coming && (b.Ask == deny || b.Fallback != terminal):
		return plugin.NoOpinion()
	case !coming && !b.concerns(u.Kind):
		return plugin.NoOpinion()
	case b.Ask == deny:
		return plugin.Deny(fmt.Sprintf("policy says no to %s without asking", kindLabel(u.Kind)), "see "+place(r.Pos))
	}
	if b.Fallback == terminal && u.Client != 0 && c.grants.has(key{client: u.Client}, nil) || c.stands(u) {
		return plugin.Allow()
	}
	who, bound := scopeOf(u.Processes)
	k := key{host: hostOf(u.Target), kind: u.Kind, rule: b.rule(r.Pos)}
	if bound {
		k.scope = scope{who.PID, who.Start}
		if c.grants.has(k, clientGrant(u, r.Pos)) {
			return plugin.Allow()
		}
	}
	if coming {
		r.Waiting("", false) // the buses may be slow
		if _, _, err := c.way(ctx, b, u); err == nil {
			return plugin.NoOpinion() // there is a display: each use is asked about when it comes
		}
	}
	q, err := c.ask(r, b, k, who, bound)
	if err != nil {
		return plugin.Deny(err.Error(), "try again")
	}
	a := c.await(ctx, q, r)
	if coming && a.verdict == noWay {
		return plugin.NoOpinion()
	}
	return a.decision(b, r.Pos)
}

// decision is an answer as a line for a person: which, and what to do.
func (a answer) decision(b *block, pos string) plugin.Decision {
	switch a.verdict {
	case yes:
		return plugin.Allow()
	case no:
		reason := "the answer was no"
		if a.why != "" {
			reason += " (askpass: " + a.why + ")"
		}
		return plugin.Deny(reason, "try again to be asked again")
	case unanswered:
		return plugin.Deny("no answer in "+duration(b.Timeout), "try again, or raise timeout in "+place(pos))
	case noWay:
		hint := `sit down at a graphical session, or set fallback = "pending" in ` + place(pos)
		if b.Fallback == terminal {
			hint = "run ssh in a terminal, without BatchMode"
		}
		if strings.HasPrefix(a.why, errNoAskpass.Error()) {
			hint = "install ssh-askpass, or name a program by askpass in " + place(pos)
		}
		return plugin.Deny("nobody can be asked: "+a.why, hint)
	}
	return plugin.Deny(a.why, "try again")
}

// place is where to change something, for a person.
func place(pos string) string {
	if home, err := os.UserHomeDir(); err == nil && home != "/" {
		if rest, ok := strings.CutPrefix(pos, home+"/"); ok {
			pos = "~/" + rest
		}
	}
	return cmp.Or(plugin.Printable(pos), "its confirm block")
}

// duration is one as policy has it: "5m", not "5m0s".
func duration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// clientGrant is a yes in a client's terminal; nil if there is no client. pos is the block that wanted it.
func clientGrant(u plugin.Use, pos string) *grant {
	if u.Client == 0 || len(u.Processes) == 0 {
		return nil
	}
	return &grant{key: key{client: u.Client}, host: hostOf(u.Target), who: u.Processes[max(0, sshOf(u.Processes))], pos: pos}
}

// stands reports whether a client's login of the connection stands for an answer. It does for the first use of each kind,
// since later ones may be other programs' (through a forward, or an ssh that is a ControlMaster).
func (c *confirm) stands(u plugin.Use) bool {
	if u.Client == 0 || !u.LoggedIn {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	stood := c.stood(u.Client)
	if stood == nil || stood[u.Kind] {
		return false
	}
	stood[u.Kind] = true
	return true
}

// stood returns the kinds of use that a client's login has stood for; nil: that was forgotten. mu is held.
func (c *confirm) stood(id uint64) map[string]bool {
	if stood := c.clients[id]; stood != nil || id <= c.floor {
		return stood
	}
	if len(c.clients) >= maxClients { // the master tells of ends; this is for those whose end was lost
		oldest := id
		for other := range c.clients {
			oldest = min(oldest, other)
		}
		delete(c.clients, oldest)
		if c.floor = oldest; oldest == id {
			return nil
		}
	}
	c.clients[id] = map[string]bool{}
	return c.clients[id]
}

// record adds a line to the audit log.
func (c *confirm) record(event, target, detail string) {
	c.mu.Lock()
	host, log := c.host, c.log
	c.mu.Unlock()
	if host == nil {
		return
	}
	ctx, cancel := context.WithTimeout(c.ctx, callTime)
	defer cancel()
	if err := host.Record(ctx, event, target, detail); err != nil && c.ctx.Err() == nil {
		log.Warn().Err(err).Msg("audit")
	}
}

// forgotten records answers that have ended.
func (c *confirm) forgotten(list []grant, why string) {
	for _, g := range list {
		c.record("forget", g.host, fmt.Sprintf("answer %s, %s for %s: %s", g.name(), g.what(), processName(g.who), why))
	}
}
