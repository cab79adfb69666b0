//go:build unix

package main

import "golang.org/x/sys/unix"

// setUmask makes every file that the master creates private to its user.
func setUmask() { unix.Umask(0o077) }
