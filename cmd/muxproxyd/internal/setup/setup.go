// Package setup leads ssh to muxproxy by a file that ssh_config includes, and takes all of that away again.
package setup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/sshconfig"
)

// FileName is the included file's name in the configuration directory.
const FileName = "ssh_config"

// Options say what ssh is to be led to, and for whom.
type Options struct {
	Dirs    paths.Dirs
	Home    string   // where ssh looks for .ssh/config: the password database's, whatever HOME is
	Config  string   // absolute path of the file for ssh -F; "": .ssh/config in Home
	Hosts   []string // patterns; none: all hosts
	Program string   // absolute path of muxproxy
	SSH     string   // ssh's executable
	// Running is the master that lives; nil: none. Only Undo looks at it.
	Running *Running
}

// Running is a master that Undo stops.
type Running struct {
	PID, Clients int
	Stop         func(context.Context) error // returns when its process has ended
}

func (o Options) included() string { return filepath.Join(o.Dirs.Config, FileName) }

func (o Options) config() string {
	if o.Config != "" {
		return o.Config
	}
	return filepath.Join(o.Home, ".ssh", "config")
}

// args is the command line of an ssh that goes to host.
func (o Options) args(host string) sshconfig.Args {
	a := sshconfig.Args{Destination: host}
	if o.Config != "" {
		a.Options = []string{"-F", o.Config}
	}
	return a
}

// Make plans what leads ssh to muxproxy. The outcome depends on the options and on no earlier run, but for what Undo has to
// know. An error is a line for a person, and says why nothing is to be changed.
func Make(ctx context.Context, o Options) (*Plan, error) {
	lines, err := sshconfig.Own{
		Hosts: o.Hosts, Program: o.Program, KnownHosts: filepath.Join(o.Dirs.State, paths.KnownHosts),
	}.Lines()
	if err != nil {
		return nil, err
	}
	if err := sshconfig.CheckPath(o.included()); err != nil {
		return nil, err
	}
	config, err := read(o.config())
	if err != nil {
		return nil, err
	}
	if sshconfig.IsSystemFile(config.real) {
		return nil, fmt.Errorf("%s is for all users of this host, and muxproxy runs for each by itself", config.path)
	}
	included, err := read(o.included())
	if err != nil {
		return nil, err
	}

	p := &Plan{}
	rec := parseRecord(included.before)
	if !config.exists {
		rec.add(&rec.made, config.path)
	}
	rec.add(&rec.in, config.path)
	// The last two are the master's to make.
	for _, dir := range []string{o.Dirs.Config, filepath.Dir(config.path), filepath.Dir(o.Dirs.State)} {
		for _, d := range missing(dir) {
			rec.add(&rec.made, d)
		}
	}
	if err := p.makeDir(o.Dirs.Config); err != nil {
		return nil, err
	}
	if text := rec.String() + lines; text != string(included.before) || !included.exists {
		if err := p.write(included, []byte(text), "write "+included.String(), lines); err != nil {
			return nil, err
		}
	}
	line := sshconfig.IncludeLine(o.included())
	if text := sshconfig.AddInclude(config.before, o.included()); !bytes.Equal(text, config.before) {
		err := p.makeDir(filepath.Dir(config.path))
		if err == nil {
			err = p.write(config, text, "put one line at the top of "+config.String(), line+"\n")
		}
		if err != nil {
			return nil, fmt.Errorf("%w; or put this line at the top of %s yourself, and run it again: %s", err, config.path, line)
		}
	}
	if !p.Empty() && (config.exists || o.Config == "") {
		if _, err := sshconfig.AsIs(ctx, o.SSH, o.args(Samples(o.Hosts)[0])); err != nil {
			return nil, fmt.Errorf("ssh does not take its configuration as it is: %w; mend that first", err)
		}
	}
	return p, nil
}

// ErrRejected says that ssh takes its configuration no more.
var ErrRejected = errors.New("ssh takes its configuration no more")

// Verify asks ssh where a host leads that the patterns match, and returns that host. The error wraps ErrRejected if ssh can't
// be used at all.
func Verify(ctx context.Context, o Options) (host string, err error) {
	samples := Samples(o.Hosts)
	for _, host := range samples {
		options, asked := sshconfig.AsIs(ctx, o.SSH, o.args(host))
		if asked != nil {
			return "", fmt.Errorf("%w: %w", ErrRejected, asked)
		}
		command := strings.Join(options["proxycommand"], "")
		if program, ok := sshconfig.Leads(command); ok && program == o.Program {
			return host, nil
		}
		if err == nil { // another one may not match a pattern with a !
			err = fmt.Errorf("ssh %s does not lead to %s: its ProxyCommand is %q; see `muxproxy doctor %s`",
				host, o.Program, command, host)
		}
	}
	return "", err
}

// Leads reports whether ssh goes to muxproxy for a host that nobody has named.
func Leads(ctx context.Context, o Options) bool {
	options, err := sshconfig.AsIs(ctx, o.SSH, o.args(Samples(nil)[0]))
	_, ok := sshconfig.Leads(strings.Join(options["proxycommand"], ""))
	return err == nil && ok
}

// Samples are names that patterns may match, at least one: what stands in them, with something for * and ?.
func Samples(patterns []string) []string {
	var names []string
	for _, fill := range []string{"example", "x", "muxproxy-7"} {
		for _, p := range patterns {
			if !strings.HasPrefix(p, "!") {
				names = append(names, strings.Trim(strings.NewReplacer("*", fill, "?", "x").Replace(p), "."))
			}
		}
	}
	names = slices.DeleteFunc(slices.Compact(names), func(s string) bool { return s == "" })
	if len(names) == 0 {
		return []string{"example.com"}
	}
	return names
}

// Hosts are the patterns of the included file, if there is one.
func Hosts(d paths.Dirs) (patterns []string, found bool) {
	text, err := os.ReadFile(filepath.Join(d.Config, FileName))
	if err != nil {
		return nil, false
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "Host "); ok {
			return strings.Fields(rest), true
		}
	}
	return nil, false
}

// missing are the directories above and including dir that do not exist, the highest first.
func missing(dir string) []string {
	var list []string
	for {
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			slices.Reverse(list)
			return list
		}
		list = append(list, dir)
		dir = filepath.Dir(dir)
	}
}
