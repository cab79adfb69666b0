package main

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/muxproxy/muxproxy/core/bridge"
)

// newTopics are help without a command: `muxproxy help files`.
func newTopics() []*cobra.Command {
	return []*cobra.Command{
		{
			Use:   "exit-status",
			Short: "what commands end with",
			Long: `0    yes, or done
1    no: what was asked for is not so, or is not there
2    the command line is wrong
255  it could not be done`,
		},
		{
			Use:   "environment",
			Short: "variables that are looked at",
			Long: `MUXPROXY_BYPASS  other than 0 and empty: ssh connects without the master
MUXPROXY_CONFIG  the policy file, instead of config.hcl
MUXPROXY_DEBUG   1, where the master is started: the steps of each login are in
                 its log
NO_COLOR         no colours
XDG_CONFIG_HOME  instead of ~/.config
XDG_DATA_HOME    instead of ~/.local/share
XDG_RUNTIME_DIR  where the sockets are, if it is the user's own, with mode 0700
XDG_STATE_HOME   instead of ~/.local/state`,
		},
		{
			Use:   "files",
			Short: "where things are",
			Long: `~/.config/muxproxy/config.hcl
    the policy; see muxproxy.hcl(5)
~/.local/share/muxproxy/plugins/, ../libexec/muxproxy/
    plugins, named muxproxy-plugin-NAME; the latter beside the directory that
    muxproxyd is in
~/.local/state/muxproxy/known_hosts
    public keys of the masters' certificate authorities, for ssh
~/.local/state/muxproxy/master.log, audit.log
    what the master did, and what was asked of it
~/.local/state/muxproxy/run-HOSTNAME/
    locks, what "muxproxy lock" has locked, and a link to the sockets
$XDG_RUNTIME_DIR/muxproxy/, /run/user/UID/muxproxy/
    the sockets; where there is neither, they are in run-HOSTNAME`,
		},
	}
}

// newManual prints all help as Markdown. tools/man makes muxproxy(1) of it.
func newManual(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "manual",
		Short:   "print all help as Markdown",
		Long:    `Prints all help as Markdown, of which the manual page is made.`,
		Example: "  muxproxy manual > manual.md",
		Args:    cobra.NoArgs,
		Hidden:  true,
		RunE:    func(cmd *cobra.Command, _ []string) error { return writeManual(a.stdout, cmd.Root()) },
	}
}

func writeManual(w io.Writer, root *cobra.Command) error {
	b := bufio.NewWriter(w)
	synopsis, rest, _ := strings.Cut(bridge.Usage, "\n\n")
	fmt.Fprint(b, "## Synopsis\n\n")
	literal(b, strings.ReplaceAll(synopsis, "       ", "")[len("usage: "):])
	fmt.Fprintf(b, "# %s\n\n", root.Name())
	prose(b, root.Long)
	fmt.Fprint(b, "## Commands\n\n")
	var topics []*cobra.Command
	for _, cmd := range root.Commands() {
		if cmd.IsAdditionalHelpTopicCommand() {
			topics = append(topics, cmd)
		} else {
			manualOf(b, cmd)
		}
	}
	fmt.Fprint(b, "## As ProxyCommand\n\n")
	literal(b, rest)
	for _, topic := range topics {
		fmt.Fprintf(b, "## %s\n\n", strings.ReplaceAll(topic.Name(), "-", " "))
		literal(b, topic.Long)
	}
	return b.Flush()
}

// manualOf writes a command that is shown, and those below it.
func manualOf(w io.Writer, cmd *cobra.Command) {
	if !cmd.IsAvailableCommand() || cmd.Name() == "help" {
		return
	}
	fmt.Fprintf(w, "### %s\n\n", plain(cmd.UseLine()))
	prose(w, cmd.Long)
	if cmd.Example != "" {
		literal(w, strings.ReplaceAll("\n"+cmd.Example, "\n  ", "\n"))
	}
	cmd.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
		if f.Name == "help" {
			return
		}
		term := "**--" + f.Name + "**"
		if f.Shorthand != "" {
			term = "**-" + f.Shorthand + "**, " + term
		}
		value, usage := pflag.UnquoteUsage(f)
		if value != "" {
			term += " " + plain(value)
		}
		fmt.Fprintf(w, "%s\n: %s\n\n", term, plain(usage))
	})
	for _, sub := range cmd.Commands() {
		manualOf(w, sub)
	}
}

// plain keeps what a terminal shows from being Markdown.
func plain(text string) string {
	return strings.NewReplacer(`\`, `\\`, "`", "\\`", "*", `\*`, "_", `\_`, "[", `\[`, "]", `\]`, "<", `\<`, "|", `\|`).Replace(text)
}

// prose writes paragraphs; one with an indented line stays as it is.
func prose(w io.Writer, text string) {
	for _, paragraph := range strings.Split(strings.TrimSpace(text), "\n\n") {
		if slices.ContainsFunc(strings.Split(paragraph, "\n"), func(line string) bool { return strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t") }) {
			literal(w, paragraph)
		} else {
			fmt.Fprintf(w, "%s\n\n", plain(paragraph))
		}
	}
}

// literal writes text as it is.
func literal(w io.Writer, text string) {
	fmt.Fprintf(w, "```\n%s\n```\n\n", strings.Trim(text, "\n"))
}
