package forward

import "net"

func peerOf(net.Conn) (peer, error) { return peer{}, errUntold }
