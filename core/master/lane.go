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
func (c *client) lane(config *sshconfig.Resolved) pool.Lane {
	var l pool.Lane
	if f := config.Get("forwardagent"); f != "" && !strings.EqualFold(f, "no") {
		l.Agent = c.forwarded
	}
	for _, p := range c.caller.Processes {
		if filepath.Base(p.Exe) != "ssh" || len(p.Args) == 0 {
			continue
		}
		args, err := sshconfig.ParseArgs(p.Args[1:])
		if err != nil || len(args.Command) == 0 {
			break
		}
		u := use.Use{Kind: use.Exec, Command: strings.Join(args.Command, " ")}
		if slices.Contains(args.Options, "-s") {
			u = use.Use{Kind: use.Subsystem, Subsystem: args.Command[0]}
		}
		if pool.KnownBulk(u) {
			l.Class = pool.Bulk
		}
		break
	}
	return l
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
