package coalesce

import "net"

// readable returns nil: a read of Windows' has to have its buffer before there is anything to read.
func readable(net.Conn) func() { return nil }
