package confirm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// question is one that a person is asked, for all who wait for its answer.
type question struct {
	key   key
	block *block
	pos   string
	who   plugin.Process // that the answer is bound to
	bound bool           // there is such a process: others can join, and a yes can count on

	ctx    context.Context // ends when nobody waits any more, with the lock, and with the plugin
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when answer is set
	answer answer

	// confirm.mu guards what follows.
	waiting  []*plugin.Request
	total    int    // that have waited
	message  string // what they are told
	pending  bool   // `muxproxy allow` and `deny` may answer
	changed  chan struct{}
	verdicts chan answer // of those two; room for one
}

// ask returns the question for a use: one that is open already, or a new one.
func (c *confirm) ask(r *plugin.Request, b *block, k key, who plugin.Process, bound bool) (*question, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if q := c.questions[k]; q != nil && q.ctx.Err() == nil {
		q.waiting = append(q.waiting, r)
		q.total++
		return q, nil
	}
	switch {
	case c.closed:
		return nil, errors.New("the plugin ends")
	case len(c.open) >= maxOpen:
		return nil, errQueue
	}
	q := &question{
		key: k, block: b, pos: r.Pos, who: who, bound: bound, done: make(chan struct{}), waiting: []*plugin.Request{r}, total: 1,
		changed: make(chan struct{}), verdicts: make(chan answer, 1),
	}
	q.ctx, q.cancel = context.WithCancelCause(c.ctx)
	if bound {
		c.questions[k] = q
	}
	c.open[q] = true
	c.putting.Go(func() { c.put(q, r) })
	return q, nil
}

// await waits for the answer and passes on what is to be told meanwhile.
func (c *confirm) await(ctx context.Context, q *question, r *plugin.Request) answer {
	for {
		c.mu.Lock()
		message, pending, changed := q.message, q.pending, q.changed
		c.mu.Unlock()
		if pending {
			message = fmt.Sprintf("answer with `muxproxy allow %s` or `muxproxy deny %s`, %s", r.ID, r.ID, message)
		}
		r.Waiting(message, pending) // also without a message: it says that there will be an answer
		select {
		case <-q.done:
			return q.answer
		case <-changed:
			continue
		case <-ctx.Done():
		}
		if pending { // whoever has answered, or the client has left
			t := time.NewTimer(answeredTime)
			defer t.Stop()
			select {
			case <-q.done:
			case <-t.C:
			}
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		q.waiting = slices.DeleteFunc(q.waiting, func(other *plugin.Request) bool { return other == r })
		if len(q.waiting) == 0 {
			q.cancel(errLeft)
		}
		return answer{verdict: cancelled, why: errLeft.Error()}
	}
}

var errLeft = errors.New("whoever asked has left")

// tell says something to all who wait for an answer.
func (c *confirm) tell(q *question, message string, pending bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if message == q.message && pending == q.pending {
		return
	}
	q.message, q.pending = message, pending
	close(q.changed)
	q.changed = make(chan struct{})
}

// answered is the answer of `muxproxy allow` or `deny` to one who waits; it is good for all of its question.
func (c *confirm) answered(id string, allowed bool) {
	a := answer{verdict: no}
	if allowed {
		a.verdict = yes
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for q := range c.open {
		if q.pending && slices.ContainsFunc(q.waiting, func(r *plugin.Request) bool { return r.ID == id }) {
			select {
			case q.verdicts <- a:
			default: // the first one counts
			}
		}
	}
}

// put asks a question, which r was the first to bring, and makes the answer known.
func (c *confirm) put(q *question, r *plugin.Request) {
	defer q.cancel(nil)
	u := r.Use
	a := c.settle(q, r)
	if a.verdict == unanswered && q.ctx.Err() != nil {
		a.verdict = cancelled
	}
	if a.verdict == cancelled && a.why == "" {
		a.why = context.Cause(q.ctx).Error()
	}
	var made []grant
	if a.verdict == yes {
		made = c.grant(q, a)
	}
	c.mu.Lock()
	if c.questions[q.key] == q {
		delete(c.questions, q.key)
	}
	delete(c.open, q)
	total := q.total
	if a.verdict == yes && a.atTerminal && q.ctx.Err() == nil { // else the lock has come
		for _, r := range q.waiting {
			if g := clientGrant(r.Use, q.pos); g != nil {
				made = append(made, c.grants.add(*g))
			}
		}
	}
	q.answer = a
	close(q.done)
	c.mu.Unlock()
	how := map[verdict]string{yes: "yes", no: "no", unanswered: "no answer", noWay: "nobody could be asked", cancelled: "not answered"}
	detail := fmt.Sprintf("%s to %s, asked by %s", how[a.verdict], kindLabel(u.Kind), chainText(asking(u.Processes), u.UID))
	if a.why != "" {
		detail += ": " + a.why
	}
	if total > 1 {
		detail += fmt.Sprintf("; for %d uses", total)
	}
	c.record("answer", u.Target.String(), detail)
	for _, g := range made {
		c.record("grant", u.Target.String(), fmt.Sprintf("answer %s counts for %s of %s, %s", g.name(), g.what(), processName(g.who), g.lasts()))
	}
}

// settle waits for the question's turn and gets an answer.
func (c *confirm) settle(q *question, r *plugin.Request) answer {
	err := c.turns.take(q.ctx, q.key.scope, func(message string) { c.tell(q, message, false) })
	switch {
	case errors.Is(err, errQueue):
		return answer{verdict: cancelled, why: err.Error()}
	case err != nil:
		return answer{verdict: cancelled}
	}
	a, byOthers := c.dialog(q, r)
	if a.verdict == no || a.verdict == unanswered && q.ctx.Err() == nil {
		c.turns.refused(q.key.scope)
	}
	c.turns.leave()
	if !byOthers {
		return a
	}
	c.tell(q, "at most "+duration(q.block.Timeout), true)
	t := time.NewTimer(q.block.Timeout)
	defer t.Stop()
	select {
	case a = <-q.verdicts:
		if a.verdict == no {
			c.turns.refused(q.key.scope)
		}
	case <-t.C:
		a = answer{verdict: unanswered}
	case <-q.ctx.Done():
		a = answer{verdict: cancelled}
	}
	return a
}

// way is how to ask: the program and its environment. The error is one line for a person.
func (c *confirm) way(ctx context.Context, b *block, u plugin.Use) (path string, env []string, err error) {
	c.mu.Lock()
	named := c.askpass
	c.mu.Unlock()
	if b.Askpass != "" {
		named = b.Askpass
	}
	if path, err = c.program(named); err != nil {
		return "", nil, err
	}
	env, err = c.display(ctx, b, u)
	return path, env, err
}

// dialog asks by the askpass program or, without one, as policy says. byOthers: it is left to `muxproxy allow`.
func (c *confirm) dialog(q *question, r *plugin.Request) (a answer, byOthers bool) {
	u := r.Use
	ctx, cancel := context.WithTimeout(q.ctx, q.block.Timeout)
	defer cancel()
	path, env, err := c.way(ctx, q.block, u)
	if err == nil {
		c.tell(q, "asking you on your screen, at most "+duration(q.block.Timeout), false)
		a = c.run(ctx, path, env, prompt(u, c.others(q, r), withAncestors(u.Processes), q.counts()))
	} else {
		a = answer{verdict: noWay, why: plugin.Printable(err.Error())}
	}
	if a.verdict != noWay {
		return a, false
	}
	switch q.block.Fallback {
	case pending:
		return a, true
	case terminal:
		return c.atTerminal(ctx, q, u, a), false
	}
	return a, false
}

func withAncestors(chain []plugin.Process) []plugin.Process {
	return slices.Concat(chain, ancestors(chain))
}

// others are the uses that wait with r's for the same answer.
func (c *confirm) others(q *question, r *plugin.Request) (out []plugin.Use) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, other := range q.waiting {
		if other != r {
			out = append(out, other.Use)
		}
	}
	return out
}

// atTerminal has the ssh of one of those who wait ask its person, which it can as it comes.
func (c *confirm) atTerminal(ctx context.Context, q *question, u plugin.Use, none answer) answer {
	if u.Kind != "attach" {
		return none
	}
	c.tell(q, "", false) // the question itself is to be seen
	c.mu.Lock()
	host, waiting := c.host, slices.Clone(q.waiting)
	c.mu.Unlock()
	for _, r := range waiting {
		agreed, err := host.Ask(ctx, r.ID, line(r.Use, q.countsAtTerminal()))
		switch {
		case ctx.Err() != nil:
			return answer{verdict: unanswered}
		case err != nil: // the next one may have a terminal
			continue
		case agreed:
			return answer{verdict: yes, atTerminal: true}
		}
		return answer{verdict: no}
	}
	return none
}

// counts says what a yes is good for.
func (q *question) counts() string {
	it := kindLabel(q.key.kind)
	if !q.bound {
		return "Yes counts for this one."
	}
	if lasts := q.lasts(); lasts != "" {
		return fmt.Sprintf("Yes counts for every %s there from %s, %s.", it, processName(q.who), lasts)
	}
	return fmt.Sprintf("Yes counts for this one, and for every %s there from %s that comes meanwhile.", it, processName(q.who))
}

// countsAtTerminal is counts for a client that is asked as it comes.
func (q *question) countsAtTerminal() string {
	if lasts := q.lasts(); q.bound && lasts != "" {
		return fmt.Sprintf("Yes counts for all that it asks for, and other clients there from %s, %s.", processName(q.who), lasts)
	}
	return "Yes counts for all that it asks for."
}

// lasts says for how long a yes to the question counts; "": not on.
func (q *question) lasts() string {
	remember, _ := q.block.remember() // it was checked
	switch {
	case q.block.Ask == first:
		return "as long as that runs and the connection is up"
	case q.block.Ask == afterIdle:
		return "until there was none for " + duration(q.block.Idle)
	case remember < 0:
		return "as long as that runs"
	case remember > 0:
		return "for " + duration(remember)
	}
	return ""
}

// processName is a process for a person.
func processName(p plugin.Process) string { return fmt.Sprintf("%s (%d)", named(p), p.PID) }

// grant makes a yes count on, if the block says so.
func (c *confirm) grant(q *question, a answer) []grant {
	g := grant{key: q.key, host: q.key.host, who: q.who, pos: q.pos, atTerminal: a.atTerminal}
	remember, _ := q.block.remember() // it was checked
	switch {
	case !q.bound:
		return nil
	case q.block.Ask == first:
		g.once = true
	case q.block.Ask == afterIdle:
		g.idle = q.block.Idle
	case remember == 0:
		return nil
	case remember > 0:
		g.until = time.Now().Add(remember)
	}
	var err error
	if g.held, err = c.hold(q.who); err != nil {
		return nil // it has ended, and with it what the answer would have counted for
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.rules[q.key.rule] || c.closed || q.ctx.Err() != nil { // the lock, or another policy, has come
		g.held.release()
		return nil
	}
	return []grant{c.grants.add(g)}
}

// lasts says for how long an answer counts.
func (g *grant) lasts() string {
	switch {
	case g.once:
		return "as long as the connection is up"
	case g.idle > 0:
		return "until there was none for " + duration(g.idle)
	case g.until.IsZero():
		return "as long as that runs"
	}
	return "until " + g.until.Format(time.RFC3339)
}
