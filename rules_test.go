// Package muxproxy_test keeps the rules about which package may import which.
package muxproxy_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/muxproxy/muxproxy/"

// pkg is what `go list` says of a package.
type pkg struct {
	ImportPath string
	Name       string
	Doc        string
	Standard   bool
	GoFiles    []string
	Imports    []string // direct
	Deps       []string // transitive
}

// ours is the import path within the module, "" for other modules' packages.
func ours(path string) string {
	rest, ok := strings.CutPrefix(path, module)
	if !ok {
		return ""
	}
	return rest
}

func under(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// breaches returns a line for every rule that a package breaks.
func breaches(pkgs map[string]pkg) []string {
	var found []string
	report := func(p pkg, format string, args ...any) {
		found = append(found, ours(p.ImportPath)+" "+fmt.Sprintf(format, args...))
	}
	// apart are packages that don't know each other; pool and relay see the first three through interfaces of their own.
	apart := []string{"core/local", "core/upstream", "core/policy"}
	for _, p := range pkgs {
		name := ours(p.ImportPath)
		if name == "" {
			continue
		}
		if len(p.GoFiles) > 0 {
			want := "Package " + p.Name + " "
			if p.Name == "main" {
				want = "Command " + name[strings.LastIndexByte(name, '/')+1:] + " "
			}
			if !strings.HasPrefix(p.Doc, want) {
				report(p, "has no comment that begins with %q", want)
			}
		}
		for _, dep := range p.Imports {
			d := ours(dep)
			if under(d, "plugins") && name != "cmd/muxproxyd" && !under(name, "plugins") {
				report(p, "imports %s: only cmd/muxproxyd does, plugins are processes of their own", d)
			}
			if under(name, "plugins") && d != "" && d != "core/plugin" && d != name {
				report(p, "imports %s: a plugin imports core/plugin and nothing else of ours", d)
			}
			if d == "core/control/controlpb" && name != "core/control" {
				report(p, "imports %s: messages stay in the package that speaks them", d)
			}
			if d == "core/plugin/pluginpb" && !under(name, "core/plugin") && name != "core/pluginhost" {
				report(p, "imports %s: messages stay in the packages that speak them", d)
			}
		}
		for _, dep := range p.Deps {
			d := ours(dep)
			if under(name, "core") && under(d, "plugins") {
				report(p, "depends on %s: core never does", d)
			}
			if (slices.Contains(apart, name) || name == "core/pool" || name == "core/relay") && slices.Contains(apart, d) {
				report(p, "depends on %s: an interface belongs between them", d)
			}
			if name == "core/policy" && d != "" && !slices.Contains([]string{"core/use", "core/paths", "core/wire", "core/sshconfig"}, d) {
				report(p, "depends on %s: it only looks things up", d)
			}
			if under(name, "core/plugin") && under(d, "core") && !under(d, "core/plugin") {
				report(p, "depends on %s: it is all that plugin authors import", d)
			}
			if under(name, "core/plugin") && (under(dep, "github.com/hashicorp/hcl") || under(dep, "golang.org/x/crypto/ssh")) {
				report(p, "depends on %s: plugin authors would be tied to its version", dep)
			}
			if name == "cmd/muxproxy" && !pkgs[dep].Standard && !under(dep, "golang.org/x/sys") &&
				!slices.Contains([]string{"core/wire", "core/bridge", "core/sshconfig", "core/paths"}, d) {
				report(p, "depends on %s: it is started for every ssh, and what it links costs time", dep)
			}
		}
		if under(name, "core/control/controlpb") || under(name, "core/plugin/pluginpb") {
			for _, file := range p.GoFiles {
				if file != "doc.go" && !strings.HasSuffix(file, ".pb.go") {
					report(p, "has %s: generated code and nothing else", file)
				}
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// load lists the module's packages and all that they import, as they are for one operating system.
func load(t *testing.T, goos string) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Name,Doc,Standard,GoFiles,Imports,Deps", "./...")
	cmd.Env = append(os.Environ(), "GOOS="+goos, "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	pkgs := map[string]pkg{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return pkgs
		}
		if err != nil {
			t.Fatal(err)
		}
		pkgs[p.ImportPath] = p
	}
}

func TestRules(t *testing.T) {
	for _, goos := range []string{"linux", "darwin", "windows"} {
		t.Run(goos, func(t *testing.T) {
			pkgs := load(t, goos)
			for _, name := range []string{"cmd/muxproxy", "cmd/muxproxyd", "core/use", "core/policy", "core/control/controlpb",
				"core/plugin/pluginpb"} {
				if _, ok := pkgs[module+name]; !ok {
					t.Errorf("%s is not among the %d packages found", name, len(pkgs))
				}
			}
			for _, b := range breaches(pkgs) {
				t.Error(b)
			}
		})
	}
}

// Each rule finds what breaks it.
func TestRulesBite(t *testing.T) {
	const x = "example.com/x"
	for _, c := range []struct {
		name          string
		imports, deps []string
		files         []string
		doc           string
		want          string
	}{
		{"core/use", nil, []string{"core/paths", x}, nil, "", ""},
		{"core/use", []string{"plugins/confirm"}, nil, nil, "", "only cmd/muxproxyd does"},
		{"core/use", nil, []string{"plugins/confirm"}, nil, "", "core never does"},
		{"cmd/muxproxyd", []string{"plugins/confirm"}, nil, nil, "", ""},
		{"cmd/muxproxy", nil, []string{"core/wire", "core/bridge", "core/sshconfig", "core/paths", "golang.org/x/sys/unix", "fmt"}, nil, "", ""},
		{"cmd/muxproxy", nil, []string{"core/use"}, nil, "", "started for every ssh"},
		{"cmd/muxproxy", nil, []string{"core/policy"}, nil, "", "started for every ssh"},
		{"cmd/muxproxy", nil, []string{x}, nil, "", "started for every ssh"},
		{"cmd/muxproxy", nil, []string{"golang.org/x/sysother"}, nil, "", "started for every ssh"},
		{"plugins/confirm", []string{"core/plugin", x}, nil, nil, "", ""},
		{"plugins/confirm", []string{"core/use"}, nil, nil, "", "nothing else of ours"},
		{"plugins/confirm", []string{"plugins/persist"}, nil, nil, "", "nothing else of ours"},
		{"core/plugin", nil, []string{"core/plugin/pluginpb", x}, nil, "", ""},
		{"core/plugin", nil, []string{"core/use"}, nil, "", "all that plugin authors import"},
		{"core/plugin", nil, []string{"golang.org/x/crypto/ssh"}, nil, "", "tied to its version"},
		{"core/plugin", nil, []string{"github.com/hashicorp/hcl/v2"}, nil, "", "tied to its version"},
		{"core/local", nil, []string{"core/upstream"}, nil, "", "interface belongs between"},
		{"core/upstream", nil, []string{"core/policy"}, nil, "", "interface belongs between"},
		{"core/policy", nil, []string{"core/local"}, nil, "", "interface belongs between"},
		{"core/policy", nil, []string{"core/use", "core/paths", "core/wire", "github.com/hashicorp/hcl/v2"}, nil, "", ""},
		{"core/policy", nil, []string{"core/master"}, nil, "", "only looks things up"},
		{"core/pool", nil, []string{"core/upstream"}, nil, "", "interface belongs between"},
		{"core/relay", nil, []string{"core/local"}, nil, "", "interface belongs between"},
		{"core/master", nil, []string{"core/local", "core/upstream"}, nil, "", ""},
		{"core/control", []string{"core/control/controlpb"}, nil, nil, "", ""},
		{"core/master", []string{"core/control/controlpb"}, nil, nil, "", "messages stay"},
		{"core/control/controlpb", nil, nil, []string{"doc.go", "control.pb.go", "control_grpc.pb.go"}, "", ""},
		{"core/control/controlpb", nil, nil, []string{"helper.go"}, "", "generated code and nothing else"},
		{"core/pluginhost", []string{"core/plugin/pluginpb"}, nil, nil, "", ""},
		{"core/plugin/plugintest", []string{"core/plugin/pluginpb"}, nil, nil, "", ""},
		{"core/master", []string{"core/plugin/pluginpb"}, nil, nil, "", "messages stay"},
		{"core/plugin/pluginpb", nil, nil, []string{"doc.go", "plugin.pb.go"}, "", ""},
		{"core/plugin/pluginpb", nil, nil, []string{"helper.go"}, "", "generated code and nothing else"},
		{"core/use", nil, nil, nil, "package use is a comment", "no comment"},
		{"core/use", nil, nil, nil, "Package used says what.", "no comment"},
		{"cmd/muxproxy", nil, nil, nil, "Package main is it.", "no comment"},
	} {
		full := func(list []string) []string {
			var out []string
			for _, path := range list {
				if under(path, "core") || under(path, "plugins") {
					path = module + path
				}
				out = append(out, path)
			}
			return out
		}
		p := pkg{
			ImportPath: module + c.name, Name: c.name[strings.LastIndexByte(c.name, '/')+1:], Doc: c.doc,
			GoFiles: c.files, Imports: full(c.imports), Deps: full(slices.Concat(c.imports, c.deps)),
		}
		if len(p.GoFiles) == 0 {
			p.GoFiles = []string{"a.go"}
			if strings.HasSuffix(c.name, "pb") {
				p.GoFiles[0] = "a.pb.go"
			}
		}
		if p.Doc == "" {
			p.Doc = "Package " + p.Name + " is here."
		}
		if under(c.name, "cmd") {
			if c.doc == "" {
				p.Doc = "Command " + p.Name + " is here."
			}
			p.Name = "main"
		}
		got := breaches(map[string]pkg{p.ImportPath: p, "fmt": {ImportPath: "fmt", Standard: true}})
		if (c.want == "") != (len(got) == 0) || c.want != "" && !strings.Contains(strings.Join(got, "\n"), c.want) {
			t.Errorf("%s with %q, %q, %q, %q: %q, want %q", c.name, c.imports, c.deps, c.files, c.doc, got, c.want)
		}
	}
}
