// Package auditlog_test runs the plugin in Python.
package auditlog_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/muxproxy/muxproxy/core/plugin/plugintest"
)

// install puts the plugin and its generated stubs into a directory.
func install(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("./generate", dir).CombinedOutput(); err != nil {
		t.Fatalf("generate: %v\n%s", err, out)
	}
	b, err := os.ReadFile("muxproxy-plugin-auditlog")
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte("\n")); n >= 150 {
		t.Errorf("the plugin has %d lines", n)
	}
	path := filepath.Join(dir, "muxproxy-plugin-auditlog")
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConformance(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	own, err := json.Marshal(map[string]string{"file": file})
	if err != nil {
		t.Fatal(err)
	}
	plugintest.Run(t, plugintest.Options{Path: install(t), Plugin: string(own), Log: func(line string) { t.Log(line) }})
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	if len(lines) != 400 { // the decisions and ends of the suite's 1000 events
		t.Errorf("%d lines", len(lines))
	}
	var line map[string]any
	if err := json.Unmarshal(lines[0], &line); err != nil || line["event"] != "decision" || line["host"] != "test.example.com" {
		t.Errorf("%s: %v", lines[0], err)
	}
}
