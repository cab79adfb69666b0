package main

import (
	"context"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

// completeTime bounds what a completion may wait for the master: somebody looks at the prompt.
const completeTime = 500 * time.Millisecond

// Completions come from ssh_config and from a master that lives; none is started, and nothing that fails is told. What a
// shell might take for more than a word is left out: not all of them quote what they insert.
func plainWord(s string) bool {
	return s != "" && s[0] != '-' && strings.IndexFunc(s, func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("._-@:/+,%", r)
	}) < 0
}

// completeFlag says how a flag's value is completed.
func completeFlag(cmd *cobra.Command, name string, f cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(name, f); err != nil {
		panic(err) // there is no such flag
	}
}

// offer is what of names begins with what was typed.
func offer(names []cobra.Completion, typed string) []cobra.Completion {
	var out []cobra.Completion
	for _, name := range names {
		word, doc, _ := strings.Cut(name, "\t")
		if strings.HasPrefix(word, typed) && plainWord(word) {
			out = append(out, cobra.CompletionWithDesc(word, use.Printable(doc)))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// askQuickly calls do with the master that lives, if one does.
func (a *app) askQuickly(cmd *cobra.Command, do func(ctx context.Context, m *control.Master)) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completeTime)
	defer cancel()
	m, err := a.connect(ctx)
	if err != nil {
		return
	}
	defer m.Disconnect()
	do(ctx, m)
}

// completeTarget completes a TARGET: HOST or an alias in use, or USER@HOST:PORT once there is an @.
func (a *app) completeTarget(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return offer(a.targets(cmd, strings.Contains(typed, "@")), typed), cobra.ShellCompDirectiveNoFileComp
}

// targets are names of the upstreams that there are; whole ones have user and port.
func (a *app) targets(cmd *cobra.Command, whole bool) []cobra.Completion {
	var names []cobra.Completion
	a.askQuickly(cmd, func(ctx context.Context, m *control.Master) {
		s, err := m.Status(ctx)
		if err != nil {
			return
		}
		up := map[uint64]bool{}
		for _, u := range s.Upstreams {
			up[u.ID] = true
			if whole {
				names = append(names, cobra.CompletionWithDesc(u.Target, u.State))
				continue
			}
			_, host, _ := cutLast(u.Target, "@")
			host, _, _ = cutLast(host, ":")
			names = append(names, cobra.CompletionWithDesc(strings.Trim(host, "[]"), u.State))
		}
		for _, c := range s.Clients {
			if !whole && up[c.Upstream] && c.Alias != "" {
				names = append(names, cobra.CompletionWithDesc(c.Alias, c.Target))
			}
		}
	})
	return names
}

// cutLast is strings.Cut around the last sep; without one, all is after it.
func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+len(sep):], true
}

// completeHost completes [USER@]HOST with what ssh_config names, and what is connected.
func (a *app) completeHost(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	file := ""
	if f := cmd.Flags().Lookup("ssh-config"); f != nil {
		file = f.Value.String()
	}
	user, host, found := cutLast(typed, "@")
	names := append(sshconfig.HostNames(file), a.targets(cmd, false)...)
	out := offer(names, host)
	if found {
		for i := range out {
			out[i] = user + "@" + out[i]
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// completePattern completes setup's --host.
func (a *app) completePattern(cmd *cobra.Command, _ []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return a.completeHost(cmd, nil, typed)
}

// completePending completes the ID of a use that waits for an answer.
func (a *app) completePending(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var names []cobra.Completion
	if len(args) == 0 {
		a.askQuickly(cmd, func(ctx context.Context, m *control.Master) {
			list, err := m.Pending(ctx)
			if err != nil {
				return
			}
			for _, p := range list {
				if p.Answerable {
					names = append(names, cobra.CompletionWithDesc(p.ID, strings.TrimSpace(p.Kind+" "+p.Detail)+" on "+p.Target))
				}
			}
		})
	}
	return offer(names, typed), cobra.ShellCompDirectiveNoFileComp
}

// completeVerb completes the commands of plugins: the plugin's name, and then words that its usage lines begin with.
func (a *app) completeVerb(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var names []cobra.Completion
	for plugin, verbs := range a.verbs(cmd) {
		if len(args) == 0 {
			names = append(names, cobra.CompletionWithDesc(plugin, "commands of this plugin"))
			continue
		}
		for _, v := range verbs {
			words := strings.Fields(v.Usage)
			n := len(args) - 1
			if plugin == args[0] && len(words) > n && slices.Equal(words[:n], args[1:]) && words[n] == strings.ToLower(words[n]) {
				names = append(names, cobra.CompletionWithDesc(words[n], v.Doc))
			}
		}
	}
	return offer(names, typed), cobra.ShellCompDirectiveNoFileComp
}

// verbs are the commands that plugins bring, by the plugin's name.
func (a *app) verbs(cmd *cobra.Command) map[string][]control.Verb {
	out := map[string][]control.Verb{}
	a.askQuickly(cmd, func(ctx context.Context, m *control.Master) {
		list, err := m.Plugins(ctx)
		if err != nil {
			return
		}
		for _, p := range list {
			if len(p.Verbs) > 0 {
				out[p.Name] = p.Verbs
			}
		}
	})
	return out
}
