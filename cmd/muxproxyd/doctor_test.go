//go:build unix

package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/muxproxy/muxproxy/cmd/muxproxyd/internal/doctor"
)

func TestDoctor(t *testing.T) {
	w, config := setupWorld(t)
	ask := func(wantStatus int, args ...string) doctor.Report {
		t.Helper()
		status, stdout, stderr := w.run(append([]string{"doctor", "--json", "-F", config}, args...)...)
		var r doctor.Report
		if err := json.Unmarshal([]byte(stdout), &r); err != nil || status != wantStatus || stderr != "" {
			t.Errorf("%q: status %d, %v\n%s%s", args, status, err, stdout, stderr)
		}
		var names []string
		for _, res := range r.Results {
			names = append(names, res.Name)
		}
		if names = slices.Compact(names); !slices.Equal(names, doctor.Names()) {
			t.Errorf("%q", names)
		}
		return r
	}
	mend := func(r doctor.Report, name string) string {
		for _, res := range r.Results {
			if res.Name == name && res.State != doctor.OK {
				return res.Mend
			}
		}
		return ""
	}
	// What is wrong is mended by what it says.
	r := ask(exitNo, "db")
	if r.Host != "db" || r.State != doctor.Failure || mend(r, "ssh_config") != "muxproxy setup -F "+config {
		t.Errorf("%+v", r)
	}
	for _, command := range []string{mend(r, "ssh_config") + " --yes --host a", ""} {
		if command == "" { // for another host than those
			command = mend(ask(exitNo, "bob@db:22"), "ssh_config") + " --yes"
		}
		if status, stdout, stderr := w.run(strings.Fields(command)[1:]...); status != exitYes {
			t.Errorf("%s: status %d\n%s%s", command, status, stdout, stderr)
		}
	}
	r = ask(exitYes, "bob@db:22") // the programs are none, which is a warning
	if r.State != doctor.Warning || mend(r, "ssh_config") != "" {
		t.Errorf("%+v", r)
	}
	if status, stdout, _ := w.run("doctor", "-F", config, "db"); status != exitYes || !strings.HasSuffix(stdout, "\n0 failures, 1 warning\n") {
		t.Errorf("status %d\n%s", status, stdout)
	}

	for _, c := range []struct{ args, stderr string }{
		{"doctor -x", "unknown shorthand flag"}, {"doctor a b", "accepts at most 1 arg(s)"}, {"doctor -F none", "-F: want a file"},
		{"doctor @h", `"@h": the user is empty`}, {"doctor h:x", "the port must be a number"},
	} {
		if status, stdout, stderr := w.run(strings.Fields(c.args)...); status != exitUsage || stdout != "" || !strings.Contains(stderr, c.stderr) {
			t.Errorf("%s: status %d\n%s%s", c.args, status, stdout, stderr)
		}
	}
	delete(w.env, "HOME")
	if status, stdout, stderr := w.run("doctor"); status != exitFailed || stdout != "" || !strings.Contains(stderr, "HOME is not set") {
		t.Errorf("status %d\n%s%s", status, stdout, stderr)
	}
}
