// Package doctor looks for what keeps ssh from sharing connections, and names what mends it.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/muxproxy/muxproxy/core/bridge"
	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/policy"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

// State is how a check came out.
type State string

// The states, the best first.
const (
	OK      State = "ok"
	Warning State = "warning" // it works, but not as well, or not for long
	Failure State = "failure"
)

// Result is what one check has found. A check can have several.
type Result struct {
	Name  string `json:"name"` // of the check
	State State  `json:"state"`
	Text  string `json:"text"`           // one line, escaped
	Mend  string `json:"mend,omitempty"` // a command, or a line for ssh_config, that mends it
}

// Report is all that was found. Its JSON form is what `muxproxy doctor --json` prints.
type Report struct {
	Host    string   `json:"host"`  // as it was given; "": none
	State   State    `json:"state"` // the worst of the results
	Results []Result `json:"results"`
}

// Options are what there is to look at.
type Options struct {
	Dirs   paths.Dirs
	Getenv func(string) string
	Home   string // the password database's: ssh reads .ssh/config there
	Config string // file for ssh -F; "": ssh's own files
	// Host is where an ssh would go, as it was given; "": nowhere in particular. Target is its parts.
	Host    string
	Target  use.Target
	SSH     string // ssh's executable; "": there is none
	Self    string // path of this executable, muxproxyd
	Version string // of this executable

	PolicyFile  string           // path, whether it exists or not
	Policy      *policy.Snapshot // nil: the file has errors
	Diagnostics policy.Diagnostics

	// CanAsk says why nobody can be asked on the screen.
	CanAsk func(ctx context.Context) error
	// Connect reaches the master; the error wraps bridge.ErrNoMaster if none lives.
	Connect func(context.Context) (*control.Master, error)
}

// checks are all there are, in the order in which they are made. Each has at least one result.
var checks = []struct {
	name string
	make func(*doctor, context.Context)
}{
	{"environment", (*doctor).environment},
	{"ssh", (*doctor).sshVersion},
	{"programs", (*doctor).programs},
	{"ssh_config", (*doctor).sshConfig},
	{"proxy_jump", (*doctor).proxyJump},
	{"control_master", (*doctor).controlMaster},
	{"fdpass", (*doctor).fdpass},
	{"host_key", (*doctor).hostKey},
	{"target", (*doctor).target},
	{"directories", (*doctor).directories},
	{"policy", (*doctor).policyFile},
	{"master", (*doctor).masterState},
	{"known_hosts", (*doctor).knownHosts},
	{"master_policy", (*doctor).masterPolicy},
	{"plugins", (*doctor).plugins},
	{"askpass", (*doctor).askpass},
	{"linger", (*doctor).linger},
	{"leftovers", (*doctor).leftovers},
}

// Names are those of all checks, in their order.
func Names() (names []string) {
	for _, c := range checks {
		names = append(names, c.name)
	}
	return names
}

// Run makes all checks. It changes nothing and starts no master. An error means that ctx has ended.
func Run(ctx context.Context, o Options) (Report, error) {
	d := &doctor{Options: o, report: Report{Host: o.Host, State: OK}}
	d.askSSH(ctx)
	d.askMaster(ctx)
	defer func() {
		if d.masterErr == nil {
			d.master.Disconnect()
		}
	}()
	for _, c := range checks {
		d.name, d.found = c.name, false
		c.make(d, ctx)
	}
	return d.report, context.Cause(ctx)
}

// attempts is how often the master is asked: one that is about to end still takes connections for a moment.
const attempts = 3

// askMaster asks the master that lives, and does not knock where none does: systemd would start one.
func (d *doctor) askMaster(ctx context.Context) {
	if !lives(d.Dirs) {
		d.masterErr = bridge.ErrNoMaster
		return
	}
	for range attempts {
		m, err := d.Connect(ctx)
		if err != nil {
			d.masterErr = err
			return
		}
		d.status, err = m.Status(ctx)
		d.master, d.masterErr = m, err
		if err == nil {
			return
		}
		m.Disconnect()
		if !errors.Is(err, control.ErrLost) {
			return
		}
	}
}

// lives reports whether somebody holds the lock of the living master, or whether that can't be told.
func lives(dirs paths.Dirs) bool {
	path := filepath.Join(dirs.Run, paths.MasterLock)
	if _, err := os.Lstat(path); err != nil { // TryLock would make it
		return !errors.Is(err, fs.ErrNotExist)
	}
	lock, err := paths.TryLock(path)
	if err == nil {
		lock.Close()
	}
	return err != nil
}

// doctor is one run.
type doctor struct {
	Options
	report Report
	name   string // of the check that is being made
	found  bool   // it has a result

	sample string              // the host that ssh was asked about
	config map[string][]string // what ssh -G says of it, our lines in effect; nil: nothing
	sshErr error               // why
	leads  bool                // it goes through muxproxy

	master    *control.Master
	status    control.Status
	masterErr error // nil: master lives, and status is its
}

func (d *doctor) add(s State, text, mend string) {
	r := Result{Name: d.name, State: s, Text: use.Printable(text), Mend: use.Printable(mend)}
	d.report.Results = append(d.report.Results, r)
	d.found = true
	if s == Failure || s == Warning && d.report.State == OK {
		d.report.State = s
	}
}

func (d *doctor) ok(format string, args ...any) { d.add(OK, fmt.Sprintf(format, args...), "") }

func (d *doctor) warn(mend, format string, args ...any) {
	d.add(Warning, fmt.Sprintf(format, args...), mend)
}

func (d *doctor) fail(mend, format string, args ...any) {
	d.add(Failure, fmt.Sprintf(format, args...), mend)
}

// noMaster reports whether no master lives, which is no fault.
func (d *doctor) noMaster() bool { return errors.Is(d.masterErr, bridge.ErrNoMaster) }

// get is the first value of an option as ssh sees it.
func (d *doctor) get(keyword string) string {
	if v := d.config[keyword]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// none reports whether an option is not set.
func none(value string) bool { return value == "" || strings.EqualFold(value, "none") }

// args is the command line of an ssh that goes where it was asked to.
func (d *doctor) args() sshconfig.Args {
	a := sshconfig.Args{Destination: d.sample}
	if d.Config != "" {
		a.Options = append(a.Options, "-F", d.Config)
	}
	if d.Target.User != "" {
		a.Options = append(a.Options, "-l", d.Target.User)
	}
	if d.Target.Port != 0 {
		a.Options = append(a.Options, "-p", fmt.Sprint(d.Target.Port))
	}
	return a
}

// columns is the width of what a person reads.
const columns = 80

// Write writes a report for a person. color adds ANSI colours.
func (r Report) Write(w io.Writer, color bool) error {
	var b strings.Builder
	indent := strings.Repeat(" ", len("failure  control_master  "))
	count := map[State]int{}
	for _, res := range r.Results {
		count[res.State]++
		state := fmt.Sprintf("%-7s", res.State)
		if color {
			state = map[State]string{OK: "\x1b[32m", Warning: "\x1b[33m", Failure: "\x1b[31m"}[res.State] + state + "\x1b[0m"
		}
		fmt.Fprintf(&b, "%s  %-14s  %s\n", state, res.Name, fold(res.Text, indent))
		if res.Mend != "" {
			// In one piece, for it is to be copied.
			fmt.Fprintf(&b, "%smend: %s\n", indent, res.Mend)
		}
	}
	fmt.Fprintf(&b, "%s, %s\n", number(count[Failure], "failure"), number(count[Warning], "warning"))
	_, err := io.WriteString(w, b.String())
	return err
}

func number(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// fold breaks a text into lines at spaces. What follows the first line is indented, as the first one is already.
func fold(text, indent string) string {
	var b strings.Builder
	room := columns - len(indent)
	for i, word := range strings.Fields(text) {
		n := len([]rune(word))
		switch {
		case i == 0:
		case n+1 <= room:
			b.WriteByte(' ')
			room--
		default:
			b.WriteString("\n" + indent)
			room = columns - len(indent)
		}
		b.WriteString(word)
		room -= n
	}
	return b.String()
}
