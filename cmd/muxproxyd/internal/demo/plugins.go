package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/core/use"
)

// Where the demo's server answers a request, and with what.
const (
	site  = "intranet.example"
	greet = "hello from " + site + ", which only the server can reach"
)

// showPlugins shows what the built-in plugins do: a use that is asked about, a connection that outlives its first client,
// and curl through a SOCKS forward. It is for the demo's own server: a user's host is not the place for it.
func (d *demo) showPlugins(ctx context.Context) error {
	socks, err := freePort()
	if err != nil {
		return err
	}
	asked, policy := filepath.Join(d.dir, "asked"), filepath.Join(d.dir, "config", "muxproxy", "config.hcl")
	// In a person's place: it writes down what it is asked, and says no to what is about a secret.
	askpass := fmt.Sprintf("#!/bin/sh\nprintf '%%s\\n' \"$1\" >%s\ncase $1 in *secret*) exit 1;; esac\n", shellQuote(asked))
	text := fmt.Sprintf(`host %q {
  confirm {
    ask     = "always"
    on      = ["exec"]
    display = "caller" # the demo can't count on a desktop's session
  }
  persist {
    idle = "10m"
  }
  forward {
    dynamic "127.0.0.1:%d" {}
  }
}
`, d.host, socks)
	head := fmt.Sprintf("master {\n  ssh_config = %q\n}\nplugin \"confirm\" {\n  askpass = %q\n}\n", filepath.Join(d.dir, "ssh_config"),
		filepath.Join(d.dir, "askpass"))
	if err := os.MkdirAll(filepath.Dir(policy), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(d.dir, "askpass"), []byte(askpass), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(policy, []byte(head+text), 0o600); err != nil {
		return err
	}
	d.progress("the plugins confirm, persist and forward")
	if out, err := d.muxproxy(ctx, "master", "reload").CombinedOutput(); err != nil {
		return fmt.Errorf("muxproxy master reload: %w: %s", err, bytes.TrimSpace(out))
	}
	var say strings.Builder
	fmt.Fprintf(&say, "\nWhat the plugins do, by this policy:\n\n%s\n", indent(text))

	before := d.conns()
	for _, command := range []string{"echo hello", "cat secret"} {
		fmt.Fprintf(&say, "$ ssh %s %s\n", d.host, command)
		cmd := d.client(ctx, d.shared, false)
		cmd.Args[len(cmd.Args)-1] = command
		cmd.Env = append(slices.Clone(cmd.Env), "DISPLAY=:demo") // which nobody opens
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		question, readErr := os.ReadFile(asked)
		if readErr != nil {
			return fmt.Errorf("nobody was asked: %w: %s", readErr, bytes.TrimSpace(stderr.Bytes()))
		}
		var exit *exec.ExitError
		switch {
		case err == nil:
			fmt.Fprintf(&say, "asked, and told yes (by a script here):\n%s%s", indent(string(question)), out)
		case errors.As(err, &exit):
			fmt.Fprintf(&say, "asked, and told no:\n%s%s(exit status %d)\n", indent(string(question)), said(stderr.String()), exit.ExitCode())
		default:
			return d.failed(command, err)
		}
		if err := os.Remove(asked); err != nil {
			return err
		}
	}
	fmt.Fprintf(&say, "\nThe first of these has logged in (%d TCP connection) and left; its connection served the second.\n\n", d.conns()-before)

	curl, err := exec.LookPath("curl")
	if err != nil {
		return errors.New("the demo of a SOCKS forward needs curl (package curl)")
	}
	address := fmt.Sprintf("socks5h://127.0.0.1:%d", socks)
	cmd := exec.CommandContext(ctx, curl, "-sS", "--max-time", "20", "--proxy", address, "http://"+site+"/")
	cmd.Env = d.env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("curl through the forward: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	fmt.Fprintf(&say, "$ curl --proxy %s http://%s/\n%s", address, site, out)
	_, err = d.Stdout.Write([]byte(say.String()))
	return err
}

// muxproxy is a command of it.
func (d *demo) muxproxy(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(d.Bin, "muxproxy"), args...)
	cmd.Env, cmd.WaitDelay = d.env, time.Second
	d.began = true
	return cmd
}

// said are the lines of muxproxy's in what an ssh has said.
func said(stderr string) string {
	var out strings.Builder
	for line := range strings.Lines(stderr) {
		if strings.HasPrefix(line, "muxproxy: ") {
			fmt.Fprintln(&out, use.Printable(strings.TrimRight(line, "\r\n")))
		}
	}
	return out.String()
}

func indent(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		fmt.Fprintf(&out, "    %s\n", use.Printable(strings.TrimRight(line, "\r\n")))
	}
	return out.String()
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
