//go:build linux

package e2e

import (
	"fmt"
	"os"
)

// helper is what the test binary does where a test needs a process of its own. It returns an exit status.
func helper(name string, args []string) int {
	switch name {
	case "knock":
		return knock(args)
	case "victim":
		return victim()
	case "attack":
		return attack(args)
	case "trace":
		return trace(args)
	case "xclient":
		return xclient(args)
	}
	fmt.Fprintf(os.Stderr, "no helper %q %q\n", name, args)
	return 2
}
