package persist

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/plugintest"
)

// value is a block as a master sends it, with the defaults but for some attributes.
func value(attributes string) string {
	v := `"idle":"10m","max":"8h","until":"","prewarm":false,"reconnect":false,"on_suspend":"keep","on_lock":"keep"`
	for _, a := range strings.Fields(attributes) {
		name, text, _ := strings.Cut(a, "=")
		before, rest, _ := strings.Cut(v, `"`+name+`":`)
		_, after, _ := strings.Cut(rest, ",")
		v = strings.TrimSuffix(before+`"`+name+`":`+text+","+after, ",")
	}
	return "{" + v + "}"
}

// configure brings host blocks through gRPC: each is its labels and its attributes.
func configure(t *testing.T, s *plugintest.Session, blocks ...[2]string) []string {
	t.Helper()
	r := &pluginpb.ConfigureRequest{Blocks: []*pluginpb.Block{{Kind: pluginpb.Block_KIND_PLUGIN, Value: []byte("{}")}}}
	for i, b := range blocks {
		r.Blocks = append(r.Blocks, &pluginpb.Block{
			Id: fmt.Sprint(i), Kind: pluginpb.Block_KIND_HOST, Hosts: strings.Fields(b[0]), Value: []byte(value(b[1])),
		})
	}
	checked, err := s.Client.Check(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := s.Client.Configure(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(checked, answer) {
		t.Errorf("checked: %v, configured: %v", checked, answer)
	}
	var lines []string
	for _, d := range answer.GetDiagnostics() {
		path := ""
		for _, step := range d.GetPath() {
			path += step.GetAttribute()
		}
		lines = append(lines, fmt.Sprintf("%s %s %s: %s", strings.TrimPrefix(d.GetSeverity().String(), "SEVERITY_"), d.GetBlock(), path, d.GetSummary()))
	}
	return lines
}

func TestConfigure(t *testing.T) {
	s := plugintest.InProcess(t, closing(t))
	for _, c := range []struct {
		labels, attributes, want string
	}{
		{"*", "", ""},
		{"*", `idle="forever" max="forever" until="18:00" reconnect=true on_lock="close" on_suspend="close"`, ""},
		{"*", `idle="0s" max="0s"`, ""},
		{"*", `idle="never"`, `ERROR 0 idle: "never" is neither a duration such as "10m" or "8h" nor "forever"`},
		{"*", `max="-1h"`, `ERROR 0 max: "-1h" is neither a duration such as "10m" or "8h" nor "forever"`},
		{"*", `until="6pm"`, `ERROR 0 until: "6pm" is not a time of the day such as "18:00"`},
		{"*", `until="9:00"`, `ERROR 0 until: "9:00" is not a time of the day such as "18:00"`},
		{"*", `until="24:00"`, `ERROR 0 until: "24:00" is not a time of the day such as "18:00"`},
		{"*", `on_lock="maybe"`, `ERROR 0 on_lock: "maybe" is neither "keep" nor "close"`},
		{"*", `on_suspend=""`, `ERROR 0 on_suspend: "" is neither "keep" nor "close"`},
		{"*.example.com a !b? c*", `prewarm=true`,
			`WARNING 0 prewarm: prewarm is for hosts by their names: nobody knows what *.example.com and c* stands for`},
		{"a", `idle="0s" reconnect=true`, `WARNING 0 : nothing is kept for 0s, so that prewarm and reconnect do nothing`},
	} {
		if got := strings.Join(configure(t, s, [2]string{c.labels, c.attributes}), "\n"); got != c.want {
			t.Errorf("%s %s:\n%s\nwant\n%s", c.labels, c.attributes, got, c.want)
		}
	}
}

// closing is the plugin, closed after what plugintest closes by itself.
func closing(t *testing.T) *persist {
	p := newPersist()
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// From the configuration to a connection made in advance, to how long it stays, to its end with the lock: all of it through
// gRPC, as with a master.
func TestThroughTheWire(t *testing.T) {
	s := plugintest.InProcess(t, closing(t))
	connect, tried := make(chan string), make(chan struct{}, 1)
	s.Master.OnConnect = func(target string) (*pluginpb.ConnectResponse, error) {
		connect <- target
		defer func() { tried <- struct{}{} }()
		return &pluginpb.ConnectResponse{Connection: s.Master.Connection()}, nil
	}
	if problems := configure(t, s, [2]string{"test.example.com", `idle="1h" prewarm=true on_lock="close"`}); len(problems) > 0 {
		t.Fatal(problems)
	}
	events, err := s.Client.Observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	send := func(e *pluginpb.Event) {
		t.Helper()
		if err := events.Send(e); err != nil {
			t.Fatal(err)
		}
	}
	send(&pluginpb.Event{Kind: "policy"})
	if target := <-connect; target != "test.example.com" {
		t.Errorf("dials %s", target)
	}
	<-tried
	c := s.Master.Connection()
	c.Since = timestamppb.Now()
	send(&pluginpb.Event{Kind: "up", Connection: c})
	left := timestamppb.Now()
	r, err := s.Client.Retain(t.Context(), &pluginpb.RetainRequest{Connection: c, IdleSince: left})
	if err != nil || !r.GetUntil().AsTime().Equal(left.AsTime().Add(time.Hour)) {
		t.Errorf("kept until %v: %v", r.GetUntil().AsTime(), err)
	}
	send(&pluginpb.Event{Kind: "locked"})
	if _, err := events.CloseAndRecv(); err != nil { // all events were taken
		t.Error(err)
	}
	if got := s.Master.Drained(); len(got) != 1 || got[0] != c.GetId() {
		t.Errorf("drained %d", got)
	}
}

// As a process of its own it does all that a master expects.
func TestConformance(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	plugintest.Run(t, plugintest.Options{
		Path: exe, Env: []string{"PLAY_PLUGIN=1"},
		Host: `{"prewarm": true, "reconnect": true, "on_lock": "close", "until": "18:00"}`,
	})
}

// Whatever a master says, nothing is kept without a block.
func TestNoBlock(t *testing.T) {
	s := plugintest.InProcess(t, closing(t))
	c := s.Master.Connection()
	if r, err := s.Client.Retain(t.Context(), &pluginpb.RetainRequest{Connection: c}); err == nil {
		t.Errorf("before it is configured: %v", r)
	}
	configure(t, s, [2]string{"*", ""})
	c.Block = "7"
	if r, err := s.Client.Retain(t.Context(), &pluginpb.RetainRequest{Connection: c}); err == nil {
		t.Errorf("with a block that is none: %v", r)
	}
}
