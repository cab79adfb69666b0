// Package peercreds has the kernel tell a gRPC server on a Unix socket who calls.
package peercreds

import (
	"context"
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/use"
)

// New returns a server's handshake that asks the kernel instead of the peer. The socket is local, so there is nothing to
// encrypt. Connections have to be *net.UnixConn; a peer of another user than this one or root is turned away.
func New() credentials.TransportCredentials { return creds{} }

// CallerOf returns who makes a call to a server with these credentials. It panics in any other server: nobody there can be
// told from root.
func CallerOf(ctx context.Context) use.Caller {
	p, ok := peer.FromContext(ctx)
	if !ok {
		panic("peercreds: no call of a server")
	}
	return p.AuthInfo.(info).caller
}

type creds struct{}

// info is what a handshake found out.
type info struct {
	credentials.CommonAuthInfo
	caller use.Caller
}

func (info) AuthType() string { return "peer" }

func (creds) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	unix, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("a %T is no Unix socket", c)
	}
	caller, err := use.ReadCaller(unix)
	if err != nil {
		return nil, nil, err
	}
	i, err := admit(caller)
	return c, i, err
}

func admit(caller use.Caller) (credentials.AuthInfo, error) {
	if !paths.Trusted(caller.UID) {
		return nil, fmt.Errorf("uid %d has no business with this master", caller.UID)
	}
	return info{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, caller}, nil
}

func (creds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peercreds is for servers")
}

func (creds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peer"}
}

func (c creds) Clone() credentials.TransportCredentials { return c }

func (creds) OverrideServerName(string) error { return nil }
