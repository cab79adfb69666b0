//go:build !linux

package use

import "os"

// ReadEnv returns nothing: this system does not show the environment of other processes.
func ReadEnv(Process, []string) map[string]string { return nil }

// Chain is a process alone: nothing more is read on this system.
func Chain(pid int) []Process { return []Process{{PID: pid}} }

// Self is this process; its parents are not read on this system.
func Self() Caller {
	exe, _ := os.Executable() // "" if it can't be told
	return Caller{UID: os.Geteuid(), Processes: []Process{{PID: os.Getpid(), Exe: exe, Args: os.Args}}}
}
