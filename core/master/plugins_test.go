package master

import (
	"fmt"
	"testing"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/policy"
)

// The policy can give what there is to be given, and nothing else: the two don't know each other.
func TestCapabilities(t *testing.T) {
	may := func(c plugin.Capability) policy.Diagnostics {
		_, diags := policy.Parse("config.hcl", fmt.Appendf(nil, "plugin \"x\" {\n  may = [%q]\n}\n", c), policy.Options{})
		return diags
	}
	for _, c := range plugin.Capabilities() {
		if diags := may(c); diags.HasErrors() {
			t.Error(diags.Errors())
		}
	}
	if diags := may("state"); !diags.HasErrors() {
		t.Error("a capability that there is none of")
	}
}
