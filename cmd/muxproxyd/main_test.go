package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/use"
)

var update = flag.Bool("update", false, "write testdata/*.golden")

var noon = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)

// world is a user's home with room for a master.
type world struct {
	t     *testing.T
	env   map[string]string
	dirs  paths.Dirs
	stdin string
	exe   string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	home, err := os.MkdirTemp("", "muxproxyd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	run := filepath.Join(home, "run")
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, env: map[string]string{"HOME": home, "XDG_RUNTIME_DIR": run}}
	if w.dirs, err = paths.Find(w.getenv); err != nil {
		t.Fatal(err)
	}
	if err := w.dirs.Make(); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) getenv(name string) string { return w.env[name] }

// serve runs a fake master until the test ends, or the returned function is called.
func (w *world) serve(b *fakeMaster) (stop func()) {
	w.t.Helper()
	l, err := paths.Listen(w.dirs.Runtime, paths.ControlSocket)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- control.Serve(ctx, l, b) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			w.t.Error(err)
		}
	})
	b.end = cancel
	w.t.Cleanup(stop)
	return stop
}

// run runs a command as main does.
func (w *world) run(args ...string) (status int, stdout, stderr string) {
	w.t.Helper()
	var out, errOut bytes.Buffer
	a := &app{stdin: strings.NewReader(w.stdin), stdout: &out, stderr: &errOut, getenv: w.getenv, now: func() time.Time { return noon },
		exe: w.exe}
	status = run(w.t.Context(), a, args)
	return status, out.String(), errOut.String()
}

// Public keys made for this test, and in TestCommands what ssh-keygen -l says of them.
const (
	plainKey = "ecdsa-sha2-nistp256 " +
		"AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBJHNLq1Q+jrR7uNtlP/1FnjsTjvctZQlSRHyW5EQC4F2I86g205tNZwYKzq8ki/vRKIqVCTXFsUSqEbcqu+gdKY="
	caKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEzoMM91qLdYWlrRBSBA7BXSTxl3jvfgxshqce4FVH0K"
)

type fakeMaster struct {
	status   control.Status
	reloaded control.Reloaded
	left     use.LockState // after unlock
	err      error
	end      func()

	mu    sync.Mutex // guards what follows
	calls []string
}

func (f *fakeMaster) call(s string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, s)
	return f.err
}

func (f *fakeMaster) called() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.calls, ", ")
}

func (f *fakeMaster) Status() control.Status    { return f.status }
func (f *fakeMaster) Exists(target string) bool { return target == "db" }
func (f *fakeMaster) Close(_ context.Context, _ use.Caller, target string) (int, error) {
	return f.matches(target), f.call("close " + target)
}
func (f *fakeMaster) Drain(_ context.Context, _ use.Caller, target string) (int, error) {
	return f.matches(target), f.call("drain " + target)
}
func (f *fakeMaster) matches(target string) int {
	return map[string]int{"": 2, "db": 1}[target]
}
func (f *fakeMaster) Stop(_ context.Context, _ use.Caller, drain bool) error {
	err := f.call(map[bool]string{true: "stop drain", false: "stop"}[drain])
	if err == nil {
		f.end()
	}
	return err
}
func (f *fakeMaster) Restart(context.Context, use.Caller) (int, error) { return 77, f.call("restart") }
func (f *fakeMaster) Reload(context.Context, use.Caller, bool) (control.Reloaded, error) {
	return f.reloaded, f.call("reload")
}
func (f *fakeMaster) Lock(_ context.Context, _ use.Caller, passphrase []byte) error {
	return f.call("lock " + string(passphrase))
}
func (f *fakeMaster) Unlock(_ context.Context, _ use.Caller, passphrase []byte) (use.LockState, error) {
	if string(passphrase) == "wrong" {
		return use.LockState{Locked: true}, use.ErrPassphrase
	}
	return f.left, f.call("unlock " + string(passphrase))
}
func (f *fakeMaster) HostKeys(bool) (plain, ca []string) {
	return []string{plainKey}, []string{caKey}
}
func (f *fakeMaster) Dump() string { return "goroutine 1:\n\tmain.main()\x1b\n" }

// golden compares text with testdata/NAME.golden.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s (see -update):\n%s\nwant:\n%s", name, got, want)
	}
}

func busy() control.Status {
	ago := func(d time.Duration) time.Time { return noon.Add(-d) }
	chain := use.Caller{UID: 1000, Processes: []use.Process{
		{PID: 4123, Exe: "/usr/bin/muxproxy"}, {PID: 4122, Exe: "/usr/bin/ssh"}, {PID: 4121, Exe: "/usr/bin/git"},
		{PID: 3000, Exe: "/usr/bin/zsh"}}}
	long := chain
	long.Processes = append(long.Processes[:4:4],
		use.Process{PID: 1, Exe: "/x/" + strings.Repeat("y", 100) + "\x1b[2J"}, use.Process{PID: 2, Exe: "/bin/last"})
	return control.Status{
		Version: "1.2.3", PID: 4000, Since: ago(50*time.Hour + time.Minute), Sockets: "/run/user/1000/muxproxy",
		Upstreams: []control.Upstream{
			{ID: 1, Target: "alice@db.example.com:22", Lane: "interactive", State: "up", Since: ago(13 * time.Minute),
				LastHeard: ago(time.Second), Addr: "192.0.2.7:22", Server: "SSH-2.0-OpenSSH_9.2p1", HostKey: "SHA256:abc",
				Kex: "mlkem768x25519-sha256", Cipher: "aes128-gcm@openssh.com", PostQuantum: true,
				Auth: "publickey SHA256:def", Clients: 2, Channels: 3, In: 1234, Out: 32 << 20,
				Sessions: 3, MaxSessions: 10},
			{ID: 12, Target: "postgres@a-very-long-name.in.some.cluster.of.example.com:2222", Lane: "bulk", State: "draining",
				Since: ago(59 * time.Second), Kex: "curve25519-sha256", Cipher: "chacha20-poly1305@openssh.com",
				Clients: 1, Channels: 1, In: 1 << 50, Out: 1023, Sessions: 100, MaxSessions: 100},
			{ID: 13, Target: "bob@[2001:db8::1]:22", Lane: "interactive", State: "dialling", Since: noon.Add(time.Second)},
			{ID: 14, Target: "git@h:22", Lane: "agent", State: "up", Since: noon, Suspect: true},
			{ID: 15, Target: "git@h:22", Lane: "interactive", State: "up", Since: ago(time.Hour), IdleSince: ago(3 * time.Minute),
				KeptUntil: noon.Add(7 * time.Minute)},
			{ID: 16, Target: "me@kept:22", Lane: "interactive", State: "up", Since: ago(time.Hour), IdleSince: ago(time.Minute),
				KeptUntil: noon.Add(30 * time.Hour)},
			{ID: 17, Target: "me@ever:22", Lane: "interactive", State: "up", Since: ago(time.Hour), IdleSince: ago(time.Second),
				KeptUntil: time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)},
		},
		Clients: []control.Client{
			{ID: 7, Target: "alice@db.example.com:22", Alias: "db", Upstream: 1, Mode: "fds", Since: ago(3 * time.Minute),
				Caller: chain, Channels: []control.Channel{
					{Kind: "exec", Detail: "git-upload-pack", Upstream: 12, Since: ago(3 * time.Minute), In: 1234, Out: 32 << 20},
					{Kind: "local-forward", Detail: strings.Repeat("x", 60) + ":5432", Upstream: 1, Since: ago(time.Second), In: 5, Out: 7},
					{Kind: "shell", Detail: "evil\x1b]0;\u202e", Upstream: 1234567, Since: ago(time.Second)},
				}},
			{ID: 8, Target: "bob@[2001:db8::1]:22", Mode: "pipes", Since: ago(4*time.Hour + 5*time.Minute), Caller: long,
				Channels: []control.Channel{}},
			{ID: 9, Target: "root@h:22", Mode: "copy", Caller: use.Caller{UID: 0, Processes: []use.Process{}},
				Channels: []control.Channel{}},
		},
	}
}

func TestStatusTable(t *testing.T) {
	for name, s := range map[string]control.Status{
		"status-busy": busy(),
		"status-wide": {Version: "1.2.3", PID: 4000, Since: noon, Sockets: "/run/" + strings.Repeat("日本", 30),
			Upstreams: []control.Upstream{{ID: 1234567, Target: "u@" + strings.Repeat("ü", 40) + ":22", Lane: "interactive", State: "up",
				Server: strings.Repeat("語", 60), Since: noon}},
			Clients: []control.Client{{ID: 7654321, Target: "日本@" + strings.Repeat("h", 70) + ":22", Upstream: 1234567,
				Caller: use.Caller{Processes: []use.Process{{PID: 1, Exe: "/bin/" + strings.Repeat("ど", 60)}}}}}},
		"status-idle": {Version: "1.2.3", PID: 4000, Since: noon, Sockets: "/run/user/1000/muxproxy", Draining: true,
			Policy: "/home/me/.config/muxproxy/config.hcl",
			Lock:   use.LockState{Locked: true, By: []string{"person", "screen"}, Since: noon.Add(-3 * time.Minute)}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.serve(&fakeMaster{status: s})
			status, stdout, stderr := w.run("status")
			if status != exitYes || stderr != "" {
				t.Errorf("status %d, stderr %q", status, stderr)
			}
			for line := range strings.Lines(stdout) {
				line = strings.TrimSuffix(line, "\n")
				if n := use.Columns(line); n > 80 {
					t.Errorf("%d columns: %q", n, line)
				}
				if use.Printable(line) != line {
					t.Errorf("not escaped: %q", line)
				}
			}
			golden(t, name, stdout)
		})
	}
	t.Run("status-pending", func(t *testing.T) {
		w := newWorld(t)
		w.serveBackend(&pluginMaster{fakeMaster: &fakeMaster{status: control.Status{Version: "1.2.3", PID: 4000, Since: noon}}, pending: waiting()})
		status, stdout, stderr := w.run("status")
		if status != exitYes || stderr != "" {
			t.Errorf("status %d, stderr %q", status, stderr)
		}
		golden(t, "status-pending", stdout)
	})
}

func TestStatusJSON(t *testing.T) {
	w := newWorld(t)
	want := busy()
	stop := w.serve(&fakeMaster{status: want})
	status, stdout, stderr := w.run("status", "--json")
	if status != exitYes || stderr != "" {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
	var got control.Status
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatal(err)
	}
	// omitempty makes nil of empty arguments on the way.
	plain := func(s control.Status) string {
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if plain(got) != plain(want) {
		t.Errorf("got  %s\nwant %s", plain(got), plain(want))
	}

	stop()
	status, stdout, stderr = w.run("status", "--json")
	if status != exitNo || stderr != "" {
		t.Errorf("without a master: status %d, stderr %q", status, stderr)
	}
	var empty map[string]any
	if err := json.Unmarshal([]byte(stdout), &empty); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(empty["upstreams"], []any{}) || !reflect.DeepEqual(empty["clients"], []any{}) || empty["pid"] != 0.0 {
		t.Errorf("without a master: %s", stdout)
	}
}

var sgr = regexp.MustCompile("\x1b\\[[0-9]+m")

// Colour adds nothing but colour.
func TestStatusColor(t *testing.T) {
	show := func(color bool) string {
		p := &page{width: minWidth, color: color}
		p.status(look{status: busy(), at: noon, pending: waiting()})
		return strings.Join(p.lines, "\n")
	}
	plain, colored := show(false), show(true)
	if strings.Contains(plain, "\x1b") {
		t.Error("colour where there should be none")
	}
	if sgr.ReplaceAllString(colored, "") != plain {
		t.Errorf("with colour\n%s\nwithout\n%s", colored, plain)
	}
	for _, part := range []string{"\x1b[1mmuxproxy 1.2.3", "\x1b[32mup ", "\x1b[33mdraining", "\x1b[31msilent", "\x1b[33mcurve25519", "\x1b[33mwaiting"} {
		if !strings.Contains(colored, part) {
			t.Errorf("no %q in\n%s", part, colored)
		}
	}
}

func waiting() []control.Pending {
	return []control.Pending{
		{ID: "f3k2ab4c", Plugin: "confirm", Kind: "exec", Detail: "rm -rf /\x1b " + strings.Repeat("x", 80), Target: "u@db:22",
			Caller: "git (7)", Message: "asks on the screen", Since: noon.Add(-3 * time.Second), Answerable: true},
		{ID: "aaaa", Plugin: "mine", Kind: "shell", Target: "u@db:22", Since: noon.Add(-time.Minute)},
	}
}

// Programs read these fields: docs/status.md lists all there are, and what is in it stays.
func TestStatusFields(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "status.md"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	var walk func(prefix string, v reflect.Type)
	walk = func(prefix string, v reflect.Type) {
		for i := range v.NumField() {
			f := v.Field(i)
			name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name == "-" {
				continue
			}
			kind, inner := "", f.Type
			list := inner.Kind() == reflect.Slice
			if list {
				inner = inner.Elem()
			}
			switch {
			case inner == reflect.TypeFor[time.Time]():
				kind = "time"
			case inner.Kind() == reflect.Struct:
				kind = "object"
			case inner.Kind() == reflect.String, inner.Kind() == reflect.Bool:
				kind = inner.Kind().String()
			default:
				kind = "number"
			}
			if list {
				kind = "list of " + kind + "s"
			}
			if options != "" {
				kind += ", optional"
			}
			got = append(got, fmt.Sprintf("| `%s%s` | %s |", prefix, name, kind))
			if next := prefix + name; inner.Kind() == reflect.Struct && kind != "time" && kind != "time, optional" {
				if list {
					next += "[]"
				}
				walk(next+".", inner)
			}
		}
	}
	walk("", reflect.TypeFor[control.Status]())
	var want []string
	for line := range strings.Lines(string(doc)) {
		if cells := strings.SplitN(line, "|", 4); len(cells) == 4 && strings.HasPrefix(cells[1], " `") {
			want = append(want, strings.Join(cells[:3], "|")+"|")
		}
	}
	if g, w := strings.Join(got, "\n"), strings.Join(want, "\n"); g != w {
		t.Errorf("the fields are\n%s\nand docs/status.md has\n%s", g, w)
	}
}

func TestCommands(t *testing.T) {
	denied := &use.Denied{By: "lock", Reason: "locked", Hint: "run `muxproxy unlock`"}
	for _, c := range []struct {
		args   string
		err    error
		status int
		calls  string
		stdout string // begins with
		stderr string
	}{
		{"close db", nil, exitYes, "close db", "closed 1 connection\n", ""},
		{"close --all", nil, exitYes, "close ", "closed 2 connections\n", ""},
		{"close other", nil, exitNo, "close other", "", "no connection to other; `muxproxy status` lists them"},
		{"close db", denied, exitFailed, "close db", "", "denied by lock: locked; run `muxproxy unlock`"},
		{"close db", errors.New("a\nb"), exitFailed, "close db", "", `a\nb`},
		{"close", nil, exitUsage, "", "", "give either one TARGET or --all; see `muxproxy close --help`"},
		{"close db --all", nil, exitUsage, "", "", "give either one TARGET or --all; see `muxproxy close --help`"},
		{"close a b", nil, exitUsage, "", "", "give either one TARGET or --all; see `muxproxy close --help`"},
		{"drain db", nil, exitYes, "drain db", "draining 1 connection\n", ""},
		{"drain", nil, exitYes, "drain ", "draining 2 connections\n", ""},
		{"drain other", nil, exitNo, "drain other", "", "no connection to other; `muxproxy status` lists them"},
		{"exists db", nil, exitYes, "", "", ""},
		{"exists other", nil, exitNo, "", "", ""},
		{"exists", nil, exitUsage, "", "", "accepts 1 arg(s), received 0; see `muxproxy exists --help`"},
		{"master stop --drain", nil, exitYes, "stop drain", "the master, pid 0, ends with its last client\n", ""},
		{"master stop", nil, exitYes, "stop", "the master, pid 0, has ended\n", ""},
		{"master stop", denied, exitFailed, "stop", "", "denied by lock: locked; run `muxproxy unlock`"},
		{"master start", nil, exitYes, "", "a master runs, pid 0\n", ""},
		{"master dump", nil, exitYes, "", "goroutine 1:\n\tmain.main()\\x1b\n", ""},
		{"master jump", nil, exitUsage, "", "", "unknown command \"jump\" for \"muxproxy master\"; did you mean \"dump\"?; see `muxproxy master --help`"},
		{"host-key", nil, exitYes, "",
			plainKey + "\n@cert-authority * " + caKey + "\n", ""},
		{"host-key --fingerprint", nil, exitYes, "",
			"SHA256:9QXuV4VdKzWOWf8lHYX6Q7DXhB04IGs4wV+m328bjhs ecdsa-sha2-nistp256\n" +
				"SHA256:tdXASSk9WxLpTQEIQSMYXpU1Liqy+p6Mjugge45HMa4 ssh-ed25519 (CA)\n", ""},
		{"version", nil, exitYes, "", "muxproxy ", ""},
		{"stauts", nil, exitUsage, "", "", "unknown command \"stauts\"; did you mean \"status\"?; see `muxproxy help`"},
		{"compl", nil, exitUsage, "", "", "unknown command \"compl\"; did you mean \"completion\"?; see `muxproxy help`"},
		{"xyzzy", nil, exitUsage, "", "", "unknown command \"xyzzy\"; see `muxproxy help`"},
		{"master stpo", nil, exitUsage, "", "", "unknown command \"stpo\" for \"muxproxy master\"; did you mean \"stop\"?; see `muxproxy master --help`"},
		{"plugin lits", nil, exitUsage, "", "", "unknown command \"lits\" for \"muxproxy plugin\"; did you mean \"list\"?; see `muxproxy plugin --help`"},
		{"status --jsno", nil, exitUsage, "", "", "unknown flag: --jsno; did you mean \"--json\"?; see `muxproxy status --help`"},
		{"status x", nil, exitUsage, "", "", "unknown command \"x\" for \"muxproxy status\"; see `muxproxy status --help`"},
		{"status --bogus", nil, exitUsage, "", "", "unknown flag: --bogus; see `muxproxy status --help`"},
		{"log -n -1", nil, exitUsage, "", "", "-n -1: want a number of lines; see `muxproxy log --help`"},
		{"--help", nil, exitYes, "", "muxproxy shares SSH connections", ""},
	} {
		t.Run(strings.ReplaceAll(c.args, " ", "_"), func(t *testing.T) {
			w := newWorld(t)
			m := &fakeMaster{err: c.err}
			w.serve(m)
			if c.args == "master start" { // one lives already: it answers bridges too
				l, err := paths.Listen(w.dirs.Runtime, paths.MuxSocket)
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
			}
			status, stdout, stderr := w.run(strings.Fields(c.args)...)
			if status != c.status {
				t.Errorf("status %d, want %d", status, c.status)
			}
			if !strings.HasPrefix(stdout, c.stdout) || (c.stdout == "") != (stdout == "") {
				t.Errorf("stdout %q, want %q", stdout, c.stdout)
			}
			want := c.stderr
			if want != "" {
				want = "muxproxy: " + want + "\n"
			}
			if stderr != want {
				t.Errorf("stderr %q, want %q", stderr, want)
			}
			if got := m.called(); got != c.calls {
				t.Errorf("calls %q, want %q", got, c.calls)
			}
		})
	}
}

func TestNoArguments(t *testing.T) {
	status, stdout, stderr := newWorld(t).run()
	if status != exitUsage || stdout != "" || !strings.Contains(stderr, "Available Commands:") {
		t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
}

func TestEmptyTarget(t *testing.T) {
	w := newWorld(t)
	m := &fakeMaster{}
	w.serve(m)
	for _, command := range []string{"close", "drain", "exists"} {
		status, _, stderr := w.run(command, "")
		if status != exitUsage || !strings.Contains(stderr, "TARGET is empty") || m.called() != "" {
			t.Errorf("%s '': status %d, stderr %q, calls %q", command, status, stderr, m.called())
		}
	}
}

func TestNoMaster(t *testing.T) {
	const hint = "no master runs; the next ssh starts one, or `muxproxy master start`\n"
	for _, args := range []string{
		"close db", "close --all", "drain", "exists db", "host-key", "master stop", "master stop --drain", "master dump",
	} {
		t.Run(strings.ReplaceAll(args, " ", "_"), func(t *testing.T) {
			status, stdout, stderr := newWorld(t).run(strings.Fields(args)...)
			if status != exitNo || stdout != "" || stderr != "muxproxy: "+hint {
				t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
			}
		})
	}
	status, stdout, stderr := newWorld(t).run("status")
	if status != exitNo || stdout != hint || stderr != "" {
		t.Errorf("status: %d, stdout %q, stderr %q", status, stdout, stderr)
	}
}

func TestUntrustedPlace(t *testing.T) {
	w := newWorld(t)
	w.serve(&fakeMaster{})
	if err := os.Chmod(w.dirs.Run, 0o770); err != nil {
		t.Fatal(err)
	}
	status, _, stderr := w.run("status")
	if status != exitFailed || !strings.Contains(stderr, "is open to others") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
}

func TestVersion(t *testing.T) {
	version = "9.8.7"
	t.Cleanup(func() { version = "" })
	w := newWorld(t)
	status, stdout, _ := w.run("version", "--json")
	var v versionInfo
	if err := json.Unmarshal([]byte(stdout), &v); err != nil || status != exitYes || v.Version != "9.8.7" || v.Go == "" {
		t.Errorf("status %d, %+v, %v", status, v, err)
	}
	if _, stdout, _ := w.run("version"); !strings.HasPrefix(stdout, "muxproxy 9.8.7") || strings.Count(stdout, "\n") != 1 {
		t.Errorf("%q", stdout)
	}
}

// Every command says what it does and shows an example.
func TestHelp(t *testing.T) {
	w := newWorld(t)
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Name() == "completion" || cmd.Name() == "help" {
			return // cobra's own
		}
		if cmd.Runnable() && cmd.Example == "" || cmd.Short == "" || cmd.Long == "" {
			t.Errorf("%s: no example or no text", cmd.CommandPath())
		}
		args := append(strings.Fields(cmd.CommandPath())[1:], "--help")
		status, stdout, stderr := w.run(args...)
		if status != exitYes || stderr != "" || !strings.Contains(stdout, cmd.Example) || strings.Contains(stdout, "[flags]") {
			t.Errorf("%v: status %d, stderr %q", args, status, stderr)
		}
		for line := range strings.Lines(stdout) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 {
				t.Errorf("%v: %d columns: %q", args, n, line)
			}
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(newRoot(&app{getenv: w.getenv}))
}

func TestMasterFails(t *testing.T) {
	w := newWorld(t)
	delete(w.env, "HOME")
	delete(w.env, "XDG_RUNTIME_DIR")
	status, stdout, stderr := w.run("master")
	var line map[string]any
	if err := json.Unmarshal([]byte(stderr), &line); err != nil {
		t.Fatalf("%q: %v", stderr, err)
	}
	if status != exitFailed || stdout != "" || !strings.Contains(line["error"].(string), "HOME is not set") {
		t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
}

func TestMasterTellsWhyItFails(t *testing.T) {
	w := newWorld(t)
	conn, addr, remove, err := paths.NotifySocket(w.dirs.Run, "notify")
	if err != nil {
		t.Fatal(err)
	}
	defer remove()
	t.Setenv("NOTIFY_SOCKET", addr)
	delete(w.env, "HOME")
	if status, _, _ := w.run("master"); status != exitFailed {
		t.Errorf("status %d", status)
	}
	b := make([]byte, 1024)
	n, err := conn.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(b[:n]); !strings.HasPrefix(got, "STATUS=HOME is not set") || !strings.HasSuffix(got, "\nERRNO=1") {
		t.Errorf("%q", got)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0", 1023: "1023", 1024: "1.0K", 10188: "9.9K", 10189: "10K", 1023<<10 + 511: "1023K", 1<<20 - 1: "1.0M",
		32 << 20: "32M", 5 << 30: "5.0G", 1<<63 - 1: "8.0E",
	} {
		if got := size(n); got != want || len(got) > 5 {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestCut(t *testing.T) {
	for _, c := range []struct {
		in   string
		n    int
		want string
	}{
		{"abcdef", 6, "abcdef"}, {"abcdefg", 6, "abc…fg"}, {"äöüßéèê", 6, "äöü…èê"}, {"\x1b\x1b", 6, `\x1…1b`}, {"", 3, ""},
	} {
		if got := cut(c.in, c.n); got != c.want {
			t.Errorf("cut(%q, %d) = %q, want %q", c.in, c.n, got, c.want)
		}
	}
}

func TestNoLogYet(t *testing.T) {
	w := newWorld(t)
	status, _, stderr := w.run("log")
	if status != exitNo || !strings.Contains(stderr, filepath.Join(w.dirs.State, "master.log")+" yet") {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
}

func TestLog(t *testing.T) {
	w := newWorld(t)
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(w.dirs.State, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var many strings.Builder
	for i := range 100000 {
		many.WriteString("line ")
		many.WriteString(strings.Repeat("x", i%7))
		many.WriteByte('\n')
	}
	lines := strings.SplitAfter(many.String(), "\n")
	write(paths.AuditLog, "audit \x1b[2J\n")
	for _, c := range []struct {
		name, text string
		args       []string
		want       string
	}{
		{"empty", "", nil, ""},
		{"default", many.String(), nil, strings.Join(lines[len(lines)-21:], "")},
		{"none", many.String(), []string{"-n", "0"}, ""},
		{"one", "a\nb\nc\n", []string{"-n", "1"}, "c\n"},
		{"two", "a\nb\nc\n", []string{"-n", "2"}, "b\nc\n"},
		{"all", "a\nb\nc\n", []string{"-n", "3"}, "a\nb\nc\n"},
		{"more than there are", "a\nb\nc\n", []string{"-n", "4"}, "a\nb\nc\n"},
		{"no end of line", "a\nb", []string{"-n", "1"}, "b\n"},
		{"empty lines", "\n\n\n", []string{"-n", "2"}, "\n\n"},
		{"across blocks", many.String(), []string{"-n", "50000"}, strings.Join(lines[len(lines)-50001:], "")},
		{"one long line", strings.Repeat("y", 100000) + "\n", []string{"-n", "1"}, strings.Repeat("y", 100000) + "\n"},
		{"audit", "", []string{"--audit"}, `audit \x1b[2J` + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			write(paths.MasterLog, c.text)
			status, stdout, stderr := w.run(append([]string{"log"}, c.args...)...)
			if status != exitYes || stderr != "" || stdout != c.want {
				t.Errorf("status %d, stderr %q, %d bytes; want %d", status, stderr, len(stdout), len(c.want))
			}
		})
	}
}

// lineWriter hands over what is written to it.
type lineWriter chan string

func (l lineWriter) Write(b []byte) (int, error) {
	l <- string(b)
	return len(b), nil
}

func TestLogFollow(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(w.dirs.State, paths.MasterLog)
	add := func(text string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteString(text)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	add("old\n")
	out := make(lineWriter)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int, 1)
	go func() {
		a := &app{stdout: out, stderr: out, getenv: w.getenv, now: time.Now}
		done <- run(ctx, a, []string{"log", "-f", "-n", "1"})
	}()
	expect := func(want string) {
		t.Helper()
		if got := <-out; got != want+"\n" {
			t.Fatalf("%q, want %q", got, want)
		}
	}
	expect("old")
	add("one\ntw")
	expect("one")
	add("o\n")
	expect("two")
	add("before rotation\n")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	add("after rotation\n")
	expect("before rotation")
	expect("after rotation")
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	add("new\n") // shorter than what was there, so that the cut shows
	expect("new")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	add("made again\n")
	expect("made again")
	cancel()
	if status := <-done; status != exitYes {
		t.Errorf("status %d", status)
	}
}
