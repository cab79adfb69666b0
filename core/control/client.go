package control

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/muxproxy/muxproxy/core/control/controlpb"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	dialTime    = 5 * time.Second
	askTime     = 10 * time.Second
	maxResponse = 256 << 20 // a status with the arguments of every client's processes, a dump of every goroutine
)

// ErrLost says that the master went away during a call.
var ErrLost = errors.New("the master ended the connection; see `muxproxy log`")

// Master is a connection to a running master. Its methods mirror Backend and may be called by many goroutines. A denial is a *use.Denied; all
// other errors are a line for a person. Calls that change something wait 2 minutes for an answer, others 10 s, or as
// long as ctx allows if that is less.
type Master struct {
	conn *grpc.ClientConn
	rpc  controlpb.ControlClient
	unix *net.UnixConn
	lost chan struct{} // closed when unix is
}

// New speaks to the master at the other end of conn, a connection to its control socket whose peer the caller has
// checked. It takes conn over, also when it fails. The caller calls Disconnect.
func New(conn *net.UnixConn) (*Master, error) {
	m := &Master{unix: conn, lost: make(chan struct{})}
	first := watched{conn, sync.OnceFunc(func() { close(m.lost) })}
	var given atomic.Bool
	cc, err := grpc.NewClient("passthrough:///master",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a socket of this machine, its peer checked
		grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponse)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: dialTime}),
		// One connection, this one. gRPC asks for another when it is lost.
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if given.Swap(true) {
				return nil, ErrLost
			}
			return first, nil
		}))
	if err != nil {
		conn.Close()
		return nil, err
	}
	m.conn, m.rpc = cc, controlpb.NewControlClient(cc)
	return m, nil
}

// watched tells when gRPC has closed a connection, which it does once the peer has.
type watched struct {
	*net.UnixConn
	closed func()
}

func (w watched) Close() error {
	defer w.closed()
	return w.UnixConn.Close()
}

// Disconnect ends the connection. Calls under way fail.
func (m *Master) Disconnect() error {
	err := m.conn.Close()
	m.unix.Close() // gRPC has not taken it over before the first call; else this is the second Close and does nothing
	return err
}

// Lost is closed when a call has been made and the connection has ended since.
func (m *Master) Lost() <-chan struct{} { return m.lost }

// Status returns what the master holds.
func (m *Master) Status(ctx context.Context) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	r, err := m.rpc.Status(ctx, &controlpb.StatusRequest{})
	if err != nil {
		return Status{}, statusToError(err)
	}
	return statusFromPB(r), nil
}

// Exists reports whether an upstream for target is up.
func (m *Master) Exists(ctx context.Context, target string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	r, err := m.rpc.Exists(ctx, &controlpb.ExistsRequest{Target: text(target)})
	return r.GetExists(), statusToError(err)
}

// Close ends matching upstreams and their clients now and returns how many there were. An empty target means all.
func (m *Master) Close(ctx context.Context, target string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	r, err := m.rpc.Close(ctx, &controlpb.CloseRequest{Target: text(target)})
	return int(r.GetUpstreams()), statusToError(err)
}

// Drain lets matching upstreams end with their last clients and returns how many there were. An empty target means all.
func (m *Master) Drain(ctx context.Context, target string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	r, err := m.rpc.Drain(ctx, &controlpb.DrainRequest{Target: text(target)})
	return int(r.GetUpstreams()), statusToError(err)
}

// Stop ends the master: at once, or with its last client if drain is set.
func (m *Master) Stop(ctx context.Context, drain bool) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	_, err := m.rpc.Stop(ctx, &controlpb.StopRequest{Drain: drain})
	return statusToError(err)
}

// Restart has a new master take over, which may not be ready yet when its pid comes back.
func (m *Master) Restart(ctx context.Context) (pid int, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	r, err := m.rpc.Restart(ctx, &controlpb.RestartRequest{})
	return int(r.GetPid()), statusToError(err)
}

// Reload has the master read its policy file. color allows ANSI colours in the text.
func (m *Master) Reload(ctx context.Context, color bool) (Reloaded, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	r, err := m.rpc.Reload(ctx, &controlpb.ReloadRequest{Color: color})
	if err != nil {
		return Reloaded{}, statusToError(err)
	}
	return Reloaded{
		File: r.GetFile(), InForce: r.GetInForce(), Text: string(r.GetText()), Diagnostics: r.GetDiagnostics(),
	}, nil
}

// Lock stops all new uses; the passphrase, which may be empty, is needed to open it.
func (m *Master) Lock(ctx context.Context, passphrase []byte) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	_, err := m.rpc.Lock(ctx, &controlpb.LockRequest{Passphrase: passphrase})
	return statusToError(err)
}

// Unlock opens what Lock has locked, and returns what still locks. A wrong passphrase is use.ErrPassphrase.
func (m *Master) Unlock(ctx context.Context, passphrase []byte) (use.LockState, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	r, err := m.rpc.Unlock(ctx, &controlpb.UnlockRequest{Passphrase: passphrase})
	if err != nil {
		return use.LockState{}, statusToError(err)
	}
	if r.GetWrong() {
		err = use.ErrPassphrase
	}
	return lockFromPB(r.GetLock()), err
}

// HostKeys returns the public halves of the plain local host keys and of the CAs, in authorized_keys form: of all types, or, if
// made is set, of those that have been made.
func (m *Master) HostKeys(ctx context.Context, made bool) (plain, ca []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	r, err := m.rpc.HostKeys(ctx, &controlpb.HostKeysRequest{Made: made})
	return r.GetPlain(), r.GetCa(), statusToError(err)
}

// Dump returns text for a bug report.
func (m *Master) Dump(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	r, err := m.rpc.Dump(ctx, &controlpb.DumpRequest{})
	return string(r.GetText()), statusToError(err)
}
