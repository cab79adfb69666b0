package confirm

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// own is the block `plugin "confirm"`.
type own struct {
	Askpass string `hcl:"askpass,optional" format:"path" words:"" doc:"the program that asks; empty: the first of a few well-known ones that is there"`
}

// block is a `confirm` block.
type block struct {
	Ask      string        `hcl:"ask,optional" default:"always" words:"always,first,after-idle,never,deny" doc:"when a person is asked"`
	Idle     time.Duration `hcl:"idle,optional" default:"15m" doc:"for after-idle"`
	Remember string        `hcl:"remember,optional" default:"0s" format:"duration" words:"forever" doc:"how long a yes holds for the same asker"`
	Timeout  time.Duration `hcl:"timeout,optional" default:"30s" doc:"then it is a no"`
	On       []string      `hcl:"on,optional" default:"[\"shell\",\"exec\",\"subsystem\",\"local-forward\",\"remote-forward\",\"agent\",\"x11\",\"jump\",\"other\"]" words:"attach,shell,exec,subsystem,local-forward,remote-forward,cancel-forward,agent,x11,jump,other,control" doc:"kinds of use that are asked about"`
	Fallback string        `hcl:"fallback,optional" default:"deny" words:"deny,terminal,pending" doc:"where there is no display"`
	Display  string        `hcl:"display,optional" default:"session" words:"session,caller" doc:"whose display"`
	Askpass  string        `hcl:"askpass,optional" format:"path" words:"" doc:"the program that asks; empty: that of the plugin block"`
}

// The words of ask, fallback and display.
const (
	always    = "always"
	first     = "first"
	afterIdle = "after-idle"
	never     = "never"
	deny      = "deny"

	terminal = "terminal"
	pending  = "pending"

	session = "session"
	caller  = "caller"

	forever = "forever"
)

// kinds are those that on may name; a kind of a later version is always asked about.
var kinds = []string{
	"attach", "shell", "exec", "subsystem", "local-forward", "remote-forward", "cancel-forward", "agent", "x11", "jump", "other",
	"control",
}

// concerns reports whether the block is about uses of a kind.
func (b *block) concerns(kind string) bool {
	return slices.Contains(b.On, kind) || !slices.Contains(kinds, kind)
}

// remember is how long a yes counts when ask is "always"; negative: for ever.
func (b *block) remember() (time.Duration, error) {
	if b.Remember == forever {
		return -1, nil
	}
	d, err := time.ParseDuration(b.Remember)
	if err == nil && d < 0 {
		err = errors.New("negative")
	}
	return d, err
}

// rule tells a block from others, and from what it was before somebody changed it.
func (b *block) rule(pos string) string {
	text, err := json.Marshal(b)
	if err != nil {
		panic(err) // strings and numbers
	}
	return pos + "\x00" + string(text)
}

// check returns what is wrong with a block.
func (b *block) check(at plugin.Block) (ds plugin.Diagnostics) {
	word := func(name, value string, words ...string) {
		if !slices.Contains(words, value) {
			ds = append(ds, at.Errorf(plugin.Path{name}, "%s can't be %q; allowed: %s", name, value, strings.Join(words, ", ")))
		}
	}
	word("ask", b.Ask, always, first, afterIdle, never, deny)
	word("fallback", b.Fallback, deny, terminal, pending)
	word("display", b.Display, session, caller)
	for i, kind := range b.On {
		if !slices.Contains(kinds, kind) {
			ds = append(ds, at.Errorf(plugin.Path{"on", i}, "there is no kind of use %q; allowed: %s", kind, strings.Join(kinds, ", ")))
		}
	}
	if len(b.On) == 0 && b.Ask != never {
		ds = append(ds, at.Warnf(plugin.Path{"on"}, "nothing is asked about: ask = %q says so more plainly", never))
	}
	if b.Timeout <= 0 {
		ds = append(ds, at.Errorf(plugin.Path{"timeout"}, "nobody can answer within %v", b.Timeout))
	}
	if b.Ask == afterIdle && b.Idle <= 0 {
		ds = append(ds, at.Errorf(plugin.Path{"idle"}, "idle has to be more than %v; ask = %q asks each time", b.Idle, always))
	}
	if b.Ask != afterIdle && b.Idle != defaultIdle {
		ds = append(ds, at.Errorf(plugin.Path{"idle"}, "idle is for ask = %q, not for %q", afterIdle, b.Ask))
	}
	remember, err := b.remember()
	switch {
	case err != nil:
		ds = append(ds, at.Errorf(plugin.Path{"remember"}, "remember can't be %q: it is a duration such as \"5m\", or %q", b.Remember, forever))
	case remember != 0 && b.Ask == first:
		ds = append(ds, at.Errorf(plugin.Path{"remember"}, "remember is for ask = %q: with %q a yes counts as long as the connection", always, b.Ask))
	case remember != 0 && b.Ask == afterIdle:
		ds = append(ds, at.Errorf(plugin.Path{"remember"}, "remember is for ask = %q: with %q a yes counts until idle has passed", always, b.Ask))
	case remember != 0 && b.Ask != always:
		ds = append(ds, at.Errorf(plugin.Path{"remember"}, "remember is for ask = %q: with %q nobody is asked", always, b.Ask))
	}
	return append(ds, checkPath(at, b.Askpass)...)
}

const defaultIdle = 15 * time.Minute

func checkPath(at plugin.Block, path string) plugin.Diagnostics {
	if path == "" || filepath.IsAbs(path) || strings.HasPrefix(path, "~/") {
		return nil
	}
	return plugin.Diagnostics{at.Errorf(plugin.Path{"askpass"}, "askpass can't be %q: it is a path that begins with / or ~/", path)}
}
