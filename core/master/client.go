package master

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/local"
	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/relay"
	"github.com/muxproxy/muxproxy/core/use"
	"github.com/muxproxy/muxproxy/core/wire"
)

const (
	// helloTime bounds how long a bridge may take for its hello.
	helloTime = 10 * time.Second
	// resolveTime bounds `ssh -G` in the bridge, a Match exec included.
	resolveTime = time.Minute
	// maxAsked is how often a person may answer neither yes nor no.
	maxAsked = 3
	// noteTime bounds the write of a note to a bridge that does not read.
	noteTime = time.Second
)

// client is one bridge and the ssh behind it, from hello to end.
type client struct {
	id     uint64
	master *Master
	log    zerolog.Logger
	wire   *wire.Conn
	hello  wire.Hello
	target use.Target // as asked for, then what that turned out to be
	who    use.Caller // without its environment; see caller
	since  time.Time

	ctx    context.Context // ends with the client
	cancel context.CancelCauseFunc

	handshake *local.Handshake
	batch     bool          // BatchMode: its person is never asked
	verbose   bool          // ssh -v
	forwarded string        // identity of the agent that it would forward
	answered  atomic.Bool   // its person has answered a question of the login
	upstream  atomic.Uint64 // number of the upstream; 0: not yet
	relay     atomic.Pointer[relay.Relay]

	envMu    sync.Mutex // guards what follows
	envNames []string   // that policy refers to, and env has been read for
	env      map[string]string

	// lineMu keeps the lines for the person in order; it guards letGo.
	lineMu sync.Mutex
	letGo  bool // the bridge has let go of stderr
}

// serve is a client's whole life. It owns nc.
func (m *Master) serve(ctx context.Context, nc *net.UnixConn) {
	defer nc.Close()
	c := &client{
		id: m.lastClient.Add(1), master: m, wire: wire.NewConn(nc), since: time.Now(), handshake: local.NewHandshake(),
	}
	c.log = m.log.With().Uint64("client", c.id).Logger()
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	defer c.cancel(nil)
	_ = nc.SetDeadline(time.Now().Add(helloTime))
	stopHello := context.AfterFunc(c.ctx, func() { nc.Close() })
	defer stopHello()

	var err error
	if c.who, err = use.ReadCaller(nc); err != nil {
		c.log.Warn().Err(err).Msg("connection refused")
		return
	}
	if !paths.Trusted(c.who.UID) {
		c.log.Warn().Int("uid", c.who.UID).Msg("connection refused: another user's")
		return
	}
	hello, files, err := c.wire.ReadHello()
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if errors.Is(err, wire.ErrVersion) {
		what := "run `muxproxy master restart`"
		if hello.Version < wire.Version {
			what = "ssh starts an older muxproxy, `muxproxy doctor` finds out which"
		}
		c.answer(wire.Failed, fmt.Sprintf("this muxproxy speaks version %d of the protocol, the master, of muxproxy %s, version %d: %s; "+
			"or set MUXPROXY_BYPASS=1", hello.Version, m.opts.Version, wire.Version, what))
		return
	}
	if err != nil {
		if !errors.Is(err, io.EOF) { // a probe whether somebody listens says nothing
			c.log.Warn().Err(err).Stringer("caller", c.who).Msg("hello refused")
		}
		return
	}
	c.hello = hello
	c.target = use.Target(hello.Target)
	c.log = c.log.With().Stringer("target", c.target).Logger()
	if err := m.checkNamespaces(c.who); err != nil {
		c.log.Warn().Err(err).Stringer("caller", c.who).Msg("client refused")
		c.answer(wire.Failed, err.Error()+"; set MUXPROXY_BYPASS=1")
		return
	}
	if !c.policy().Share() {
		c.answer(wire.Bypass, "")
		return
	}
	spec, ag, ok := c.resolve()
	defer ag.close()
	if !ok {
		return
	}
	c.batch = spec.Config.Get("batchmode") == "yes"
	level := strings.ToUpper(spec.Config.Get("loglevel"))
	c.verbose = slices.Contains(hello.SSHArgs, "-v") || strings.HasPrefix(level, "DEBUG")
	quiet := slices.Contains(hello.SSHArgs, "-q") || slices.Contains([]string{"SILENT", "QUIET", "FATAL", "ERROR"}, level)
	if !quiet { // below LogLevel INFO ssh shows neither
		spec.Banner = func(text string) {
			for line := range strings.Lines(text) {
				c.say("server " + c.target.Host + ": " + strings.TrimRight(line, "\r\n"))
			}
		}
		spec.Say = c.say
	}
	if c.verbose {
		spec.Debug = func(line string) { c.say("debug: " + line) }
	}
	for _, name := range wire.EnvNames {
		if v, ok := hello.Env[name]; ok {
			spec.Env = append(spec.Env, name+"="+v)
		}
	}
	_ = nc.SetDeadline(time.Time{})
	stopHello() // from here on the person is told before the end
	m.enter(c)
	defer m.leave(c)
	c.log.Info().Stringer("caller", c.who).Str("mode", string(hello.Mode)).Msg("client has come")
	if hello.Mode == wire.Pipes {
		stream := &pipes{in: files[0], out: files[1]}
		files = nil
		c.servePipes(spec, stream)
	} else {
		c.serveSocket(spec, nc)
	}
	c.log.Info().Dur("after", time.Since(c.since)).Msg("client has gone")
}

// caller is who started the client, with what policy wants to know of the environment. That is read anew when another
// policy wants to know something else.
func (c *client) caller() use.Caller {
	names := c.master.policy.now.Load().EnvNames()
	c.envMu.Lock()
	defer c.envMu.Unlock()
	if !slices.Equal(names, c.envNames) {
		c.env = nil
		if p, ok := c.who.Client(); ok {
			c.env = use.ReadEnv(p, names)
		}
		c.envNames = names
	}
	who := c.who
	who.Env, who.LoggedIn = c.env, c.answered.Load()
	return who
}

// policy is what the policy in force says of the client's target.
func (c *client) policy() use.Effective { return c.master.policy.lookup().For(c.target, c.caller()) }

// checkNamespaces refuses a caller from a container or sandbox of the same uid, unless policy admits it: it would get out
// of there through the master.
func (m *Master) checkNamespaces(caller use.Caller) error {
	if m.policy.now.Load().Master().AllowForeign {
		return nil
	}
	if len(caller.Processes) == 0 {
		return errors.New("the calling process can't be seen from here")
	}
	same, err := use.SameNamespaces(caller.Processes[0])
	switch {
	case err != nil:
		return fmt.Errorf("the calling process can't be checked: %w", err)
	case !same:
		return errors.New("called from another user, pid or mount namespace than the master's, which needs " +
			"foreign = \"allow\" in the master's policy")
	}
	return nil
}

// resolve finds out what to dial, and sets the client's target to it. A known answer does if its upstream lives; a login
// needs the caller's agent anyway, and only the bridge can connect that. If it fails, the bridge has been told. The agent
// is the caller's to close.
func (c *client) resolve() (pool.Spec, *agent, bool) {
	via := c.via()
	if r, ok := c.master.configs.get(c.hello, via); ok {
		if spec, ag := c.spec(&r, nil); c.master.pool.Alive(spec) {
			return spec, ag, c.agrees(spec.Target, via)
		}
	}
	_ = c.wire.NetConn().SetDeadline(time.Now().Add(resolveTime))
	if err := c.wire.SendAnswer(wire.Answer{Kind: wire.Resolve, Via: via}); err != nil {
		c.log.Warn().Err(err).Msg("can't ask the bridge to resolve")
		c.answer(wire.Failed, err.Error()) // policy can name hosts that are none
		return pool.Spec{}, nil, false
	}
	res, conn, err := c.wire.ReadResolution()
	if err != nil {
		c.log.Warn().Err(err).Msg("no resolution")
		return pool.Spec{}, nil, false
	}
	if res.Error == "" && !res.Config.JumpsVia(via) {
		res.Error = "the jump hosts that policy names were not looked at; end what is of another version"
	}
	if res.Error != "" {
		if conn != nil {
			conn.Close()
		}
		c.answer(wire.Failed, res.Error)
		return pool.Spec{}, nil, false
	}
	r := resolution{res.Config, res.AgentPath, res.Hops}
	c.master.configs.put(c.hello, via, r)
	spec, ag := c.spec(&r, conn)
	c.master.agents.note(&r, spec.Target)
	return spec, ag, c.agrees(spec.Target, via)
}

// via are the jump hosts that policy names; nil: as ssh_config says.
func (c *client) via() []string {
	via, set := c.policy().Via()
	if set && via == nil {
		via = []string{}
	}
	return via
}

// agrees takes what the target turned out to be, and reports whether policy says of that what was done for what had been
// asked for: ssh leaves a host's canonical name to its proxy. If not, the bridge has been told.
func (c *client) agrees(target use.Target, via []string) bool {
	if target == c.target {
		return true
	}
	c.target = target
	switch {
	case !c.policy().Share():
		c.answer(wire.Bypass, "")
		return false
	case !slices.Equal(c.via(), via) || (c.via() == nil) != (via == nil):
		c.answer(wire.Failed, fmt.Sprintf("policy has jump hosts for %s, but that name was only found out on the way: "+
			"put HostName %s into ssh_config", target.Host, target.Host))
		return false
	}
	return true
}

// spec is what to dial for the client. conn is the agent's connection that the bridge made, or nil; the agent owns it, and
// is the caller's to close.
func (c *client) spec(r *resolution, conn *os.File) (pool.Spec, *agent) {
	spec, ag := r.spec(c.target, conn)
	c.forwarded = c.forwardedAgent(&r.config, ag)
	spec.Lane = c.lane(spec.Target, &r.config)
	spec.Class = c.class
	return spec, ag
}

// spec is what to dial for a target that was asked for: itself, but for a canonical name that was found for it. conn is
// the agent's connection that the bridge made, or nil; the agent owns it, and is the caller's to close.
func (r *resolution) spec(asked use.Target, conn *os.File) (pool.Spec, *agent) {
	spec := pool.Spec{Target: asked, Config: &r.config}
	if user := r.config.Get("user"); user != "" {
		spec.Target.User = user
	}
	if host := strings.Trim(r.config.Get("hostname"), "[]"); host != "" {
		spec.Target.Host = host
	}
	if port, err := strconv.ParseUint(r.config.Get("port"), 10, 16); err == nil && port != 0 {
		spec.Target.Port = uint16(port)
	}
	ag := newAgent(r.agentPath, conn)
	if ag != nil {
		spec.Agent = ag
	}
	for i := range r.hops {
		hop := pool.Spec{Target: use.Target(r.hops[i].Target), Config: &r.hops[i].Config}
		if a := newAgent(r.hops[i].AgentPath, nil); a != nil {
			hop.Agent = a
		}
		spec.Via = append(spec.Via, hop)
	}
	return spec, ag
}

func (c *client) answer(kind wire.AnswerKind, message string) bool {
	if err := c.wire.SendAnswer(wire.Answer{Kind: kind, Message: message}); err != nil {
		c.log.Debug().Err(err).Msg("the bridge is gone")
		return false
	}
	return true
}

// servePipes serves a client whose bridge stays: its socket carries notes and is the client's life line.
func (c *client) servePipes(spec pool.Spec, stream *pipes) {
	defer stream.Close()
	if !c.answer(wire.Served, "") {
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.wire.NetConn().SetReadDeadline(time.Unix(1, 0)) // ends the reader below
	wg.Go(func() {
		var b [1]byte
		_, err := c.wire.NetConn().Read(b[:]) // a bridge has nothing more to say
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			c.cancel(errors.New("the bridge has ended"))
			stream.Close()
		}
	})
	l := c.acquire(spec, func(err error) {
		// Nothing has to wait for ssh's key exchange.
		c.fatal(err.Error())
		c.cancel(err)
		stream.Close()
	})
	defer l.release()
	c.serveSSH(spec, l, stream)
}

// serveSocket serves a client whose socket becomes the stream. So the hello is answered when the transport to the host
// is up, or has failed: later the person can only be told by banner.
func (c *client) serveSocket(spec pool.Spec, nc *net.UnixConn) {
	if err := local.Check(spec.Config.Get("hostkeyalgorithms")); err != nil {
		c.log.Info().Err(err).Msg("client not let in")
		c.answer(wire.Failed, err.Error())
		return
	}
	stop := onHangup(nc, func() { c.cancel(errors.New("the client has left")) })
	connected := make(chan struct{})
	spec.Connected = sync.OnceFunc(func() { close(connected) })
	failed := make(chan error, 1)
	shared := c.master.pool.Alive(spec)
	l := c.acquire(spec, func(err error) { failed <- err })
	defer l.release()
	if shared { // ssh's key exchange and what the gate asks go on at once; what is refused, ssh hears in its login
		spec.Connected()
	}
	select {
	case <-connected:
	case <-l.done: // without a word about its transport, or failed
		if l.err != nil {
			stop()
			c.answer(wire.Failed, l.err.Error())
			return
		}
	case err := <-failed:
		stop()
		c.answer(wire.Failed, err.Error())
		return
	case <-c.ctx.Done():
		stop()
		return
	}
	stop()
	if !c.answer(wire.Served, "") {
		return
	}
	c.serveSSH(spec, l, nc)
}

// login is a lease on its way.
type login struct {
	done   chan struct{} // closed when the rest is set
	lease  *pool.Lease
	permit *use.Permit
	err    error
	cancel context.CancelFunc
}

// acquire passes the gate and gets a lease, in the background. failed is told why there will be none, unless the
// client has left.
func (c *client) acquire(spec pool.Spec, failed func(error)) *login {
	l := &login{done: make(chan struct{})}
	ctx, cancel := context.WithCancel(c.ctx)
	l.cancel = cancel
	u := use.Use{Kind: use.Attach, Client: c.id, Caller: c.caller(), Target: c.target}
	person := func(ctx context.Context, question string) (bool, error) {
		if spec.Connected != nil {
			spec.Connected() // ssh asks once it speaks with us; a bridge in its way would wait for the host
		}
		return c.confirm(ctx, question)
	}
	go func() {
		defer close(l.done)
		var denied *use.Denied
		if l.permit, denied = c.master.gate.Decide(use.WithPerson(ctx, person), u, c.say); denied != nil {
			l.err = denied
		} else {
			l.lease, l.err = c.master.pool.Acquire(ctx, l.permit, spec, c)
		}
		if l.err != nil {
			c.log.Info().Err(l.err).Msg("client not let in")
			if ctx.Err() == nil {
				failed(l.err)
			}
			return
		}
		c.upstream.Store(l.lease.ID())
		if c.verbose {
			c.say(fmt.Sprintf("debug: on connection %d to %s", l.lease.ID(), c.target.Addr()))
		}
	}()
	return l
}

// release gives back what acquire got, or will get.
func (l *login) release() {
	l.cancel()
	<-l.done
	if l.lease != nil {
		l.lease.Release()
	}
	if l.permit != nil {
		res := use.Result{Status: "closed"}
		if l.err != nil {
			res = use.Result{Status: "refused", Err: l.err.Error()}
		}
		l.permit.End(res)
	}
}

// serveSSH is the SSH server side of a client, and the relay once it has been let in.
func (c *client) serveSSH(spec pool.Spec, l *login, stream net.Conn) {
	conn, err := c.master.authority.Accept(c.ctx, stream, local.Config{
		User:       c.hello.Target.User, // as this ssh has it
		Principals: local.Principals(c.hello.Target.Host, c.hello.Target.Alias, spec.Config.Get("hostkeyalias")),
		Login: func(ctx context.Context) error {
			select {
			case <-l.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if l.err != nil {
				c.say(l.err.Error())
			}
			return l.err
		},
	}, c.handshake)
	switch {
	case errors.Is(err, local.ErrHostKeyRefused):
		c.log.Info().Err(err).Msg("client has left in the key exchange")
		c.fatal(fmt.Sprintf("ssh did not take the local host key; ssh_config needs: GlobalKnownHostsFile %s "+
			"/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2", filepath.Join(c.master.opts.Dirs.State, paths.KnownHosts)))
		return
	case err != nil:
		c.log.Debug().Err(err).Msg("client has left before its login")
		if c.ctx.Err() == nil && !errors.Is(err, io.EOF) {
			c.fatal(err.Error())
		}
		return
	}
	defer conn.Close()
	stopCut := context.AfterFunc(c.ctx, func() { conn.Close() })
	defer stopCut()
	c.releaseStderr()
	r := relay.New(front{conn, c}, l.lease, c.master.gate, l.permit, c.log)
	c.relay.Store(r)
	r.Run()
}

// front is the client as the relay sees it.
type front struct {
	*local.Conn
	c *client
}

func (f front) ID() uint64         { return f.c.id }
func (f front) Caller() use.Caller { return f.c.caller() }
func (f front) Target() use.Target { return f.c.target }
func (f front) Agent() string      { return f.c.forwarded }

func (f front) OpenChannel(kind string, extra []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	return f.Conn.ServerConn.OpenChannel(kind, extra)
}

var _ relay.Client = front{}

// Ask implements pool.Asker: the question appears in the user's own ssh. Whoever has answered one has logged in.
func (c *client) Ask(ctx context.Context, q pool.Question) ([]string, error) {
	answers, err := c.ask(ctx, q)
	if err == nil {
		c.answered.Store(true)
	}
	return answers, err
}

// ask puts a question to the person at the client, of a login or not.
func (c *client) ask(ctx context.Context, q pool.Question) ([]string, error) {
	if c.batch {
		return nil, pool.ErrNobody
	}
	// Whose words they are stands before each prompt, and before each line of a server's text: that could pose as ours.
	title := use.Printable(q.Title) + ": "
	lq := local.Question{Instruction: printableLines(q.Text)}
	if q.Title != "muxproxy" && lq.Instruction != "" {
		lq.Instruction = title + strings.ReplaceAll(lq.Instruction, "\n", "\n"+title)
	}
	for _, p := range q.Prompts {
		lq.Prompts = append(lq.Prompts, title+onOneRow(p.Text))
		lq.Echos = append(lq.Echos, p.Echo)
	}
	answers, err := c.handshake.Ask(ctx, lq)
	if errors.Is(err, local.ErrUnanswered) {
		return nil, pool.ErrNobody
	}
	if err == nil && !c.hasTerminal() && !slices.ContainsFunc(answers, func(a string) bool { return a != "" }) {
		return nil, pool.ErrNobody // ssh without a terminal answers "" at once, every time
	}
	return answers, err
}

// confirm is a use.Person: the user's own ssh asks, on its terminal, until it has been let in.
func (c *client) confirm(ctx context.Context, question string) (bool, error) {
	if !c.hasTerminal() {
		return false, use.ErrNobody
	}
	prompt := question + " [yes/no] "
	for range maxAsked {
		answers, err := c.ask(ctx, pool.Question{Title: "muxproxy", Prompts: []pool.Prompt{{Text: prompt, Echo: true}}})
		switch {
		case errors.Is(err, pool.ErrNobody):
			return false, use.ErrNobody
		case err != nil:
			return false, err
		case strings.EqualFold(strings.TrimSpace(answers[0]), "yes"):
			return true, nil
		case strings.EqualFold(strings.TrimSpace(answers[0]), "no"):
			return false, nil
		}
		prompt = "please type yes or no: "
	}
	return false, nil
}

// hasTerminal tells whether the ssh at this client has a terminal to ask at.
func (c *client) hasTerminal() bool {
	return slices.ContainsFunc(c.who.Processes[:min(2, len(c.who.Processes))], func(p use.Process) bool { return p.TTY != "" })
}

// onOneRow keeps a prompt from filling a row of the terminal with blanks, so that the next one looks like a line of ours.
func onOneRow(prompt string) string {
	end := ""
	if strings.HasSuffix(prompt, " ") {
		end = " "
	}
	return use.Printable(strings.Join(strings.Fields(prompt), " ")) + end
}

// printableLines escapes text, but keeps its lines.
func printableLines(s string) string {
	lines := strings.Split(strings.ReplaceAll(s, "\r\n", "\n"), "\n")
	for i, l := range lines {
		lines[i] = use.Printable(l)
	}
	return strings.Join(lines, "\n")
}

// cut ends the client now, after the person has been told why.
func (c *client) cut(reason error) {
	if r := c.relay.Load(); r != nil {
		r.Cut(reason)
	} else {
		c.say(reason.Error())
	}
	c.cancel(reason)
}

// say shows a line to the person at the client, as long as it is not let in.
func (c *client) say(line string) {
	if c.hello.Mode == wire.Pipes {
		c.note(wire.Note{Text: line})
	} else {
		c.handshake.Say("muxproxy: " + use.Printable(line))
	}
}

// fatal tells the person why the client ends, if the bridge is still there to do so.
func (c *client) fatal(line string) {
	if c.hello.Mode == wire.Pipes {
		c.note(wire.Note{Text: line, Fatal: true})
	}
}

// releaseStderr lets the bridge go of stderr: after `ssh -f` it would hold the caller's pipe for ever.
func (c *client) releaseStderr() {
	if c.hello.Mode == wire.Pipes {
		c.note(wire.Note{Authenticated: true})
	}
}

func (c *client) note(n wire.Note) {
	c.lineMu.Lock()
	defer c.lineMu.Unlock()
	if c.letGo {
		return
	}
	_ = c.wire.NetConn().SetWriteDeadline(time.Now().Add(noteTime))
	if err := c.wire.SendNote(n); err != nil {
		c.log.Debug().Err(err).Msg("the bridge is gone")
	}
	c.letGo = n.Authenticated || n.Fatal
}
