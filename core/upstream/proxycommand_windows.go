package upstream

import (
	"context"
	"net"
	"os/exec"
)

func ownGroup(*exec.Cmd) {}

func hangUp(cmd *exec.Cmd) { _ = cmd.Process.Kill() }

func kill(cmd *exec.Cmd) { _ = cmd.Process.Kill() }

func (d *dialing) proxyFD(context.Context, *exec.Cmd, *lineWriter) (net.Conn, error) {
	return nil, d.errorf("ProxyUseFdpass can't be shared; connect without sharing: %s", d.bypass)
}
