// Package e2e holds the end-to-end tests: the user's own ssh, scp, sftp, rsync and git through muxproxy to a real sshd,
// all on loopback, each test with a home, a master and an sshd of its own.
//
// The environment chooses what runs:
//
//	E2E_PLAIN=1  no ProxyCommand: the same tests against plain ssh. It shows that a test asks for what ssh does.
//	E2E_RACE=0   builds the programs without the race detector.
//	E2E_BIN=DIR  tests the programs in DIR and builds none.
//	E2E_BIG=1    the byte-exact copies move 256 MiB, built without the race detector; else 64 MiB.
//	             A forwarded connection is silent for a minute; else 2 s.
//
// A test of what plain ssh has not says so in its log and ends at once in plain mode. Nothing is skipped: a missing
// ssh or sshd is a failure.
package e2e
