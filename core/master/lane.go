package master

import (
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

// lane predicts what the client will need, while its person can still be asked for a login: the agent that it forwards,
// and whether what its command line runs moves much. A wrong guess costs time, nothing else: sessions say themselves
// what they need.
func (c *client) lane(target use.Target, config *sshconfig.Resolved) pool.Lane {
	var l pool.Lane
	if f := config.Get("forwardagent"); f != "" && !strings.EqualFold(f, "no") {
		l.Agent = c.forwarded
	}
	for _, p := range c.who.Processes {
		if filepath.Base(p.Exe) != "ssh" || len(p.Args) == 0 {
			continue
		}
		args, err := sshconfig.ParseArgs(p.Args[1:])
		if err != nil {
			break
		}
		u := use.Use{Kind: use.Shell, Client: c.id, Caller: c.caller(), Target: target}
		switch {
		case len(args.Command) > 0 && slices.Contains(args.Options, "-s"):
			u.Kind, u.Subsystem = use.Subsystem, args.Command[0]
		case len(args.Command) > 0:
			u.Kind, u.Command = use.Exec, strings.Join(args.Command, " ")
		}
		if class, ok := c.class(u); ok {
			l.Class = class
		} else if pool.KnownBulk(u) {
			l.Class = pool.Bulk
		}
		break
	}
	return l
}

// class is what a lane block says of a session (pool.Spec's Class).
func (c *client) class(u use.Use) (pool.Class, bool) {
	switch c.master.policy.lookup().For(u.Target, u.Caller).Lane(u) {
	case "bulk":
		return pool.Bulk, true
	case "interactive":
		return pool.Interactive, true
	}
	return 0, false
}

// forwardedAgent is the identity of the agent that ssh forwards: the one that ForwardAgent names, else that of the caller.
func (c *client) forwardedAgent(config *sshconfig.Resolved, own *agent) string {
	switch path := config.Get("forwardagent"); {
	case path == "", strings.EqualFold(path, "no"), strings.EqualFold(path, "yes"):
	case strings.HasPrefix(path, "$"):
		own = nil // in an environment that is not ours to read
	default:
		own = newAgent(path, nil)
	}
	if own == nil {
		return "client " + strconv.FormatUint(c.id, 10) // whatever it is, nobody else's
	}
	return own.id
}
