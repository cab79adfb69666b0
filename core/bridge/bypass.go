package bridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/wire"
)

// lastBytes is how long the far end may take to close after ssh has ended. Closing before it has read all would make it
// lose what was sent (a TCP reset).
const lastBytes = 5 * time.Second

// bypassing holds, for the programs that a bypass runs, the target that is bypassed already.
const bypassing = "MUXPROXY_BYPASSING"

// bypass connects ssh with the host itself, as ssh_config would without muxproxy.
func (b *bridge) bypass() int {
	config, err := b.config()
	if b.getenv(bypassing) == b.target.String() {
		// The host's own ProxyCommand or ProxyJump has led here again, so it is none of its own.
		config = &sshconfig.Resolved{}
	}
	os.Setenv(bypassing, b.target.String())
	if err == nil && config.Get("hostname") != "" { // a canonical name that ssh left to its proxy
		b.target.Host = strings.Trim(config.Get("hostname"), "[]")
		if port, err := strconv.ParseUint(config.Get("port"), 10, 16); err == nil && port != 0 {
			b.target.Port = uint16(port)
		}
	}
	if err != nil {
		// ssh itself has read its configuration, so this is about asking it. Most hosts need nothing of the answer.
		if b.gone.Err() != nil {
			return exitFailed
		}
		b.say(fmt.Sprintf("%v; connecting to %s directly", err, b.target.Addr()))
		config = &sshconfig.Resolved{}
	}
	if c := config.Get("proxycommand"); c != "" && !strings.EqualFold(c, "none") {
		return b.bypassCommand(config)
	}
	if j := config.Get("proxyjump"); j != "" && !strings.EqualFold(j, "none") {
		argv := jumpCommand(j, b.target, b.args)
		path, err := exec.LookPath(argv[0])
		if err != nil {
			return b.fail(fmt.Errorf("ProxyJump %s: %w", j, err))
		}
		return b.runInstead(path, argv)
	}
	conn, err := dial(b.gone, b.target, config)
	if err != nil {
		return b.fail(err)
	}
	defer conn.Close()
	if b.fdpass && isUnixSocket(b.std.Out) {
		return b.passBack(conn)
	}
	return b.copy(conn, b.target.Addr())
}

// bypassCommand runs the host's own ProxyCommand as ssh would (sshconnect.c).
func (b *bridge) bypassCommand(config *sshconfig.Resolved) int {
	names, err := sshconfig.LocalNames()
	if err != nil {
		return b.fail(err)
	}
	names.User, names.Host, names.Alias = b.target.User, b.target.Host, b.target.Alias
	if names.Alias == "" {
		names.Alias = b.target.Host
	}
	names.Port, names.Key = strconv.Itoa(int(b.target.Port)), config.Get("hostkeyalias")
	command, err := config.ExpandProxyCommand(names)
	if err != nil {
		return b.fail(fmt.Errorf("ProxyCommand of %s: %w", b.target.Addr(), err))
	}
	shell := b.getenv("SHELL")
	if shell == "" {
		shell = "/bin/sh"
	}
	argv := []string{shell, "-c", "exec " + command}
	if !strings.EqualFold(config.Get("proxyusefdpass"), "yes") {
		return b.runInstead(shell, argv)
	}
	if !b.fdpass {
		return b.fail(fmt.Errorf("ProxyCommand of %s passes its connection back: "+
			"give muxproxy --fdpass and ssh ProxyUseFdpass yes", b.target.Addr()))
	}
	return b.fail(replace(shell, argv)) // what it passes goes where ours would
}

// runInstead lets a program that speaks on its standard streams take this process's place.
func (b *bridge) runInstead(path string, argv []string) int {
	if !b.fdpass || !isUnixSocket(b.std.Out) {
		return b.fail(replace(path, argv))
	}
	// ssh waits for this process and wants a socket: give it one end of a pair, and the program the other.
	ours, theirs, err := socketPair()
	if err != nil {
		return b.fail(err)
	}
	defer ours.Close()
	cmd := &exec.Cmd{Path: path, Args: argv, Stdin: theirs, Stdout: theirs, Stderr: b.std.Err}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return b.fail(err)
	}
	return b.passBack(ours) // the program goes on without this process, until ssh closes its end
}

// jumpCommand is what ssh makes of ProxyJump (ssh.c): the last host connects, through those before it.
func jumpCommand(jump string, t wire.Target, args sshconfig.Args) []string {
	argv := []string{"ssh"}
	last := jump
	if i := strings.LastIndexByte(jump, ','); i >= 0 {
		argv = append(argv, "-J", jump[:i])
		last = jump[i+1:]
	}
	if i := strings.LastIndexByte(last, '@'); i >= 0 {
		argv = append(argv, "-l", last[:i])
		last = last[i+1:]
	}
	host, port := last, ""
	if h, p, err := net.SplitHostPort(last); err == nil {
		host, port = h, p
	}
	if port != "" {
		argv = append(argv, "-p", port)
	}
	file := ""
	for i := 0; i < len(args.Options); i++ {
		switch args.Options[i] {
		case "-v":
			argv = append(argv, "-v")
		case "-F":
			if i++; i < len(args.Options) {
				file = args.Options[i]
			}
		}
	}
	if file != "" {
		argv = append(argv, "-F", file)
	}
	return append(argv, "-W", fmt.Sprintf("[%s]:%d", t.Host, t.Port), "--", strings.Trim(host, "[]"))
}

// dial connects to the target, trying its addresses in the resolver's order. ssh -G's lines that matter to a socket are
// obeyed. The error is a complete line for a person.
func dial(ctx context.Context, t wire.Target, config *sshconfig.Resolved) (*net.TCPConn, error) {
	family, network := "ip", "tcp"
	switch config.Get("addressfamily") {
	case "inet":
		family, network = "ip4", "tcp4"
	case "inet6":
		family, network = "ip6", "tcp6"
	}
	var d net.Dialer
	if s, err := strconv.Atoi(config.Get("connecttimeout")); err == nil && s > 0 {
		d.Timeout = time.Duration(s) * time.Second
	}
	if config.Get("tcpkeepalive") == "no" {
		d.KeepAlive = -1
	}
	if name := config.Get("bindinterface"); name != "" {
		d.Control = bindTo(name)
	}
	if bind := config.Get("bindaddress"); bind != "" {
		local, err := net.ResolveTCPAddr(network, net.JoinHostPort(bind, "0"))
		if err != nil {
			return nil, fmt.Errorf("%s: BindAddress: %w", t.Addr(), reason(err))
		}
		d.LocalAddr = local
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, family, t.Host)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.Addr(), reason(err))
	}
	var tried []string
	for _, ip := range addrs {
		conn, err := d.DialContext(ctx, network, netip.AddrPortFrom(ip.Unmap(), t.Port).String())
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%s: %w", t.Addr(), context.Cause(ctx))
		}
		tried = append(tried, fmt.Sprintf("%v (%v)", reason(err), ip.Unmap()))
	}
	return nil, fmt.Errorf("%s: %s", t.Addr(), strings.Join(tried, "; "))
}

// reason takes off what package net puts around an error: the address, which the line has anyway.
func reason(err error) error {
	var lookup *net.DNSError
	var errno syscall.Errno
	switch {
	case errors.As(err, &lookup):
		if lookup.IsNotFound {
			return errors.New("no such host")
		}
		return errors.New(lookup.Err)
	case errors.As(err, &errno):
		return errno
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("timed out")
	}
	return err
}

// halfConn is what net.TCPConn and net.UnixConn have in common.
type halfConn interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

// copy carries the stream between ssh and conn until conn ends. The end of stdin is passed on and does not end it, but
// once ssh has gone as well nobody reads any more. peer is for a message.
func (b *bridge) copy(conn halfConn, peer string) int {
	in := newInput(b.std.In)
	up := make(chan struct{})
	go func() {
		defer close(up)
		io.Copy(conn, in)
		conn.CloseWrite()
	}()
	down := make(chan error, 1)
	go func() {
		_, err := io.Copy(b.std.Out, conn)
		down <- err
	}()

	var (
		err     error
		sent    = up             // until stdin has ended
		left    <-chan struct{}  // from then on: ssh has ended
		tooLate <-chan time.Time // from then on
	)
	for ended := false; !ended; {
		select {
		case err = <-down:
			ended = true
		case <-sent:
			sent, left = nil, b.gone.Done()
		case <-left:
			left, tooLate = nil, time.After(lastBytes)
		case <-tooLate:
			conn.Close()
			tooLate = nil
		}
	}
	conn.Close()
	if in.stop() {
		<-up
		in.release()
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "read" && b.gone.Err() == nil {
		return b.fail(fmt.Errorf("%s: %w", peer, reason(err)))
	}
	return exitOK
}

// passBack gives ssh the connected socket itself, as `nc -F` does, for ProxyUseFdpass yes.
func (b *bridge) passBack(conn syscall.Conn) int {
	if err := sendSocket(b.std.Out, conn); err != nil {
		return b.fail(fmt.Errorf("passing the connection back to ssh: %w", err))
	}
	return exitOK
}
