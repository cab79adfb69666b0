package sshconfig

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// The test binary plays the ssh, under that name, and the process that ssh starts.
func TestMain(m *testing.M) {
	switch os.Getenv("TEST_ROLE") {
	case "ssh":
		os.Exit(play("shell"))
	case "shell": // a shell or a wrapper between the two
		os.Exit(play("bridge"))
	case "bridge":
		p, ok := FindParent()
		args, ok2 := FromParents()
		if ok != ok2 || !slices.Equal(args, p.Args) {
			os.Exit(3)
		}
		json.NewEncoder(os.Stdout).Encode(p)
		return
	}
	os.Exit(m.Run())
}

func play(role string) int {
	cmd := &exec.Cmd{
		Path: os.Getenv("TEST_SELF"), Args: []string{role}, Env: append(os.Environ(), "TEST_ROLE="+role),
		Stdout: os.Stdout, Stderr: os.Stderr,
	}
	if cmd.Run() != nil {
		return 1
	}
	return 0
}

func TestFindParent(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"ssh", "notssh"} {
		copyFile(t, self, filepath.Join(dir, name))
	}
	for _, tc := range []struct {
		exe  string
		argv []string
		want bool
	}{
		{"ssh", []string{"anything", "-p", "22", "a b", "", "host"}, true},
		{"notssh", []string{"ssh", "host"}, false}, // a name is not an executable
	} {
		exe := filepath.Join(dir, tc.exe)
		cmd := &exec.Cmd{Path: exe, Args: tc.argv, Env: append(os.Environ(), "TEST_ROLE=ssh", "TEST_SELF="+self), Stderr: os.Stderr}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // an ssh above the tests is out of sight
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		var p Parent
		if err := json.Unmarshal(out, &p); err != nil {
			t.Fatalf("%v: %q", err, out)
		}
		if !tc.want {
			if p.PID != 0 || p.Args != nil {
				t.Errorf("%s: found %+v", tc.exe, p)
			}
			continue
		}
		if p.PID != cmd.Process.Pid || p.Exe != exe || !slices.Equal(p.Args, tc.argv[1:]) {
			t.Errorf("got %+v", p)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err2 := out.Close(); err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
}
