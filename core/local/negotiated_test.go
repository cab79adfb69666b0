package local

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// A client that can't agree with the master is told by which of its options.
func TestNegotiated(t *testing.T) {
	for what, keyword := range map[string]string{
		"key exchange": "KexAlgorithms", "host key": "HostKeyAlgorithms", "client to server cipher": "Ciphers",
		"server to client MAC": "MACs", "client to server compression": "Compression",
	} {
		err := negotiated(fmt.Errorf("handshake: %w", &ssh.AlgorithmNegotiationError{What: what, RequestedAlgorithms: []string{"a", "b"}}))
		if line := err.Error(); !strings.Contains(line, " "+keyword+" of this ssh") || !strings.Contains(line, "(a,b)") ||
			!strings.Contains(line, "MUXPROXY_BYPASS=1") {
			t.Errorf("%s: %s", what, line)
		}
	}
	for _, err := range []error{io.EOF, &ssh.AlgorithmNegotiationError{What: "dance"}} {
		if got := negotiated(err); !errors.Is(got, err) {
			t.Errorf("%v became %v", err, got)
		}
	}
}
