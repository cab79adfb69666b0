//go:build unix

package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// build makes the programs that the demo runs.
func build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "github.com/muxproxy/muxproxy/cmd/muxproxy",
		"github.com/muxproxy/muxproxy/cmd/muxproxyd").CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return dir
}

// tempDir makes a short place for everything that is temporary and checks at the end that all of it is gone.
func tempDir(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("", "demo")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", dir)
	t.Cleanup(func() {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("the demo left %v (%v)", left, err)
		}
		os.RemoveAll(dir)
	})
}

// noMaster checks that none of these programs still runs.
func noMaster(t *testing.T, bin string) {
	t.Helper()
	out, err := exec.Command("ps", "-A", "-o", "pid=,args=").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, bin+"/") {
			t.Errorf("this still runs: %s", line)
		}
	}
}

func TestRunMeasuresAndCleansUp(t *testing.T) {
	bin := build(t)
	tempDir(t)
	var stdout, stderr bytes.Buffer
	if err := Run(t.Context(), Options{Stdout: &stdout, Stderr: &stderr, Bin: bin}); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	t.Log(stdout.String())
	for _, want := range []string{
		`plain ssh, median of 5 .* 1\.00 +5\s`,
		`first connection through muxproxy .* 1\s`,
		`shared connection, median of 5 .* 0\s`,
		`plain ssh, 10 at once .* 1\.00 +10\s`,
		`shared connection, 10 at once .* 0\s`,
		`(?s)asked, and told yes.*echo hello.*\nhello\n.*asked, and told no.*cat secret.*denied by confirm`,
		`logged in \(1 TCP connection\)`,
		greet,
	} {
		if !regexp.MustCompile(want).Match(stdout.Bytes()) {
			t.Errorf("no line like %q", want)
		}
	}
	for line := range strings.Lines(stderr.String()) {
		if !strings.HasPrefix(line, "demo: ") {
			t.Errorf("on stderr, beside the progress: %q", line)
		}
	}
	noMaster(t, bin)
}

// cancelAt cancels when a text has been written to it.
type cancelAt struct {
	text   string
	cancel func()

	mu  sync.Mutex // guards all
	all strings.Builder
}

func (c *cancelAt) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all.Write(p)
	if strings.Contains(c.all.String(), c.text) {
		c.cancel()
	}
	return len(p), nil
}

func TestInterruptedRunCleansUp(t *testing.T) {
	bin := build(t)
	for _, text := range []string{"plain ssh, 2 of", "starts the master", "shared connection, 1 of", "shared connection, 2 of", "at once"} {
		t.Run(text, func(t *testing.T) {
			tempDir(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			err := Run(ctx, Options{Stdout: io.Discard, Stderr: &cancelAt{text: text, cancel: cancel}, Bin: bin})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
			noMaster(t, bin)
		})
	}
}

func TestMissingProgramsAreNamed(t *testing.T) {
	bin := t.TempDir()
	err := Run(t.Context(), Options{Stdout: io.Discard, Stderr: io.Discard, Bin: bin})
	if err == nil || !strings.Contains(err.Error(), "no muxproxy in "+bin) {
		t.Errorf("error %v", err)
	}
}

func TestServerRunsCommands(t *testing.T) {
	s, private, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	signer, err := ssh.ParsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	config := &ssh.ClientConfig{User: "demo", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback: ssh.FixedHostKey(s.host.PublicKey()), Timeout: 10 * time.Second}
	client, err := ssh.Dial("tcp", fmt.Sprint("127.0.0.1:", s.port()), config)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, c := range []struct {
		command, in, out, err string
		status                int
	}{
		{command: "true"},
		{command: "exit 77", status: 77},
		{command: "kill -9 $$", status: 255},
		{command: "cat", in: "hi", out: "hi"},
		{command: "echo out; echo err >&2; exit 1", out: "out\n", err: "err\n", status: 1},
		{command: `echo "$GREETING"`, out: "hello\n"},
		{command: "exec 0<&-; echo early", in: strings.Repeat("x", 1<<20), out: "early\n"},
	} {
		session, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if err := session.Setenv("GREETING", "hello"); err != nil {
			t.Error(err)
		}
		var stdout, stderr bytes.Buffer
		session.Stdin, session.Stdout, session.Stderr = strings.NewReader(c.in), &stdout, &stderr
		status := 0
		var exit *ssh.ExitError
		switch err := session.Run(c.command); {
		case errors.As(err, &exit):
			status = exit.ExitStatus()
		case err != nil && c.in == "", err != nil && !errors.Is(err, io.EOF):
			t.Errorf("%q: %v", c.command, err)
		}
		if status != c.status || stdout.String() != c.out || stderr.String() != c.err {
			t.Errorf("%q: status %d, stdout %q, stderr %q", c.command, status, &stdout, &stderr)
		}
	}
	if n := s.count(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

func TestServerTakesOneKeyOnly(t *testing.T) {
	s, _, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	other, otherKey, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	other.close()
	signer, err := ssh.ParsePrivateKey(otherKey)
	if err != nil {
		t.Fatal(err)
	}
	_, err = ssh.Dial("tcp", fmt.Sprint("127.0.0.1:", s.port()), &ssh.ClientConfig{User: "demo",
		Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(s.host.PublicKey()), Timeout: 10 * time.Second})
	if err == nil || !strings.Contains(err.Error(), "unable to authenticate") {
		t.Errorf("error %v", err)
	}
}

// A command that would run for ever ends with the server, and so does a connection that says nothing.
func TestServerCloseEndsEverything(t *testing.T) {
	s, private, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.ParsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	silent, err := net.Dial("tcp", fmt.Sprint("127.0.0.1:", s.port()))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	client, err := ssh.Dial("tcp", fmt.Sprint("127.0.0.1:", s.port()), &ssh.ClientConfig{User: "demo",
		Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(s.host.PublicKey()), Timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	out, err := session.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := session.Start("echo begun; exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("begun\n"))); err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	go func() { s.close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Fatal("close does not return")
	}
}
