package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// The manual has all commands and options that help has, and nothing in it is Markdown by accident.
func TestManual(t *testing.T) {
	w := newWorld(t)
	status, manual, stderr := w.run("manual")
	if status != exitYes || stderr != "" || strings.Contains(manual, "flags\\]") {
		t.Fatalf("status %d, %q\n%s", status, stderr, manual)
	}
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		if !cmd.IsAvailableCommand() || cmd.Name() == "help" {
			return
		}
		if !strings.Contains(manual, "\n### "+plain(cmd.CommandPath())) {
			t.Errorf("%s is not in it", cmd.CommandPath())
		}
		cmd.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
			if f.Name != "help" && !strings.Contains(manual, "**--"+f.Name+"**") {
				t.Errorf("%s --%s is not in it", cmd.CommandPath(), f.Name)
			}
		})
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	for _, cmd := range newRoot(&app{getenv: w.getenv}).Commands() {
		walk(cmd)
	}
	for _, want := range []string{
		"## Synopsis\n\n```\nmuxproxy [-F FILE]", "# muxproxy\n\n", "## exit status\n\n```\n0    yes", "## files\n",
		"### muxproxy config show \\[USER@\\]HOST\\[:PORT\\] \\[--json\\]\n", "\n**-F**, **--ssh-config** FILE\n: the FILE for ssh -F",
		"(as in a Host line of ssh\\_config: \\* ? and !",
	} {
		if !strings.Contains(manual, want) {
			t.Errorf("no %q in it", want)
		}
	}
}
