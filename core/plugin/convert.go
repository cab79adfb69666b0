package plugin

import (
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

// What goes over the wire and back: pure functions.

func infoToPB(p Plugin, info Info) (*pluginpb.DescribeResponse, error) {
	out := &pluginpb.DescribeResponse{Name: info.Name, Version: info.Version, AsksPerson: info.AsksPerson}
	if _, ok := p.(Authorizer); ok {
		out.Hooks = append(out.Hooks, "authorize")
	}
	if _, ok := p.(Retainer); ok {
		out.Hooks = append(out.Hooks, "retain")
	}
	if _, ok := p.(Observer); ok {
		out.Hooks = append(out.Hooks, "observe")
	}
	if _, ok := p.(Commander); ok {
		out.Hooks = append(out.Hooks, "command")
	}
	for _, c := range info.Wants {
		out.Wants = append(out.Wants, string(c))
	}
	for _, v := range info.Verbs {
		out.Verbs = append(out.Verbs, &pluginpb.Verb{Usage: v.Usage, Doc: v.Doc})
	}
	var err error
	if out.Plugin, err = Schema(info.Plugin); err != nil {
		return nil, err
	}
	out.Host, err = Schema(info.Host)
	return out, err
}

func diagnosticsToPB(ds Diagnostics) []*pluginpb.Diagnostic {
	var out []*pluginpb.Diagnostic
	for _, d := range ds {
		severity := pluginpb.Diagnostic_SEVERITY_ERROR
		if d.Warning {
			severity = pluginpb.Diagnostic_SEVERITY_WARNING
		}
		p := &pluginpb.Diagnostic{Severity: severity, Summary: d.Summary, Block: d.Block}
		for _, step := range d.Path {
			switch step := step.(type) {
			case string:
				p.Path = append(p.Path, &pluginpb.Step{Step: &pluginpb.Step_Attribute{Attribute: step}})
			case Key:
				p.Path = append(p.Path, &pluginpb.Step{Step: &pluginpb.Step_Key{Key: string(step)}})
			case int:
				p.Path = append(p.Path, &pluginpb.Step{Step: &pluginpb.Step_Index{Index: int64(step)}})
			}
		}
		out = append(out, p)
	}
	return out
}

func (d Decision) toPB() *pluginpb.Decision {
	return &pluginpb.Decision{Verdict: pluginpb.Decision_Verdict(d.verdict), Reason: d.reason, Hint: d.hint}
}

func targetFromPB(t *pluginpb.Target) Target {
	return Target{User: t.GetUser(), Host: t.GetHost(), Port: uint16(t.GetPort()), Alias: t.GetAlias()}
}

func useFromPB(u *pluginpb.Use) Use {
	out := Use{
		Kind: u.GetKind(), Client: u.GetClient(), Target: targetFromPB(u.GetTarget()), Command: string(u.GetCommand()),
		Program: u.GetProgram(), Subsystem: string(u.GetSubsystem()), Addr: string(u.GetAddr()), Name: string(u.GetName()),
		UID: int(u.GetUid()), LoggedIn: u.GetLoggedIn(),
	}
	for _, p := range u.GetProcesses() {
		q := Process{PID: int(p.GetPid()), Start: p.GetStart(), Exe: string(p.GetExe()), Cwd: string(p.GetCwd()), TTY: p.GetTty()}
		for _, a := range p.GetArgs() {
			q.Args = append(q.Args, string(a))
		}
		out.Processes = append(out.Processes, q)
	}
	return out
}

// connectionFromPB is told what blocks there are; see server.value.
func connectionFromPB(c *pluginpb.Connection, block func(id string) any) Connection {
	return Connection{
		ID: c.GetId(), Target: targetFromPB(c.GetTarget()), Lane: c.GetLane(), Up: c.GetUp(), Clients: int(c.GetClients()),
		Since: timeFromPB(c.GetSince()), Block: block(c.GetBlock()),
	}
}

func connectionsFromPB(list []*pluginpb.Connection, block func(id string) any) []Connection {
	out := make([]Connection, 0, len(list))
	for c := range slices.Values(list) {
		out = append(out, connectionFromPB(c, block))
	}
	return out
}

func eventFromPB(e *pluginpb.Event, block func(id string) any) Event {
	return Event{
		Time: timeFromPB(e.GetTime()), Kind: e.GetKind(), ID: e.GetId(), Use: useFromPB(e.GetUse()), Allowed: e.GetAllowed(),
		By: e.GetBy(), Reason: e.GetReason(), Result: e.GetResult(), ExitCode: e.GetExitCode(), In: e.GetIn(), Out: e.GetOut(),
		Connection: connectionFromPB(e.GetConnection(), block), Dropped: e.GetDropped(),
	}
}

func timeFromPB(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func timeToPB(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
