package confirm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/plugintest"
)

// wired is a world whose plugin is reached by gRPC.
type wired struct {
	*world
	s *plugintest.Session
}

// newWired configures the plugin with one block, "0".
func newWired(t *testing.T, change func(map[string]any)) wired {
	t.Helper()
	w := wired{world: newWorld(t)}
	w.s = plugintest.InProcess(t, w.confirm)
	b := defaults(t)
	v := map[string]any{
		"ask": b.Ask, "idle": b.Idle.String(), "remember": b.Remember, "timeout": b.Timeout.String(), "on": b.On,
		"fallback": b.Fallback, "display": b.Display, "askpass": "",
	}
	if change != nil {
		change(v)
	}
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if ds := w.s.Configure(t, `{"askpass":""}`, string(text)); len(ds) > 0 {
		t.Fatal(ds)
	}
	return w
}

// pb is a use for the wire.
func (w wired) pb(kind string, client uint64) *pluginpb.Use {
	u := w.use(kind, self(w.t))
	out := &pluginpb.Use{
		Kind: kind, Client: client, Command: []byte(u.Command),
		Target: &pluginpb.Target{User: u.Target.User, Host: u.Target.Host, Port: uint32(u.Target.Port)},
	}
	for _, p := range u.Processes {
		q := &pluginpb.Process{Pid: int64(p.PID), Start: p.Start, Exe: []byte(p.Exe)}
		for _, a := range p.Args {
			q.Args = append(q.Args, []byte(a))
		}
		out.Processes = append(out.Processes, q)
	}
	return out
}

// judge asks about a use and returns the decision; told gets what the client's terminal would show meanwhile.
func (w wired) judge(ctx context.Context, u *pluginpb.Use, told func(*pluginpb.Waiting)) string {
	w.t.Helper()
	stream, err := w.s.Client.Authorize(ctx, &pluginpb.AuthorizeRequest{Id: fmt.Sprint("id", u.GetClient()), Block: "0", Use: u})
	for err == nil {
		var r *pluginpb.AuthorizeResponse
		if r, err = stream.Recv(); err == nil {
			if d := r.GetDecision(); d != nil {
				text := strings.ToLower(strings.TrimPrefix(d.GetVerdict().String(), "VERDICT_"))
				if d.GetReason() != "" {
					text += ": " + d.GetReason() + "; " + d.GetHint()
				}
				return text
			}
			if told != nil {
				told(r.GetWaiting())
			}
		}
	}
	return err.Error()
}

// While a person is asked, the client's terminal says so.
func TestWaiting(t *testing.T) {
	w := newWired(t, func(v map[string]any) { v["timeout"] = "1m30s" })
	release := make(chan struct{})
	w.person = func(ctx context.Context, _ string) answer {
		select {
		case <-release:
			return answer{verdict: yes}
		case <-ctx.Done():
			return answer{verdict: unanswered}
		}
	}
	said := make(chan string, 100)
	ends := make(chan string, 2)
	tell := func(wait *pluginpb.Waiting) {
		if wait.GetMessage() != "" {
			said <- fmt.Sprint(wait.GetMessage(), " ", wait.GetAnswerable())
		}
	}
	go func() { ends <- w.judge(t.Context(), w.pb("exec", 1), tell) }()
	if got := <-said; got != "asking you on your screen, at most 1m30s false" {
		t.Error(got)
	}
	go func() { ends <- w.judge(t.Context(), w.pb("shell", 2), tell) }()
	if got := <-said; got != "waiting for an earlier question to be answered false" {
		t.Error(got)
	}
	release <- struct{}{}
	if got := <-said; got != "asking you on your screen, at most 1m30s false" {
		t.Error(got)
	}
	release <- struct{}{}
	for range 2 {
		if got := <-ends; got != "allow" {
			t.Error(got)
		}
	}
	w.person = func(context.Context, string) answer { return answer{verdict: no, why: "cannot open display: :0"} }
	if got := w.judge(t.Context(), w.pb("exec", 3), nil); got != "deny: the answer was no (askpass: cannot open display: :0); try again to be asked again" {
		t.Error(got)
	}
	go func() { ends <- w.judge(t.Context(), w.pb("exec", 4), tell) }()
	if got := <-said; !strings.HasPrefix(got, "the last answer was no; asking again in ") {
		t.Error(got)
	}
}

// Each answer, and each that counts on, is in the audit log.
func TestRecords(t *testing.T) {
	w := newWired(t, func(v map[string]any) { v["remember"] = "1h" })
	w.judge(t.Context(), w.pb("exec", 1), nil)
	pid := os.Getpid()
	chain := fmt.Sprintf("zsh (%d)", pid)
	w.wantRecords(
		"answer u@h:22 yes to exec, asked by "+chain,
		"grant u@h:22 answer 1 counts for exec of "+chain+", until ",
	)
	w.Observe(t.Context(), plugin.Event{Kind: "locked"})
	w.person = func(context.Context, string) answer { return answer{verdict: no} }
	w.judge(t.Context(), w.pb("exec", 1), nil)
	w.wantRecords(
		"answer u@h:22 yes to exec, asked by "+chain,
		"grant u@h:22 answer 1 counts for exec of "+chain+", until ",
		"forget u@h:22 answer 1, exec for "+chain+": locked",
		"answer u@h:22 no to exec, asked by "+chain,
	)
}

// wantRecords waits for the audit log to have lines that begin so.
func (w wired) wantRecords(want ...string) {
	w.t.Helper()
	var got []string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) { // polling: it is written after the answer
		if got = w.s.Master.Records(); len(got) >= len(want) {
			break
		}
	}
	if !slices.EqualFunc(got, want, strings.HasPrefix) {
		w.t.Errorf("%q, want %q", got, want)
	}
}

// Where there is no display, the client's own ssh asks as it comes, and its yes stands for all that it asks for.
func TestTerminal(t *testing.T) {
	const denied = "deny: nobody can be asked: no display; run ssh in a terminal, without BatchMode"
	w := newWired(t, func(v map[string]any) { v["fallback"] = "terminal" })
	if got := w.judge(t.Context(), w.pb("attach", 1), nil); got != "no_opinion" || w.questions() != 0 {
		t.Errorf("with a display: %s", got)
	}
	w.noWay = errors.New("no display")
	if got := w.judge(t.Context(), w.pb("attach", 1), nil); got != "no_opinion" {
		t.Errorf("nobody there: %s", got)
	}
	if got := w.judge(t.Context(), w.pb("exec", 1), nil); got != denied {
		t.Errorf("nobody there: %s", got)
	}
	var asked string
	w.s.Master.SetPerson(func(question string) bool {
		asked = question
		return true
	})
	if got := w.judge(t.Context(), w.pb("exec", 1), nil); got != denied || asked != "" {
		t.Errorf("asked once it was let in: %s, %q", got, asked)
	}
	if got := w.judge(t.Context(), w.pb("attach", 2), nil); got != "allow" {
		t.Error(got)
	}
	if want := fmt.Sprintf("allow zsh (%d) to use the connection to u@h:22? Yes counts for all that it asks for. It claims to be: ssh h", os.Getpid()); asked != want {
		t.Errorf("%s, want %s", asked, want)
	}
	for range 2 {
		if got := w.judge(t.Context(), w.pb("exec", 2), nil); got != "allow" {
			t.Error(got)
		}
	}
	if got := w.judge(t.Context(), w.pb("exec", 3), nil); got != denied {
		t.Errorf("another client: %s", got)
	}
	for _, end := range []plugin.Event{{Kind: "locked"}, {Kind: "use", Dropped: 1}} {
		w.Observe(t.Context(), end)
		if got := w.judge(t.Context(), w.pb("exec", 2), nil); got != denied {
			t.Errorf("after %+v: %s", end, got)
		}
		if got := w.judge(t.Context(), w.pb("attach", 2), nil); got != "allow" {
			t.Error(got)
		}
	}
	// It is shown and ends as told, and with the client; a jump host's use is the client's, too.
	through := w.pb("jump", 2)
	through.Target.Host = "jump"
	if got := w.judge(t.Context(), through, nil); got != "allow" {
		t.Error(got)
	}
	attach := func() { w.judge(t.Context(), w.pb("attach", 2), nil) }
	for name, end := range map[string]func(){
		"forget":    func() { w.Command(t.Context(), []string{"forget"}, io.Discard, io.Discard) },
		"forget ID": func() { w.Command(t.Context(), []string{"forget", w.grants.list()[0].name()}, io.Discard, io.Discard) },
		"its end":   func() { w.Observe(t.Context(), plugin.Event{Kind: "end", Use: plugin.Use{Kind: "attach", Client: 2}}) },
	} {
		attach()
		var table, list bytes.Buffer
		w.Command(t.Context(), []string{"grants"}, &table, io.Discard)
		w.Command(t.Context(), []string{"grants", "--json"}, &list, io.Discard)
		if got := strings.Join(strings.Fields(table.String()), " "); !regexp.MustCompile(
			`POLICY \d+ u@h:22 all ssh \(1073741823\) [0-9:]{8} as long as that runs its confirm block$`).MatchString(got) {
			t.Errorf("%q", got)
		}
		if !strings.Contains(list.String(), `"kind": "all"`) {
			t.Errorf("%s", list.String())
		}
		end()
		if got := w.judge(t.Context(), w.pb("exec", 2), nil); got != denied {
			t.Errorf("after %s: %s", name, got)
		}
	}
	attach()
	// Another policy leaves it: this client can't be asked again.
	if ds := w.s.Configure(t, `{"askpass":""}`, `{"ask":"always","idle":"15m","remember":"0s","timeout":"7s","on":["exec"],"fallback":"terminal",`+
		`"display":"session","askpass":""}`); len(ds) > 0 {
		t.Fatal(ds)
	}
	if got := w.judge(t.Context(), w.pb("exec", 2), nil); got != "allow" {
		t.Errorf("under another policy: %s", got)
	}
	w.s.Master.SetPerson(func(string) bool { return false })
	if got := w.judge(t.Context(), w.pb("attach", 4), nil); got != "deny: the answer was no; try again to be asked again" {
		t.Error(got)
	}
	// It is good for the terminal's blocks alone.
	elsewhere := defaults(t)
	u := w.use("exec", self(t))
	u.Client = 2
	if w.ok(&elsewhere, u) {
		t.Error("it stands for a block that wants to be asked otherwise")
	}
	// A yes that counts on spares the next client of the same shell the question.
	w = newWired(t, func(v map[string]any) { v["fallback"], v["ask"] = "terminal", "first" })
	w.noWay = errors.New("no display")
	w.s.Master.SetPerson(func(question string) bool { return strings.Contains(question, "and other clients there from zsh") })
	for client := range uint64(2) {
		for _, kind := range []string{"attach", "shell"} {
			if got := w.judge(t.Context(), w.pb(kind, 10+client), nil); got != "allow" {
				t.Errorf("%s of client %d: %s", kind, client, got)
			}
		}
		w.s.Master.SetPerson(nil)
	}
	// The lock ends it also when it comes in the moment of the answer.
	w = newWired(t, func(v map[string]any) { v["fallback"], v["ask"] = "terminal", "first" })
	w.noWay = errors.New("no display")
	w.s.Master.SetPerson(func(string) bool { return true })
	w.hold = func(p plugin.Process) (*held, error) {
		w.Observe(t.Context(), plugin.Event{Kind: "locked"})
		return hold(p)
	}
	w.judge(t.Context(), w.pb("attach", 1), nil)
	if got := w.judge(t.Context(), w.pb("exec", 1), nil); got != denied {
		t.Errorf("after the lock: %s", got)
	}
	// Where nothing is allowed nobody is asked at all.
	w = newWired(t, func(v map[string]any) { v["fallback"], v["ask"] = "terminal", "deny" })
	if got := w.judge(t.Context(), w.pb("attach", 1), nil); got != "no_opinion" || w.questions() != 0 {
		t.Errorf("ask = deny: %s", got)
	}
	// A yes in a dialog stands for what it was about.
	w = newWired(t, func(v map[string]any) { v["fallback"], v["on"] = "terminal", kinds })
	for _, kind := range []string{"attach", "shell"} {
		if got := w.judge(t.Context(), w.pb(kind, 1), nil); got != "allow" || w.questions() != 1 {
			t.Errorf("%s: %s", kind, got)
		}
	}
}

// What counts as long as the connection ends with the last one to that host.
func TestDown(t *testing.T) {
	w := newWired(t, func(v map[string]any) { v["ask"] = "first" })
	here, gone := w.pb("exec", 1), w.pb("exec", 2)
	here.Target.Host = "test.example.com" // which the Master is connected to
	for _, u := range []*pluginpb.Use{here, gone} {
		if got := w.judge(t.Context(), u, nil); got != "allow" || w.questions() != 1 {
			t.Fatal(got)
		}
	}
	b := defaults(t) // a block whose answers last longer
	b.Remember = forever
	u := w.use("shell", self(t))
	if !w.ok(&b, u) || w.questions() != 1 {
		t.Fatal("not asked")
	}
	w.Observe(t.Context(), plugin.Event{Kind: "down"})
	if !w.ok(&b, u) || w.questions() != 0 {
		t.Error("what counts as long as the shell runs has ended with the connection")
	}
	for u, want := range map[*pluginpb.Use]int{here: 0, gone: 1} {
		if got := w.judge(t.Context(), u, nil); got != "allow" || w.questions() != want {
			t.Errorf("%s", u.GetTarget().GetHost())
		}
	}
}

// Where only another terminal can answer, the client's says how, and what was said there is good for all who wait.
func TestPendingMessage(t *testing.T) {
	w := newWired(t, func(v map[string]any) { v["fallback"] = "pending" })
	w.noWay = errors.New("no display")
	said, ends := make(chan string, 10), make(chan string, 2)
	for client := range uint64(2) {
		go func() {
			ends <- w.judge(t.Context(), w.pb("exec", client), func(wait *pluginpb.Waiting) {
				if wait.GetAnswerable() {
					said <- wait.GetMessage()
				}
			})
		}()
	}
	got := []string{<-said, <-said}
	slices.Sort(got)
	for i, line := range got {
		if want := fmt.Sprintf("answer with `muxproxy allow id%d` or `muxproxy deny id%d`, at most 30s", i, i); line != want {
			t.Error(line)
		}
	}
	w.Observe(t.Context(), plugin.Event{Kind: "answered", ID: "id1"})
	for range 2 {
		if got := <-ends; got != "deny: the answer was no; try again to be asked again" {
			t.Error(got)
		}
	}
}
