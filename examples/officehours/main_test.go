package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/plugintest"
)

// The test binary plays the plugin.
func TestMain(m *testing.M) {
	if os.Getenv(plugin.CookieKey) != "" || os.Getenv("PLAY_PLUGIN") != "" {
		main()
	}
	os.Exit(m.Run())
}

func TestAuthorize(t *testing.T) {
	at := func(clock string) time.Time {
		now, err := time.Parse("15:04", clock)
		if err != nil {
			t.Fatal(err)
		}
		return now
	}
	for clock, want := range map[string]string{
		"07:59": "VERDICT_DENY it is 07:59; come back between 08:00 and 18:00",
		"08:00": "VERDICT_NO_OPINION ; ",
		"17:59": "VERDICT_NO_OPINION ; ",
		"18:00": "VERDICT_DENY it is 18:00; come back between 08:00 and 18:00",
	} {
		s := plugintest.InProcess(t, officeHours{func() time.Time { return at(clock) }})
		if ds := s.Configure(t, `{}`, `{"from":"08:00","to":"18:00","kinds":["shell"]}`); len(ds) > 0 {
			t.Fatal(ds)
		}
		d := s.Authorize(t, "0", &pluginpb.Use{Kind: "shell"})
		if got := d.GetVerdict().String() + " " + d.GetReason() + "; " + d.GetHint(); got != want {
			t.Errorf("%s: %s", clock, got)
		}
		if d := s.Authorize(t, "0", &pluginpb.Use{Kind: "exec"}); d.GetVerdict() != pluginpb.Decision_VERDICT_NO_OPINION {
			t.Errorf("a kind that is not judged: %v", d)
		}
	}
}

func TestConfigure(t *testing.T) {
	s := plugintest.InProcess(t, officeHours{time.Now})
	ds := s.Configure(t, `{}`, `{"from":"08:00","to":"18:00"}`, `{"from":"18:00","to":"08:00"}`)
	if len(ds) != 1 || ds[0].GetBlock() != "1" || ds[0].GetPath()[0].GetAttribute() != "to" {
		t.Errorf("%v", ds)
	}
}

func TestConformance(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	plugintest.Run(t, plugintest.Options{Path: exe, Env: []string{"PLAY_PLUGIN=1"}})
}

// The first example shows how short a plugin can be.
func TestShort(t *testing.T) {
	b, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(b), "\n"); n >= 60 {
		t.Errorf("main.go has %d lines", n)
	}
}
