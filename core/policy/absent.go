package policy

import (
	"slices"

	"github.com/muxproxy/muxproxy/core/use"
)

// harmless are plugins that decide about no use: without them connections end sooner, and standing forwards are missing.
var harmless = []string{"persist", "forward"}

// WithoutPlugins judges what plugins should, in a master that starts none. A block that asks for a plugin's consent is
// not passed over in silence; what it covers is denied, unless its plugin block has on_failure = "allow". What only takes
// away, and commands, which could not even mend the policy, are never denied here.
func (s *Snapshot) WithoutPlugins(u use.Use) *use.Denied {
	if len(s.Plugins()) == 0 || slices.Contains([]use.Kind{use.Attach, use.CancelForward, use.Control}, u.Kind) {
		return nil
	}
	effective := s.For(u.Target, u.Caller)
	for _, plugin := range s.Plugins() {
		if plugin.AllowOnFailure || slices.Contains(harmless, plugin.Name) {
			continue
		}
		id, denied := effective.Block(plugin.Name, u)
		if denied != nil {
			return denied
		}
		if id >= 0 {
			return &use.Denied{
				By: plugin.Name, Reason: "this version starts no plugins",
				Hint: "take its blocks out of the policy (" + plugin.Pos + `), or give it a plugin block with on_failure = "allow"`,
			}
		}
	}
	return nil
}
