package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

// The test binary plays the plugins, and a master that gets killed.
func TestMain(m *testing.M) {
	if os.Getenv(plugin.CookieKey) != "" {
		playPlugin(os.Args[1:])
		os.Exit(0)
	}
	if dir := os.Getenv("PLAY_MASTER"); dir != "" {
		playMaster(dir)
	}
	os.Exit(m.Run())
}

// judge is a plugin that does as its blocks say.
type judge struct {
	info plugin.Info
	cfg  atomic.Pointer[plugin.Config]
}

type judgeBlock struct {
	Do string `hcl:"do,optional" default:"allow"`
}

type judgeOwn struct {
	Bad     bool           `hcl:"bad,optional"`
	Timeout time.Duration  `hcl:"timeout,optional" default:"5s"`
	Limits  map[string]int `hcl:"limits,optional"`
	Rules   []judgeRule    `hcl:"rule,block"`
}

type judgeRule struct {
	Name  string   `hcl:"name,label"`
	Words []string `hcl:"words,optional"`
}

func (j *judge) Describe() plugin.Info { return j.info }

func (j *judge) Configure(_ context.Context, c *plugin.Config) plugin.Diagnostics {
	own := c.Plugin.Value.(*judgeOwn)
	if own.Bad {
		return plugin.Diagnostics{
			c.Plugin.Errorf(plugin.Path{"rule", 1, "words", 0}, "that word is bad\x1b"),
			c.Plugin.Warnf(plugin.Path{"limits", plugin.Key("a")}, "high"),
		}
	}
	j.cfg.Store(c)
	return nil
}

func (j *judge) Authorize(ctx context.Context, r *plugin.Request) plugin.Decision {
	switch do := r.Block.(*judgeBlock).Do; do {
	case "allow":
		return plugin.Allow()
	case "deny":
		return plugin.Deny("not "+r.Use.Kind+"\x1b[2J", "ask later")
	case "pass":
		return plugin.NoOpinion()
	case "none":
		return plugin.Decision{}
	case "wait": // longer than the deadline for the first answer, until somebody decides
		r.Waiting("is it you?", true)
		<-ctx.Done()
		return plugin.Allow()
	case "wait-closed":
		r.Waiting("touch the key\x1b", false)
		<-ctx.Done()
		return plugin.Deny("late", "")
	case "decide-own":
		r.Waiting("own", false)
		if err := j.cfg.Load().Host.Decide(ctx, r.ID, plugin.Deny("decided by itself", "")); err != nil {
			return plugin.Deny("host: "+err.Error(), "")
		}
		<-ctx.Done()
		return plugin.Allow()
	case "ask-client":
		yes, err := j.cfg.Load().Host.Ask(ctx, r.ID, "shall I?\x1b")
		if other, foreign := j.cfg.Load().Host.Ask(ctx, "not-"+r.ID, "?"); other || foreign == nil {
			return plugin.Deny("asked about a use that is not its own", "")
		}
		return plugin.Deny(fmt.Sprint(yes, " ", err), r.Pos)
	case "silent":
		<-ctx.Done()
		return plugin.Allow()
	case "crash":
		os.Exit(3)
	}
	return plugin.Decision{}
}

func (j *judge) Retain(ctx context.Context, r *plugin.Idle) time.Time {
	switch r.Connection.Block.(*judgeBlock).Do {
	case "keep":
		return time.Unix(2_000_000_000, 0)
	case "silent":
		<-ctx.Done()
	case "crash":
		os.Exit(3)
	}
	return time.Time{}
}

func (j *judge) Command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprintln(stderr, "what?")
		return 2
	}
	h := j.cfg.Load().Host
	fail := func(err error) int {
		fmt.Fprintln(stderr, err)
		switch _, refused := errors.AsType[*plugin.LoginError](err); {
		case errors.Is(err, plugin.ErrDenied):
			return 1
		case refused:
			return 3
		}
		return 255
	}
	switch args[0] {
	case "echo":
		fmt.Fprint(stdout, strings.Repeat(args[1], 50000))
		return 7
	case "list":
		cs, err := h.Connections(ctx)
		if err != nil {
			return fail(err)
		}
		for _, c := range cs {
			fmt.Fprintln(stdout, c.ID, c.Target, c.Block.(*judgeBlock).Do)
		}
	case "connect":
		c, err := h.Connect(ctx, args[1])
		if err != nil {
			return fail(err)
		}
		fmt.Fprintln(stdout, c.ID, c.Block.(*judgeBlock).Do)
	case "resolve":
		t, block, err := h.Resolve(ctx, args[1])
		if err != nil {
			return fail(err)
		}
		fmt.Fprintln(stdout, t, block.(*judgeBlock).Do)
	case "close", "drain", "notify", "dial", "handover", "handover-not", "listen", "offer", "permit", "ticket":
		var id uint64
		fmt.Sscan(args[1], &id)
		if err := j.stream(ctx, args[0], id, args[2:], stdout); err != nil {
			return fail(err)
		}
	case "keep":
		if err := h.Keep(ctx, []byte(args[1])); err != nil {
			return fail(err)
		}
	case "keep-much":
		if err := h.Keep(ctx, make([]byte, maxKept+1)); err != nil {
			return fail(err)
		}
	case "kept":
		b, err := h.Kept(ctx)
		if err != nil {
			return fail(err)
		}
		stdout.Write(b)
	case "record":
		if err := h.Record(ctx, args[1], args[2], args[3]); err != nil {
			return fail(err)
		}
	case "crash":
		os.Exit(3)
	case "spend": // a ticket, in hexadecimal, at the path
		return spend(args[1], args[2], stdout)
	}
	return 0
}

func (j *judge) stream(ctx context.Context, what string, id uint64, args []string, stdout io.Writer) error {
	h := j.cfg.Load().Host
	switch what {
	case "close":
		return h.Close(ctx, id)
	case "drain":
		return h.Drain(ctx, id)
	case "notify":
		return h.Notify(ctx, id, args[0])
	case "dial":
		c, err := h.Dial(ctx, id, "tcp", args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Fprint(c, "ping")
		c.CloseWrite()
		_, err = io.Copy(stdout, c)
		return err
	case "handover":
		near, far, err := tcpPair()
		if err != nil {
			return err
		}
		defer near.Close()
		fmt.Fprint(near, "second")
		near.CloseWrite()
		transfer, err := h.HandOver(ctx, plugin.Handover{
			Connection: id, Network: "tcp", Address: args[0], Data: []byte("first "),
			Opened: func() error { _, err := fmt.Fprint(far, "open: "); return err },
		}, far)
		far.Close()
		if err != nil {
			return err
		}
		return carried(transfer, near, stdout)
	case "handover-not": // what comes before the stream fails
		near, far, err := tcpPair()
		if err != nil {
			return err
		}
		defer near.Close()
		defer far.Close()
		_, err = h.HandOver(ctx, plugin.Handover{
			Connection: id, Network: "tcp", Address: args[0], Opened: func() error { return errors.New("not today") },
		}, far)
		return err
	case "offer":
		l, err := h.Listen(ctx, id, "tcp", args[0])
		if err != nil {
			return err
		}
		defer l.Close()
		o, err := l.AcceptOffer()
		if err != nil {
			return err
		}
		fmt.Fprintln(stdout, o.Origin)
		near, far, err := tcpPair()
		if err != nil {
			return err
		}
		defer near.Close()
		near.CloseWrite()
		transfer, err := o.HandOver(ctx, far)
		far.Close()
		if err != nil {
			return err
		}
		return carried(transfer, near, stdout)
	case "permit": // when, network, address
		l, err := h.Listen(ctx, id, "tcp", "localhost:0")
		if err != nil {
			return err
		}
		defer l.Close()
		o, err := l.AcceptOffer()
		if err != nil {
			return err
		}
		if args[0] != "before" {
			c, err := o.Stream(ctx)
			if err != nil {
				return err
			}
			defer c.Close()
			if args[0] == "too-late" {
				c.Close()
				for err == nil && ctx.Err() == nil { // the master hears of it at its own time
					err = o.Permit(ctx, args[1], args[2])
				}
				return err
			}
		}
		if err := o.Permit(ctx, args[1], args[2]); err != nil {
			return err
		}
		c, err := o.Stream(ctx)
		if args[0] != "before" {
			fmt.Fprintln(stdout, err)
			return nil
		}
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = io.Copy(stdout, c)
		return err
	case "listen":
		l, err := h.Listen(ctx, id, "tcp", args[0])
		if err != nil {
			return err
		}
		defer l.Close()
		fmt.Fprintln(stdout, l.Addr())
		c, err := l.Accept()
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Fprintln(stdout, c.RemoteAddr())
		_, err = io.Copy(c, c)
		return err
	}
	return nil
}

// tcpPair returns both ends of a connection; with an error they need not be closed.
func tcpPair() (near, far *net.TCPConn, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	d, err := l.Accept()
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	return c.(*net.TCPConn), d.(*net.TCPConn), nil
}

// carried prints what comes out of a stream that was handed over, and what it says to have carried.
func carried(t *plugin.Transfer, near io.Reader, stdout io.Writer) error {
	if _, err := io.Copy(stdout, near); err != nil {
		return err
	}
	t.Wait()
	in, out := t.Counts()
	fmt.Fprintf(stdout, " (in %d, out %d)", in, out)
	return nil
}

func (j *judge) Observe(_ context.Context, e plugin.Event) {
	if e.Kind == "stall" {
		select {}
	}
	host := e.Use.Target.Host
	if b, ok := e.Connection.Block.(*judgeBlock); ok {
		host = e.Connection.Target.Host + " " + b.Do
	}
	j.cfg.Load().Log.Info().Str("event", e.Kind+e.ID).Str("host", host).Bool("allowed", e.Allowed).Uint64("dropped", e.Dropped).Msg("observed")
}

func newJudge(name string) *judge {
	return &judge{info: plugin.Info{
		Name: name, Version: "1", AsksPerson: strings.HasPrefix(name, "ask"), Host: judgeBlock{}, Plugin: judgeOwn{},
		Wants: plugin.Capabilities(), Verbs: []plugin.Verb{{Usage: "echo TEXT", Doc: "say it"}},
	}}
}

// onlyConfigure has no hooks.
type onlyConfigure struct{ configure func() }

func (onlyConfigure) Describe() plugin.Info { return plugin.Info{Name: "bad", Version: "1"} }
func (p onlyConfigure) Configure(context.Context, *plugin.Config) plugin.Diagnostics {
	p.configure()
	return nil
}

func playPlugin(args []string) {
	name := args[0]
	mode := "judge"
	if len(args) > 1 {
		mode = args[1]
	}
	// stubborn never ends by itself.
	stubborn := func(p plugin.Plugin) {
		dieWithMaster()
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
		var hello [4096]byte
		if _, err := os.Stdin.Read(hello[:]); err != nil {
			os.Exit(4)
		}
		path := filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			os.Exit(4)
		}
		s := grpc.NewServer()
		if err := plugin.Register(s, p, nil, zerolog.Nop()); err != nil {
			os.Exit(4)
		}
		grpc_health_v1.RegisterHealthServer(s, health.NewServer())
		fmt.Printf("1|1|unix|%s|grpc\n", path)
		s.Serve(l)
	}
	switch mode {
	case "judge":
		plugin.Serve(newJudge(name))
	case "other": // with another schema
		j := newJudge(name)
		j.info.Host = struct{}{}
		plugin.Serve(j)
	case "junk":
		os.Stderr.WriteString("{\"@message\": 1}\n\x00\xff\x1b[2J\n" + strings.Repeat("x", 200000) + "\n{\"level\":\"panic\",\"message\":\"help\",\"n\":1}\n")
		plugin.Serve(newJudge(name))
	case "crash-configure":
		plugin.Serve(onlyConfigure{func() { os.Exit(3) }})
	case "hang-configure":
		plugin.Serve(onlyConfigure{func() { select {} }})
	case "mute":
		select {}
	case "exit":
		fmt.Fprintln(os.Stderr, "I don't want to")
		os.Exit(1)
	case "garbage":
		fmt.Println("hello\x1b world")
		select {}
	case "v0", "v99":
		fmt.Printf("1|%s|unix|/nowhere|grpc\n", mode[1:])
		select {}
	case "elsewhere":
		fmt.Println("1|1|unix|/tmp/elsewhere|grpc")
		select {}
	case "bad-schema":
		stubborn(brokenSchema{})
	case "stubborn":
		stubborn(newJudge(name))
	case "forks":
		cmd := exec.Command("sleep", "3600")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr // they hold the pipes
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
		if err := cmd.Start(); err != nil {
			os.Exit(4)
		}
		plugin.Serve(newJudge(name))
	}
}

// brokenSchema has names that nobody can write. It is registered as what a plugin in another language may say.
type brokenSchema struct{ onlyConfigure }

type brokenBlock struct {
	A int `hcl:"Not A Name"`
	B int `hcl:"when,optional"`
}

func (brokenSchema) Describe() plugin.Info {
	return plugin.Info{Name: "bad", Version: "1", Host: brokenBlock{}}
}

var _ pluginpb.PluginServer = pluginpb.UnimplementedPluginServer{}
