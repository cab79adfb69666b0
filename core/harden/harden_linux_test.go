package harden

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary plays the process to be hardened: it says which thread is its own, waits for a line, hardens itself and
// tells how that went and what it is then.
func TestMain(m *testing.M) {
	if os.Getenv("HARDEN_TEST_ROLE") == "" {
		os.Exit(m.Run())
	}
	threads := make(chan int)
	go func() {
		runtime.LockOSThread()
		threads <- unix.Gettid()
		select {} // stays on this thread, which the test may stop
	}()
	fmt.Println(<-threads)
	bufio.NewReader(os.Stdin).ReadString('\n')
	var core unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_CORE, &core)
	core.Cur = core.Max // most shells set it to 0
	unix.Setrlimit(unix.RLIMIT_CORE, &core)
	err := Process()
	fmt.Println("traced:", errors.Is(err, ErrTraced))
	fmt.Println("error:", err)
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	fmt.Println("dumpable:", dumpable, err)
	err = unix.Getrlimit(unix.RLIMIT_CORE, &core)
	fmt.Println("core:", core.Cur, err)
	fmt.Printf("umask: %03o\n", unix.Umask(0))
	os.Exit(0)
}

type hardened struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	thread int // one that is not the first
}

func start(t *testing.T) *hardened {
	t.Helper()
	p := &hardened{cmd: exec.Command(os.Args[0])}
	p.cmd.Env = append(os.Environ(), "HARDEN_TEST_ROLE=1", "GORACE=atexit_sleep_ms=0")
	p.cmd.Stderr = os.Stderr
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	})
	line, err := p.out.ReadString('\n')
	if err == nil {
		p.thread, err = strconv.Atoi(strings.TrimSpace(line))
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// harden lets it go on and returns what it says, by the word before the colon.
func (p *hardened) harden(t *testing.T) map[string]string {
	t.Helper()
	io.WriteString(p.in, "\n") // if it is gone there is nothing to read
	said := map[string]string{}
	for {
		line, err := p.out.ReadString('\n')
		if err != nil {
			return said
		}
		word, what, _ := strings.Cut(strings.TrimSpace(line), ": ")
		said[word] = what
	}
}

func TestProcess(t *testing.T) {
	said := start(t).harden(t)
	for word, want := range map[string]string{
		"error": "<nil>", "dumpable": "0 <nil>", "core": "0 <nil>", "umask": "077",
	} {
		if said[word] != want {
			t.Errorf("%s: %q, want %q", word, said[word], want)
		}
	}
}

// trace attaches to a thread, tells how that went, lets it run with all its signals until it has ended, and tells why it
// waits no more.
func trace(thread int, attached chan<- error) {
	runtime.LockOSThread() // what a thread traces is its own
	defer runtime.UnlockOSThread()
	err := unix.PtraceSeize(thread)
	attached <- err
	for err == nil {
		var ws unix.WaitStatus
		if _, err = unix.Wait4(thread, &ws, unix.WALL, nil); err == nil && ws.Stopped() {
			err = unix.PtraceCont(thread, int(ws.StopSignal()))
		}
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ESRCH) { // ended between the two calls
			err = nil
		}
	}
	attached <- err
}

// A tracer can be attached to any thread.
func TestProcessIsTraced(t *testing.T) {
	for _, first := range []bool{true, false} {
		t.Run(fmt.Sprintf("first thread %v", first), func(t *testing.T) {
			p := start(t)
			thread := p.thread
			if first {
				thread = p.cmd.Process.Pid
			}
			attached := make(chan error)
			go trace(thread, attached)
			if err := <-attached; err != nil {
				t.Fatal(err)
			}
			said := p.harden(t)
			if err := <-attached; !errors.Is(err, unix.ECHILD) {
				t.Errorf("the tracer: %v", err)
			}
			if said["traced"] != "true" || said["dumpable"] != "0 <nil>" {
				t.Errorf("it says %v", said)
			}
		})
	}
}

func TestCheckTracers(t *testing.T) {
	for _, c := range []struct {
		name    string
		threads map[string]string
		want    string // part of the error
	}{
		{"nobody", map[string]string{"1": "Name:\tx\nTracerPid:\t0\nUid:\t0\n", "2": "TracerPid:\t0\n"}, ""},
		{"first", map[string]string{"1": "TracerPid:\t77\n", "2": "TracerPid:\t0\n"}, "process 77"},
		{"second", map[string]string{"1": "TracerPid:\t0\n", "2": "TracerPid:\t77\n"}, "process 77"},
		{"no such line", map[string]string{"1": "Name:\tx\n"}, "can't find out"},
		{"no number", map[string]string{"1": "TracerPid:\tx\n"}, "can't find out"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for id, status := range c.threads {
				if err := os.Mkdir(filepath.Join(dir, id), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, id, "status"), []byte(status), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Mkdir(filepath.Join(dir, "3"), 0o700); err != nil { // one that has just ended
				t.Fatal(err)
			}
			err := checkTracers(dir)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
	if err := checkTracers(filepath.Join(t.TempDir(), "gone")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("without /proc: %v", err)
	}
}
