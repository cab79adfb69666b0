package upstream

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/muxproxy/muxproxy/core/use"
)

// connect makes the TCP connection: all addresses of the host, both families at once as RFC 8305 wants, and all of it again
// as often as ConnectionAttempts says.
func (d *dialing) connect(ctx context.Context) (net.Conn, error) {
	network := "tcp"
	switch strings.ToLower(d.option("addressfamily")) {
	case "inet":
		network = "tcp4"
	case "inet6":
		network = "tcp6"
	}
	dialer := net.Dialer{Timeout: d.connectTimeout(), KeepAlive: -1}
	if d.on("tcpkeepalive", true) {
		// The system's own times: finding a dead peer is the work of ServerAliveInterval.
		dialer.KeepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: -1, Interval: -1, Count: -1}
	}
	local, err := d.localAddr(ctx, network)
	if err != nil {
		return nil, err
	}
	if local != nil {
		dialer.LocalAddr = local
	}
	dial := func(ctx context.Context) (net.Conn, error) {
		return dialer.DialContext(ctx, network, d.spec.Target.Addr())
	}
	for attempt := 1; ; attempt++ {
		c, err := anew(ctx, dial)
		if err == nil {
			limitUnsent(c) // TCP_NODELAY is on by default
			return c, nil
		}
		if attempt >= d.number("connectionattempts", 1) || ctx.Err() != nil {
			return nil, d.explainDial(ctx, err)
		}
		d.debugf("connect to address %s port %d: %s", d.spec.Target.Host, d.spec.Target.Port, systemText(err))
		select { // as long as ssh waits
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, d.explainDial(ctx, err)
		}
	}
}

// anewAfter is how long a connection may take before another is tried beside it.
const anewAfter = 2 * time.Second

// anew dials, and where that takes long dials again, for a lost SYN is repeated after one, three, seven, fifteen seconds
// and so on (RFC 6298 sections 2 and 5): an ssh that comes when the network is back would wait with a dial that began
// while it was away, longer than on its own. The first dial goes on, the network may be slow; its error is the result's.
func anew(ctx context.Context, dial func(context.Context) (net.Conn, error)) (net.Conn, error) {
	type result struct {
		c     net.Conn
		err   error
		first bool
	}
	results := make(chan result)
	var tries sync.WaitGroup
	defer tries.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	try := func(ctx context.Context, first bool) {
		c, err := dial(ctx)
		select {
		case results <- result{c, err, first}:
		case <-ctx.Done():
			if err == nil {
				c.Close()
			}
		}
	}
	tries.Go(func() { try(ctx, true) })
	stopLast := func() {}
	tick := time.NewTicker(anewAfter)
	defer tick.Stop()
	for {
		select {
		case r := <-results:
			if r.err == nil || r.first {
				return r.c, r.err
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-tick.C:
			stopLast()
			next, stop := context.WithCancel(ctx)
			stopLast = stop
			tries.Go(func() { try(next, false) })
		}
	}
}

// localAddr is what BindAddress or BindInterface name, nil for none.
func (d *dialing) localAddr(ctx context.Context, network string) (*net.TCPAddr, error) {
	suits := func(ip net.IP) bool {
		switch network {
		case "tcp4":
			return ip.To4() != nil
		case "tcp6":
			return ip.To4() == nil
		}
		return true
	}
	if name := d.option("bindaddress"); name != "" {
		addrs, err := net.DefaultResolver.LookupIPAddr(ctx, name)
		for _, a := range addrs {
			if suits(a.IP) {
				return &net.TCPAddr{IP: a.IP, Zone: a.Zone}, nil
			}
		}
		if err != nil {
			return nil, d.errorf("BindAddress %s: %s", use.Printable(name), use.Printable(err.Error()))
		}
		return nil, d.errorf("BindAddress %s has no address of the wanted family", use.Printable(name))
	}
	name := d.option("bindinterface")
	if name == "" {
		return nil, nil
	}
	iface, err := net.InterfaceByName(name)
	if err != nil {
		return nil, d.errorf("BindInterface %s: %s", use.Printable(name), use.Printable(err.Error()))
	}
	addrs, err := iface.Addrs()
	if err != nil {
		return nil, d.errorf("BindInterface %s: %s", use.Printable(name), use.Printable(err.Error()))
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && suits(n.IP) && !n.IP.IsLinkLocalUnicast() {
			return &net.TCPAddr{IP: n.IP}, nil
		}
	}
	return nil, d.errorf("BindInterface %s has no address of the wanted family", use.Printable(name))
}

func (d *dialing) explainDial(ctx context.Context, err error) *Error {
	var dns *net.DNSError
	var op *net.OpError
	var e *Error
	var netErr net.Error
	switch {
	case ctx.Err() != nil:
		e = d.errorf("gave up connecting: %s", use.Printable(context.Cause(ctx).Error()))
	case errors.As(err, &dns) && dns.IsNotFound:
		e = d.errorf("host name not found; check the name and HostName in ssh_config")
	case errors.As(err, &dns):
		e = d.errorf("host name lookup failed: %s", use.Printable(dns.Err))
	default:
		e = d.errorf("%s", systemText(err))
		if errors.As(err, &netErr) && netErr.Timeout() {
			e.Msg = "connection timed out after " + d.connectTimeout().String()
		}
		if errors.As(err, &op) && op.Addr != nil {
			if host, _, err := net.SplitHostPort(op.Addr.String()); err == nil && host != d.spec.Target.Host {
				e.Msg += " (" + use.Printable(host) + ")"
			}
		}
	}
	e.Err = err
	return e
}

// systemText is what the system calls an error, without the call's name and addresses.
func systemText(err error) string {
	var errno syscall.Errno
	var syscallErr *os.SyscallError
	switch {
	case errors.As(err, &errno):
		return use.Printable(errno.Error())
	case errors.As(err, &syscallErr):
		return use.Printable(syscallErr.Err.Error())
	}
	return use.Printable(err.Error())
}
