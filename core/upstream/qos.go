package upstream

import (
	"net"
	"strconv"
	"strings"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/muxproxy/muxproxy/core/pool"
)

// qos is what IPQoS says: the DSCP or ToS byte for interactive sessions, and for the rest; -1 leaves it alone.
type qos struct{ interactive, bulk int }

// qosNames are those of ssh_config(5), as bytes of the IP header (RFC 2474, RFC 3246, RFC 8622; RFC 1349 for the last).
var qosNames = map[string]int{
	"af11": 0x28, "af12": 0x30, "af13": 0x38, "af21": 0x48, "af22": 0x50, "af23": 0x58,
	"af31": 0x68, "af32": 0x70, "af33": 0x78, "af41": 0x88, "af42": 0x90, "af43": 0x98,
	"cs0": 0x00, "cs1": 0x20, "cs2": 0x40, "cs3": 0x60, "cs4": 0x80, "cs5": 0xa0, "cs6": 0xc0, "cs7": 0xe0,
	"ef": 0xb8, "le": 0x04, "va": 0xb0, "lowdelay": 0x10, "throughput": 0x08, "reliability": 0x04,
}

// qos reads IPQoS: one word for both, or two. `ssh -G` prints its default, too.
func (d *dialing) qos() qos {
	words := strings.Fields(d.spec.Config.Get("ipqos"))
	if len(words) == 0 {
		return qos{-1, -1}
	}
	return qos{qosValue(words[0]), qosValue(words[len(words)-1])}
}

func qosValue(word string) int {
	if v, ok := qosNames[strings.ToLower(word)]; ok {
		return v
	}
	if v, err := strconv.ParseUint(word, 0, 8); err == nil {
		return int(v)
	}
	return -1 // "none"
}

// Mark implements pool.Marker. What can't be marked (a ProxyCommand's pipe, a jump) is not: it would be a hint only.
func (c *conn) Mark(class pool.Class) {
	value := c.qos.interactive
	if class == pool.Bulk {
		value = c.qos.bulk
	}
	tcp, ok := c.t.raw.(*net.TCPConn)
	if !ok || value < 0 {
		return
	}
	var err error
	if a, ok := tcp.RemoteAddr().(*net.TCPAddr); ok && a.IP.To4() != nil {
		err = ipv4.NewConn(tcp).SetTOS(value)
	} else {
		err = ipv6.NewConn(tcp).SetTrafficClass(value)
	}
	if err != nil {
		c.log.Debug().Err(err).Msg("the connection can't be marked")
	}
}
