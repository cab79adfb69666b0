package use_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muxproxy/muxproxy/core/use"
)

func openLock(t *testing.T) (*use.Lock, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lock.json")
	l, err := use.OpenLock(path)
	if err != nil {
		t.Fatal(err)
	}
	return l, path
}

// again is the lock as the next master finds it.
func again(t *testing.T, path string) *use.Lock {
	t.Helper()
	l, err := use.OpenLock(path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The table of the lock: each kind of use, and each control command, locked and not.
func TestLockStopsAllButWhatTakesAway(t *testing.T) {
	l, _ := openLock(t)
	g := l.NewGate(nil, nil)
	never := []string{"lock", "unlock", "close", "drain", "stop", "stop --drain", "restart", "forward remove", "confirm forget"}
	check := func(locked bool) {
		t.Helper()
		for _, kind := range use.Kinds() {
			p, denied := g.Decide(t.Context(), someUse(kind), nil)
			if want := locked && kind != use.CancelForward; (denied != nil) != want {
				t.Errorf("locked %v, %s: %v", locked, kind, denied)
			}
			p.End(use.Result{})
		}
		for _, verb := range append([]string{"reload", "forward add", "allow", "connect", "Unlock", ""}, never...) {
			u := someUse(use.Control)
			u.Name = verb
			_, denied := g.Decide(t.Context(), u, nil)
			if want := locked && !slices.Contains(never, verb); (denied != nil) != want {
				t.Errorf("locked %v, control %q: %v", locked, verb, denied)
			}
		}
		exec := someUse(use.Exec)
		exec.Name = "unlock" // a name counts only for commands
		if _, denied := g.Decide(t.Context(), exec, nil); (denied != nil) != locked {
			t.Errorf("locked %v, exec named unlock: %v", locked, denied)
		}
	}
	check(false)
	must(t, l.Lock(nil))
	check(true)
	must(t, l.Unlock(t.Context(), nil))
	check(false)
	must(t, l.LockSession(use.LockedByScreen))
	check(true)
	must(t, l.UnlockSession(use.LockedByScreen))
	check(false)
}

func TestLockSaysWhoAndWhatToDo(t *testing.T) {
	for _, c := range []struct {
		person  bool
		session []string
		want    string
	}{
		{true, nil, "denied by lock: locked by `muxproxy lock`; run `muxproxy unlock`"},
		{true, []string{use.LockedByScreen}, "denied by lock: locked by `muxproxy lock`; run `muxproxy unlock`"},
		{false, []string{use.LockedByScreen}, "denied by lock: the session is locked; unlock the session"},
		{false, []string{use.LockedBySleep}, "denied by lock: the machine went to sleep; unlock the session, or run `muxproxy unlock`"},
		{false, []string{use.LockedBySleep, use.LockedBySaver},
			"denied by lock: the machine went to sleep, the screen saver is active; unlock the session"},
	} {
		l, _ := openLock(t)
		if c.person {
			must(t, l.Lock(nil))
		}
		for _, by := range c.session {
			must(t, l.LockSession(by))
		}
		if _, denied := l.NewGate(nil, nil).Decide(t.Context(), someUse(use.Shell), nil); denied == nil || denied.Error() != c.want {
			t.Errorf("%+v: %v", c, denied)
		}
	}
}

// What one has locked no other opens, but that a person opens what sleep has locked.
func TestWhoOpensWhat(t *testing.T) {
	l, path := openLock(t)
	by := func(want ...string) {
		t.Helper()
		for _, s := range []use.LockState{l.State(), again(t, path).State()} { // the next master knows the same
			if !slices.Equal(s.By, want) || s.Locked != (len(want) > 0) || s.Since.IsZero() == s.Locked {
				t.Fatalf("%+v, want by %q", s, want)
			}
		}
	}
	must(t, l.LockSession(use.LockedByScreen))
	must(t, l.LockSession(use.LockedByScreen))
	must(t, l.LockSession(use.LockedBySleep))
	must(t, l.Lock(nil))
	by("person", "screen", "sleep")
	if err := l.Lock([]byte("mine now")); err == nil || l.State().Passphrase {
		t.Errorf("a second person took the lock over: %v", err)
	}
	must(t, l.UnlockSession(use.LockedBySaver))
	by("person", "screen", "sleep")
	must(t, l.Unlock(t.Context(), nil))
	by("screen")
	must(t, l.Unlock(t.Context(), nil))
	by("screen")
	must(t, l.Lock(nil))
	must(t, l.UnlockSession(use.LockedByScreen, use.LockedBySaver, use.LockedBySleep))
	by("person")
	must(t, l.Unlock(t.Context(), nil))
	by()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file of an open lock: %v", err)
	}
}

func TestLockPassphrase(t *testing.T) {
	l, path := openLock(t)
	secret := []byte("correct horse")
	must(t, l.Lock(secret))
	if !l.State().Passphrase {
		t.Error("it does not say that it needs a passphrase")
	}
	text, err := os.ReadFile(path)
	must(t, err)
	if bytes.Contains(text, secret) || !bytes.Contains(text, []byte("$2a$")) {
		t.Errorf("the file holds %s", text)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	for _, next := range []*use.Lock{l, again(t, path)} {
		for _, wrong := range []string{"", "correct", "correct horse "} {
			if err := next.Unlock(t.Context(), []byte(wrong)); !errors.Is(err, use.ErrPassphrase) || !next.State().Locked {
				t.Errorf("%q: %v", wrong, err)
			}
		}
	}
	must(t, l.Unlock(t.Context(), secret))
	if l.State().Locked {
		t.Error("still locked")
	}
	if err := l.Lock(bytes.Repeat([]byte("x"), 73)); err == nil || l.State().Locked {
		t.Errorf("a passphrase of which bcrypt would ignore a part: %v", err)
	}
}

// Guesses wait for each other, and the longer the more there were; who gives up stops waiting.
func TestWrongPassphrasesTakeTime(t *testing.T) {
	l, _ := openLock(t)
	must(t, l.Lock([]byte("x")))
	began := time.Now()
	for range 3 {
		if err := l.Unlock(t.Context(), nil); !errors.Is(err, use.ErrPassphrase) {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took < 300*time.Millisecond { // 0 + 100 + 200 ms
		t.Errorf("three guesses took %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Unlock(ctx, []byte("y")); err == nil || !l.State().Locked {
		t.Errorf("given up: %v", err)
	}
}

// A file that can't be understood keeps the lock closed, and a person opens it.
func TestLockFileThatIsBroken(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "not JSON": "locked\n", "of a newer version": `{"person":null,"quorum":3}`, "too long": strings.Repeat(" ", 1<<17),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "lock.json")
			must(t, os.WriteFile(path, []byte(text), 0o600))
			l, err := use.OpenLock(path)
			if err == nil || !strings.Contains(err.Error(), path) || !l.State().Locked {
				t.Fatalf("%v, %+v", err, l.State())
			}
			must(t, l.Unlock(t.Context(), nil))
			if again(t, path).State().Locked {
				t.Error("locked again")
			}
		})
	}
	path := filepath.Join(t.TempDir(), "lock.json")
	must(t, os.Symlink("/dev/null", path))
	if l, err := use.OpenLock(path); err == nil || !l.State().Locked {
		t.Errorf("a link was followed: %v", err)
	}
}

// A disk that takes nothing: locking locks, and opening does not open, for the next master would not know of either.
func TestLockWithoutADisk(t *testing.T) {
	l, path := openLock(t)
	dir := filepath.Dir(path)
	gone := func() { must(t, os.Rename(dir, dir+".away")) }
	back := func() { must(t, os.Rename(dir+".away", dir)) }
	gone()
	if err := l.Lock(nil); err == nil || !strings.Contains(err.Error(), "next master") || !l.State().Locked {
		t.Errorf("%v, %+v", err, l.State())
	}
	back()
	must(t, l.Unlock(t.Context(), nil))
	must(t, l.LockSession(use.LockedByScreen))
	must(t, l.Lock(nil))
	gone()
	if err := l.Unlock(t.Context(), nil); err == nil || !slices.Contains(l.State().By, "person") {
		t.Errorf("%v, %+v", err, l.State())
	}
	back()
}

// The lock that comes while a person is asked counts, and so it does for what comes of a permitted use.
func TestLockMeanwhile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	audit := openAudit(t, use.AuditOptions{Path: path})
	l, _ := openLock(t)
	g := l.NewGate(audit, nil, func(_ context.Context, u use.Use, _ func(string)) *use.Denied {
		if u.Kind == use.Shell {
			must(t, l.Lock(nil))
		}
		return nil
	})
	p, denied := g.Decide(t.Context(), someUse(use.RemoteForward), nil)
	if denied != nil {
		t.Fatal(denied)
	}
	if d := p.Connect(); d != nil {
		t.Error(d)
	}
	if p, denied := g.Decide(t.Context(), someUse(use.Shell), nil); p != nil || denied.By != "lock" {
		t.Errorf("locked while it was decided: %v", denied)
	}
	if d := p.Connect(); d == nil || d.By != "lock" {
		t.Errorf("a connection to a standing forward: %v", d)
	}
	must(t, l.Unlock(t.Context(), nil))
	if d := p.Connect(); d != nil {
		t.Error(d)
	}
	p.End(use.Result{})
	if d := p.Connect(); d == nil {
		t.Error("something came of a use that has ended")
	}
	must(t, audit.Close())
	all := records(t, path)
	var kinds []string
	for _, r := range all {
		if r["record"] == "decision" {
			kinds = append(kinds, r["decision"].(string)+" "+r["kind"].(string))
		}
	}
	if want := []string{"allow remote-forward", "deny shell", "deny remote-forward"}; !slices.Equal(kinds, want) {
		t.Errorf("audit: %q, want %q", kinds, want)
	}
}

func TestLockTellsOfChanges(t *testing.T) {
	l, _ := openLock(t)
	n := 0
	l.OnChange(func() { n++ })
	must(t, l.Lock(nil))
	must(t, l.LockSession(use.LockedBySleep))
	must(t, l.LockSession(use.LockedBySleep))
	must(t, l.UnlockSession(use.LockedByScreen))
	must(t, l.Unlock(t.Context(), nil))
	if n != 3 {
		t.Errorf("%d changes, want 3", n)
	}
}

// A master that drains is locked with the one that lives, which has the file.
func TestLockOfADrainingMaster(t *testing.T) {
	old, path := openLock(t)
	g := old.NewGate(nil, nil)
	locked := func(want bool) {
		t.Helper()
		if _, denied := g.Decide(t.Context(), someUse(use.Shell), nil); (denied != nil) != want || old.State().Locked != want {
			t.Fatalf("%v, %+v, want locked %v", denied, old.State(), want)
		}
	}
	must(t, old.Lock(nil))
	old.Share()
	locked(true)
	living := again(t, path)
	must(t, living.Unlock(t.Context(), nil))
	locked(false)
	must(t, living.Lock([]byte("x")))
	locked(true)
	for name, err := range map[string]error{
		"lock": old.Lock(nil), "lock with a passphrase": old.Lock([]byte("y")), "unlock": old.Unlock(t.Context(), []byte("x")),
	} { // a person who is told so tries again, and reaches the one that lives
		if err == nil || !strings.Contains(err.Error(), "try again") {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, old.LockSession(use.LockedByScreen)) // both see it; only one writes
	if by := again(t, path).State().By; !slices.Equal(by, []string{"person"}) {
		t.Errorf("it wrote %q", by)
	}
	must(t, living.Unlock(t.Context(), []byte("x")))
	locked(true)
	must(t, old.UnlockSession(use.LockedByScreen))
	locked(false)
	must(t, os.WriteFile(path, []byte("?"), 0o600))
	locked(true)
}
