// Package harden keeps other processes of the same user out of this one's memory, file descriptors and core files.
package harden

import "errors"

// ErrTraced says that another process traces this one.
var ErrTraced = errors.New("a debugger or strace is attached to this process")

// Process hardens the calling process; main calls it once, before there is a secret in memory. After that no process without
// CAP_SYS_PTRACE can attach to this one, read its memory or environment, or take its file descriptors; it leaves no core
// file; and files that it makes are its user's alone (umask 077). The error wraps ErrTraced if somebody is attached already,
// or says that this can't be found out: the process should end then.
//
// Programs that it starts lose the first at exec(2), and keep the other two: umask 077, and a soft core limit of 0, which
// they may raise again. They don't get those of whoever started this process, who is not the one they work for.
//
// It keeps out what comes later. A process of the same user that opened /proc/PID/mem between exec and this call keeps that,
// and one that can change the program's file, or starts it itself, needs none of this.
//
// On systems other than Linux and macOS it does less: umask and core limit, on Windows nothing.
func Process() error {
	if err := private(); err != nil {
		return err
	}
	return denyTracing()
}
