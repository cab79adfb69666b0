//go:build !linux && !darwin

package harden

func denyTracing() error { return nil }
