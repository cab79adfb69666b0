package master

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
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

// small is a built-in plugin.
type small struct{}

type smallBlock struct {
	Word string `hcl:"word" doc:"any"`
}

func (small) Describe() plugin.Info {
	return plugin.Info{Name: "small", Version: "1", Host: smallBlock{}, Wants: []plugin.Capability{plugin.CanList}}
}

func (small) Configure(_ context.Context, c *plugin.Config) plugin.Diagnostics {
	if _, err := c.Host.Connections(context.Background()); err != nil {
		return plugin.Diagnostics{c.Plugin.Errorf(nil, "%v", err)}
	}
	return nil
}

func (small) Authorize(context.Context, *plugin.Request) plugin.Decision { return plugin.NoOpinion() }

const smallPolicy = "host \"*\" {\n  small {\n    word = \"x\"\n  }\n}\n"

// A built-in plugin is this program, also after its file was replaced, and has the capabilities that it wants.
func TestBuiltInPlugin(t *testing.T) {
	if got := self(); got != "/proc/self/exe" {
		t.Errorf("built-in plugins are %s", got)
	}
	draft, diags := policy.Parse("config.hcl", []byte(smallPolicy), policy.Options{})
	if draft == nil {
		t.Fatal(diags)
	}
	scratch, err := os.MkdirTemp("", "mm")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(scratch)
	check := func(builtIn ...string) string {
		s, diags := CheckPolicy(t.Context(), draft, Options{
			Dirs: newDirs(t), Getenv: os.Getenv, BuiltIn: builtIn, Log: zerolog.Nop(),
		}, scratch)
		if (s == nil) != diags.HasErrors() {
			t.Errorf("a snapshot with errors, or none without: %v", diags)
		}
		if len(diags) == 0 {
			return ""
		}
		return diags[0].Error()
	}
	if got := check("small"); got != "" {
		t.Error(got)
	}
	if got := check("smalls"); !strings.HasPrefix(got, `config.hcl:2:3: small: did you mean "smalls"? there is no muxproxy-plugin-small in `) {
		t.Error(got)
	}
	if left, _ := filepath.Glob(filepath.Join(scratch, "*")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}

	dirs := newDirs(t)
	if err := os.MkdirAll(dirs.Config, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dirs.Config, policy.FileName), []byte(smallPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- Run(ctx, Options{
			Dirs: dirs, Log: zerolog.Nop(), Getenv: func(string) string { return "" }, BuiltIn: []string{"small"},
			Ready: func() { close(ready) },
		})
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	within(t, "ready", ready)
	conn, err := paths.Dial(dirs.Runtime, paths.ControlSocket)
	if err != nil {
		t.Fatal(err)
	}
	m, err := control.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Disconnect()
	list, err := m.Plugins(t.Context())
	if err != nil || len(list) != 1 || list[0].State != "up" || list[0].Path != "/proc/self/exe" || !slices.Equal(list[0].May, []string{"list"}) {
		t.Errorf("%+v, %v", list, err)
	}
}

// The plugins know blocks by IDs that no later policy uses for others: a question may be under way when one comes.
func TestBlockIDs(t *testing.T) {
	one, two := lookup{generation: 1}, lookup{generation: 2}
	if one.id(3) == two.id(3) {
		t.Errorf("%q twice", one.id(3))
	}
	for _, l := range []lookup{one, two} {
		if n := l.number(l.id(3)); n != 3 {
			t.Errorf("%q is number %d", l.id(3), n)
		}
	}
	for _, id := range []string{"", "3", "1.x"} {
		if n := one.number(id); n != -1 {
			t.Errorf("%q is number %d", id, n)
		}
	}
}
