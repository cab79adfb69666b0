//go:build unix && !linux

package paths

// longPaths tells whether sockets may have paths longer than sockaddr_un.
const longPaths = false
