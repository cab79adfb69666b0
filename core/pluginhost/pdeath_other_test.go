//go:build !linux

package pluginhost

func dieWithMaster() {}
