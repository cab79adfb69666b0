package main

import "os"

// setUmask does nothing: the user's profile folder is private by its access list.
func setUmask() {}

// alive reports whether a process of this pid exists.
func alive(pid int) bool {
	p, err := os.FindProcess(pid)
	if err != nil {
		return false
	}
	p.Release()
	return true
}
