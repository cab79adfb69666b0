//go:build linux

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
)

// bare is an ssh whose ProxyCommand is the least that can stand where muxproxy's master does: x/crypto/ssh towards the ssh,
// x/crypto/ssh towards sshd, io.Copy between, one process for each ssh. It shows what the library allows, and is no way to
// share anything.
const bare way = "bare relay"

// bareCommand is what bare's ssh starts.
func bareCommand() *cobra.Command {
	return &cobra.Command{
		Use: "relay ADDRESS USER KEYFILE", Hidden: true, Args: cobra.ExactArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			return relayBare(cmd.Context(), args[0], args[1], args[2])
		},
	}
}

// bareConfig has the ciphers and the one key exchange that muxproxy's connections have with OpenSSH.
var bareConfig = ssh.Config{Ciphers: []string{ssh.CipherAES128GCM}, RekeyThreshold: 1 << 62}

// relayBare serves the ssh at this process's stdin and stdout.
func relayBare(ctx context.Context, addr, user, keyFile string) error {
	pem, err := os.ReadFile(keyFile)
	if err != nil {
		return err
	}
	signer, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	hostKey, err := ssh.NewSignerFromKey(key)
	if err != nil {
		return err
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer nc.Close()
	server, incoming, globals, err := ssh.NewClientConn(nc, addr, &ssh.ClientConfig{
		Config: bareConfig, User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), ClientVersion: "SSH-2.0-OpenSSH_bench",
	})
	if err != nil {
		return err
	}
	go ssh.DiscardRequests(globals)
	go func() {
		for c := range incoming {
			_ = c.Reject(ssh.Prohibited, "a bare relay")
		}
	}()
	config := &ssh.ServerConfig{Config: bareConfig, NoClientAuth: true, ServerVersion: "SSH-2.0-OpenSSH_bench"}
	config.AddHostKey(hostKey)
	_, channels, globals, err := ssh.NewServerConn(stdio{os.Stdin, os.Stdout}, config)
	if err != nil {
		return err
	}
	go ssh.DiscardRequests(globals)
	for c := range channels {
		if err := bareChannel(c, server); err != nil {
			return fmt.Errorf("%s: %w", c.ChannelType(), err)
		}
	}
	return nil
}

// bareChannel joins a channel of the ssh's to a new one of the server's.
func bareChannel(nc ssh.NewChannel, server ssh.Conn) error {
	far, farRequests, err := server.OpenChannel(nc.ChannelType(), nc.ExtraData())
	if err != nil {
		return err
	}
	near, nearRequests, err := nc.Accept()
	if err != nil {
		return err
	}
	pass := func(to ssh.Channel, requests <-chan *ssh.Request) {
		for r := range requests {
			ok, err := to.SendRequest(r.Type, r.WantReply, r.Payload)
			_ = r.Reply(ok && err == nil, nil)
		}
	}
	go pass(far, nearRequests)
	go func() {
		_, _ = io.Copy(far, near)
		_ = far.CloseWrite()
	}()
	copied := make(chan struct{}, 2)
	down := func(to io.Writer, from io.Reader) {
		_, _ = io.Copy(to, from)
		copied <- struct{}{}
	}
	go down(near, far)
	go down(near.Stderr(), far.Stderr())
	go func() {
		pass(near, farRequests)
		<-copied
		<-copied
		_ = near.Close()
	}()
	return nil
}

// stdio is two pipes as a connection.
type stdio struct{ in, out *os.File }

func (s stdio) Read(b []byte) (int, error)       { return s.in.Read(b) }
func (s stdio) Write(b []byte) (int, error)      { return s.out.Write(b) }
func (s stdio) Close() error                     { s.in.Close(); return s.out.Close() }
func (s stdio) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (s stdio) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (s stdio) SetDeadline(time.Time) error      { return nil }
func (s stdio) SetReadDeadline(time.Time) error  { return nil }
func (s stdio) SetWriteDeadline(time.Time) error { return nil }
