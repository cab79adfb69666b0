//go:build !linux

// Command bench measures muxproxy beside OpenSSH's ControlMaster and plain ssh. It needs Linux.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "bench: it reads /proc, and so runs on Linux only")
	os.Exit(1)
}
