// Command muxproxy is what ssh_config names as ProxyCommand: it hands the stream of an ssh to the master. Every other
// word than USER@HOST:PORT is a command of muxproxyd.
package main

import (
	"os"

	"github.com/muxproxy/muxproxy/core/bridge"
)

func main() {
	os.Exit(bridge.Run(os.Args[1:], bridge.Std{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}, os.Getenv))
}
