package pluginhost

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/pluginrun"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// Pending is a use that a person is being asked about.
type Pending struct {
	ID         string    `json:"id"`
	Plugin     string    `json:"plugin"`
	Use        use.Use   `json:"-"`
	Message    string    `json:"message"` // escaped
	Since      time.Time `json:"since"`
	Answerable bool      `json:"answerable"` // by `muxproxy allow` and `muxproxy deny`
}

// pending is one, with what answers it. Its fields are guarded by Manager.mu.
type pending struct {
	Pending
	answer func(d *use.Denied) bool // nil allows; false: it has been answered before
	told   func(allowed bool)       // tells the plugin that a person has answered
	person use.Person               // at the client; nil: nobody can be asked
}

// ErrNotPending is the error of Decide for an ID that is not, or no longer, waiting.
var ErrNotPending = errors.New("no such use is waiting; see `muxproxy pending`")

// Pending returns the uses that persons are being asked about, the oldest first.
func (m *Manager) Pending() []Pending {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Pending
	for _, p := range m.pending {
		if p.Message != "" || p.Answerable {
			out = append(out, p.Pending)
		}
	}
	slices.SortFunc(out, func(a, b Pending) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.ID, b.ID)) })
	return out
}

// Decide answers a pending use instead of the plugin, if the plugin lets others answer. reason may be "".
func (m *Manager) Decide(id string, allow bool, reason string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pending[id]
	if p == nil {
		return ErrNotPending
	}
	if !p.Answerable {
		return fmt.Errorf("%s wants an answer by other means than this: %s", p.Plugin, p.Message)
	}
	var d *use.Denied
	if !allow {
		d = &use.Denied{By: p.Plugin, Reason: cmp.Or(use.Printable(reason), "denied by `muxproxy deny`")}
	}
	if p.answer(d) {
		p.told(allow)
	}
	return nil
}

// decideOwn answers a plugin's own pending use.
func (m *Manager) decideOwn(plugin, id string, d *use.Denied) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pending[id]
	if p == nil || p.Plugin != plugin {
		return ErrNotPending
	}
	p.answer(d)
	return nil
}

// askOwn puts a plugin's question to the person at the client of its own pending use. The error is use.ErrNobody if that
// can't be.
func (m *Manager) askOwn(ctx context.Context, plugin, id, question string) (yes bool, err error) {
	m.mu.Lock()
	p := m.pending[id]
	m.mu.Unlock()
	switch {
	case p == nil || p.Plugin != plugin:
		return false, ErrNotPending
	case p.person == nil:
		return false, use.ErrNobody
	}
	return p.person(ctx, plugin+": "+use.Printable(clip(question, 2000)))
}

// Check is a use.Check: it asks the policy in force, and then the plugins that have a block for u. First those that ask
// nobody, all at once; then one after another those that ask a person. Any denial counts, and any failure does unless the
// policy says otherwise; what one plugin allows another can still deny.
func (m *Manager) Check(ctx context.Context, u use.Use, say func(string)) *use.Denied {
	if say == nil {
		say = func(string) {}
	}
	for {
		s := m.set()
		d := s.check(ctx, u, say)
		if d != nil || ctx.Err() != nil || s == m.set() {
			return d
		}
		// Another policy has come into force meanwhile: what is only about to happen is its to judge.
	}
}

func (s *Set) check(ctx context.Context, u use.Use, say func(string)) *use.Denied {
	if s.lookup == nil {
		return &use.Denied{By: "policy", Reason: "no policy is in force"}
	}
	if d := s.lookup.Deny(u); d != nil {
		return d
	}
	type question struct {
		p     *supervised
		block string
	}
	var quiet, asking []question
	for _, p := range s.plugins {
		d := p.description()
		if !d.hook("authorize") {
			continue
		}
		block, denied := s.lookup.Block(p.spec.Name, u)
		switch {
		case denied != nil:
			return denied
		case block == "":
		case d != nil && d.AsksPerson && answers(u): // or whoever wants to answer would be asked first
		case d != nil && d.AsksPerson:
			asking = append(asking, question{p, block})
		default:
			quiet = append(quiet, question{p, block})
		}
	}
	if len(quiet) == 1 {
		if d := quiet[0].p.authorize(ctx, u, quiet[0].block, say); d != nil {
			return d
		}
	} else if len(quiet) > 1 {
		answers := make([]*use.Denied, len(quiet))
		var all sync.WaitGroup
		var one sync.Mutex // say is called by one at a time
		for i, q := range quiet {
			all.Go(func() {
				answers[i] = q.p.authorize(ctx, u, q.block, func(line string) {
					one.Lock()
					defer one.Unlock()
					say(line)
				})
			})
		}
		all.Wait()
		for _, d := range answers {
			if d != nil {
				return d
			}
		}
	}
	for _, q := range asking {
		if d := q.p.authorize(ctx, u, q.block, say); d != nil {
			return d
		}
	}
	return nil
}

// answers reports whether a use is the answer to a question of a plugin.
func answers(u use.Use) bool { return u.Kind == use.Control && (u.Name == "allow" || u.Name == "deny") }

// mends reports whether a use is what a person does about a plugin that has failed.
func mends(u use.Use) bool { return u.Kind == use.Control && u.Name == "reload" || use.TakesAway(u) }

var (
	errLate     = errors.New("it does not answer in time")
	errAnswered = errors.New("somebody has decided")
)

// authorize asks one plugin.
func (s *supervised) authorize(ctx context.Context, u use.Use, block string, say func(string)) *use.Denied {
	inst, why := s.up()
	if inst == nil {
		return s.onFailure(u, "it does not run: "+why)
	}
	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.ctx, func() { cancel(errors.New("it was stopped")) })()
	var answer *use.Denied // read once ctx has ended by errAnswered
	var once sync.Once
	q := &pending{
		Pending: Pending{ID: strings.ToLower(rand.Text()[:8]), Plugin: s.spec.Name, Use: u, Since: time.Now()},
		answer: func(d *use.Denied) (first bool) {
			once.Do(func() {
				answer, first = d, true
				cancel(errAnswered)
			})
			return first
		},
		person: use.PersonAt(ctx),
	}
	observes := s.description().hook("observe") && s.has(plugin.CanObserve)
	q.told = func(allowed bool) {
		if observes {
			s.events.add(&pluginpb.Event{Time: timeToPB(time.Now()), Kind: "answered", Id: q.ID, Allowed: allowed})
		}
	}
	s.m.mu.Lock()
	s.m.pending[q.ID] = q
	s.m.mu.Unlock()
	defer func() {
		s.m.mu.Lock()
		delete(s.m.pending, q.ID)
		s.m.mu.Unlock()
	}()
	late := time.AfterFunc(s.m.o.Timing.First, func() { cancel(errLate) })
	defer late.Stop()
	about := useToPB(u)
	about.LoggedIn = u.Caller.LoggedIn.After(inst.since) // an earlier process may have let it stand for what comes again
	stream, err := inst.Client.Authorize(ctx, &pluginpb.AuthorizeRequest{Id: q.ID, Block: block, Use: about})
	for err == nil {
		var r *pluginpb.AuthorizeResponse
		if r, err = stream.Recv(); err != nil {
			break
		}
		switch a := r.GetAnswer().(type) {
		case *pluginpb.AuthorizeResponse_Waiting:
			late.Reset(s.m.o.Timing.Heartbeat)
			message := use.Printable(clip(a.Waiting.GetMessage(), 500))
			s.m.mu.Lock()
			again := q.Message == message
			q.Message, q.Answerable = message, a.Waiting.GetAnswerable()
			s.m.mu.Unlock()
			if message != "" && !again {
				say(s.spec.Name + ": " + message)
			}
		case *pluginpb.AuthorizeResponse_Decision:
			if d, ok := s.decided(a.Decision); ok {
				return d
			}
			return s.onFailure(u, "it gives an answer that is none")
		default:
			return s.onFailure(u, "it gives an answer that is none")
		}
	}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errAnswered):
		return answer
	case outer.Err() != nil:
		return &use.Denied{By: s.spec.Name, Reason: "whoever asked left before the decision"}
	case cause != nil:
		return s.onFailure(u, cause.Error())
	case status.Code(err) == codes.NotFound:
		// It may have got the next policy already, which is about to come into force: no failure to make light of.
		return &use.Denied{By: s.spec.Name, Reason: "it does not know its block of the policy in force", Hint: "try again"}
	}
	return s.onFailure(u, pluginrun.CallError(err).Error())
}

// decided is a plugin's decision; false: it is none.
func (s *supervised) decided(d *pluginpb.Decision) (*use.Denied, bool) {
	switch d.GetVerdict() {
	case pluginpb.Decision_VERDICT_ALLOW, pluginpb.Decision_VERDICT_NO_OPINION:
		return nil, true
	case pluginpb.Decision_VERDICT_DENY:
		return &use.Denied{
			By: s.spec.Name, Reason: cmp.Or(use.Printable(clip(d.GetReason(), 500)), "no reason given"),
			Hint: use.Printable(clip(d.GetHint(), 500)),
		}, true
	}
	return nil, false
}

// onFailure is what counts instead of an answer.
func (s *supervised) onFailure(u use.Use, why string) *use.Denied {
	s.mu.Lock()
	allow := s.policy.AllowOnFailure || mends(u)
	s.mu.Unlock()
	why = use.Printable(why)
	s.log.Warn().Str("error", why).Bool("allowed", allow).Msg("plugin did not decide")
	if allow {
		return nil
	}
	return &use.Denied{
		By: s.spec.Name, Reason: "the plugin failed: " + why,
		Hint: "see `muxproxy plugin list` and `muxproxy log`",
	}
}

var _ pool.Retainer = (*Manager)(nil)

// Retain implements pool.Retainer: the latest time of the plugins that have a block for the connection. One that has just
// crashed is given a moment to come back.
func (m *Manager) Retain(ctx context.Context, c pool.ConnInfo) time.Time {
	s := m.set()
	ctx, cancel := context.WithTimeout(ctx, m.o.Timing.First)
	defer cancel()
	answers := make([]time.Time, len(s.plugins))
	var asking sync.WaitGroup
	for i, p := range s.plugins {
		if d := p.description(); d == nil || !d.hook("retain") {
			continue
		}
		block, denied := s.lookup.Block(p.spec.Name, use.Use{Target: c.Target})
		if denied != nil {
			p.log.Warn().Str("error", use.Printable(denied.Error())).Msg("the connection is not kept")
			continue
		}
		if block == "" {
			continue
		}
		now := time.Now()
		request := &pluginpb.RetainRequest{
			Connection: connectionToPB(Connection{
				ID: c.ID, Target: c.Target, Lane: c.Lane, Up: c.State == pool.Up, Clients: c.Clients,
				Since: onWallClock(c.Since, now),
			}, block),
			IdleSince: timeToPB(onWallClock(c.IdleSince, now)),
		}
		asking.Go(func() { // at once: one that does not run takes all the time there is
			r, err := p.retain(ctx, request)
			switch {
			case err != nil:
				p.log.Warn().Str("error", use.Printable(err.Error())).Str("target", use.Printable(c.Target.String())).
					Msg("the connection is not kept")
			case r.GetUntil() != nil:
				answers[i] = r.GetUntil().AsTime()
			}
		})
	}
	asking.Wait()
	return slices.MaxFunc(append(answers, time.Time{}), time.Time.Compare)
}

// retain asks a plugin, and asks the next process if one is found to have crashed.
func (s *supervised) retain(ctx context.Context, r *pluginpb.RetainRequest) (*pluginpb.RetainResponse, error) {
	var crashed *instance
	for {
		inst := s.await(ctx, crashed)
		if inst == nil {
			return nil, errors.New("it does not run")
		}
		answer, err := inst.Client.Retain(ctx, r)
		if err == nil {
			return answer, nil
		}
		code := status.Code(err)
		if crashed != nil || ctx.Err() != nil || code != codes.Unavailable && code != codes.Canceled {
			return nil, pluginrun.CallError(err)
		}
		crashed = inst
	}
}
