package policy

import (
	"testing"

	"github.com/zclconf/go-cty/cty"

	"github.com/muxproxy/muxproxy/core/use"
)

// schemas stand in for what plugins declare.
func schemas() map[string]Schema {
	var kinds []string
	for _, k := range use.Kinds() {
		kinds = append(kinds, string(k))
	}
	str := cty.StringVal
	forward := func(users, to bool) Block {
		b := Block{Labels: []string{"address"}}
		if users {
			b.Attributes = append(b.Attributes, Attribute{
				Name: "users", Type: cty.String, Default: str("self"), Words: []string{"self", "any"}, Doc: "whose processes may connect",
			})
		}
		b.Attributes = append(b.Attributes, Attribute{Name: "gateway", Type: cty.Bool, Doc: "may listen on other addresses than loopback"})
		if to {
			b.Attributes = append(b.Attributes, Attribute{Name: "to", Type: cty.String, Required: true, Doc: "where it leads"})
		}
		return b
	}
	return map[string]Schema{
		"confirm": {Host: Block{Attributes: []Attribute{
			{Name: "ask", Type: cty.String, Default: str("always"), Words: []string{"always", "first", "after-idle", "never", "deny"},
				Doc: "when a person is asked"},
			{Name: "idle", Type: cty.String, Default: str("15m"), Format: Duration, Doc: "for after-idle"},
			{Name: "remember", Type: cty.String, Default: str("0s"), Format: Duration, Words: []string{"forever"},
				Doc: "how long a yes holds for the same asker"},
			{Name: "timeout", Type: cty.String, Default: str("30s"), Format: Duration, Doc: "then it is a no"},
			{Name: "on", Type: cty.List(cty.String), Words: kinds, Doc: "kinds of use that are asked about",
				Default: cty.ListVal([]cty.Value{
					str("shell"), str("exec"), str("subsystem"), str("local-forward"), str("remote-forward"), str("agent"), str("x11"),
					str("jump"), str("other"),
				})},
			{Name: "fallback", Type: cty.String, Default: str("deny"), Words: []string{"deny", "terminal", "pending"},
				Doc: "where there is no display"},
			{Name: "display", Type: cty.String, Default: str("session"), Words: []string{"session", "caller"}, Doc: "whose display"},
			{Name: "askpass", Type: cty.String, Format: Path, Words: []string{""}, Doc: "the program that asks"},
		}}, Plugin: Block{Attributes: []Attribute{
			{Name: "askpass", Type: cty.String, Format: Path, Words: []string{""}, Doc: "the program that asks"},
		}}},
		"persist": {HostOnly: true, Host: Block{Attributes: []Attribute{
			{Name: "idle", Type: cty.String, Default: str("10m"), Format: Duration, Words: []string{"forever"}, Doc: "kept without clients"},
			{Name: "max", Type: cty.String, Default: str("8h"), Format: Duration, Words: []string{"forever"}, Doc: "kept since its login"},
			{Name: "until", Type: cty.String, Format: Clock, Words: []string{""}, Doc: "kept until this time of the day"},
			{Name: "prewarm", Type: cty.Bool, Doc: "connect when the master starts"},
			{Name: "reconnect", Type: cty.Bool, Doc: "connect again when it is lost"},
			{Name: "on_suspend", Type: cty.String, Default: str("keep"), Words: []string{"keep", "close"}},
			{Name: "on_lock", Type: cty.String, Default: str("keep"), Words: []string{"keep", "close"}},
		}}},
		"forward": {HostOnly: true, Host: Block{Blocks: []Nested{
			{"dynamic", forward(true, false)}, {"local", forward(true, true)}, {"remote", forward(false, true)},
		}}},
		"audit-mail": {
			Plugin: Block{Attributes: []Attribute{
				{Name: "to", Type: cty.List(cty.String), Required: true, Doc: "who gets mail"},
				{Name: "limits", Type: cty.Map(cty.Number), Doc: "mails a day, by kind"},
			}},
			Host: Block{Attributes: []Attribute{{Name: "subject", Type: cty.String, Doc: "of the mails"}}},
		},
	}
}

func load(t testing.TB, src string) *Snapshot {
	t.Helper()
	return loadWith(t, src, Options{Schemas: schemas()})
}

func loadWith(t testing.TB, src string, o Options) *Snapshot {
	t.Helper()
	s, diags := Parse("config.hcl", []byte(src), o)
	if diags.HasErrors() {
		var b testWriter
		diags.Write(&b, false)
		t.Fatalf("%s\n%s", src, b)
	}
	return s
}

type testWriter []byte

func (w *testWriter) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
