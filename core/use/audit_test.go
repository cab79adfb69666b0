package use_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/muxproxy/muxproxy/core/use"
)

func TestAuditRecords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	audit := openAudit(t, use.AuditOptions{Path: path})
	g := use.NewGate(audit)
	run := func(command string, r use.Result) {
		u := someUse(use.Exec)
		u.Command = command
		p, denied := g.Decide(t.Context(), u, nil)
		if denied != nil {
			t.Fatal(denied)
		}
		p.End(r)
	}
	three := uint32(3)
	run("mysql -psecret1", use.Result{Status: "exit", ExitCode: &three, In: 10, Out: 20})
	run("mysql -psecret1", use.Result{Status: "signal", Signal: "TERM"})
	run("mysql -psecret2; id"+strings.Repeat(" ", 100000), use.Result{Status: "cut", Err: "the network\x1b[2J"})
	forward := someUse(use.LocalForward)
	forward.Addr = "localhost:5432\u202e" + strings.Repeat("x", 100000)
	if _, denied := g.Decide(t.Context(), forward, nil); denied != nil {
		t.Fatal(denied)
	}
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "secret") {
		t.Errorf("a secret is in the log:\n%s", text)
	}
	all := records(t, path)
	if len(all) != 7 {
		t.Fatalf("%d records, want 7:\n%s", len(all), text)
	}
	d := all[0]
	for field, want := range map[string]any{
		"record": "decision", "decision": "allow", "kind": "exec", "client": 7.0, "target": "alice@[::1]:2200",
		"alias": "db", "uid": 1000.0, "caller": "muxproxy (4123) <- ssh", "program": "mysql", "command_len": 15.0,
	} {
		if d[field] != want {
			t.Errorf("%s is %v, want %v", field, d[field], want)
		}
	}
	if _, ok := d["took_ms"].(float64); !ok {
		t.Error("no took_ms")
	}
	if h, _ := d["command_hash"].(string); !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(h) {
		t.Errorf("command_hash is %q", h)
	}
	if d["command_hash"] != all[2]["command_hash"] || d["command_hash"] == all[4]["command_hash"] {
		t.Error("equal commands differ, or different ones are equal")
	}
	if _, there := all[4]["program"]; there {
		t.Errorf("program of a command with operators: %v", all[4]["program"])
	}
	for i, want := range []map[string]any{
		{"status": "exit", "exit_code": 3.0, "in": 10.0, "out": 20.0},
		{"status": "signal", "signal": "TERM"},
		{"status": "cut", "error": `the network\x1b[2J`},
	} {
		e := all[2*i+1]
		if e["record"] != "end" || e["id"] != all[2*i]["id"] {
			t.Errorf("end %d: %v", i, e)
		}
		for field, v := range want {
			if e[field] != v {
				t.Errorf("end %d: %s is %v, want %v", i, field, e[field], v)
			}
		}
	}
	f := all[6]
	if addr, _ := f["addr"].(string); !strings.HasPrefix(addr, `localhost:5432\u202exxx`) || len(addr) > 1100 {
		t.Errorf("forward: address %q", addr)
	}
	if f["command_len"] != nil {
		t.Errorf("forward: %v", f)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

func TestAuditKeyIsRandom(t *testing.T) {
	var hashes []any
	for range 2 {
		path := filepath.Join(t.TempDir(), "audit.log")
		audit := openAudit(t, use.AuditOptions{Path: path})
		u := someUse(use.Exec)
		u.Command = "true"
		use.NewGate(audit).Decide(t.Context(), u, nil)
		if err := audit.Close(); err != nil {
			t.Fatal(err)
		}
		hashes = append(hashes, records(t, path)[0]["command_hash"])
	}
	if hashes[0] == hashes[1] {
		t.Error("two logs hash alike: commands can be guessed")
	}
}

func TestAuditRefuses(t *testing.T) {
	dir := t.TempDir()
	link, folder := filepath.Join(dir, "link"), filepath.Join(dir, "folder")
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), link); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{link, folder, filepath.Join(dir, "none", "audit.log")} {
		if a, err := use.OpenAudit(use.AuditOptions{Path: path}); err == nil {
			a.Close()
			t.Errorf("%s was opened", path)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, "elsewhere")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a link was followed: %v", err)
	}
}

func TestAuditRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	const size = 64 << 10
	audits := []*use.Audit{
		openAudit(t, use.AuditOptions{Path: path, MaxSize: size}),
		openAudit(t, use.AuditOptions{Path: path, MaxSize: size}),
	}
	var wg sync.WaitGroup
	for _, a := range audits {
		wg.Go(func() {
			g := use.NewGate(a)
			for range 300 {
				p, _ := g.Decide(t.Context(), someUse(use.Shell), nil)
				p.End(use.Result{Status: "ok"})
			}
		})
	}
	wg.Wait()
	for _, a := range audits {
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		if n := a.Dropped(); n != 0 {
			t.Errorf("%d records dropped", n)
		}
	}
	for _, p := range []string{path, path + ".1"} {
		if len(records(t, p)) == 0 {
			t.Errorf("%s is empty", p)
		}
		// A batch is at most 64 KiB and a record, and goes to an empty file whatever its size.
		if fi, err := os.Stat(p); err != nil || fi.Size() > 2*size+1024 {
			t.Errorf("%s: %v bytes, %v", p, fi.Size(), err)
		}
	}
	files, err := filepath.Glob(path + "*")
	if err != nil || len(files) != 2 {
		t.Errorf("files %v, %v: want the log and one old one", files, err)
	}
}

// One master rotates or somebody removes the file: the other goes on in the new one.
func TestAuditFollowsTheName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	audit := openAudit(t, use.AuditOptions{Path: path})
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	use.NewGate(audit).Decide(t.Context(), someUse(use.Shell), nil)
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	if n, old := len(records(t, path)), len(records(t, path+".1")); n != 1 || old != 0 {
		t.Errorf("%d records in the file, %d in the one moved away; want 1 and 0", n, old)
	}
}

func TestAuditEndsTornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := os.WriteFile(path, []byte(`{"record":"deci`), 0o600); err != nil {
		t.Fatal(err)
	}
	audit := openAudit(t, use.AuditOptions{Path: path})
	use.NewGate(audit).Decide(t.Context(), someUse(use.Shell), nil)
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil || !strings.HasPrefix(string(text), "{\"record\":\"deci\n{\"record\":\"decision\",") {
		t.Errorf("%q, %v", text, err)
	}
}

// A disk that fails stops no use, is reported once, and the log says afterwards what it lacks.
func TestAuditDiskFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	away := dir + ".away"
	path := filepath.Join(dir, "audit.log")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	reports := make(chan error, 10)
	audit := openAudit(t, use.AuditOptions{Path: path, Report: func(err error) { reports <- err }})
	g := use.NewGate(audit)
	decide := func() {
		t.Helper()
		if _, denied := g.Decide(t.Context(), someUse(use.Shell), nil); denied != nil {
			t.Fatal(denied)
		}
	}
	// The folder moves away: the path no longer leads to the open file, and none can be made.
	if err := os.Rename(dir, away); err != nil {
		t.Fatal(err)
	}
	decide()
	if err := <-reports; !strings.Contains(err.Error(), "takes no records, sessions go on without") {
		t.Errorf("report: %v", err)
	}
	decide()
	if err := os.Rename(away, dir); err != nil {
		t.Fatal(err)
	}
	// Whether the second record was lost depends on when the writer came to it.
	decide()
	if err := <-reports; !regexp.MustCompile(`takes records again; [12] were lost`).MatchString(err.Error()) {
		t.Errorf("report: %v", err)
	}
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	lost := 0.0
	all := records(t, path)
	for _, r := range all {
		if r["record"] == "dropped" {
			lost += r["count"].(float64)
		}
	}
	if lost < 1 || lost != float64(audit.Dropped()) || len(all) != 3-int(lost)+1 {
		t.Errorf("%v lost, %d dropped, %d lines", lost, audit.Dropped(), len(all))
	}
	select {
	case err := <-reports:
		t.Errorf("one report too many: %v", err)
	default:
	}
}

func TestAuditFullQueueAndLateRecords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "audit.log")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	hold, held := make(chan struct{}), make(chan struct{})
	var once sync.Once
	audit := openAudit(t, use.AuditOptions{Path: path, Report: func(error) { once.Do(func() { close(held); <-hold }) }})
	g := use.NewGate(audit)
	decide := func() {
		t.Helper()
		if _, denied := g.Decide(t.Context(), someUse(use.Shell), nil); denied != nil {
			t.Fatal(denied)
		}
	}
	// A writer that hangs, as on a dead network file system, is one that waits in Report.
	if err := os.Rename(filepath.Dir(path), filepath.Dir(path)+".away"); err != nil {
		t.Fatal(err)
	}
	decide()
	<-held
	if err := os.Rename(filepath.Dir(path)+".away", filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	const sent = 10000
	for range sent {
		decide()
	}
	before := audit.Dropped()
	if before < sent/2 {
		t.Errorf("%d of %d dropped: the queue has no bound", before, sent)
	}
	close(hold)
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	decisions, lost := 0, 0.0
	for _, r := range records(t, path) {
		switch r["record"] {
		case "decision":
			decisions++
		case "dropped":
			lost += r["count"].(float64)
		}
	}
	if lost != float64(before) || decisions+int(lost) != sent+1 {
		t.Errorf("%d decisions and %v lost of %d; Dropped said %d", decisions, lost, sent+1, before)
	}
	decide() // after Close
	if n := audit.Dropped(); n != before+1 {
		t.Errorf("Dropped is %d after a late record, want %d", n, before+1)
	}
	if err := audit.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestAuditConcurrentClose(t *testing.T) {
	audit := openAudit(t, use.AuditOptions{})
	g := use.NewGate(audit)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				p, _ := g.Decide(t.Context(), someUse(use.Shell), nil)
				p.End(use.Result{Status: "ok"})
			}
		})
	}
	errs := make(chan error, 2)
	for range 2 {
		go func() { errs <- audit.Close() }()
	}
	wg.Wait()
	if err := errors.Join(<-errs, <-errs); err != nil {
		t.Error(err)
	}
}

func ExampleProgram() {
	fmt.Printf("%q\n", use.Program("git-upload-pack '/srv/x.git'"))
	fmt.Printf("%q\n", use.Program("git-upload-pack x; id"))
	// Output:
	// "git-upload-pack"
	// ""
}

// Where records are required, what can't be logged is denied, but for what takes away.
func TestAuditRequired(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "audit.log")
	audit := openAudit(t, use.AuditOptions{Path: path})
	g := use.NewGate(audit)
	decide := func(u use.Use) *use.Denied {
		p, denied := g.Decide(t.Context(), u, nil)
		p.End(use.Result{})
		return denied
	}
	audit.Require(true)
	if d := decide(someUse(use.Shell)); d != nil {
		t.Fatal(d)
	}
	if len(records(t, path)) == 0 {
		t.Error("the permit came before the record")
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if d := decide(someUse(use.Shell)); d == nil || d.By != "audit" || !strings.Contains(d.Reason, "no such file") {
		t.Errorf("without a log: %v", d)
	}
	stop := someUse(use.Control)
	stop.Name = "stop"
	for _, u := range []use.Use{stop, someUse(use.CancelForward)} {
		if d := decide(u); d != nil {
			t.Errorf("%s: %v", u.Kind, d)
		}
	}
	audit.Require(false)
	if d := decide(someUse(use.Shell)); d != nil {
		t.Errorf("not required any more: %v", d)
	}
	audit.Require(true)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if d := decide(someUse(use.Shell)); d != nil {
		t.Errorf("with a log again: %v", d)
	}
	audit.Close()
	if d := decide(someUse(use.Shell)); d == nil || d.By != "audit" {
		t.Errorf("after the log's end: %v", d)
	}
}

func TestAuditFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	audit := openAudit(t, use.AuditOptions{Path: path})
	g := use.NewGate(audit)
	long := strings.Repeat("x", 100_000)
	for _, full := range []bool{false, true} {
		audit.Full(full)
		for _, command := range []string{"mysql -psecret; id\x1b", long} {
			u := someUse(use.Exec)
			u.Command = command
			if _, denied := g.Decide(t.Context(), u, nil); denied != nil {
				t.Fatal(denied)
			}
		}
	}
	if err := audit.Close(); err != nil {
		t.Fatal(err)
	}
	var got []any
	for _, r := range records(t, path) {
		got = append(got, r["command"])
		if r["command_len"] == nil || r["command_hash"] == nil {
			t.Errorf("%v", r)
		}
	}
	if want := []any{nil, nil, `mysql -psecret; id\x1b`, long[:64<<10]}; !reflect.DeepEqual(got, want) {
		t.Errorf("commands %.200v", got)
	}
}
