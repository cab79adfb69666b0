//go:build !linux

package doctor

import "net"

// listening reports whether somebody listens at a Unix socket.
func listening(path string) bool {
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	return err == nil
}
