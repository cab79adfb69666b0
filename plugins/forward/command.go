package forward

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// Exit statuses of the commands.
const (
	statusNo    = 1
	statusUsage = 2
	statusError = 255
)

// failure is an error with an exit status.
type failure struct {
	status int
	err    error
}

func (f *failure) Error() string { return f.err.Error() }

func no(format string, args ...any) error { return &failure{statusNo, fmt.Errorf(format, args...)} }

// Command implements plugin.Commander.
func (p *Plugin) Command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use: "forward", Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: "muxproxy forward"},
		Short: "forwards that are open without an ssh", SilenceErrors: true, SilenceUsage: true,
		Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return errors.New("what: add, list or remove?") },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(p.addCommand(), p.listCommand(), p.removeCommand())
	root.SetArgs(append([]string{}, args...)) // nil would be this process's own
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "muxproxy: %s\n", plugin.Printable(err.Error()))
	if f, ok := errors.AsType[*failure](err); ok {
		return f.status
	}
	return statusUsage
}

func (p *Plugin) addCommand() *cobra.Command {
	var specs [3]string
	var life time.Duration
	var withClient bool
	options := []struct {
		letter string
		kind   kind
		use    string
	}{
		{"L", local, "from here to one place: `SPEC` is [ADDRESS:]PORT:HOST:HOSTPORT, or has sockets' paths"},
		{"R", remote, "from the host to one place here, or with `SPEC` [ADDRESS:]PORT by SOCKS to all"},
		{"D", dynamic, "SOCKS and HTTP CONNECT: `SPEC` is [ADDRESS:]PORT, or a socket's path"},
	}
	cmd := &cobra.Command{
		Use:   "add (-L|-R|-D) SPEC HOST",
		Short: "open a forward",
		Long: `Opens a forward as ssh's option would, through the master's connection to HOST. It
stays over restarts of the master, until it is removed or its time is over. A port
without an address is one of loopback; for others policy has to say gateway = true.`,
		Example: `  muxproxy forward add -L 5432:localhost:5432 db.example.com --for 8h
  muxproxy forward add -D 1080 db.example.com
  muxproxy forward add -R 0:localhost:3000 db.example.com --with-client`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("give one HOST besides the option and its SPEC, not %d: muxproxy forward add --help", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var given []int
			for i, o := range options {
				if cmd.Flags().Changed(string(o.kind)) {
					given = append(given, i)
				}
			}
			if len(given) != 1 {
				return errors.New("give one of -L, -R and -D")
			}
			if cmd.Flags().Changed("for") && life <= 0 {
				return errors.New("--for takes a duration such as 90s, 10m or 8h")
			}
			i := given[0]
			s, err := parseSpec(options[i].kind, specs[i])
			if err != nil {
				return err
			}
			f := &forward{wish: wish{spec: s, host: args[0]}, text: specs[i], withClient: withClient}
			if life > 0 {
				f.until = time.Now().Add(life)
			}
			return p.add(cmd.Context(), f, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	for i, o := range options {
		cmd.Flags().StringVarP(&specs[i], string(o.kind), o.letter, "", o.use)
	}
	cmd.Flags().DurationVar(&life, "for", 0, "close it after this `DURATION`, such as 90s, 10m or 8h")
	cmd.Flags().BoolVar(&withClient, "with-client", false, "close it when the last client of the connection has left")
	return cmd
}

// add opens a forward and says where it listens. One that can't be opened is not kept.
func (p *Plugin) add(ctx context.Context, f *forward, stdout, stderr io.Writer) error {
	p.mu.Lock()
	host, log := p.host, p.log
	p.mu.Unlock()
	switch {
	case len(f.text) > maxText || len(f.host) > maxText:
		return fmt.Errorf("more than %d bytes are too long", maxText)
	case strings.HasPrefix(f.host, "-") || f.host == "":
		return fmt.Errorf("%q is no host", f.host)
	case f.spec.listen.gateway():
		return no("%s lets other machines in: only policy can allow that, in a forward block with gateway = true", f.spec.listen)
	}
	if err := p.restore(ctx); err != nil { // it would have an ID that another one has, and could not be kept
		return &failure{statusError, err}
	}
	target, block, err := host.Resolve(ctx, f.host)
	if errors.Is(err, plugin.ErrDenied) {
		name := f.host[strings.LastIndexByte(f.host, '@')+1:]
		return no("policy has no forward block for %s: put host %q { forward {} } into it (muxproxy config path)", f.host, name)
	}
	if err != nil {
		return &failure{statusError, err}
	}
	if block == nil {
		return no("the `when` of no forward block of %s is true", target)
	}
	f.target = target
	if f.withClient {
		n, err := f.clients(ctx, host)
		if err != nil {
			return &failure{statusError, err}
		}
		if n == 0 {
			return no("no client is connected to %s: nothing would end the forward", target)
		}
	}
	p.mu.Lock()
	added := 0
	for _, g := range p.forwards {
		if g.where == "" {
			added++
		}
		if g.spec == f.spec && g.host == f.host {
			p.mu.Unlock()
			return no("there is such a forward already: %s", g.id)
		}
	}
	if added >= maxAdded {
		p.mu.Unlock()
		return no("there are %d forwards already: remove some", added)
	}
	p.lastID++
	f.id = fmt.Sprint(p.lastID)
	p.startLocked(f)
	p.watchLocked()
	p.mu.Unlock()
	select {
	case <-f.tried:
	case <-ctx.Done():
	}
	st := f.status()
	if st.State != open {
		p.drop(f, "it could not be opened")
		if ctx.Err() != nil {
			return &failure{statusError, errors.New("interrupted")}
		}
		return no("%s", st.Reason)
	}
	log.Info().Str("id", f.id).Str("forward", f.spec.String()).Msg("added")
	fmt.Fprintf(stdout, "%s: listening on %s\n", f.id, plugin.Printable(strings.Join(st.Listening, " and ")))
	if err := p.keep(ctx); err != nil {
		fmt.Fprintf(stderr, "muxproxy: it is open, but won't be after a restart of the master: %s\n", plugin.Printable(err.Error()))
	}
	return nil
}

// clients counts the clients of a forward's host.
func (f *forward) clients(ctx context.Context, host *plugin.Host) (n int, err error) {
	f.mu.Lock()
	t := f.target
	f.mu.Unlock()
	list, err := host.Connections(ctx)
	for _, c := range list {
		if c.Target.User == t.User && c.Target.Host == t.Host && c.Target.Port == t.Port {
			n += c.Clients
		}
	}
	return n, err
}

// status is a forward for `forward list`.
type status struct {
	ID          string    `json:"id"`
	Kind        kind      `json:"kind"`
	Listen      string    `json:"listen"`    // as it was asked for
	Listening   []string  `json:"listening"` // what it came to; empty: it is not open
	To          string    `json:"to,omitempty"`
	Host        string    `json:"host"`
	Target      string    `json:"target,omitempty"` // what the host means
	Owner       string    `json:"owner"`
	State       string    `json:"state"`            // "starting", "open", "waiting": it failed and is tried again
	Reason      string    `json:"reason,omitempty"` // why it waits; escaped
	Users       string    `json:"users,omitempty"`  // of dynamic and local ones: "self", "any"
	Gateway     bool      `json:"gateway,omitempty"`
	Until       time.Time `json:"until,omitzero"`
	WithClient  bool      `json:"with_client,omitempty"`
	Connections int       `json:"connections"` // now
	Total       uint64    `json:"total"`       // connections since it is there
	In          uint64    `json:"in"`          // bytes towards the remote host
	Out         uint64    `json:"out"`         // and from it
}

func (f *forward) status() status {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := status{
		ID: f.id, Kind: f.spec.kind, Listen: f.spec.listen.String(), Listening: append([]string{}, f.bound...), Host: f.host,
		Owner: f.ownerLocked(), State: f.state, Reason: f.reason, Gateway: f.gateway, Until: f.until, WithClient: f.withClient,
		Connections: len(f.transfers), Total: f.streams, In: f.in, Out: f.out,
	}
	if f.spec.to != (endpoint{}) {
		s.To = f.spec.to.String()
	}
	if f.target.Host != "" {
		s.Target = f.target.String()
	}
	if f.spec.kind != remote {
		s.Users = map[bool]string{true: "any", false: "self"}[f.anyUser]
	}
	for t := range f.transfers {
		in, out := t.Counts()
		s.In, s.Out = s.In+in, s.Out+out
	}
	return s
}

func (p *Plugin) listCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list the forwards",
		Long: `Lists the forwards of policy (p1, p2, ...) and those that were added. NOW and TOTAL are
connections, IN and OUT bytes towards the host and from it. One that is "waiting" is
not open, for the reason that follows, and tried again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list := []status{}
			for _, f := range p.all() {
				list = append(list, f.status())
			}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(list)
			}
			return table(cmd.OutOrStdout(), list)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "for programs")
	return cmd
}

func table(w io.Writer, list []status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tKIND\tLISTEN\tTO\tHOST\tNOW\tTOTAL\tIN\tOUT\tOWNER\tSTATE")
	for _, s := range list {
		listen, to, owner, state := s.Listen, s.To, s.Owner, s.State
		if (listen == "0" || strings.HasSuffix(listen, ":0")) && len(s.Listening) > 0 {
			listen = s.Listening[0] // the server has chosen the port
		}
		if to == "" {
			to = "anywhere"
		}
		if !s.Until.IsZero() {
			owner += ", until " + s.Until.Local().Format("Jan 2 15:04:05")
		}
		if s.WithClient {
			owner += ", with its clients"
		}
		if s.Reason != "" {
			state += ": " + s.Reason
		}
		row := []string{s.ID, string(s.Kind), listen, to, s.Host, fmt.Sprint(s.Connections), fmt.Sprint(s.Total), size(s.In), size(s.Out), owner, state}
		for i, cell := range row {
			row[i] = plugin.Printable(cell)
		}
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	return t.Flush()
}

// size is a number of bytes for a person.
func size(n uint64) string {
	const units = "KMGTPE"
	if n < 1<<10 {
		return fmt.Sprint(n)
	}
	f, i := float64(n)/(1<<10), 0
	for f >= 999.95 && i < len(units)-1 {
		f, i = f/(1<<10), i+1
	}
	return fmt.Sprintf("%.1f%c", f, units[i])
}

func (p *Plugin) removeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "remove ID|SPEC",
		Short: "close a forward that was added",
		Long:  "Closes a forward that was added, by its ID in the list, as it was given to add, or by where it listens. Its\nstreams go on.",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("give one ID or SPEC, not %d: see muxproxy forward list", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := p.find(args[0])
			if err != nil {
				return err
			}
			if f.where != "" {
				return no("%s is policy's, in %s: take it out there (muxproxy config path)", f.id, f.where)
			}
			if !p.drop(f, "removed by a command") {
				return no("%s has just ended", f.id)
			}
			return nil
		},
	}
}

// find returns the forward that somebody means.
func (p *Plugin) find(text string) (*forward, error) {
	var found []*forward
	for _, f := range p.all() {
		if f.id == text {
			return f, nil
		}
		s, err := parseSpec(f.spec.kind, text)
		at, errAt := parseListen(remote, text)
		chosen := f.spec.kind == remote && f.spec.listen.port == 0 && slices.ContainsFunc(f.status().Listening, func(bound string) bool {
			return bound == text || strings.HasSuffix(bound, ":"+text)
		})
		if err == nil && s == f.spec || errAt == nil && at == f.spec.listen || chosen {
			found = append(found, f)
		}
	}
	switch len(found) {
	case 0:
		return nil, no("there is no forward %q: see muxproxy forward list", text)
	case 1:
		return found[0], nil
	}
	var ids []string
	for _, f := range found {
		ids = append(ids, f.id)
	}
	slices.Sort(ids)
	return nil, no("%q can be any of %s: say which", text, strings.Join(ids, ", "))
}
