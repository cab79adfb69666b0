package control

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muxproxy/muxproxy/core/control/controlpb"
	"github.com/muxproxy/muxproxy/core/use"
)

// Conversions between the types of this package and their messages, in pairs. The message side stays in this package.

// text makes s fit a proto3 string, which has to be UTF-8: a message with any other fails as a whole.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func timeToPB(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func timeFromPB(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// each converts a list. It returns an empty one, never nil: JSON has [] for it.
func each[A, B any](list []A, convert func(A) B) []B {
	out := make([]B, 0, len(list))
	for _, a := range list {
		out = append(out, convert(a))
	}
	return out
}

func statusToPB(s Status) *controlpb.StatusResponse {
	return &controlpb.StatusResponse{
		Version: text(s.Version), Pid: int64(s.PID), Since: timeToPB(s.Since), Sockets: text(s.Sockets),
		Draining: s.Draining, Lock: lockToPB(s.Lock), Policy: text(s.Policy), Upstreams: each(s.Upstreams, upstreamToPB), Clients: each(s.Clients, clientToPB),
	}
}

func statusFromPB(s *controlpb.StatusResponse) Status {
	return Status{
		Version: s.GetVersion(), PID: int(s.GetPid()), Since: timeFromPB(s.GetSince()), Sockets: s.GetSockets(),
		Draining: s.GetDraining(), Lock: lockFromPB(s.GetLock()), Policy: s.GetPolicy(), Upstreams: each(s.GetUpstreams(), upstreamFromPB), Clients: each(s.GetClients(), clientFromPB),
	}
}

func lockToPB(l use.LockState) *controlpb.LockState {
	return &controlpb.LockState{Locked: l.Locked, Since: timeToPB(l.Since), By: each(l.By, text), Passphrase: l.Passphrase}
}

func lockFromPB(l *controlpb.LockState) use.LockState {
	return use.LockState{
		Locked: l.GetLocked(), Since: timeFromPB(l.GetSince()), By: l.GetBy(), Passphrase: l.GetPassphrase(),
	}
}

func upstreamToPB(u Upstream) *controlpb.Upstream {
	return &controlpb.Upstream{
		Id: u.ID, Target: text(u.Target), Lane: text(u.Lane), State: text(u.State), Since: timeToPB(u.Since),
		LastHeard: timeToPB(u.LastHeard), Addr: text(u.Addr), Server: text(u.Server), HostKey: text(u.HostKey),
		Kex: text(u.Kex), Cipher: text(u.Cipher), PostQuantum: u.PostQuantum, Auth: text(u.Auth),
		Clients: int64(u.Clients), Channels: int64(u.Channels), In: u.In, Out: u.Out,
		Sessions: int64(u.Sessions), MaxSessions: int64(u.MaxSessions), Suspect: u.Suspect,
		IdleSince: timeToPB(u.IdleSince), KeptUntil: timeToPB(u.KeptUntil),
	}
}

func upstreamFromPB(u *controlpb.Upstream) Upstream {
	return Upstream{
		ID: u.GetId(), Target: u.GetTarget(), Lane: u.GetLane(), State: u.GetState(), Since: timeFromPB(u.GetSince()),
		LastHeard: timeFromPB(u.GetLastHeard()), Addr: u.GetAddr(), Server: u.GetServer(), HostKey: u.GetHostKey(),
		Kex: u.GetKex(), Cipher: u.GetCipher(), PostQuantum: u.GetPostQuantum(), Auth: u.GetAuth(),
		Clients: int(u.GetClients()), Channels: int(u.GetChannels()), In: u.GetIn(), Out: u.GetOut(),
		Sessions: int(u.GetSessions()), MaxSessions: int(u.GetMaxSessions()), Suspect: u.GetSuspect(),
		IdleSince: timeFromPB(u.GetIdleSince()), KeptUntil: timeFromPB(u.GetKeptUntil()),
	}
}

func clientToPB(c Client) *controlpb.Client {
	return &controlpb.Client{
		Id: c.ID, Target: text(c.Target), Alias: text(c.Alias), Upstream: c.Upstream, Mode: text(c.Mode),
		Since: timeToPB(c.Since), Caller: callerToPB(c.Caller), Channels: each(c.Channels, channelToPB),
	}
}

func clientFromPB(c *controlpb.Client) Client {
	return Client{
		ID: c.GetId(), Target: c.GetTarget(), Alias: c.GetAlias(), Upstream: c.GetUpstream(), Mode: c.GetMode(),
		Since: timeFromPB(c.GetSince()), Caller: callerFromPB(c.GetCaller()), Channels: each(c.GetChannels(), channelFromPB),
	}
}

func channelToPB(c Channel) *controlpb.Channel {
	return &controlpb.Channel{
		Kind: text(c.Kind), Detail: text(c.Detail), Since: timeToPB(c.Since), In: c.In, Out: c.Out, Upstream: c.Upstream,
	}
}

func channelFromPB(c *controlpb.Channel) Channel {
	return Channel{
		Kind: c.GetKind(), Detail: c.GetDetail(), Since: timeFromPB(c.GetSince()), In: c.GetIn(), Out: c.GetOut(),
		Upstream: c.GetUpstream(),
	}
}

func callerToPB(c use.Caller) *controlpb.Caller {
	return &controlpb.Caller{Uid: int64(c.UID), Processes: each(c.Processes, processToPB)}
}

func callerFromPB(c *controlpb.Caller) use.Caller {
	return use.Caller{UID: int(c.GetUid()), Processes: each(c.GetProcesses(), processFromPB)}
}

func processToPB(p use.Process) *controlpb.Process {
	return &controlpb.Process{
		Pid: int64(p.PID), Start: p.Start, Exe: []byte(p.Exe), Cwd: []byte(p.Cwd), Tty: text(p.TTY),
		Args: each(p.Args, func(a string) []byte { return []byte(a) }),
	}
}

func processFromPB(p *controlpb.Process) use.Process {
	return use.Process{
		PID: int(p.GetPid()), Start: p.GetStart(), Exe: string(p.GetExe()), Cwd: string(p.GetCwd()), TTY: p.GetTty(),
		Args: each(p.GetArgs(), func(a []byte) string { return string(a) }),
	}
}

func deniedToPB(d *use.Denied) *controlpb.Denied {
	return &controlpb.Denied{By: text(d.By), Reason: text(d.Reason), Hint: text(d.Hint)}
}

func deniedFromPB(d *controlpb.Denied) *use.Denied {
	return &use.Denied{By: d.GetBy(), Reason: d.GetReason(), Hint: d.GetHint()}
}
