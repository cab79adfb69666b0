//go:build unix

package confirm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// script is a program of sh in a directory that only this user can change.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "askpass")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// What counts as a yes is what counts for ssh (ask_permission in OpenSSH's readpass.c).
func TestRun(t *testing.T) {
	for _, c := range []struct {
		name, script string
		want         verdict
		why          string
	}{
		{"nothing", "exit 0", yes, ""},
		{"an empty line", "echo", yes, ""},
		{"yes", "echo yes", yes, ""},
		{"YES without a line's end", "printf YeS", yes, ""},
		{"a DOS line", `printf 'yes\r\n'`, yes, ""},
		{"an empty line, then text", `printf '\nno\n'`, yes, ""},
		{"no", "echo no", no, ""},
		{"y", "echo y", no, ""},
		{"a blank before", "echo ' yes'", no, ""},
		{"a password", "echo hunter2", no, ""},
		{"yes, but cancelled", "echo yes; exit 1", no, ""},
		{"cancelled", "exit 1", no, ""},
		{"no display", "echo 'Unable to init server' >&2; echo 'cannot open display: :9' >&2; exit 1", no, "cannot open display: :9"},
		{"hostile words", `printf 'a\033[2J\n' >&2; exit 1`, no, `a\x1b[2J`},
		{"crashed", "kill -SEGV $$", noWay, "segmentation fault"},
		{"more than ssh reads", "head -c 5000 /dev/zero", no, ""},
		{"yes, and more than ssh reads", "echo yes; head -c 5000 /dev/zero", no, ""},
		{"a flood that ends", "head -c 10000000 /dev/zero; exit 0", no, ""},
		{"the prompt and its kind", `test "$1" = "a
prompt" -a "$#" = 1 -a "$SSH_ASKPASS_PROMPT" = confirm && exit 0; exit 1`, yes, ""},
		{"the environment", `test "$X" = y -a "$(env | grep -vc '^\(X\|PWD\|_\|SHLVL\|OLDPWD\|SSH_ASKPASS_PROMPT\)=')" = 0; exit $?`, yes, ""},
		{"the directory", `test "$PWD" = /`, yes, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := run(within(t), script(t, c.script), []string{"X=y"}, "a\nprompt")
			if a.verdict != c.want || !strings.Contains(a.why, c.why) || c.why == "" && a.why != "" {
				t.Errorf("%+v, want %v %q", a, c.want, c.why)
			}
		})
	}
	if a := run(within(t), "/nonexistent/askpass", nil, "?"); a.verdict != noWay || !strings.Contains(a.why, "can't be started") {
		t.Errorf("no such program: %+v", a)
	}
}

// With its end, whatever the program has started ends, too, and nothing of it holds the answer up.
func TestRunEnds(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// gone is what of a program's children is left: a reader of the fifo gets EOF when the last of them has ended.
	eof := func(f *os.File) {
		t.Helper()
		if err := f.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		var b [64]byte
		for {
			if _, err := f.Read(b[:]); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("something of it still runs")
			} else if err != nil {
				return
			}
		}
	}
	open := func() *os.File {
		t.Helper()
		f, err := os.OpenFile(fifo, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	t.Run("cancelled", func(t *testing.T) {
		f := open()
		ctx, cancel := context.WithCancel(within(t))
		done := make(chan answer, 1)
		path := script(t, "exec 3>"+fifo+"; trap '' TERM HUP INT; sleep 1000 & echo up >&3; wait; wait")
		go func() { done <- run(ctx, path, []string{"PATH=" + os.Getenv("PATH")}, "?") }()
		for b := make([]byte, 8); ; {
			if n, _ := f.Read(b); n > 0 {
				break
			}
			time.Sleep(time.Millisecond) // polling: a fifo without a writer reads as ended
		}
		cancel()
		if a := <-done; a.verdict != unanswered {
			t.Errorf("%+v", a)
		}
		eof(f)
	})
	t.Run("answered", func(t *testing.T) {
		f := open()
		path := script(t, "exec 3>"+fifo+"; sleep 1000 & exit 0")
		if a := run(within(t), path, []string{"PATH=" + os.Getenv("PATH")}, "?"); a.verdict != yes {
			t.Errorf("%+v", a)
		}
		eof(f)
	})
	t.Run("left its group", func(t *testing.T) {
		pid := filepath.Join(dir, "pid")
		path := script(t, "setsid sh -c 'echo $$ >"+pid+".new; mv "+pid+".new "+pid+"; exec sleep 1000' & while ! test -e "+pid+"; do sleep 0.01; done; echo yes")
		a := run(within(t), path, []string{"PATH=" + os.Getenv("PATH")}, "?")
		b, err := os.ReadFile(pid)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		defer syscall.Kill(n, syscall.SIGKILL)
		if a.verdict != yes {
			t.Errorf("%+v", a)
		}
	})
}

// Only a program that nobody else can change asks.
func TestProgram(t *testing.T) {
	good := script(t, "exit 0")
	home := filepath.Dir(good)
	t.Setenv("HOME", home)
	real, err := filepath.EvalSymlinks(good)
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(good, link); err != nil {
		t.Fatal(err)
	}
	for _, named := range []string{good, link, "~/askpass"} {
		if got, err := program(named); err != nil || got != real {
			t.Errorf("%s: %q, %v", named, got, err)
		}
	}
	with := func(mode os.FileMode, dir os.FileMode) string {
		t.Helper()
		path := script(t, "exit 0")
		if err := errors.Join(os.Chmod(path, mode), os.Chmod(filepath.Dir(path), dir)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	open := filepath.Join(t.TempDir(), "link") // in a directory in which others can lead it to /bin/true
	if err := errors.Join(os.Symlink(good, open), os.Chmod(filepath.Dir(open), 0o777)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ path, want string }{
		{open, "can be changed by others (mode 0777)"},
		{with(0o722, 0o700), "can be changed by others (mode 0722)"},
		{with(0o770, 0o700), "can be changed by others (mode 0770)"},
		{with(0o700, 0o777), "can be changed by others (mode 0777)"},
		{with(0o600, 0o700), "is not a program"},
		{home, "is not a program"},
		{filepath.Join(home, "nothing"), "no such file"},
	} {
		if _, err := program(c.path); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.path, err, c.want)
		}
	}
	for _, path := range []string{with(0o755, 0o755), with(0o700, 0o775), with(0o700, 0o777|os.ModeSticky)} {
		if _, err := program(path); err != nil {
			t.Error(err)
		}
	}
	before := programs
	defer func() { programs = before }()
	programs = []string{"/nonexistent/a", good}
	if got, err := program(""); err != nil || got != real {
		t.Errorf("%q, %v", got, err)
	}
	programs = programs[:1]
	if _, err := program(""); !errors.Is(err, errNoAskpass) {
		t.Error(err)
	}
	for _, p := range before {
		if !filepath.IsAbs(p) {
			t.Errorf("%s is relative", p)
		}
	}
	if fmt.Sprint(before[0]) != "/usr/bin/ssh-askpass" {
		t.Error("what an administrator chose comes first")
	}
}
