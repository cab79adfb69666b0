package upstream

import (
	"fmt"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/pool"
)

// socketOption reads an option of a connection's socket.
func socketOption(t *testing.T, c net.Conn, level, option int) int {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	check(t, err)
	var value int
	var optErr error
	check(t, raw.Control(func(fd uintptr) { value, optErr = unix.GetsockoptInt(int(fd), level, option) }))
	check(t, optErr)
	return value
}

// The packets of a connection are marked as IPQoS says for what it carries, and its backlog stays out of the kernel.
func TestSocketOptions(t *testing.T) {
	user := newKey(t, "ed25519")
	s := startSSHD(t, user, []key{user})
	for _, tc := range []struct {
		ipqos             string
		interactive, bulk int
	}{
		{"", 0, 0}, // none in the configuration: left alone
		{"ipqos none none", 0, 0},
		{"ipqos af21 cs1", 0x48, 0x20},
		{"ipqos EF le", 0xb8, 0x04},
		{"ipqos cs5", 0xa0, 0xa0},
		{"ipqos 0x10 010", 0x10, 0x08},
		{"ipqos nonsense 256", 0, 0},
	} {
		for _, class := range []pool.Class{pool.Interactive, pool.Bulk} {
			t.Run(fmt.Sprintf("%s %d", tc.ipqos, class), func(t *testing.T) {
				sp := spec(t, s.port, s.known(t), "identityfile "+user.file(t, s.dir, "id", ""), tc.ipqos)
				sp.Lane.Class = class
				c := dial(t, sp).(*conn)
				want := map[pool.Class]int{pool.Interactive: tc.interactive, pool.Bulk: tc.bulk}
				tos := func() int { return socketOption(t, c.t.raw, unix.IPPROTO_IP, unix.IP_TOS) }
				if got := tos(); got != want[class] {
					t.Errorf("marked %#x, not %#x", got, want[class])
				}
				other := pool.Bulk - class
				c.Mark(other)
				if got := tos(); got != want[other] {
					t.Errorf("then marked %#x, not %#x", got, want[other])
				}
				if got := socketOption(t, c.t.raw, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT); got != unsentBytes {
					t.Errorf("TCP_NOTSENT_LOWAT %d", got)
				}
				if socketOption(t, c.t.raw, unix.IPPROTO_TCP, unix.TCP_NODELAY) == 0 {
					t.Error("no TCP_NODELAY")
				}
				check(t, c.Close())
			})
		}
	}
}

// IPv6 has another option for it.
func TestMarkIPv6(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	check(t, err)
	defer l.Close()
	tcp, err := net.Dial("tcp6", l.Addr().String())
	check(t, err)
	defer tcp.Close()
	c := &conn{t: newTransport(tcp, "h"), qos: qos{0x48, 0x20}}
	for class, want := range map[pool.Class]int{pool.Interactive: 0x48, pool.Bulk: 0x20} {
		c.Mark(class)
		if got := socketOption(t, tcp, unix.IPPROTO_IPV6, unix.IPV6_TCLASS); got != want {
			t.Errorf("marked %#x, not %#x", got, want)
		}
	}
	// What has no socket of its own is left alone.
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	(&conn{t: newTransport(a, "h"), qos: qos{0x48, 0x20}}).Mark(pool.Bulk)
}
