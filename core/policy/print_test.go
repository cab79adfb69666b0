//go:build unix

package policy

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/creack/pty"
)

// Colours are for terminals, and for people who want them.
func TestColor(t *testing.T) {
	_, diags := Parse("config.hcl", []byte("x {\n}\n"), Options{})
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "xterm")
	if err := diags.Write(file, Color(file)); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(file.Name()); err != nil || strings.Contains(string(text), "\x1b") {
		t.Errorf("%q, %v", text, err)
	}
	for _, c := range []struct {
		name, value string
		want        bool
	}{{"TERM", "xterm", true}, {"TERM", "dumb", false}, {"NO_COLOR", "1", false}} {
		t.Run(c.name+"="+c.value, func(t *testing.T) {
			t.Setenv(c.name, c.value)
			master, tty, err := pty.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer master.Close()
			if err := diags.Write(tty, Color(tty)); err != nil {
				t.Fatal(err)
			}
			tty.Close() // what was written stays readable; after it Linux says EIO
			text, _ := io.ReadAll(master)
			if !strings.Contains(string(text), "unknown block") || strings.Contains(string(text), "\x1b") != c.want {
				t.Errorf("%q", text)
			}
		})
	}
}
