package pluginhost

import (
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// dieWithMaster is how a program that does not use the SDK was started; the SDK, which this one links, has undone it.
func dieWithMaster() {
	runtime.LockOSThread()
	if unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0) != nil {
		os.Exit(4)
	}
}
