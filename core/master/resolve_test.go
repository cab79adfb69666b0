package master

import (
	"testing"

	"github.com/muxproxy/muxproxy/core/use"
)

func TestParseHost(t *testing.T) {
	for in, want := range map[string]use.Target{
		"db":              {Alias: "db"},
		"me@db":           {User: "me", Alias: "db"},
		"a@b@db:2222":     {User: "a@b", Alias: "db", Port: 2222},
		"::1":             {Alias: "::1"},
		"me@[2001:db8::]": {User: "me", Alias: "2001:db8::"},
		"[::1]:22":        {Alias: "::1", Port: 22},
	} {
		if got, err := ParseHost(in); err != nil || got != want {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "@db", "-oProxyCommand=x", "-l@db", "db:0", "db:ssh", "me@"} {
		if got, err := ParseHost(in); err == nil {
			t.Errorf("%q: %+v", in, got)
		}
	}
}
