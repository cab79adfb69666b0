//go:build !linux

package sshconfig

// FindParent: a process can't read another one's arguments there without privileges or cgo, so options on ssh's command
// line don't count.
func FindParent() (Parent, bool) { return Parent{}, false }
