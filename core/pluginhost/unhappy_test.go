package pluginhost

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/zclconf/go-cty/cty"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/pluginrun"
	"github.com/muxproxy/muxproxy/core/use"
)

// Plugins that are broken are told apart for a person, with the place of their block; those that are well go on.
func TestBroken(t *testing.T) {
	w := newWorld(t, Timing{Start: 2 * time.Second})
	good := spec(t, "good", "")
	exe, err := os.ReadFile(good.Path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(exe)
	good.SHA256 = strings.ToUpper(hex.EncodeToString(sum[:]))
	open := filepath.Join(t.TempDir(), "open")
	if err := os.WriteFile(open, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("no program\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	anybodys := filepath.Join(t.TempDir(), "anybodys", "plugin")
	if err := os.Mkdir(filepath.Dir(anybodys), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(anybodys, exe, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(anybodys), 0o777); err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		mode, path, sha256 string
		want               string
	}{
		{mode: "v0", want: "speaks version 0 of the plugin protocol, this muxproxy speaks 1"},
		{mode: "v99", want: "speaks version 99 of the plugin protocol, this muxproxy speaks 1"},
		{mode: "garbage", want: `its first line of output is "hello\\x1b world"`},
		{mode: "mute", want: "timeout while waiting"},
		{mode: "exit", want: "ended before it was ready: exit status 1, its last words: I don't want to"},
		{mode: "elsewhere", want: "not in the directory it was given"},
		{mode: "bad-schema", want: `host block: "Not A Name" can't be a name`},
		{mode: "missing", want: "there is no muxproxy-plugin-bad7 where plugins are looked for"},
		{path: "/nowhere/plugin", want: "/nowhere/plugin: no such file or directory"},
		{path: "/", want: "/ is not a regular file"},
		{path: open, want: "is writable by others (mode 0777): chmod go-w"},
		{path: anybodys, want: "is writable by everybody: chmod o-w"},
		{path: script, want: "exec format error"},
		{sha256: strings.Repeat("0", 64), want: "policy says " + strings.Repeat("0", 64)},
		{mode: "misnamed", want: "calls itself"},
	}
	specs := []Plugin{good}
	for i, c := range cases {
		name := fmt.Sprintf("bad%d", i)
		if c.mode == "bad-schema" {
			name = "bad"
		}
		p := spec(t, name, c.mode)
		if c.mode == "misnamed" {
			p.Args = "somebody"
		}
		if c.path != "" || c.mode == "missing" {
			p.Path = c.path
		}
		p.SHA256, p.Pos = c.sha256, fmt.Sprintf("config.hcl:%d", 10+i)
		specs = append(specs, p)
	}
	set, problems := w.m.Prepare(t.Context(), specs)
	for i, c := range cases {
		found := false
		for _, p := range problems {
			if p.Pos == fmt.Sprintf("config.hcl:%d", 10+i) && !p.Warning {
				found = found || strings.Contains(p.Error(), c.want)
				if strings.ContainsAny(p.Error(), "\n\x1b") {
					t.Errorf("not one printable line: %q", p.Error())
				}
			}
		}
		if !found {
			t.Errorf("%+v: not among %v", c, problems)
		}
	}
	blocks := []Block{block("good", "h", "allow")}
	if problems := set.Apply(t.Context(), blocks, lookupOf(blocks), specs, true, nil); len(problems) > 0 {
		t.Error(problems)
	}
	if d := w.check(use.Exec, "h"); d != nil {
		t.Errorf("the good one: %v", d)
	}
}

// Junk on standard error is a log, a crash in Configure a problem, a fork's child no survivor.
func TestMisbehaved(t *testing.T) {
	w := newWorld(t, Timing{Backoff: time.Hour})
	specs := []Plugin{spec(t, "junk", "junk"), spec(t, "forks", "forks"), spec(t, "stubborn", "stubborn"), spec(t, "bad", "crash-configure")}
	set, problems := w.m.Prepare(t.Context(), specs)
	for _, p := range problems {
		if !p.Warning {
			t.Error(p)
		}
	}
	blocks := []Block{block("junk", "h", "allow"), block("forks", "h", "allow"), block("stubborn", "h", "allow")}
	problems = set.Apply(t.Context(), blocks, lookupOf(blocks), specs, true, nil)
	if len(problems) != 1 || problems[0].Error() != "config.hcl:3: plugin bad: it can't be configured: it has ended" {
		t.Errorf("%v", problems)
	}
	if d := w.check(use.Shell, "h"); d != nil {
		t.Error(d)
	}
	w.waitLog(`{"level":"error","plugin":"junk","message":"help {\"n\":1}"}`)
	if !strings.Contains(w.log.String(), `"message":"\\x00\\xff\\x1b[2J"`) || strings.Contains(w.log.String(), strings.Repeat("x", 9000)) {
		t.Error("junk is not logged escaped and cut off")
	}
	p := set.find("forks")
	inst, _ := p.up()
	children := session(t, inst.PID())
	if len(children) != 2 {
		t.Errorf("processes of forks: %v", children)
	}
	// One that ends without its children.
	inst.Kill()
	<-inst.Done()
	for _, pid := range children {
		waitGone(t, pid)
	}
	stubborn, _ := set.find("stubborn").up()
	pid := stubborn.PID()
	began := time.Now()
	w.m.Close()
	waitGone(t, pid)
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("stopping took %v", d)
	}
}

// session returns the living processes of a session.
func session(t *testing.T, id int) []int {
	t.Helper()
	list, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var out []int
	for _, path := range list {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if fields[3] == strconv.Itoa(id) && fields[0] != "Z" {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			out = append(out, pid)
		}
	}
	return out
}

// waitGone waits until a process has ended.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) { // polling: it is no child of ours
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.HasPrefix(string(b[bytes.LastIndexByte(b, ')')+1:]), " Z") {
			return
		}
		if time.Now().After(end) {
			t.Errorf("process %d still runs: %s", pid, b)
			return
		}
	}
}

// playMaster runs plugins in dir, says their pids, and waits to be killed.
func playMaster(dir string) {
	exe, err := os.Executable()
	if err != nil {
		os.Exit(1)
	}
	m := New(Options{Dir: func() string { return dir }, State: dir, Backend: &fakeBackend{}, Log: zerolog.Nop(), Env: []string{"PATH=" + os.Getenv("PATH")}})
	var specs []Plugin
	for _, mode := range []string{"judge", "forks", "stubborn"} {
		specs = append(specs, Plugin{Name: mode, Path: exe, Args: mode + " " + mode, May: []string{"observe"}})
	}
	set, problems := m.Prepare(context.Background(), specs)
	problems = append(problems, set.Apply(context.Background(), nil, hosts{}, specs, true, nil)...)
	for _, p := range problems {
		if !p.Warning {
			fmt.Println(p)
			os.Exit(1)
		}
	}
	for _, s := range m.List() {
		fmt.Print(s.PID, " ")
	}
	fmt.Println()
	select {}
}

// A master that is killed takes its plugins along, their children too, and the next one clears up what is left.
func TestMasterKilled(t *testing.T) {
	w := newWorld(t, Timing{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "PLAY_MASTER="+w.dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, f := range strings.Fields(line) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(line)
		}
		pids = append(pids, session(t, pid)...)
	}
	if len(pids) != 4 {
		t.Errorf("processes: %v", pids)
	}
	cmd.Process.Kill()
	cmd.Wait()
	for _, pid := range pids {
		waitGone(t, pid)
	}
	if left, _ := filepath.Glob(filepath.Join(w.dir, "plugins*", "p*")); len(left) != 3 {
		t.Errorf("left: %q", left)
	}
	w.run([]Plugin{spec(t, "a", "")})
	if left, _ := filepath.Glob(filepath.Join(w.dir, "plugins*", "p*")); len(left) != 1 {
		t.Errorf("the next master has: %q", left)
	}
}

// command runs a command of a plugin.
func (w *world) command(name string, args ...string) (int, string) {
	w.t.Helper()
	var stdout, stderr bytes.Buffer
	status, err := w.m.Command(w.t.Context(), name, args, &stdout, &stderr)
	if err != nil {
		w.t.Fatal(err)
	}
	return status, stdout.String() + stderr.String()
}

// What plugins may do, and to which hosts.
func TestHostService(t *testing.T) {
	w := newWorld(t, Timing{})
	var all []string
	for _, c := range plugin.Capabilities() {
		all = append(all, string(c))
	}
	can, cannot, builtIn := spec(t, "can", ""), spec(t, "cannot", ""), spec(t, "built-in", "")
	can.May, builtIn.BuiltIn = all, true
	w.run([]Plugin{can, cannot, builtIn}, block("can", "h", "allow"), block("cannot", "h", "allow"), block("built-in", "h", "allow"),
		block("can", "refused", "allow"), block("built-in", "refused", "allow"))
	for _, c := range []struct {
		args   []string
		status int
		want   string
		call   string // that the master saw
		need   string // capability
	}{
		{[]string{"list"}, 0, "1 u@h:22 allow\n", "", "list"},
		{[]string{"connect", "h"}, 0, "1 allow\n", "connect u@h:22", "connect"},
		{[]string{"connect", "foreign"}, 1, "denied: u@foreign:22 has no block of can\n", "", "connect"},
		{[]string{"connect", "unknown"}, 255, "no such host\n", "", "connect"},
		{[]string{"connect", "refused"}, 3, "u@refused:22: permission denied\n", "", "connect"},
		{[]string{"resolve", "h"}, 0, "u@h:22 allow\n", "", "connect"},
		{[]string{"resolve", "foreign"}, 1, "denied: u@foreign:22 has no block of can\n", "", "connect"},
		{[]string{"resolve", "unknown"}, 255, "no such host\n", "", "connect"},
		{[]string{"drain", "1"}, 0, "", "drain 1", "close"},
		{[]string{"close", "1"}, 0, "", "close 1", "close"},
		{[]string{"close", "2"}, 1, "denied: u@foreign:22 has no block of can\n", "", "close"},
		{[]string{"close", "3"}, 255, "there is no connection 3\n", "", "close"},
		{[]string{"notify", "1", "hi\x1b"}, 0, "", `notify 1 can: hi\x1b`, "notify"},
		{[]string{"notify", "2", "hi"}, 1, "denied: u@foreign:22 has no block of can\n", "", "notify"},
		{[]string{"dial", "1", "echo:1"}, 0, "ping", "dial 1 tcp echo:1", "dial"},
		{[]string{"dial", "1", "refused:1"}, 255, `refused by the server: connect failed\x1b` + "\n", "", "dial"},
		{[]string{"dial", "1", "denied:1"}, 1, "denied: denied by policy: no\n", "", "dial"},
		{[]string{"dial", "2", "echo:1"}, 1, "denied: u@foreign:22 has no block of can\n", "", "dial"},
		{[]string{"handover", "1", "echo:1"}, 0, "open: first second (in 12, out 12)", "dial 1 tcp echo:1", "dial"},
		{[]string{"handover-not", "1", "echo:1"}, 255, "not today\n", "dial 1 tcp echo:1", "dial"},
		{[]string{"listen", "1", "localhost:0"}, 0, "127.0.0.1:4444\n192.0.2.1:99\n", "listen 1 tcp localhost:0", "listen"},
		{[]string{"offer", "1", "localhost:0"}, 0, "192.0.2.1:99\nover there (in 0, out 10)", "listen 1 tcp localhost:0", "listen"},
		{[]string{"permit", "1", "before", "tcp", "h:1"}, 0, "over there", "permit tcp h:1", "listen"},
		{[]string{"permit", "1", "after", "unix", "/s"}, 0,
			"stream socket: the ticket is not good: unknown, used, too old, or another's\n", "permit unix /s", "listen"},
		{[]string{"permit", "1", "before", "tcp", "denied:1"}, 1, "denied: denied by policy: no\n", "permit tcp denied:1", "listen"},
		{[]string{"permit", "1", "before", "udp", "h:1"}, 255, `unknown network "udp"` + "\n", "", "listen"},
		{[]string{"permit", "1", "too-late", "tcp", "h:1"}, 255, "the stream has ended, or is another's\n", "", "listen"},
		{[]string{"listen", "2", "localhost:0"}, 1, "denied: u@foreign:22 has no block of can\n", "", "listen"},
		{[]string{"kept"}, 0, "", "", "keep"},
		{[]string{"keep", "this"}, 0, "", "", "keep"},
		{[]string{"keep-much"}, 255, "65537 bytes are more than the 65536 that can be kept\n", "", "keep"},
		{[]string{"kept"}, 0, "this", "", "keep"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			w.backend.mu.Lock()
			w.backend.calls = nil
			w.backend.mu.Unlock()
			for _, name := range []string{"can", "built-in"} {
				status, out := w.command(name, c.args...)
				if want := strings.NewReplacer("of can", "of "+name, "can/", name+"/").Replace(c.want); status != c.status || out != want {
					t.Errorf("%s: status %d, %q", name, status, out)
				}
			}
			w.backend.mu.Lock()
			if calls := strings.Join(w.backend.calls, "\n"); c.call != "" && !strings.Contains(calls, c.call+" by can true") {
				t.Errorf("calls: %s", calls)
			}
			before := len(w.backend.calls)
			w.backend.mu.Unlock()
			status, out := w.command("cannot", c.args...)
			want := fmt.Sprintf("denied: cannot may not %s: policy has to say may = [%q] in its plugin block\n", c.need, c.need)
			if status != 1 || out != want {
				t.Errorf("without the capability: status %d, %q", status, out)
			}
			w.backend.mu.Lock()
			defer w.backend.mu.Unlock()
			if len(w.backend.calls) != before {
				t.Errorf("without the capability: %q", w.backend.calls)
			}
		})
	}
	// A record needs no capability, and is escaped.
	if status, out := w.command("cannot", "record", "grant", "u@h:22", "to zsh\x1b"); status != 0 || out != "" {
		t.Errorf("record: status %d, %q", status, out)
	}
	w.backend.mu.Lock()
	if want := `record grant u@h:22 to zsh\x1b by cannot true`; !slices.Contains(w.backend.calls, want) {
		t.Errorf("calls: %q", w.backend.calls)
	}
	w.backend.mu.Unlock()
	// Kept data survives the plugin.
	inst, _ := w.m.set().find("can").up()
	inst.Kill()
	<-inst.Done()
	w.upAgain("can", inst)
	if status, out := w.command("can", "kept"); status != 0 || out != "this" {
		t.Errorf("kept over a restart: status %d, %q", status, out)
	}
}

// spend sends a ticket to a stream socket, and says what comes back.
func spend(path, id string, stdout io.Writer) int {
	b, err := hex.DecodeString(id)
	if err != nil {
		return 255
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		fmt.Fprintln(stdout, err)
		return 255
	}
	defer c.Close()
	c.Write(b)
	answer, _ := io.ReadAll(io.LimitReader(c, 200))
	fmt.Fprintf(stdout, "%q", answer)
	return 0
}

// A ticket is its plugin's, for once and for a time.
func TestTickets(t *testing.T) {
	w := newWorld(t, Timing{})
	w.run([]Plugin{spec(t, "a", ""), spec(t, "b", "")})
	const refused = `"\x01the ticket is not good: unknown, used, too old, or another's"`
	pid := func(name string) int {
		inst, _ := w.m.set().find(name).up()
		return inst.PID()
	}
	issue := func() string {
		near, far := w.backend.pair()
		fmt.Fprint(far, "hello")
		far.Close()
		id, err := w.m.streams.ticket(pid("a"), 0, near, nil)
		if err != nil {
			t.Fatal(err)
		}
		return hex.EncodeToString(id)
	}
	id := issue()
	if _, out := w.command("b", "spend", w.m.streams.place().listener.Path(), id); out != refused {
		t.Errorf("another plugin: %s", out)
	}
	var out bytes.Buffer
	if spend(w.m.streams.place().listener.Path(), id, &out); out.String() != refused {
		t.Errorf("a stranger: %s", out.String())
	}
	if _, out := w.command("a", "spend", w.m.streams.place().listener.Path(), id); out != `"\x00hello"` {
		t.Errorf("its owner: %s", out)
	}
	if _, out := w.command("a", "spend", w.m.streams.place().listener.Path(), id); out != refused {
		t.Errorf("a second time: %s", out)
	}
	if _, out := w.command("a", "spend", w.m.streams.place().listener.Path(), strings.Repeat("00", pluginrun.TicketSize)); out != refused {
		t.Errorf("a guess: %s", out)
	}
	w.m.o.Timing.Ticket = time.Millisecond
	near, far := w.backend.pair()
	late, err := w.m.streams.ticket(pid("a"), 0, near, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := far.Read(make([]byte, 1)); err != io.EOF { // closed when the time was over
		t.Errorf("an old ticket's stream: %v", err)
	}
	far.Close()
	if _, out := w.command("a", "spend", w.m.streams.place().listener.Path(), hex.EncodeToString(late)); out != refused {
		t.Errorf("too late: %s", out)
	}
	// Those that a plugin leaves behind end with it.
	w.m.o.Timing.Ticket = time.Hour
	near, far = w.backend.pair()
	if _, err := w.m.streams.ticket(pid("a"), 0, near, nil); err != nil {
		t.Fatal(err)
	}
	inst, _ := w.m.set().find("a").up()
	inst.Kill()
	if _, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a dead plugin's stream: %v", err)
	}
	far.Close()
}

// A ticket does not grow old while somebody decides where its stream may lead; only an incoming one of the plugin's own leads
// anywhere.
func TestTicketsWait(t *testing.T) {
	w := newWorld(t, Timing{})
	w.run([]Plugin{spec(t, "a", "")})
	w.m.o.Timing.Ticket = time.Hour
	issue := func(connection uint64) (id []byte, far *net.UnixConn) {
		near, far := w.backend.pair()
		t.Cleanup(func() { far.Close() })
		id, err := w.m.streams.ticket(1, connection, fakeArrival{near, w.backend}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return id, far
	}
	id, far := issue(7)
	if s, _, _ := w.m.streams.incoming(2, id); s != nil {
		t.Error("another plugin's")
	}
	if s, _, _ := w.m.streams.incoming(1, id[1:]); s != nil {
		t.Error("a part of one")
	}
	s, connection, release := w.m.streams.incoming(1, id)
	if s == nil || connection != 7 {
		t.Fatalf("%v, %d", s, connection)
	}
	if s, _, _ := w.m.streams.incoming(1, id); s != nil {
		t.Error("decided twice at once")
	}
	w.m.streams.mu.Lock()
	runs := w.m.streams.tickets[[pluginrun.TicketSize]byte(id)].timer.Stop()
	w.m.streams.mu.Unlock()
	if runs {
		t.Error("the ticket grows old while it is decided")
	}
	w.m.o.Timing.Ticket = time.Millisecond
	release()
	if _, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after that: %v", err)
	}
	if s, _, _ := w.m.streams.incoming(1, id); s != nil {
		t.Error("too old")
	}
	id, _ = issue(0)
	if s, _, _ := w.m.streams.incoming(1, id); s != nil {
		t.Error("one that was dialled")
	}
}

// A process of this user without the token gets nowhere, in either direction.
func TestStrangers(t *testing.T) {
	w := newWorld(t, Timing{})
	a := spec(t, "a", "")
	a.May = []string{"list"}
	w.run([]Plugin{a}, block("a", "h", "allow"))
	inst, _ := w.m.set().find("a").up()
	dial := func(address string) *grpc.ClientConn {
		c, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	toPlugin, toHost := dial(inst.Address()), dial(inst.Hello.Host)
	defer toPlugin.Close()
	defer toHost.Close()
	for token, ctx := range map[string]context.Context{
		"none": t.Context(),
		"bad":  metadata.AppendToOutgoingContext(t.Context(), plugin.TokenKey, "guess"),
		"host's": metadata.AppendToOutgoingContext(t.Context(), plugin.TokenKey,
			inst.Hello.HostToken, plugin.TokenKey, inst.Hello.PluginToken),
	} {
		for name, call := range map[string]func() error{
			"Describe": func() error {
				_, err := pluginpb.NewPluginClient(toPlugin).Describe(ctx, &pluginpb.DescribeRequest{})
				return err
			},
			"Authorize": func() error {
				s, err := pluginpb.NewPluginClient(toPlugin).Authorize(ctx, &pluginpb.AuthorizeRequest{})
				if err == nil {
					_, err = s.Recv()
				}
				return err
			},
			"Shutdown": func() error {
				return toPlugin.Invoke(ctx, "/plugin.GRPCController/Shutdown", &pluginpb.DescribeRequest{}, &pluginpb.ObserveResponse{})
			},
			"Connections": func() error {
				_, err := pluginpb.NewHostClient(toHost).Connections(ctx, &pluginpb.ConnectionsRequest{})
				return err
			},
		} {
			if err := call(); status.Code(err) != codes.Unauthenticated {
				t.Errorf("%s with token %s: %v", name, token, err)
			}
		}
	}
	if _, out := w.command("a", "list"); out != "1 u@h:22 allow\n" {
		t.Errorf("the plugin itself: %q", out)
	}
}

// A configuration that a plugin does not take changes nothing, and its complaint has its place.
func TestReload(t *testing.T) {
	w := newWorld(t, Timing{})
	specs := []Plugin{spec(t, "a", ""), spec(t, "b", "")}
	w.run(specs, block("a", "h", "deny"), block("b", "h", "allow"))
	was := map[string]int{}
	for _, s := range w.m.List() {
		was[s.Name] = s.PID
	}
	own := func(bad bool) Block {
		schema := w.m.set().find("b").description().Plugin
		attrs := schema.zero().AsValueMap()
		attrs["bad"] = cty.BoolVal(bad)
		return Block{Plugin: "b", Value: cty.ObjectVal(attrs)}
	}
	blocks := []Block{block("a", "h", "allow"), block("b", "h", "deny"), own(true)}
	newcomer := append(specs, spec(t, "c", ""))
	set, _ := w.m.Prepare(t.Context(), newcomer)
	if got := len(set.Described()); got != 3 {
		t.Errorf("%d described", got)
	}
	problems := set.Apply(t.Context(), blocks, lookupOf(blocks), newcomer, false, nil)
	if len(problems) != 2 || problems[0].Error() != `config.hcl:3: plugin b: that word is bad\x1b` || problems[0].Warning || !problems[1].Warning ||
		!problems[0].Path.Equals(cty.GetAttrPath("rule").IndexInt(1).GetAttr("words").IndexInt(0)) ||
		!problems[1].Path.Equals(cty.GetAttrPath("limits").IndexString("a")) {
		t.Errorf("%#v", problems)
	}
	if d := w.check(use.Exec, "h"); d == nil || d.By != "a" {
		t.Errorf("after a bad reload: %v", d)
	}
	if list := w.m.List(); len(list) != 2 {
		t.Errorf("after a bad reload: %+v", list)
	}
	blocks[2] = own(false)
	blocks[0].ID, blocks[1].ID = "a/new", "b/new" // the hosts are other ones now
	set, _ = w.m.Prepare(t.Context(), specs)
	if problems := set.Apply(t.Context(), blocks, lookupOf(blocks), specs, false, nil); len(problems) != 0 {
		t.Error(problems)
	}
	if d := w.check(use.Exec, "h"); d != nil {
		t.Errorf("the old block: %v", d)
	}
	if d := w.check(use.Exec, "new"); d == nil || d.By != "b" {
		t.Errorf("after a good reload: %v", d)
	}
	for _, s := range w.m.List() {
		if was[s.Name] != s.PID {
			t.Errorf("%s was restarted", s.Name)
		}
	}
	// None mentioned: none runs.
	set, _ = w.m.Prepare(t.Context(), nil)
	set.Apply(t.Context(), nil, hosts{}, nil, false, nil)
	for name, pid := range was {
		waitGone(t, pid)
		if _, err := w.m.Command(t.Context(), name, nil, io.Discard, io.Discard); err != ErrNoVerb {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A runtime directory with a path that leaves no room for sockets.
func TestLongPath(t *testing.T) {
	w := newWorld(t, Timing{})
	long := filepath.Join(w.dir, strings.Repeat("x", 100))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(long) })
	w.m.o.Dir = func() string { return long }
	w.run([]Plugin{spec(t, "a", "")}, block("a", "h", "deny"))
	if d := w.check(use.Exec, "h"); d == nil {
		t.Error("the plugin was not asked")
	}
	short := filepath.Dir(w.m.streams.place().dir)
	w.m.Close()
	if _, err := os.Stat(short); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", short, err)
	}
	os.Remove(long)
}
