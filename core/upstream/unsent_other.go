//go:build !linux

package upstream

import "net"

func limitUnsent(net.Conn) {}
