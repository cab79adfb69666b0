// Package examples_test runs the code blocks of docs/plugins.md.
package examples_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/plugintest"
)

var fence = regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$")

// The blocks make two programs, which are built and checked as the text says: each block that begins a program starts
// anew, shell blocks run where the program is.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile("../docs/plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	run := func(dir, script string) {
		t.Helper()
		cmd := exec.Command("sh", "-euc", script)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "GOFLAGS=-mod=mod", "GOPROXY=off", "GOWORK=off", "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s\n%v\n%s", script, err, out)
		}
	}
	run(root, "go build -mod=readonly -buildvcs=false -o "+bin+"/muxproxy ./cmd/muxproxyd")
	dir := t.TempDir()
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	sums, err := os.ReadFile("../go.sum")
	if err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	for _, block := range fence.FindAllStringSubmatch(string(text), -1) {
		kind, code := block[1], block[2]
		counts[kind]++
		switch {
		case kind == "hcl":
			if _, diags := hclsyntax.ParseConfig([]byte(code), "config.hcl", hcl.InitialPos); diags.HasErrors() {
				t.Errorf("%v\n%s", diags, code)
			}
		case kind == "sh" && strings.Contains(code, "go mod init"):
			// The module as it is here, not as it is published: so there is nothing to get.
			run(dir, strings.Split(code, "go get")[0])
			dir = filepath.Join(dir, "friday")
			_, requires, _ := strings.Cut(string(mod), "\nrequire")
			write("go.mod", "module example.com/friday\n\ngo 1.26.0\n\nrequire github.com/muxproxy/muxproxy v0.0.0\n\nreplace "+
				"github.com/muxproxy/muxproxy => "+root+"\n\nrequire"+requires)
			write("go.sum", string(sums))
		case kind == "sh":
			run(dir, strings.ReplaceAll(code, "go mod tidy\n", "")) // it would fetch what tests of others need
		case kind == "go" && strings.Contains(code, "func Test"):
			write("main_test.go", code)
		case kind == "go":
			name := fmt.Sprintf("%s/%d", t.TempDir(), counts["go"])
			was := dir
			if counts["go"] > 1 {
				dir = filepath.Join(dir, fmt.Sprintf("program%d", counts["go"]))
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			write("main.go", code)
			if dir != was {
				run(dir, "go build -o "+name+" .")
				plugintest.Run(t, plugintest.Options{Path: name})
				dir = was
			}
		}
	}
	if counts["go"] < 3 || counts["sh"] < 3 || counts["hcl"] < 2 {
		t.Errorf("blocks: %v", counts)
	}
	for _, c := range plugin.Capabilities() {
		if !strings.Contains(string(text), "| `"+string(c)+"` |") {
			t.Errorf("the capability %q is missing", c)
		}
	}
}
